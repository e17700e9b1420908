"""A profile of some steps, on request: config.profile."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

FOLDER = "profile"


class Profiler:
    """Traces `config.profile.num_steps` steps from the `start_step`-th of this process on.

    The first step of a process is number 1, and contains compilation; 0 traces nothing. The main
    process alone traces, its own devices. Use as a context manager around the loop. The trace is
    for `xprof --logdir=WORKDIR/profile` or TensorBoard's profile plugin.
    """

    def __init__(
        self, profile: ConfigDict, workdir: pathlib.Path, say: Callable[[str], None] = print
    ):
        """Prepares a profile.

        Args:
          profile: `config.profile`.
          workdir: the trace goes into its folder "profile".
          say: prints a line.
        """
        self._first = profile.start_step if jax.process_index() == 0 else 0
        self._last = self._first + profile.num_steps - 1
        self._folder, self._say = workdir / FOLDER, say
        self._steps_done = 0
        self._metrics: Any = None
        self._annotation: jax.profiler.StepTraceAnnotation | None = None

    def __enter__(self):
        if self._first == 1:
            self._start(step=1)
        return self

    def __exit__(self, exception_type, *_):
        if self._annotation is not None:
            self._stop(wait=exception_type is None)

    def step_done(self, step: int, metrics: Any) -> bool:
        """To be called after every step is dispatched.

        Args:
          step: the run's step.
          metrics: what the step has returned besides the state, which is donated to the next step
            and cannot be waited for.

        Returns:
          Whether a trace was started or written just now, which no throughput should count.
        """
        if not self._first or self._steps_done >= self._last:
            return False
        self._steps_done += 1
        self._metrics = metrics
        if self._steps_done == self._last:
            self._stop(wait=True)
            return True
        if self._steps_done == self._first - 1:
            jax.block_until_ready(metrics)  # the steps before are not part of the profile
            self._start(step + 1)
            return True
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotate(step + 1)
        return False

    def _start(self, step: int) -> None:
        jax.profiler.start_trace(self._folder)
        self._annotate(step)

    def _annotate(self, step: int) -> None:
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def _stop(self, wait: bool) -> None:
        if wait:  # or the devices' part of the last steps would be missing
            jax.block_until_ready(self._metrics)
        assert self._annotation is not None
        self._annotation.__exit__(None, None, None)
        self._annotation = None
        jax.profiler.stop_trace()
        self._say(
            f"profile of {self._steps_done - self._first + 1} steps in {self._folder}: "
            f"xprof --logdir={self._folder}"
        )
