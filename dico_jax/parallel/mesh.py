"""The mesh of devices and how arrays lie on it.

Axes: "data" (every device has a whole copy of the state), "fsdp" (devices share the state and split
the batch as well), "tensor" (devices share the channels of a layer and see the same examples).
"""

import ctypes
import dataclasses
import importlib.util
import math
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dico_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def use_all_cores(*, keep_memory: bool = False) -> None:
    """Makes devices of the cores where there is no accelerator; call it before JAX is used.

    Operations that XLA splits over threads leave cores idle between them; images that are split
    over devices do not. At most 8, because every device has its own copy of the weights. A number
    of devices that XLA_FLAGS names stays.

    Args:
      keep_memory: for programs that run again and again, and take the memory of their activations
        anew each time: have malloc keep it from run to run, in large pages. Does nothing where
        there is an accelerator, or no glibc.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", min(cores or 1, 8))
    if keep_memory and _cpu_only():
        _keep_freed_memory()


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


def create_mesh(devices=None, *, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices, or the given ones.

    Devices lie process by process, so that a process feeds one block of rows of every batch, and
    devices that share a layer ("tensor") are on one host as far as it goes.

    Args:
      devices: all of `jax.devices()` if None.
      data, fsdp, tensor: sizes of the axes; -1 for data takes what the others leave.

    Raises:
      UsageError: the sizes do not multiply to the number of devices.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id)
    )
    count, rest = len(devices), fsdp * tensor
    sizes = f"mesh.data={data}, config.mesh.fsdp={fsdp} and config.mesh.tensor={tensor}"
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise UsageError(f"{sizes} must be at least 1 (data may be -1: what is left)")
    if count % rest or data not in (-1, count // rest):
        raise UsageError(f"{sizes} do not fit {count} devices: their product must be {count}")
    return Mesh(np.asarray(devices).reshape(-1, fsdp, tensor), AXES)


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over the axes "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class DataShard:
    """Which of `count` equal blocks of rows of every batch is `index`."""

    index: int
    count: int


def data_shard(sharding: NamedSharding) -> DataShard:
    """The block of rows of every batch, lying by `batch_sharding`, that this process has to feed.

    Processes whose devices share all examples (by "tensor") feed the same block.
    """
    shards = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)
    slices = sharding.addressable_devices_indices_map((shards,)).values()
    rows = sorted({index[0].indices(shards)[0] for index in slices if index is not None})
    assert rows == list(range(rows[0], rows[0] + len(rows))), "devices lie process by process"
    return DataShard(rows[0] // len(rows), shards // len(rows))


def check_batch_size(batch_size: int, num_shards: int, field: str = "data.batch_size") -> None:
    """Raises UsageError unless a batch can be split over the devices."""
    if batch_size < 1 or batch_size % num_shards:
        below = max(batch_size, 0) // num_shards * num_shards
        choices = [str(b) for b in (below, below + num_shards) if b > 0]
        raise UsageError(
            f"{field}={batch_size} does not divide over {num_shards} devices: "
            f"use {' or '.join(choices)}"
        )


def to_global(batch: Any, sharding: NamedSharding) -> Any:
    """A tree of this process's rows of a batch (NumPy) as global arrays, split by `sharding`."""
    count = data_shard(sharding).count

    def put(x):
        shape = (len(x) * count, *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, batch)


def from_same(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A NumPy array that every process has, as a global array of any sharding."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
