"""Chips and slices of them: what their makers publish, and what libtpu leaves of their memory."""

import difflib
import itertools
import math
import os
import re
from typing import Any, NamedTuple

from dico_jax.errors import UsageError
from dico_jax.training.speed import peak_flops

GIB = 2**30
SOURCES = {
    "tpu": "docs.cloud.google.com/tpu/docs, a page per chip; memory as libtpu 0.0.42.1 leaves it",
    "gpu": "NVIDIA's data sheets of A100, H100, H200 (SXM) and B200; dense bfloat16, NVLink",
}


class Chip(NamedTuple):
    """A device of JAX; bytes, and bytes per second. `peak_flops` knows its arithmetic."""

    kind: str  # its `jax.Device.device_kind`
    memory: float  # that programs can have
    bandwidth: float  # of that memory
    links: float  # to other devices, both directions together
    dimensions: int = 0  # of a slice; 0: a number of GPUs
    devices: int = 1  # per chip
    options: Any = ()  # of libtpu's topology

    @property
    def platform(self) -> str:
        return "tpu" if self.dimensions else "gpu"

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of products: TPUs round operands to bfloat16, GPUs of float32 to TF32."""
        peak = peak_flops(self.kind)
        assert peak is not None
        return peak / 2 if self.platform == "gpu" and dtype == "float32" else peak


_MEGACORE = (("chip_config_name", "megacore"),)
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1200e9, 600e9, 3, options=_MEGACORE),
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 819e9, 400e9, 2),
    "v5p": Chip("TPU v5", 95.74 * GIB, 2765e9, 1200e9, 3, options=_MEGACORE),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 1640e9, 800e9, 2),
    "tpu7x": Chip("TPU7x", 94.75 * GIB, 3690e9, 600e9, 3, devices=2),
    # All that CUDA shows, of which `parse_topology` takes JAX's share.
    "a100": Chip("NVIDIA A100-SXM4-80GB", 79 * GIB, 2039e9, 600e9),
    "h100": Chip("NVIDIA H100 80GB HBM3", 79 * GIB, 3350e9, 900e9),
    "h200": Chip("NVIDIA H200", 139 * GIB, 4800e9, 900e9),
    "b200": Chip("NVIDIA B200", 178 * GIB, 7700e9, 1800e9),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


class Slice(NamedTuple):
    """Chips that are rented together."""

    name: str
    chip: Chip
    chips: int
    devices: int
    hosts: int


def parse_topology(text: str) -> Slice:
    """The slice of "v5e:8x8", "v5p:2x2x4" or "h100:8"; UsageError that names the nearest one."""
    name, _, shape = text.lower().partition(":")
    sizes = [int(n) for n in re.split("[x*]", shape) if n.isdecimal() and 0 < int(n) < 10**4]
    whole = bool(re.fullmatch(r"\d+([x*]\d+)*", shape)) and bool(sizes)
    count = math.prod(sizes) if whole else 16
    near = name if name in CHIPS else _nearest_chip(name)
    chip = CHIPS[near]
    known = slices(chip)
    best = min(known, key=lambda s: (abs(math.log(math.prod(s) / count)), max(s) / min(s)))
    if near != name or not whole or tuple(sorted(sizes)) not in known:
        used = f"{near}:{'x'.join(map(str, best[::-1] if min(best) == 1 else best))}"
        fix = f"is no slice of {', '.join(CHIPS)} that can be had: the nearest is {used}"
        raise UsageError("--topology", text, fix)
    per_host = 4 if chip.dimensions == 3 or (chip.dimensions and count > 8) else 8
    if chip.platform == "gpu":
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
        chip = chip._replace(memory=share * chip.memory)
    name = f"{name}:{'x'.join(map(str, sizes))}"
    return Slice(name, chip, count, count * chip.devices, -(-count // per_host))


def slices(chip: Chip) -> set[tuple[int, ...]]:
    """The shapes that the makers offer, from the smallest side to the largest."""
    if chip.dimensions == 2:
        return {tuple(map(int, shape.split("x"))) for shape in _FLAT}
    if chip.dimensions == 0:
        return {(n,) for n in (1, 2, 4, *range(8, 1025, 8))}
    cubes = itertools.combinations_with_replacement(range(4, 25, 4), 3)
    return {(1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4), *cubes}


def _nearest_chip(name: str) -> str:
    aliases = {"v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e", "v5litepod": "v5e"}
    names = [*CHIPS, *aliases]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return aliases.get(close, close)
