"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991), tile by tile.

The manifold of a set is the union of balls around its points, each up to the k-th nearest other
point, edge included. Precision is the share of samples inside the manifold of the reference, recall
the share of the reference inside that of the samples. All distances are squared.

Radii and members are one question: of every row the k-th least distance from the rows of the other
set, less the radii of those. The device multiplies two tiles at a time, once for both directions,
and keeps the least scores of every row.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dico_jax.errors import UsageError
from dico_jax.evaluation.moments import check_rows, check_same_width

DISTANCES = ("exact", "adm_float16")
_TILE = 2000  # rows of either set that the device has at a time
_SPARE = 8  # candidates beyond k that are kept of every row
_UNIT32, _UNIT64 = 2.0**-24, 2.0**-53  # largest relative error of one rounding
_HALF_MAX = float(np.finfo(np.float16).max)
_PAIR_BYTES = 32 << 20
_HOST_ROWS, _HOST_COLUMNS = 128, 4096


def precision_recall(
    sample_features: np.ndarray,
    reference_features: np.ndarray,
    k: int = 3,
    distances: str = "exact",
) -> tuple[float, float]:
    """Precision and recall of samples (N, D) against a reference (M, D), of any floating dtype.

    "exact" decides as exact distances of the features would: float32 on the device gives bounds,
    and what they leave open is computed in float64 on the host. "adm_float16" rounds as the
    published evaluator of ADM does: features, norms, products and their sums to float16; where
    float16 cannot hold them, all distances are in float32. Recall differs by up to about 0.005
    between the two, so name which one a figure is.

    Raises:
      UsageError: fewer than k + 1 rows, features of two widths, NaN or infinite ones, an unknown
        kind of distances.
    """
    samples_inside, reference_inside = manifold_members(
        sample_features, reference_features, k, distances
    )
    return float(samples_inside.mean()), float(reference_inside.mean())


def manifold_members(
    sample_features: np.ndarray,
    reference_features: np.ndarray,
    k: int = 3,
    distances: str = "exact",
) -> tuple[np.ndarray, np.ndarray]:
    """Which samples lie inside the manifold of the reference, bool (N,), and the reverse, (M,).

    Arguments and errors are those of `precision_recall`.
    """
    samples = check_rows(sample_features, "sample features")
    reference = check_rows(reference_features, "reference features")
    check_same_width(samples, reference)
    ours, theirs = (_Rows(x, manifold_radii(x, k, distances)) for x in (samples, reference))
    samples_scores, reference_scores = _least(ours, theirs, 1, distances)
    return samples_scores <= 0, reference_scores <= 0


def manifold_radii(features: np.ndarray, k: int = 3, distances: str = "exact") -> np.ndarray:
    """The squared distance of every row to its k-th nearest other row, float64 (N,).

    "adm_float16" takes entry k of a row's sorted distances, as the published evaluator does, for
    which the row itself need not be the nearest after rounding. Errors: see `precision_recall`.
    """
    features = check_rows(features, "features")
    if distances not in DISTANCES:
        raise UsageError(f"distances={distances!r} must be one of {', '.join(DISTANCES)}")
    if k < 1:
        raise UsageError(f"k={k} must be at least 1")
    if len(features) <= k:
        raise UsageError(
            f"{len(features)} rows of features have no neighbour k={k}: give at least {k + 1}"
        )
    rows = _Rows(features, np.zeros(len(features)))
    return _least(rows, rows, k, distances)[0]


class _Rows(NamedTuple):
    """Features (N, D), and a radius of every row, float64 (N,)."""

    features: np.ndarray
    radii: np.ndarray


def _least(a: _Rows, b: _Rows, k: int, distances: str) -> tuple[np.ndarray, np.ndarray]:
    """Of every row of a the k-th least distance from rows of b, less their radii; and of b from a.

    float64 (N,) and (M,). Where b is a, a row does not meet itself; where it is not, only the signs
    are sure to be exact.
    """
    frame = _frame(a, b) if distances == "exact" else _published_frame(a, b)
    a_side = _placed(a, frame)
    b_side = a_side if b is a else _placed(b, frame)
    if not frame.rounding:
        keep = k + 1 if b is a else k
        of_a, of_b = _sweep(a_side, b_side, keep, half=frame.half, skip_own=False)
        return of_a[0][:, -1], of_b[0][:, -1]
    of_a, of_b = _sweep(a_side, b_side, k + _SPARE, half=False, skip_own=b is a)
    exact = _decided(of_a, frame, a, a_side, b, b_side, k)
    return exact, exact if b is a else _decided(of_b, frame, b, b_side, a, a_side, k)


# Scores on the device.


class _Frame(NamedTuple):
    """Where features are moved to, and how distances are rounded there.

    Attributes:
      centre: float64 (D,), taken off; so that float32 loses little.
      scale: a power of two, so that no number is above 1.
      rounding: what float32 makes wrong in a squared distance at most, as a multiple of the sum of
        the two rows' squared norms, whatever the order of the sums: see Higham, Accuracy and
        Stability of Numerical Algorithms, 3.1. Twice that, for products of bfloat16 parts (TPU).
        0 where distances count as they are computed.
      half: whether every result is rounded to float16.
    """

    centre: np.ndarray
    scale: float
    rounding: float
    half: bool


