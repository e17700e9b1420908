"""The precision of sums."""

import jax
import jax.numpy as jnp

from dico_jax.errors import UsageError


def accumulation_dtype(dtype) -> jnp.dtype:
    """The dtype of statistics and sums for activations of `dtype`: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    """X in the dtype of its sums."""
    return x.astype(accumulation_dtype(x.dtype))


def check_float64(field: str, dtype) -> None:
    """Raises UsageError for float64 where JAX would make float32 of it; `field` is what asked."""
    if jnp.dtype(dtype) == "float64" != jax.dtypes.canonicalize_dtype(dtype):
        raise UsageError(field, "float64", "needs JAX's own switch: set JAX_ENABLE_X64=1")
