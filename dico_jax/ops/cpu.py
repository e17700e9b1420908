"""All that exists for XLA on CPU alone: functions computed apart, Winograd, cores, memory.

Left alone, XLA for CPU computes an elementwise result again in every loop that reads it, and gives
sums to a library (YNNPACK) that adds a few elements at a time. `apart` and `with_sums` tell it what
to do, `winograd_conv3x3` does a dense 3x3 convolution with fewer multiplications, `use_all_cores`
sets up a process. On other platforms the plain functions run.
"""

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from dico_jax.ops.direct import direct_conv3x3, direct_kernel_gradient, zero_padded
from dico_jax.ops.plain import Operation

# Elements of all operands from which on this pays: below, XLA's loops take as long as starting
# one, and programs of many small loops only compile slower.
LARGE = 2**18

Function = Callable[..., Any]


class Sums(NamedTuple):
    """How sums are taken.

    Attributes:
      over_positions: (f, *arrays) to the sums (N, C) over positions of f(*arrays), all of them
        (N, ..., C), or with 1 in place of a dimension.
      channel_mean: (f, *arrays) to the means over channels (N, ..., 1).
    """

    over_positions: Function
    channel_mean: Function


def apart(function: Function, *operands: jax.Array, on_cpu: Function | None = None) -> Any:
    """The arrays function(*operands), each computed once on CPU, from operands computed once.

    Args:
      function: of arrays, to an array or a tuple of them. A sum over the batch does not belong into
        it: where devices split the batch, they would have to wait for each other inside.
      operands: arrays; where they are small, this is function(*operands).
      on_cpu: computed on CPU in the function's place, with the same results.
    """
    if sum(x.size for x in operands) < LARGE:
        return function(*operands)
    return lax.platform_dependent(*operands, cpu=_not_inlined(on_cpu or function), default=function)


def with_sums(function: Function, *operands: jax.Array) -> Any:
    """The arrays function(sums, *operands) as `apart`, with sums that suit the platform."""
    return apart(
        functools.partial(function, _PLAIN),
        *operands,
        on_cpu=functools.partial(function, _BY_PARTS),
    )


def stored(x: jax.Array) -> jax.Array:
    """X itself, where XLA for CPU ends what it gives to its library or takes from it.

    Rounding x to the precision that it has does that, and costs nothing elsewhere; an optimization
    barrier is dropped before.
    """
    kind = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)


def _not_inlined(function):
    """The function as a call that XLA leaves as it is; it fuses nothing across a call."""

    def body(*operands):
        with set_xla_metadata(inlineable=None):  # for the call alone, not for what is in it
            return function(*operands)

    def call(*operands):
        with set_xla_metadata(inlineable="false"):
            return jax.jit(body, inline=False)(*operands)

    return call


def _positions(x):
    return tuple(range(1, x.ndim - 1))


def _sum_over_positions(f, *arrays):
    total = f(*arrays)
    return total.sum(_positions(total))


def _channel_mean(f, *arrays):
    return f(*arrays).mean(-1, keepdims=True)


def _part_sum(f, arrays, axis, parts):
    """Sum of f over equal parts of an axis, added element by element in one loop."""
    size = arrays[0].shape[axis] // parts

    def part(x, i):
        return x if x.shape[axis] == 1 else lax.slice_in_dim(x, i * size, (i + 1) * size, axis=axis)

    return stored(sum(f(*(part(x, i) for x in arrays)) for i in range(parts)))


def _sum_over_positions_by_parts(f, *arrays, parts=8):
    x = arrays[0]
    if x.ndim < 3 or x.shape[-2] % parts:
        return _sum_over_positions(f, *arrays)
    return _sum_over_positions(lambda total: total, _part_sum(f, arrays, x.ndim - 2, parts))


