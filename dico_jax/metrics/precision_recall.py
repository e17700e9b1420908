"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991), by tiles of distances.

The manifold of a set is the union of balls around its points, each up to the k-th nearest other
point, edge included. Precision is the share of samples inside the manifold of the reference, recall
the share of the reference inside that of the samples. All distances are squared.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dico_jax.errors import UsageError
from dico_jax.metrics.kid import check_same_width
from dico_jax.metrics.moments import check_rows

DISTANCES = ("exact", "adm_float16")
_TILE = 2000  # rows; divides _ADM_BLOCK
_ADM_BLOCK = 10_000  # rows of the published evaluator's blocks
_HALF_MAX = float(np.finfo(np.float16).max)
_SPARE = 8  # candidates beyond k that are kept of every row
_UNIT32, _UNIT64 = 2.0**-24, 2.0**-53  # largest relative error of one rounding
_PAIR_BYTES = 32 << 20
_HOST_ROWS, _HOST_COLUMNS = 128, 4096


def precision_recall(
    reference_features: np.ndarray,
    sample_features: np.ndarray,
    k: int = 3,
    distances: str = "exact",
) -> tuple[float, float]:
    """Precision and recall of samples against a reference.

    "exact" decides as exact distances of the features would: tiles in float32 on the default device
    give bounds, and what they leave open is computed in float64 on the host. "adm_float16" is the
    published evaluator of ADM, to the rounding (of TensorFlow on a CPU): features, norms and
    products in float16, and float32 for blocks of 10,000 where one distance is not finite. Recall
    differs by up to about 0.005 between the two, so name which one a figure is.

    Args:
      reference_features: (M, D) of any floating dtype, on the host.
      sample_features: (N, D).
      k: which nearest neighbour is the radius.
      distances: "exact" or "adm_float16".

    Raises:
      UsageError: fewer than k + 1 rows, features of two widths, NaN or infinite ones, an unknown
        name.
    """
    reference_inside, samples_inside = manifold_members(
        reference_features, sample_features, k, distances
    )
    return float(samples_inside.mean()), float(reference_inside.mean())


def manifold_members(
    reference_features: np.ndarray,
    sample_features: np.ndarray,
    k: int = 3,
    distances: str = "exact",
) -> tuple[np.ndarray, np.ndarray]:
    """Who lies inside whose manifold; arguments and errors of `precision_recall`.

    Returns:
      bool (M,), which of the reference lie inside the manifold of the samples, and bool (N,), which
      samples lie inside that of the reference.
    """
    reference = check_rows(reference_features, "reference features")
    samples = check_rows(sample_features, "sample features")
    check_same_width(samples, reference)
    radii = [manifold_radii(features, k, distances) for features in (reference, samples)]
    inside = _exact_inside if distances == "exact" else _adm_inside
    return inside(reference, radii[0], samples, radii[1])


def manifold_radii(features: np.ndarray, k: int = 3, distances: str = "exact") -> np.ndarray:
    """The squared distance of every row to its k-th nearest other row, float64 (N,).

    "adm_float16" counts neighbours as the published evaluator does: it takes entry k of a row's
    sorted distances, for which the row itself need not be the nearest after rounding.

    Raises:
      UsageError: fewer than k + 1 rows, NaN or infinite ones, an unknown name.
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
    return (_exact_radii if distances == "exact" else _adm_radii)(features, k)


# --- "exact": float32 bounds on the device, float64 where they do not decide.


@dataclasses.dataclass(frozen=True)
class _Side:
    """One set of rows on the device, in tiles.

    The score of rows i and j is row_terms[i] + column_terms[j] - 2 x_i . x_j, in float32. Padding
    has infinite terms.

    Attributes:
      tiles: float32 (T, D) each.
      row_terms: float32 (T,) each.
      column_terms: float32 (T,) each.
      count: rows without padding.
    """

    tiles: list[jax.Array]
    row_terms: list[jax.Array]
    column_terms: list[jax.Array]
    count: int

    @property
    def tile_rows(self) -> int:
        return self.tiles[0].shape[0]


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where features are moved to, so that float32 loses little: (x - centre) * scale.

    Attributes:
      centre: float64 (D,).
      scale: a power of two, so that no number is above 1.
      rounding: what float32 makes wrong in a squared distance at most, as a multiple of the sum of
        the two rows' squared norms, whatever the order of the sums: see Higham, Accuracy and
        Stability of Numerical Algorithms, 3.1. Twice that, for products of bfloat16 parts (TPU).
    """

    centre: np.ndarray
    scale: float
    rounding: float


