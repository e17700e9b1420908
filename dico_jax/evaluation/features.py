"""From images to what is kept of them: networks for features, how they run, and summaries."""

import abc
import json
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dico_jax.errors import UsageError
from dico_jax.evaluation.moments import InceptionScore, Moments
from dico_jax.evaluation.statistics import Statistics
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


class FeatureNetwork(abc.ABC):
    """A network for features.

    Attributes:
      name: always given with the numbers: distances in different features do not compare.
      digest: SHA-256 of the weights.
      width: numbers in the pooled features.
      spatial_width: numbers in the spatial features; 0 for none.
      num_classes: number of logits.
      cpu_batch_size: images at a time on one core that are fastest.
      warning: what makes its numbers less than they seem, or None.
      params: a tree of arrays.
    """

    name: str
    digest: str
    width: int
    spatial_width: int = 0
    num_classes: int
    cpu_batch_size: int = 64
    warning: str | None = None
    params: Any

    @abc.abstractmethod
    def check_images(self, shape: tuple[int, int, int], name: str) -> None:
        """Raises UsageError, with the name of the images, where it cannot take (H, W, C)."""

    @abc.abstractmethod
    def apply(self, params: Any, images: jax.Array) -> Features:
        """The features of uint8 images (N, H, W, C); to be run under jit."""


FeatureFn = Callable[[np.ndarray], Features]


def make_feature_fn(network: FeatureNetwork, batch_size: int, mesh: Mesh) -> FeatureFn:
    """The function from uint8 images (N, H, W, C), N at most batch_size, to their features.

    Batches are filled up to one size, a multiple of the mesh's, so that there is one compilation,
    and split over the mesh; on CPUs they go through in parts. With several processes every one
    gives the same images and gets all features.
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


class FeatureSummary:
    """What is kept of the features of a set of images, to be added to batch by batch."""

    def __init__(self, network: FeatureNetwork, keep_features: bool):
        """Starts with no images.

        Args:
          network: that the features come from.
          keep_features: keep those of every image, which precision, recall and KID need.
        """
        self.pool = Moments(network.width)
        self.spatial = Moments(network.spatial_width) if network.spatial_width else None
        self.score = InceptionScore(network.num_classes)
        self._kept: list[np.ndarray] | None = [] if keep_features else None

    @property
    def count(self) -> int:
        """Number of images."""
        return self.pool.count

    @property
    def pool_features(self) -> np.ndarray | None:
        """Those of all images, float32 (N, D), or None if they are not kept."""
        if self._kept is None:
            return None
        kept = np.concatenate(self._kept)
        self._kept = [kept]
        return kept

    def add(self, features: Features) -> None:
        """Adds the next images.

        Raises:
          UsageError: a feature is not finite.
        """
        self.pool.update(features.pool)
        if self.spatial is not None:
            self.spatial.update(features.spatial)
        self.score.update(features.logits)
        if self._kept is not None:
            self._kept.append(features.pool)

    def statistics(self, features: str, info: dict[str, Any]) -> Statistics:
        """This summary as a reference."""
        return Statistics(
            features=features,
            mean=self.pool.mean,
            covariance=self.pool.covariance,
            spatial_mean=self.spatial.mean if self.spatial else None,
            spatial_covariance=self.spatial.covariance if self.spatial else None,
            pool_features=self.pool_features,
            count=self.count,
            info=info,
        )

    def save(self, path: pathlib.Path, about: dict[str, Any]) -> None:
        """Writes the summary, to go on later; `about` says what it is of."""
        parts = {"pool": self.pool, "spatial": self.spatial, "score": self.score}
        arrays: Any = {
            f"{name}/{key}": value
            for name, part in parts.items()
            if part is not None
            for key, value in part.to_arrays().items()
        }
        if self._kept is not None:
            arrays["kept"] = self.pool_features if self._kept else np.zeros((0, 0))
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, about=text, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: pathlib.Path, about: dict[str, Any]) -> None:
        """Goes on from what `save` has written.

        Raises:
          UsageError: it is damaged, or of something else than `about`.
        """
        about = json.loads(json.dumps(about))
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = json.loads(arrays["about"].tobytes())
                if found == about:
                    self._take(arrays)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} is damaged: remove it to start again ({error})") from error
        if differing := [key for key in found if found[key] != about.get(key)]:
            raise UsageError(
                f"{path} was left by an evaluation of something else ({', '.join(differing)}): "
                "give another --out, or remove it"
            )

    def _take(self, arrays) -> None:
        def part(name):
            keys = [key for key in arrays.files if key.startswith(f"{name}/")]
            return {key.removeprefix(f"{name}/"): arrays[key] for key in keys}

        self.pool = Moments.from_arrays(part("pool"))
        self.spatial = Moments.from_arrays(part("spatial")) if self.spatial else None
        self.score = InceptionScore.from_arrays(part("score"))
        if self._kept is not None and len(arrays["kept"]):
            self._kept = [arrays["kept"]]
