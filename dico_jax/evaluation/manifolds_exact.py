"""Manifolds by exact distances: float32 bounds on the device, float64 where they do not decide.

What a manifold is, and what its arguments may be, says `precision_recall`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dico_jax.evaluation.row_tiles import dot_products, padded, row_blocks, split_numbers, tile_rows

_SPARE = 8  # candidates beyond k that are kept of every row
_UNIT32, _UNIT64 = 2.0**-24, 2.0**-53  # largest relative error of one rounding
_PAIR_BYTES = 32 << 20
_HOST_ROWS, _HOST_COLUMNS = 128, 4096


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
    for start, block in row_blocks(features, tile_rows(features)):
        moved = ((block.astype(np.float64) - frame.centre) * frame.scale).astype(np.float32)
        squares[start : start + len(block)] = np.einsum("nd,nd->n", moved, moved, dtype=np.float64)
        tiles.append(jnp.asarray(padded(moved, tile_rows(features), 0.0)))
    lower = squares * (1 - frame.rounding)
    scaled_radii = radii * frame.scale**2 * (1 + 16 * _UNIT32)
    side = _Side(
        tiles,
        split_numbers(lower, np.inf),
        split_numbers(lower - scaled_radii, np.inf),
        len(features),
    )
    return side, squares / frame.scale**2


def radii_of(features: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of every row to its k-th nearest other row, float64 (N,)."""
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


def members_of(
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
            products = dot_products(a.tiles[i], b.tiles[j])
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
    for start, chosen in row_blocks(rows, _HOST_ROWS):
        moved = x[chosen].astype(np.float64) - centre
        squares = np.einsum("nd,nd->n", moved, moved)[:, None]
        scores, margins = np.empty((2, len(chosen), len(y)))
        for column, block in row_blocks(y, _HOST_COLUMNS):
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
