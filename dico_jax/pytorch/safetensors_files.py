"""Weights in .safetensors files, and in several of them with an index.

The safetensors library reads headers and checks them. Tensors follow them without gaps, in the
order of their offsets, and are read as those of other files are: the library lacks 8-bit floats for
NumPy. Its writer would hold all tensors in memory, order metadata differently in every process, and
make files that only their owner may read; so the header is written here.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors

from dico_jax.errors import UsageError
from dico_jax.files import Deferred, new_file, write_array
from dico_jax.pytorch.tensors import (
    AGAIN,
    DTYPES,
    Blob,
    InputFile,
    dtype_name,
    refusing,
    shown,
    tensor,
)

_CODES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "bool": "BOOL",
    **{f"float{bits}": f"F{bits}" for bits in (32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_DTYPES = {code: DTYPES[name] for name, code in _CODES.items()}
_MAX_JSON = 16 << 20  # bytes; 100,000 tensors take about ten million


def read_safetensors(file: InputFile) -> tuple[dict[str, Deferred], dict[str, str]]:
    """The tensors of a .safetensors file by name, in the order of their data; its metadata."""
    if file.read(0, min(file.size, 4)) == b"PK\3\4":
        raise UsageError(f"{file.name} is a PyTorch zip, not safetensors; rename it to .pt")
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    if not 2 <= length <= min(file.size - 8, _MAX_JSON):
        file.refuse_placeholder()
        what = f"its header cannot be {length} bytes of {file.size}"
        raise UsageError(f"{file.name} is cut short or not safetensors: {what}; {AGAIN}")
    tensors: dict[str, Deferred] = {}
    at = 8 + length
    with refusing(file.name), safetensors.safe_open(file.name, "np", backend="pread") as header:
        for name in header.offset_keys():
            part = header.get_slice(name)
            code, shape = part.get_dtype(), tuple(part.get_shape())
            if code not in _DTYPES:
                known = ", ".join(_DTYPES)
                raise ValueError(f"tensor {shown(name)} is {code}; what is read are {known}")
            nbytes = math.prod(shape) * _DTYPES[code].itemsize
            tensors[name] = tensor(Blob(file, name, at, nbytes), _DTYPES[code], shape)
            at += nbytes
        if at != file.size:
            raise ValueError(f"its tensors end at byte {at} of {file.size}")
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
        code = _CODES[dtype_name(dtype)]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            write_array(stream, tensors[name], on_bytes, name)


# Sharded files: an index is a JSON object whose "weight_map" gives the file of each tensor.


def read_sharded(
    index_path: str, on_bytes: Callable[[int], object] | None = None
) -> tuple[dict[str, Deferred], dict[str, str], list[InputFile]]:
    """Tensors in the order of an index (`*.safetensors.index.json`), metadata, and open files."""
    weight_map = _weight_map(index_path)
    folder = os.path.dirname(os.path.abspath(index_path))
    # In the cache of huggingface_hub, index and shards are links to files that lie together.
    allowed = {os.path.realpath(folder), os.path.dirname(os.path.realpath(index_path))}
    tensors: dict[str, Deferred] = {}
    metadata: dict[str, str] = {}
    files: list[InputFile] = []
    with contextlib.ExitStack() as opened:  # closes them, should one of them be refused
        for shard in dict.fromkeys(weight_map.values()):
            path, where = os.path.join(folder, shard), f"{index_path}: the shard {shown(shard)}"
            if os.path.dirname(os.path.realpath(path)) not in allowed:
                raise UsageError(f"{where} is a link to a file outside of the index's folder")
            if not os.path.exists(path):
                raise UsageError(f"{where} is missing; put all files of the index into one folder")
            files.append(InputFile(path, on_bytes))
            opened.callback(files[-1].close)
            found, extra = read_safetensors(files[-1])
            wanted = {name for name, file in weight_map.items() if file == shard}
            if wanted != found.keys():
                missing, more = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
                what = f"lacks {shown(missing)} of the index, and has {shown(more)} that it has not"
                raise UsageError(f"{where} {what}; {AGAIN}")
            tensors |= found
            metadata |= extra
        opened.pop_all()
    return {name: tensors[name] for name in weight_map}, metadata, files


def shard_names(index_path: str) -> list[str]:
    """The files that an index names, which must be beside it."""
    return list(dict.fromkeys(_weight_map(index_path).values()))


def _weight_map(index_path: str) -> dict[str, str]:
    """The file of each tensor, from an index; all are names of files beside it."""
    with contextlib.closing(InputFile(index_path)) as file:
        file.refuse_placeholder()
        if file.size > _MAX_JSON:
            raise UsageError(f"{file.name} is {file.size} bytes long; at most {_MAX_JSON}")
        with refusing(file.name):
            weight_map = json.loads(file.read(0, file.size))["weight_map"]
            if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
                raise ValueError(f"weight_map is {shown(weight_map)}, not file names by tensor")
    for name in dict.fromkeys(weight_map.values()):
        where = f"{index_path}: the shard {shown(name)}"
        if os.path.basename(name) != name or any(c in name for c in "/\\:\0"):
            raise UsageError(f"{where} is not a file in the index's own folder, refused")
        if not name.endswith(".safetensors"):
            raise UsageError(f"{where} is not a .safetensors file, refused")
    return weight_map
