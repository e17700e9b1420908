"""What earlier versions wrote is read, and gives the numbers that it gave them."""

import hashlib
import json
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dico_jax import create_model, load_pytorch
from dico_jax.config import DEFAULTS, check_fields, with_defaults
from dico_jax.data.latents import PreparedLatents
from dico_jax.experiment import experiment_from_config
from dico_jax.models import abstract_params
from tests.commands import assert_refused, call

FOLDER = pathlib.Path(__file__).parent / "data" / "compat"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
RUN = [
    "--config=configs/digits.py",
    "--config.data.batch_size=16",
    "--config.sampling.num_steps=4",
    "--config.sampling.batch_size=6",
    "--config.sampling.grid_every_steps=0",
    "--config.eval.class_agreement_samples=0",
    "--config.training.log_every_steps=1",
    "--config.training.keep_checkpoints=1",
    "--config.training.checkpoint_every_steps=2",
]
MODELS = {
    "dico": ["--config.model.hidden_size=4"],
    "dit": [
        "--config.model.name=DiT",
        "--config.model.hidden_size=8",
        "--config.model.depth=1",
        "--config.model.num_heads=1",
        "--config.model.patch_size=4",
        "--config.training.ema_widths=(0.1,)",
        "--config.training.ema_snapshot_every_steps=1",
    ],
}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder with everything that version 0.1.0 wrote."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FOLDER / "0.1.0.tar.xz") as files:
        files.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


def check_samples(folder, out, images, *args):
    """`sample` of a checkpoint gives these images, but for rounding."""
    npz = out / "images.npz"
    args = [f"--out={out / 'images'}", f"--num_images={len(images)}", f"--npz={npz}", *args]
    done = call("dico_jax.sample", f"--ckpt={folder}", *args)
    assert done.returncode == 0, done.stderr
    with np.load(npz) as arrays:
        assert np.abs(arrays["arr_0"].astype(int) - images).max() <= 1


@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on(old, tmp_path, name):
    workdir = tmp_path / "run"
    shutil.copytree(old / name, workdir)
    flags = [*RUN, *MODELS[name], "--config.training.num_steps=3", f"--workdir={workdir}"]
    flags.append("--config.logging.report=False")
    done = call("dico_jax.main", *flags)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for key, value in EXPECTED["metrics"][name].items():
        assert metrics[-1][key] == pytest.approx(value, rel=1e-4), key
    assert (workdir / "checkpoints" / "3").is_dir()
    assert_refused(call("dico_jax.main", *flags, "--config.seed=1"), "config.seed was 0, is 1")


@pytest.mark.parametrize("name", [*MODELS, "converted"])
def test_checkpoints_are_sampled(old, expected, tmp_path, name):
    args = ["--classes=3,1,4"]
    if name == "converted":  # whose config says nothing of how to sample
        args += ["--steps=4", "--cfg_scale=1.4", "--cfg_channels=all"]
    images = expected["dit" if name == "converted" else name]
    check_samples(old / name, tmp_path, images, *args)


def test_averages_are_rebuilt_from_snapshots(old, expected, tmp_path):
    check_samples(old / "dit", tmp_path, expected["width"], "--ema_width=0.1", "--step=1")


def test_weights_for_pytorch_are_read(old):
    sizes = {"hidden_size": 8, "depth": 1, "mlp_ratio": 2, "num_heads": 1, "patch_size": 4}
    model = create_model("DiT", **sizes, in_channels=1, num_classes=10)
    params = load_pytorch(old / "dit.pt", model)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract_params(model))


def test_configs_are_read(old):
    config = json.loads((old / "dico" / "config.json").read_text())
    assert config["model"]["depthwise"] is None
    config["model"]["depthwise"] = "shifted"  # which runs may have said
    config = ConfigDict(with_defaults(config))
    check_fields(config)
    assert set(config.model) == set(DEFAULTS["model"])
    assert experiment_from_config(config).model.hidden_size == 4


def test_latents_are_read(old):
    source = PreparedLatents(str(old / "latents"))
    source.check_checksums()
    assert (len(source), list(source.class_names)) == (6, ["cat", "dog"])
    for i in range(len(source)):
        assert source[i]["label"] == i // 3
        image = np.ascontiguousarray(source[i]["image"])
        assert hashlib.sha256(image.tobytes()).hexdigest() == EXPECTED["latents"][i]


def test_references_and_classifiers_are_read(old, tmp_path):
    out = tmp_path / "out.json"
    done = call(
        "dico_jax.evaluate", f"--samples={old / 'samples.npz'}", f"--out={out}",
        f"--reference={old / 'reference.npz'}", f"--features={old / 'classifier.npz'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    for key, value in EXPECTED["evaluation"].items():
        assert result["metrics"][key] == pytest.approx(value, rel=1e-3), key
