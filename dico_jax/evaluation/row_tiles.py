"""Rows of features in tiles, of which the device takes two and their products at a time."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_TILE = 2000  # rows; divides the blocks of manifolds_adm_float16


def tile_rows(features: np.ndarray) -> int:
    """How many rows a tile of these features has, padding included."""
    return min(_TILE, len(features))


def row_blocks(array: np.ndarray, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """The number of the first row and the rows, for every block of at most `rows` rows."""
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


def padded(array: np.ndarray, rows: int, value: float) -> np.ndarray:
    """The array with `rows` rows, the new ones of `value`."""
    padding = [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, padding, constant_values=value)


def split_numbers(values: np.ndarray, padding: float) -> list[jax.Array]:
    """One number a row (N,) as float32 tiles (T,); padding is `padding`."""
    rows = tile_rows(values)
    return [
        jnp.asarray(padded(block.astype(np.float32), rows, padding))
        for _, block in row_blocks(values, rows)
    ]


@jax.jit
def dot_products(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The product of every row of one tile (S, D) with every row of another (T, D): (S, T)."""
    return lax.dot_general(rows, columns, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
