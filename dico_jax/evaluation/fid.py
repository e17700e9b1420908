"""The distance between two sets of images, in a line of Python."""

import os
from typing import Any

import numpy as np

from dico_jax.data.image_sets import ImageSet
from dico_jax.errors import UsageError
from dico_jax.evaluation import distances, evaluator, networks, statistics
from dico_jax.files import as_path
from dico_jax.parallel.mesh import create_mesh


def fid(
    images: Any,
    reference: Any,
    *,
    features: str = "inception",
    inception: str | os.PathLike | None = None,
    batch_size: int = 64,
) -> float:
    """The Frechet distance between the features of two sets of images; it is symmetric.

    Args:
      images: an array, uint8 (N, H, W, 1 or 3), a folder of pictures, an .npz file with arr_0, or
        one of statistics as `evaluate` takes them.
      reference: another.
      features: "inception", or the file of a classifier (`prepare classifier`).
      inception: weights of the Inception network [the cache, then the public release].
      batch_size: images at a time.

    Raises:
      UsageError: something cannot be read or compared; it starts with the argument's name.
    """
    given = {"images": images, "reference": reference}
    sets = {name: _opened(of, name) for name, of in given.items()}  # before weights are loaded
    network = evaluator.create_network(
        features, None if inception is None else os.fspath(inception), flag=""
    )
    features_of = networks.make_feature_fn(network, batch_size, create_mesh())
    moments: list[np.ndarray] = []
    for name, found in sets.items():
        if isinstance(found, ImageSet):
            found = evaluator.measure_images(found, network, features_of, batch_size)
        evaluator.check_made_by(network, found, name)
        moments += [found.mean, found.covariance]
    return float(distances.frechet_distance(*moments))


def _opened(given: Any, name: str) -> Any:
    """The `ImageSet` or `Statistics` of an argument."""
    if not isinstance(given, str | os.PathLike):
        return _ArrayImages(given, name)
    path = os.fspath(given)
    is_file = as_path(path).is_file()
    return statistics.open_reference(path) if is_file else evaluator.open_images(path, name)


class _ArrayImages(ImageSet):
    def __init__(self, array: Any, name: str):
        self._images = images = np.asarray(array)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            found = f"{name} is {images.dtype}{list(images.shape)}"
            raise UsageError(f"{found}: uint8 images from 0 to 255 (N, H, W, 1 or 3) are expected")
        if len(images) < 2:
            raise UsageError(f"{name} has {len(images)} images: at least 2 have a covariance")
        self.name, self.bad, self.shape = name, {}, images.shape[1:]
        self._indices = np.arange(len(images))

    def batches(self, size, start=0, stop=None):
        indices = self._indices[start:stop]
        for first in range(0, len(indices), size):
            yield self._images[indices[first : first + size]]