def _frame(*sets: _Rows) -> _Frame:
    centre = np.mean([rows.features.mean(axis=0, dtype=np.float64) for rows in sets], axis=0)
    peak = max(float(max(x.features.max(), -x.features.min())) for x in sets)
    scale = 2.0 ** -np.frexp(peak + np.max(np.abs(centre)))[1]
    return _Frame(centre, float(scale), 2 * (len(centre) + 16) * _UNIT32, half=False)


def _published_frame(*sets: _Rows) -> _Frame:
    """Nothing is moved, and float16 is left only where it would overflow."""
    peaks = [float(np.max(_squares(rows.features.astype(np.float32)))) for rows in sets]
    return _Frame(np.zeros(1), 1.0, 0.0, half=2.1 * sum(peaks) < _HALF_MAX)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One set of rows as the device takes it, float32, filled up to whole tiles.

    Attributes:
      rows: (T * size, D), moved.
      squares: (T * size,), their squared norms (lower bounds where there is rounding); infinite for
        what fills up, so that it is near to nothing.
      radii: (T * size,).
      count: rows before it was filled up.
    """

    rows: np.ndarray
    squares: np.ndarray
    radii: np.ndarray
    count: int

    @property
    def tile_size(self) -> int:
        return min(_TILE, self.count)

    @property
    def starts(self) -> range:
        """The first row of every tile."""
        return range(0, len(self.rows), self.tile_size)

    def tile(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = slice(start, start + self.tile_size)
        return self.rows[part], self.squares[part], self.radii[part]


def _placed(given: _Rows, frame: _Frame) -> _Side:
    count, size = len(given.features), min(_TILE, len(given.features))
    whole = -(-count // size) * size
    rows = np.zeros((whole, given.features.shape[1]), np.float32)
    squares, radii = np.full(whole, np.inf, np.float32), np.zeros(whole, np.float32)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        block = given.features[part]
        if frame.rounding:
            block = (block.astype(np.float64) - frame.centre) * frame.scale
        rows[part] = block.astype(np.float16) if frame.half else block
        if frame.half:
            squares[part] = _half_sums((rows[part] * rows[part]).astype(np.float16))
        else:
            squares[part] = _squares(rows[part]) * (1 - frame.rounding)
    radii[:count] = given.radii * frame.scale**2
    if frame.rounding:
        radii *= 1 + 16 * _UNIT32
    return _Side(rows, squares, radii, count)


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", rows, rows, dtype=np.float64)


def _half_sums(values: np.ndarray) -> np.ndarray:
    """Sums over the rows of float16 `values` (N, D), in float16, in TensorFlow's order on a CPU.

    That is the Eigen library's: halves where a row has more than 1,600 numbers, else four sums of
    packets of eight numbers, which are added up.
    """
    width = values.shape[1]
    if width > 1600:
        middle = 8 * -(-width // 16)
        return _half_sums(values[:, :middle]) + _half_sums(values[:, middle:])
    filled = np.pad(values, ((0, 0), (0, -width % 32)))
    packets = sum(filled.reshape(len(values), -1, 4, 8).swapaxes(0, 1))
    lanes = packets[:, 0] + packets[:, 1] + packets[:, 2] + packets[:, 3]
    return lanes.astype(np.float32).sum(axis=1).astype(np.float16)


def _sweep(
    a: _Side, b: _Side, keep: int, *, half: bool, skip_own: bool
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The `keep` least scores of every row of a over the rows of b, and the other way round.

    Both are float64 (N, keep) in rising order, infinite where there are fewer, with the other
    side's rows, int (N, keep). Where b is a, every pair of tiles is multiplied once.
    """
    best_a = [_nothing(a.tile_size, keep) for _ in a.starts]
    best_b = best_a if b is a else [_nothing(b.tile_size, keep) for _ in b.starts]
    merge = functools.partial(_merged, half=half, skip_own=skip_own)
    for i, a_start in enumerate(a.starts):
        a_rows, a_squares, a_radii = map(jnp.asarray, a.tile(a_start))
        for j, b_start in enumerate(b.starts):
            if b is a and j < i:
                continue
            b_rows, b_squares, b_radii = b.tile(b_start)
            products = _products(a_rows, b_rows)
            starts = np.int32(a_start), np.int32(b_start)
            best_a[i] = merge(best_a[i], products, a_squares, b_squares, b_radii, *starts)
            if b is not a or i != j:
                best_b[j] = merge(
                    best_b[j], products.T, b_squares, a_squares, a_radii, *starts[::-1]
                )
    of_a = _on_host(best_a, a.count)
    return of_a, of_a if b is a else _on_host(best_b, b.count)


def _nothing(rows: int, keep: int) -> tuple[jax.Array, jax.Array]:
    return jnp.full((rows, keep), jnp.inf, jnp.float32), jnp.zeros((rows, keep), jnp.int32)


