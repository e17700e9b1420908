"""Depthwise convolution by a kernel of every example: how DiCo reads text (section 3.3).

A sum of shifted products, as the 3x3 one of `dico_jax.ops.conv`, and for the same reason: XLA's
grouped convolution of N * C groups took 14 to 40 times as long on a CPU.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops.cpu import apart
from dico_jax.ops.plain import Operation, accumulation_dtype, widened


def _padded(x, kernel):
    zero, by = jnp.zeros((), x.dtype), kernel.shape[1] // 2
    return lax.pad(x, zero, ((0, 0, 0), (by, by, 0), (by, by, 0), (0, 0, 0)))


@Operation
def dynamic_depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise convolution of x (N, H, W, C), each example by its kernel (N, K, K, C), K odd.

    Zero padding of K // 2 and stride 1; products are added in float32 or better.
    """
    _, height, width, _ = x.shape
    padded, kernel = _padded(x, kernel), widened(kernel)
    total = jnp.zeros((), accumulation_dtype(x.dtype))
    for i in range(kernel.shape[1]):
        for j in range(kernel.shape[2]):
            shifted = padded[:, i : i + height, j : j + width]
            total = total + shifted * kernel[:, i, j][:, None, None]
    return total.astype(x.dtype)


def _forward(x, kernel):
    return apart(dynamic_depthwise_conv.plain, x, kernel), (x, kernel)


@dynamic_depthwise_conv.gradient(_forward, primal=lambda *args: _forward(*args)[0])
def _backward(residuals, dy):
    x, kernel = residuals
    dx = apart(dynamic_depthwise_conv.plain, dy, kernel[:, ::-1, ::-1])
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

    def add(total, i):
        rows = lax.dynamic_slice_in_dim(padded, i, side, axis=1)
        row = widened(lax.dynamic_index_in_dim(dy, i, axis=1, keepdims=False))
        for j in range(width):
            total = total + rows[:, :, j : j + side] * row[:, j][:, None, None]
        return total, None

    total = jnp.zeros((n, side, side, channels), accumulation_dtype(dy.dtype))
    return lax.scan(add, total, jnp.arange(height))[0]
