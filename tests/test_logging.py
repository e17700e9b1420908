"""metrics.jsonl, TensorBoard events and Weights & Biases."""

import contextlib
import errno
import importlib.machinery
import json
import os
import pathlib
import struct
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from dico_jax.errors import UsageError
from dico_jax.training.logging import Logger, require_wandb


def read_metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(file):
    """The events of a file, each between 12 bytes that begin with its length and 4 bytes."""
    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[12 + length + 4 :]
    return events


def test_rewind_drops_what_came_after(tmp_path, capfd):
    with Logger(tmp_path, 0, 10) as log:
        for step in range(1, 7):
            log.bar.update(1)
            if step % 2 == 0:
                log.scalars(step, {"loss": float(step)})
        log.rewind(4)
        log.bar.update(1)
        log.bar.update(1)
        log.scalars(6, {"loss": -1.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (2, 2.0),
        (4, 4.0),
        (6, -1.0),
    ]
    assert "6/10" in capfd.readouterr().err.splitlines()[-1]
    first, second = (read_events(f) for f in sorted(tmp_path.glob("events.out.tfevents.*")))
    values = [
        [v.simple_value for e in events for v in e.summary.value] for events in (first, second)
    ]
    assert values == [[2.0, 4.0, 6.0], [-1.0]]
    # TensorBoard forgets what it has read of steps from here on.
    assert [e.step for e in second if e.HasField("session_log")] == [5]


def test_the_main_process_alone_writes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Logger(tmp_path, 0, 10, wandb_project="unused") as log:
        log.bar.update(1)
        log.bar.unpause()
        log.bar.set_postfix({"loss": "1"}, refresh=False)
        log.say("hello")
        log.scalars(1, {"loss": 1.0})
        log.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
        log.rewind(0)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which keeps what it is told."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.Error = type("Error", (Exception,), {})
    fake.Image = lambda image: ("image", image.shape)
    fake.runs = []

    def init(**options):
        run = types.SimpleNamespace(options=options, lines=[], log=None, metric=None, exit=None)
        run.log = run.lines.append
        run.define_metric = lambda name, step_metric: setattr(run, "metric", (name, step_metric))
        run.finish = lambda exit_code: setattr(run, "exit", exit_code)
        fake.runs.append(run)
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_gets_the_numbers_and_one_run_per_workdir(tmp_path, wandb):
    folder = tmp_path / "xl256"
    folder.mkdir()
    with Logger(folder, 0, 10, "dico", {"seed": 0}) as log:
        log.scalars(2, {"loss": 1.5})
        log.image(2, "samples", np.zeros((4, 2, 3), np.uint8))
        log.rewind(0)
        log.scalars(2, {"loss": 1.0})
    with pytest.raises(KeyError), Logger(folder, 2, 10, "dico", {"seed": 0}):
        raise KeyError
    first, second = wandb.runs
    assert first.lines == [
        {"step": 2, "loss": 1.5},
        {"step": 2, "samples": ("image", (4, 2, 3))},
        {"step": 2, "loss": 1.0},
    ]
    assert first.metric == ("*", "step")
    assert first.options == second.options
    assert first.options["project"] == "dico"
    assert first.options["resume"] == "allow"
    assert first.options["name"] == "xl256"
    assert first.options["config"] == {"seed": 0}
    assert (first.exit, second.exit) == (0, 1)

    other = tmp_path / "other"
    other.mkdir()
    with Logger(other, 0, 10, "dico"):
        pass
    assert wandb.runs[-1].options["id"] != first.options["id"]
    assert [line["step"] for line in read_metrics(folder)] == [2]


def test_without_a_project_nothing_is_sent(tmp_path, wandb):
    with Logger(tmp_path, 0, 10) as log:
        log.scalars(1, {"loss": 1.0})
    assert not wandb.runs
    assert not (tmp_path / "wandb_run_id").exists()


def test_weights_and_biases_that_refuses(tmp_path, wandb):
    def refuse(**options):
        raise wandb.Error("api_key not configured")

    wandb.init = refuse
    with pytest.raises(UsageError, match="wandb_project='dico': .* api_key not conf.*wandb login"):
        Logger(tmp_path, 0, 10, "dico")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_weights_and_biases_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    require_wandb("")
    with pytest.raises(UsageError, match=r"logging.wandb_project='dico' .*pip install wandb"):
        require_wandb("dico")
    with pytest.raises(UsageError, match="wandb"):
        Logger(tmp_path, 0, 10, "dico")


NO_WRITES = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE, errno.EACCES]


