"""Vectors over the positions of an image, with gradients that are summed in float32.

The derived gradient sums as many terms as there are positions in the dtype of the activations: in
bfloat16 a sum of ones stops at 256.
"""

import jax
import jax.numpy as jnp

from dico_jax.ops.cpu import apart, with_sums
from dico_jax.ops.plain import Operation
from dico_jax.ops.precision import widened


def over_positions(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector (C,) or vectors (N, C), to be broadcast over x (N, ..., C)."""
    if vector.ndim == 1:
        return vector
    return jnp.expand_dims(vector, tuple(range(1, x.ndim - 1)))


@Operation
def add_vector(x: jax.Array, vector: jax.Array) -> jax.Array:
    """The sum of x (N, ..., C) and a vector (C,), or one vector (N, C) per example."""
    return x + over_positions(vector, x)


@Operation
def multiply_vector(x: jax.Array, vector: jax.Array) -> jax.Array:
    """The product of x (N, ..., C) and a vector (C,), or one vector (N, C) per example."""
    return _times(x, vector)


def _times(x, vector):
    return x * over_positions(vector, x)


def _as_vector(sums, vector):
    """Sums over positions (N, C) as the gradient of `vector`."""
    return (sums.sum(0) if vector.ndim == 1 else sums).astype(vector.dtype)


def _add_fwd(x, vector):
    return add_vector(x, vector), (jnp.zeros(0, x.dtype), vector)


def _add_bwd(residuals, dy):
    like_x, vector = residuals
    total = with_sums(lambda sums, dy: sums.over_positions(widened, dy), dy)
    return dy.astype(like_x.dtype), _as_vector(total, vector)


def _multiply_fwd(x, vector):
    return apart(_times, x, vector), (x, vector)


def _multiply_bwd(residuals, dy):
    x, vector = residuals

    def along(sums, dy, x):
        return sums.over_positions(lambda dy, x: widened(dy) * widened(x), dy, x)

    return _times(dy, vector).astype(x.dtype), _as_vector(with_sums(along, dy, x), vector)


add_vector.defvjp(_add_fwd, _add_bwd)
multiply_vector.defvjp(_multiply_fwd, _multiply_bwd)