def _on_host(best: list[tuple[jax.Array, jax.Array]], count: int) -> tuple[np.ndarray, np.ndarray]:
    scores, columns = (
        np.concatenate([np.asarray(x) for x in part]) for part in zip(*best, strict=True)
    )
    return scores[:count].astype(np.float64), columns[:count]


@jax.jit
def _products(rows: jax.Array, columns: jax.Array) -> jax.Array:
    return lax.dot_general(rows, columns, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def _half_distances(products, row_squares, column_squares):
    """`reduce_precision`, because XLA leaves out casts to float16 and back."""

    def half(x):
        return lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)

    twice = half(2 * half(products))
    return half(half(row_squares[:, None] - twice) + column_squares[None])


@functools.partial(jax.jit, static_argnames=("half", "skip_own"))
def _merged(
    best, products, row_squares, column_squares, radii, row_start, column_start, *, half, skip_own
):
    """The least of the scores so far and those of one more tile, and their columns."""
    if half:
        distances = _half_distances(products, row_squares, column_squares)
    else:
        distances = (row_squares[:, None] + column_squares[None]) - 2 * products
    scores = jnp.maximum(distances, 0) - radii[None]
    if skip_own:
        rows = row_start + jnp.arange(scores.shape[0])[:, None]
        columns = column_start + jnp.arange(scores.shape[1])[None]
        scores = jnp.where(rows == columns, jnp.inf, scores)
    keep = best[0].shape[1]
    negative, places = lax.top_k(-jnp.concatenate([best[0], scores], axis=1), keep)
    older = jnp.take_along_axis(best[1], jnp.minimum(places, keep - 1), axis=1)
    return -negative, jnp.where(places < keep, older, column_start + places - keep)


# Exact decisions on the host.


def _decided(
    found: tuple[np.ndarray, np.ndarray],
    frame: _Frame,
    a: _Rows,
    a_side: _Side,
    b: _Rows,
    b_side: _Side,
    k: int,
) -> np.ndarray:
    """The exact k-th least score of every row of a, from its least lower bounds."""
    lower, columns = found[0] / frame.scale**2, found[1]
    squares = a_side.squares[: a_side.count, None].astype(np.float64) + b_side.squares[columns]
    upper = lower + 2.1 * frame.rounding * squares / frame.scale**2
    upper += 32 * _UNIT32 * b.radii[columns]
    limit = np.partition(upper, k - 1, axis=1)[:, k - 1]
    rows, places = np.nonzero(lower <= limit[:, None])
    chosen = columns[rows, places]
    exact = np.full(lower.shape, np.inf)
    exact[rows, places] = _from_differences(a.features, rows, b, chosen)
    scores = np.partition(exact, k - 1, axis=1)[:, k - 1]
    # Rows that were not kept have at least the last lower bound.
    is_open = scores > lower[:, -1]
    if b is not a:
        is_open &= (scores > 0) & (lower[:, -1] <= 0)
    open_rows = np.flatnonzero(is_open)
    scores[open_rows] = _least_on_host(a.features, open_rows, b, k, skip_own=b is a)
    return scores


def _from_differences(x: np.ndarray, rows: np.ndarray, b: _Rows, columns: np.ndarray) -> np.ndarray:
    """|x[rows] - b[columns]|^2 less the radii, of pairs of rows, float64."""
    result = np.empty(len(rows))
    step = max(1, _PAIR_BYTES // (8 * x.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        difference = x[rows[part]].astype(np.float64) - b.features[columns[part]]
        result[part] = _squares(difference)
    return result - b.radii[columns]


def _least_on_host(
    x: np.ndarray, rows: np.ndarray, b: _Rows, k: int, *, skip_own: bool
) -> np.ndarray:
    """The k-th least score of the chosen rows of x over all of b.

    Products in float64 leave only what is equal but for rounding, which is computed from the
    differences.
    """
    result = np.empty(len(rows))
    rounding = 2 * (x.shape[1] + 16) * _UNIT64
    centre = b.features.mean(axis=0, dtype=np.float64)
    for start in range(0, len(rows), _HOST_ROWS):
        chosen = rows[start : start + _HOST_ROWS]
        moved = x[chosen].astype(np.float64) - centre
        scores, margins = np.empty((2, len(chosen), len(b.features)))
        for column in range(0, len(b.features), _HOST_COLUMNS):
            part = slice(column, column + _HOST_COLUMNS)
            others = b.features[part].astype(np.float64) - centre
            sums = _squares(moved)[:, None] + _squares(others)
            scores[:, part] = sums - 2 * moved @ others.T - b.radii[part]
            margins[:, part] = rounding * (sums + b.radii[part])
        if skip_own:
            scores[np.arange(len(chosen)), chosen] = np.inf
        limit = np.partition(scores + margins, k - 1, axis=1)[:, k - 1]
        for number, row in enumerate(chosen):
            near = np.flatnonzero(scores[number] - margins[number] <= limit[number])
            exact = _from_differences(x, np.full(len(near), row), b, near)
            result[start + number] = np.partition(exact, k - 1)[k - 1]
    return result
