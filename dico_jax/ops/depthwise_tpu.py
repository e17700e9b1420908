"""Depthwise 3x3 convolution with GELU and its sum, and their gradient, as Pallas kernels for TPU.

A program holds whole images of up to 128 channels in VMEM and walks down their rows, so that every
array goes once between HBM and VMEM. Channels are lanes and never meet; in a last block that sticks
out of the array its lanes compute on whatever is there and are dropped.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dico_jax.ops.pallas_gelu import gelu, gelu_slope

_LANES = 128
_ROW_POSITIONS = 64  # in a row of all images of a program: 8 registers of float32
_MAX_VMEM = 15 * 2**20  # of the 16 MB that a kernel may use by default


def fits(shape: tuple[int, ...], dtype) -> bool:
    """Whether the kernels can hold an image (N, H, W, C) of `dtype` in VMEM."""
    return _vmem_of_image(shape, dtype) <= _MAX_VMEM


def _vmem_of_image(shape, dtype):
    _, height, width, _ = shape
    # x, dh and dx, each twice because the next block is loaded meanwhile, and dy in float32.
    return height * pl.cdiv(width, 8) * 8 * _LANES * (6 * jnp.dtype(dtype).itemsize + 4)


def conv_gelu_sum(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """H = GELU(depthwise convolution + bias), and its sum over positions.

    Args:
      x: (N, H, W, C), bfloat16 or float32, of a shape that `fits`.
      kernel: (3, 3, 1, C).
      bias: (C,).
      interpret: run by the Pallas interpreter, on any platform.

    Returns:
      h: (N, H, W, C) of x's dtype, computed in float32.
      sums: (N, C) float32, of h before it is rounded to x's dtype.
    """
    call = _Call(x, interpret)
    h, sums = call(
        _forward_kernel,
        [call.images, call.taps, call.bias],
        [call.images, call.sums],
        flops=40,
    )(x, *_taps_and_bias(kernel, bias))
    return h, sums[:, 0]


def conv_gelu_sum_grad(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, dh: jax.Array, dsums: jax.Array,
    *, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Gradient of `conv_gelu_sum`, which computes the convolution again.

    Args:
      x, kernel, bias, interpret: as of `conv_gelu_sum`.
      dh: (N, H, W, C) of x's dtype.
      dsums: (N, C) float32.

    Returns:
      dx (N, H, W, C) of x's dtype; dkernel (3, 3, 1, C) and dbias (C,), summed in float32.
    """
    call = _Call(x, interpret)
    dx, dtaps, dbias = call(
        _gradient_kernel,
        [call.images, call.taps, call.bias, call.images, call.sums],
        [call.images, call.taps, call.bias],
        scratch=[pltpu.VMEM(call.block_shape, jnp.float32)],
        flops=90,
    )(x, *_taps_and_bias(kernel, bias), dh, dsums[:, None])
    return dx, dtaps.reshape(kernel.shape), dbias[0]


class _Call:
    """`pallas_call` for images like x: its grid, and the arrays it knows with their blocks."""

    def __init__(self, x, interpret):
        n, height, width, channels = x.shape
        most = max(1, min(_ROW_POSITIONS // width, _MAX_VMEM // _vmem_of_image(x.shape, x.dtype)))
        count = max(k for k in range(1, min(n, most) + 1) if n % k == 0)
        lanes = min(channels, _LANES)
        self.interpret = interpret
        self.grid = pl.cdiv(channels, lanes), n // count  # all images of some channels in turn
        self.block_shape = count, height, width, lanes
        self.padded_size = x.size // channels * pl.cdiv(channels, _LANES) * _LANES

        def array(shape, dtype, block_shape, index_map):
            return jax.ShapeDtypeStruct(shape, dtype), pl.BlockSpec(block_shape, index_map)

        wide = jnp.float32
        self.images = array(x.shape, x.dtype, self.block_shape, lambda c, n: (n, 0, 0, c))
        self.sums = array((n, 1, channels), wide, (count, 1, lanes), lambda c, n: (n, 0, c))
        self.taps = array((9, channels), wide, (9, lanes), lambda c, n: (0, c))
        self.bias = array((1, channels), wide, (1, lanes), lambda c, n: (0, c))

    def __call__(self, kernel, inputs, outputs, *, flops, scratch=()):
        arrays = [*inputs, *outputs]
        # Lanes that fill up the last 128 lie in memory, and are moved, as others.
        moved = [self.padded_size if array is self.images else array[0].size for array in arrays]
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=[shape for shape, _ in outputs],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=flops * self.padded_size,
                transcendentals=2 * self.padded_size,
                bytes_accessed=sum(
                    size * array[0].dtype.itemsize
                    for size, array in zip(moved, arrays, strict=True)
                ),
            ),
            interpret=self.interpret,
        )