def _frame(*sets: np.ndarray) -> _Frame:
    centre = np.mean([features.mean(axis=0, dtype=np.float64) for features in sets], axis=0)
    peak = max(float(max(x.max(), -x.min())) for x in sets) + np.max(np.abs(centre))
    scale = 2.0 ** -np.frexp(peak)[1]
    return _Frame(centre, float(scale), 2 * (len(centre) + 16) * _UNIT32)


def _placed(features: np.ndarray, frame: _Frame, radii: np.ndarray) -> tuple[_Side, np.ndarray]:
    """The rows on the device for lower bounds of distance minus the column's radius.

    Returns:
      The side, and the squared norms (N,) of the moved rows, in units of the features.
    """
    tiles, squares = [], np.empty(len(features))
    for start, block in _blocks(features, _tile_rows(features)):
        moved = ((block.astype(np.float64) - frame.centre) * frame.scale).astype(np.float32)
        squares[start : start + len(block)] = np.einsum("nd,nd->n", moved, moved, dtype=np.float64)
        tiles.append(jnp.asarray(_padded(moved, _tile_rows(features), 0.0)))
    lower = squares * (1 - frame.rounding)
    scaled_radii = radii * frame.scale**2 * (1 + 16 * _UNIT32)
    side = _Side(tiles, _split(lower, np.inf), _split(lower - scaled_radii, np.inf), len(features))
    return side, squares / frame.scale**2


def _exact_radii(features: np.ndarray, k: int) -> np.ndarray:
    frame = _frame(features)
    side, squares = _placed(features, frame, np.zeros(len(features)))
    (lower, columns), _ = _sweep(side, side, k + _SPARE)
    lower = lower / frame.scale**2
    upper = lower + 2 * frame.rounding * (squares[:, None] + squares[columns])
    limit = np.partition(upper, k - 1, axis=1)[:, k - 1]
    near = lower <= limit[:, None]
    exact = np.full(lower.shape, np.inf)
    rows, places = np.nonzero(near)
    exact[rows, places] = _squared_distances(features, rows, features, columns[rows, places])
    radii = np.partition(exact, k - 1, axis=1)[:, k - 1]
    # Rows that were not kept are at least as far as the last one kept.
    open_rows = np.flatnonzero(radii > np.maximum(lower[:, -1], 0))
    none = np.zeros(len(features))
    radii[open_rows] = _smallest(features, open_rows, features, none, k, skip_own=True)
    return radii


