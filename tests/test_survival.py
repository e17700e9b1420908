"""Runs that are preempted, killed, or started twice."""

import asyncio
import contextlib
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import digits
from dico_jax.checkpoints import writer
from dico_jax.checkpoints.reader import saved_steps, stored_leaves
from dico_jax.config import DEFAULTS, flatten
from dico_jax.errors import UsageError
from dico_jax.files import Deferred
from dico_jax.training.loop import train
from dico_jax.training.watch import Preempted, Preemption
from dico_jax.training.workdir import (
    MUTABLE_FIELDS,
    MUTABLE_SECTIONS,
    check_workdir,
    open_workdir,
    workdir_lock,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
DRILL = [sys.executable, str(ROOT / "benchmarks" / "kill_drill.py")]

# The lock.


def test_one_run_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with workdir_lock(str(folder)):
        with (
            pytest.raises(UsageError) as error,
            workdir_lock(str(folder)),
        ):
            pass
        for part in (f"--workdir={folder} is in use by another run", f"process {os.getpid()}",
                     f"on {socket.gethostname()} since 20"):  # fmt: skip
            assert part in str(error.value)
        with workdir_lock(str(folder), process_index=1):
            pass  # of the same run
        with workdir_lock(str(tmp_path / "other")):
            pass
    with workdir_lock(str(folder)):
        pass


@pytest.mark.filterwarnings("ignore:.*fork")
def test_the_lock_goes_with_its_process(tmp_path):
    """Also when that is killed."""
    holder = os.fork()
    if not holder:  # nothing but the lock, in a copy of a process with threads
        with workdir_lock(str(tmp_path)):
            (tmp_path / "held").touch()
            time.sleep(600)
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with (
            pytest.raises(UsageError, match=f"in use by another run .process {holder} on"),
            workdir_lock(str(tmp_path)),
        ):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    with workdir_lock(str(tmp_path)):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_folders_that_cannot_be_locked(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileExistsError, match=f"{tmp_path}/file"),  # a line, by the commands
        workdir_lock(f"{tmp_path}/file"),
    ):
        pass
    with pytest.raises(NotADirectoryError), workdir_lock(f"{tmp_path}/file/run"):
        pass

    def unsupported(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with workdir_lock(str(tmp_path)):
        assert "cannot be locked (Function not implemented)" in capfd.readouterr().err


def test_fields_that_are_newer_than_a_run(tmp_path):
    """They have done what their defaults do, so the run goes on with the defaults alone."""
    config = digits.get_config()
    folder = open_workdir(str(tmp_path), config)
    (folder / "checkpoints" / "5").mkdir(parents=True)  # else it takes any config
    old = json.loads((folder / "config.json").read_text())
    del old["model"]["class_dropout_prob"]
    (folder / "config.json").write_text(json.dumps(old))
    check_workdir(str(tmp_path), config)
    config.model.class_dropout_prob = 0.2
    with pytest.raises(UsageError, match="config.model.class_dropout_prob was 0.1, is 0.2"):
        check_workdir(str(tmp_path), config)


def test_fields_that_may_change_exist():
    fields = {f"{section}.{n}" for section, ns in MUTABLE_FIELDS.items() for n in ns.split()}
    assert fields <= flatten(DEFAULTS).keys()
    assert set(MUTABLE_SECTIONS) <= DEFAULTS.keys()


# SIGTERM.


def test_sigterm_is_noticed_and_does_not_interrupt():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.requested()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested()
        assert preemption.requested()
    assert signal.getsignal(signal.SIGTERM) is before
    with Preemption() as preemption:
        assert not preemption.requested()


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(60)  # which the signal interrupts


def test_ctrl_c_asks_for_a_save_and_a_second_one_for_none(capfd):
    before = signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        preemption.step = 601
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested()
        assert preemption.interrupted
        assert capfd.readouterr().err == "\nsaving step 601; ^C again to leave without\n"
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_where_nothing_is_to_be_saved_signals_end_the_run_at_once():
    with Preemption(status=99) as preemption:
        preemption.at_once = preemption.statuses
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(Preempted) as ended:
            send(signal.SIGTERM)
        assert ended.value.code == 99
        assert not preemption.requested()


def test_sigterm_after_the_save_changes_the_exit_status_no_more():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended, Preemption():
            raise Preempted(143)
        assert ended.value.code == 143
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


NUM_STEPS = 120


@contextlib.contextmanager
def digits_run(workdir):
    """A run of the digits in a process of its own; killed at the end if it still lives.

    Its network is the one that starts fastest.
    """
    command = [
        sys.executable, "-m", "dico_jax.main", "--config=configs/digits.py", f"--workdir={workdir}",
        "--config.data.batch_size=16", "--config.model.name=DiT", "--config.model.hidden_size=8",
        "--config.model.depth=1", "--config.model.num_heads=1", "--config.model.patch_size=4",
        "--config.sampling.num_steps=2", "--config.training.log_every_steps=1",
        f"--config.training.num_steps={NUM_STEPS}",
        "--config.sampling.grid_every_steps=0", "--config.eval.class_agreement_samples=0",
        "--config.logging.report=False",
    ]  # fmt: skip
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def logged(workdir):
    """The loss of each step."""
    lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def last_arrays(workdir):
    """Every array of the last checkpoint, as bytes."""
    folder = workdir / "checkpoints" / str(NUM_STEPS)
    items = [item for item in folder.iterdir() if (item / "_METADATA").exists()]
    assert {"params", "ema_params", "opt_state"} <= {item.name for item in items}
    return {
        (item.name, *path): np.asarray(leaf.read()).tobytes()
        for item in items
        for path, leaf in stored_leaves(item).items()
    }


@pytest.mark.slow
def test_a_preempted_run_goes_on_exactly(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with digits_run(whole) as process:
        output = process.communicate()
        assert process.returncode == 0, output

    with digits_run(parts) as process:
        while not ((parts / "metrics.jsonl").exists() and len(logged(parts)) > 3):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # some schedulers send it again
        output = process.communicate()
        assert process.returncode == 143, output
    steps = [step for step, _ in logged(parts)]
    (saved,) = saved_steps(parts)
    assert 3 < saved == steps[-1] < NUM_STEPS
    assert f"step {saved}" in "".join(output)
    assert "Traceback" not in output[1]

    with digits_run(parts) as process:
        output = process.communicate()
        assert process.returncode == 0, output
    assert f"steps {saved} to {NUM_STEPS}" in "".join(output)
    assert [step for step, _ in logged(parts)] == list(range(1, NUM_STEPS + 1))
    assert logged(parts) == logged(whole)
    assert last_arrays(parts) == last_arrays(whole)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_leaves_no_other_one_writing(monkeypatch, failing):
    """Whoever cleans up after it must be alone in the folder."""
    waited = set()

    def result(number):
        waited.add(number)
        if number == failing:
            raise OSError("the disk is full")

    async def serialize(self, values, infos, args):
        return [types.SimpleNamespace(result=functools.partial(result, i)) for i in range(2)]

    monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "serialize", serialize)
    monkeypatch.setattr(writer, "_GROUP_BYTES", 1)
    leaves = [Deferred(np.dtype("float32"), (2,), lambda: np.zeros(2, np.float32))] * 2
    handler = writer._DeferredHandler()
    with pytest.raises(OSError, match="the disk is full"):
        asyncio.run(handler.serialize(leaves, [None, None]))
    assert waited == {0, 1}


def test_a_second_run_refuses_while_the_first_lives(tmp_path):
    with (
        workdir_lock(str(tmp_path)),
        pytest.raises(UsageError, match=f"{tmp_path} is in use by another run .process "),
    ):
        train(digits.get_config(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_killed_run_ends_as_one_left_alone(tmp_path):
    done = subprocess.run(
        [*DRILL, "--kills=3", f"--folder={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.splitlines()[-1] == "identical"


# Several processes.


SHARED_RUN = """
import pathlib, signal, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 2)
workdir, address, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, index)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from dico_jax.checkpoints.checkpointer import Checkpointer
from dico_jax.training.watch import Preempted, Preemption
from dico_jax.checkpoints.state import TrainState
from dico_jax.training.workdir import workdir_lock

mesh = Mesh(np.array(jax.devices()), ("fsdp",))
values = np.arange(64, dtype=np.float32).reshape(16, 4)

def state(step):
    def put(x, spec):
        return jax.make_array_from_callback(
            np.shape(x), NamedSharding(mesh, spec), lambda i: np.asarray(x)[i]
        )
    trees = [{"a": put(values + k + step, P("fsdp")), "b": put(values + k, P())} for k in range(3)]
    return TrainState(put(np.int32(step), P()), *trees)

def same(one, other):
    return all(
        np.array_equal(a.data, b.data)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    )

target = jax.eval_shape(lambda state: state, state(0))
target = jax.tree.map(
    lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding), target, state(0)
)
meta = {"config": {}, "class_names": []}
with workdir_lock(str(workdir), index), Preemption() as preemption:
    with Checkpointer(workdir, meta, keep=2) as saver:
        for step in (3, 6):
            saver.save(step, state(step))
    if index == 0:
        files = [f for f in (workdir / "checkpoints" / "6").rglob("*") if f.is_file()]
        assert any("ocdbt.process_1" in str(f) for f in files)
        file = max((f for f in files if "params" in str(f)), key=lambda f: f.stat().st_size)
        data = bytearray(file.read_bytes())
        data[-20] ^= 1
        file.write_bytes(data)
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    with Checkpointer(workdir, meta, keep=2) as saver:
        restored, step = saver.restore_newest(target, lambda line: print(line, flush=True))
        assert step == 3 and same(restored, state(3))
        for step in range(4, 10_000):
            time.sleep(0.02 * (1 + index))  # one is ahead of the other
            if step == 10:
                (workdir / f"ready_{index}").touch()
            if preemption.requested():
                saver.save(step, state(step))
                saver.wait()
                print("saved", step, flush=True)
                raise Preempted(143)
"""


@pytest.mark.slow
def test_processes_of_one_run_agree(tmp_path):
    """On the damaged checkpoint, which process 0 renames, and on the step to stop at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = tmp_path / "run.py"
    script.write_text("import jax.experimental.multihost_utils\n" + SHARED_RUN)
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "run"), address, str(index)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        while not all((tmp_path / "run" / f"ready_{index}").exists() for index in range(2)):
            assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], outputs
    lines = [
        [line for line in output.splitlines() if "peer ranks" not in line] for output, _ in outputs
    ]
    assert lines[0][0].startswith("warning: "), lines
    assert "6 is damaged" in lines[0][0]
    assert lines[0][1:] == lines[1] == [f"saved {max(saved_steps(tmp_path / 'run'))}"]
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"3", "broken-6", lines[1][0].split()[1]}
