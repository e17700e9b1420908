"""From captioned pictures to a CLIP score, by the commands: 60 pictures as COCO has its own."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dico_jax.text.encoders import load_encoder
from tests import golden
from tests.commands import HURRY, ROOT, assert_refused, call
from tests.real_data import IMAGENET, requires_data
from tests.test_clip import both
from tests.test_clip import folder as write_clip
from tests.test_real_data import vae  # noqa: F401 - a fixture

pytestmark = [requires_data, golden.requires_golden, pytest.mark.slow]

STEPS = 20
PROMPTS = "a photo of a dog; a red bus"


def annotations():
    """Captions of the pictures as COCO keeps them: two of each, with ids."""
    names = sorted(str(p.relative_to(IMAGENET)) for p in IMAGENET.glob("*/*"))
    images = [{"id": 100 + i, "file_name": name} for i, name in enumerate(names)]
    said = [(image["id"], f"{start} {image['file_name'].split('/')[0].replace('_', ' ')}")
            for image in images for start in ("a photo of a", "here is one")]  # fmt: skip
    captions = [{"id": i, "image_id": of, "caption": text} for i, (of, text) in enumerate(said)]
    return {"info": {}, "licenses": [], "images": images, "annotations": captions}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def latents(vae, clip, tmp_path_factory):  # noqa: F811 - the fixture
    root = tmp_path_factory.mktemp("coco")
    (root / "captions_train2014.json").write_text(json.dumps(annotations()))
    done = call(
        "dico_jax.prepare", "latents", "--source=captions", f"--path={IMAGENET}",
        f"--captions={root / 'captions_train2014.json'}", f"--out={root / 'latents'}",
        "--image_size=32", "--crop=lanczos", "--nomirrored", f"--vae={vae}", f"--text={clip}",
        "--shard_size=25", "--verify", devices=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "60 examples" in done.stdout
    assert "120 captions" in done.stdout
    return root / "latents"


def training(latents, clip, vae, workdir, *more):  # noqa: F811 - the fixture
    encoder = load_encoder(clip, "--text")
    return (
        "dico_jax.main", f"--config={ROOT / 'configs' / 'coco256_uvit.py'}",
        f"--workdir={workdir}", f"--config.data.path={latents}", "--config.data.image_size=32",
        "--config.data.batch_size=8", "--config.model.name=TextDiCo",
        "--config.model.hidden_size=8", "--config.model.depth=(1,1,1,1,1)",
        f"--config.model.text_length={encoder.length}",
        f"--config.model.text_width={encoder.width}",
        f"--config.model.pooled_width={encoder.pooled_width}", f"--config.text.path={clip}",
        f"--config.autoencoder.path={vae}", f"--config.training.num_steps={STEPS}",
        "--config.training.log_every_steps=1", "--config.training.checkpoint_every_steps=5",
        "--config.sampling.num_steps=2", "--config.sampling.batch_size=8",
        f"--config.sampling.grid_every_steps={STEPS}", "--config.sampling.grid_rows=2",
        "--config.sampling.grid_columns=2", *more,
    )  # fmt: skip


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("fusion", ["dwc", "cross_attention"])
def test_from_captions_to_a_score(latents, clip, vae, fusion, tmp_path):  # noqa: F811
    which = f"--config.model.text_fusion={fusion}"
    done = call(*training(latents, clip, vae, tmp_path / "whole", which), devices=2)
    assert done.returncode == 0, done.stderr
    expected = losses(tmp_path / "whole")
    assert len(expected) == STEPS
    assert np.isfinite(list(expected.values())).all()

    # Killed in the middle, the same command goes on, and does the same.
    command = training(latents, clip, vae, tmp_path / "killed", which)
    flags = f"--xla_force_host_platform_device_count=2 {HURRY}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", *command], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "checkpoints" / "5").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = call(*command, devices=2)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "killed") == expected

    out = tmp_path / "out"
    done = call("dico_jax.sample", f"--ckpt={tmp_path / 'killed'}", f"--out={out}",
                f"--prompts={PROMPTS}", "--num_images=4", devices=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "grid.png").exists()
    assert len((out / "prompts.txt").read_text().splitlines()) == 4
    done = call("dico_jax.evaluate", f"--samples={out}", f"--clip={clip}",
                "--metrics=clip_score", f"--out={tmp_path / 'score.json'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "clip_score" in (tmp_path / "score.json").read_text()
    captions = latents.parent / "captions_train2014.json"
    done = call("dico_jax.evaluate", f"--ckpt={tmp_path / 'killed'}", f"--clip={clip}",
                f"--prompts={captions}", "--num_samples=6", "--metrics=clip_score",
                f"--out={tmp_path / 'straight.json'}", devices=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    straight = json.loads((tmp_path / "straight.json").read_text())
    assert straight["samples"]["prompts"] == str(captions)
    assert straight["samples"]["count"] == 6

    done = call("dico_jax.sample", f"--ckpt={tmp_path / 'killed'}", f"--out={tmp_path / 'no'}",
                "--classes=1")  # fmt: skip
    assert_refused(done, "--classes=1", "--prompts")
    other = write_clip(tmp_path / "other", {name: 1.01 * array for name, array in both().items()})
    done = call("dico_jax.sample", f"--ckpt={tmp_path / 'killed'}", f"--out={tmp_path / 'no'}",
                "--prompts=a dog", f"--text_encoder={other}")  # fmt: skip
    assert_refused(done, "--text_encoder", "another encoder")
