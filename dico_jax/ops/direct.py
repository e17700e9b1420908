"""The dense 3x3 convolution as XLA has it, and the zeros that all 3x3 convolutions add."""

import jax
import jax.numpy as jnp
from jax import lax


def zero_padded(x: jax.Array) -> jax.Array:
    """X (N, H, W, C) with a ring of zeros around its positions: (N, H + 2, W + 2, C)."""
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))


def direct_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution with zero padding 1 and stride 1, see `dico_jax.ops.conv.conv3x3`."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
