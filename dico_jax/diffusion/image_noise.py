"""Random numbers that belong to an image: functions of (seed, index) and nothing else."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.errors import UsageError
from dico_jax.ops.plain import check_float64


def image_keys(seed: int | jax.Array, indices: Sequence[int] | np.ndarray | jax.Array) -> jax.Array:
    """One random key per image, of the seed and the image's index alone.

    Whatever batch and device an image falls into, its noise is the same. The generator is threefry,
    whatever `jax_default_prng_impl` says, since others do not promise that.

    Args:
      seed: the seed of a set of images, 0 to 2**32 - 1; traced, uint32 ().
      indices: (N,) non-negative indices of images within the set.

    Returns:
      (N,) typed keys for `initial_noise` and `step_noise`, which fold in 0..T. Fold in numbers from
      2**31 on for draws of your own.

    Raises:
      UsageError: a seed out of range, which JAX would cut to 32 bits without a word.
    """
    if not isinstance(seed, jax.core.Tracer) and not 0 <= seed < 2**32:
        raise UsageError("seed", seed, f"must be from 0 to {2**32 - 1}")
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices, jnp.uint32))


def initial_noise(keys: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """x_T, (N, *shape) standard normal, of (N,) `image_keys` and an image's shape (H, W, C).

    Raises:
      UsageError: float64 without `jax_enable_x64`.
    """
    return _normal(keys, 0, shape, dtype)


def step_noise(keys: jax.Array, i, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """The noise of step i, an integer (): as `initial_noise`."""
    return _normal(keys, jnp.asarray(i, jnp.uint32) + 1, shape, dtype)


def _normal(keys, stream, shape, dtype) -> jax.Array:
    check_float64("dtype", dtype)

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, stream), tuple(shape), dtype)

    return jax.vmap(draw)(keys)
