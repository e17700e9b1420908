"""Names and layouts of parameters: this project's trees against PyTorch state dicts.

Modules carry the published names (see `dico_jax.models.layers`), so a name is the path joined with
dots, and only the leaf is renamed. A network's `KeyMap` says the rest. Layouts:

  Flax leaf                        PyTorch tensor
  kernel (in, out)                 weight: linear (out, in), or 1x1 convolution (out, in, 1, 1)
  kernel (kh, kw, in/groups, out)  weight: convolution (out, in/groups, kh, kw)
  embedding (rows, width)          weight, the same
  bias (width,)                    bias, the same
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from dico_jax.errors import UsageError

_LEAF_NAMES = {"kernel": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """How a network's state dict differs from the plain rules above.

    Attributes:
      conv1x1: matches the names of modules whose (in, out) kernel PyTorch keeps as a convolution.
      constants: tensors of the state dict that follow from the architecture and are no weights.
    """

    conv1x1: re.Pattern
    constants: frozenset[str] = frozenset()


KEY_MAPS = {
    "DiCo": KeyMap(re.compile(r"(^|\.)(conv[1345]|ca\.1|reduce_chan_level[12])$")),
    "DiT": KeyMap(re.compile(r"(?!)"), frozenset({"pos_embed"})),  # no 1x1 convolutions
}


def torch_key(path: tuple[str, ...]) -> str:
    """The state dict key of a parameter path: ("latent", "0", "conv1", "kernel") and so on."""
    return ".".join([*path[:-1], _LEAF_NAMES[path[-1]]])


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...], key_map: KeyMap) -> tuple[int, ...]:
    """The shape in the state dict of the parameter at `path` that has `shape` here."""
    if path[-1] != "kernel":
        return shape
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    is_conv = key_map.conv1x1.search(".".join(path[:-1]))
    return (shape[1], shape[0], 1, 1) if is_conv else (shape[1], shape[0])


def state_dict_shapes(abstract_params: Any, key_map: KeyMap) -> dict[str, tuple[int, ...]]:
    """Key to PyTorch shape of every parameter of a tree of arrays or ShapeDtypeStructs."""
    flat = flax.traverse_util.flatten_dict(abstract_params)
    return {torch_key(p): torch_shape(p, v.shape, key_map) for p, v in flat.items()}


def to_jax_layout(value: np.ndarray, path: tuple[str, ...], rank: int) -> np.ndarray:
    """A state dict tensor in the layout of the Flax leaf of `rank` at `path`, as a view."""
    if path[-1] != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if rank == 4 else value.reshape(value.shape[:2]).T


def to_torch_layout(value: np.ndarray, path: tuple[str, ...], key_map: KeyMap) -> np.ndarray:
    """The Flax leaf at `path` in the layout of the state dict, contiguous."""
    if path[-1] == "kernel":
        shape = torch_shape(path, value.shape, key_map)
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T.reshape(shape)
    return np.ascontiguousarray(value)


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], abstract_params: Any, key_map: KeyMap
) -> Any:
    """The parameter tree of a PyTorch state dict.

    Args:
      state_dict: key to array, in PyTorch's names and layouts.
      abstract_params: the tree to fill (arrays or ShapeDtypeStructs), see
        `dico_jax.models.abstract_params`.
      key_map: of the network's family, from `KEY_MAPS`.

    Returns:
      A tree like `abstract_params` of NumPy arrays (views where possible), dtypes unchanged.

    Raises:
      UsageError: tensors are missing, left over or of another shape; all of them are listed.
    """
    flat = flax.traverse_util.flatten_dict(abstract_params)
    unused = set(state_dict) - key_map.constants
    problems, out = [], {}
    for path, target in flat.items():
        key, shape = torch_key(path), torch_shape(path, target.shape, key_map)
        if key not in state_dict:
            close = difflib.get_close_matches(key, state_dict, n=1)
            problems.append(f"missing {key}" + (f" (closest: {close[0]})" if close else ""))
            continue
        unused.discard(key)
        value = np.asarray(state_dict[key])
        if value.shape != shape:
            problems.append(f"{key} is {value.shape} instead of {shape}")
            continue
        out[path] = to_jax_layout(value, path, len(target.shape))
    problems += [f"unexpected {key}" for key in sorted(unused)]
    if problems:
        raise UsageError("the weights do not fit the model: " + "; ".join(problems))
    return flax.traverse_util.unflatten_dict(out)


def to_state_dict(params: Any, key_map: KeyMap) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a parameter tree, without the constants; dtypes unchanged."""
    flat = flax.traverse_util.flatten_dict(params)
    return {torch_key(p): to_torch_layout(np.asarray(v), p, key_map) for p, v in flat.items()}
