"""An exported sampler runs with JAX alone, and makes the images that `sample` makes."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.sampling import run_exported
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.export import export_sampler
from tests.commands import assert_refused, call
from tests.test_sampler import write_checkpoint

# Refuses what is not JAX or what JAX is made of, so that the export cannot lean on it.
_BARE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dico_jax", "flax", "optax", "orbax", "ml_collections"):
            raise ImportError(f"{name} is not to be used")

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
import json
import numpy as np
import run
sample = run.load()
images = [sample(*given) for given in json.loads(sys.argv[2])]
np.savez(sys.argv[3], *images)
assert not {"dico_jax", "flax"} & sys.modules.keys()
"""


def in_bare_process(folder, calls, out):
    command = [sys.executable, "-I", "-c", _BARE, str(folder), json.dumps(calls), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays:
        return [arrays[name] for name in arrays.files]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("made") / "ckpt")


def images_of(checkpoint, labels, seed, scale, **how):
    overrides = {"cfg_scale": scale, "batch_size": len(labels)}
    how |= {"overrides": overrides, "mesh": one_device()}
    sampler = CheckpointSampler(checkpoint, seed=seed, **how)
    asked = ",".join(map(str, labels))
    return np.concatenate([*sampler.images(sampler.conditions(len(labels), classes=asked))])


def one_device():
    import jax

    from dico_jax.parallel.mesh import create_mesh

    return create_mesh(jax.devices()[:1])


def test_it_makes_the_images_of_sample(checkpoint, tmp_path):
    for batch_size in ("4", "symbolic"):
        folder = tmp_path / batch_size
        export_sampler(str(checkpoint), str(folder), batch_size=batch_size)
        assert sorted(file.name for file in folder.iterdir()) == [
            "meta.json", "run.py", "sampler.stablehlo", "weights.npz"
        ]  # fmt: skip
        calls = [([3, 1, 4, 1], 5), ([3, 1, 4, 1], 6, 3.5), ([3, 1, 4, 1, 5], 5)]
        first, other, five = in_bare_process(folder, calls, tmp_path / f"{batch_size}.npz")
        np.testing.assert_array_equal(first, images_of(checkpoint, [3, 1, 4, 1], 5, 2.0))
        np.testing.assert_array_equal(other, images_of(checkpoint, [3, 1, 4, 1], 6, 3.5))
        assert five.shape == (5, 8, 8, 1)
        assert np.abs(five[:4].astype(int) - first).max() <= 1


def test_a_guide_is_exported_too(checkpoint, tmp_path):
    guide = str(write_checkpoint(tmp_path / "narrow", hidden_size=4))
    export_sampler(str(checkpoint), str(tmp_path / "e"), batch_size="2", guide=guide)
    calls = [([3, 1], 5), ([3, 1], 5, 4.0)]
    images = in_bare_process(tmp_path / "e", calls, tmp_path / "x.npz")
    for made, scale in zip(images, (2.0, 4.0), strict=True):
        wanted = images_of(checkpoint, [3, 1], 5, scale, guide=guide)
        np.testing.assert_array_equal(made, wanted)
        assert (made != images_of(checkpoint, [3, 1], 5, scale)).any()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of classes that are named by numbers, and otherwise."""
    root = tmp_path_factory.mktemp("named")
    source = write_checkpoint(root / "ckpt", ["10", "2", "1", "Cat", "n01443537", "dog", "dog"])
    export_sampler(str(source), str(root / "e"), batch_size="2")
    return root / "e"


def test_classes_by_name(exported, tmp_path):
    calls = [
        (["cat", "goldfish"],), ([" CAT", 4],), ("Cat,#4",),
        ([2, 1],), ("#2,#1",), (["#2", 1],),
    ]  # fmt: skip
    images = in_bare_process(exported, calls, tmp_path / "x.npz")
    for k, image in enumerate(images):
        np.testing.assert_array_equal(image, images[k // 3 * 3])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--classes=tiger"], "'tiger' is no class: use 0 to 9, or a name"),
        (["--classes=3,10,99"], "'99' is no class"),
        (["--classes=-1"], "'-1' is no class"),
        (["--classes="], "'' is no class"),
        (["--classes=2"], "'2' may be each of classes [1, 2]: give the number, such as #1"),
        (["--classes=dog"], "'dog' may be each of classes [5, 6]"),
        (["--classes=3", "--seed=-1"], "seed=-1 must be a whole number from 0 to 4294967295"),
        (["--classes=3", "--seed=4294967296"], "seed=4294967296 must be a whole number"),
        (["--classes=3", "--scale=-1"], "scale=-1.0 must be a number from 0 on"),
        (["--classes=3", "--scale=nan"], "scale=nan must be"),
        (["--classes=3", "--out=none/images.npy"], "--out=none/images.npy: there is no such fold"),
    ],
)
def test_what_run_py_refuses(exported, tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *args])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(exported / "run.py"), run_name="__main__")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {said}")
    assert not list(tmp_path.iterdir())


def test_what_a_call_refuses(exported):
    sample = run_exported.load(exported)
    for given, said in (
        ({"labels": [1.5]}, "'1.5' is no class"),
        ({"labels": [True]}, "'True' is no class"),
        ({"labels": []}, "labels are empty"),
        ({"labels": [1], "seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"labels": [1], "first": 1.5}, "first=1.5 must be a whole number"),
        ({"labels": [1], "first": -1}, "first=-1 must be a whole number"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            sample(**given)
    np.testing.assert_array_equal(sample(np.int64(3)), sample(np.array([3])))


def test_the_file_has_the_name_that_is_given(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--classes=3,cat", "--out=images"])
    runpy.run_path(str(exported / "run.py"), run_name="__main__")
    assert np.load(tmp_path / "images").shape == (2, 8, 8, 1)


def test_for_several_platforms(checkpoint, tmp_path):
    said = export_sampler(str(checkpoint), str(tmp_path / "e"), platforms=["cpu", "cuda", "tpu"])
    assert "cpu, cuda, tpu" in said
    assert in_bare_process(tmp_path / "e", [([3],)], tmp_path / "x.npz")[0].shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--batch_size=0"], ["--batch_size=0 must be a number from 1 on, or 'symbolic'"]),
        (["--platforms=gpu"], ["--platforms=gpu is unknown: use cpu, cuda"]),
        (["--classes=1"], ["--classes=1 is for run.py"]),
        (["--sampler=no"], ["config.sampling.sampler='no' is unknown"]),
    ],
)
def test_what_is_refused(checkpoint, tmp_path, args, parts):
    done = call("dico_jax.export", f"--ckpt={checkpoint}", f"--out={tmp_path / 'e'}", *args)
    assert_refused(done, *parts)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(checkpoint, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="^--out=.* exists"):
        export_sampler(str(checkpoint), str(tmp_path))
