"""The precision of sums."""

import jax
import jax.numpy as jnp


def accumulation_dtype(dtype) -> jnp.dtype:
    """The dtype of statistics and sums for activations of `dtype`: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """X in the dtype of its sums."""
    return x.astype(accumulation_dtype(x.dtype))
