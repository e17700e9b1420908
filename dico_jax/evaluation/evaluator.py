"""Sets of images against a reference: summaries of their features, and the numbers between them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from dico_jax.data.image_sets import FolderImages, ImageSet
from dico_jax.errors import UsageError
from dico_jax.evaluation.feature_networks import FeatureFn, FeatureNetwork, make_feature_fn
from dico_jax.evaluation.feature_summary import FeatureSummary
from dico_jax.evaluation.frechet import frechet_distance, rank_warning
from dico_jax.evaluation.kid import kernel_distance
from dico_jax.evaluation.precision_recall import precision_recall
from dico_jax.evaluation.statistics import (
    NpzImages,
    Statistics,
    check_features,
    check_width,
    open_reference,
)

METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid")
# Of these, every image's features are kept: 8 kB each of Inception's.
_OF_ALL_FEATURES = ("precision_recall", "kid")
_KID_SUBSETS, _KID_SUBSET_SIZE = 100, 1000
_NEIGHBOURS = 3
_SAVE_EVERY = 5000  # images between two notes of what is known so far

Batches = Callable[[int], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Compares sets of images with one reference.

    Attributes:
      network: whose features are compared.
      features: of batches of images, see `make_feature_fn`.
      reference: what is compared with.
      metrics: which numbers, of `METRICS`.
    """

    network: FeatureNetwork
    features: FeatureFn
    reference: Statistics
    metrics: tuple[str, ...]

    @property
    def keeps_features(self) -> bool:
        """Whether the features of every image are kept."""
        return needs_all_features(self.metrics)

    def summary(
        self,
        batches: Batches,
        count: int,
        partial: pathlib.Path | None = None,
        about: dict[str, Any] | None = None,
        *,
        progress: bool = True,
    ) -> FeatureSummary:
        """Of `count` images.

        Args:
          batches: the images from one on, uint8 (N, H, W, C).
          count: how many there are.
          partial: a file for what is known on the way; if it is there, this goes on from it.
          about: what the file is of.
          progress: show a bar.
        """
        summary = FeatureSummary(self.network, self.keeps_features)
        if partial is not None and partial.exists():
            summary.load(partial, about or {})
        noted = summary.count
        with tqdm.tqdm(
            total=count, initial=noted, unit="image", dynamic_ncols=True, disable=not progress
        ) as bar:
            for images in batches(noted) if noted < count else ():
                summary.add(self.features(images))
                bar.update(len(images))
                is_first = jax.process_index() == 0
                if partial is not None and is_first and summary.count - noted >= _SAVE_EVERY:
                    summary.save(partial, about or {})
                    noted = summary.count
        return summary

    def numbers(self, summary: FeatureSummary) -> dict[str, float]:
        """The metrics of a set of images."""
        found: dict[str, float] = {}
        for name in self.metrics:
            found |= _COMPUTE[name](summary, self.reference)
        return found

    def warnings(self, summary: FeatureSummary) -> list[str]:
        """What makes the numbers less than they seem."""
        found = [self.network.warning]
        if {"fid", "sfid"} & set(self.metrics):
            found.append(rank_warning(summary.count, self.network.width))
        return [text for text in found if text]


def create_evaluator(
    network: FeatureNetwork,
    reference: str,
    metrics: Sequence[str] | None,
    *,
    batch_size: int,
    mesh: Mesh,
    flag: str = "--reference",
) -> Evaluator:
    """Opens a reference; of one that has only images, measures them.

    Args:
      network: makes the features.
      reference: an .npz file or a folder of pictures, see docs/evaluation.md.
      metrics: names of `METRICS`; all that the reference allows if None.
      batch_size: images at a time.
      mesh: the devices.
      flag: what messages call the reference.

    Raises:
      UsageError: something cannot be read or does not fit.
    """
    features, name = make_feature_fn(network, batch_size, mesh), f"{flag}={reference}"
    statistics, images, digest = _open_reference(reference, flag)
    if statistics is None:
        assert images is not None
        statistics = measure_images(images, network, features, batch_size)
        statistics = dataclasses.replace(statistics, digest=digest)
    check_features(statistics, network.name, name)
    check_width(statistics, network.width, name)
    check_weights(statistics, network, name)
    chosen = choose_metrics(metrics, statistics, name, images is not None)
    if needs_all_features(chosen) and statistics.pool_features is None:
        assert images is not None
        measured = measure_images(images, network, features, batch_size)
        statistics = dataclasses.replace(statistics, pool_features=measured.pool_features)
    return Evaluator(network, features, statistics, chosen)


def check_weights(statistics: Statistics, network: FeatureNetwork, name: str) -> None:
    """Raises UsageError where statistics are known to be of other weights than a network has."""
    made_with = statistics.info.get("network_sha256", network.digest)
    if made_with != network.digest:
        raise UsageError(
            f"{name} was measured with other weights of the {network.name} network "
            f"({made_with[:8]}, these are {network.digest[:8]}): measure it again"
        )


def _open_reference(path: str, flag: str) -> tuple[Statistics | None, ImageSet | None, str]:
    """What a reference has, statistics or images or both, and the SHA-256 of its file."""
    if not pathlib.Path(path).is_file():
        return None, open_images(path, flag), ""
    found = open_reference(path)
    images = None if found.images is None else NpzImageSet(found.images, f"{flag}={path}")
    return (found if isinstance(found, Statistics) else None), images, found.digest


