"""What rows that arrive in batches come to, in float64: moments, and the Inception Score.

Rows are taken in blocks of one size, so that the batches in which they come change nothing, not
even the rounding.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from scipy.linalg import blas

from dico_jax.errors import UsageError

# Fastest of 256 to 4096 at a width of 2048 on two cores; a block is 17 MB there.
_BLOCK_ROWS = 1024
SPLIT_SIZE = 5000  # samples in a chunk of the published Inception Score


def check_rows(rows: Any, what: str, first_row: int = 0, width: int | None = None) -> np.ndarray:
    """`rows` as an array, after a look at every number.

    Args:
      rows: (N, D) of a floating dtype.
      what: what the rows are, for the message, such as "features".
      first_row: number of the first of them, for the message.
      width: D; any if None.

    Raises:
      UsageError: another number of axes or width, no floating dtype, or rows with NaN or infinite
        values, saying how many rows and which is the first.
    """
    rows = np.asarray(rows)
    if rows.ndim != 2:
        raise UsageError(f"{what} of shape {rows.shape} are not (N, D): give one row an image")
    if width is not None and rows.shape[1] != width:
        raise UsageError(
            f"{what} have {rows.shape[1]} numbers a row, and {width} are expected: take them from "
            "one network"
        )
    if not jax.numpy.issubdtype(rows.dtype, np.floating):
        raise UsageError(f"{what} of dtype {rows.dtype} are no floating-point numbers: cast them")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise UsageError(
            f"{bad.size} of {len(rows)} rows of {what} are NaN or infinite, row "
            f"{first_row + bad[0]} first: look at that image and at the weights it comes from"
        )
    return rows


def check_same_width(samples: np.ndarray, reference: np.ndarray) -> None:
    """Raises UsageError unless the rows of both have as many numbers."""
    if samples.shape[1] != reference.shape[1]:
        raise UsageError(
            f"sample features of {samples.shape[1]} numbers and reference features of "
            f"{reference.shape[1]} cannot be compared: take both from one feature network"
        )


class _Blocks:
    """Rows that wait until there are enough for a block, float64 (size, width)."""

    def __init__(self, size: int, width: int):
        self._rows, self.count = np.empty((size, width)), 0

    @property
    def waiting(self) -> np.ndarray:
        return self._rows[: self.count]

    def fill(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Adds rows; every block that gets full is yielded, to be used before the next."""
        while len(rows):
            taken = rows[: len(self._rows) - self.count]
            self._rows[self.count : self.count + len(taken)] = taken
            self.count += len(taken)
            rows = rows[len(taken) :]
            if self.count == len(self._rows):
                self.count = 0
                yield self._rows


