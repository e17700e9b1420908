"""Dense 3x3 convolution."""

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops.cpu import apart, winograd_conv3x3, winograd_pays
from dico_jax.ops.direct import TAPS, direct_conv3x3, direct_kernel_gradient, zero_padded
from dico_jax.ops.plain import Operation
from dico_jax.ops.precision import accumulation_dtype


def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution with zero padding 1 and stride 1.

    Few input channels, or an input smaller than the kernel, make one product of all nine
    neighbours. Few output channels make one product whose results are shifted and added. Both keep
    the matrix units of every platform filled, where a convolution would not. What is left is a
    convolution, on CPU by fewer multiplications where that is faster (Winograd).

    Args:
      x: (N, H, W, C) activations, any floating dtype.
      kernel: (3, 3, C, D), dtype of x.

    Returns:
      (N, H, W, D) of x's dtype; sums are taken in float32 or better.
    """
    _, height, width, channels = x.shape
    if min(height, width) < 3 or 9 * channels <= kernel.shape[-1]:
        return _gathered(x, kernel)
    if 9 * kernel.shape[-1] <= channels:
        return _scattered(x, kernel)
    if winograd_pays(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=winograd_conv3x3, default=_convolved)
    return _convolved(x, kernel)


@Operation
def _convolved(x, kernel):
    return direct_conv3x3(x, kernel)


def _convolved_bwd(residuals, dy):
    x, kernel = residuals
    dkernel = direct_kernel_gradient(x, kernel, dy)
    if dy.size < kernel.shape[-1] ** 2:  # fewer positions than channels
        return _few_positions_gradient(dy, kernel), dkernel
    (dx,) = jax.vjp(lambda x: direct_conv3x3(x, kernel), x)[1](dy)
    return dx, dkernel


def _few_positions_gradient(dy, kernel):
    """Gradient of a convolution's input, by products that read the kernel as it lies.

    XLA for CPU brings it into another order first, which takes longer than the convolution.
    """
    wide = accumulation_dtype(dy.dtype)
    taps = kernel.reshape(-1, kernel.shape[-1])
    taken = lax.dot_general(dy, taps, (((3,), (1,)), ((), ())), preferred_element_type=wide)
    return _shifted_sum(taken, TAPS[::-1]).astype(dy.dtype)


_convolved.defvjp(lambda x, kernel: (direct_conv3x3(x, kernel), (x, kernel)), _convolved_bwd)


def _gathered(x, kernel):
    return _neighbours(x, TAPS) @ kernel.reshape(-1, kernel.shape[-1])


def _neighbours(x, taps):
    """X shifted by every tap (i - 1, j - 1), side by side in the channels."""
    _, height, width, _ = x.shape
    padded = zero_padded(x)
    parts = [padded[:, i : i + height, j : j + width] for i, j in taps]
    return jnp.concatenate(parts, axis=-1)


def _scattered(x, kernel):
    channels, features = kernel.shape[2:]
    wide = accumulation_dtype(x.dtype)
    # What every position gives to its neighbours, those of one neighbour side by side.
    flat = kernel.transpose(2, 0, 1, 3).reshape(channels, 9 * features)
    given = jnp.matmul(x, flat, preferred_element_type=wide)
    return _sum_of_given(given).astype(x.dtype)


@Operation
def _sum_of_given(given):
    return _shifted_sum(given, TAPS)


def _sum_of_given_bwd(_, dy):
    return (apart(lambda dy: _neighbours(dy, TAPS[::-1]), dy),)


_sum_of_given.defvjp(lambda given: (_sum_of_given(given), None), _sum_of_given_bwd)


def _shifted_sum(parts, taps):
    """Sum of nine equal parts of the channels, each shifted by its tap (i - 1, j - 1)."""
    _, height, width, channels = parts.shape
    features, padded = channels // 9, zero_padded(parts)
    total = jnp.zeros((), parts.dtype)
    for k, (i, j) in enumerate(taps):
        part = padded[..., k * features : (k + 1) * features]
        total = total + part[:, i : i + height, j : j + width]
    return total
