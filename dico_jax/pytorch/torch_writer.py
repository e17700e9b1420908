"""Files that torch.load reads, written without PyTorch, tensor by tensor.

The format is described in `dico_jax.pytorch.torch_reader`. As torch.save does, the data of every
entry begin at a multiple of 64 bytes (the local header is padded with an extra field of id "FB"),
and small entries say the version of the format, the alignment, the byte order and an identifier.
"""

import argparse
import collections
import dataclasses
import hashlib
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import numpy as np

from dico_jax.files import is_tensor, new_file, write_array
from dico_jax.pytorch.pickles import STORAGES
from dico_jax.pytorch.tensors import dtype_name

_ALIGNMENT = 64  # bytes
_ZIP64_FROM = 1 << 30  # bytes; the zip format needs it from 4 GiB on, zipfile's estimate from 2
_MAX_DEPTH = 64
_MAX_BITS = 256  # of an integer
_STORAGE_OF = {dtype: storage for storage, dtype in STORAGES.items()}


def write_pt(
    path: str | os.PathLike, tree: object, *, on_bytes: Callable[[int], object] | None = None
) -> None:
    """Writes a zip-format .pt file.

    torch.load(path, weights_only=True) reads it. With an argparse.Namespace in the tree it needs
    that class among the safe globals (torch.serialization.add_safe_globals) or weights_only=False.
    The file appears when it is whole; when anything fails, nothing is left.

    Args:
      path: the file to write; an older one is replaced.
      tree: of dict, OrderedDict, list, tuple, argparse.Namespace, str, int, float, bool, None,
        NumPy scalars (written as numbers), np.dtype (as the torch dtype) and tensors: arrays (also
        of JAX) or lazy ones (`Deferred`), which are made one at a time. Every tensor gets a storage
        of its own on the device "cpu", so that none is an alias of another one after loading.
      on_bytes: called with the number of bytes whenever some of a tensor were written.

    Raises:
      UsageError: the folder is missing, not writable or full.
      TypeError: the tree holds something else, or a tensor whose dtype is none of `DTYPES`.
      ValueError: the tree is nested more than 64 levels deep or holds itself, or a lazy tensor is
        not what it had announced.
    """
    tensors: list[Any] = []
    pickled = io.BytesIO()
    _Pickler(pickled, 2, fix_imports=False).dump(_plain(tree, tensors))
    with new_file(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        _add(archive, stream, "data.pkl", pickled.getvalue())
        _add(archive, stream, ".format_version", b"1")
        _add(archive, stream, ".storage_alignment", str(_ALIGNMENT).encode())
        _add(archive, stream, "byteorder", b"little")
        for key, tensor in enumerate(tensors):
            with _entry(archive, stream, f"data/{key}", tensor.nbytes) as entry:
                write_array(entry, tensor, on_bytes, f"tensor {key} of the tree")
        _add(archive, stream, "version", b"3\n")
        _add(archive, stream, ".data/serialization_id", _identifier(archive))


def _identifier(archive: zipfile.ZipFile) -> bytes:
    """40 digits that tell files apart. Not random: equal trees give equal files."""
    checksums = [(info.filename, info.CRC) for info in archive.infolist()]
    digest = hashlib.sha256(repr(checksums).encode()).digest()
    return b"%040d" % (int.from_bytes(digest, "big") % 10**40)


def _add(archive: zipfile.ZipFile, stream: BinaryIO, name: str, data: bytes) -> None:
    with _entry(archive, stream, name, len(data)) as entry:
        entry.write(data)


def _entry(archive: zipfile.ZipFile, stream: BinaryIO, name: str, nbytes: int) -> Any:
    """A stream into a new entry of `nbytes`, whose data begin at a multiple of 64."""
    info = zipfile.ZipInfo(f"archive/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    info.file_size = nbytes
    zip64 = nbytes >= _ZIP64_FROM
    # The local header is 30 bytes, the name, and the extra fields (4 bytes and the content each).
    before = stream.tell() + 30 + len(info.filename) + 4 + (20 if zip64 else 0)
    padding = -before % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return archive.open(info, "w", force_zip64=zip64)


@dataclasses.dataclass(frozen=True)
class _Global:
    """A global that the pickle mentions and that is not installed here."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What the pickle says of the tensor whose numbers are entry `key`."""

    key: int
    dtype: np.dtype
    shape: tuple[int, ...]


def _plain(value: Any, tensors: list[Any], level: int = 0) -> Any:
    """A copy of a tree with a `_Tensor` for each tensor, which is appended to `tensors`."""
    if level > _MAX_DEPTH:
        raise ValueError(f"the tree is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() < _MAX_BITS:  # bool too
        return value
    if value is None or isinstance(value, float | str):
        return value
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_plain(vars(value), tensors, level))
    if isinstance(value, dict) and all(isinstance(k, str | int | float | None) for k in value):
        kind = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
        return kind((key, _plain(item, tensors, level + 1)) for key, item in value.items())
    if isinstance(value, list | tuple):
        items = [_plain(item, tensors, level + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.dtype):
        return _Global("torch", dtype_name(value))
    if is_tensor(value):
        tensors.append(value)
        shape = tuple(int(d) for d in value.shape)
        dtype_name(value.dtype)  # TypeError where PyTorch has none
        return _Tensor(len(tensors) - 1, np.dtype(value.dtype), shape)
    raise TypeError(f"a .pt file cannot hold {type(value).__name__} here: {value!r:.100}")


_MACHINE: Any = pickle._Pickler  # which is not documented, so its attributes have no types


class _Pickler(_MACHINE):
    def save_name(self, value: _Global) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    def save_tensor(self, value: _Tensor) -> None:
        """A call that rebuilds a contiguous tensor from a storage of its own."""
        name, size = dtype_name(value.dtype), math.prod(value.shape)
        # Newer dtypes have no storage class: their storage is bytes, and the dtype an argument.
        old = name in _STORAGE_OF
        kind = ("torch", _STORAGE_OF[name]) if old else ("torch.storage", "UntypedStorage")
        count = size if old else size * value.dtype.itemsize
        # PyTorch counts an empty dimension as 1 in the strides of the ones before it.
        strides = [max(d, 1) for d in value.shape]
        self.save_name(_Global("torch._utils", f"_rebuild_tensor_v{2 if old else 3}"))
        self.write(pickle.MARK)
        self.save(("storage", _Global(*kind), str(value.key), "cpu", count))
        self.write(pickle.BINPERSID)
        place = (0, value.shape, tuple(math.prod(strides[i + 1 :]) for i in range(len(strides))))
        arguments: tuple[Any, ...] = (*place, False, collections.OrderedDict())
        for argument in arguments:
            self.save(argument)
        if not old:
            self.save_name(_Global("torch", name))
        self.write(pickle.TUPLE + pickle.REDUCE)

    dispatch: ClassVar = {**_MACHINE.dispatch, _Global: save_name, _Tensor: save_tensor}
