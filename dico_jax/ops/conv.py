"""Dense 3x3 convolution."""

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops.precision import accumulation_dtype

_TAPS = [(i, j) for i in range(3) for j in range(3)]


def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution with zero padding 1 and stride 1.

    Few input channels, or an input smaller than the kernel, make one product of all nine
    neighbours. Few output channels make one product whose results are shifted and added. Both keep
    the matrix units of every platform filled, where a convolution would not.

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
    return lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _pad(x):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _gathered(x, kernel):
    _, height, width, _ = x.shape
    padded = _pad(x)
    taps = [padded[:, i : i + height, j : j + width] for i, j in _TAPS]
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _scattered(x, kernel):
    _, height, width, channels = x.shape
    features = kernel.shape[-1]
    wide = accumulation_dtype(x.dtype)
    # What every position gives to its neighbours, those of one neighbour side by side.
    flat = kernel.transpose(2, 0, 1, 3).reshape(channels, 9 * features)
    given = _pad(jnp.matmul(x, flat, preferred_element_type=wide))
    total = jnp.zeros((), wide)
    for k, (i, j) in enumerate(_TAPS):
        part = given[..., k * features : (k + 1) * features]
        total = total + part[:, i : i + height, j : j + width]
    return total.astype(x.dtype)
