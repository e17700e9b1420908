"""FID and its family through the commands, in the features of a small classifier."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dico_jax.data.pictures import PictureReader
from dico_jax.data.sources import DigitsSource
from dico_jax.errors import UsageError
from dico_jax.evaluation import evaluator
from dico_jax.evaluation.measure import (
    Options,
    evaluate_files,
    parse_sweep,
    prepare_reference,
)
from dico_jax.evaluation.networks import train_classifier
from dico_jax.evaluation.statistics import open_reference
from tests.commands import assert_refused, call, call_together
from tests.test_commands import QUICK

SAMPLING = ["--steps=2", "--classes=3,1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, a classifier, a reference, and the run's samples as files."""
    folder = tmp_path_factory.mktemp("evaluate")
    source, read = DigitsSource(), PictureReader(8, 1)
    train_classifier(source, read, max_steps=30).save(folder / "classifier.npz")
    done = call("dico_jax.main", *QUICK, f"--workdir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    done = call(
        "dico_jax.prepare", "reference", "--source=digits", "--image_size=8", "--channels=1",
        "--limit=200", f"--features={folder / 'classifier.npz'}", f"--out={folder / 'ref.npz'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ref.npz is written: 200 pictures, features: classifier" in done.stdout
    done = call(
        "dico_jax.sample", f"--ckpt={folder / 'run'}", f"--out={folder / 'images'}", *SAMPLING,
        "--num_images=30", f"--npz={folder / 'images.npz'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def arguments(folder):
    return [f"--reference={folder / 'ref.npz'}", f"--features={folder / 'classifier.npz'}"]


def options(folder, **changes):
    return Options(features=str(folder / "classifier.npz"), **changes)


def test_samples_of_a_checkpoint_are_those_in_files(folder, tmp_path):
    out = tmp_path / "a.json"
    args = [f"--ckpt={folder / 'run'}", *SAMPLING, "--num_samples=30", f"--out={out}"]
    done = call("dico_jax.evaluate", *arguments(folder), *args, devices=2)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert "30 images against" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    for name, value in result["metrics"].items():
        assert [name, "null" if value is None else f"{value:.6g}"] in lines
    assert "warning: 30 " in done.stdout  # fewer than the 64 features
    assert result["metrics"]["inception_score_std"] is None
    assert "warning: inception_score_std is null: it needs more than 5,000" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    samples = result["samples"]
    assert samples["count"] == 30
    assert samples["sampling"]["num_steps"] == 2
    assert (samples["seed"], samples["step"], samples["classes"]) == (0, 4, "3,1")
    assert result["features"]["name"] == "classifier"
    assert len(result["reference"]["sha256"]) == len(result["features"]["sha256"]) == 64
    assert result["reference"]["count"] == 200
    assert result["versions"]["jax"]
    for path in ("images", "images.npz"):
        reference = str(folder / "ref.npz")
        found = evaluate_files(str(folder / path), reference, options(folder, batch_size=7))
        assert found["metrics"].keys() == result["metrics"].keys()
        for name, value in result["metrics"].items():
            # A pixel may be rounded otherwise on two devices than on one.
            assert value is None or found["metrics"][name] == pytest.approx(value, rel=0.02), name
    assert_refused(
        call("dico_jax.evaluate", *arguments(folder), *args), f"--out={out} exists: give another"
    )


def test_an_interrupted_evaluation_goes_on(folder, tmp_path, monkeypatch):
    reference, images = str(folder / "ref.npz"), str(folder / "images")
    expected = evaluate_files(images, reference, options(folder, batch_size=4))
    monkeypatch.setattr(evaluator, "_SAVE_EVERY", 8)
    out = tmp_path / "a.json"
    made = []

    def interrupted(self, images, batch):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(len(batch.pool))
        return add(self, images, batch)

    add = evaluator.FeatureSummary.add
    with monkeypatch.context() as patch:
        patch.setattr(evaluator.FeatureSummary, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_files(images, reference, options(folder, batch_size=4), str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json.partial.npz"]
    other = str(folder / "images.npz")
    with pytest.raises(UsageError, match="was left by an evaluation of something else .samples"):
        evaluate_files(other, reference, options(folder, batch_size=4), str(out))
    picture = folder / "images" / "000003.png"
    whole = picture.read_bytes()
    shutil.copy(folder / "images" / "000005.png", picture)
    with pytest.raises(UsageError, match="was left by an evaluation of other pictures: rem"):
        evaluate_files(images, reference, options(folder, batch_size=4), str(out))
    picture.write_bytes(whole)
    with monkeypatch.context() as patch:
        counts = []
        patch.setattr(
            evaluator.FeatureSummary,
            "add",
            lambda s, i, b: (counts.append(len(b.pool)), add(s, i, b)),
        )
        found = evaluate_files(images, reference, options(folder, batch_size=4), str(out))
    assert sum(counts) == 30 - 16  # two batches of four make a note; four had been noted
    assert found["metrics"] == expected["metrics"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "b.json.partial.npz").write_bytes(b"cut")
    with pytest.raises(UsageError, match=r"b.json.partial.npz is damaged: remove it"):
        evaluate_files(images, reference, options(folder), str(tmp_path / "b.json"))


def test_bad_pictures_are_left_out_and_counted(folder, tmp_path, monkeypatch):
    """Also where an evaluation goes on after them."""
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    (images / "000003.png").write_bytes((images / "000004.png").read_bytes()[:60])
    shutil.copy(images / "grid.png", images / "000012.png")
    monkeypatch.setattr(evaluator, "_SAVE_EVERY", 8)
    reference, how = str(folder / "ref.npz"), {"batch_size": 4, "max_bad_fraction": 0.1}

    def found(*out):
        return evaluate_files(str(images), reference, options(folder, **how), *out)

    expected = found()
    assert expected["samples"]["count"] == 28
    assert list(expected["samples"]["bad_pictures"]) == ["000003.png", "000012.png"]
    assert any("2 pictures cannot be read" in text for text in expected["warnings"])
    save, out = evaluator.FeatureSummary.save, str(tmp_path / "a.json")

    def interrupted(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.FeatureSummary, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            found(out)
    assert found(out)["metrics"] == expected["metrics"]
    how["max_bad_fraction"] = 0.01
    with pytest.raises(UsageError, match=r"--samples=.*max_bad_fraction=0.0\d+: 2 of 30 .*000003"):
        found()
    measured = evaluate_files(
        str(folder / "images.npz"), str(images), options(folder, max_bad_fraction=0.1)
    )
    assert measured["reference"]["count"] == 28
    assert set(measured["reference"]["info"]["bad"]) == {"000003.png", "000012.png"}


@pytest.mark.slow
def test_two_processes_measure_as_one(folder, tmp_path):
    args = [*arguments(folder), f"--samples={folder / 'images'}", "--batch_size=8"]
    outputs = call_together(2, 2, "dico_jax.evaluate", *args, f"--out={tmp_path / 'a.json'}")
    assert ["images against" in output for output in outputs] == [True, False]
    expected = evaluate_files(
        str(folder / "images"), str(folder / "ref.npz"), options(folder, batch_size=8)
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["devices"].startswith("4 x ")
    for name, value in expected["metrics"].items():
        assert value is None or found["metrics"][name] == pytest.approx(value, rel=1e-5), name


def test_a_reference_of_another_classifier(folder, tmp_path):
    read, path = PictureReader(8, 1), tmp_path / "c.npz"
    train_classifier(DigitsSource(), read, max_steps=2, seed=1).save(path)
    with pytest.raises(UsageError, match=r"ref.npz was measured with other weights of the class"):
        evaluate_files(str(folder / "images"), str(folder / "ref.npz"), Options(features=str(path)))


def test_references_keep_the_statistics_of_their_files(folder, tmp_path):
    """ADM's are of more pictures than lie in them."""
    mean, covariance = np.arange(64.0), np.diag(np.arange(1.0, 65))
    path, out = tmp_path / "adm.npz", tmp_path / "ref.npz"
    features = {"features": str(folder / "classifier.npz"), "inception": None, "batch_size": 8}
    with np.load(folder / "images.npz") as images:
        np.savez(path, mu=mean, sigma=covariance, arr_0=images["arr_0"])
    with pytest.raises(UsageError, match="was measured with another feature network: inception"):
        prepare_reference(str(path), None, str(out), **features)
    with np.load(folder / "ref.npz") as ours:
        about = {k: v for k, v in ours.items() if k not in ("mu", "sigma", "pool_features")}
    with np.load(folder / "images.npz") as images:
        np.savez(path, mu=mean, sigma=covariance, arr_0=images["arr_0"], **about)
    text = prepare_reference(str(path), None, str(out), **features)
    assert "ref.npz is written: 30 pictures" in text
    found = open_reference(out)
    np.testing.assert_array_equal(found.mean, mean)
    np.testing.assert_array_equal(found.covariance, covariance)
    assert found.pool_features.shape == (30, 64)
    assert found.info["made_of"]["path"] == str(path)
    np.savez(path, mu=mean, sigma=covariance, **about)
    with pytest.raises(UsageError, match="has statistics and no images: use it as it is"):
        prepare_reference(str(path), None, str(tmp_path / "b.npz"), **features)


def test_a_reference_of_pictures(folder):
    """In a folder or a file, measured on the spot: a set has no distance from itself."""
    for path in ("images", "images.npz"):
        found = evaluate_files(str(folder / path), str(folder / "images"), options(folder))
        assert abs(found["metrics"]["fid"]) < 1e-6
        assert found["metrics"]["precision"] == found["metrics"]["recall"] == 1
        assert found["reference"]["count"] == 30


@pytest.mark.slow
def test_a_sweep_over_guidance(folder, tmp_path):
    out = tmp_path / "sweep.json"
    args = [f"--ckpt={folder / 'run'}", "--steps=2", "--num_samples=20", f"--out={out}"]
    args += [*arguments(folder), "--metrics=fid,inception_score"]
    done = call("dico_jax.evaluate", *args, "--sweep_cfg=1.0:2.0:1.0")
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["sweep"]
    assert [r["samples"]["sampling"]["cfg_scale"] for r in results] == [1.0, 2.0]
    assert done.stdout.splitlines()[0].startswith("guidance scale 1.0: fid ")
    assert Image.open(tmp_path / "sweep.png").size[0] > 600  # two plots
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "sweep.png"]
    # What is there is not measured again; what is new is added.
    done = call("dico_jax.evaluate", *args, "--sweep_cfg=1.0:2.0:0.5")
    assert done.returncode == 0, done.stderr
    again = json.loads(out.read_text())["sweep"]
    assert again[:2] == results
    assert again[2]["samples"]["sampling"]["cfg_scale"] == 1.5
    done = call("dico_jax.evaluate", *args, "--sweep_cfg=3:3:1", "--seed=1")
    assert_refused(done, f"--out={out} is of another sweep")
    done = call("dico_jax.evaluate", *args, "--sweep_cfg=1:1:1", "--metrics=kid")
    assert_refused(done, f"--out={out} is of another sweep")


def test_sweeps():
    assert parse_sweep("1.0:2.0:0.1") == (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)
    assert parse_sweep("1:2:0.6") == (1.0, 1.6)
    wrong = "1:2 2:1:0.1 1:2:0 a:b:c 1:2:-1 -1:2:1 nan:2:1 0:inf:1 0:1:1e-9"
    for text in wrong.split():
        with pytest.raises(UsageError, match=f"--sweep_cfg={text}: write the first scale"):
            parse_sweep(text)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["give either --samples or --ckpt"]),
        (["--samples={}/images", "--ckpt={}/run"], ["give either --samples or --ckpt"]),
        (["--samples={}/images", "--cfg_scale=2"], ["--cfg_scale is for --ckpt"]),
        (["--samples={}/no"], ["--samples=", "no such folder or file"]),
        (["--samples={}/run"], ["--samples="]),
        (["--samples={}/classifier.npz"], ["classifier.npz", "arr_0"]),
        (["--samples={}/images", "--num_samples=40"], ["--num_samples=40", "has 30 images"]),
        (["--samples={}/images", "--metrics=fid,lpips"], ["--metrics: 'lpips' is unknown"]),
        (["--samples={}/images", "--metrics=sfid"], ["sfid cannot be had of --reference="]),
        (["--samples={}/images", "--out=a.txt"], ["--out=a.txt: name a .json file"]),
        (["--samples={}/images", "--out=no/a.json"], ["--out=no/a.json: there is no folder"]),
        (["--samples={}/images", "--reference={}/no"], ["--reference=", "no such folder or file"]),
        (["--samples={}/images", "--reference={}/classifier.npz"], ["classifier.npz", "mu"]),
        (["--samples={}/images", "--inception=x"], ["--inception=x is for --features=inception"]),
        (["--samples={}/images", "--features=x.npz"], ["x.npz is no classifier"]),
        (["--ckpt={}/images"], ["--ckpt=", "holds no checkpoint"]),
        (["--ckpt={}/run", "--sweep_cfg=1:2:1"], ["--sweep_cfg needs --out"]),
        (["--ckpt={}/run", "--sweep_cfg=2:1", "--out=a.json"], ["--sweep_cfg=2:1: write the fi"]),
        (
            ["--ckpt={}/run", "--sweep_cfg=1:2:1", "--cfg_scale=1"],
            ["and no --cfg_scale"],
        ),
    ],
)
def test_evaluate_refuses(folder, tmp_path, args, parts):
    args = [arg.format(folder) for arg in args]
    done = call("dico_jax.evaluate", *arguments(folder), *args, cwd=tmp_path)
    assert_refused(done, *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["reference", "--out=a.npz"], ["reference needs --path or --source"]),
        (["reference", "--path=x"], ["reference needs --out"]),
        (["reference", "--path=x", "--out=a.npz"], ["--path=x: no such folder or file"]),
        (["reference", "--path=x", "--out=a.json"], ["--out=a.json: name a .npz file"]),
        (["reference", "--path=x", "--out=a.npz", "--limit=3"], ["--limit is for pictures of a"]),
        (["reference", "--path=x", "--out=a.npz", "--vae=x"], ["--vae is for latents"]),
        (["classifier", "--out=a.npz"], ["classifier needs --source"]),
        (["classifier", "--source=digit", "--out=a.npz"], ["--source='digit' is unknown"]),
        (["latents", "--source=digits"], ["latents needs --out"]),
    ],
)
def test_prepare_refuses(tmp_path, args, parts):
    assert_refused(call("dico_jax.prepare", *args, cwd=tmp_path), *parts)
    assert not list(tmp_path.iterdir())


def test_a_classifier_by_command(tmp_path):
    for i in range(40):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 10 + i + 150 * (i % 2), np.uint8)).save(path)
    done = call(
        "dico_jax.prepare", "classifier", "--source=folder", f"--path={tmp_path / 'pictures'}",
        "--image_size=4", "--channels=1", "--max_steps=10", f"--out={tmp_path / 'c.npz'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "c.npz is written: right on 100.0% of the pictures that it has not seen" in done.stdout
