"""An exported sampler runs with JAX alone, and makes the images that `sample` makes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dico_jax.errors import UsageError
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


def images_of(checkpoint, labels, seed, scale):
    overrides = {"cfg_scale": scale, "batch_size": len(labels)}
    sampler = CheckpointSampler(checkpoint, seed=seed, overrides=overrides, mesh=one_device())
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