@pytest.mark.parametrize("number", NO_WRITES)
def test_files_that_cannot_be_written_for_a_while(tmp_path, monkeypatch, capfd, number):
    """One warning each, training goes on, and nothing is lost, damaged or written twice."""
    real = pathlib.Path.open

    def failing(self, mode="r", *args, **kwargs):
        stream = real(self, mode, *args, **kwargs)
        if mode != "ab":
            return stream

        def write(data):
            if not left:
                raise OSError(number, os.strerror(number))
            return os.write(stream.fileno(), data[: left.pop()])

        stack = contextlib.ExitStack()
        stack.enter_context(stream)
        stack.write = write
        return stack

    with Logger(tmp_path, 0, 10) as log:
        left = [3, 5]  # bytes that a full disk still takes
        monkeypatch.setattr(pathlib.Path, "open", failing)
        for step in range(1, 4):
            log.scalars(step, {"loss": float(step)})
        log.image(3, "samples", np.zeros((4, 2, 3), np.uint8))
        monkeypatch.undo()
        log.scalars(4, {"loss": 4.0})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    (file,) = tmp_path.glob("events.out.tfevents.*")
    events = read_events(file)
    steps = [(event.step, value.tag) for event in events for value in event.summary.value]
    expected = [(1, "loss"), (2, "loss"), (3, "loss"), (3, "samples"), (4, "loss")]
    assert steps == expected
    said = [line for line in "".join(capfd.readouterr()).splitlines() if "warning: " in line]
    assert len(said) == 2, said
    for line, name in zip(said, ("metrics.jsonl", file.name), strict=True):
        assert f"{tmp_path / name} cannot be written ({os.strerror(number)}): make room" in line


def test_what_waits_is_written_at_the_end(tmp_path, monkeypatch):
    def failing(self, *args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Logger(tmp_path, 0, 10) as log:
        monkeypatch.setattr(pathlib.Path, "open", failing)
        log.scalars(1, {"loss": 1.0})
        monkeypatch.undo()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1]
    (file,) = tmp_path.glob("events.out.tfevents.*")
    assert [event.step for event in read_events(file) if event.summary.value] == [1]


def test_a_run_without_numbers_leaves_no_file_of_them(tmp_path):
    with Logger(tmp_path, 0, 10):
        pass
    assert not (tmp_path / "metrics.jsonl").exists()


def test_event_files_have_right_checksums(tmp_path):
    with Logger(tmp_path, 0, 1) as log:
        log.scalars(1, {"loss": 1.0})
    (file,) = tmp_path.glob("events.out.tfevents.*")
    data = file.read_bytes()
    while data:
        length = struct.unpack("<Q", data[:8])[0]
        event, rest = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
        assert struct.unpack("<I", rest[:4])[0] == masked_crc32c(event)
        data = rest[4:]


def test_weights_and_biases_that_ends_is_said_once_and_never_waited_for_long(
    tmp_path, wandb, monkeypatch, capfd
):
    def fail(values):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with Logger(tmp_path, 0, 10, "dico") as log:
        wandb.runs[-1].log = fail
        for step in (1, 2):
            log.scalars(step, {"loss": 1.0})
    said = "".join(capfd.readouterr())
    assert said.count("warning: Weights & Biases gets no more numbers (") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]

    wait = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda thread, most: wait(thread, most / 100))
    with Logger(tmp_path, 2, 10, "dico"):
        wandb.runs[-1].finish = lambda exit_code: time.sleep(60)
        started = time.monotonic()
    assert time.monotonic() - started < 10
