"""Layer normalisation with modulation, as one operation with a gradient of its own.

The derived gradient keeps and reads four arrays as large as the input; this one keeps the input.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops.precision import accumulation_dtype
from dico_jax.ops.vectors import over_positions

EPSILON = 1e-6


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalisation over channels, no affine parameters, eps 1e-6; returns float32 or better."""
    x = x.astype(accumulation_dtype(x.dtype))
    mean, rstd = _statistics(x)
    return (x - mean) * rstd


@jax.custom_vjp
def norm_modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Adaptive layer normalisation: layer_norm(x) * (1 + scale) + shift.

    Args:
      x: (N, ..., C) activations, any floating dtype.
      shift, scale: (N, C), any floating dtype.

    Returns:
      (N, ..., C) in float32 or better.
    """
    return layer_norm(x) * (1 + _over(scale, x)) + _over(shift, x)


def _statistics(x):
    """Mean and reciprocal standard deviation over channels, (N, ..., 1)."""
    mean = x.mean(-1, keepdims=True)
    # Not mean(x^2) - mean^2, which loses the digits of a small variance.
    return mean, lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + EPSILON)


def _over(vector, x):
    return over_positions(vector.astype(accumulation_dtype(x.dtype)), x)


def _norm_modulate_fwd(x, shift, scale):
    wide = x.astype(accumulation_dtype(x.dtype))
    mean, rstd = _statistics(wide)
    y = (wide - mean) * rstd * (1 + _over(scale, x)) + _over(shift, x)
    return y, (x, mean, rstd, shift, scale)


def _norm_modulate_bwd(residuals, dy):
    x, mean, rstd, shift, scale = residuals
    normed = (x - mean) * rstd
    positions = tuple(range(1, x.ndim - 1))
    dnormed = dy * (1 + _over(scale, x))
    along = (dnormed * normed).mean(-1, keepdims=True)
    dx = rstd * (dnormed - dnormed.mean(-1, keepdims=True) - normed * along)
    dscale = (dy * normed).sum(positions)
    return dx.astype(x.dtype), dy.sum(positions).astype(shift.dtype), dscale.astype(scale.dtype)


norm_modulate.defvjp(_norm_modulate_fwd, _norm_modulate_bwd)
