"""3x3 depthwise convolution, the spatial mixing of every DiCo block (paper section 3.2).

XLA lowers grouped convolutions poorly (jax-ml/jax#23713, openxla/xla#34273), so the default is a
sum of nine shifted products, with its gradient written by hand: the derived one pads and adds nine
full arrays for the input and reduces nine strided products for the kernel. On TPU, XLA fuses the
sum with bias, GELU and mean into one pass; the Pallas kernels do so on GPU (docs/performance.md).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from dico_jax.errors import UsageError
from dico_jax.ops.apart import apart, with_sums
from dico_jax.ops.direct import TAPS, direct_conv3x3, zero_padded
from dico_jax.ops.gelu import gelu
from dico_jax.ops.precision import accumulation_dtype, widened

Implementation = Literal["auto", "shifted", "lax", "pallas"]


def conv_gelu_mean(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, implementation: Implementation = "auto"
) -> tuple[jax.Array, jax.Array]:
    """GELU of the depthwise 3x3 convolution, and its mean over positions.

    Args:
      x, kernel, bias: see `depthwise_conv3x3`.
      implementation: as there, or "pallas" for the kernel that does all of it in one pass on an
        NVIDIA GPU, in float32 or bfloat16. "auto" does not choose it: it has not been measured yet.

    Returns:
      h: (N, H, W, C) of x's dtype.
      mean: (N, C) in float32 or better: in bfloat16 a mean over 1024 positions is off by 1e-2.

    Raises:
      UsageError: an unknown implementation, or a dtype or platform that it does not have.
    """
    if implementation != "pallas":
        h = gelu(depthwise_conv3x3(x, kernel, bias, implementation=implementation))
        return h, h.mean((1, 2), dtype=accumulation_dtype(x.dtype))
    from dico_jax.ops import depthwise_pallas  # slow to import

    if not depthwise_pallas.supported(x.shape, x.dtype, "gpu"):
        raise UsageError(
            f'model.depthwise="pallas" takes float32 and bfloat16, not {x.dtype}: use "auto"'
        )
    if jax.default_backend() != "gpu":
        raise UsageError(
            f'model.depthwise="pallas" needs a GPU, not {jax.default_backend()}: use "auto"'
        )
    h, sums = depthwise_pallas.conv_gelu_sum(x, kernel, bias, platform="gpu")
    return h, sums / (x.shape[1] * x.shape[2])


def depthwise_conv3x3(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, implementation: Implementation = "auto"
) -> jax.Array:
    """Depthwise 3x3 convolution with zero padding 1 and stride 1.

    Args:
      x: (N, H, W, C) activations, any floating dtype.
      kernel: (3, 3, 1, C) in HWIO layout (I = 1 input channel per group), dtype of x.
      bias: (C,), dtype of x.
      implementation: "shifted" (nine shifted products, own gradient), "lax" (XLA's grouped
        convolution), or "auto", which is "shifted" on every platform.

    Returns:
      (N, H, W, C) of x's dtype; sums are taken in float32 or better.

    Raises:
      UsageError: an unknown implementation.
    """
    if implementation in ("auto", "shifted"):
        return _shifted(x, kernel, bias)
    if implementation == "lax":
        return direct_conv3x3(x, kernel, groups=x.shape[-1]) + bias
    raise UsageError(
        f"implementation={implementation!r} of depthwise_conv3x3 is unknown: "
        'use "auto", "shifted" or "lax"'
    )


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


@jax.custom_vjp
def _shifted(x, kernel, bias):
    return _convolve(zero_padded(x), kernel, bias)


def _shifted_fwd(x, kernel, bias):
    return apart(_convolve, zero_padded(x), kernel, bias), (x, kernel)


def _backward(sums, x, kernel, dy):
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


def _shifted_bwd(residuals, dy):
    x, kernel = residuals
    dx, taps, total = with_sums(_backward, x, kernel, dy)
    dkernel = taps.sum(0).reshape(kernel.shape).astype(kernel.dtype)
    return dx, dkernel, total.sum(0).astype(dy.dtype)


_shifted.defvjp(_shifted_fwd, _shifted_bwd)
