"""Where the numbers of a run go: a progress bar, metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import importlib.util
import json
import math
import pathlib
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
import tqdm
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from dico_jax.errors import UsageError
from dico_jax.files import json_lines


class Logger(contextlib.AbstractContextManager):
    """What a run reports to. Use as a context manager; silent but in the main process.

    Of later steps than a run goes on from all is dropped, but by W&B. UsageError: W&B refuses.
    """

    def __init__(self, workdir, start_step: int, num_steps: int, wandb_project="", config=None):
        self._workdir, self._is_main = workdir, jax.process_index() == 0
        project = wandb_project if self._is_main else ""
        self._wandb = _open_wandb(project, workdir, config) if project else None
        shape: Any = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5, "total": num_steps}
        self.bar: Any = tqdm.tqdm(initial=start_step, disable=not self._is_main, **shape)
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
            self._metrics = _Appended(file, self.say)
            # Two event files of one second would have one name, and the second replace the first.
            now, host = time.time_ns(), socket.gethostname()
            name = f"events.out.tfevents.{now // 10**9}.{host}.{now}"
            self._events = _Appended(self._workdir / name, self.say)
            self._add_event(file_version="brain.Event:2")
            self._add_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add_event(self, **fields) -> None:
        event = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        parts = [data + struct.pack("<I", masked_crc32c(data)) for data in (length, event)]
        self._events.add(b"".join(parts))

    def __exit__(self, exception_type, *_):
        self.bar.close()
        for log in (self._metrics, self._events) if self._is_main else ():
            log.add(b"")  # what waits
        last = "finish", int(exception_type is not None)
        thread = threading.Thread(target=self._ask_wandb, args=last, daemon=True)
        thread.start()
        thread.join(20)  # it waits for a server that may be away

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

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, which the run has returned to."""
        self._open(step)
        self.bar.n = self.bar.last_print_n = step
        self.bar.unpause()
        self.bar.refresh()


class _Appended:
    """A file to add records to. Where that fails it is said once, and they wait."""

    def __init__(self, file: pathlib.Path, say: Callable[[str], None]):
        self._file, self._say, self._waiting = file, say, b""

    def add(self, record: bytes) -> None:
        failed, self._waiting = bool(self._waiting), self._waiting + record
        try:  # anew every time: a file system that was away takes no old handle
            while self._waiting:
                with self._file.open("ab", buffering=0) as stream:
                    self._waiting = self._waiting[stream.write(self._waiting) :]
        except OSError as error:
            text = f"warning: {self._file} cannot be written ({error.strerror}): make room there or"
            if not failed:
                self._say(f"{text} mend that; training goes on, and the numbers follow then")


def require_wandb(project: str) -> None:
    """Raises UsageError where `config.logging.wandb_project` is set and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        fix = "needs Weights & Biases: pip install wandb, or leave it empty"
        raise UsageError("logging.wandb_project", project, fix)


def _open_wandb(project: str, workdir: pathlib.Path, config: dict[str, Any] | None) -> Any:
    """The run of Weights & Biases whose id is kept in `workdir`, so that it goes on as well."""
    require_wandb(project)
    wandb: Any = import_module("wandb")
    id_file = workdir / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8] + "\n")
    which: Any = {"project": project, "id": id_file.read_text().strip(), "resume": "allow"}
    which |= {"name": workdir.absolute().name, "dir": str(workdir), "config": config or {}}
    try:
        run = wandb.init(**which)
    except wandb.Error as error:  # not logged in, no such project, no network
        fix = f": it says {error}; run `wandb login`, set WANDB_MODE=offline, or leave it empty"
        raise UsageError("config.logging.wandb_project", project, fix) from error
    # Its own steps cannot go back, ours can: they are one more number of each line.
    run.define_metric("*", step_metric="step")
    return run
