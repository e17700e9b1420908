"""Manifolds in the arithmetic of ADM's published evaluator, to the rounding.

That is TensorFlow's on a CPU: features, norms and products in float16, and float32 for blocks of
10,000 rows where one distance is not finite. What a manifold is, and what its arguments may be,
says `precision_recall`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dico_jax.evaluation.row_tiles import dot_products, padded, row_blocks, split_numbers, tile_rows

_BLOCK = 10_000  # rows of the published evaluator's blocks; whole tiles
_HALF_MAX = float(np.finfo(np.float16).max)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One set of rows, in tiles: in float16 on the device, and as they are on the host."""

    features: np.ndarray
    half: list[jax.Array]
    half_norms: list[jax.Array]  # values of float16 in float32, infinite for padding

    @classmethod
    def place(cls, features: np.ndarray) -> "_Side":
        tiles, norms = [], np.empty(len(features), np.float32)
        with np.errstate(over="ignore"):  # infinite ones make float32 take over
            for start, block in row_blocks(features, tile_rows(features)):
                half = block.astype(np.float16)
                norms[start : start + len(block)] = eigen_half_sum(half * half)
                tiles.append(jnp.asarray(padded(half, tile_rows(features), 0.0)))
        return cls(features, tiles, split_numbers(norms, np.inf))

    def block(self, tile: int) -> int:
        return tile * self.half[0].shape[0] // _BLOCK

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
        return jnp.asarray(padded(rows, size, 0.0)), jnp.asarray(padded(norms, size, np.inf))


class _Distances:
    """Tiles of distances between two sets, in float16 or, by blocks, in float32."""

    def __init__(self, a: _Side, b: _Side):
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


def radii_of(features: np.ndarray, k: int) -> np.ndarray:
    """Entry k of every row's sorted squared distances, float64 (N,)."""
    side = _Side.place(features)
    distances = _Distances(side, side)
    radii = []
    for i in range(len(side.half)):
        best = jnp.full((side.half[i].shape[0], k + 1), jnp.inf, jnp.float32)
        for j in range(len(side.half)):
            best = _smallest_values(best, distances.tile(i, j))
        radii.append(np.asarray(best[: side.rows(i), k], np.float64))
    return np.concatenate(radii)


def members_of(
    x: np.ndarray, x_radii: np.ndarray, y: np.ndarray, y_radii: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of x are inside the manifold of y, and which of y inside that of x."""
    a, b = _Side.place(x), _Side.place(y)
    distances = _Distances(a, b)
    a_radii, b_radii = split_numbers(x_radii, -1.0), split_numbers(y_radii, -1.0)
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

    products = half(2 * half(dot_products(a.astype(jnp.float32), b.astype(jnp.float32))))
    return jnp.maximum(half(half(a_norms[:, None] - products) + b_norms[None]), 0)


@jax.jit
def _float_distances(a, a_norms, b, b_norms):
    return jnp.maximum(a_norms[:, None] - 2 * dot_products(a, b) + b_norms[None], 0)


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