def _taps_and_bias(kernel, bias):
    return kernel.reshape(9, -1).astype(jnp.float32), bias[None].astype(jnp.float32)


def _load_taps(ref):
    return [[ref[3 * i + j : 3 * i + j + 1] for j in range(3)] for i in range(3)]


def _shifted(row):
    """(images, W, lanes) to the same at w - 1, w and w + 1, zero outside."""
    zero = jnp.zeros_like(row[:, :1])
    if row.shape[1] == 1:
        return zero, row, zero
    left = jnp.concatenate([zero, row[:, :-1]], axis=1)
    right = jnp.concatenate([row[:, 1:], zero], axis=1)
    return left, row, right


def _load_row(ref, h):
    return ref[:, h].astype(jnp.float32)


def _convolve_rows(load_shifted, taps, height: int, emit, state):
    """Walks down an image, reading every row once, and emits the rows of its 3x3 convolution.

    Args:
      load_shifted: row h to its values at w - 1, w and w + 1 (zero outside), float32.
      taps: taps[i][j] multiplies the row h + i - 1 at w + j - 1.
      height: number of rows, at least 1.
      emit: called as emit(h, row, state) with each row of the result; returns the next state.
      state: what emit is first called with, a tuple of arrays.
    """

    def weighted(i, shifted):
        return sum(tap * x for tap, x in zip(taps[i], shifted, strict=True))

    def step(h, carry):
        above, here, state = carry  # what rows before h gave to rows h - 1 and h
        shifted = load_shifted(h)
        state = emit(h - 1, above + weighted(2, shifted), state)
        return here + weighted(1, shifted), weighted(0, shifted), state

    first = load_shifted(0)
    carry = weighted(1, first), weighted(0, first), state
    last, _, state = lax.fori_loop(1, height, step, carry)
    return emit(height - 1, last, state)


def _rotated(taps):
    """The taps of the transposed convolution."""
    return [row[::-1] for row in taps[::-1]]


def _forward_kernel(x_ref, taps_ref, bias_ref, h_ref, sums_ref):
    bias = bias_ref[...]

    def emit(h, row, sums):
        row = gelu(row + bias)
        h_ref[:, h] = row.astype(h_ref.dtype)
        return sums + row

    count, height, width, lanes = x_ref.shape
    zeros = jnp.zeros((count, width, lanes), jnp.float32)
    sums = _convolve_rows(
        lambda h: _shifted(_load_row(x_ref, h)), _load_taps(taps_ref), height, emit, zeros
    )
    sums_ref[...] = jnp.sum(sums, axis=1, keepdims=True)


def _gradient_kernel(
    x_ref, taps_ref, bias_ref, dh_ref, dsums_ref, dx_ref, dtaps_ref, dbias_ref, dy_ref
):
    @pl.when(pl.program_id(1) == 0)
    def _():
        dtaps_ref[...] = jnp.zeros_like(dtaps_ref)
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    _, height, _, lanes = x_ref.shape
    taps, bias, dsums = _load_taps(taps_ref), bias_ref[...], dsums_ref[...]

    def total(row):
        return jnp.sum(row, axis=(0, 1))[None]

    def emit_dy(h, row, dbias):
        dy = (_load_row(dh_ref, h) + dsums) * gelu_slope(row + bias)
        dy_ref[:, h] = dy
        return dbias + total(dy)

    zero = jnp.zeros((1, lanes), jnp.float32)
    dbias_ref[...] += _convolve_rows(
        lambda h: _shifted(_load_row(x_ref, h)), taps, height, emit_dy, zero
    )

    def load_dy(h):
        shifted = _shifted(dy_ref[:, h])
        for i in range(3):  # dy at (h, w) met x at (h + i - 1, w + j - 1)
            source = h + i - 1
            inside = (source >= 0) & (source < height)
            row = _load_row(x_ref, jnp.clip(source, 0, height - 1))
            row = jnp.where(inside, row, 0.0)
            for j in range(3):
                dtaps_ref[3 * i + j : 3 * i + j + 1] += total(row * shifted[2 - j])
        return shifted

    def emit_dx(h, row, state):
        dx_ref[:, h] = row.astype(dx_ref.dtype)
        return state

    _convolve_rows(load_dy, _rotated(taps), height, emit_dx, ())
