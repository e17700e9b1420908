"""Sets of images against a reference: which network, which metrics, and the numbers."""

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
from dico_jax.evaluation.classifier import load_classifier
from dico_jax.evaluation.distances import frechet_distance, kernel_distance, rank_warning
from dico_jax.evaluation.features import FeatureFn, FeatureNetwork, FeatureSummary, make_feature_fn
from dico_jax.evaluation.precision_recall import precision_recall
from dico_jax.evaluation.statistics import NpzImages, Statistics, file_digest, open_reference

# For these, every image's features are kept: 8 kB each of Inception's.
_OF_ALL_FEATURES = ("precision_recall", "kid")
_KID_SUBSETS, _KID_SUBSET_SIZE = 100, 1000
_NEIGHBOURS = 3
_SAVE_EVERY = 5000  # images between two notes of what is known so far

Batches = Callable[[int], Iterator[np.ndarray]]


def create_network(features: str, inception: str | None, flag: str = "--") -> FeatureNetwork:
    """The network that makes the features, with its weights.

    Args:
      features: "inception", or the file of a classifier.
      inception: file of Inception's weights; looked for, then downloaded, if None.
      flag: what messages put before the names of these arguments.

    Raises:
      UsageError: its weights cannot be had.
    """
    if features == "inception":
        # A late import: most who name a classifier have no need of it.
        from dico_jax.evaluation.inception_weights import load_inception

        return load_inception(inception, flag=f"{flag}inception")
    if inception is not None:
        fix = f"is for {flag}features=inception, not for {features!r}"
        raise UsageError(f"{flag}inception={inception} {fix}")
    return load_classifier(features)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Compares sets of images with one reference.

    Attributes:
      network: whose features are compared.
      features: of batches of images, see `make_feature_fn`.
      reference: what is compared with.
      metrics: which numbers, of `METRICS`.
      path: where the reference is from.
    """

    network: FeatureNetwork
    features: FeatureFn
    reference: Statistics
    metrics: tuple[str, ...]
    path: str

    @property
    def keeps_features(self) -> bool:
        """Whether the features of every image are kept."""
        return bool(set(self.metrics) & set(_OF_ALL_FEATURES))

    def about(self, samples: dict[str, Any]) -> dict[str, Any]:
        """What a result for these samples says of its origin."""
        reference = self.reference
        return {
            "metric_names": list(self.metrics),
            "samples": samples,
            "reference": {
                "path": self.path,
                "sha256": reference.digest,
                "count": reference.count,
                "info": reference.info,
            },
            "features": {"name": self.network.name, "sha256": self.network.digest},
        }

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
        about = (about or {}) | {"keeps_features": self.keeps_features}
        if partial is not None and partial.exists():
            summary.load(partial, about)
        noted = summary.count
        for images in _shown(batches, noted, count, None, progress):
            summary.add(self.features(images))
            is_first = jax.process_index() == 0
            if partial is not None and is_first and summary.count - noted >= _SAVE_EVERY:
                summary.save(partial, about)
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
    is_file = pathlib.Path(reference).is_file()
    found = open_reference(reference) if is_file else open_images(reference, flag)
    statistics = found if isinstance(found, Statistics) else None
    images = found.images if isinstance(found, Statistics) else found
    if images is not None:
        images.name = name
    if statistics is None:
        assert images is not None
        statistics = measure_images(images, network, features, batch_size)
        digest = file_digest(reference) if is_file else ""
        statistics = dataclasses.replace(statistics, digest=digest)
    _check_network(statistics, network, name)
    chosen = choose_metrics(metrics, statistics, name, images is not None)
    evaluator = Evaluator(network, features, statistics, chosen, reference)
    if evaluator.keeps_features and statistics.pool_features is None:
        assert images is not None
        measured = measure_images(images, network, features, batch_size)
        statistics = dataclasses.replace(statistics, pool_features=measured.pool_features)
        return dataclasses.replace(evaluator, reference=statistics)
    return evaluator


def _check_network(statistics: Statistics, network: FeatureNetwork, name: str) -> None:
    """Raises UsageError, naming the file `name`, for statistics of another network."""
    if statistics.features != network.name:
        raise UsageError(
            f"{name} has statistics of the feature network {statistics.features!r}, and "
            f"{network.name!r} is used: take statistics of the same network"
        )
    if len(statistics.mean) != network.width:
        raise UsageError(
            f"{name} has statistics of {len(statistics.mean)} features, and the feature network "
            f"has {network.width}: take statistics of the same network"
        )
    made_with = statistics.info.get("network_sha256", network.digest)
    if made_with != network.digest:
        raise UsageError(
            f"{name} was measured with other weights of the {network.name} network "
            f"({made_with[:8]}, these are {network.digest[:8]}): measure it again"
        )


def measure_images(
    images: ImageSet, network: FeatureNetwork, features: FeatureFn, batch_size: int
) -> Statistics:
    """The statistics of all pictures of a set, with the features of each."""
    network.check_images(images.shape, images.name)
    summary = FeatureSummary(network, keep_features=True)
    for batch in _shown(lambda start: images.batches(batch_size), 0, len(images), "reference"):
        summary.add(features(batch))
    info = {"images": images.name, "network_sha256": network.digest}
    return summary.statistics(network.name, info)


def _shown(
    batches: Batches, start: int, count: int, name: str | None, progress: bool = True
) -> Iterator[np.ndarray]:
    """The batches from `start` on, with a bar that moves as they are used."""
    with tqdm.tqdm(
        total=count, initial=start, desc=name, unit="image", dynamic_ncols=True,
        disable=not progress,
    ) as bar:  # fmt: skip
        for images in batches(start) if start < count else ():
            yield images
            bar.update(len(images))


def open_images(path: str, flag: str) -> ImageSet:
    """A folder of pictures, or an .npz file with arr_0.

    Raises:
      UsageError: it is something else.
    """
    check_there(path, flag)
    if pathlib.Path(path).is_file():
        return NpzImages(path, f"{flag}={path}")
    return FolderImages(path, flag)


def check_there(path: str, flag: str) -> None:
    """Raises UsageError for a local folder or file that is not there."""
    if "://" not in path and not pathlib.Path(path).exists():
        raise UsageError(f"{flag}={path}: no such folder or file")


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
    lacking = {}
    if reference.spatial_mean is None:
        lacking["sfid"] = "spatial statistics"
    if reference.pool_features is None and not has_images:
        lacking |= dict.fromkeys(_OF_ALL_FEATURES, "images or features of each")
    if wanted is None:
        return tuple(metric for metric in METRICS if metric not in lacking)
    for metric in wanted:
        if metric not in METRICS:
            raise UsageError(f"--metrics: {metric!r} is unknown: use some of {','.join(METRICS)}")
        if metric in lacking:
            raise UsageError(
                f"--metrics: {metric} cannot be had of {name}, which has no {lacking[metric]}"
            )
    return tuple(metric for metric in METRICS if metric in wanted)


# The numbers.


def _fid(ours: FeatureSummary, theirs: Statistics) -> dict[str, float]:
    moments = ours.pool.mean, ours.pool.covariance
    return {"fid": frechet_distance(*moments, theirs.mean, theirs.covariance)}


def _sfid(ours: Any, theirs: Any) -> dict[str, float]:
    moments = ours.spatial.mean, ours.spatial.covariance
    return {"sfid": frechet_distance(*moments, theirs.spatial_mean, theirs.spatial_covariance)}


def _inception_score(ours: FeatureSummary, _: Statistics) -> dict[str, float]:
    return dict(zip(("inception_score", "inception_score_std"), ours.score.result(), strict=True))


def _precision_recall(ours: Any, theirs: Any) -> dict[str, float]:
    """Exact ones, and those of the published evaluator's float16 distances."""
    found: dict[str, float] = {}
    for suffix, distances in (("", "exact"), ("_adm_float16", "adm_float16")):
        names = f"precision{suffix}", f"recall{suffix}"
        values = precision_recall(
            ours.pool_features, theirs.pool_features, k=_NEIGHBOURS, distances=distances
        )
        found |= dict(zip(names, values, strict=True))
    return found


def _kid(ours: Any, theirs: Any) -> dict[str, float]:
    size = min(_KID_SUBSET_SIZE, len(ours.pool_features), len(theirs.pool_features))
    values = kernel_distance(ours.pool_features, theirs.pool_features, _KID_SUBSETS, size)
    return dict(zip(("kid", "kid_std"), values, strict=True))


_COMPUTE: dict[str, Callable[[FeatureSummary, Statistics], dict[str, float]]] = {
    "fid": _fid,
    "sfid": _sfid,
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
    "kid": _kid,
}
METRICS = tuple(_COMPUTE)
