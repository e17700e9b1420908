"""Programs that are compared: each in a process of its own, timed in turn and never at once."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping

# The first run compiles. The next get memory from the system, until malloc has all that they ask
# for where they ask for it: up to half as slow again, for 10 to 20 runs.
WARM_UP = 20


def serve(prepare: Callable[[object], Callable[[], object]]) -> None:
    """In a program's process: answers "task, seconds" lines on stdin with the times of runs.

    Args:
      prepare: makes of a task a function that runs it once and waits for the result. It is called
        once for every task, and the function some times before its times count.
    """
    print("ready", flush=True)
    prepared: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        task, seconds = json.loads(line)
        key = json.dumps(task)
        if key not in prepared:
            prepared[key] = prepare(task)
            for _ in range(WARM_UP):
                prepared[key]()
        prepared[key]()  # wakes threads
        times: list[float] = []
        while sum(times) < seconds or len(times) < 3:
            start = time.perf_counter()
            prepared[key]()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


class Program:
    """A program that `serve`s in a process of its own, until `close`."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str] | None = None):
        """Starts it and waits until it is ready; where it fails to start, exits as it did."""
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            print(f"{name} did not start", file=sys.stderr)
            sys.exit(self._process.wait() or 1)

    def times(self, task: object, seconds: float) -> list[float]:
        """Seconds of every run of `task`, for about `seconds` in all."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([task, seconds]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} stopped")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def medians(
    programs: Iterable[Program], tasks: Iterable[object], rounds: int, seconds: float
) -> dict[tuple[str, str], float]:
    """Median over rounds of the median time in seconds, by name of program and JSON of task.

    Rounds go through all tasks and programs, so that a change of the machine's speed meets all.
    """
    found: dict[tuple[str, str], list[float]] = {}
    tasks, programs = list(tasks), list(programs)
    for _ in range(rounds):
        for task in tasks:
            for program in programs:
                times = program.times(task, seconds)
                found.setdefault((program.name, json.dumps(task)), []).append(
                    statistics.median(times)
                )
    return {key: statistics.median(times) for key, times in found.items()}
