"""GELU, vectors over positions, and modulated layer normalisation, with gradients of their own.

Derived ones keep more arrays, and sum in the activations' dtype: ones in bfloat16 up to 256.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops.cpu import apart, with_sums
from dico_jax.ops.plain import Operation, accumulation_dtype, widened

EPSILON = 1e-6


@Operation
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by erf as PyTorch takes it; JAX's takes erfc, which costs more."""
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def _gelu_fwd(x):
    y = apart(gelu.plain, x)
    return y, (x, y)


@gelu.gradient(_gelu_fwd)
def _gelu_bwd(residuals, dy):
    return (apart(times_slope, *residuals, dy, on_cpu=times_slope_by_quotient),)


def times_slope(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
    """Dy times the derivative of GELU at x; y = gelu(x) is not used."""
    # erf of -x: that of x would be taken for the forward pass's, and kept until here.
    cdf = 0.5 - 0.5 * lax.erf(x * -math.sqrt(0.5))
    return dy * (cdf + x * _density(x))


def times_slope_by_quotient(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
    """The same, in float32 and better with Phi(x) = y / x, which costs less than erf."""
    if jnp.finfo(x.dtype).bits < 32:  # y has been rounded to too few digits
        return times_slope(x, y, dy)
    return dy * (jnp.where(x == 0, 0.5, y / x) + x * _density(x))


def _density(x):
    return math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * jnp.square(x))


def over_positions(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector (C,) or vectors (N, C), to be broadcast over x (N, ..., C)."""
    return vector if vector.ndim == 1 else jnp.expand_dims(vector, range(1, x.ndim - 1))


@Operation
def add_vector(x: jax.Array, vector: jax.Array) -> jax.Array:
    """The sum of x (N, ..., C) and a vector (C,), or vectors (N, C)."""
    return x + over_positions(vector, x)


@add_vector.gradient(lambda x, vector: (add_vector(x, vector), (jnp.zeros(0, x.dtype), vector)))
def _add_bwd(residuals, dy):
    like_x, vector = residuals
    total = with_sums(lambda sums, dy: sums.over_positions(widened, dy), dy)
    return dy.astype(like_x.dtype), _as_vector(total, vector)


def _as_vector(sums, vector):
    """Sums over positions (N, C) as the gradient of `vector`."""
    return (sums.sum(0) if vector.ndim == 1 else sums).astype(vector.dtype)


@Operation
def multiply_vector(x: jax.Array, vector: jax.Array) -> jax.Array:
    """The product of x (N, ..., C) and a vector (C,), or vectors (N, C)."""
    return x * over_positions(vector, x)


@multiply_vector.gradient(lambda *args: (apart(multiply_vector.plain, *args), args))
def _multiply_bwd(residuals, dy):
    x, vector = residuals

    def along(sums, dy, x):
        return sums.over_positions(lambda dy, x: widened(dy) * widened(x), dy, x)

    dx = multiply_vector.plain(dy, vector).astype(x.dtype)
    return dx, _as_vector(with_sums(along, dy, x), vector)


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalisation over channels, no affine parameters, eps 1e-6; returns float32 or better."""
    x = widened(x)
    mean = x.mean(-1, keepdims=True)
    # Not mean(x^2) - mean^2, which loses the digits of a small variance.
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + EPSILON)


@Operation
def norm_modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`layer_norm` of x (N, ..., C), times 1 + scale (N, C), plus shift (N, C)."""
    return layer_norm(x) * (1 + _over(scale, x)) + _over(shift, x)


def _over(vector, x):
    return over_positions(vector.astype(accumulation_dtype(x.dtype)), x)


def _norm_forward(sums, x, shift, scale):
    """The result, and the mean and reciprocal standard deviation (N, ..., 1) of the channels."""
    wide = widened(x)
    mean = sums.channel_mean(lambda x: x, wide)
    variance = sums.channel_mean(lambda x, mean: jnp.square(x - mean), wide, mean)
    rstd = lax.rsqrt(variance + EPSILON)
    return (wide - mean) * rstd * (1 + _over(scale, x)) + _over(shift, x), mean, rstd


def _norm_backward(sums, x, mean, rstd, scale, dy):
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


def _norm_fwd(x, shift, scale):
    y, mean, rstd = with_sums(_norm_forward, x, shift, scale)
    return y, (x, mean, rstd, shift, scale)


@norm_modulate.gradient(_norm_fwd)
def _norm_bwd(residuals, dy):
    x, mean, rstd, shift, scale = residuals
    gradients = with_sums(_norm_backward, x, mean, rstd, scale, dy)
    return tuple(g.astype(a.dtype) for g, a in zip(gradients, (x, shift, scale), strict=True))
