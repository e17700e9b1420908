"""3x3 depthwise convolution, the spatial mixing of every DiCo block (paper section 3.2).

XLA lowers grouped convolutions poorly (jax-ml/jax#23713, openxla/xla#34273): this is a sum of nine
shifted products, with its gradient written by hand. The derived one pads and adds nine full arrays
for the input and reduces nine strided products for the kernel. On TPU, XLA fuses the sum with bias,
GELU and mean into one pass (docs/performance.md).
"""

import jax
import jax.numpy as jnp

from dico_jax.ops.cpu import apart, with_sums
from dico_jax.ops.direct import TAPS, zero_padded
from dico_jax.ops.gelu import gelu
from dico_jax.ops.plain import Operation
from dico_jax.ops.precision import accumulation_dtype, widened


def conv_gelu_mean(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GELU of `depthwise_conv3x3`, and its mean over positions.

    Returns:
      h: (N, H, W, C) of x's dtype.
      mean: (N, C) in float32 or better: in bfloat16 a mean over 1024 positions is off by 1e-2.
    """
    h = gelu(depthwise_conv3x3(x, kernel, bias))
    return h, h.mean((1, 2), dtype=accumulation_dtype(x.dtype))


@Operation
def depthwise_conv3x3(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Depthwise 3x3 convolution with zero padding 1 and stride 1.

    Args:
      x: (N, H, W, C) activations, any floating dtype.
      kernel: (3, 3, 1, C) in HWIO layout (I = 1 input channel per group), dtype of x.
      bias: (C,), dtype of x.

    Returns:
      (N, H, W, C) of x's dtype; sums are taken in float32 or better.
    """
    return _convolve(zero_padded(x), kernel, bias)


def _sum_of_taps(padded, kernel):
    """Sum over (i, j) of x shifted by (i - 1, j - 1), times kernel[i, j]; float32 or better."""
    height, width = padded.shape[1] - 2, padded.shape[2] - 2
    kernel = kernel.astype(accumulation_dtype(padded.dtype))
    total = None
    for i, j in TAPS:
        term = padded[:, i : i + height, j : j + width] * kernel[i, j, 0]
        total = term if total is None else total + term
    return total


def _convolve(padded, kernel, bias):
    return (_sum_of_taps(padded, kernel) + bias).astype(padded.dtype)


def _fwd(x, kernel, bias):
    return apart(_convolve, zero_padded(x), kernel, bias), (x, kernel)


def _gradients(sums, x, kernel, dy):
    """Gradients of x, and for every example of the kernel (N, 9, C) and of the bias (N, C)."""
    _, height, width, _ = x.shape
    padded = zero_padded(dy)
    # The transpose of a zero-padded convolution is the convolution by the rotated kernel.
    dx = _sum_of_taps(padded, kernel[::-1, ::-1]).astype(x.dtype)
    # The kernel's gradient shifts dy as well: shifted copies of x would be shared with the forward
    # pass, and kept until here.
    shifted = [
        padded[:, 2 - i : 2 - i + height, 2 - j : 2 - j + width] for i, j in TAPS
    ]  # fmt: skip
    taps = [
        sums.over_positions(lambda dy, x: widened(dy) * widened(x), dy, x) for dy in shifted
    ]  # fmt: skip
    return dx, jnp.stack(taps, 1), sums.over_positions(widened, dy)


def _bwd(residuals, dy):
    x, kernel = residuals
    dx, taps, total = with_sums(_gradients, x, kernel, dy)
    dkernel = taps.sum(0).reshape(kernel.shape).astype(kernel.dtype)
    return dx, dkernel, total.sum(0).astype(dy.dtype)


depthwise_conv3x3.defvjp(_fwd, _bwd)
