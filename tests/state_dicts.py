"""Parameter trees against state dicts of arrays, all in memory, for tests."""

from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from dico_jax.pytorch.key_maps import KeyMap, check_tensors, entries, known_names


def state_dict_shapes(abstract_params: Any, key_map: KeyMap) -> dict[str, tuple[int, ...]]:
    """Key to PyTorch shape of every parameter, in the state dict's order, without constants."""
    return {entry.key: entry.torch_shape for entry in entries(abstract_params, key_map)}


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], abstract_params: Any, key_map: KeyMap
) -> Any:
    """The parameter tree of a PyTorch state dict, key to array in PyTorch's names and layouts.

    It is like `abstract_params`, of NumPy arrays (views where possible), dtypes unchanged.
    UsageError: tensors are missing, left over or of another shape; all of them are listed.
    """
    wanted, tensors = entries(abstract_params, key_map), known_names(state_dict, key_map)
    arrays = {key: np.asarray(value) for key, value in tensors.items()}
    check_tensors(arrays, wanted, key_map)
    return flax.traverse_util.unflatten_dict(
        {entry.path: entry.to_jax(arrays[entry.key]) for entry in wanted}
    )


def to_state_dict(params: Any, key_map: KeyMap) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a parameter tree, without the constants; dtypes unchanged."""
    flat = flax.traverse_util.flatten_dict(params)
    return {
        entry.key: entry.to_torch(np.asarray(flat[entry.path]))
        for entry in entries(params, key_map)
    }
