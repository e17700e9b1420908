"""The exact GELU."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, between_products: bool = False) -> jax.Array:
    """X * Phi(x) with Phi the standard normal distribution function, by erf as PyTorch does.

    `jax.nn.gelu(approximate=False)` takes erfc, which costs two exponentials and selects more. The
    gradient keeps x alone; the derived one keeps erf as well.

    Args:
      x: (..., C), any floating dtype.
      between_products: x comes from a product, and a product takes the result. The values are the
        same.
    """
    return _run(_gelu, between_products, x)


def _gelu_fwd(x, between_products):
    return gelu(x, between_products), x


def _gelu_bwd(between_products, x, dy):
    return (_run(_times_slope, between_products, x, dy),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


def _gelu(x):
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def _times_slope(x, dy):
    # erf of -x: that of x would be taken for the forward pass's, and kept until here.
    cdf = 0.5 - 0.5 * lax.erf(x * -math.sqrt(0.5))
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * jnp.square(x))
    return dy * (cdf + x * density)


def _run(function, between_products, *arrays):
    """An elementwise function, between products on CPU of its arrays (..., C) as matrices.

    XLA for CPU multiplies matrices. A GELU of another shape it computes twice where two products
    read it, one of them by examples (`dico_jax.ops.linear`).
    """
    if not between_products:
        return function(*arrays)

    def of_matrices(*arrays):
        shape = arrays[0].shape
        return function(*(x.reshape(-1, *shape[-1:]) for x in arrays)).reshape(shape)

    return lax.platform_dependent(*arrays, cpu=of_matrices, default=function)
