"""Runs of several real processes, against runs of one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dico_jax.checkpoints.reader import saved_steps
from dico_jax.training.workdir import workdir_lock
from tests.commands import HURRY, ROOT, call, call_together
from tests.test_commands import QUICK, QUICK_DICO

STEPS = 20


def start(num_processes, devices_each, workdir, *args, network=QUICK):
    """Trains in processes of their own on this machine; returns when all have ended well."""
    # AdamW turns the rounding of a near-zero gradient into a step of up to the learning rate: the
    # published one, not the demo's.
    rate = "--config.optimizer.learning_rate=1e-4"
    args = [*network, f"--workdir={workdir}", "--config.training.log_every_steps=1", rate, *args]
    return call_together(num_processes, devices_each, "dico_jax.main", *args)


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.array([line["loss"] for line in lines if "loss" in line])


def compare(tmp_path, num_steps, layouts, network=QUICK):
    """Losses of every layout against 1 process with 4 devices, data parallel."""
    steps = f"--config.training.num_steps={num_steps}"
    start(1, 4, tmp_path / "one", steps, network=network)
    expected = losses(tmp_path / "one")
    assert len(expected) == num_steps
    assert len(set(expected)) == num_steps
    for number, (num_processes, devices_each, *args) in enumerate(layouts):
        workdir = tmp_path / f"layout{number}"
        outputs = start(num_processes, devices_each, workdir, steps, *args, network=network)
        found = losses(workdir)
        worst = np.abs(found / expected - 1).max()
        print(f"{num_processes} x {devices_each} {args}: {worst:.1e} relative")
        assert worst < 1e-5, (num_processes, devices_each, args)
        for output in outputs[1:]:  # one logger
            assert "loss=" not in output
        assert len(list(workdir.glob("events.out.tfevents.*"))) == 1


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(tmp_path):
    start(1, 1, tmp_path / "run", "--config.training.num_steps=1")
    folders = []
    for number in (1, 2):
        folders.append(tmp_path / f"images{number}")
        args = [f"--ckpt={tmp_path / 'run'}", f"--out={folders[-1]}", "--num_images=9"]
        args += ["--batch_size=2", "--save_latents", f"--npz={tmp_path}/{number}.npz"]
        outputs = call_together(number, 2 // number, "dico_jax.sample", *args)
        assert "9 images and grid.png" in outputs[0]
        assert "images and grid" not in "".join(outputs[1:])
    found = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert found[0] == found[1]
    for name in ("000004.png", "000008.png", "latents.npy"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "2.npz") as two:
        np.testing.assert_array_equal(one["arr_0"], two["arr_0"])


FSDP = "--config.mesh.fsdp=4"


def test_two_processes_train_as_one(tmp_path):
    compare(tmp_path, 4, [(2, 2, "--config.mesh.fsdp=2", "--config.training.accumulation_steps=2")])


@pytest.mark.slow
def test_processes_and_meshes_train_alike(tmp_path):
    compare(
        tmp_path,
        STEPS,
        [
            (2, 2),
            (4, 1),
            (1, 4, FSDP),
            (2, 2, FSDP),
            (4, 1, FSDP),
            (1, 4, "--config.mesh.fsdp=2"),
            (1, 4, "--config.mesh.tensor=2"),
            (2, 2, "--config.mesh.tensor=4"),
            (1, 4, "--config.training.accumulation_steps=4"),
        ],
        QUICK_DICO,
    )


@pytest.mark.slow
def test_a_run_goes_on_where_the_cores_are_devices_or_one_is(tmp_path):
    """A batch of 6 divides over 2 or 3 devices, one of 7 over none that most machines have."""
    args = [*QUICK, "--config.data.batch_size=6", f"--workdir={tmp_path / 'run'}"]
    for steps, tuning in ((2, "false"), (4, "true"), (6, "false")):
        done = call("dico_jax.main", *args, f"--config.training.num_steps={steps}",
                    f"--cpu_tuning={tuning}", devices=None)  # fmt: skip
        assert done.returncode == 0, done.stderr
    args = [*QUICK, "--config.data.batch_size=7", f"--workdir={tmp_path / 'seven'}"]
    done = call("dico_jax.main", *args, devices=None)
    assert done.returncode == 0, done.stderr


def test_a_process_that_never_joins_is_an_error_and_no_hang(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dico_jax.main", *QUICK, f"--workdir={tmp_path / 'run'}",
         "--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1",
         "--distributed_timeout=3"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert (
        "error: --distributed_timeout=3: not all processes of this run have joined" in done.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--num_processes=2"], "--coordinator_address, --process_id: give all of"),
        (
            ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 must be in 0 to 1",
        ),
    ],
)
def test_wrong_descriptions(args, part, tmp_path):
    from dico_jax.errors import UsageError
    from dico_jax.parallel import processes as distributed

    values = {arg.lstrip("-").split("=")[0]: arg.split("=")[1] for arg in args}
    numbers = {k: int(v) if v.isdecimal() else v for k, v in values.items()}
    with pytest.raises(UsageError, match=part):
        distributed.initialize(**numbers)


def test_surroundings_of_several_processes():
    from dico_jax.parallel.processes import several_processes

    assert not several_processes({"TPU_SKIP_MDS_QUERY": "1"})
    assert several_processes({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"})
    assert not several_processes(
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "TPU_SKIP_MDS_QUERY": "1"}
    )
    assert several_processes({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert several_processes({"OMPI_COMM_WORLD_SIZE": "4"})


def start_pair(tmp_path, *more):
    """Two processes of one run that would train for long; what they say is in 0.txt and 1.txt."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    args = [*QUICK, f"--workdir={tmp_path / 'run'}", "--config.training.num_steps=100000"]
    args += ["--config.training.log_every_steps=1", "--config.training.checkpoint_every_steps=10"]
    args += [f"--coordinator_address={address}", "--num_processes=2", *more]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "dico_jax.main", *args, f"--process_id={index}"],
            cwd=ROOT, stderr=(tmp_path / f"{index}.txt").open("w"), start_new_session=True,
            env=os.environ | {"XLA_FLAGS": HURRY, "JAX_PLATFORMS": "cpu"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for index in range(2)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("hit", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGINT])
