"""What is in .safetensors files, single or sharded, one tensor at a time.

Format facts (the safetensors format description): 8 bytes with the length of the header, little-
endian; the header, a JSON object of name -> {"dtype", "shape", "data_offsets": [begin, end]} and
perhaps "__metadata__" (strings by name); then the data, without gaps, row-major and little-endian.
Offsets count from the end of the header. An index (`model.safetensors.index.json`) is a JSON object
whose "weight_map" gives the file of each tensor, beside the index.

The safetensors library maps the file, and every page that was read stays in the process's memory
until it is closed: 1.05 GB after reading a file of 1 GB tensor by tensor. Hence this reader; the
tests compare it with the library.
"""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

from dico_jax.errors import UsageError
from dico_jax.pytorch.tensor_refs import (
    AGAIN,
    DTYPES,
    Blob,
    FileBytes,
    TensorRef,
    refuse_placeholder,
    shown,
    tensor_ref,
)

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_JSON = 16 << 20  # bytes; 100,000 tensors take about ten million


class _RepeatedError(ValueError):
    """A key that occurs twice in a JSON object."""


def read_safetensors(file: FileBytes) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The tensors of .safetensors file `file` by name, in the order of its header; its metadata.

    Raises:
      UsageError: it is not such a file, it is damaged, or a tensor's dtype has no counterpart.
    """
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    if file.size >= 4 and file.read(0, 4) == b"PK\3\4":
        raise UsageError(f"{file.name} is a PyTorch zip, not safetensors; rename it to .pt")
    if not 2 <= length <= file.size - 8:
        refuse_placeholder(file)
        raise UsageError(
            f"{file.name} is cut short or not safetensors: its header cannot be {length} bytes "
            f"of {file.size}; {AGAIN}"
        )
    header = _json_object(file, "the header", 8, length)
    metadata = header.pop("__metadata__", None) or {}
    if not _is_strings(metadata):
        raise UsageError(f"{file.name}: __metadata__ is {shown(metadata)}, not strings by name")
    tensors = {name: _tensor(file, name, entry, start=8 + length) for name, entry in header.items()}
    _check_cover(file, tensors, start=8 + length)
    return tensors, metadata


def read_sharded(
    index_path: str | os.PathLike, on_bytes: Callable[[int], object] | None = None
) -> tuple[dict[str, TensorRef], dict[str, str], list[FileBytes]]:
    """The tensors of a sharded checkpoint, from its index.

    Args:
      index_path: the `*.safetensors.index.json`.
      on_bytes: as in `FileBytes`.

    Returns:
      The tensors by name in the order of the index, the metadata of all shards, and the open
      files, which the caller closes.

    Raises:
      UsageError: the index is not one; it names a file outside of its folder or one that is
        missing; a tensor is in no shard, in several, or in a shard without being in the index.
    """
    weight_map = _weight_map(index_path)
    folder = os.path.dirname(os.fspath(index_path))
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    files: list[FileBytes] = []
    with contextlib.ExitStack() as opened:  # closes them, should one of them be refused
        for shard in dict.fromkeys(weight_map.values()):
            _check_inside(index_path, shard)
            file = FileBytes(os.path.join(folder, shard), on_bytes)
            opened.callback(file.close)
            files.append(file)
            found, extra = read_safetensors(file)
            metadata |= extra
            _check_shard(index_path, weight_map, shard, found)
            tensors |= found
        opened.pop_all()
    return {name: tensors[name] for name in weight_map}, metadata, files


def shard_names(index_path: str | os.PathLike) -> list[str]:
    """The files that an index names, which must be beside it.

    Raises:
      UsageError: it is no index, or it names something else.
    """
    names = list(dict.fromkeys(_weight_map(index_path).values()))
    for name in names:
        _check_plain(index_path, name)
    return names


def _json_object(file: FileBytes, what: str, start: int, length: int) -> dict[str, Any]:
    """The JSON object in `length` bytes from `start` on, without repeated keys."""
    if length > _MAX_JSON:
        raise UsageError(f"{file.name}: {what} is {length} bytes long; at most {_MAX_JSON}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _RepeatedError(f"has {shown(key)} twice")
            found[key] = value
        return found

    try:
        value = json.loads(file.read(start, length).decode("utf-8"), object_pairs_hook=unique)
    except _RepeatedError as error:
        raise UsageError(f"{file.name}: {what} {error}; {AGAIN}") from None
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, JSONDecodeError
        reason = str(error).replace("\n", " ")[:100]
        raise UsageError(
            f"{file.name} is damaged, or something else: {what} is not JSON ({reason}); {AGAIN}"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"{file.name}: {what} is not a JSON object; {AGAIN}")
    return value


def _is_strings(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _tensor(file: FileBytes, name: str, entry: Any, start: int) -> TensorRef:
    """The tensor of a header's entry; `start` is where the data begin."""
    where = f"{file.name}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UsageError(f"{where} is declared as {shown(entry)}, not as safetensors are; {AGAIN}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise UsageError(f"{where} has dtype {shown(dtype)}, which is not read; those are: {known}")
    offsets = entry["data_offsets"]
    if (
        not isinstance(offsets, list)
        or [type(v) for v in offsets] != [int, int]
        or not 0 <= offsets[0] <= offsets[1] <= file.size - start
    ):
        raise UsageError(f"{where} has data_offsets {shown(offsets)}, outside of the file; {AGAIN}")
    blob = Blob(file, name, start + offsets[0], offsets[1] - offsets[0])
    shape = tuple(entry["shape"]) if isinstance(entry["shape"], list) else entry["shape"]
    ref = tensor_ref(blob, DTYPES[SAFETENSORS_DTYPES[dtype]], shape)
    if ref.nbytes != blob.nbytes:
        raise UsageError(
            f"{where} of shape {shown(shape)} and dtype {dtype} has {blob.nbytes} bytes; {AGAIN}"
        )
    return ref


