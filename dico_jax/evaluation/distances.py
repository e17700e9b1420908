"""Distances of features, samples first: FID and sFID (Frechet's), KID, precision and recall."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dico_jax.errors import UsageError
from dico_jax.evaluation.statistics import check_moments, check_rows

DISTANCES = ("exact", "adm_float16")  # of precision and recall

_NEGATIVE = 1e-3  # of eigenvalues beside the largest, for moments stored in float16
_TILE = 2000  # rows of either set that the device has at a time
_SPARE = 8  # candidates beyond k that are kept of every row
_UNIT32, _UNIT64 = 2.0**-24, 2.0**-53  # largest relative error of one rounding
_HALF_MAX = float(np.finfo(np.float16).max)
_PAIRS_BYTES, _HOST_ROWS = 32 << 20, 128


def frechet_distance(sample_mean, sample_covariance, reference_mean, reference_covariance) -> float:
    """|m1 - m2|^2 + trace(C1 + C2 - 2 sqrt(C1 C2)) of means (D,) and covariances (D, D), float64.

    With C1 = R R^T, the trace of the root is the sum of the roots of the eigenvalues of R^T C2 R,
    which is symmetric. So it exists for covariances without full rank too, and nothing is added to
    their diagonals. Eigenvalues that rounding made negative count as 0.
    """
    mean1, covariance1 = check_moments(sample_mean, sample_covariance, "the samples")
    mean2, covariance2 = check_moments(reference_mean, reference_covariance, "the reference")
    if len(mean1) != len(mean2):
        raise UsageError(f"means of {len(mean1)} and {len(mean2)} numbers cannot be compared")
    root, other = _root_of_one(covariance1, covariance2)
    product = root.T @ other @ root
    eigenvalues = _without_negative(np.linalg.eigvalsh((product + product.T) / 2))
    delta = mean1 - mean2
    traces = np.trace(covariance1) + np.trace(covariance2)
    return max(0.0, float(delta @ delta + traces - 2 * np.sum(np.sqrt(eigenvalues))))


def rank_warning(count: int, width: int) -> str | None:
    """A warning where `count` rows of `width` numbers have no covariance of full rank, or None."""
    too_few = f"{count} samples are fewer than the {width + 1} that {width} features need"
    fix = "the distance is biased upwards; published figures have 50,000 samples"
    return None if count > width else f"{too_few}: {fix}"


def _root_of_one(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R with R R^T one of the two, and the other; Cholesky takes a twentieth of eigh's time."""
    for matrix, other in ((first, second), (second, first)):
        try:
            return np.linalg.cholesky(matrix), other
        except np.linalg.LinAlgError:
            continue
    values, vectors = np.linalg.eigh(first)
    return vectors * np.sqrt(_without_negative(values)), second


def _without_negative(eigenvalues: np.ndarray) -> np.ndarray:
    lowest, peak = float(eigenvalues.min()), float(np.abs(eigenvalues).max())
    if lowest < -_NEGATIVE * peak:
        raise UsageError(f"an eigenvalue is {lowest:.3g} (of up to {peak:.3g}): compute it again")
    return np.maximum(eigenvalues, 0.0)


def kernel_distance(
    sample_features, reference_features, num_subsets: int = 100, subset_size: int = 1000, seed=2020
) -> tuple[float, float]:
    """The Kernel Inception Distance (Binkowski et al., arXiv 1801.01401): the squared maximum mean
    discrepancy of random subsets, unbiased, in float64; the kernel is (x . y / D + 1)^3.

    Args:
      sample_features, reference_features: (N, D) and (M, D) of any floating dtype.
      num_subsets: how many subsets.
      subset_size: rows of each that a subset has, at least 2.
      seed: of `numpy.random.RandomState`, by which rows are drawn as torch-fidelity draws them.

    Returns:
      The mean, which may be below 0, and the standard deviation over the subsets.
    """
    samples = check_rows(sample_features, "sample features")
    reference = check_rows(reference_features, "reference features", width=samples.shape[1])
    if num_subsets < 1:
        raise UsageError("num_subsets", num_subsets, "must be at least 1")
    fewest = min(len(samples), len(reference))
    if not 2 <= subset_size <= fewest:
        raise UsageError("subset_size", subset_size, f"does not fit: it must be in 2 to {fewest}")
    random, values = np.random.RandomState(seed), []
    for _ in range(num_subsets):
        rows = samples[random.choice(len(samples), subset_size, replace=False)]
        others = reference[random.choice(len(reference), subset_size, replace=False)]
        values.append(squared_discrepancy(rows, others))
    return float(np.mean(values)), float(np.std(values))


def squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate for x (N, D) and y (M, D); a row is not compared with itself."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return float(sum(within) - 2 * xy.mean())


# Precision and recall. Radii and members are one question: of every row the k-th least score over
# the rows of the other set: the squared distance less the radius of those. Float32 on the device
# gives bounds, and what they leave open is computed in float64 on the host.


def precision_recall(
    sample_features: Any, reference_features: Any, k: int = 3, distances: str = "exact"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) of samples (N, D)
    against a reference (M, D): the share of either set inside the manifold of the other, the union
    of balls around its points, each up to the k-th nearest other point, edge included.

    "exact" decides as exact distances of the features would. "adm_float16" rounds as the published
    evaluator of ADM does: features, norms, products and their sums to float16, or to float32 where
    float16 cannot hold them. Recall differs by up to about 0.005, so name which one a figure is.
    """
    ours, theirs = manifold_members(sample_features, reference_features, k, distances)
    return float(ours.mean()), float(theirs.mean())


def manifold_members(
    sample_features: Any, reference_features: Any, k: int = 3, distances: str = "exact"
) -> tuple[np.ndarray, np.ndarray]:
    """Which samples lie inside the manifold of the reference, bool (N,), and the reverse, (M,)."""
    samples = check_rows(sample_features, "sample features")
    reference = check_rows(reference_features, "reference features", width=samples.shape[1])
    ours, theirs = (_Rows(x, manifold_radii(x, k, distances)) for x in (samples, reference))
    of_samples, of_reference = _least(ours, theirs, 1, distances)
    return of_samples <= 0, of_reference <= 0


def manifold_radii(features: np.ndarray, k: int = 3, distances: str = "exact") -> np.ndarray:
    """The squared distance of every row to its k-th nearest other row, float64 (N,).

    "adm_float16" takes entry k of a row's sorted distances, whose first need not be the row itself.
    """
    features = check_rows(features, "features")
    if distances not in DISTANCES:
        raise UsageError("distances", distances, f"must be one of {', '.join(DISTANCES)}")
    if not 1 <= k < len(features):
        raise UsageError("k", k, f"must be at least 1, and less than the {len(features)} rows")
    rows = _Rows(features, np.zeros(len(features)))
    return _least(rows, rows, k, distances)[0]


class _Rows(NamedTuple):
    features: np.ndarray  # (N, D)
    radii: np.ndarray  # float64 (N,), squared


class _Tile(NamedTuple):
    """Rows for the device, float32, filled up to one size by rows that are near to nothing."""

    rows: np.ndarray  # (T, D)
    squares: np.ndarray  # (T,), squared norms: lower bounds, where there is rounding
    radii: np.ndarray  # (T,)
    start: Any  # number of the first row


def _least(a: _Rows, b: _Rows, k: int, distances: str) -> tuple[np.ndarray, np.ndarray]:
    """The k-th least score of every row of a over all of b, float64 (N,), and of b over a, (M,)."""
    same = b is a  # then a row does not meet itself; else only the signs are sure to be exact
    if distances == "adm_float16":
        peaks = [float(np.max(_squares(x.features.astype(np.float32)))) for x in (a, b)]
        half = 2.1 * sum(peaks) < _HALF_MAX  # else float16 would overflow
        tiles = _tiles(a, 0, 0, half)
        others = tiles if same else _tiles(b, 0, 0, half)
        of_a, of_b = _sweep(tiles, others, k + same, half=half, skip_own=False)
        return of_a[0][: len(a.radii), -1], of_b[0][: len(b.radii), -1]
    # What float32 makes wrong in a squared distance at most, as a multiple of the two rows' squared
    # norms, whatever the order of sums (Higham, Accuracy and Stability of Numerical Algorithms,
    # 3.1). Twice that, for products of bfloat16 parts (TPU).
    rounding = 2 * (a.features.shape[1] + 16) * _UNIT32
    centre = np.mean([x.features.mean(axis=0, dtype=np.float64) for x in (a, b)], axis=0)
    tiles = _tiles(a, centre, rounding)
    others = tiles if same else _tiles(b, centre, rounding)
    of_a, of_b = _sweep(tiles, others, k + _SPARE, half=False, skip_own=same)
    exact = _decided(of_a, rounding, a, tiles, b, others, k)
    return exact, exact if same else _decided(of_b, rounding, b, others, a, tiles, k)


def _tiles(given: _Rows, centre: Any, rounding: float, half: bool = False) -> list[_Tile]:
    """Less `centre`, so that float32 loses little; `half`: rounded to float16."""
    size, tiles = min(_TILE, len(given.features)), []
    for start in range(0, len(given.features), size):
        rows = given.features[start : start + size]
        if rounding:
            rows = rows.astype(np.float64) - centre
        rows = rows.astype(np.float16 if half else np.float32).astype(np.float32)
        squares = _half_sums((rows * rows).astype(np.float16)) if half else _squares(rows)
        if not np.isfinite(squares.astype(np.float32)).all():
            raise UsageError("features are too large for float32: scale both sets")
        fill, radii = (0, size - len(rows)), given.radii[start : start + size] * (1 + rounding)
        squares = np.pad(squares * (1 - rounding), fill, constant_values=np.inf)
        parts = np.pad(rows, (fill, (0, 0))), squares, np.pad(radii, fill)
        tiles.append(_Tile._make([*(x.astype(np.float32) for x in parts), np.int32(start)]))
    return tiles


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", rows, rows, dtype=np.float64)


def _half_sums(values: np.ndarray) -> np.ndarray:
    """Sums of float16 rows (N, D), in float16, in TensorFlow's order on a CPU, which is Eigen's."""
    width = values.shape[1]
    if width > 1600:
        middle = 8 * -(-width // 16)
        return _half_sums(values[:, :middle]) + _half_sums(values[:, middle:])
    filled = np.pad(values, ((0, 0), (0, -width % 32)))
    packets = sum(filled.reshape(len(values), -1, 4, 8).swapaxes(0, 1))
    lanes = packets[:, 0] + packets[:, 1] + packets[:, 2] + packets[:, 3]
    return lanes.astype(np.float32).sum(axis=1).astype(np.float16)


def _sweep(a: list[_Tile], b: list[_Tile], keep: int, **how: bool) -> Any:
    """The `keep` least scores of every row of a, with the rows of b, and the other way round."""

    def nothing(tiles):
        shape = len(tiles[0].rows), keep
        return [(jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32))] * len(tiles)

    best_a = nothing(a)
    best_b = best_a if b is a else nothing(b)
    for i, tile in enumerate(a):
        rows = jax.device_put(tile)
        for j in range(i if b is a else 0, len(b)):
            best_a[i], other = _met(best_a[i], best_b[j], rows, b[j], **how)
            if b is not a or i != j:
                best_b[j] = other
    return _joined(best_a), _joined(best_b)


def _joined(best: list[tuple[jax.Array, jax.Array]]) -> tuple[np.ndarray, np.ndarray]:
    scores, columns = map(np.concatenate, zip(*jax.device_get(best), strict=True))
    return scores.astype(np.float64), columns


@functools.partial(jax.jit, static_argnames=("half", "skip_own"))
def _met(best_rows, best_columns, rows: _Tile, columns: _Tile, *, half, skip_own):
    contracted = ((1,), (1,)), ((), ())
    products = lax.dot_general(rows.rows, columns.rows, contracted, precision=lax.Precision.HIGHEST)
    return (
        _merged(best_rows, products, rows, columns, half, skip_own),
        _merged(best_columns, products.T, columns, rows, half, skip_own),
    )


def _merged(best, products, rows: _Tile, columns: _Tile, half, skip_own):
    distances = (rows.squares[:, None] + columns.squares[None]) - 2 * products
    if half:
        distances = _half_distances(products, rows.squares, columns.squares)
    scores = jnp.maximum(distances, 0) - columns.radii[None]
    if skip_own:
        ours, theirs = (tile.start + jnp.arange(len(tile.radii)) for tile in (rows, columns))
        scores = jnp.where(ours[:, None] == theirs[None], jnp.inf, scores)
    keep = best[0].shape[1]
    negative, places = lax.top_k(-jnp.concatenate([best[0], scores], axis=1), keep)
    older = jnp.take_along_axis(best[1], jnp.minimum(places, keep - 1), axis=1)
    return -negative, jnp.where(places < keep, older, columns.start + places - keep)


def _half_distances(products, row_squares, column_squares):
    """`reduce_precision`, because XLA leaves out casts to float16 and back."""
    half = functools.partial(lax.reduce_precision, exponent_bits=5, mantissa_bits=10)
    return half(half(row_squares[:, None] - half(2 * half(products))) + column_squares[None])


def _decided(found, rounding: float, a: _Rows, a_tiles, b: _Rows, b_tiles, k: int) -> np.ndarray:
    """The exact k-th least score of every row of a, from its least lower bounds."""
    lower, columns = (x[: len(a.radii)] for x in found)
    squares, others, radii = (
        np.concatenate([tile[field] for tile in tiles]).astype(np.float64)
        for tiles, field in ((a_tiles, 1), (b_tiles, 1), (b_tiles, 2))
    )
    sizes = squares[: len(lower), None] + (others + radii)[columns]
    upper = lower + 2.1 * rounding * sizes
    scores = _settled(lower, upper, columns, np.arange(len(lower)), a, b, k)
    is_open = scores > lower[:, -1]  # rows that were not kept have at least this bound
    if b is not a:
        is_open &= (scores > 0) & (lower[:, -1] <= 0)
    if is_open.any():
        _settle_on_host(scores, np.flatnonzero(is_open), a, b, k)
    return scores


def _settled(lower, upper, columns, rows, a: _Rows, b: _Rows, k: int) -> np.ndarray:
    """The k-th least score of `rows` of a over `columns` (R, C) of b, exactly where bounds ask."""
    limit = np.partition(upper, k - 1, axis=1)[:, k - 1]
    i, j = np.nonzero(lower <= limit[:, None])
    ours, theirs, exact = rows[i], columns[i, j], np.full(lower.shape, np.inf)
    step = max(1, _PAIRS_BYTES // (8 * a.features.shape[1]))
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        difference = a.features[ours[part]].astype(np.float64) - b.features[theirs[part]]
        exact[i[part], j[part]] = _squares(difference) - b.radii[theirs[part]]
    return np.partition(exact, k - 1, axis=1)[:, k - 1]


def _settle_on_host(scores: np.ndarray, rows: np.ndarray, a: _Rows, b: _Rows, k: int) -> None:
    """Corrects the scores of `rows` by all of b: products in float64 give the bounds."""
    rounding = 2 * (a.features.shape[1] + 16) * _UNIT64
    centre = b.features.mean(axis=0, dtype=np.float64)
    others, columns = b.features - centre, np.arange(len(b.radii))
    for start in range(0, len(rows), _HOST_ROWS):
        part = rows[start : start + _HOST_ROWS]
        moved = a.features[part] - centre
        sums = _squares(moved)[:, None] + _squares(others)
        found, margins = sums - 2 * moved @ others.T - b.radii, rounding * (sums + b.radii)
        if b is a:
            found[np.arange(len(part)), part] = np.inf
        every = np.broadcast_to(columns, found.shape)
        scores[part] = _settled(found - margins, found + margins, every, part, a, b, k)