def describe_reference(path: str | None, reference: Statistics) -> dict[str, Any]:
    """What a result says of its reference."""
    about = {name: getattr(reference, name) for name in ("digest", "count", "info")}
    return {"path": path, "sha256": about.pop("digest"), **about}


def measure_images(
    images: ImageSet, network: FeatureNetwork, features: FeatureFn, batch_size: int
) -> Statistics:
    """The statistics of all pictures of a set, with the features of each."""
    network.check_images(images.shape, images.name)
    summary = FeatureSummary(network, keep_features=True)
    with tqdm.tqdm(total=len(images), desc="reference", unit="image", dynamic_ncols=True) as bar:
        for batch in images.batches(batch_size):
            summary.add(features(batch))
            bar.update(len(batch))
    info = {"images": images.name, "network_sha256": network.digest}
    return summary.statistics(network.name, info)


class NpzImageSet(ImageSet):
    """The pictures in an .npz file."""

    def __init__(self, images: NpzImages, name: str):
        """Takes pictures that are known to be readable."""
        self.name, self.shape, self._images = name, images.shape[1:], images

    def __len__(self):
        return len(self._images)

    def batches(self, size, start=0, stop=None):
        """See `ImageSet`."""
        return self._images.batches(size, start, stop)


def open_images(path: str, flag: str) -> ImageSet:
    """A folder of pictures, or an .npz file with arr_0.

    Raises:
      UsageError: it is something else.
    """
    check_there(path, flag)
    if pathlib.Path(path).is_file():
        return NpzImageSet(NpzImages(path), f"{flag}={path}")
    return FolderImages(path, flag)


def check_there(path: str, flag: str) -> None:
    """Raises UsageError for a local folder or file that is not there."""
    if "://" not in path and not pathlib.Path(path).exists():
        raise UsageError(f"{flag}={path}: no such folder or file")


def needs_all_features(metrics: Sequence[str]) -> bool:
    """Whether features of every image are needed, of the reference too."""
    return bool(set(metrics) & set(_OF_ALL_FEATURES))


def choose_metrics(
    wanted: Sequence[str] | None, reference: Statistics, name: str, has_images: bool = False
) -> tuple[str, ...]:
    """The metrics to compute: those wanted, or all that a reference allows.

    Args:
      wanted: names of `METRICS`; None for all.
      reference: what is known of it.
      name: of the reference, for messages.
      has_images: whether features of all its images can still be had.

    Raises:
      UsageError: an unknown name, or one that the reference does not allow.
    """
    allowed = ["fid", "inception_score"]
    if reference.spatial_mean is not None:
        allowed.append("sfid")
    if reference.pool_features is not None or has_images:
        allowed += _OF_ALL_FEATURES
    if wanted is None:
        return tuple(metric for metric in METRICS if metric in allowed)
    for metric in wanted:
        if metric not in METRICS:
            raise UsageError(f"--metrics: {metric!r} is unknown: use some of {','.join(METRICS)}")
        if metric not in allowed:
            lacks = "spatial statistics" if metric == "sfid" else "images or features of each"
            raise UsageError(f"--metrics: {metric} cannot be had of {name}, which has no {lacks}")
    return tuple(metric for metric in METRICS if metric in wanted)


def _fid(summary: FeatureSummary, reference: Statistics) -> dict[str, float]:
    pool = summary.pool
    return {
        "fid": frechet_distance(pool.mean, pool.covariance, reference.mean, reference.covariance)
    }


def _sfid(summary: FeatureSummary, reference: Statistics) -> dict[str, float]:
    spatial = summary.spatial
    assert spatial is not None
    mean, covariance = reference.spatial_mean, reference.spatial_covariance
    assert mean is not None
    assert covariance is not None
    return {"sfid": frechet_distance(spatial.mean, spatial.covariance, mean, covariance)}


def _inception_score(summary: FeatureSummary, reference: Statistics) -> dict[str, float]:
    mean, deviation = summary.score.result()
    return {"inception_score": mean, "inception_score_std": deviation}


def _precision_recall(summary: FeatureSummary, reference: Statistics) -> dict[str, float]:
    """Exact ones, and those of the published evaluator's float16 distances."""
    ours, theirs = _all_features(summary, reference)
    found: dict[str, float] = {}
    for suffix, distances in (("", "exact"), ("_adm_float16", "adm_float16")):
        precision, recall = precision_recall(theirs, ours, k=_NEIGHBOURS, distances=distances)
        found |= {f"precision{suffix}": precision, f"recall{suffix}": recall}
    return found


def _kid(summary: FeatureSummary, reference: Statistics) -> dict[str, float]:
    ours, theirs = _all_features(summary, reference)
    size = min(_KID_SUBSET_SIZE, len(ours), len(theirs))
    mean, deviation = kernel_distance(ours, theirs, _KID_SUBSETS, size)
    return {"kid": mean, "kid_std": deviation}


def _all_features(summary: FeatureSummary, reference: Statistics) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = summary.pool_features, reference.pool_features
    assert ours is not None
    assert theirs is not None
    return ours, theirs


_COMPUTE: dict[str, Callable[[FeatureSummary, Statistics], dict[str, float]]] = {
    "fid": _fid,
    "sfid": _sfid,
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
    "kid": _kid,
}
