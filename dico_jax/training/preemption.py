"""What a run does when its machine is about to be taken away.

Schedulers and clouds send SIGTERM first. The run then saves at the next step and ends with a status
that launchers know (`config.training.preemption_exit_status`); the same command goes on from there.
"""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """Ends the process after the save, with the status that launchers wait for."""

    def __init__(self, exit_status: int):
        super().__init__(exit_status)


class Preemption:
    """Notices SIGTERM while a run trains. Use as a context manager around training and saving.

    Where jax.distributed is initialised, its C++ handler of SIGTERM stays in charge, because a
    handler of Python's would replace it: it tells the other processes, and all agree on a step.
    Otherwise Python's handler sets a flag; a thread other than the main one cannot install that.
    Further SIGTERMs change nothing, in particular not during the save. Ctrl-C is left alone.
    """

    def __init__(self):
        self._requested = False
        self._previous = None
        self._agreed = False

    def __enter__(self):
        self._agreed = jax.distributed.is_initialized()
        if not self._agreed and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, exc_type, exc, traceback):
        # A process that is ending should end with its own status, whatever is sent to it.
        if self._previous is not None and not isinstance(exc, Preempted):
            signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, signum, frame):
        self._requested = True

    def requested(self, step: int) -> bool:
        """Whether to save now and end; with several processes it is the same for all of them.

        To be asked after every step, in all processes and with the same steps, for JAX lets them
        agree on the next step that none of them has reached. SIGTERM to one process is enough.

        Args:
          step: the number of the step that has just been taken.
        """
        if self._agreed and not self._requested:
            self._requested = multihost_utils.reached_preemption_sync_point(step)
        return self._requested
