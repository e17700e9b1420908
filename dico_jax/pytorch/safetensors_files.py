"""Weights in .safetensors files, and in several of them with an index.

The safetensors library reads headers and checks them. Tensors follow them without gaps, in the
order of their offsets, and are read as those of other files are: the library lacks 8-bit floats for
NumPy. Its writer would hold all tensors in memory, order metadata differently in every process, and
make files that only their owner may read; so the header is written here.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors

from dico_jax.errors import UsageError
from dico_jax.files import Deferred, new_file, write_array
from dico_jax.pytorch import tensors as stored
from dico_jax.pytorch.tensors import AGAIN, DTYPES, InputFile, shown

_MAX_TENSORS = 20_000
# Such as F32, BF16, U8, BOOL, F8_E4M3.
_CODES = {
    name: re.sub("(f|u|i)(loat|int|nt)", r"\1", name).upper().removesuffix("FN") for name in DTYPES
}
_DTYPES = {code: DTYPES[name] for name, code in _CODES.items()}


def read_safetensors(file: InputFile) -> tuple[dict[str, Deferred], dict[str, str]]:
    """The tensors of a .safetensors file by name, in the order of their data; its metadata."""
    if file.read(0, min(file.size, 4)) == b"PK\3\4":
        raise UsageError(f"{file.name} is a PyTorch zip, not safetensors; rename it to .pt")
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    if not 2 <= length <= min(file.size - 8, stored.MAX_JSON):
        file.refuse_placeholder()
        what = f"its header cannot be {length} bytes of {file.size}"
        raise UsageError(f"{file.name} is cut short or not safetensors: {what}; {AGAIN}")
    tensors: dict[str, Deferred] = {}
    at = 8 + length
    with (
        stored.refusing(file.name),
        safetensors.safe_open(file.name, "np", backend="pread") as header,
    ):
        if len(header.offset_keys()) > _MAX_TENSORS:
            raise ValueError(f"it has over {_MAX_TENSORS} tensors, far more than any checkpoint")
        for name in header.offset_keys():
            part = header.get_slice(name)
            code, shape = part.get_dtype(), tuple(part.get_shape())
            if code not in _DTYPES:
                known = ", ".join(_DTYPES)
                raise ValueError(f"tensor {shown(name)} is {code}; what is read are {known}")
            nbytes = math.prod(shape) * _DTYPES[code].itemsize
            tensors[name] = stored.tensor(stored.Blob(file, name, at, nbytes), _DTYPES[code], shape)
            at += nbytes
        metadata = header.metadata() or {}
    return tensors, metadata


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Writes weights that the safetensors library, and so PyTorch code, reads.

    The file appears when it is whole. Wide dtypes come first, so that all tensors are aligned.

    Args:
      path: the file to write; an older one is replaced.
      tensors: by name: arrays (also of JAX) or `Deferred`, made one at a time, of `DTYPES`.
      metadata: strings by name; by default {"format": "pt"}, which some readers want to see.
      on_bytes: called with the number of bytes whenever some were written.
    """
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    for name in (*metadata, *metadata.values(), *tensors):
        if not isinstance(name, str) or (name == "__metadata__" and name in tensors):
            raise ValueError(f"nothing in .safetensors, metadata included, can be named {name!r}")
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name in order:
        dtype, shape = np.dtype(tensors[name].dtype), [int(d) for d in tensors[name].shape]
        end = at + math.prod(shape) * dtype.itemsize
        code = _CODES[stored.dtype_name(dtype)]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            write_array(stream, tensors[name], on_bytes, name)


def files_of(path: str) -> list[str]:
    """A file of weights, and the shards that it lists where it is an index."""
    shards = set(weight_map(path).values()) if path.endswith(".json") else ()
    return [path, *(os.path.join(os.path.dirname(path), name) for name in sorted(shards))]


def weight_map(index_path: str) -> dict[str, str]:
    """The file of each tensor, from an index; all are names of files beside it."""
    files = stored.json_object(index_path).get("weight_map")
    if not isinstance(files, dict) or not files or {type(v) for v in files.values()} != {str}:
        raise UsageError(f"{index_path}: weight_map is {shown(files)}, not file names by tensor")
    for name in dict.fromkeys(files.values()):
        if re.search(r"[/\\:\0]", name) or not name.endswith((".safetensors", ".bin")):
            fix = "is not a file in the index's own folder, .safetensors or .bin: refused"
            raise UsageError(f"{index_path}: the shard {shown(name)} {fix}")
    return files
