"""Runs in a bucket that are killed, and a bucket that fails, is full, or holds what is damaged."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from dico_jax.checkpoints.reader import saved_steps
from dico_jax.files import as_path
from tests import golden, test_buckets
from tests.commands import ROOT, assert_refused, call, call_together
from tests.real_data import IMAGENET, requires_data
from tests.test_buckets import assert_same_run, environment, inside, killed_in
from tests.test_real_data import vae  # noqa: F401 - a fixture

NO_GRIDS = "--config.sampling.grid_every_steps=0"  # which take long to compile
RUN = [*test_buckets.RUN, NO_GRIDS]
LONG = "--config.training.num_steps=14"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run of 14 steps on a disk, with all its checkpoints, that nothing has happened to."""
    folder = tmp_path_factory.mktemp("local") / "run"
    done = call("dico_jax.main", *RUN, LONG, f"--workdir={folder}",
                "--config.training.keep_checkpoints=9")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def train(run, *more):
    done = call("dico_jax.main", *RUN, f"--workdir={run}", *more)
    assert done.returncode == 0, done.stderr
    return done


def drill(bucket, run, kills, steps):
    """Kills a run again and again: in turns in a save, and some moment after one."""
    draw, most = random.Random(0), max(saved_steps(run), default=0)
    for kill in range(kills):
        wanted, torn = min(most + 2, steps - 2), kill % 2 == 0

        def is_time(names, wanted=wanted, torn=torn):
            part = "params/" if torn else "commit_success.txt"
            return any(f"/checkpoints/{wanted}/{part}" in name for name in names)

        killed_in(bucket, run, is_time, NO_GRIDS, f"--config.training.num_steps={steps}",
                  after=draw.uniform(0, 0.05 if torn else 0.3))  # fmt: skip
        found = max(saved_steps(run), default=0)
        assert found >= most  # nothing saved is lost
        most = found
    train(run, f"--config.training.num_steps={steps}")


def test_kills(bucket, root, local):
    drill(bucket, f"{root}/run", kills=2, steps=14)
    assert_same_run(local, f"{root}/run", 14)


@pytest.mark.slow
def test_twenty_kills_while_five_percent_of_requests_fail(bucket, root, tmp_path):
    steps = 60
    train(tmp_path / "run", f"--config.training.num_steps={steps}")
    bucket.fault = failing(0.05)
    drill(bucket, f"{root}/run", kills=20, steps=steps)
    bucket.fault = lambda method, path: None
    assert_same_run(tmp_path / "run", f"{root}/run", steps)


def failing(fraction):
    draw, kinds = random.Random(0), [429, 503, "cut", "cut after"]
    return lambda method, path: draw.choice(kinds) if draw.random() < fraction else None


def test_five_percent_of_requests_fail(bucket, root, local):
    """Statuses that ask to come back, and connections that are cut before and after the work."""
    bucket.fault = failing(0.05)
    train(f"{root}/run", "--config.training.num_steps=2")
    bucket.fault = lambda method, path: None
    assert_same_run(local, f"{root}/run", 2)


def test_a_save_that_is_refused(bucket, root, local):
    """One line, and nothing that was saved is lost: the same command goes on."""
    run = f"{root}/run"
    bucket.fault = lambda method, path: (
        403 if method == "POST" and "checkpoints%2F4" in path else None
    )
    done = call("dico_jax.main", *RUN, f"--workdir={run}")
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    for part in ("error: ", "step 4 could not be saved", "PERMISSION_DENIED", "same command again"):
        assert part in said
    assert saved_steps(run) == {2}
    bucket.fault = lambda method, path: None
    train(run)
    assert_same_run(local, run, 6)


def test_a_bucket_that_nobody_may_write_to(bucket, root):
    bucket.fault = lambda method, path: 403 if method != "GET" else None
    for command in (["main", *RUN, f"--workdir={root}/run"],
                    ["sample", f"--ckpt={ROOT}", f"--out={root}/out"]):  # fmt: skip
        done = call(f"dico_jax.{command[0]}", *command[1:])
        assert_refused(done, f"={root}/", "cannot be used")
    assert not bucket.names(inside(root))


def test_damaged_and_torn_checkpoints_are_passed_over(bucket, root, local):
    run = f"{root}/run"
    train(run)
    bucket.remove(f"{inside(run)}/checkpoints/6/commit_success.txt")
    array = next(n for n in bucket.names(f"{inside(run)}/checkpoints/4/params/ocdbt"))
    data = bytearray(bucket.read(array))
    data[len(data) // 2] ^= 1
    bucket.write(array, bytes(data))
    assert saved_steps(run) == {2, 4}
    done = train(run, "--config.training.num_steps=8")
    assert "renamed to broken-4, going on from step 2" in done.stdout
    assert_same_run(local, run, 8)
    assert saved_steps(run) == {4, 6, 8}
    assert bucket.names(f"{inside(run)}/checkpoints/broken-4/params/")


@pytest.mark.slow
def test_two_runs_in_one_workdir(bucket, root):
    """The second is refused as soon as it has seen a sign of life of the first."""
    command = [sys.executable, "-m", "dico_jax.main", *RUN, f"--workdir={root}/run"]
    command += ["--config.training.num_steps=100000", "--config.training.log_every_steps=100"]
    command += ["--config.training.checkpoint_every_steps=50"]
    first = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not saved_steps(f"{root}/run"):
            assert first.poll() is None
            time.sleep(0.05)
        done = call("dico_jax.main", *command[3:])
        assert done.returncode == 2
        assert f"in use by another run (process {first.pid} on" in done.stderr.splitlines()[-1]
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 143
        assert f"{inside(root)}/run/.lock" not in bucket.names(inside(root))
    finally:
        first.kill()


@pytest.mark.slow
def test_another_number_of_processes(bucket, root, tmp_path):
    """Two of two devices train and save; one of four goes on, as if it had done all."""
    fsdp, rate = "--config.mesh.fsdp=2", "--config.optimizer.learning_rate=1e-4"
    for run in (f"{root}/run", str(tmp_path / "run")):
        for steps, layout in ((2, (2, 2)), (4, (1, 4))):
            if run.startswith("gs://") or steps == 4:
                flags = [*RUN, f"--workdir={run}", f"--config.training.num_steps={steps}"]
                call_together(*layout, "dico_jax.main", *flags, fsdp, rate)
    rows = [[json.loads(line) for line in (as_path(run) / "metrics.jsonl").read_text().splitlines()]
            for run in (f"{root}/run", tmp_path / "run")]  # fmt: skip
    losses = [[row["loss"] for row in part] for part in rows]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)


