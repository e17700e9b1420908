"""Programs compiled ahead of time for a TPU slice that is not here, and what its compiler says."""

import collections
import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from dico_jax.benchmarking import report
from dico_jax.benchmarking.programs import Compiled, compile_ahead
from dico_jax.errors import one_line
from dico_jax.planning.chips import GIB, Slice

# libtpu looks for chips of its own and for a metadata server, and only one process may have them.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_NAMES = r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def about() -> dict[str, Any]:
    """Versions, with libtpu's, and the date."""
    found, libtpu = report.about(), None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        libtpu = importlib.metadata.version("libtpu")
    return found | {"versions": found["versions"] | {"libtpu": libtpu}}


def quiet_environment() -> None:
    """Lets libtpu compile where there is no TPU; to be called before it is loaded."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def slice_devices(where: Slice) -> list[Any]:
    """Descriptions of a TPU slice's devices, as a `Mesh` takes them."""
    quiet_environment()
    options = dict(where.chip.options)
    if where.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    found = topologies.get_topology_desc(platform="tpu", topology_name=where.name, **options)
    return list(found.devices)


class Found(NamedTuple):
    """What the compiler says of a program, for one device; bytes."""

    arguments: int
    outputs: int  # that take no argument's place
    temporaries: int
    code: int
    peak: int  # at one time: what takes the place of a donated argument counts once
    flops: float  # the body of a loop once
    accessed: float  # bytes, the body of a loop once
    has_loops: bool
    collectives: dict[
        str, tuple[int, int]
    ]  # by kind, how many in a run, and bytes of their results
    seconds: float
    processor: float  # seconds of all cores

    @property
    def memory(self) -> int:
        return (self.peak or self.arguments + self.outputs + self.temporaries) + self.code


class DoesNotFit(Exception):  # noqa: N818  it says what was found
    """The compiler's account of a program that needs more memory than there is, in bytes."""

    def __init__(self, text: str):
        found = re.search(r"\(?([\d.]+)([MG])\)? exceeds|Used ([\d.]+)([MG])", text)
        number, unit = (found[1] or found[3], found[2] or found[4]) if found else ("nan", "G")
        self.needed = float(number) * (GIB if unit == "G" else 2**20)
        super().__init__(one_line(text)[:300])


def compile_program(function: Any, *args: Any) -> Found:
    """Compiles a jitted function for what its shardings say; DoesNotFit where memory is short."""
    before = time.process_time()
    try:
        found = compile_ahead(function, *args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error)) from error
    return describe(found)._replace(processor=time.process_time() - before)


def describe(found: Compiled) -> Found:
    memory, costs = found.executable.memory_analysis(), found.executable.cost_analysis() or {}
    assert memory is not None
    return Found(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        memory.peak_memory_in_bytes,
        costs.get("flops", 0.0),
        costs.get("bytes accessed", 0.0),
        found.has_loops,
        collectives(found.executable.as_text() or ""),
        found.trace_seconds + found.compile_seconds,
        0.0,
    )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Of an optimised program its collectives by kind: how many one run does, and their bytes.

    Those in a loop count as often as it runs, which its condition says.
    """
    bodies = _computations(text)

    @functools.cache
    def inside(name: str) -> collections.Counter[tuple[str, int]]:
        found = collections.Counter[tuple[str, int]]()
        for line in bodies.get(name, ()):
            if match := re.search(rf"= (.*?) ({_NAMES})(-start)?\(", line):
                found[match[2], _result_bytes(match[1], bool(match[3]))] += 1
            loop = re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", line)
            if loop:
                times = _trips(bodies.get(loop[1], ()))
                found.update({key: n * times for key, n in inside(loop[2]).items()})
            for called in re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", line):
                found.update(inside(called))
        return found

    sums: dict[str, tuple[int, int]] = {}
    for (kind, size), count in inside("ENTRY").items():
        before = sums.get(kind, (0, 0))
        sums[kind] = before[0] + count, before[1] + count * size
    return sums


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = found.setdefault("ENTRY" if match[1] else match[2], [])
        elif line.startswith("  "):
            lines.append(line)
    return found


def _trips(condition: Any) -> int:
    numbers = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return max(map(int, numbers), default=1)


def _result_bytes(shapes: str, starts: bool) -> int:
    sizes = [
        _SIZES.get(dtype, 4) * int(np.prod([int(n) for n in dims.split(",") if n]))
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    ]
    # What starts one gives its operands as well, and the result is the larger half.
    return max(sizes) if starts and len(sizes) > 1 else sum(sizes)
