"""What watches over a run: for steps that are not finite, for none that ends, for SIGTERM."""

import contextlib
import faulthandler
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from dico_jax.errors import TrainingStopped
from dico_jax.files import is_remote

MAX_SKIPPED_IN_A_ROW, MAX_ROLLBACKS = 100, 3

_GO_ON = "start again with --config.training.on_nan=skip or =rollback to go on from there"


class NanWatch:
    """Decides what follows from steps that were not finite, as `config.training.on_nan` says.

    Flags are read before a save, so every checkpoint is good. `attempt` grows by 1 with a return.
    """

    def __init__(self, on_nan: str, attempt: int = 0, say: Callable[[str], None] = print):
        self.attempt, self._on_nan, self._say = attempt, on_nan, say
        self._bad = f"config.training.on_nan={on_nan}: loss or gradients were not finite at step"
        self._flags: list[tuple[int, jax.Array]] = []
        self._skipped, self._skipped_in_a_row, self._rollbacks, self._rolled_back_to = 0, 0, 0, -1

    def add(self, step: int, finite: jax.Array) -> None:
        self._flags.append((step, finite))

    def check(self, newest: int | None) -> int | None:
        """Reads the flags since the last check: None to go on, or the step to return to (or 0)."""
        flags, self._flags = jax.device_get(self._flags), []
        for step, finite in flags:
            self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
            if finite:
                continue
            if self._on_nan == "rollback":
                return self._roll_back(step, newest)
            if self._on_nan == "stop":
                self._stop(f"{step}", newest, _GO_ON)
            self._skipped += 1
            if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                self._stop(f"{step}, nor at the {MAX_SKIPPED_IN_A_ROW - 1} steps before", newest)
        return None

    def metrics(self) -> dict[str, float]:
        """What to log: steps skipped since the last call, or returns to a checkpoint so far."""
        skipped, self._skipped = float(self._skipped), 0
        known = {"skip": {"skipped_steps": skipped}, "rollback": {"rollbacks": float(self.attempt)}}
        return known.get(self._on_nan, {})

    def _roll_back(self, step: int, newest: int | None) -> int:
        target = newest or 0
        if target != self._rolled_back_to:
            self._rollbacks, self._rolled_back_to = 0, target
        if self._rollbacks == MAX_ROLLBACKS:
            self._stop(f"{step}, after {MAX_ROLLBACKS} returns to step {target}", newest)
        self._rollbacks += 1
        self.attempt += 1
        count = f"with other noise (return {self._rollbacks} of at most {MAX_ROLLBACKS})"
        self._say(f"warning: {self._bad} {step}; going on from step {target} {count}")
        return target

    def _stop(self, steps: str, newest, advice="look for examples that are not finite") -> NoReturn:
        saved = "the newest good checkpoint is step" if newest else "no checkpoint has been saved"
        text = f"{self._bad} {steps}; {saved} {newest or 'yet'}: {advice}, or start with a lower"
        raise TrainingStopped(f"{text} --config.optimizer.learning_rate in a new workdir")


class Preempted(SystemExit):
    """Ends the process after the save, with the status that launchers wait for."""


class Preemption:
    """Notices SIGTERM and ^C while a run trains. Use as a context manager around all of it.

    Either asks for a save; a second ^C, and signals of `at_once`, where nothing is to be saved, end
    the process. With jax.distributed ^C calls its handler of SIGTERM: all agree on a step.
    """

    def __init__(self, status: int = 143):
        self._requested, self._agreed = False, jax.distributed.is_initialized()
        self._asked, self._undo = 0, contextlib.ExitStack()
        self.statuses: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: status}
        self.step, self.interrupted = 0, False  # the step that would be saved; whether ^C asked
        self.at_once: dict[int, int] = {}  # of `statuses`
        self.waits: Callable[[], bool] = bool  # for what may never come, after a step

    def __enter__(self):
        for number in list(self.statuses)[: 1 if self._agreed else 2]:
            main = threading.current_thread() is threading.main_thread()
            if main and signal.getsignal(number) is not signal.SIG_IGN:
                self._undo.callback(signal.signal, number, signal.signal(number, self))
        return self

    def __exit__(self, exc_type, exc, traceback):
        if not isinstance(exc, Preempted):  # who is ending should do so with its own status
            self._undo.close()

    def __call__(self, number, frame):
        if number in self.at_once or (self.interrupted and number == signal.SIGINT):
            time.sleep(1)  # a command ends meanwhile: a callback of JAX may lose what is raised
            raise KeyboardInterrupt if number == signal.SIGINT else Preempted(self.at_once[number])
        if number == signal.SIGINT:
            self.interrupted = True  # print() may be what it has interrupted
            step = self.step - (self.waits() and not self._agreed)
            os.write(2, f"\nsaving step {step}; ^C again to leave without\n".encode())
        self._requested = not self._agreed
        if self._agreed:
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.waits():
            self.waits = bool
            raise StopIteration

    def requested(self) -> bool:
        """Whether to save now and end; all processes ask equally often, and have one answer."""
        if self._agreed and not self._requested:  # on the next question that none has asked
            self._asked += 1
            self._requested = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._requested


def stall_file(workdir: pathlib.Path) -> pathlib.Path:
    """Where this process writes its stacks: stall.txt, in further processes stall_N.txt."""
    return workdir / (f"stall_{index}.txt" if (index := jax.process_index()) else "stall.txt")


class StallWatch:
    """Warns, with all stacks in a file, also in native code, if no step ends for `seconds` > 0."""

    def __init__(self, seconds: float, file: pathlib.Path, say: Callable[[str], None] = print):
        self._seconds, self._path, self._say = seconds, file, say
        self._file: Any = sys.__stderr__
        self._after, self._closed = "since the start of this process", threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watch", daemon=True)

    def __enter__(self):
        if self._seconds > 0:
            try:
                if not is_remote(self._path):  # which native code cannot write to
                    self._file = self._path.open("a")
            except OSError as error:
                self._say(f"warning: {self._path} cannot be written ({error}): stacks go to stderr")
            self._restart(2 * self._seconds)  # the first step has to be compiled
            self._thread.start()
        return self

    def __exit__(self, *exc):
        if self._seconds <= 0:
            return
        faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._file is not sys.__stderr__:
                self._file.close()
                if not self._path.stat().st_size:
                    self._path.unlink()

    def step_done(self, step: int) -> None:
        """To be called when a step, or anything else that takes long, has ended."""
        self._after, self._since = f"after step {step}", time.monotonic()
        if self._seconds > 0 and self._since > self._started + min(1.0, self._seconds / 10):
            self._restart(self._seconds)  # not after every step: it takes a tenth of a millisecond

    def _restart(self, patience: float) -> None:
        self._since = self._started = time.monotonic()
        self._patience = patience
        faulthandler.dump_traceback_later(patience, repeat=True, file=self._file)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._since
            if silent > self._patience:
                self._patience *= 2  # for the line; it is said less and less often
                text = f"no step has ended for {silent:.0f} seconds {self._after}"
                with contextlib.suppress(OSError):  # a full or lost disk may be why
                    self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n\n")
                    self._file.flush()
                self._say(f"warning: {text}; where Python stands is in {self._file.name}")
