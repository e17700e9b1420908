"""Runs, checkpoints, samples and reports in a bucket, an emulated one on this machine."""

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from dico_jax.checkpoints.reader import saved_steps, stored_leaves, verified
from dico_jax.checkpoints.writer import StepWriter
from dico_jax.errors import UsageError
from dico_jax.files import (
    append,
    as_path,
    check_bucket,
    files_below,
    names_in,
    new_file,
    new_folder,
)
from dico_jax.pytorch import hub
from dico_jax.training import workdir as workdirs
from dico_jax.training.workdir import workdir_lock
from tests import buckets
from tests.commands import HURRY, ROOT, assert_refused, call

FIELDS = {
    "data.batch_size": 16,
    "model.name": "DiT",
    "model.hidden_size": 8,
    "model.depth": 1,
    "model.num_heads": 1,
    "model.patch_size": 4,
    "training.num_steps": 6,
    "training.log_every_steps": 1,
    "training.checkpoint_every_steps": 2,
    "sampling.num_steps": 2,
    "sampling.batch_size": 4,
    "sampling.grid_every_steps": 3,
    "sampling.grid_columns": 2,
    "eval.class_agreement_samples": 0,
    "logging.report": False,
}
RUN = ["--config=configs/digits.py", *(f"--config.{name}={v}" for name, v in FIELDS.items())]


def inside(path):
    return path.removeprefix(f"gs://{buckets.NAME}/")


# Files.


def test_files_are_there_whole_or_not_at_all(bucket, root):
    with contextlib.suppress(ZeroDivisionError), new_file(f"{root}/a/x.bin") as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert not names_in(root)
    with new_file(f"{root}/a/x.bin") as stream:
        stream.write(b"whole")
        assert not names_in(root)
    file = as_path(root) / "a" / "x.bin"
    assert file.read_bytes() == b"whole"
    append(file, b" and more")
    assert file.read_bytes() == b"whole and more"
    with contextlib.suppress(ZeroDivisionError), new_folder(f"{root}/b") as folder:
        for name in ("1", "deep/2"):
            (folder / name).write_text("one")
        raise ZeroDivisionError
    assert names_in(root) == ["a"]


def test_empty_objects_named_as_folders_are_no_files(bucket, root):
    """As consoles make them, and gcsfuse for a step that is copied."""
    for name in ("", "a/", "a/b/"):
        bucket.write(f"{inside(root)}/{name}", b"")
    assert names_in(root) == ["a"]
    assert not files_below(root)
    (as_path(root) / "a" / "a").write_text("x")
    assert names_in(f"{root}/a/") == ["a", "b"]
    assert list(files_below(root)) == ["a/a"]


def test_names_that_are_patterns(bucket, root):
    bucket.write(f"{inside(root)}/run1/checkpoints/1/commit_success.txt", b"")
    for name in ("run[1]", "run*", "run?", "run#1"):
        assert not saved_steps(f"{root}/{name}")
        with pytest.raises(UsageError, match="^--workdir=gs:.* leave it out"):
            check_bucket("--workdir", f"{root}/{name}", write=True)


def test_steps_in_a_folder_of_any_name(bucket, root):
    folder = f"{root}/a b%20ü"
    with StepWriter(as_path(f"{folder}/checkpoints")) as writer:
        writer.write(2, {"params": {"x": np.ones(4)}}, {})
        writer.write(3, {"params": {"x": np.ones(4)}}, {})
        writer.wait()
        writer.remove(2)
        assert writer.steps() == [3]
    assert saved_steps(folder) == {3}
    leaves = stored_leaves(verified(as_path(f"{folder}//checkpoints/3"), "params"))
    assert np.array_equal(leaves["x",].read(), np.ones(4))
    with workdir_lock(folder), workdir_lock(f"{folder}1"):
        assert ".lock" in names_in(folder)


def test_files_of_weights_are_fetched_once(bucket, root):
    folder = inside(root)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    bucket.write(f"{folder}/x.safetensors.index.json", json.dumps(index).encode())
    for name in ("one", "two"):
        bucket.write(f"{folder}/{name}.safetensors", name.encode())
    path = pathlib.Path(hub.local_weights(f"{root}/x.safetensors.index.json"))
    assert [(path.parent / f"{name}.safetensors").read_text() for name in ("one", "two")] == [
        "one",
        "two",
    ]
    bucket.write(f"{folder}/one.safetensors", b"changed")
    assert pathlib.Path(hub.local_file(f"{root}/one.safetensors")).read_text() == "one"
    assert hub.file_beside(f"{root}/one.safetensors", "config.json") is None
    assert hub.local_weights(f"{root}/run") == f"{root}/run"  # a folder is read where it is
    with pytest.raises(UsageError, match=f"^{root}/none.pt cannot be read: "):
        hub.local_weights(f"{root}/none.pt")


