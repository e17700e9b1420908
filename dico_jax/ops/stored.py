"""A hint for XLA's fusion."""

import jax
import jax.numpy as jnp
from jax import lax


def stored(x: jax.Array) -> jax.Array:
    """X itself, which XLA for CPU computes once before anything that follows.

    Where nothing but a normalisation reads the result of many operations, XLA for CPU makes one
    loop of all of them, which computes them twice: for the mean and for what is normalised. An
    optimization barrier does not hinder it. Rounding x to the precision that it has does, and costs
    nothing elsewhere.
    """
    kind = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)
