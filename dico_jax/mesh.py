"""The mesh of devices and how arrays lie on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dico_jax.errors import UsageError

DATA_AXIS = "data"


def create_mesh(devices=None) -> Mesh:
    """A mesh of all devices (or the given ones) along one axis, over which batches are split."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (DATA_AXIS,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, num_devices: int, field: str = "data.batch_size") -> None:
    """Raises UsageError unless a batch can be split over the devices."""
    if batch_size < 1 or batch_size % num_devices:
        below = max(batch_size, 0) // num_devices * num_devices
        choices = [str(b) for b in (below, below + num_devices) if b > 0]
        raise UsageError(
            f"{field}={batch_size} does not divide over {num_devices} devices: "
            f"use {' or '.join(choices)}"
        )


def to_global(batch, sharding: NamedSharding):
    """A tree of this process's NumPy arrays as global arrays, split along the first axis."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
