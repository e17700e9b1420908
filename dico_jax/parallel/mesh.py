"""The mesh of devices and how arrays lie on it.

Axes: "data" (whole copies of the state), "fsdp" (shares of it), "tensor" (shares of channels).
"""

from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from dico_jax.errors import UsageError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def create_mesh(devices: Any = None, *, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices, or the given ones; -1 for data takes what the others leave.

    Of a number of devices, which need not be there, it is one that nothing can run on.
    """
    # Process by process: each feeds a block of rows, and "tensor" stays on one host.
    if not (is_number := isinstance(devices, int)):
        devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    count = devices if is_number else len(devices)
    if not mesh_fits(count, 0, data=data, fsdp=fsdp, tensor=tensor):
        sizes = f"mesh.data={data}, config.mesh.fsdp={fsdp} and config.mesh.tensor={tensor}"
        fix = "give sizes of at least 1 (data may be -1) whose product is that number"
        raise UsageError(f"{sizes} do not fit {count} devices: {fix}")
    if is_number:
        return cast(Mesh, AbstractMesh((count // (fsdp * tensor), fsdp, tensor), AXES))
    return Mesh(np.asarray(devices).reshape(-1, fsdp, tensor), AXES)


def mesh_fits(count: int, batch_size: int, *, data=-1, fsdp=1, tensor=1) -> bool:
    """Whether `create_mesh` makes a mesh of so many devices, over which a batch can be split."""
    rest = fsdp * tensor
    fits = min(fsdp, tensor) > 0 and count % rest == 0 and data in (-1, count // rest)
    return fits and batch_size % (count // tensor) == 0


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over the axes "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_shard(sharding: NamedSharding) -> tuple[int, int]:
    """Which block of rows of every batch this process has to feed, of how many equal ones."""
    shards = num_batch_shards(sharding.mesh)
    slices = sharding.addressable_devices_indices_map((shards,)).values()
    rows = sorted({index[0].indices(shards)[0] for index in slices if index is not None})
    assert rows == list(range(rows[0], rows[0] + len(rows))), "devices lie process by process"
    return rows[0] // len(rows), shards // len(rows)


def check_batch_size(batch_size: int, num_shards: int, field: str = "data.batch_size") -> None:
    """Raises UsageError unless a batch can be split over the devices."""
    if batch_size < 1 or batch_size % num_shards:
        below = max(batch_size, 0) // num_shards * num_shards
        sizes = " or ".join(str(b) for b in (below, below + num_shards) if b > 0)
        fix = f"does not divide over {num_shards} devices: use {sizes}"
        raise UsageError(field, batch_size, fix)


def to_global(batch: Any, sharding: NamedSharding) -> Any:
    """A tree of this process's rows of a batch (NumPy) as global arrays, split by `sharding`."""
    count, put = data_shard(sharding)[1], jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: put(sharding, x, (len(x) * count, *x.shape[1:])), batch)


def from_same(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """A NumPy array that every process has, as a global array of any sharding."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
