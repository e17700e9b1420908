"""Where the numbers of a run go: a progress bar, metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import importlib.util
import json
import math
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from dico_jax.errors import UsageError, one_line
from dico_jax.files import is_remote, json_lines
from dico_jax.terminal import Bar

_HELD_SECONDS = 60.0  # at most, of what is to be written to a bucket
_FULL = 4 << 20  # bytes of a file of events there


class Logger(contextlib.AbstractContextManager):
    """What a run reports to. Use as a context manager; silent but in the main process.

    Of later steps than a run goes on from all is dropped, but by W&B. UsageError: W&B refuses.
    """

    def __init__(self, workdir, start_step: int, num_steps: int, wandb_project="", config=None):
        self._workdir, self._is_main = workdir, jax.process_index() == 0
        project = wandb_project if self._is_main else ""
        self._wandb = _open_wandb(project, workdir, config) if project else None
        shape: Any = {"unit": "step", "mininterval": 0.5, "total": num_steps, "compiles": True}
        self.bar = Bar(initial=start_step, disable=not self._is_main, **shape)
        self._open(start_step)

    def _open(self, step: int) -> None:
        if self._is_main:
            file, steps = self._workdir / "metrics.jsonl", [0]

            def stays(values: dict) -> bool:
                steps.append(int(values["step"]))
                # The classifier's judgement comes after the last save.
                return (values["step"], "eval/agreement" in values) <= (step, False)

            json_lines(file, stays)
            if max(steps) > step == 0:
                text = f"warning: {file} goes to step {max(steps)}, and no checkpoint is there"
                self.say(f"{text}: the run starts anew, and these lines are dropped")
            kind = _Held if is_remote(file) else _Appended
            self._metrics = kind(lambda: file, self.say)
            self._events = kind(self._new_events, self.say, _record(file_version="brain.Event:2"))
            self._add_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _new_events(self) -> Any:
        # Two event files of one second would have one name, and the second replace the first.
        now, host = time.time_ns(), socket.gethostname()
        return self._workdir / f"events.out.tfevents.{now // 10**9}.{host}.{now}"

    def _add_event(self, **fields) -> None:
        self._events.add(_record(**fields))

    def __exit__(self, exception_type, *_):
        self.bar.close()
        self.flush()
        last = "finish", int(exception_type is not None)
        thread = threading.Thread(target=self._ask_wandb, args=last, daemon=True)
        thread.start()
        thread.join(20)  # it waits for a server that may be away

    def flush(self) -> None:
        """Writes what waits, as it has to before the state of the same step is saved."""
        for log in (self._metrics, self._events) if self._is_main else ():
            log.flush()

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self._is_main:
            self.bar.write(text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._is_main:
            line = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            self._metrics.add((json.dumps({"step": step, **line}) + "\n").encode())
            numbers = [value for pair in values.items() for value in summary.scalar(*pair).value]
            self._add_event(step=step, summary=summary.Summary(value=numbers))
        self._ask_wandb("log", {"step": step, **values})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture, uint8 (H, W, 3)."""
        if self._is_main:
            self._add_event(step=step, summary=summary.image(name, image, dataformats="HWC"))
        if self._wandb:
            self._ask_wandb("log", {"step": step, name: import_module("wandb").Image(image)})

    def _ask_wandb(self, method: str, what: Any) -> None:
        try:
            if self._wandb:
                getattr(self._wandb, method)(what)
        except Exception as error:  # its process may have ended, or the disk be full
            self._wandb = None
            self.say(f"warning: Weights & Biases gets no more numbers ({error}); training goes on")

    def preempted(self, step: int, name: str) -> None:
        """Records the signal that ends the run, of which `step` is saved."""
        if self._is_main:
            file = self._workdir / "preemptions.jsonl"
            entry = {"step": step, "signal": name, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
            log = (_Held if is_remote(file) else _Appended)(lambda: file, self.say)
            log.add((json.dumps(entry) + "\n").encode())
            log.flush()

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, which the run has returned to."""
        self._open(step)
        self.bar.skip(step - self.bar.n)
        self.bar.refresh()


def _record(**fields) -> bytes:
    """A TensorBoard event as it stands in a file."""
    event = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(event))
    parts = [data + struct.pack("<I", masked_crc32c(data)) for data in (length, event)]
    return b"".join(parts)


class _Appended:
    """A file to add records to, after a `head`. Where that fails it is said once, and they wait."""

    def __init__(self, new_file: Callable[[], Any], say: Callable[[str], None], head: bytes = b""):
        self._new_file, self._head, self._say = new_file, head, say
        self._file, self._waiting = new_file(), b""
        self._open()

    def _open(self) -> None:
        self.add(self._head)

    def flush(self) -> None:
        self.add(b"")

    def add(self, record: bytes) -> None:
        failed, self._waiting = bool(self._waiting), self._waiting + record
        try:  # anew every time: a file system that was away takes no old handle
            while self._waiting:
                with self._file.open("ab", buffering=0) as stream:
                    self._waiting = self._waiting[stream.write(self._waiting) :]
        except OSError as error:
            self._failed(error.strerror, failed)

    def _failed(self, reason: object, before: bool) -> None:
        text = f"warning: {self._file} cannot be written ({reason}): make room there or"
        if not before:
            self._say(f"{text} mend that; training goes on, and the numbers follow then")


class _Held(_Appended):
    """The same in a bucket, where nothing is appended.

    Records are held until `flush`, for a minute at most; then the file is written anew. One with a
    head has an end, after which the next one begins: TensorBoard reads them in a row.
    """

    def _open(self) -> None:
        self._written = self._head or (self._file.read_bytes() if self._file.exists() else b"")
        self._since, self._has_failed = time.monotonic(), False

    def add(self, record: bytes) -> None:
        self._waiting += record
        if time.monotonic() - self._since > _HELD_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._since = time.monotonic()
        if not self._waiting:
            return
        written = self._written + self._waiting
        try:
            self._file.write_bytes(written)
        except Exception as error:  # of many classes
            self._failed(one_line(error), self._has_failed)
            self._has_failed = True
            return
        if self._head and len(written) > _FULL:
            self._file, written = self._new_file(), self._head
        self._written, self._waiting, self._has_failed = written, b"", False


def require_wandb(project: str) -> None:
    """Raises UsageError where `config.logging.wandb_project` is set and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        fix = "needs Weights & Biases: pip install wandb, or leave it empty"
        raise UsageError("logging.wandb_project", project, fix)


def _open_wandb(project: str, workdir: Any, config: dict[str, Any] | None) -> Any:
    """The run of Weights & Biases whose id is kept in `workdir`, so that it goes on as well."""
    require_wandb(project)
    wandb: Any = import_module("wandb")
    id_file = workdir / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8] + "\n")
    which: Any = {"project": project, "id": id_file.read_text().strip(), "resume": "allow"}
    which |= {"name": workdir.absolute().name, "config": config or {}}
    which |= {} if is_remote(workdir) else {"dir": str(workdir)}
    try:
        run = wandb.init(**which)
    except wandb.Error as error:  # not logged in, no such project, no network
        fix = f": it says {error}; run `wandb login`, set WANDB_MODE=offline, or leave it empty"
        raise UsageError("config.logging.wandb_project", project, fix) from error
    # Its own steps cannot go back, ours can: they are one more number of each line.
    run.define_metric("*", step_metric="step")
    return run
