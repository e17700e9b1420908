"""Depthwise 3x3 convolution with GELU and its sum, and their gradient, as Pallas Triton kernels.

A program makes a tile of one image, 4 rows of 8 columns by 64 channels, or several tiles in turn.
It loads all that a tile needs before it computes, each row three times, shifted by a column;
repeated reads come from the caches. Blocks are powers of two: what lies outside the image is
masked. For GPUs of compute capability 8.0 and up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dico_jax.ops.pallas_gelu import gelu, gelu_slope

_ROWS, _COLUMNS, _CHANNELS = 4, 8, 64  # of a tile; 64 channels are 128 bytes of bfloat16
_WARPS = 4
_GRADIENT_TILES = 8  # of a program, to have fewer partial sums of the kernel's gradient


def conv(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Depthwise convolution + bias of x (N, H, W, C), kernel (3, 3, 1, C), bias (C,)."""
    return _forward(x, kernel, bias, False, interpret)[0]


def conv_gelu_sum(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """GELU of the depthwise convolution + bias, and its sum over positions.

    Args:
      x: (N, H, W, C), bfloat16 or float32.
      kernel: (3, 3, 1, C).
      bias: (C,).
      interpret: run by the Pallas interpreter, on any platform.

    Returns:
      h: (N, H, W, C) of x's dtype, computed in float32.
      sums: (N, C) float32, of h before it is rounded to x's dtype.
    """
    h, sums = _forward(x, kernel, bias, True, interpret)
    return h, sums.sum(1)


def conv_gelu_sum_grad(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, dh: jax.Array, dsums: jax.Array,
    *, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradient of `conv_gelu_sum`, which computes the convolution again.

    What reaches the convolution is written once, in x's dtype, and convolved by a second kernel:
    programs cannot see their neighbours' columns of it.

    Args:
      x, kernel, bias, interpret: as of `conv_gelu_sum`.
      dh: (N, H, W, C) of x's dtype.
      dsums: (N, C) float32.

    Returns:
      dx (N, H, W, C) of x's dtype; dkernel (3, 3, 1, C) and dbias (C,), summed in float32.
    """
    n, _, _, channels = x.shape
    grid = _grid(x, _GRADIENT_TILES)
    dy, partial = _call(
        _gradient_kernel,
        grid,
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((n, grid[1], 10, channels), jnp.float32),
        ],
        interpret,
    )(x, *_taps_and_bias(kernel, bias), dh, dsums)
    total = partial.sum((0, 1))
    dx = conv(dy, kernel[::-1, ::-1], jnp.zeros_like(bias), interpret=interpret)
    return dx, total[:9].reshape(kernel.shape), total[9]


def _forward(x, kernel, bias, activated, interpret):
    n, _, _, channels = x.shape
    grid = _grid(x, 1)
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    if activated:
        out_shape.append(jax.ShapeDtypeStruct((n, grid[1], channels), jnp.float32))
    call = _call(_forward_kernel, grid, out_shape, interpret)
    return call(x, *_taps_and_bias(kernel, bias))


def _grid(x, tiles_of_program):
    n, height, width, channels = x.shape
    tiles = pl.cdiv(height, _ROWS) * pl.cdiv(width, _COLUMNS)
    return n, pl.cdiv(tiles, tiles_of_program), pl.cdiv(channels, _CHANNELS)


def _call(kernel, grid, out_shape, interpret):
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
    )


def _taps_and_bias(kernel, bias):
    return kernel.reshape(9, -1).astype(jnp.float32), bias.astype(jnp.float32)


class _Program:
    """The image and the channels of a program: masked access to vectors of channels."""

    def __init__(self, x_ref):
        self.image, self.number = pl.program_id(0), pl.program_id(1)
        self.channels = pl.program_id(2) * _CHANNELS + jnp.arange(_CHANNELS)
        self.known = self.channels < x_ref.shape[-1]

    def load_vector(self, ref, *index):
        place = ref.at[(*index, self.channels)]
        return plgpu.load(place, mask=self.known, other=0)[None]

    def load_taps(self, ref):
        return [self.load_vector(ref, k) for k in range(9)]

    def store_sum(self, ref, values, *index):
        """The sum over columns of (columns, channels)."""
        place = ref.at[(self.image, self.number, *index, self.channels)]
        plgpu.store(place, values.sum(0), mask=self.known)


class _Tile:
    """Tile number `index` of the image of a program: masked access to arrays like x."""

    def __init__(self, program, index, x_ref):
        _, self.height, self.width, _ = x_ref.shape
        self.program = program
        across = pl.cdiv(self.width, _COLUMNS)
        self.first_row = index // across * _ROWS
        self.columns = index % across * _COLUMNS + jnp.arange(_COLUMNS)[:, None]

    def _inside(self, row, shift=0):
        row, columns = self.first_row + row, self.columns + shift
        inside = (row >= 0) & (row < self.height) & (columns >= 0) & (columns < self.width)
        return inside & self.program.known[None]

    def _place(self, ref, row, shift=0):
        channels = self.program.channels[None]
        return ref.at[self.program.image, self.first_row + row, self.columns + shift, channels]

    def load(self, ref, row, shift=0):
        """A row of the tile, shifted along columns: (columns, channels), zero outside the image."""
        return plgpu.load(self._place(ref, row, shift), mask=self._inside(row, shift), other=0)

    def load_neighbours(self, ref):
        """near[i][j]: row i - 1 of the tile, shifted by j - 1 columns."""
        return [[self.load(ref, i - 1, j - 1) for j in range(3)] for i in range(_ROWS + 2)]

    def store(self, ref, row, values):
        plgpu.store(self._place(ref, row), values.astype(ref.dtype), mask=self._inside(row))

    def clear_outside(self, row, values):
        return jnp.where(self._inside(row), values, 0.0)


def _window(near, row):
    """The nine values around each position of a row of the tile, float32."""
    return [near[row + i][j].astype(jnp.float32) for i in range(3) for j in range(3)]


def _weighted(taps, window):
    return sum(tap * x for tap, x in zip(taps, window, strict=True))


def _forward_kernel(x_ref, taps_ref, bias_ref, h_ref, sums_ref=None):
    """With sums the activated convolution, without them the plain one."""
    program = _Program(x_ref)
    tile = _Tile(program, program.number, x_ref)
    near = tile.load_neighbours(x_ref)
    taps, bias = program.load_taps(taps_ref), program.load_vector(bias_ref)
    total = jnp.zeros((_COLUMNS, _CHANNELS), jnp.float32)
    for row in range(_ROWS):
        y = bias + _weighted(taps, _window(near, row))
        if sums_ref is not None:
            y = gelu(y)
            total += tile.clear_outside(row, y)
        tile.store(h_ref, row, y)
    if sums_ref is not None:
        program.store_sum(sums_ref, total)


def _gradient_kernel(x_ref, taps_ref, bias_ref, dh_ref, dsums_ref, dy_ref, partial_ref):
    program = _Program(x_ref)
    taps, bias = program.load_taps(taps_ref), program.load_vector(bias_ref)
    dsums = program.load_vector(dsums_ref, program.image)

    def add_tile(k, totals):
        tile = _Tile(program, program.number * _GRADIENT_TILES + k, x_ref)
        near = tile.load_neighbours(x_ref)
        dh = [tile.load(dh_ref, row) for row in range(_ROWS)]
        for row in range(_ROWS):
            window = _window(near, row)
            slope = gelu_slope(bias + _weighted(taps, window))
            dy = tile.clear_outside(row, (dh[row].astype(jnp.float32) + dsums) * slope)
            tile.store(dy_ref, row, dy)
            totals = [a + x * dy for a, x in zip(totals, [*window, 1.0], strict=True)]
        return totals

    zeros = jnp.zeros((_COLUMNS, _CHANNELS), jnp.float32)
    totals = lax.fori_loop(0, _GRADIENT_TILES, add_tile, [zeros] * 10)
    for k, values in enumerate(totals):
        program.store_sum(partial_ref, values, k)