def test_nothing_that_was_fetched_stays_on_the_disk(bucket, root, tmp_path, monkeypatch):
    bucket.write(f"{inside(root)}/x.pt", b"no weights")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    args = f"--input={root}/x.pt", f"--out={tmp_path}/x.safetensors"
    done = call("dico_jax.convert", "vae", *args, fresh=True)
    assert_refused(done, "x.pt")
    assert not list(tmp_path.glob("dico_jax_*"))


def test_a_full_disk_for_what_is_put_together(bucket, root):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UsageError, match="TMPDIR.* is full"), new_file(f"{root}/x"):
        raise full
    assert not names_in(root)


def test_what_others_write_is_seen_at_once(bucket, root):
    (as_path(root) / "a").write_text("a")
    assert names_in(root) == ["a"]
    bucket.write(f"{inside(root)}/b", b"b")
    assert sorted(names_in(root)) == ["a", "b"]
    bucket.remove(f"{inside(root)}/a")
    assert names_in(root) == ["b"]


# What is refused at once.


def test_buckets_that_cannot_be_used(bucket, root, monkeypatch):
    check_bucket("--workdir", root, write=True)
    with pytest.raises(UsageError, match="gcloud storage buckets create gs://no-such"):
        check_bucket("--workdir", "gs://no-such/run", write=True)
    bucket.fault = lambda method, path: 403 if method == "POST" else None
    check_bucket("--ckpt", root, write=False)
    with pytest.raises(UsageError, match=r"--workdir=gs://.*cannot be used.*as the test says"):
        check_bucket("--workdir", root, write=True)
    bucket.fault = lambda method, path: 401
    with pytest.raises(UsageError, match="run gcloud auth application-default login"):
        check_bucket("--ckpt", root, write=False)
    bucket.fault = lambda method, path: None
    assert not bucket.names(inside(root))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"needs gcsfs: pip install 'dico_jax\[gcs\]'"):
        check_bucket("--workdir", root, write=True)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("main", [*RUN, "--workdir=gs://no-such/run"]),
        ("sample", ["--ckpt=gs://no-such/run", "--out=x"]),
        ("evaluate", ["--samples=gs://no-such/x", "--reference=y"]),
        ("convert", ["to_pytorch", "--ckpt=gs://no-such/x", "--out=y.pt"]),
        ("main", [*RUN, "--config.training.init_from=gs://no-such/x", "--workdir=y"]),
    ],
)
def test_a_wrong_bucket_is_one_line(bucket, command, flags):
    assert_refused(call(f"dico_jax.{command}", *flags), "gs://no-such", "gcloud storage buckets")


# The lock.


def test_one_run_at_a_time(bucket, root, monkeypatch, capfd):
    monkeypatch.setattr(workdirs, "_SILENCE", 1.0)
    monkeypatch.setattr(workdirs, "_RENEWAL", 0.1)
    with workdir_lock(root):
        said = f"in use by another run .process {os.getpid()} on"
        with pytest.raises(UsageError, match=said), workdir_lock(root):
            pass
        with workdir_lock(root, process_index=1):
            pass  # of the same run
    assert not bucket.names(inside(root))
    with workdir_lock(root):
        pass


def test_a_lock_that_a_killed_run_has_left(bucket, root, monkeypatch, capfd):
    """It is taken over at once where that process is known to be gone, else after a silence."""
    monkeypatch.setattr(workdirs, "_SILENCE", 0.5)
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock = workdirs._BucketLock(root)
    bucket.write(f"{inside(root)}/.lock", json.dumps(lock._mark | {"pid": gone.pid}).encode())
    with workdir_lock(root):
        assert "waiting" not in capfd.readouterr().err
    other = json.dumps({"who": "process 1 on other", "machine": "other", "pid": 1})
    for left in (other, "[1]", "{", ""):
        bucket.write(f"{inside(root)}/.lock", left.encode())
        with workdir_lock(root):
            pass
        assert ("waiting" in capfd.readouterr().err) == bool(left)


