"""From real pictures to a first training step, by the commands and by the configs."""

import json
import shutil

import numpy as np
import pytest

from configs import cifar10, folder, s256
from dico_jax.data.latents import PreparedLatents
from dico_jax.errors import UsageError
from dico_jax.training.loop import train
from dico_jax.training.run import Run
from tests import golden
from tests.commands import assert_refused, call
from tests.real_data import DATA, IMAGENET, requires_data

pytestmark = [requires_data, golden.requires_golden]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The small autoencoder of the recorded numbers: 2 pixels per latent position."""
    file = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    done = call(
        "dico_jax.convert", "vae", f"--input={golden.FOLDER / 'vae_small.safetensors'}",
        f"--out={file}", "--norm_num_groups=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return file


@pytest.fixture(scope="module")
def latents(vae, tmp_path_factory):
    """The pictures of ImageNet at 32x32, prepared."""
    out = tmp_path_factory.mktemp("latents") / "imagenet"
    done = call(
        "dico_jax.prepare", "latents", "--source=folder", f"--path={IMAGENET}", f"--out={out}",
        "--image_size=32", f"--vae={vae}", "--shard_size=25", "--batch_size=16", "--num_workers=1",
        "--verify", devices=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "60 examples in 3 shards" in done.stdout
    assert "0 bad ones" in done.stdout
    assert "all as they should be" in done.stdout
    assert "image/s" in done.stderr
    return out


def small(config, **data):
    """An experiment of two steps of a tiny network, which compiles fast."""
    config.data.update({"batch_size": 8, "max_bad_fraction": 0.0} | data)
    config.model.name = "DiT"
    config.model.hidden_size, config.model.depth = 8, 1
    config.model.num_heads, config.model.patch_size = 1, 4
    config.training.num_steps = 2
    config.training.log_every_steps = 1
    config.sampling.num_steps = 2
    config.sampling.batch_size = 8
    config.sampling.grid_every_steps = 0
    config.sampling.grid_rows = config.sampling.grid_columns = 2
    return config


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_training_from_prepared_latents(latents, vae, tmp_path):
    config = small(s256.get_config(), path=str(latents), image_size=32)
    config.autoencoder.path = str(vae)
    config.sampling.grid_every_steps = 2
    train(config, str(tmp_path / "run"))
    assert np.isfinite(losses(tmp_path / "run")).all()
    assert (tmp_path / "run/samples/step_0000002.png").exists()
    done = call(
        "dico_jax.sample", f"--ckpt={tmp_path / 'run'}", f"--out={tmp_path / 'out'}",
        "--num_images=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from PIL import Image

    assert Image.open(tmp_path / "out/000001.png").size == (32, 32)


def test_prepared_latents_are_those_that_are_encoded_on_the_fly(latents, vae):
    """The means of the first batch, by both ways."""
    found = []
    for source, path in (("latents", latents), ("folder", IMAGENET)):
        config = small(s256.get_config(), source=source, path=str(path), image_size=32)
        config.data.latent_sampling = "mean"
        config.autoencoder.path = str(vae)
        run = Run(config, str(latents.parent / f"run-{source}"))
        with run.batches(0) as batches:
            batch = next(batches)
            found.append(run.to_latents(batch, np.int32(1)))
    np.testing.assert_array_equal(found[0]["condition"]["label"], found[1]["condition"]["label"])
    np.testing.assert_allclose(found[0]["x"], found[1]["x"], atol=2e-3)
    assert np.abs(found[0]["x"]).max() > 0.1


def test_another_vae_is_refused(latents, vae, tmp_path):
    from safetensors import numpy as safetensors

    weights = safetensors.load_file(golden.FOLDER / "vae_small.safetensors")
    weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"] * 2
    safetensors.save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    shutil.copy(vae, tmp_path / "same.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", "norm_num_groups": 8})
    )
    config = small(s256.get_config(), path=str(latents), image_size=32)
    config.autoencoder.path = str(tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UsageError, match="config.autoencoder.path=.* is not the autoencoder that"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    config.autoencoder.path = str(tmp_path / "same.safetensors")
    Run(config, str(tmp_path / "run"))


def test_a_damaged_shard_stops_before_training_starts(latents, vae, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "latents")
    shard = next(copy.glob("*.array_record"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    config = small(s256.get_config(), path=str(copy), image_size=32)
    config.autoencoder.path = str(vae)
    with pytest.raises(UsageError, match=f"config.data.path=.*{shard.name} has a wrong checksum"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    done = call("dico_jax.prepare", "latents", f"--out={copy}", "--verify")
    assert_refused(done, shard.name, "wrong checksum")


def test_ones_own_pictures_with_bad_files_among_them(vae, tmp_path):
    """configs/folder.py: classes counted, latents encoded on the fly, bad files listed."""
    pictures = shutil.copytree(IMAGENET, tmp_path / "pictures")
    files = sorted(pictures.glob("*/*.JPEG"))
    files[7].write_bytes(files[7].read_bytes()[:1000])
    files[20].write_text("no picture")
    (files[30].parent / "notes.txt").write_text("no picture")
    config = small(folder.get_config(), path=str(pictures), image_size=32, max_bad_fraction=0.1)
    config.training.num_steps = 8  # every picture once
    config.autoencoder.path = str(vae)
    train(config, str(tmp_path / "run"))
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["num_classes"] == 60
    assert np.isfinite(losses(tmp_path / "run")).all()
    lines = (tmp_path / "run/bad_examples.jsonl").read_text().splitlines()
    expected = {f"{file.parent.name}/{file.name}" for file in (files[7], files[20])}
    expected.add(f"{files[30].parent.name}/notes.txt")
    assert {json.loads(line)["id"] for line in lines} == expected

    config.data.max_bad_fraction = 0.02
    with pytest.raises(UsageError, match="config.data.max_bad_fraction=0.02: "):
        train(config, str(tmp_path / "other"))


@pytest.mark.slow  # test_sources.py reads zip files, test_training.py trains on pictures
def test_cifar10_from_its_zip(tmp_path):
    config = small(cifar10.get_config(), source="zip", path=str(DATA / "cifar10_test.zip"))
    config.data.num_workers = 1
    train(config, str(tmp_path))
    assert np.isfinite(losses(tmp_path)).all()
    names = json.loads(next(tmp_path.glob("checkpoints/*/meta/metadata")).read_text())
    assert names["class_names"][:2] == ["airplane", "automobile"]


def test_the_documented_size_of_latents(latents):
    source = PreparedLatents(str(latents))
    size = sum(shard.bytes for shard in source.manifest.shards)
    # 4 * orientations * h * w * channels bytes each; on top of it are ids, labels and heads of
    # records, and files are made of blocks of 64 KiB.
    overhead = size - 60 * 4 * 2 * 16 * 16 * 4
    assert 0 < overhead < 60 * 128 + 3 * 2 * 65536


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ((), ["what to do is missing: use prepare latents"]),
        (("latent", "--out=OUT"), ["'latent' is unknown: use prepare latents"]),
        (("latents", "--out=OUT"), ["--source is missing"]),
        (("latents", "--out=OUT", "--source=folders"), ["--source='folders' is unknown", "folder"]),
        (("latents", "--out=OUT", "--source=folder"), ["--path is not set"]),
        (("latents", "--out=OUT", "--source=folder", "--path=/none"), ["--path=/none"]),
        (("latents", "--out=OUT", "--verify"), ["OUT does not exist"]),
        (("latents", "--out=OUT", "--source=digits", "--vae=/none"), ["--vae=/none"]),
        (("latents", "--out=OUT", "--source=digits", "--dtype=int8"), ["--dtype=int8"]),
        (("latents", "--out=OUT", "--source=digits", "--batch_size=0"), ["--batch_size=0"]),
        (("latents", "--out=OUT", "--source=digits", "--max_bad_fraction=2"), ["bad_fraction=2"]),
        (
            ("latents", "--out=OUT", "--source=digits", "--process_index=2", "--process_count=2"),
            ["--process_index=2 must be below --process_count=2"],
        ),
    ],
)
def test_wrong_calls_of_prepare(args, parts, tmp_path):
    done = call("dico_jax.prepare", *args, cwd=tmp_path)
    if not args:
        assert done.returncode == 2
        return
    assert_refused(done, *parts)
    assert not list(tmp_path.iterdir())