def _exact_inside(
    x: np.ndarray, x_radii: np.ndarray, y: np.ndarray, y_radii: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of x are inside the manifold of y, and which of y inside that of x."""
    frame = _frame(x, y)
    (x_side, x_squares), (y_side, y_squares) = (
        _placed(features, frame, radii) for features, radii in ((x, x_radii), (y, y_radii))
    )
    of_x, of_y = _sweep(x_side, y_side, 1 + _SPARE)
    return (
        _decided(of_x, frame, x, x_squares, y, y_squares, y_radii),
        _decided(of_y, frame, y, y_squares, x, x_squares, x_radii),
    )


def _decided(
    found: tuple[np.ndarray, np.ndarray],
    frame: _Frame,
    x: np.ndarray,
    x_squares: np.ndarray,
    y: np.ndarray,
    y_squares: np.ndarray,
    y_radii: np.ndarray,
) -> np.ndarray:
    """Whether a row's least distance minus radius is at most 0, from its smallest lower bounds."""
    lower, columns = found[0] / frame.scale**2, found[1]
    upper = lower + 2 * frame.rounding * (x_squares[:, None] + y_squares[columns])
    upper += 32 * _UNIT32 * y_radii[columns]
    inside = (upper <= 0).any(axis=1)
    rows, places = np.nonzero((lower <= 0) & ~inside[:, None])
    chosen = columns[rows, places]
    inside[rows[_squared_distances(x, rows, y, chosen) <= y_radii[chosen]]] = True
    open_rows = np.flatnonzero(~inside & (lower[:, -1] <= 0))
    inside[open_rows] = _smallest(x, open_rows, y, y_radii, 1) <= 0
    return inside


def _sweep(a: _Side, b: _Side, keep: int) -> tuple[tuple, tuple]:
    """The `keep` smallest scores of every row of a over the columns of b, and the other way round.

    Where b is a, no row meets itself, every pair of tiles is multiplied once, and both are equal.

    Returns:
      For a and for b, scores float64 (N, keep) in rising order, infinite where there are fewer, and
      the other side's rows they belong to, int (N, keep).
    """
    same = a is b
    best_a = [_nothing(a.tile_rows, keep) for _ in a.tiles]
    best_b = best_a if same else [_nothing(b.tile_rows, keep) for _ in b.tiles]
    for i in range(len(a.tiles)):
        for j in range(i if same else 0, len(b.tiles)):
            products = _products(a.tiles[i], b.tiles[j])
            starts = np.int32(i * a.tile_rows), np.int32(j * b.tile_rows)
            best_a[i] = _merged(
                best_a[i], products, a.row_terms[i], b.column_terms[j], *starts, same=same
            )
            if not same or i != j:
                best_b[j] = _merged(
                    best_b[j], products.T, b.row_terms[j], a.column_terms[i], *starts[::-1],
                    same=same,
                )  # fmt: skip
    on_host_a = _on_host(best_a, a.count)
    return on_host_a, on_host_a if same else _on_host(best_b, b.count)


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


@functools.partial(jax.jit, static_argnames="same")
def _merged(best, products, row_terms, column_terms, row_start, column_start, *, same):
    """The smallest of the scores so far and those of one more tile."""
    scores = (row_terms[:, None] + column_terms[None]) - 2 * products
    columns = column_start + jnp.arange(scores.shape[1], dtype=jnp.int32)
    if same:
        rows = row_start + jnp.arange(scores.shape[0], dtype=jnp.int32)
        scores = jnp.where(rows[:, None] == columns[None], jnp.inf, scores)
    keep = best[0].shape[1]
    negative, places = lax.top_k(-jnp.concatenate([best[0], scores], axis=1), keep)
    older = jnp.take_along_axis(best[1], jnp.minimum(places, keep - 1), axis=1)
    return -negative, jnp.where(places < keep, older, column_start + places - keep)


def _squared_distances(
    x: np.ndarray, rows: np.ndarray, y: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """|x[rows] - y[columns]|^2 of pairs of rows, float64, from their differences."""
    result = np.empty(len(rows))
    step = max(1, _PAIR_BYTES // (8 * x.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        difference = x[rows[part]].astype(np.float64) - y[columns[part]].astype(np.float64)
        result[part] = np.einsum("nd,nd->n", difference, difference)
    return result


def _smallest(
    x: np.ndarray,
    rows: np.ndarray,
    y: np.ndarray,
    radii: np.ndarray,
    k: int,
    skip_own: bool = False,
) -> np.ndarray:
    """The k-th smallest of |x_i - y_j|^2 - radii_j over j, for the chosen rows i, on the host.

    Products in float64 leave only what is equal but for rounding, which is computed from the
    differences.
    """
    result = np.empty(len(rows))
    rounding = 2 * (x.shape[1] + 16) * _UNIT64
    centre = y.mean(axis=0, dtype=np.float64)
    for start, chosen in _blocks(rows, _HOST_ROWS):
        moved = x[chosen].astype(np.float64) - centre
        squares = np.einsum("nd,nd->n", moved, moved)[:, None]
        scores, margins = np.empty((2, len(chosen), len(y)))
        for column, block in _blocks(y, _HOST_COLUMNS):
            others = block.astype(np.float64) - centre
            sums = squares + np.einsum("nd,nd->n", others, others)
            part = slice(column, column + len(block))
            scores[:, part] = sums - 2 * moved @ others.T - radii[part]
            margins[:, part] = rounding * (sums + radii[part])
        if skip_own:
            scores[np.arange(len(chosen)), chosen] = np.inf
        limit = np.partition(scores + margins, k - 1, axis=1)[:, k - 1]
        for number, row in enumerate(chosen):
            near = np.flatnonzero(scores[number] - margins[number] <= limit[number])
            exact = _squared_distances(x, np.full(len(near), row), y, near) - radii[near]
            result[start + number] = np.partition(exact, k - 1)[k - 1]
    return result


# --- "adm_float16": the published evaluator's arithmetic.


@dataclasses.dataclass(frozen=True)
class _AdmSide:
    """One set of rows, in tiles: in float16 on the device, and as they are on the host."""

    features: np.ndarray
    half: list[jax.Array]
    half_norms: list[jax.Array]  # values of float16 in float32, infinite for padding

    @classmethod
    def place(cls, features: np.ndarray) -> "_AdmSide":
        tiles, norms = [], np.empty(len(features), np.float32)
        with np.errstate(over="ignore"):  # infinite ones make float32 take over
            for start, block in _blocks(features, _tile_rows(features)):
                half = block.astype(np.float16)
                norms[start : start + len(block)] = eigen_half_sum(half * half)
                tiles.append(jnp.asarray(_padded(half, _tile_rows(features), 0.0)))
        return cls(features, tiles, _split(norms, np.inf))

    def block(self, tile: int) -> int:
        return tile * self.half[0].shape[0] // _ADM_BLOCK

    def tiles_of(self, block: int) -> list[int]:
        return [i for i in range(len(self.half)) if self.block(i) == block]

    def rows(self, tile: int) -> int:
        """Rows of a tile without padding."""
        size = self.half[0].shape[0]
        return min(size, len(self.features) - tile * size)

    def in_float32(self, tile: int) -> tuple[jax.Array, jax.Array]:
        size = self.half[0].shape[0]
        rows = self.features[tile * size : (tile + 1) * size].astype(np.float32)
        norms = np.einsum("nd,nd->n", rows, rows)
        return jnp.asarray(_padded(rows, size, 0.0)), jnp.asarray(_padded(norms, size, np.inf))


class _AdmDistances:
    """Tiles of distances between two sets, in float16 or, by blocks, in float32."""

    def __init__(self, a: _AdmSide, b: _AdmSide):
        self._a, self._b = a, b
        self._half_blocks: dict[tuple[int, int], bool] = {}

    def tile(self, i: int, j: int) -> jax.Array:
        """float32 (T, T) distances of tile i of a and tile j of b; infinite for padding."""
        blocks = self._a.block(i), self._b.block(j)
        if blocks not in self._half_blocks:
            self._half_blocks[blocks] = self._all_finite(*blocks)
        if self._half_blocks[blocks]:
            return self._half(i, j)
        return _float_distances(*self._a.in_float32(i), *self._b.in_float32(j))

    def _half(self, i: int, j: int) -> jax.Array:
        a, b = self._a, self._b
        return half_distances(a.half[i], a.half_norms[i], b.half[j], b.half_norms[j])

    def _all_finite(self, a_block: int, b_block: int) -> bool:
        a_tiles, b_tiles = self._a.tiles_of(a_block), self._b.tiles_of(b_block)
        peaks = [
            max(float(np.max(np.asarray(side.half_norms[t])[: side.rows(t)])) for t in tiles)
            for side, tiles in ((self._a, a_tiles), (self._b, b_tiles))
        ]
        if 2.1 * sum(peaks) < _HALF_MAX:  # no intermediate result can overflow
            return True
        return all(self._finite(i, j) for i in a_tiles for j in b_tiles)

    def _finite(self, i: int, j: int) -> bool:
        distances = np.asarray(self._half(i, j))[: self._a.rows(i), : self._b.rows(j)]
        return bool(np.isfinite(distances).all())


def _adm_radii(features: np.ndarray, k: int) -> np.ndarray:
    side = _AdmSide.place(features)
    distances = _AdmDistances(side, side)
    radii = []
    for i in range(len(side.half)):
        best = jnp.full((side.half[i].shape[0], k + 1), jnp.inf, jnp.float32)
        for j in range(len(side.half)):
            best = _smallest_values(best, distances.tile(i, j))
        radii.append(np.asarray(best[: side.rows(i), k], np.float64))
    return np.concatenate(radii)


def _adm_inside(
    x: np.ndarray, x_radii: np.ndarray, y: np.ndarray, y_radii: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    a, b = _AdmSide.place(x), _AdmSide.place(y)
    distances = _AdmDistances(a, b)
    a_radii, b_radii = _split(x_radii, -1.0), _split(y_radii, -1.0)
    a_inside = np.zeros((len(a.half), len(a_radii[0])), bool)
    b_inside = np.zeros((len(b.half), len(b_radii[0])), bool)
    for i in range(len(a.half)):
        for j in range(len(b.half)):
            of_a, of_b = _inside_tile(distances.tile(i, j), a_radii[i], b_radii[j])
            a_inside[i] |= np.asarray(of_a)
            b_inside[j] |= np.asarray(of_b)
    return a_inside.reshape(-1)[: len(x)], b_inside.reshape(-1)[: len(y)]


@jax.jit
def half_distances(a: jax.Array, a_norms: jax.Array, b: jax.Array, b_norms: jax.Array) -> jax.Array:
    """max(|a|^2 - 2 a . b + |b|^2, 0) with every result rounded to float16, as float32 (T, T).

    TensorFlow adds the products up in float32. `reduce_precision`, because XLA leaves out casts to
    float16 and back.

    Args:
      a: float16 (T, D).
      a_norms: float32 (T,), values of float16: `eigen_half_sum` of the squares.
      b: float16 (T, D).
      b_norms: float32 (T,).
    """

    def half(x):
        return lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)

    products = half(2 * half(_products(a.astype(jnp.float32), b.astype(jnp.float32))))
    return jnp.maximum(half(half(a_norms[:, None] - products) + b_norms[None]), 0)


@jax.jit
def _float_distances(a, a_norms, b, b_norms):
    return jnp.maximum(a_norms[:, None] - 2 * _products(a, b) + b_norms[None], 0)


@jax.jit
def _smallest_values(best, distances):
    keep = best.shape[1]
    return -lax.top_k(-jnp.concatenate([best, distances], axis=1), keep)[0]


@jax.jit
def _inside_tile(distances, a_radii, b_radii):
    of_a = (distances <= b_radii[None]).any(axis=1)
    return of_a, (distances <= a_radii[:, None]).any(axis=0)


def eigen_half_sum(values: np.ndarray) -> np.ndarray:
    """Sums over the rows of float16 `values` (N, D), in float16 and in TensorFlow's order on a CPU.

    The order is that of the Eigen library: halves where a row has more than 1,600 numbers, else
    four sums of packets of eight numbers, which are added up, and the rest one by one. Measured to
    be the same as TensorFlow 2.21, bit for bit, for widths up to 1,600 and multiples of 8.
    """
    count = values.shape[1]
    if count > 1600:
        middle = 8 * -(-count // 16)
        return eigen_half_sum(values[:, :middle]) + eigen_half_sum(values[:, middle:])
    unrolled, whole = count // 32 * 32, count // 8 * 8
    sums = np.zeros((4, len(values), 8), np.float16)
    for start in range(0, unrolled, 8):
        sums[start // 8 % 4] += values[:, start : start + 8]
    packet = sums[0] + sums[1] + sums[2] + sums[3]
    for start in range(unrolled, whole, 8):
        packet += values[:, start : start + 8]
    rest = np.zeros(len(values), np.float16)
    for start in range(whole, count):
        rest += values[:, start]
    return rest + packet.astype(np.float32).sum(axis=1).astype(np.float16)


# --- tiles


def _tile_rows(features: np.ndarray) -> int:
    return min(_TILE, len(features))


def _blocks(array: np.ndarray, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


def _padded(array: np.ndarray, rows: int, value: float) -> np.ndarray:
    padding = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, padding, constant_values=value)


def _split(values: np.ndarray, padding: float) -> list[jax.Array]:
    """One number a row as float32 tiles."""
    rows = _tile_rows(values)
    return [
        jnp.asarray(_padded(block.astype(np.float32), rows, padding))
        for _, block in _blocks(values, rows)
    ]
