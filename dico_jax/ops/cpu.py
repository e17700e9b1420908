"""All for XLA on CPU alone. Left alone it computes elementwise results again in every loop."""

import ctypes
import dataclasses
import functools
import importlib.util
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from dico_jax.ops.plain import Operation, direct_conv3x3, direct_kernel_gradient, zero_padded

# Elements of all operands from which on this pays: below, XLA's loops take as long as starting
# one, and programs of many small loops only compile slower.
LARGE = 2**18

Function = Callable[..., Any]


def apart(function: Function, *operands: jax.Array, on_cpu: Function | None = None) -> Any:
    """The arrays function(*operands), on CPU each computed once, by `on_cpu` if it is given.

    No sum over the batch may be inside: devices that split it would have to wait for each other.
    """
    if not _surely(lambda: sum(x.size for x in operands) >= LARGE):
        return function(*operands)
    return lax.platform_dependent(*operands, cpu=_not_inlined(on_cpu or function), default=function)


def _surely(test: Callable[[], bool]) -> bool:
    """Whether a test of sizes holds, whatever those are that an export leaves open."""
    try:
        return test()
    except jax.errors.InconclusiveDimensionOperation:
        return False


def _not_inlined(function):
    """The function as a call that XLA leaves as it is; it fuses nothing across a call."""

    def body(*operands):
        with set_xla_metadata(inlineable=None):  # for the call alone, not for what is in it
            return function(*operands)

    def call(*operands):
        with set_xla_metadata(inlineable="false"):
            return jax.jit(body, inline=False)(*operands)

    return call


def with_sums(function: Function, *operands: jax.Array) -> Any:
    """The arrays function(sums, *operands) as `apart`, with `Sums` that suit the platform."""
    plain, by_parts = (functools.partial(function, Sums(split)) for split in (False, True))
    return apart(plain, *operands, on_cpu=by_parts)


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of f(*arrays), arrays being (N, ..., C) or with 1 in place of a dimension."""

    by_parts: bool

    def over_positions(self, f: Function, *arrays: jax.Array) -> jax.Array:
        """The sum over all but the first and last axis, (N, C)."""
        x, parts = arrays[0], 8
        split = self.by_parts and x.ndim >= 3 and x.shape[-2] % parts == 0
        total = _part_sum(f, arrays, x.ndim - 2, parts) if split else f(*arrays)
        return total.sum(range(1, total.ndim - 1))

    def channel_mean(self, f: Function, *arrays: jax.Array) -> jax.Array:
        """The mean over channels, (N, ..., 1)."""
        x, size = arrays[0], 16
        channels = x.shape[-1]
        if not self.by_parts or channels % size:
            return f(*arrays).mean(-1, keepdims=True)
        total = _part_sum(f, arrays, x.ndim - 1, channels // size)
        return stored(total.sum(-1, keepdims=True) / channels)


def _part_sum(f, arrays, axis, parts):
    """Sum of f over equal parts of an axis, added element by element in one loop."""
    size = arrays[0].shape[axis] // parts

    def part(x, i):
        return x if x.shape[axis] == 1 else lax.slice_in_dim(x, i * size, (i + 1) * size, axis=axis)

    return stored(sum(f(*(part(x, i) for x in arrays)) for i in range(parts)))


def stored(x: jax.Array) -> jax.Array:
    """X, rounded to the precision it has: XLA for CPU ends there what it gives to its library."""
    kind = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)


# Winograd's F(2x2, 3x3): a tile of 2x2 results needs 4x4 inputs. With the matrices of Lavin and
# Gray (arXiv 1509.09308, section 4.1) it is A' [(G g G') * (B' d B)] A, for kernel g and inputs d;
# the product * of all tiles and channels is 16 matrix products. In float32 results differ from
# those of a sum of 9 products by 1e-6 of their peak.

# B', G and A'; for gradients, their transposes.
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_RESULT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
# The rows of _KERNEL for a kernel turned round: the first and the last change places.
_TURNED = [4 * a + b for a in (3, 1, 2, 0) for b in (3, 1, 2, 0)]


def winograd_pays(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether Winograd's is the faster way on CPU for x (N, H, W, C) and kernel (3, 3, C, D)."""
    _, height, width, channels = x.shape
    even = height % 2 == 0 and width % 2 == 0
    # Fewer positions do not outweigh the change of the kernel, nor, in all examples, a second more
    # of compilation for each convolution; fewer channels do not outweigh the change of x.
    large = height * width >= 64 and min(kernel.shape[2:]) >= 64
    large = large and _surely(lambda: x.size >= 1024 * channels)
    return even and large and jnp.finfo(x.dtype).bits >= 32