class Moments:
    """Streaming mean and covariance of rows.

    Every block of rows is centred at its own mean before it is added, so that a large common offset
    costs no digits.

    Attributes:
      width: D, numbers in a row.
    """

    def __init__(self, width: int):
        """Moments of no rows yet, of `width` numbers each."""
        if width < 1:
            raise UsageError("width", width, "must be at least 1")
        self.width = width
        self._count = 0  # rows in _mean and _scatter
        self._mean = np.zeros(width)
        # Sum of the outer products of centred rows; only the upper triangle is kept up to date.
        self._scatter = np.zeros((width, width), order="F")
        self._blocks = _Blocks(_BLOCK_ROWS, width)

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._count + self._blocks.count

    def update(self, rows: Any) -> None:
        """Adds rows.

        Args:
          rows: (N, D) of any floating dtype, finite.

        Raises:
          UsageError: rows of another width, NaN or infinite ones, or no floating-point numbers. No
            row has been added then.
        """
        rows = check_rows(rows, "features", self.count, self.width)
        for block in self._blocks.fill(rows):
            self._add(block)

    def merge(self, other: "Moments") -> None:
        """Adds all rows of `other`, which stays as it is.

        Raises:
          UsageError: `other` has rows of another width.
        """
        check_rows(np.zeros((0, other.width)), "features", width=self.width)
        other = other._complete()
        self._add(self._blocks.waiting)
        self._blocks.count = 0
        total = self._count + other._count
        if other._count:
            delta = other._mean - self._mean
            self._scatter += other._scatter
            self._scatter += np.outer(delta, delta * (self._count * other._count / total))
            self._mean += delta * (other._count / total)
        self._count = total

    @property
    def mean(self) -> np.ndarray:
        """The mean of the rows, float64 (D,).

        Raises:
          UsageError: there is no row.
        """
        if not self.count:
            raise UsageError("no rows of features: there is no mean")
        return self._complete()._mean

    @property
    def covariance(self) -> np.ndarray:
        """The covariance of the rows (divided by count - 1), float64 (D, D), symmetric.

        Raises:
          UsageError: there are fewer than two rows.
        """
        if self.count < 2:
            raise UsageError(f"{self.count} rows of features are too few for a covariance: give 2")
        return self._complete()._symmetric_scatter() / (self.count - 1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays, to be saved; what goes on from them goes on exactly."""
        return {
            "count": np.array(self._count),
            "mean": self._mean.copy(),
            "scatter": self._symmetric_scatter(),
            "pending": self._blocks.waiting.copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """The moments that `to_arrays` was called on."""
        moments = cls(arrays["mean"].shape[0])
        moments._count = int(arrays["count"])
        moments._mean[:] = arrays["mean"]
        moments._scatter[:] = arrays["scatter"]
        list(moments._blocks.fill(arrays["pending"]))
        return moments

    def _complete(self) -> "Moments":
        """A copy without waiting rows."""
        done = copy.deepcopy(self)
        done._add(done._blocks.waiting)
        done._blocks.count = 0
        return done

    def _add(self, block: np.ndarray) -> None:
        """Adds rows: one symmetric product, with the shift of the mean as a row."""
        if not len(block):
            return
        mean, total = block.mean(axis=0), self._count + len(block)
        delta = mean - self._mean
        shift = delta * np.sqrt(self._count * len(block) / total)
        centred = np.concatenate([block - mean, shift[None]])
        self._scatter = blas.dsyrk(1.0, centred.T, beta=1.0, c=self._scatter, overwrite_c=True)
        self._mean += delta * (len(block) / total)
        self._count = total

    def _symmetric_scatter(self) -> np.ndarray:
        upper = np.triu(self._scatter)
        return upper + np.triu(upper, 1).T


class InceptionScore:
    """exp(mean KL(p(class | image) || p(class))), taken over chunks of samples and averaged.

    Salimans et al., arXiv 1606.03498. Chunks are `split_size` consecutive samples, the last one may
    be shorter; so samples have to come in their order (several processes: gather them first). A
    class probability of exactly 0 contributes 0, its limit; the published evaluator gives NaN.

    Attributes:
      num_classes: C, numbers in a row.
      split_size: samples in a chunk.
    """

    def __init__(self, num_classes: int, split_size: int = SPLIT_SIZE):
        """A score of no samples yet.

        Raises:
          UsageError: a number below 1.
        """
        for name, value in (("num_classes", num_classes), ("split_size", split_size)):
            if value < 1:
                raise UsageError(name, value, "must be at least 1")
        self.num_classes, self.split_size = num_classes, split_size
        self._scores: list[float] = []
        self._chunk = _Blocks(split_size, num_classes)  # probabilities

    @property
    def count(self) -> int:
        """How many samples there were."""
        return len(self._scores) * self.split_size + self._chunk.count

    def update(self, logits: Any) -> None:
        """Adds samples by their logits.

        Args:
          logits: (N, C) of any floating dtype; the published score leaves out the bias of the last
            layer.

        Raises:
          UsageError: another number of classes, NaN or infinite values. None has been added then.
        """
        logits = check_rows(logits, "logits", self.count, self.num_classes).astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        self._add(exponentials / exponentials.sum(axis=1, keepdims=True))

    def update_probabilities(self, probabilities: Any) -> None:
        """Adds samples by their class probabilities.

        Args:
          probabilities: (N, C) of any floating dtype, at least 0, with row sums of about 1.

        Raises:
          UsageError: another number of classes, NaN or infinite values, or rows that are no
            probabilities. None has been added then.
        """
        rows = check_rows(probabilities, "probabilities", self.count, self.num_classes)
        rows = rows.astype(np.float64)
        wrong = np.flatnonzero((rows < 0).any(axis=1) | (np.abs(rows.sum(axis=1) - 1) > 1e-2))
        if wrong.size:
            raise UsageError(
                f"{wrong.size} of {len(rows)} rows are no probabilities (row "
                f"{self.count + wrong[0]} first): give logits to `update` instead"
            )
        self._add(rows)

    def result(self) -> tuple[float, float]:
        """The mean and the standard deviation (divided by their number) over the chunks.

        Raises:
          UsageError: there is no sample.
        """
        if not self.count:
            raise UsageError("no samples: there is no Inception Score")
        scores = self._scores + ([_score(self._chunk.waiting)] if self._chunk.count else [])
        return float(np.mean(scores)), float(np.std(scores))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays, to be saved; what goes on from them goes on exactly."""
        return {
            "split_size": np.array(self.split_size),
            "scores": np.array(self._scores, np.float64),
            "pending": self._chunk.waiting.copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "InceptionScore":
        """The score that `to_arrays` was called on."""
        score = cls(arrays["pending"].shape[1], int(arrays["split_size"]))
        score._scores = [float(value) for value in arrays["scores"]]
        score._add(arrays["pending"])
        return score

    def _add(self, rows: np.ndarray) -> None:
        self._scores += [_score(chunk) for chunk in self._chunk.fill(rows)]


def _score(probabilities: np.ndarray) -> float:
    """The exponential of the rows' mean KL divergence from their mean."""
    mean = probabilities.mean(axis=0)
    ratio = np.divide(probabilities, mean, out=np.ones_like(probabilities), where=probabilities > 0)
    return float(np.exp(np.mean(np.sum(probabilities * np.log(ratio), axis=1))))
