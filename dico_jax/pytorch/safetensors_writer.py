"""Weights as .safetensors files, single or sharded, written tensor by tensor.

The format is described in `dico_jax.pytorch.safetensors_reader`. The header is padded with spaces
and wide dtypes come first, so that every tensor is aligned to its own item size, as the safetensors
library does.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dico_jax.files import new_file, write_array
from dico_jax.pytorch.safetensors_reader import SAFETENSORS_DTYPES
from dico_jax.pytorch.tensor_refs import dtype_name

_CODES = {name: code for code, name in SAFETENSORS_DTYPES.items()}


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_bytes: int | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> list[str]:
    """Writes weights that the safetensors library, and so PyTorch code, reads.

    Files appear when they are whole; when anything fails, none of this call is left.

    Args:
      path: the file to write, usually `*.safetensors`; an older one is replaced.
      tensors: by name: arrays (also of JAX), or lazy ones (`LazyTensor`: a TensorRef, a Deferred),
        which are made one at a time. Their dtypes are those of `DTYPES`.
      metadata: strings by name for `__metadata__`; by default {"format": "pt"}, which some
        readers want to see.
      max_shard_bytes: with more bytes of tensors than this, write `STEM-00001-of-0000N.safetensors`
        and the index `STEM.safetensors.index.json` in place of `path`. A tensor is never cut, so
        one that is larger has a shard of its own.
      on_bytes: called with the number of bytes whenever some were written.

    Returns:
      The paths written, an index last.

    Raises:
      UsageError: the folder is missing, not writable or full.
      TypeError: a dtype that is none of `DTYPES`.
      ValueError: a name that is no string, or a lazy tensor that is not what it had announced.
    """
    path = os.fspath(path)
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    _check_names(tensors, metadata)
    shards = _split(tensors, max_shard_bytes)
    if len(shards) <= 1:
        _write_one(path, tensors, metadata, on_bytes)
        return [path]
    stem = path.removesuffix(".safetensors")
    paths = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    index = _index(paths, shards)
    with contextlib.ExitStack() as written:  # removes them, should a later one fail
        for shard_path, shard in zip(paths, shards, strict=True):
            _write_one(shard_path, shard, metadata, on_bytes)
            written.callback(os.unlink, shard_path)
        # Last: whoever sees the index finds all of its shards.
        index_path = f"{stem}.safetensors.index.json"
        with new_file(index_path) as stream:
            stream.write(index)
        written.pop_all()
    return [*paths, index_path]


def _nbytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _check_names(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    for name in tensors:
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"a tensor cannot be named {name!r} in a .safetensors file")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata of .safetensors are strings, not {key!r}: {value!r}")


def _split(tensors: Mapping[str, Any], max_bytes: int | None) -> list[dict[str, Any]]:
    """The tensors in shards of at most `max_bytes`, in their order."""
    shards: list[dict[str, Any]] = []
    filled = 0
    for name, tensor in tensors.items():
        size = _nbytes(tensor)
        if not shards or (max_bytes is not None and filled + size > max_bytes and shards[-1]):
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    return shards


def _index(paths: list[str], shards: list[dict[str, Any]]) -> bytes:
    total = sum(_nbytes(t) for shard in shards for t in shard.values())
    files = {
        name: os.path.basename(path)
        for path, shard in zip(paths, shards, strict=True)
        for name in shard
    }
    index = {"metadata": {"total_size": total}, "weight_map": files}
    return (json.dumps(index, indent=2) + "\n").encode()


def _write_one(
    path: str,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], object] | None,
) -> None:
    """Writes one file of the tensors."""
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + _nbytes(tensor)
        shape = [int(d) for d in tensor.shape]
        header[name] = {
            "dtype": _CODES[dtype_name(tensor.dtype)],
            "shape": shape,
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            write_array(stream, tensors[name], on_bytes, name)