@requires_data
@golden.requires_golden
@pytest.mark.slow
def test_all_commands_from_and_to_a_bucket(bucket, root, vae, tmp_path):  # noqa: F811
    def done(command, *args):
        found = call(f"dico_jax.{command}", *args)
        assert found.returncode == 0, found.stderr
        return found.stdout

    pictures = ["--source=folder", f"--path={root}/pictures", "--image_size=32"]
    for file in itertools.islice(sorted(IMAGENET.glob("*/*")), 60):
        name = file.relative_to(IMAGENET)
        bucket.write(f"{inside(root)}/pictures/{name}", file.read_bytes())
    done("prepare", "latents", *pictures, f"--out={root}/latents", f"--vae={vae}",
         "--shard_size=25", "--verify")  # fmt: skip
    done("prepare", "classifier", *pictures, f"--out={root}/c.npz", "--max_steps=3")
    features = f"--features={root}/c.npz"
    done("prepare", "reference", *pictures, features, f"--out={root}/ref.npz")
    run = [a for a in RUN if "data.batch_size" not in a and "patch_size" not in a]
    done("main", "--config=configs/s256.py", *run[1:], f"--workdir={root}/run",
         f"--config.data.path={root}/latents", "--config.data.source=latents",
         "--config.data.image_size=32", f"--config.autoencoder.path={vae}",
         "--config.data.batch_size=8", "--config.model.patch_size=2",
         "--config.model.num_classes=None", "--config.profile.start_step=3")  # fmt: skip
    assert any("/profile/" in name for name in bucket.names(inside(root)))
    done("sample", f"--ckpt={root}/run", f"--out={root}/out", "--num_images=8",
         f"--npz={root}/out.npz", "--trajectory")  # fmt: skip
    for name in ("000007.png", "grid.png", "sampling.json", "trajectory.gif"):
        assert f"{inside(root)}/out/{name}" in bucket.names(inside(root))
    done("export", f"--ckpt={root}/run", f"--out={root}/exported", "--batch_size=2", "--steps=2")
    assert f"{inside(root)}/exported/meta.json" in bucket.names(inside(root))
    against = [f"--reference={root}/ref.npz", features]
    done("evaluate", f"--samples={root}/out", *against, f"--out={root}/a.json")
    done("evaluate", f"--samples={root}/out.npz", *against, f"--out={root}/b.json")
    done("evaluate", f"--ckpt={root}/run", "--num_samples=8", *against, f"--out={root}/c.json")
    fid = [json.loads(bucket.read(f"{inside(root)}/{n}.json"))["metrics"]["fid"] for n in "abc"]
    np.testing.assert_allclose(fid, fid[0], rtol=1e-6)
    done("convert", "to_pytorch", f"--ckpt={root}/run", f"--out={root}/w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(bucket.read(f"{inside(root)}/w.safetensors"))
    done("convert", "from_pytorch", f"--input={root}/w.safetensors", f"--out={root}/back",
         "--image_size=32")  # fmt: skip
    assert saved_steps(f"{root}/back") == {0}
    done("convert", "to_pytorch", f"--ckpt={root}/back", f"--out={tmp_path}/v.safetensors")
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in "wv")
    for name in other.keys() - {"pos_embed"}:  # which is of the size of the latents
        array = other[name]
        np.testing.assert_array_equal(array, one[name])
    bucket.write(f"{inside(root)}/vae.safetensors", vae.read_bytes())
    done("sample", f"--ckpt={root}/w.safetensors", f"--vae={root}/vae.safetensors",
         f"--out={root}/of_a_file", "--num_images=2", "--steps=2")  # fmt: skip
    assert f"{inside(root)}/of_a_file/000001.png" in bucket.names(inside(root))
    first = ["--config.training.num_steps=2", f"--config.training.init_from={root}/back"]
    done("main", "--config=configs/s256.py", *run[1:], f"--workdir={root}/again",
         f"--config.data.path={root}/latents", "--config.data.source=latents",
         "--config.data.image_size=32", f"--config.autoencoder.path={root}/vae.safetensors",
         "--config.data.batch_size=8", "--config.model.patch_size=2",
         "--config.model.num_classes=None", *first)  # fmt: skip
