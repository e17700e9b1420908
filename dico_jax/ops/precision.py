"""The precision of sums."""

import jax.numpy as jnp


def accumulation_dtype(dtype) -> jnp.dtype:
    """The dtype of statistics and sums for activations of `dtype`: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)
