"""A warning when a run hangs: config.training.stall_warning_seconds."""

import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Callable

import jax

from dico_jax.errors import UsageError

_FIRST_STEP_PATIENCE = 2  # it has to be compiled


def check_stall_seconds(seconds: float) -> None:
    """Raises UsageError for a negative number."""
    if seconds < 0:
        raise UsageError(
            f"training.stall_warning_seconds={seconds} must be at least 0 (0: no warning)"
        )


def stall_file(workdir: pathlib.Path) -> pathlib.Path:
    """Where this process writes its stacks: stall.txt, in further processes stall_N.txt."""
    index = jax.process_index()
    return workdir / (f"stall_{index}.txt" if index else "stall.txt")


class Patience:
    """When warnings are due, in the seconds of some clock.

    The first one after `seconds` without a step (twice that before the first step of the process),
    the next ones after twice, four times, ... as long.
    """

    def __init__(self, seconds: float, now: float):
        self._seconds, self._since = seconds, now
        self._wait = _FIRST_STEP_PATIENCE * seconds

    def step_done(self, now: float) -> None:
        """Notes that a step has ended."""
        self._since, self._wait = now, self._seconds

    def seconds_left(self, now: float) -> float:
        """Until the next warning; not above 0 when it is due."""
        return self._since + self._wait - now

    def warned(self) -> None:
        """Notes that the warning was given."""
        self._wait *= 2

    def silent_for(self, now: float) -> float:
        """Seconds since the last step."""
        return now - self._since


class StallWatch:
    """A thread that warns, and writes where Python is, when no step ends for long.

    Whatever else takes long between two steps, such as sampling a grid, looks the same. Use as a
    context manager; nothing runs if `seconds` is 0.
    """

    def __init__(
        self, seconds: float, file: pathlib.Path, say: Callable[[str], None] | None = None
    ):
        """Starts watching.

        Args:
          seconds: how long a step may take; 0 for no watch.
          file: the stacks of all threads are added to it.
          say: prints a line, from the watching thread; on stderr by default.

        Raises:
          UsageError: a negative number.
        """
        check_stall_seconds(seconds)
        self._file, self._say = file, say or _print
        self._changed = threading.Condition()
        self._patience = Patience(seconds, time.monotonic())
        self._step: int | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)
        if seconds > 0:
            self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def step_done(self, step: int) -> None:
        """To be called when a step, or anything else that takes long, has ended."""
        with self._changed:
            self._step = step
            self._patience.step_done(time.monotonic())

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while True:
            with self._changed:
                left = self._patience.seconds_left(time.monotonic())
                if left > 0 and not self._closed:
                    self._changed.wait(left)
                    continue  # a step may have ended meanwhile
                if self._closed:
                    return
                self._patience.warned()
                step, silent = self._step, self._patience.silent_for(time.monotonic())
            self._warn(step, silent)  # without the lock, which the loop needs

    def _warn(self, step: int | None, silent: float) -> None:
        after = "since the start of this process" if step is None else f"after step {step}"
        text = f"no step has ended for {silent:.0f} seconds {after}"
        try:
            with self._file.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
            where = f"where Python stands is in {self._file}"
        except OSError as error:  # a full or lost disk may be why
            where = f"{self._file} cannot be written ({error})"
        self._say(f"warning: {text}; {where}")


def _print(text: str) -> None:
    print(text, file=sys.stderr)
