"""Functions that XLA for CPU computes apart from the rest, each in passes that read memory once.

Left alone, XLA for CPU computes an elementwise result again in every loop that reads it, and gives
sums to a library (YNNPACK) that adds a few elements at a time. Both are told here what to do. Other
platforms get the plain functions: there XLA, or a Pallas kernel, does better.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

# Elements of all operands from which on this pays: below, XLA's loops take as long as starting
# one, and programs of many small loops only compile slower.
LARGE = 2**18

Function = Callable[..., Any]


class Sums(NamedTuple):
    """How sums are taken.

    Attributes:
      over_positions: (f, *arrays) to the sums (N, C) over positions of f(*arrays), all of them
        (N, ..., C), or with 1 in place of a dimension.
      channel_mean: (f, *arrays) to the means over channels (N, ..., 1).
    """

    over_positions: Function
    channel_mean: Function


def apart(function: Function, *operands: jax.Array, on_cpu: Function | None = None) -> Any:
    """The arrays function(*operands), each computed once on CPU, from operands computed once.

    Args:
      function: of arrays, to an array or a tuple of them. A sum over the batch does not belong into
        it: where devices split the batch, they would have to wait for each other inside.
      operands: arrays; where they are small, this is function(*operands).
      on_cpu: computed on CPU in the function's place, with the same results.
    """
    if sum(x.size for x in operands) < LARGE:
        return function(*operands)
    return lax.platform_dependent(*operands, cpu=_not_inlined(on_cpu or function), default=function)


def with_sums(function: Function, *operands: jax.Array) -> Any:
    """The arrays function(sums, *operands) as `apart`, with sums that suit the platform."""
    return apart(
        functools.partial(function, _PLAIN),
        *operands,
        on_cpu=functools.partial(function, _BY_PARTS),
    )


def stored(x: jax.Array) -> jax.Array:
    """X itself, where XLA for CPU ends what it gives to its library or takes from it.

    Rounding x to the precision that it has does that, and costs nothing elsewhere; an optimization
    barrier is dropped before.
    """
    kind = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)


def _not_inlined(function):
    """The function as a call that XLA leaves as it is; it fuses nothing across a call."""

    def body(*operands):
        with set_xla_metadata(inlineable=None):  # for the call alone, not for what is in it
            return function(*operands)

    def call(*operands):
        with set_xla_metadata(inlineable="false"):
            return jax.jit(body, inline=False)(*operands)

    return call


def _positions(x):
    return tuple(range(1, x.ndim - 1))


def _sum_over_positions(f, *arrays):
    total = f(*arrays)
    return total.sum(_positions(total))


def _channel_mean(f, *arrays):
    return f(*arrays).mean(-1, keepdims=True)


def _part_sum(f, arrays, axis, parts):
    """Sum of f over equal parts of an axis, added element by element in one loop."""
    size = arrays[0].shape[axis] // parts

    def part(x, i):
        return x if x.shape[axis] == 1 else lax.slice_in_dim(x, i * size, (i + 1) * size, axis=axis)

    return stored(sum(f(*(part(x, i) for x in arrays)) for i in range(parts)))


def _sum_over_positions_by_parts(f, *arrays, parts=8):
    x = arrays[0]
    if x.ndim < 3 or x.shape[-2] % parts:
        return _sum_over_positions(f, *arrays)
    return _sum_over_positions(lambda total: total, _part_sum(f, arrays, x.ndim - 2, parts))


def _channel_mean_by_parts(f, *arrays, size=16):
    channels = arrays[0].shape[-1]
    if channels % size:
        return _channel_mean(f, *arrays)
    total = _part_sum(f, arrays, arrays[0].ndim - 1, channels // size)
    return stored(total.sum(-1, keepdims=True) / channels)


_PLAIN = Sums(_sum_over_positions, _channel_mean)
_BY_PARTS = Sums(_sum_over_positions_by_parts, _channel_mean_by_parts)
