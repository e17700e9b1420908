"""Depthwise convolution by a kernel of every example: how DiCo reads text (section 3.3).

A sum of shifted products, as the 3x3 one of `dico_jax.ops.conv`, and for the same reason: XLA's
grouped convolution of N * C groups took 14 to 40 times as long on a CPU. There a few rows of a
kernel are added at a time: all 81 products in one loop took twice as long, for want of cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops.cpu import apart
from dico_jax.ops.plain import Operation, accumulation_dtype, widened

_ROWS = 2  # of a kernel, added at a time
_UNROLLED = 128  # positions, at most, whose part of a kernel's gradient is no loop of the program's


@Operation
def add_dynamic_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """X (N, H, W, C) plus its depthwise convolution by the kernels (N, K, K, C), K odd.

    Zero padding of K // 2 and stride 1; products are added in float32 or better.
    """
    return _summed(x, kernel, lambda add, *operands: add(*operands))


def _padded(x, kernel):
    zero, by = jnp.zeros((), x.dtype), kernel.shape[1] // 2
    return lax.pad(x, zero, ((0, 0, 0), (by, by, 0), (by, by, 0), (0, 0, 0)))


def _summed(x, kernel, call):
    total, operands = widened(x), (_padded(x, kernel), widened(kernel))
    for first in range(0, kernel.shape[1], _ROWS):
        total = call(functools.partial(_add_rows, first), total, *operands)
    return total.astype(x.dtype)


def _add_rows(first, total, padded, kernel):
    _, height, width, _ = total.shape
    for i in range(first, min(first + _ROWS, kernel.shape[1])):
        for j in range(kernel.shape[2]):
            shifted = padded[:, i : i + height, j : j + width]
            total = total + shifted * kernel[:, i, j][:, None, None]
    return total


def _forward(x, kernel):
    return _summed(x, kernel, apart), (x, kernel)


@add_dynamic_conv.gradient(_forward, primal=lambda *args: _forward(*args)[0])
def _backward(residuals, dy):
    x, kernel = residuals
    dx = _summed(dy, kernel[:, ::-1, ::-1], apart)
    dkernel = lax.platform_dependent(
        _padded(x, kernel), dy, cpu=_kernel_gradient_by_rows, default=_kernel_gradient
    )
    return dx, dkernel.astype(kernel.dtype)


def _kernel_gradient(padded, dy):
    """The sums over positions of dy times x shifted: (N, K, K, C)."""
    _, height, width, _ = dy.shape
    side = padded.shape[1] - height + 1

    def row(i):
        rows = widened(lax.dynamic_slice_in_dim(padded, i, height, axis=1))
        taps = [(rows[:, :, j : j + width] * widened(dy)).sum((1, 2)) for j in range(side)]
        return jnp.stack(taps, 1)

    return jnp.moveaxis(lax.map(row, jnp.arange(side)), 0, 1)


def _kernel_gradient_by_rows(padded, dy):
    """The same: a row of dy is a kernel, by which that part of x is convolved."""
    n, height, width, channels = dy.shape
    side = padded.shape[1] - height + 1
    fits = (k for k in range(1, height + 1) if height % k == 0 and k * width <= _UNROLLED)
    at_once = max(fits, default=1)

    def add_row(i, total, rows, of_dy):
        for j in range(width):
            shifted = rows[:, i : i + side, j : j + side]
            total = total + shifted * widened(of_dy)[:, i, j][:, None, None]
        return total

    def add_rows(total, first):
        rows = lax.dynamic_slice_in_dim(padded, first, side + at_once - 1, axis=1)
        of_dy = lax.dynamic_slice_in_dim(dy, first, at_once, axis=1)
        for i in range(at_once):
            total = apart(functools.partial(add_row, i), total, rows, of_dy)
        return total, None

    total = jnp.zeros((n, side, side, channels), accumulation_dtype(dy.dtype))
    return lax.scan(add_rows, total, jnp.arange(0, height, at_once))[0]