def test_when_one_process_ends_the_other_does_so_soon_and_in_one_line(tmp_path, number, hit):
    processes = start_pair(tmp_path, "--distributed_timeout=30")
    other = processes[1 - hit]
    try:
        while not saved_steps(tmp_path / "run"):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        processes[hit].send_signal(number)
        status = other.wait(timeout=30 if number != signal.SIGSTOP else 60)
        if number == signal.SIGINT:
            assert processes[hit].wait(timeout=30) == 130
    finally:
        for process in processes:
            process.kill()
    text = (tmp_path / f"{1 - hit}.txt").read_text()
    assert status == (130 if number == signal.SIGINT else 1), text
    assert "Traceback" not in text
    if number != signal.SIGINT:
        (error,) = re.findall("^error: .*", text, re.MULTILINE)
        silent = " (silent for 30 s)" * (number == signal.SIGSTOP)
        assert error.startswith(f"error: process {hit} is gone{silent}: the same command goes on")
        assert error.endswith(f"from step {max(saved_steps(tmp_path / 'run'))}")


@pytest.mark.slow
def test_a_second_group_in_a_workdir_that_is_in_use_ends_as_a_whole(tmp_path):
    with workdir_lock(str(tmp_path / "run")):
        processes = start_pair(tmp_path)
        try:
            assert [process.wait(timeout=120) for process in processes] == [2, 2]
        finally:
            for process in processes:
                process.kill()
    for index, says in enumerate(("", "process 0 has ended with status 2: ")):
        (line,) = (tmp_path / f"{index}.txt").read_text().split("\n\n")[-1].strip().splitlines()
        assert line.startswith(f"error: {says}--workdir={tmp_path / 'run'} is in use by another")
