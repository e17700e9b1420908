"""The Inception Score (Salimans et al., arXiv 1606.03498)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.evaluation.moments import check_rows

SPLIT_SIZE = 5000  # of the published evaluator


class InceptionScore:
    """exp(mean KL(p(class | image) || p(class))), taken over chunks of samples and averaged.

    Chunks are `split_size` consecutive samples, the last one may be shorter; so samples have to
    come in their order (several processes: gather them first), in batches of any size, which
    change nothing. A class probability of exactly 0 contributes 0, its limit; the published
    evaluator gives NaN there.

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
                raise UsageError(f"{name}={value} must be at least 1")
        self.num_classes, self.split_size = num_classes, split_size
        self._scores: list[float] = []
        self._chunk = np.empty((split_size, num_classes))  # probabilities
        self._pending = 0

    @property
    def count(self) -> int:
        """How many samples there were."""
        return len(self._scores) * self.split_size + self._pending

    def update(self, logits: Any) -> None:
        """Adds samples by their logits.

        Args:
          logits: (N, C) of any floating dtype; the published score leaves out the bias of the last
            layer.

        Raises:
          UsageError: another number of classes, NaN or infinite values. None has been added then.
        """
        logits = check_rows(logits, "logits", self.count).astype(np.float64)
        self._check_width(logits)
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
        rows = check_rows(probabilities, "probabilities", self.count).astype(np.float64)
        self._check_width(rows)
        wrong = np.flatnonzero((rows < 0).any(axis=1) | (np.abs(rows.sum(axis=1) - 1) > 1e-2))
        if wrong.size:
            raise UsageError(
                f"{wrong.size} of {len(rows)} rows are no probabilities (row "
                f"{self.count + wrong[0]} first: sum {rows[wrong[0]].sum():.4g}, least "
                f"{rows[wrong[0]].min():.3g}): give logits to `update` instead"
            )
        self._add(rows)

    def result(self) -> tuple[float, float]:
        """The mean and the standard deviation (divided by their number) over the chunks.

        Raises:
          UsageError: there is no sample.
        """
        if not self.count:
            raise UsageError("no samples: there is no Inception Score")
        scores = self._scores + ([_score(self._chunk[: self._pending])] if self._pending else [])
        return float(np.mean(scores)), float(np.std(scores))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays, to be saved; what goes on from them goes on exactly."""
        return {
            "split_size": np.array(self.split_size),
            "scores": np.array(self._scores, np.float64),
            "pending": self._chunk[: self._pending].copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "InceptionScore":
        """The score that `to_arrays` was called on."""
        pending = arrays["pending"]
        score = cls(pending.shape[1], int(arrays["split_size"]))
        score._scores = [float(value) for value in arrays["scores"]]
        score._chunk[: len(pending)] = pending
        score._pending = len(pending)
        return score

    def _check_width(self, rows: np.ndarray) -> None:
        if rows.shape[1] != self.num_classes:
            raise UsageError(
                f"rows of {rows.shape[1]} classes, and {self.num_classes} are expected: take them "
                "from one network"
            )

    def _add(self, rows: np.ndarray) -> None:
        start = 0
        while start < len(rows):
            taken = rows[start : start + self.split_size - self._pending]
            self._chunk[self._pending : self._pending + len(taken)] = taken
            self._pending += len(taken)
            start += len(taken)
            if self._pending == self.split_size:
                self._scores.append(_score(self._chunk))
                self._pending = 0


def _score(probabilities: np.ndarray) -> float:
    """The exponential of the rows' mean KL divergence from their mean."""
    mean = probabilities.mean(axis=0)
    ratio = np.divide(probabilities, mean, out=np.ones_like(probabilities), where=probabilities > 0)
    return float(np.exp(np.mean(np.sum(probabilities * np.log(ratio), axis=1))))
