"""Sets of images against a reference: what is opened and checked, and the numbers."""

import dataclasses
import datetime
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from dico_jax.data.image_sets import FolderImages, ImageSet
from dico_jax.errors import UsageError
from dico_jax.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
    rank_warning,
)
from dico_jax.evaluation.networks import (
    FeatureFn,
    FeatureNetwork,
    load_classifier,
    make_feature_fn,
)
from dico_jax.evaluation.statistics import NpzImages, Statistics, file_digest, open_reference
from dico_jax.evaluation.summaries import FeatureSummary
from dico_jax.files import library_versions

_KID_SUBSETS, _KID_SUBSET_SIZE = 100, 1000
_NEIGHBOURS = 3
_SAVE_EVERY = 5000  # images between two notes of what is known so far
METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid")
_OF_ALL_FEATURES = METRICS[3:]  # every image's features are kept for these: 8 kB of Inception's

Batches = Callable[[int], Iterator[np.ndarray]]  # the images from one on, uint8 (N, H, W, C)


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

    def measure(
        self,
        batches: Batches,
        samples: dict[str, Any],
        partial: pathlib.Path | None = None,
        *,
        progress: bool = True,
    ) -> dict[str, Any]:
        """The result for images of which `samples` tells, their "count" above all.

        `partial` is a file for what is known on the way; if it is there, this goes on from it.
        """
        keep = bool(set(self.metrics) & set(_OF_ALL_FEATURES))
        summary, about = FeatureSummary(self.network, keep), self.about(samples)
        noted_about = about | {"keeps_features": keep}
        if partial is not None and partial.exists():
            summary.load(partial, noted_about)
        noted = summary.count
        for images in _shown(batches, noted, samples["count"], None, progress):
            summary.add(self.features(images))
            is_first = jax.process_index() == 0
            if partial is not None and is_first and summary.count - noted >= _SAVE_EVERY:
                summary.save(partial, noted_about)
                noted = summary.count
        ranked = bool({"fid", "sfid"} & set(self.metrics))
        rank = rank_warning(summary.count, self.network.width) if ranked else None
        return {
            "metrics": _numbers(summary, self.reference, self.metrics),
            **about,
            "warnings": [text for text in (self.network.warning, rank) if text],
            "versions": library_versions(),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }


def create_network(features: str, inception: str | None, flag: str = "--") -> FeatureNetwork:
    """The network that makes the features, with its weights.

    Args:
      features: "inception", or the file of a classifier.
      inception: file of Inception's weights; looked for, then downloaded, if None.
      flag: what messages put before the names of these arguments.
    """
    if features == "inception":
        # A late import: most who name a classifier have no need of it.
        from dico_jax.evaluation.inception_weights import load_inception

        return load_inception(inception, flag=f"{flag}inception")
    if inception is not None:
        fix = f"is for {flag}features=inception, not for {features!r}"
        raise UsageError(f"{flag}inception={inception} {fix}")
    return load_classifier(features)


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
    images = found.images if isinstance(found, Statistics) else found
    if images is not None:
        images.name = name
    if not isinstance(found, Statistics):
        found = measure_images(found, network, features, batch_size)
        found = dataclasses.replace(found, digest=file_digest(reference) if is_file else "")
    _check_network(found, network, name)
    chosen = choose_metrics(metrics, found, name, images is not None)
    if images is not None and found.pool_features is None and set(chosen) & set(_OF_ALL_FEATURES):
        measured = measure_images(images, network, features, batch_size)
        found = dataclasses.replace(found, pool_features=measured.pool_features)
    return Evaluator(network, features, found, chosen, reference)


def _check_network(statistics: Statistics, network: FeatureNetwork, name: str) -> None:
    """Raises UsageError, naming the file `name`, for statistics of another network."""
    digest = statistics.info.get("network_sha256", network.digest)
    for what, theirs, ours in (
        ("another feature network", statistics.features, network.name),
        ("another number of features", len(statistics.mean), network.width),
        (f"other weights of the {network.name} network", digest, network.digest),
    ):
        if theirs != ours:
            raise UsageError(f"{name} was measured with {what}: {theirs}, and {ours} is used")


def open_images(path: str, flag: str) -> ImageSet:
    """A folder of pictures, or an .npz file with arr_0."""
    check_there(path, flag)
    is_file = pathlib.Path(path).is_file()
    return NpzImages(path, f"{flag}={path}") if is_file else FolderImages(path, flag)


def check_there(path: str, flag: str) -> None:
    if "://" not in path and not pathlib.Path(path).exists():
        raise UsageError(f"{flag}={path}: no such folder or file")


def check_metrics(names: Sequence[str], flag: str) -> None:
    if unknown := set(names) - set(METRICS):
        fix = f"is unknown: use some of {', '.join(METRICS)}"
        raise UsageError(f"{flag}metrics: {min(unknown)!r} {fix}")


def choose_metrics(
    wanted: Sequence[str] | None, reference: Statistics, name: str, has_images: bool
) -> tuple[str, ...]:
    """The metrics to compute: those wanted, or all that the reference called `name` allows."""
    lacking = {}
    if reference.spatial_mean is None:
        lacking["sfid"] = "spatial statistics"
    if reference.pool_features is None and not has_images:
        lacking |= dict.fromkeys(_OF_ALL_FEATURES, "images or features of each")
    if wanted is None:
        return tuple(metric for metric in METRICS if metric not in lacking)
    check_metrics(wanted, "--")
    for metric in wanted:
        if metric in lacking:
            fix = f"cannot be had of {name}, which has no {lacking[metric]}"
            raise UsageError(f"--metrics: {metric} {fix}")
    return tuple(metric for metric in METRICS if metric in wanted)


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


def _numbers(ours: Any, theirs: Any, metrics: Collection[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    if "fid" in metrics:
        moments = ours.pool.mean, ours.pool.covariance
        found["fid"] = frechet_distance(*moments, theirs.mean, theirs.covariance)
    if "sfid" in metrics:
        moments = ours.spatial.mean, ours.spatial.covariance
        others = theirs.spatial_mean, theirs.spatial_covariance
        found["sfid"] = frechet_distance(*moments, *others)
    if "inception_score" in metrics:
        found["inception_score"], found["inception_score_std"] = ours.score.result()
    features = ours.pool_features, theirs.pool_features
    if "precision_recall" in metrics:
        for suffix, kind in (("", "exact"), ("_adm_float16", "adm_float16")):
            values = precision_recall(*features, _NEIGHBOURS, kind)
            found[f"precision{suffix}"], found[f"recall{suffix}"] = values
    if "kid" in metrics:
        size = min(_KID_SUBSET_SIZE, *map(len, features))
        found["kid"], found["kid_std"] = kernel_distance(*features, _KID_SUBSETS, size)
    return found
