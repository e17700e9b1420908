"""Sets of images against a reference: what is opened and checked, what is kept, the numbers."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dico_jax.data.image_sets import FolderImages, ImageSet
from dico_jax.errors import UsageError
from dico_jax.evaluation import distances, networks, statistics
from dico_jax.evaluation.clip_score import CLIP_SCORE, ClipScorer, clip_numbers
from dico_jax.evaluation.networks import FeatureFn, FeatureNetwork, Features
from dico_jax.evaluation.statistics import SPLIT_SIZE, InceptionScore, Moments, Statistics
from dico_jax.files import as_path, file_digest, library_versions
from dico_jax.sampling.generate import NotFiniteError
from dico_jax.sampling.image_folder import differences
from dico_jax.terminal import Bar

_KID_SUBSETS, _KID_SUBSET_SIZE = 100, 1000
_NEIGHBOURS = 3
_NO_DEVIATION = f"inception_score_std is null: it needs more than {SPLIT_SIZE:,} samples"
_SAVE_EVERY = 5000  # images between two notes of what is known so far
METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid")
_OF_ALL_FEATURES = {"precision_recall", "kid"}  # for which features are kept: 8 kB an image

_VERSION = 2  # of these notes
Batches = Callable[..., Iterator[np.ndarray]]  # images from one on (to one), uint8 (N, H, W, C)


class FeatureSummary:
    """What is kept of the features of `total` images, batch by batch: sums, and perhaps all."""

    def __init__(
        self, network: FeatureNetwork, keep_features: bool, total: int, with_scores: bool = False
    ):
        self.pool = Moments(network.width)
        self.score = InceptionScore(network.num_classes, total=total)
        self.spatial = Moments(network.spatial_width) if network.spatial_width else None
        parts = {"pool": self.pool, "spatial": self.spatial, "logits": self.score}
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._kept = [np.empty((0, network.width), np.float32)] if keep_features else None
        self.scores = np.empty(0) if with_scores else None  # of each image, of `ClipScorer`
        self.pictures = b""  # the digest of all images so far

    @property
    def pool_features(self) -> np.ndarray | None:
        """Those of all images, float32 (N, D), or None if they are not kept."""
        self._kept = self._kept and [np.concatenate(self._kept)]
        return self._kept[0] if self._kept else None

    def add(self, images: np.ndarray, features: Features) -> None:
        """Adds the next images; UsageError where a feature is not finite."""
        self.pictures = pictures_digest(images, self.pictures)
        for name, part in self._parts.items():
            part.update(getattr(features, name))
        if self._kept is not None:
            self._kept.append(features.pool)

    def save(self, path: Any, about: dict[str, Any]) -> None:
        """Writes the summary, to go on later; `about` says what it is of."""
        arrays: dict[str, Any] = {"pictures": np.frombuffer(self.pictures, np.uint8)}
        if self._kept is not None:
            arrays["kept"] = self.pool_features
        if self.scores is not None:
            arrays["scores"] = self.scores
        for name, part in self._parts.items():
            arrays |= {f"{name}/{key}": value for key, value in part.to_arrays().items()}
        statistics.save_arrays(path, about, arrays)

    def load(self, path: Any, about: dict[str, Any]) -> None:
        """Goes on from what `save` has written; UsageError where that is of something else."""
        found, arrays = statistics.load_arrays(path, "is damaged: remove it to start again")
        if differing := differences(found, json.loads(json.dumps(about))):
            what = f"was left by an evaluation of something else ({differing})"
            raise UsageError(f"{path} {what}: give another --out, or remove it")
        self.pictures = arrays["pictures"].tobytes()
        for name, part in self._parts.items():
            part.restore({key: arrays[f"{name}/{key}"] for key in part.to_arrays()})
        self._kept = self._kept and [arrays["kept"]]
        self.scores = None if self.scores is None else arrays["scores"]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Compares sets of images with one reference, and perhaps with their texts."""

    network: FeatureNetwork
    features: FeatureFn  # of batches of images, see `make_feature_fn`
    reference: Statistics | None
    metrics: tuple[str, ...]  # which numbers, of `METRICS`
    path: str  # where the reference is from
    scorer: ClipScorer | None = None

    def about(self, samples: dict[str, Any]) -> dict[str, Any]:
        """What a result for these samples says of its origin."""
        of, scorer = self.reference, self.scorer
        kept = of and {"sha256": of.digest, "count": of.count, "info": of.info}
        return {
            "metric_names": [*self.metrics, *([CLIP_SCORE] if scorer else [])],
            "samples": samples,
            "reference": kept and {"path": self.path, **kept},
            "features": {"name": self.network.name, "sha256": self.network.digest},
            **({"clip": scorer.about} if scorer else {}),
        }

    def _scores(self, images: np.ndarray, features: Features, start: int) -> Any:
        scorer: Any = self.scorer
        found = features if self.network is scorer.network else scorer.features(images)
        return scorer.scores(found.pool, start)

    def measure(
        self, batches: Batches, samples: Any, partial: Any = None, progress: bool = True, bad=None
    ) -> dict[str, Any]:
        """The result for images of which `samples` tells, their "count" above all.

        `partial` is a file for what is known on the way; if it is there, this goes on from it.
        `bad` is given for files, which are read again up to there, to be found the same; it gets
        those that could not be read.
        """
        keep, count = bool(set(self.metrics) & _OF_ALL_FEATURES), samples["count"]
        about = self.about(samples)
        noted_as = about | {"keeps_features": keep, "version": _VERSION}
        summary = FeatureSummary(self.network, keep, count, self.scorer is not None)
        if partial is not None and partial.exists():
            summary.load(partial, noted_as)
        noted, digest = summary.pool.count, b""
        known = noted if bad is not None else 0  # images that are still to be read again
        other = f"{partial} was left by an evaluation of other pictures: remove it"
        for images in _shown(batches, noted - known, count, None, progress):
            again, images = images[:known], images[known:]
            digest, known = pictures_digest(again, digest), known - len(again)
            if len(again) and not known and digest != summary.pictures:
                raise UsageError(other)
            if bad and self.scorer:
                fix = (
                    "cannot be read, so the texts belong to other pictures: remove it and its line"
                )
                raise UsageError(f"--prompts: {min(bad)} {fix}")
            if len(images):
                found, start = self.features(images), summary.pool.count
                summary.add(images, found)
                if summary.scores is not None:
                    scores = self._scores(images, found, start)
                    summary.scores = np.append(summary.scores, scores)
            is_due = summary.pool.count - noted >= _SAVE_EVERY and jax.process_index() == 0
            if partial is not None and is_due:
                summary.save(partial, noted_as)
                noted = summary.pool.count
        if known:
            raise UsageError(other)
        ranked = bool({"fid", "sfid"} & set(self.metrics))
        rank = distances.rank_warning(summary.pool.count, self.network.width) if ranked else None
        metrics = _numbers(summary, self.reference, self.metrics) if self.metrics else {}
        metrics |= {} if summary.scores is None else clip_numbers(summary.scores)
        for name, value in metrics.items():
            if value is not None and not np.isfinite(value):
                raise NotFiniteError(f"{name} is {value}: features or statistics are too large")
        if bad:
            about["samples"] = samples | {"count": summary.pool.count, "bad_pictures": dict(bad)}
        left_out = bad and f"{len(bad)} pictures cannot be read, and are left out: {min(bad)} ..."
        no_std = metrics.get("inception_score_std", 0) is None and _NO_DEVIATION
        return {
            "metrics": metrics,
            **about,
            "pictures_digest": summary.pictures.hex(),
            "warnings": [text for text in (self.network.warning, rank, no_std, left_out) if text],
            "versions": library_versions(),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }


