"""Networks whose features images are compared by, and how they run on a mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dico_jax.parallel.mesh import batch_sharding, from_same, num_batch_shards, replicated


class Features(NamedTuple):
    """What a network makes of images.

    Attributes:
      pool: float32 (N, D), what FID, KID, precision and recall compare.
      spatial: float32 (N, S), what sFID compares; None where a network has none.
      logits: float32 (N, classes), what the Inception Score is made of.
    """

    pool: Any
    spatial: Any
    logits: Any


class FeatureNetwork(Protocol):
    """A network for features."""

    @property
    def name(self) -> str:
        """Always named with the numbers: distances in different features do not compare."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        ...

    @property
    def width(self) -> int:
        """Numbers in the pooled features."""
        ...

    @property
    def spatial_width(self) -> int:
        """Numbers in the spatial features; 0 for none."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        ...

    @property
    def cpu_batch_size(self) -> int:
        """Images at a time on one core that are fastest."""
        ...

    @property
    def warning(self) -> str | None:
        """What makes its numbers less than they seem."""
        ...

    @property
    def params(self) -> Any:
        """A tree of arrays."""
        ...

    def check_images(self, shape: tuple[int, int, int], name: str) -> None:
        """Raises UsageError, with the name of the images, where it cannot take (H, W, C)."""
        ...

    def apply(self, params: Any, images: jax.Array) -> Features:
        """The features of uint8 images (N, H, W, C); to be run under jit."""
        ...


FeatureFn = Callable[[np.ndarray], Features]


def make_feature_fn(network: FeatureNetwork, batch_size: int, mesh: Mesh) -> FeatureFn:
    """The function from uint8 images (N, H, W, C), N at most batch_size, to their features.

    Batches are filled up to one size, so that there is one compilation, and split over the mesh; on
    CPUs they go through in parts. With several processes every one gives the same images and gets
    all features.

    Args:
      network: the network.
      batch_size: images at a time, rounded up to a multiple of the mesh's size.
      mesh: the devices.
    """
    split, whole = batch_sharding(mesh), replicated(mesh)
    shards = num_batch_shards(mesh)
    if mesh.devices.flat[0].platform == "cpu":
        batch_size = min(batch_size, network.cpu_batch_size * shards)
    size = -(-batch_size // shards) * shards
    compiled = jax.jit(network.apply, in_shardings=(whole, split), out_shardings=whole)
    params = jax.device_put(network.params, whole)

    def part(images: np.ndarray) -> Features:
        padded = np.pad(images, ((0, size - len(images)), (0, 0), (0, 0), (0, 0)))
        found = compiled(params, from_same(padded, split))
        return jax.tree.map(lambda x: np.asarray(x)[: len(images)], found)

    def features(images: np.ndarray) -> Features:
        parts = [part(images[first : first + size]) for first in range(0, len(images), size)]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    return features


def repeat_grey(images: jax.Array) -> jax.Array:
    """Images (N, H, W, 1 or 3) to (N, H, W, 3)."""
    return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