def _check_cover(file: FileBytes, tensors: dict[str, TensorRef], start: int) -> None:
    """The tensors must lie one after the other and fill the file."""
    at = start
    for blob in sorted((ref.blob for ref in tensors.values()), key=lambda b: (b.start, b.nbytes)):
        if blob.start != at:
            raise UsageError(
                f"{file.name}: the data of {shown(blob.name)} leave a gap or overlap; {AGAIN}"
            )
        at += blob.nbytes
    if at != file.size:
        raise UsageError(
            f"{file.name} is {file.size} bytes long, and its tensors end at byte {at}; {AGAIN}"
        )


def _weight_map(index_path: str | os.PathLike) -> dict[str, str]:
    """The file of each tensor, from an index."""
    file = FileBytes(index_path)
    try:
        refuse_placeholder(file)
        index = _json_object(file, "the index", 0, file.size)
    finally:
        file.close()
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not _is_strings(weight_map):
        raise UsageError(
            f"{file.name}: weight_map is {shown(weight_map)}, not file names by tensor; {AGAIN}"
        )
    return weight_map


def _check_inside(index_path: str | os.PathLike, shard: str) -> None:
    """Refuses shards outside of the index's folder, by their name or through a link.

    In the cache of huggingface_hub, index and shards are links to files that lie together in
    another folder; so a shard may also be where the index itself really is.
    """
    where = _check_plain(index_path, shard)
    folder = os.path.dirname(os.path.abspath(index_path))
    allowed = {os.path.realpath(folder), os.path.dirname(os.path.realpath(index_path))}
    path = os.path.join(folder, shard)
    if os.path.dirname(os.path.realpath(path)) not in allowed:
        raise UsageError(f"{where} is a link to a file outside of the index's folder, refused")
    if not os.path.exists(path):
        raise UsageError(f"{where} is missing; put all files of the index into one folder")


def _check_plain(index_path: str | os.PathLike, shard: str) -> str:
    """Refuses names that are not those of a file beside the index; what messages call it."""
    where = f"{os.fspath(index_path)}: the shard {shown(shard)}"
    plain = os.path.basename(shard) == shard and shard not in ("", ".", "..")
    if not plain or any(c in shard for c in "/\\:\0"):
        raise UsageError(f"{where} is not a file in the index's own folder, refused")
    if not shard.endswith(".safetensors"):
        raise UsageError(f"{where} is not a .safetensors file, refused")
    return where


def _check_shard(
    index_path: str | os.PathLike,
    weight_map: dict[str, str],
    shard: str,
    found: dict[str, TensorRef],
) -> None:
    """The shard must hold the tensors that the index says, and no other."""
    where = os.fspath(index_path)
    wanted = {name for name, file in weight_map.items() if file == shard}
    missing, extra = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    if missing:
        raise UsageError(f"{where}: {shard} lacks {_listed(missing)}; {AGAIN}")
    for name in extra:
        if name in weight_map:
            raise UsageError(
                f"{where}: tensor {shown(name)} is in {shard} and in {weight_map[name]}; {AGAIN}"
            )
    if extra:
        raise UsageError(f"{where} does not list {_listed(extra)} of {shard}; {AGAIN}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(shown(n) for n in names[:5]) + more