@Operation
def winograd_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`direct_conv3x3` with 16 multiplications for 4 results, not 36; H and W are even."""
    return direct_conv3x3(x, kernel)


def _winograd_fwd(x, kernel):
    kernels = apart(functools.partial(_transformed, _KERNEL), kernel)
    products = [v @ u for v, u in zip(_inputs(x), kernels, strict=True)]
    return _joined(apart(_of_products, *products)), (x, kernel, kernels)


@winograd_conv3x3.gradient(_winograd_fwd, primal=lambda *args: _winograd_fwd(*args)[0])
def _winograd_bwd(residuals, dy):
    x, kernel, kernels = residuals
    turned = [kernels[k] for k in _TURNED]
    tiles = dy.size // (4 * dy.shape[-1])
    gradient = _few_tiles_gradient if tiles <= dy.shape[-1] else _input_gradient
    return gradient(dy, turned), _kernel_gradient(x, kernel, dy)


def _transformed(matrix, parts):
    """Matrix @ parts @ matrix.T of arrays parts[i][j], as a tuple, row by row."""
    places = range(len(parts))

    def combined(row, column):
        factors = {(i, j): float(row[i] * column[j]) for i in places for j in places}
        terms = [(factor, parts[i][j]) for (i, j), factor in factors.items() if factor]
        return functools.reduce(operator.add, (factor * part for factor, part in terms))

    return tuple(combined(row, column) for row in matrix for column in matrix)


def _transformed_square(matrix, arrays):
    side = round(len(arrays) ** 0.5)
    return _transformed(matrix, [arrays[k : k + side] for k in range(0, len(arrays), side)])


def _of_products(*products):
    return _transformed_square(_RESULT, products)


def _inputs(x):
    """The 4x4 inputs of every tile, transformed: 16 times (N, H/2, W/2, C)."""
    four, (_, height, width, _) = range(4), x.shape

    def of_inputs(padded):
        parts = [[padded[:, i : i + height : 2, j : j + width : 2] for j in four] for i in four]
        return _transformed(_INPUT, parts)

    return apart(of_inputs, zero_padded(x))


def _joined(quarters):
    """Results (N, H/2, W/2, D) of the four places in a tile, row by row, as (N, H, W, D)."""
    n, h, w, d = quarters[0].shape
    y = jnp.stack(quarters, axis=3).reshape(n, h, w, 2, 2, d)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, d)


def _products(arrays, others, axis, other_axis):
    contracted = ((axis,), (other_axis,)), ((), ())
    return tuple(lax.dot_general(a, b, contracted) for a, b in zip(arrays, others, strict=True))


def _input_gradient(dy, kernels):
    return _joined(apart(_of_products, *_products(_inputs(dy), kernels, 3, 1)))


def _few_tiles_gradient(dy, kernels):
    """The same where bringing dy and the results into another order costs less than kernels."""

    def products(*operands):
        return _products(operands[:16], operands[16:], 1, 3)

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
        return jnp.stack(_transformed_square(_KERNEL.T, sums)).reshape(kernel.shape)

    sums = [product(v, w) for v, w in zip(_inputs(x), apart(of_results, dy), strict=True)]
    return apart(of_sums, *sums)


def compiler_options(platform: str) -> dict[str, int] | None:
    """Options of a jitted function that runs a network: on CPU it compiles in half the time.

    LLVM's further passes do not change the speed of networks, whose time is spent in libraries. A
    level that XLA_FLAGS names stays, and may round differently.
    """
    option = "xla_backend_optimization_level"
    named = option in os.environ.get("XLA_FLAGS", "")
    return {option: 1} if platform == "cpu" and not named else None


def use_all_cores(*, keep_memory: bool = False, fits: Callable[[int], bool] | None = None) -> None:
    """Makes devices of the cores where there is no accelerator; call it before JAX is used.

    At most 8, because every device has its own copy of the weights, and as many as fit. A number
    that XLA_FLAGS or JAX_NUM_CPU_DEVICES names stays. See `_keep_freed_memory` for `keep_memory`.
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
    if platforms := jax.config.values["jax_platforms"]:
        return platforms == "cpu"
    plugins = ("libtpu", "jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin")
    return not any(importlib.util.find_spec(plugin) for plugin in plugins)


def _keep_freed_memory() -> None:
    """Makes glibc's malloc keep what a run frees, in pages of 2 MB: a quarter of a step's time."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_max, arena_max, madv_hugepage = -1, -4, -8, 14  # malloc.h, mman.h
    libc.mallopt(trim_threshold, -1)  # never give memory back
    libc.mallopt(mmap_max, 0)  # nor take it apart from the heap,
    libc.mallopt(arena_max, 1)  # other threads' heaps are too small; it costs locks, so not always
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, pages = os.sysconf("SC_PAGESIZE"), os.sysconf("SC_PHYS_PAGES") // 2
    block = libc.malloc(pages * page)
    if block:  # else the system does not promise that much; naming pages touches none
        start = -(-block // page) * page
        libc.madvise(start, (pages - 1) * page, madv_hugepage)
        libc.free(block)
