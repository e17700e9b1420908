"""Watching a run: the checks of the fields that say how, and warnings when no step ends."""

import contextlib
import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

import jax
from ml_collections import ConfigDict

from dico_jax.config import check_at_least, config_errors
from dico_jax.training.logging import require_wandb
from dico_jax.training.nan_policy import check_on_nan

_FIRST_STEP_PATIENCE = 2  # it has to be compiled


def check_watch(config: ConfigDict) -> None:
    """Raises UsageError for a field that cannot work, naming it, its value and the fix."""
    with config_errors():
        check_on_nan(config.training.on_nan)
        check_at_least(config, "training.stall_warning_seconds", 0)
        check_at_least(config, "profile.start_step", 0)
        check_at_least(config, "profile.num_steps", 1)
        require_wandb(config.logging.wandb_project)


def stall_file(workdir: pathlib.Path) -> pathlib.Path:
    """Where this process writes its stacks: stall.txt, in further processes stall_N.txt."""
    index = jax.process_index()
    return workdir / (f"stall_{index}.txt" if index else "stall.txt")


class StallWatch:
    """Warns, and writes where Python is, when no step ends for long. Use as a context manager.

    The stacks come from the interpreter's own timer (faulthandler), every `seconds` of a stall and
    also where native code holds Python's lock. The line comes from a thread, as soon as that may
    run. Before the first step of a process both have more patience. Whatever else takes long
    between two steps, such as sampling a grid, looks the same.
    """

    def __init__(
        self, seconds: float, file: pathlib.Path, say: Callable[[str], None] | None = None
    ):
        """Starts watching.

        Args:
          seconds: how long a step may take; 0 for no watch.
          file: the stacks of all threads are added to it; where it cannot be written, stderr.
          say: prints a line, from the watching thread; on stderr by default.
        """
        self._seconds, self._path, self._say = seconds, file, say or _print
        self._step: int | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
        if seconds > 0:
            self._file = self._open()
            self._restart(_FIRST_STEP_PATIENCE * seconds)
            self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def step_done(self, step: int) -> None:
        """To be called when a step, or anything else that takes long, has ended."""
        self._step, self._since = step, time.monotonic()
        if self._seconds > 0 and self._since > self._started + min(1.0, self._seconds / 10):
            self._restart(self._seconds)  # not after every step: it takes a tenth of a millisecond

    def close(self) -> None:
        """Ends the watch."""
        if self._closed.is_set() or self._seconds <= 0:
            return
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._thread.join()
        if self._file is not sys.__stderr__:
            with contextlib.suppress(OSError):
                self._file.close()
                if not self._path.stat().st_size:
                    self._path.unlink()

    def _open(self) -> IO[Any]:
        try:
            return self._path.open("a")
        except OSError as error:
            self._say(f"warning: {self._path} cannot be written ({error}); stacks go to stderr")
            assert sys.__stderr__ is not None
            return sys.__stderr__

    def _restart(self, patience: float) -> None:
        self._since = self._started = time.monotonic()
        self._patience = patience
        faulthandler.dump_traceback_later(patience, repeat=True, file=self._file)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._since
            if silent > self._patience:
                self._patience *= 2  # for the line; it is said less and less often
                step = self._step
                after = "since the start of this process" if step is None else f"after step {step}"
                text = f"no step has ended for {silent:.0f} seconds {after}"
                with contextlib.suppress(OSError):  # a full or lost disk may be why
                    self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n\n")
                    self._file.flush()
                self._say(f"warning: {text}; where Python stands is in {self._file.name}")


def _print(text: str) -> None:
    print(text, file=sys.stderr)
