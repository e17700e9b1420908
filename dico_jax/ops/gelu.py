"""The exact GELU, X * Phi(x) with Phi the standard normal distribution function."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops.cpu import apart
from dico_jax.ops.plain import Operation


def _gelu(x):
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


@Operation
def gelu(x: jax.Array) -> jax.Array:
    """GELU of x (..., C), any floating dtype, by erf as PyTorch takes it.

    `jax.nn.gelu(approximate=False)` takes erfc, which costs two exponentials and selects more. The
    gradient keeps x and the result, which what follows keeps anyway; the derived one keeps erf.
    """
    return _gelu(x)


def _gelu_fwd(x):
    y = apart(_gelu, x)
    return y, (x, y)


def _gelu_bwd(residuals, dy):
    return (apart(times_slope, *residuals, dy, on_cpu=times_slope_by_quotient),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


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
