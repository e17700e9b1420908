"""Decoding in tiles, for pictures whose activations do not fit in memory."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

MIN_TILE = 8  # latent positions a side; statistics over fewer change the colours too much


@dataclasses.dataclass(frozen=True)
class Cuts:
    """How one side of a latent is cut into tiles.

    Attributes:
      size: latent positions of every tile.
      starts: int (K,), the first position of each.
      weights: float32 (K, size * downsampling), what each tile's pixels count; over all tiles the
        weights of a pixel add up to 1.
    """

    size: int
    starts: np.ndarray
    weights: np.ndarray


def cut(length: int, tile_size: int, downsampling: int) -> Cuts:
    """Tiles that overlap by a quarter, the last one at the edge, with linear transitions.

    Args:
      length: latent positions of the side.
      tile_size: of a tile; a shorter side is one tile.
      downsampling: pixels per position.
    """
    size = min(tile_size, length)
    overlap = size // 4
    inner = np.arange(0, length - size, size - overlap)
    starts = np.append(inner, length - size).astype(np.int32)
    ramp = (np.arange(size * downsampling) + 0.5) / (overlap * downsampling or 1)
    rising = np.minimum(1, ramp)
    weights = np.ones((len(starts), size * downsampling))
    weights[1:] *= rising  # the picture's own edges have no transition
    weights[:-1] *= rising[::-1]
    total = np.zeros(length * downsampling)
    parts = [slice(s * downsampling, (s + size) * downsampling) for s in starts]
    for part, weight in zip(parts, weights, strict=True):
        total[part] += weight
    shares = [weight / total[part] for part, weight in zip(parts, weights, strict=True)]
    return Cuts(size, starts, np.stack(shares).astype(np.float32))


def decode_in_tiles(
    decode: Callable[[jax.Array], jax.Array],
    latents: jax.Array,
    tile_size: int,
    downsampling: int,
) -> jax.Array:
    """What `decode` makes of the latents, tile after tile, so that memory is that of one tile.

    Where a tile covers all, that is `decode(latents)`. Else colours differ a little: GroupNorm and
    attention see one tile.

    Args:
      decode: latents (N, h, w, C) to pictures (N, h * downsampling, w * downsampling, 3).
      latents: (N, h, w, C).
      tile_size: latent positions a side, at least `MIN_TILE`.
      downsampling: pixels per latent position.

    Returns:
      Pictures (N, H, W, 3), float32 or better.
    """
    n, height, width, channels = latents.shape
    if height <= tile_size and width <= tile_size:
        return decode(latents)
    rows, columns = (cut(length, tile_size, downsampling) for length in (height, width))
    tile_shape = (n, rows.size, columns.size, channels)
    tile = jax.eval_shape(decode, jax.ShapeDtypeStruct(tile_shape, latents.dtype))
    i, j = (index.ravel() for index in np.indices((len(rows.starts), len(columns.starts))))
    tiles = (rows.starts[i], columns.starts[j], rows.weights[i], columns.weights[j])

    def step(pictures, item):
        top, left, row_weights, column_weights = item
        part = jax.lax.dynamic_slice(latents, (0, top, left, 0), tile_shape)
        weights = (row_weights[:, None] * column_weights)[..., None]
        part = decode(part) * weights.astype(tile.dtype)
        at = (0, top * downsampling, left * downsampling, 0)
        part += jax.lax.dynamic_slice(pictures, at, part.shape)
        return jax.lax.dynamic_update_slice(pictures, part, at), None

    shape = (n, height * downsampling, width * downsampling, tile.shape[-1])
    pictures, _ = jax.lax.scan(step, jnp.zeros(shape, tile.dtype), tiles)
    return pictures
