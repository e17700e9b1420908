"""Mean and covariance of rows that arrive in batches, in float64."""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from scipy.linalg import blas

from dico_jax.errors import UsageError

# Fastest of 256 to 4096 at a width of 2048 on two cores; a block is 17 MB there.
_BLOCK_ROWS = 1024


def check_rows(rows: Any, what: str, first_row: int = 0) -> np.ndarray:
    """`rows` as an array, after a look at every number.

    Args:
      rows: (N, D) of a floating dtype.
      what: what the rows are, for the message, such as "features".
      first_row: number of the first of them, for the message.

    Raises:
      UsageError: another number of axes, no floating dtype, or rows with NaN or infinite values,
        saying how many rows and which is the first.
    """
    rows = np.asarray(rows)
    if rows.ndim != 2:
        raise UsageError(f"{what} of shape {rows.shape} are not (N, D): give one row an image")
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


class Moments:
    """Streaming mean and covariance of rows.

    Every block of rows is centred at its own mean before it is added, so that a large common offset
    costs no digits. Blocks have a fixed size: the batches in which rows come change nothing, not
    even the rounding.

    Attributes:
      width: D, numbers in a row.
    """

    def __init__(self, width: int):
        """Moments of no rows yet, of `width` numbers each."""
        if width < 1:
            raise UsageError(f"width={width} must be at least 1")
        self.width = width
        self._count = 0  # rows in _mean and _scatter
        self._mean = np.zeros(width)
        # Sum of the outer products of centred rows; only the upper triangle is kept up to date.
        self._scatter = np.zeros((width, width), order="F")
        # Rows that do not fill a block yet, and room for one more, see _add_block.
        self._block = np.empty((_BLOCK_ROWS + 1, width))
        self._pending = 0

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._count + self._pending

    def update(self, rows: Any) -> None:
        """Adds rows.

        Args:
          rows: (N, D) of any floating dtype, finite.

        Raises:
          UsageError: rows of another width, NaN or infinite ones, or no floating-point numbers. No
            row has been added then.
        """
        rows = check_rows(rows, "features", self.count)
        self._check_width(rows.shape[1])
        start = 0
        while start < len(rows):
            taken = rows[start : start + _BLOCK_ROWS - self._pending]
            self._block[self._pending : self._pending + len(taken)] = taken
            self._pending += len(taken)
            start += len(taken)
            if self._pending == _BLOCK_ROWS:
                self._add_block()

    def merge(self, other: "Moments") -> None:
        """Adds all rows of `other`, which stays as it is.

        Raises:
          UsageError: `other` has rows of another width.
        """
        self._check_width(other.width)
        other = other._complete()
        self._add_block()
        total = self._count + other._count
        if not other._count:
            return
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
        return self._complete()._mean.copy()

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
            "pending": self._block[: self._pending].copy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """The moments that `to_arrays` was called on."""
        moments = cls(arrays["mean"].shape[0])
        moments._count = int(arrays["count"])
        moments._mean[:] = arrays["mean"]
        moments._scatter[:] = arrays["scatter"]
        moments._pending = len(arrays["pending"])
        moments._block[: moments._pending] = arrays["pending"]
        return moments

    def _check_width(self, width: int) -> None:
        if width != self.width:
            raise UsageError(
                f"features have {width} numbers a row, and {self.width} are expected: take them "
                "from one network"
            )

    def _complete(self) -> "Moments":
        """The same without pending rows."""
        if not self._pending:
            return self
        done = copy.deepcopy(self)
        done._add_block()
        return done

    def _add_block(self) -> None:
        """Adds the pending rows: one symmetric product, with the shift of the mean as a row."""
        rows = self._pending
        if not rows:
            return
        block = self._block[: rows + 1]
        mean = block[:rows].mean(axis=0)
        block[:rows] -= mean
        total = self._count + rows
        delta = mean - self._mean
        block[rows] = delta * np.sqrt(self._count * rows / total)
        self._scatter = blas.dsyrk(1.0, block.T, beta=1.0, c=self._scatter, overwrite_c=True)
        self._mean += delta * (rows / total)
        self._count, self._pending = total, 0

    def _symmetric_scatter(self) -> np.ndarray:
        upper = np.triu(self._scatter)
        return upper + np.triu(upper, 1).T
