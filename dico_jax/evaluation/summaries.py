"""What is kept of the features of images: sums in float64, and perhaps all features.

Rows are summed in blocks of one size, so that the batches in which they come change nothing, not
even the rounding.
"""

import copy
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scipy.linalg import blas

from dico_jax.errors import UsageError
from dico_jax.evaluation.networks import FeatureNetwork, Features
from dico_jax.evaluation.statistics import Statistics, check_rows
from dico_jax.files import new_file

# Fastest of 256 to 4096 at a width of 2048 on two cores; a block is 17 MB there.
_BLOCK_ROWS = 1024
SPLIT_SIZE = 5000  # samples in a chunk of the published Inception Score


def _full_blocks(waiting: list[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Takes blocks of `size` rows out of those that wait."""
    if sum(map(len, waiting)) >= size:
        rows = np.concatenate(waiting)
        whole = len(rows) // size * size
        waiting[:] = [rows[whole:]]
        yield from np.split(rows[:whole], whole // size)


class Moments:
    """Streaming mean and covariance of rows.

    Every block is centred at its own mean before it is added, so that a large common offset costs
    no digits.
    """

    def __init__(self, width: int):
        self._count, self._mean = 0, np.zeros(width)
        # Sum of the outer products of centred rows; only the upper triangle is kept up to date.
        self._scatter = np.zeros((width, width), order="F")
        self._waiting = [np.empty((0, width))]

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._count + sum(map(len, self._waiting))

    def update(self, rows: Any) -> None:
        """Adds rows (N, width) of any floating dtype.

        Raises:
          UsageError: rows of another width, NaN or infinite ones. No row has been added then.
        """
        rows = check_rows(rows, "features", self.count, len(self._mean))
        self._waiting.append(rows.astype(np.float64))
        for block in _full_blocks(self._waiting, _BLOCK_ROWS):
            self._add(block)

    def merge(self, other: "Moments") -> None:
        """Adds all rows of `other`, which stays as it is; UsageError for another width."""
        check_rows(other._mean[None], "features", width=len(self._mean))
        self.__dict__.update(self._complete().__dict__)
        other = other._complete()
        if other._count:
            shift = self._move(other._count, other._mean)
            self._scatter += other._scatter + np.outer(shift, shift)

    @property
    def mean(self) -> np.ndarray:
        """The mean of the rows, float64 (D,); UsageError where there is none."""
        if not self.count:
            raise UsageError("no rows of features: there is no mean")
        return self._complete()._mean

    @property
    def covariance(self) -> np.ndarray:
        """Of the rows (divided by count - 1), float64 (D, D); UsageError for fewer than two."""
        if self.count < 2:
            raise UsageError(f"{self.count} rows of features are too few for a covariance: give 2")
        return self._complete().to_arrays()["scatter"] / (self.count - 1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays, to be saved; what goes on from them goes on exactly."""
        upper = np.triu(self._scatter)
        return {
            "count": np.array(self._count),
            "mean": self._mean,
            "scatter": upper + np.triu(upper, 1).T,
            "pending": np.concatenate(self._waiting),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """The moments that `to_arrays` was called on."""
        moments = cls(len(arrays["mean"]))
        moments._count, moments._mean = int(arrays["count"]), arrays["mean"]
        moments._scatter = np.asfortranarray(arrays["scatter"])
        moments._waiting = [arrays["pending"]]
        return moments

    def _complete(self) -> "Moments":
        """A copy in which no rows wait."""
        done = copy.deepcopy(self)
        if self.count > self._count:
            done._add(np.concatenate(self._waiting))
        done._waiting = [np.empty((0, len(self._mean)))]
        return done

    def _add(self, block: np.ndarray) -> None:
        """One symmetric product, with the shift of the mean as a row."""
        mean = block.mean(axis=0)
        centred = np.concatenate([block - mean, self._move(len(block), mean)[None]])
        self._scatter = blas.dsyrk(1.0, centred.T, beta=1.0, c=self._scatter, overwrite_c=True)

    def _move(self, count: int, mean: np.ndarray) -> np.ndarray:
        """Takes up `count` rows of this mean; what their shift adds is the result's square."""
        delta, total = mean - self._mean, self._count + count
        shift = delta * np.sqrt(self._count * count / total)
        self._count, self._mean = total, self._mean + delta * (count / total)
        return shift


class InceptionScore:
    """exp(mean KL(p(class | image) || p(class))), taken over chunks of samples and averaged.

    Salimans et al., arXiv 1606.03498. Chunks are `split_size` consecutive samples, the last one may
    be shorter; so samples have to come in their order (several processes: gather them first). A
    class probability of exactly 0 contributes 0, its limit; the published evaluator gives NaN.
    """

    def __init__(self, num_classes: int, split_size: int = SPLIT_SIZE):
        if split_size < 1:
            raise UsageError("split_size", split_size, "must be at least 1")
        self._width, self._split_size = num_classes, split_size
        self._scores: list[float] = []
        self._waiting = [np.empty((0, num_classes))]  # probabilities

    @property
    def count(self) -> int:
        """How many samples there were."""
        return len(self._scores) * self._split_size + sum(map(len, self._waiting))

    def update(self, logits: Any) -> None:
        """Adds samples by their logits (N, classes), of any floating dtype.

        The published score leaves out the bias of the last layer. Raises UsageError for another
        number of classes, NaN or infinite values; none has been added then.
        """
        logits = check_rows(logits, "logits", self.count, self._width).astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        self.update_probabilities(exponentials / exponentials.sum(axis=1, keepdims=True))

    def update_probabilities(self, probabilities: Any) -> None:
        """Adds samples by their class probabilities (N, classes), as they are."""
        self._waiting.append(np.asarray(probabilities, np.float64))
        self._scores += map(_score, _full_blocks(self._waiting, self._split_size))

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation (divided by their number) over the chunks."""
        if not self.count:
            raise UsageError("no samples: there is no Inception Score")
        rest = np.concatenate(self._waiting)
        scores = self._scores + ([_score(rest)] if len(rest) else [])
        return float(np.mean(scores)), float(np.std(scores))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """See `Moments.to_arrays`."""
        return {
            "split_size": np.array(self._split_size),
            "scores": np.array(self._scores, np.float64),
            "pending": np.concatenate(self._waiting),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "InceptionScore":
        """The score that `to_arrays` was called on."""
        score = cls(arrays["pending"].shape[1], int(arrays["split_size"]))
        score._scores, score._waiting = arrays["scores"].tolist(), [arrays["pending"]]
        return score


def _score(probabilities: np.ndarray) -> float:
    """The exponential of the rows' mean KL divergence from their mean."""
    mean = probabilities.mean(axis=0)
    ratio = np.divide(probabilities, mean, out=np.ones_like(probabilities), where=probabilities > 0)
    return float(np.exp(np.mean(np.sum(probabilities * np.log(ratio), axis=1))))


class FeatureSummary:
    """What is kept of the features of a set of images, to be added to batch by batch.

    `keep_features`: those of every image, which precision, recall and KID need.
    """

    def __init__(self, network: FeatureNetwork, keep_features: bool):
        self.pool, self.score = Moments(network.width), InceptionScore(network.num_classes)
        self.spatial = Moments(network.spatial_width) if network.spatial_width else None
        self._kept = [np.empty((0, network.width), np.float32)] if keep_features else None

    @property
    def _parts(self) -> dict[str, Any]:
        parts = {"pool": self.pool, "spatial": self.spatial, "score": self.score}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def count(self) -> int:
        """Number of images."""
        return self.pool.count

    @property
    def pool_features(self) -> np.ndarray | None:
        """Those of all images, float32 (N, D), or None if they are not kept."""
        if self._kept is None:
            return None
        self._kept = [np.concatenate(self._kept)]
        return self._kept[0]

    def add(self, features: Features) -> None:
        """Adds the next images; UsageError where a feature is not finite."""
        self.pool.update(features.pool)
        if self.spatial is not None:
            self.spatial.update(features.spatial)
        self.score.update(features.logits)
        if self._kept is not None:
            self._kept.append(features.pool)

    def statistics(self, features: str, info: dict[str, Any]) -> Statistics:
        """This summary as a reference."""
        pool, spatial = self.pool, self.spatial
        return Statistics(
            features,
            pool.mean,
            pool.covariance,
            spatial.mean if spatial else None,
            spatial.covariance if spatial else None,
            self.pool_features,
            self.count,
            info=info,
        )

    def save(self, path: pathlib.Path, about: dict[str, Any]) -> None:
        """Writes the summary, to go on later; `about` says what it is of."""
        arrays: Any = {
            f"{name}/{key}": value
            for name, part in self._parts.items()
            for key, value in part.to_arrays().items()
        }
        if self._kept is not None:
            arrays["kept"] = self.pool_features
        with new_file(path) as file:
            np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())

    def load(self, path: pathlib.Path, about: dict[str, Any]) -> None:
        """Goes on from what `save` has written; UsageError where that is of something else."""
        about = json.loads(json.dumps(about))
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = json.loads(arrays["about"].tobytes())
                if found == about:
                    for name, part in self._parts.items():
                        keys = part.to_arrays().keys()
                        state = {key: arrays[f"{name}/{key}"] for key in keys}
                        setattr(self, name, part.from_arrays(state))
                    self._kept = self._kept and [arrays["kept"]]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} is damaged: remove it to start again ({error})") from error
        if differing := [key for key in found if found[key] != about.get(key)]:
            raise UsageError(
                f"{path} was left by an evaluation of something else ({', '.join(differing)}): "
                "give another --out, or remove it"
            )
