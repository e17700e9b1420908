"""What all 3x3 convolutions share: neighbours, zeros around, and the convolution as XLA has it."""

import jax
import jax.numpy as jnp
from jax import lax

# Rows and columns of a kernel: entry (i, j) is for the neighbour at (i - 1, j - 1).
TAPS = [(i, j) for i in range(3) for j in range(3)]


def zero_padded(x: jax.Array) -> jax.Array:
    """X (N, H, W, C) with a ring of zeros around its positions: (N, H + 2, W + 2, C)."""
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))


def direct_conv3x3(x: jax.Array, kernel: jax.Array, *, groups: int = 1) -> jax.Array:
    """3x3 convolution with zero padding 1 and stride 1.

    Args:
      x: (N, H, W, C).
      kernel: (3, 3, C / groups, D), dtype of x.
      groups: parts of C and D, each of D from the same of C; C for a depthwise convolution.

    Returns:
      (N, H, W, D) of x's dtype.
    """
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def direct_kernel_gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """Gradient of the kernel of `direct_conv3x3`, for one group and dy (N, H, W, D)."""
    return jax.vjp(lambda kernel: direct_conv3x3(x, kernel), kernel)[1](dy)[0]