def _channel_mean_by_parts(f, *arrays, size=16):
    channels = arrays[0].shape[-1]
    if channels % size:
        return _channel_mean(f, *arrays)
    total = _part_sum(f, arrays, arrays[0].ndim - 1, channels // size)
    return stored(total.sum(-1, keepdims=True) / channels)


_PLAIN = Sums(_sum_over_positions, _channel_mean)
_BY_PARTS = Sums(_sum_over_positions_by_parts, _channel_mean_by_parts)


# Winograd's F(2x2, 3x3): a tile of 2x2 results needs 4x4 inputs. With the matrices of Lavin and
# Gray (arXiv 1509.09308, section 4.1) it is A' [(G g G') * (B' d B)] A, for kernel g and inputs d;
# the product * of all tiles and channels is 16 matrix products. The matrices have no entry but 0,
# 1, -1 and 1/2: in float32 results differ from those of a sum of 9 products by 1e-6 of their peak.

# The matrices of inputs, kernels and results; for gradients, their transposes.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_RESULT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
# The rows of _KERNEL for a kernel turned round: the first and the last change places.
_TURNED = [4 * a + b for a in (3, 1, 2, 0) for b in (3, 1, 2, 0)]


def winograd_pays(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether Winograd's is the faster way on CPU for x (N, H, W, C) and kernel (3, 3, C, D)."""
    n, height, width, _ = x.shape
    even = height % 2 == 0 and width % 2 == 0
    # Fewer positions do not outweigh the change of the kernel, fewer channels that of x.
    large = n * height * width >= 512 and min(kernel.shape[2:]) >= 64
    return even and large and jnp.finfo(x.dtype).bits >= 32


@Operation
def winograd_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution with 16 multiplications for 4 results, not 36; zero padding 1, stride 1.

    Args:
      x: (N, H, W, C) activations, H and W even, float32 or better.
      kernel: (3, 3, C, D), dtype of x.

    Returns:
      (N, H, W, D) of x's dtype.
    """
    return direct_conv3x3(x, kernel)


def _winograd_fwd(x, kernel):
    kernels = apart(_of_kernel, kernel)
    products = [v @ u for v, u in zip(_inputs(x), kernels, strict=True)]
    return _joined(apart(_of_products, *products)), (x, kernel, kernels)


def _winograd_bwd(residuals, dy):
    x, kernel, kernels = residuals
    turned = [kernels[k] for k in _TURNED]
    tiles = dy.size // (4 * dy.shape[-1])
    gradient = _few_tiles_gradient if tiles <= dy.shape[-1] else _input_gradient
    return gradient(dy, turned), _kernel_gradient(x, kernel, dy)


winograd_conv3x3.defvjp(
    _winograd_fwd, _winograd_bwd, primal=lambda x, kernel: _winograd_fwd(x, kernel)[0]
)


def _transformed(matrix, parts):
    """Matrix @ parts @ matrix.T of arrays parts[i][j], as a tuple, row by row."""
    places = range(len(parts))

    def combined(row, column):
        terms = [
            (float(row[i] * column[j]), parts[i][j])
            for i in places
            for j in places
            if row[i] * column[j]
        ]
        total = terms[0][0] * terms[0][1]
        for factor, part in terms[1:]:
            total = total + factor * part
        return total

    return tuple(combined(row, column) for row in matrix for column in matrix)


def _square(arrays):
    side = round(len(arrays) ** 0.5)
    return [arrays[k : k + side] for k in range(0, len(arrays), side)]


def _of_kernel(kernel):
    return _transformed(_KERNEL, kernel)


def _of_products(*products):
    return _transformed(_RESULT, _square(products))


def _inputs(x):
    """The 4x4 inputs of every tile, transformed: 16 times (N, H/2, W/2, C)."""
    _, height, width, _ = x.shape

    def of_inputs(padded):
        parts = [
            [padded[:, i : i + height : 2, j : j + width : 2] for j in range(4)] for i in range(4)
        ]
        return _transformed(_INPUT, parts)

    return apart(of_inputs, zero_padded(x))


def _joined(quarters):
    """Results (N, H/2, W/2, D) of the four places in a tile, row by row, as (N, H, W, D)."""
    n, h, w, d = quarters[0].shape
    y = jnp.stack(quarters, axis=3).reshape(n, h, w, 2, 2, d)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, d)


def _input_gradient(dy, kernels):
    products = [
        lax.dot_general(v, u, (((3,), (1,)), ((), ())))
        for v, u in zip(_inputs(dy), kernels, strict=True)
    ]
    return _joined(apart(_of_products, *products))


def _few_tiles_gradient(dy, kernels):
    """The same where bringing dy and the results into another order costs less than kernels."""

    def products(*operands):
        return tuple(
            lax.dot_general(u, v, (((1,), (3,)), ((), ())))
            for u, v in zip(operands[:16], operands[16:], strict=True)
        )

    quarters = apart(_of_products, *apart(products, *kernels, *_inputs(dy)))
    return _joined([jnp.moveaxis(quarter, 0, -1) for quarter in quarters])


def _kernel_gradient(x, kernel, dy):
    tiles, channels = x.size // (4 * x.shape[-1]), min(kernel.shape[2:])
    if tiles < channels or channels < 128:  # 16 results would be larger, or change too much
        return direct_kernel_gradient(x, kernel, dy)

    def of_results(dy):
        return _transformed(_RESULT.T, [[dy[:, i::2, j::2] for j in range(2)] for i in range(2)])

    def product(v, w):
        v, w = v.reshape(-1, v.shape[-1]), w.reshape(-1, w.shape[-1])
        return lax.dot_general(v, w, (((0,), (0,)), ((), ())))

    def of_sums(*sums):
        return jnp.stack(_transformed(_KERNEL.T, _square(sums))).reshape(kernel.shape)

    sums = [product(v, w) for v, w in zip(_inputs(x), apart(of_results, dy), strict=True)]
    return apart(of_sums, *sums)


def use_all_cores(
    *, keep_memory: bool = False, fits: Callable[[int], bool] = lambda count: True
) -> None:
    """Makes devices of the cores where there is no accelerator; call it before JAX is used.

    Operations that XLA splits over threads leave cores idle between them; images that are split
    over devices do not. At most 8, because every device has its own copy of the weights. A number
    of devices that XLA_FLAGS or JAX_NUM_CPU_DEVICES names stays.

    Args:
      keep_memory: for programs that run again and again, and take the memory of their activations
        anew each time: have malloc keep it from run to run, in large pages. Does nothing where
        there is an accelerator, or no glibc.
      fits: whether so many devices can be used; the most that can are, one if none can.
    """
    named = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not named and jax.config.values["jax_num_cpu_devices"] == -1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        counts = range(min(cores or 1, 8), 0, -1)
        jax.config.update("jax_num_cpu_devices", next(filter(fits, counts), 1))
    if keep_memory and _cpu_only():
        _keep_freed_memory()


def copies_fit(size: int, count: int) -> bool:
    """Whether `count` copies of `size` bytes take no more than half of this machine's memory."""
    return count == 1 or 2 * size * count <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


def _cpu_only() -> bool:
    """Whether JAX will run on CPU, as far as can be told before it starts."""
    platforms = jax.config.values["jax_platforms"]
    if platforms:
        return platforms == "cpu"
    plugins = ("libtpu", "jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin")
    return not any(importlib.util.find_spec(plugin) for plugin in plugins)


def _keep_freed_memory() -> None:
    """Makes malloc keep what a run frees for the next one, where it is that of glibc.

    XLA takes the memory of all activations anew for every run. The kernel would clear every page
    of it again, which takes a quarter of a training step's time and a tenth of a forward pass's.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    libc.mallopt(trim_threshold, -1)  # never give memory back
    libc.mallopt(mmap_max, 0)  # nor take it apart from the heap,
    libc.mallopt(arena_max, 1)  # other threads' heaps are too small; it costs locks, so not always
    _ask_for_huge_pages(libc, os.sysconf("SC_PHYS_PAGES") // 2)


def _ask_for_huge_pages(libc: ctypes.CDLL, pages: int) -> None:
    """Lets the kernel back the heap's next `pages` pages by pages of 2 MB.

    They are named while malloc has them, which touches none; the heap keeps their addresses.
    Strided reads of an array miss fewer of them, and a page taken for the first time costs less.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, madv_hugepage = os.sysconf("SC_PAGESIZE"), 14
    block = libc.malloc(pages * page)
    if block:  # else the system does not promise that much: all works, with small pages
        start = -(-block // page) * page
        libc.madvise(start, (pages - 1) * page, madv_hugepage)
        libc.free(block)
