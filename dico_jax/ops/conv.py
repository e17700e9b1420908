"""The dense 3x3 convolution, and the depthwise one that mixes positions in a DiCo block.

XLA lowers grouped convolutions poorly (jax-ml/jax#23713, openxla/xla#34273): the depthwise one is a
sum of shifted products. The gradient that JAX derives of it pads and adds as many full arrays.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops import plain
from dico_jax.ops.cpu import apart, winograd_conv3x3, winograd_pays, with_sums
from dico_jax.ops.plain import TAPS, Operation, accumulation_dtype, widened, zero_padded
from dico_jax.ops.pointwise import gelu


def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution of x (N, H, W, C) by kernel (3, 3, C, D), zero padding 1 and stride 1.

    Few input channels, or an input smaller than the kernel, make one product of all nine
    neighbours; few output channels one whose results are shifted and added.
    """
    _, height, width, channels = x.shape
    features = kernel.shape[-1]
    if min(height, width) < 3 or 9 * channels <= features:
        return _neighbours(x, TAPS) @ kernel.reshape(-1, features)
    if 9 * features <= channels:
        # What every position gives to its neighbours, those of one neighbour side by side.
        flat = kernel.transpose(2, 0, 1, 3).reshape(channels, 9 * features)
        given = jnp.matmul(x, flat, preferred_element_type=accumulation_dtype(x.dtype))
        return _sum_of_given(given).astype(x.dtype)
    if winograd_pays(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=winograd_conv3x3, default=_convolved)
    return _convolved(x, kernel)


@Operation
def _convolved(x, kernel):
    return plain.direct_conv3x3(x, kernel)


@_convolved.gradient(lambda x, kernel: (plain.direct_conv3x3(x, kernel), (x, kernel)))
def _convolved_bwd(residuals, dy):
    x, kernel = residuals
    dkernel = plain.direct_kernel_gradient(x, kernel, dy)
    features, wide = kernel.shape[-1], accumulation_dtype(dy.dtype)
    if dy.size >= features**2:
        return jax.vjp(lambda x: plain.direct_conv3x3(x, kernel), x)[1](dy)[0], dkernel
    # Fewer positions than channels: XLA for CPU would take longer to transpose the kernel.
    taps = kernel.reshape(-1, features)
    taken = lax.dot_general(dy, taps, (((3,), (1,)), ((), ())), preferred_element_type=wide)
    return _shifted_sum(taken, TAPS[::-1]).astype(dy.dtype), dkernel


def _neighbours(x, taps):
    """X shifted by every tap (i - 1, j - 1), side by side in the channels."""
    return jnp.concatenate(list(_shifted(zero_padded(x), taps)), axis=-1)


def _shifted(padded, taps):
    ring = math.isqrt(len(taps)) - 1  # of the kernel whose taps they are
    height, width = padded.shape[1] - ring, padded.shape[2] - ring
    return (padded[:, i : i + height, j : j + width] for i, j in taps)


@Operation
def _sum_of_given(given):
    return _shifted_sum(given, TAPS)


@_sum_of_given.gradient(lambda given: (_sum_of_given(given), None))
def _sum_of_given_bwd(_, dy):
    return (apart(lambda dy: _neighbours(dy, TAPS[::-1]), dy),)


def _shifted_sum(parts, taps):
    """Sum of nine equal parts of the channels, each shifted by its tap (i - 1, j - 1)."""
    _, height, width, channels = parts.shape
    features, padded = channels // 9, zero_padded(parts)
    total = jnp.zeros((), parts.dtype)
    for k, (i, j) in enumerate(taps):
        part = padded[..., k * features : (k + 1) * features]
        total = total + part[:, i : i + height, j : j + width]
    return total


@Operation
def depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Depthwise convolution of x (N, H, W, C) by kernel (K, K, 1, C), plus bias (C,); K is odd.

    Zero padding of K // 2 and stride 1.
    """
    return _depthwise(_padded_for(kernel, x), kernel, bias)


def _padded_for(kernel, x):
    return zero_padded(x, kernel.shape[0] // 2)


def _taps_of(kernel):
    side = kernel.shape[0]
    return [(i, j) for i in range(side) for j in range(side)]


def _depthwise(padded, kernel, bias):
    return (_sum_of_taps(padded, kernel) + bias).astype(padded.dtype)


def _sum_of_taps(padded, kernel):
    """Sum over (i, j) of x shifted by its tap, times kernel[i, j]; in float32 or better."""
    kernel = kernel.astype(accumulation_dtype(padded.dtype))
    total, taps = None, _taps_of(kernel)
    for shifted, (i, j) in zip(_shifted(padded, taps), taps, strict=True):
        term = shifted * kernel[i, j, 0]
        total = term if total is None else total + term
    return total


def _depthwise_fwd(x, kernel, bias):
    return apart(_depthwise, _padded_for(kernel, x), kernel, bias), (x, kernel)


def _depthwise_gradients(sums, x, kernel, dy):
    """Gradients of x, and for every example of the kernel (N, K * K, C) and of the bias (N, C)."""
    padded = _padded_for(kernel, dy)
    # The transpose of a zero-padded convolution is the convolution by the rotated kernel.
    dx = _sum_of_taps(padded, kernel[::-1, ::-1]).astype(x.dtype)

    def product(dy, x):
        return widened(dy) * widened(x)

    # The kernel's gradient shifts dy as well: shifted copies of x would be shared with the forward
    # pass, and kept until here.
    taps = _shifted(padded, _taps_of(kernel)[::-1])
    taps = [sums.over_positions(product, part, x) for part in [*taps]]
    return dx, jnp.stack(taps, 1), sums.over_positions(widened, dy)


@depthwise_conv.gradient(_depthwise_fwd)
def _depthwise_bwd(residuals, dy):
    x, kernel = residuals
    dx, taps, total = with_sums(_depthwise_gradients, x, kernel, dy)
    dkernel = taps.sum(0).reshape(kernel.shape).astype(kernel.dtype)
    return dx, dkernel, total.sum(0).astype(dy.dtype)


def conv_gelu_mean(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array] = gelu,
) -> tuple[jax.Array, jax.Array]:
    """GELU of `depthwise_conv`, and its mean (N, C) over positions, in float32 or better.

    Another `activation` may take GELU's place.
    """
    h = activation(depthwise_conv(x, kernel, bias))
    return h, h.mean((1, 2), dtype=accumulation_dtype(x.dtype))