def pictures_digest(images: np.ndarray, before: bytes = b"") -> bytes:
    """sha256 of images (N, H, W, C) after others, whatever the batches."""
    for image in images:
        before = hashlib.sha256(before + repr(image.shape).encode() + image.tobytes()).digest()
    return before


def create_network(features: str, inception: str | None, flag: str = "--") -> FeatureNetwork:
    """The network of "inception" (with a file of weights, or None) or of a classifier's file."""
    if features == "inception":
        # A late import: most who name a classifier have no need of it.
        from dico_jax.evaluation.inception_weights import load_inception

        return load_inception(inception, flag=f"{flag}inception")
    if inception is not None:
        fix = f"is for {flag}features=inception, not for {features!r}"
        raise UsageError(f"{flag}inception={inception} {fix}")
    return networks.load_classifier(features)


def create_evaluator(
    network: FeatureNetwork, reference: str, metrics: Any, flag="--reference", fraction=0.0, **how
) -> Evaluator:
    """Opens a reference, an .npz file or a folder of pictures; of images alone, measures them.

    Messages call the reference `flag`. `metrics` are names of `METRICS`, or None for all it allows;
    `fraction` of a folder's may be bad; `how` are batch_size and mesh, see `make_feature_fn`.
    """
    features, name = networks.make_feature_fn(network, **how), f"{flag}={reference}"
    is_file = as_path(reference).is_file()
    found: Any = is_file and statistics.open_reference(reference)
    found = found or open_images(reference, flag, fraction)
    images = found.images if isinstance(found, Statistics) else found
    if images is not None:
        images.name = name
    if not isinstance(found, Statistics):
        found = measure_images(found, network, features, how["batch_size"])
        if is_file:
            found = dataclasses.replace(found, digest=file_digest(reference))
    check_made_by(network, found, name)
    chosen = choose_metrics(metrics, found, name, images is not None)
    if images is not None and found.pool_features is None and set(chosen) & _OF_ALL_FEATURES:
        measured = measure_images(images, network, features, how["batch_size"])
        found = dataclasses.replace(found, pool_features=measured.pool_features)
    return Evaluator(network, features, found, chosen, reference)


