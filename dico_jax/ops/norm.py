"""Layer normalisation with modulation, as one operation with a gradient of its own.

The derived gradient keeps and reads four arrays as large as the input; this one keeps the input.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops.cpu import with_sums
from dico_jax.ops.plain import Operation
from dico_jax.ops.precision import accumulation_dtype, widened
from dico_jax.ops.vectors import over_positions

EPSILON = 1e-6


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalisation over channels, no affine parameters, eps 1e-6; returns float32 or better."""
    x = widened(x)
    mean = x.mean(-1, keepdims=True)
    # Not mean(x^2) - mean^2, which loses the digits of a small variance.
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + EPSILON)


@Operation
def norm_modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Adaptive layer normalisation: layer_norm(x) * (1 + scale) + shift.

    Args:
      x: (N, ..., C) activations, any floating dtype.
      shift, scale: (N, C), any floating dtype.

    Returns:
      (N, ..., C) in float32 or better.
    """
    return layer_norm(x) * (1 + _over(scale, x)) + _over(shift, x)


def _over(vector, x):
    return over_positions(vector.astype(accumulation_dtype(x.dtype)), x)


def _forward(sums, x, shift, scale):
    """The result, and the mean and reciprocal standard deviation (N, ..., 1) of the channels."""
    wide = widened(x)
    mean = sums.channel_mean(lambda x: x, wide)
    variance = sums.channel_mean(lambda x, mean: jnp.square(x - mean), wide, mean)
    rstd = lax.rsqrt(variance + EPSILON)
    y = (wide - mean) * rstd * (1 + _over(scale, x)) + _over(shift, x)
    return y, mean, rstd


def _backward(sums, x, mean, rstd, scale, dy):
    """Gradients of x, shift and scale in float32 or better."""
    wide, factor = widened(x), 1 + _over(scale, x)

    def along(dy, x, mean, rstd):
        return dy * ((x - mean) * rstd)

    dmean = sums.channel_mean(lambda dy, factor: dy * factor, dy, factor)
    dscaled = sums.channel_mean(
        lambda dy, factor, *rest: along(dy * factor, *rest), dy, factor, wide, mean, rstd
    )
    dx = rstd * (dy * factor - dmean - (wide - mean) * rstd * dscaled)
    dshift = sums.over_positions(lambda dy: dy, dy)
    return dx, dshift, sums.over_positions(along, dy, wide, mean, rstd)


def _norm_modulate_fwd(x, shift, scale):
    y, mean, rstd = with_sums(_forward, x, shift, scale)
    return y, (x, mean, rstd, shift, scale)


def _norm_modulate_bwd(residuals, dy):
    x, mean, rstd, shift, scale = residuals
    dx, dshift, dscale = with_sums(_backward, x, mean, rstd, scale, dy)
    return dx.astype(x.dtype), dshift.astype(shift.dtype), dscale.astype(scale.dtype)


norm_modulate.defvjp(_norm_modulate_fwd, _norm_modulate_bwd)
