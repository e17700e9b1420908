"""Every command with a file operation that fails: any of them, in turn.

A shim (fault_shim.c) makes the k-th operation below a folder fail: once (EIO, EACCES), or with all
that write after it, as on a full disk (ENOSPC). By default a few k are tried of each command and
error; DICO_JAX_FAULTS=once tries every operation, with the three errors in turn, and
DICO_JAX_FAULTS=all every one with each error, which takes hours.
"""

import errno
import hashlib
import json
import multiprocessing.forkserver
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests import commands

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="the shim needs a C compiler"),
]
_ERRORS = {"full": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
_TRIED = os.environ.get("DICO_JAX_FAULTS", "6")

CONFIG = """
from configs import default

def get_config():
    c = default.get_config()
    c.data.source = "folder"
    c.data.path = "PETS"
    c.data.image_size = 16
    c.data.batch_size = 8
    c.data.max_bad_fraction = 0.5
    c.autoencoder.name = "identity"
    c.model.name = "DiT"
    c.model.hidden_size = 16
    c.model.depth = 1
    c.model.num_heads = 2
    c.model.patch_size = 4
    c.model.in_channels = 3
    c.model.num_classes = None
    c.training.num_steps = 1
    c.training.log_every_steps = 1
    c.training.checkpoint_every_steps = 1
    c.training.keep_checkpoints = 1
    c.sampling.num_steps = 2
    c.sampling.batch_size = 4
    c.sampling.grid_every_steps = 1
    return c
"""
_TRAIN = ("main", "--config=tiny.py", "--workdir=run")
_SIZE = ("--source=folder", "--path=PETS", "--image_size=16")

# Each: the command; what it writes and what there is of it before.
COMMANDS = {
    "main, anew": (*_TRAIN[:2], "--workdir=new"),
    "main, goes on": (*_TRAIN, "--config.training.num_steps=2"),
    "prepare classifier": ("prepare", "classifier", *_SIZE, "--max_steps=5", "--out=new.npz"),
    "prepare reference": ("prepare", "reference", *_SIZE, "--features=c.npz", "--out=new.npz"),
    "sample": ("sample", "--ckpt=run", "--out=more", "--num_images=8", "--npz=more.npz"),
    "evaluate": ("evaluate", "--samples=PETS", "--reference=ref.npz", "--features=c.npz",
                 "--metrics=fid", "--out=new.json"),
    "convert to": ("convert", "to_pytorch", "--ckpt=run", "--out=new.pt"),
    "convert from": ("convert", "from_pytorch", "--input=old.pt", "--num_heads=2", "--out=weights"),
}  # fmt: skip


def _call(folder, *args, **fault):
    for name in [name for name in os.environ if name.startswith("FAULT_")]:
        del os.environ[name]
    os.environ.update(fault)
    try:
        return commands.call(f"dico_jax.{args[0]}", *args[1:], cwd=folder)
    finally:
        for name in fault:
            del os.environ[name]


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """All processes that start from here on have the shim."""
    library = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    source = commands.ROOT / "tests" / "fault_shim.c"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    multiprocessing.forkserver._forkserver._stop()
    os.environ["LD_PRELOAD"] = str(library)
    yield
    del os.environ["LD_PRELOAD"]
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture(scope="module")
def before(shim, tmp_path_factory):
    """A folder with a run of a step and what the commands read; pictures beside it."""
    root = tmp_path_factory.mktemp("faults")
    folder = root / "before"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "pets" / name).mkdir(parents=True)
        for i in range(20):
            image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
            image.save(root / "pets" / name / f"{i}.png")
    (folder / "tiny.py").write_text(CONFIG.replace("PETS", str(root / "pets")))
    for args in (
        _TRAIN,
        ("prepare", "classifier", *_SIZE, "--max_steps=5", "--out=c.npz"),
        ("prepare", "reference", *_SIZE, "--features=c.npz", "--out=ref.npz"),
        ("convert", "to_pytorch", "--ckpt=run", "--out=old.pt"),
        ("sample", "--ckpt=run", "--out=more", "--num_images=4"),
    ):
        done = _call(folder, *(arg.replace("PETS", str(root / "pets")) for arg in args))
        assert done.returncode == 0, (args, done.stderr)
    return folder


def _contents(folder):
    """What the commands leave, by file: times and the words of logs are not compared."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in {".png", ".pt", ".npy", ".npz", ".array_record"}:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for log in folder.glob("*/metrics.jsonl"):
        losses = {
            row["step"]: row["loss"]
            for row in map(json.loads, log.read_text().splitlines())
            if "loss" in row
        }
        found[log.parent.name] = losses
    return found


@pytest.mark.parametrize("error", _ERRORS)
@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_hangs_breaks_or_is_lost(before, tmp_path, name, error):
    args = [arg.replace("PETS", str(before.parent / "pets")) for arg in COMMANDS[name]]
    count = tmp_path / "count"

    def copy(name):
        return pathlib.Path(shutil.copytree(before, tmp_path / name))

    def run(folder, at=0):
        count.write_bytes(bytes(8))
        fault = {
            "FAULT_DIR": str(folder), "FAULT_COUNT": str(count), "FAULT_AT": str(at),
            "FAULT_ERRNO": str(_ERRORS[error]), "FAULT_LOG": str(tmp_path / f"log{at}"),
        }  # fmt: skip
        if error == "full":
            fault["FAULT_STICKY"] = "1"
        return _call(folder, *args, **fault)

    undisturbed = copy("undisturbed")
    done = run(undisturbed)
    assert done.returncode == 0, done.stderr
    number = int.from_bytes(count.read_bytes(), "little")
    assert number > 3
    expected = _contents(undisturbed)
    shutil.rmtree(undisturbed)
    tried = range(1, number + 1)
    if _TRIED == "once":
        tried = range(1 + list(_ERRORS).index(error), number + 1, len(_ERRORS))
    elif _TRIED != "all":
        rng = np.random.default_rng(number)
        tried = sorted({1, number, *map(int, rng.integers(2, number, int(_TRIED) - 2))})
    for at in tried:
        folder = copy(f"at{at}")
        done = run(folder, at)
        log = tmp_path / f"log{at}"
        failed = log.read_text().splitlines()[:3] if log.exists() else []
        what = (f"{at} of {number}", failed, done.stderr.split("\r")[-1][-3000:])
        assert done.returncode in (0, 1, 2), what
        assert "Traceback" not in done.stderr, what
        if done.returncode or args[0] == "main":
            again = _call(folder, *args)
            # A whole file may be there of which the last sync has failed.
            assert again.returncode == 0 or " exists" in again.stderr, (*what, again.stderr)
            if name == "main, goes on":
                assert "steps 0 to" not in done.stdout + again.stdout, what
        found = _contents(folder)
        if "warning: the grid of step" in done.stderr:  # it was said, and training has gone on
            found = {key: expected[key] for key in expected if "samples" in key} | found
        assert {key: found.get(key) for key in expected} == expected, what
        shutil.rmtree(folder)
