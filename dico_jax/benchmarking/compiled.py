"""Programs compiled ahead of their first run, and what XLA says of them."""

import dataclasses
import time
from typing import Any

import jax
from jax.extend import core

LOOPS_NOTE = "the program has loops, whose bodies XLA counts once"
NO_COUNT_NOTE = "XLA gives no count on this platform"
_LOOPS = {"scan", "while"}  # primitives whose body XLA counts once


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program and what making it has taken.

    Attributes:
      executable: what `jax.jit(...).lower(...).compile()` returns.
      trace_seconds: Python's part, from the function to the program that XLA is given.
      compile_seconds: XLA's part.
      has_loops: whether the program has loops, whose bodies XLA's counts contain once.
    """

    executable: jax.stages.Compiled
    trace_seconds: float
    compile_seconds: float
    has_loops: bool


def compile_ahead(function, args: tuple) -> Compiled:
    """Traces and compiles a jitted function for arguments, of which only shapes matter."""
    start = time.perf_counter()
    traced = function.trace(*args)
    lowered = traced.lower()
    between = time.perf_counter()
    executable = lowered.compile()
    end = time.perf_counter()
    return Compiled(executable, between - start, end - between, has_loops(traced.jaxpr.jaxpr))


def has_loops(jaxpr) -> bool:
    """Whether a program, or a function that it calls, has loops."""
    return any(
        equation.primitive.name in _LOOPS
        or any(has_loops(sub) for sub in core.jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


def xla_counts(compiled: Compiled, num_devices: int) -> dict[str, Any]:
    """What XLA counts in a program, over all devices; None, and why, where that says nothing.

    XLA counts every operation, element by element too, of the program as it was optimised for one
    device. Of a loop it counts the body once.
    """
    costs = compiled.executable.cost_analysis() or {}
    flops, read = costs.get("flops", 0), costs.get("bytes accessed", 0)
    note = LOOPS_NOTE if compiled.has_loops else None if flops > 0 else NO_COUNT_NOTE
    return {
        "flops_per_run_by_xla": None if note else flops * num_devices,
        "bytes_accessed_per_run_by_xla": (
            None if compiled.has_loops or read <= 0 else read * num_devices
        ),
        "no_flops_by_xla_because": note,
    }


def memory_gb(compiled: Compiled) -> dict[str, float] | None:
    """What a program needs on a device, in GB (1e9 bytes); None where XLA does not say.

    "outputs_not_in_place" are those that do not take the place of arguments, as the new state of a
    training step does.
    """
    stats = compiled.executable.memory_analysis()
    if stats is None:
        return None
    return {
        "arguments": stats.argument_size_in_bytes / 1e9,
        "outputs": stats.output_size_in_bytes / 1e9,
        "outputs_not_in_place": (stats.output_size_in_bytes - stats.alias_size_in_bytes) / 1e9,
        "temporaries": stats.temp_size_in_bytes / 1e9,
    }