def check_made_by(network: FeatureNetwork, found: Statistics, name: str) -> None:
    """Raises UsageError where the statistics called `name` are not of features of `network`."""
    weights = found.info.get("network_sha256", network.digest)
    for what, theirs, ours in (
        ("another feature network", found.features, network.name),
        ("another number of features", len(found.mean), network.width),
        (f"other weights of the {network.name} network", weights, network.digest),
    ):
        if theirs != ours:
            raise UsageError(f"{name} was measured with {what}: {theirs}, and {ours} is used")


def open_images(path: str, flag: str, max_bad_fraction: float = 0.0) -> ImageSet:
    """A folder of pictures, of which some may be bad, or an .npz file with arr_0."""
    check_there(path, flag)
    if as_path(path).is_file():
        return statistics.NpzImages(path, f"{flag}={path}")
    return FolderImages(path, flag, max_bad_fraction)


def check_there(path: str, flag: str) -> None:
    """Raises UsageError for a folder or file that is not there."""
    if not as_path(path).exists():
        raise UsageError(f"{flag}={path}: no such folder or file")


def check_metrics(names: Iterable[str], flag: str) -> None:
    """Raises UsageError for a name that is none of `METRICS`, or, of a flag, `CLIP_SCORE`."""
    known = (*METRICS, CLIP_SCORE) if flag == "--" else METRICS
    if unknown := set(names) - set(known):
        fix = f"is unknown: use some of {', '.join(known)}"
        raise UsageError(f"{flag}metrics: {min(unknown)!r} {fix}")


def choose_metrics(
    wanted: Sequence[str] | None, reference: Statistics, name: str, has_images: bool = False
) -> tuple[str, ...]:
    """The metrics to compute: those wanted, or all that the reference called `name` allows."""
    lacking = {} if reference.spatial_mean is not None else {"sfid": "spatial statistics"}
    if reference.pool_features is None and not has_images:
        lacking |= dict.fromkeys(_OF_ALL_FEATURES, "images or features of each")
    check_metrics(wanted or (), "--")
    for metric in set(wanted or ()) & lacking.keys():
        fix = f"cannot be had of {name}, which has no {lacking[metric]}"
        raise UsageError(f"--metrics: {metric} {fix}")
    chosen = set(METRICS) - lacking.keys() if wanted is None else set(wanted)
    return tuple(metric for metric in METRICS if metric in chosen)


def measure_images(
    images: ImageSet, network: FeatureNetwork, features: FeatureFn, batch_size: int
) -> Statistics:
    """The statistics of all pictures of a set, with the features of each."""
    network.check_images(images.shape, images.name)
    summary = FeatureSummary(network, keep_features=True, total=len(images))
    for batch in _shown(lambda start: images.batches(batch_size), 0, len(images), "reference"):
        summary.add(batch, features(batch))
    pool, spatial = summary.pool, summary.spatial
    more = (spatial.mean, spatial.covariance) if spatial else (None, None)
    info = {"images": images.name, "network_sha256": network.digest, "bad": dict(images.bad)}
    kept: Any = summary.pool_features, pool.count, summary.pictures.hex(), info
    return Statistics(network.name, pool.mean, pool.covariance, *more, *kept)


def _shown(
    batches: Batches, start: int, count: int, name: str | None, progress: bool = True
) -> Iterator[np.ndarray]:
    shown: Any = {"unit": "image", "disable": not progress, "compiles": True}
    with Bar(total=count, initial=start, desc=name, **shown) as bar:
        for images in batches(start) if start < count else ():
            yield images
            bar.update(len(images))


def _numbers(ours: Any, theirs: Any, metrics: Collection[str]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    if "fid" in metrics:
        moments = ours.pool.mean, ours.pool.covariance
        found["fid"] = distances.frechet_distance(*moments, theirs.mean, theirs.covariance)
    if "sfid" in metrics:
        moments = ours.spatial.mean, ours.spatial.covariance
        others = theirs.spatial_mean, theirs.spatial_covariance
        found["sfid"] = distances.frechet_distance(*moments, *others)
    if "inception_score" in metrics:
        found["inception_score"], found["inception_score_std"] = ours.score.result()
    features = ours.pool_features, theirs.pool_features
    if "precision_recall" in metrics:
        for suffix, kind in (("", "exact"), ("_adm_float16", "adm_float16")):
            values = distances.precision_recall(*features, _NEIGHBOURS, kind)
            found[f"precision{suffix}"], found[f"recall{suffix}"] = values
    if "kid" in metrics:
        size = min(_KID_SUBSET_SIZE, *map(len, features))
        found["kid"], found["kid_std"] = distances.kernel_distance(*features, _KID_SUBSETS, size)
    return found
