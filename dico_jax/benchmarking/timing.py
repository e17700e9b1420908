"""Times of functions that are compared, measured in turn. It needs neither JAX nor a device."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Times:
    """The times of a function's runs.

    Attributes:
      seconds: of each run, in order.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """In seconds."""
        return statistics.median(self.seconds)

    def percentile(self, percent: float) -> float:
        """In seconds, between two runs where it falls there."""
        return float(np.percentile(self.seconds, percent))

    def to_dict(self) -> dict[str, float | list[float]]:
        """For JSON, with the unit in the names."""
        return {
            "median_seconds": self.median,
            "p10_seconds": self.percentile(10),
            "p90_seconds": self.percentile(90),
            "min_seconds": min(self.seconds),
            "max_seconds": max(self.seconds),
            "times_seconds": list(self.seconds),
        }


def measure(
    functions: Mapping[str, Callable[[], object]],
    warmup: int = 2,
    repeats: int = 10,
    seconds: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Times functions in rounds: each runs once in every round, one after the other.

    So a change of the machine's speed meets all of them.

    Args:
      functions: what is timed. A function returns when its work is done: one that starts work on
        a device waits for it.
      warmup: rounds whose times do not count.
      repeats: the least number of rounds that count, at least 1.
      seconds: rounds go on until so much time has passed since the first that counts.
      clock: seconds from any start.

    Returns:
      The times by the functions' names.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    start, rounds = clock(), 0
    while rounds < max(repeats, 1) or clock() - start < seconds:
        for name, function in functions.items():
            before = clock()
            function()
            times[name].append(clock() - before)
        rounds += 1
    return {name: Times(tuple(values)) for name, values in times.items()}
