"""The exact GELU."""

import math

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """X * Phi(x) with Phi the standard normal distribution function, by erf as PyTorch does.

    `jax.nn.gelu(approximate=False)` takes erfc, which costs two exponentials and selects more. The
    gradient keeps x alone; the derived one keeps erf as well.
    """
    return _by_rows(lambda x: 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5))), x)


def _gelu_fwd(x):
    return gelu(x), x


def _gelu_bwd(x, dy):
    return (_by_rows(_times_slope, x, dy),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


def _times_slope(x, dy):
    # erf of -x: that of x would be taken for the forward pass's, and kept until here.
    cdf = 0.5 - 0.5 * lax.erf(x * -math.sqrt(0.5))
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * jnp.square(x))
    return dy * (cdf + x * density)


def _by_rows(function, *arrays):
    """An elementwise function, on CPU of its arrays (..., C) as matrices.

    XLA for CPU multiplies such. A GELU of another shape it computes twice where two products read
    it, one of them by examples (`dico_jax.ops.linear`).
    """

    def of_matrices(*arrays):
        shape = arrays[0].shape
        return function(*(x.reshape(-1, *shape[-1:]) for x in arrays)).reshape(shape)

    return lax.platform_dependent(*arrays, cpu=of_matrices, default=function)