def test_a_run_whose_lock_is_gone_ends(bucket, root, monkeypatch):
    monkeypatch.setattr(workdirs, "_RENEWAL", 0.05)
    said = []

    def end(*what):
        said.append(what)
        raise SystemExit  # which ends a thread

    monkeypatch.setattr("dico_jax.parallel.processes.end", end)
    with workdir_lock(root):
        bucket.fault = lambda method, path: 503  # it goes on trying
        time.sleep(0.3)
        bucket.fault = lambda method, path: None
        time.sleep(0.3)
        assert not said
        bucket.write(f"{inside(root)}/.lock", b'{"who": "another"}')
        until = time.monotonic() + 20
        while not said and time.monotonic() < until:
            time.sleep(0.05)
    assert "was taken over by another run" in said[0][0]
    assert bucket.read(f"{inside(root)}/.lock") == b'{"who": "another"}'


def test_answers_that_are_lost(bucket, root):
    """A write that was done and whose answer never came is this run's own."""
    cut = iter(["cut after", "cut after"])
    bucket.fault = lambda method, path: next(cut, None) if method in ("POST", "PUT") else None
    with workdir_lock(root):
        assert next(cut, None) is None
        assert bucket.names(inside(root))


# Runs.


def environment():
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {HURRY}",
        "PYTHONPATH": str(ROOT),
    }


def killed_in(bucket, workdir, is_time, *more, after=0.0):
    """Starts a run and kills it some seconds after the names of its objects say it is time."""
    command = [sys.executable, "-m", "dico_jax.main", *RUN, f"--workdir={workdir}", *more]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=said
        )
        while process.poll() is None and not is_time(bucket.names(inside(workdir))):
            time.sleep(0.005)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        said.seek(0)
        assert process.wait() == -signal.SIGKILL, said.read()[-3000:]


def arrays(workdir, step):
    folder = as_path(workdir).absolute() / "checkpoints" / str(step)
    return {
        (item, *path): leaf.read()
        for item in ("params", "ema_params", "opt_state")
        for path, leaf in stored_leaves(folder / item).items()
    }


def assert_same_run(one, other, step):
    first, second = arrays(one, step), arrays(other, step)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=str(name))
    texts = [(as_path(run) / "metrics.jsonl").read_text() for run in (one, other)]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    losses = [[(row["step"], row["loss"], row["grad_norm"]) for row in part] for part in rows]
    assert losses[0][:step] == losses[1]


def test_a_killed_run_goes_on_to_the_bit(bucket, root, tmp_path):
    """Killed in a save; then everything that reads a run reads it where it is."""
    done = call("dico_jax.main", *RUN, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    run = f"{root}/run"
    killed_in(bucket, run, lambda names: any("/checkpoints/4/params/" in name for name in names))
    assert max(saved_steps(run)) == 2
    done = call("dico_jax.main", *RUN, f"--workdir={run}", "--config.logging.report=True")
    assert done.returncode == 0, done.stderr
    if importlib.util.find_spec("bokeh"):
        assert f"\npage        {run}/report.html\n" in done.stdout
        assert b"finished: step 6 of 6" in bucket.read(f"{inside(run)}/report.html")
    seen = [call("dico_jax.show", path).stdout.splitlines() for path in (run, tmp_path / "run")]
    assert seen[0][0] == f"{run}: a workdir"
    assert seen[0][1] == seen[1][1]  # the network
    assert seen[0][-2:-1] == seen[1][-2:-1]  # the norm
    assert "waiting" not in done.stderr
    assert_same_run(tmp_path / "run", run, 6)
    names = bucket.names(inside(run))
    assert f"{inside(run)}/.lock" not in names
    for name in ("config.json", "parameters.txt", "samples/step_0000006.png", "metrics.jsonl"):
        assert f"{inside(run)}/{name}" in names
    assert sum("/events.out.tfevents." in name for name in names) == 2  # of two starts

    told = ["--num_images=4", "--classes=1,2"]
    for where in (tmp_path, root):
        out = [f"--ckpt={where}/run", f"--out={where}/out", f"--npz={where}/all.npz", *told]
        assert call("dico_jax.sample", *out).returncode == 0
        pt = call("dico_jax.convert", "to_pytorch", f"--ckpt={where}/run", f"--out={where}/w.pt")
        assert pt.returncode == 0, pt.stderr
    for name in ("out/000003.png", "out/grid.png", "all.npz", "w.pt"):
        assert bucket.read(f"{inside(root)}/{name}") == (tmp_path / name).read_bytes(), name
    assert_refused(call("dico_jax.sample", *out), "--npz", "exists")
