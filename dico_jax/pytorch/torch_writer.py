"""Files that torch.load reads, written without PyTorch, tensor by tensor.

The format is described in `dico_jax.pytorch.torch_reader`. As torch.save does, the data of every
entry begin at a multiple of 64 bytes (the local header is padded with an extra field of id "FB"),
and small entries say the version of the format, the alignment, the byte order and an identifier.
"""

import argparse
import collections
import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from dico_jax.files import is_tensor, new_file, write_array
from dico_jax.pytorch.tensor_refs import dtype_name
from dico_jax.pytorch.torch_reader import STORAGES

_ALIGNMENT = 64  # bytes
_ZIP64_FROM = 1 << 30  # bytes; the zip format needs it from 4 GiB on, zipfile's estimate from 2
_MAX_DEPTH = 64
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
        of JAX) or lazy ones (`LazyTensor`: a TensorRef, a Deferred), which are made one at a time.
        Every tensor gets a storage of its own on the device "cpu", so that none is an alias of
        another one after loading.
      on_bytes: called with the number of bytes whenever some of a tensor were written.

    Raises:
      UsageError: the folder is missing, not writable or full.
      TypeError: the tree holds something else, or a tensor whose dtype is none of `DTYPES`.
      ValueError: the tree is nested more than 64 levels deep or holds itself, or a lazy tensor is
        not what it had announced.
    """
    pickled = _Pickle()
    pickled.value(tree, 0)
    data = b"\x80\x02" + bytes(pickled.out) + b"."
    with new_file(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        _add(archive, stream, "data.pkl", data)
        _add(archive, stream, ".format_version", b"1")
        _add(archive, stream, ".storage_alignment", str(_ALIGNMENT).encode())
        _add(archive, stream, "byteorder", b"little")
        for key, tensor in enumerate(pickled.tensors):
            with _entry(archive, stream, f"data/{key}", _nbytes(tensor)) as entry:
                write_array(entry, tensor, on_bytes, f"tensor {key} of the tree")
        _add(archive, stream, "version", b"3\n")
        _add(archive, stream, ".data/serialization_id", _identifier(archive))


def _identifier(archive: zipfile.ZipFile) -> bytes:
    """40 digits that tell files apart. Not random: equal trees give equal files."""
    checksums = [(info.filename, info.CRC) for info in archive.infolist()]
    digest = hashlib.sha256(repr(checksums).encode()).digest()
    return b"%040d" % (int.from_bytes(digest, "big") % 10**40)


def _nbytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


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


class _Pickle:
    """Pickles a tree with the opcodes of protocol 2, and collects its tensors in order."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.tensors: list[Any] = []

    def value(self, value: Any, level: int) -> None:
        """Appends the opcodes that build `value`, `level` levels deep in the tree."""
        if level > _MAX_DEPTH:
            raise ValueError(f"the tree is nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or value is True or value is False:
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            raw = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(raw)) + raw
        elif isinstance(value, dict):
            self.mapping(value, level)
        elif isinstance(value, list | tuple):
            self.sequence(value, level)
        elif isinstance(value, argparse.Namespace):
            self.out += b"cargparse\nNamespace\n)\x81"
            self.mapping(vars(value), level)
            self.out += b"b"
        elif isinstance(value, np.dtype):
            self.out += f"ctorch\n{dtype_name(value)}\n".encode()
        elif is_tensor(value):
            self.tensor(value)
        else:
            raise TypeError(f"a .pt file cannot hold {type(value).__name__} here: {value!r:.100}")

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += b"K" + struct.pack("<B", value)
        elif 0 <= value < 1 << 16:
            self.out += b"M" + struct.pack("<H", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        elif value.bit_length() >= 256:
            raise TypeError("a .pt file cannot hold an integer of more than 32 bytes here")
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + struct.pack("<B", len(raw)) + raw

    def mapping(self, items: dict, level: int) -> None:
        ordered = isinstance(items, collections.OrderedDict)
        self.out += b"ccollections\nOrderedDict\n)R" if ordered else b"}"
        self.out += b"("
        for key, value in items.items():
            if not isinstance(key, str | int | float | None):
                raise TypeError(f"a .pt file cannot hold a dict key {key!r:.100}")
            self.value(key, level + 1)
            self.value(value, level + 1)
        self.out += b"u"

    def sequence(self, items: list | tuple, level: int) -> None:
        self.out += b"(" if isinstance(items, tuple) else b"]("
        for item in items:
            self.value(item, level + 1)
        self.out += b"t" if isinstance(items, tuple) else b"e"

    def tensor(self, tensor: Any) -> None:
        """A call that rebuilds a contiguous tensor from a storage of its own."""
        name = dtype_name(tensor.dtype)
        storage = _STORAGE_OF.get(name)
        size = math.prod(tensor.shape)
        self.out += b"ctorch._utils\n_rebuild_tensor_v%d\n((" % (2 if storage else 3)
        self.value("storage", 0)
        # Newer dtypes have no storage class: their storage is bytes, and the dtype an argument.
        self.out += (
            f"ctorch\n{storage}\n".encode() if storage else b"ctorch.storage\nUntypedStorage\n"
        )
        self.value(str(len(self.tensors)), 0)
        self.value("cpu", 0)
        self.integer(size if storage else _nbytes(tensor))
        self.out += b"tQ"
        self.integer(0)
        shape = tuple(int(d) for d in tensor.shape)
        self.value(shape, 0)
        # PyTorch counts an empty dimension as 1 in the strides of the ones before it.
        self.value(
            tuple(math.prod(max(d, 1) for d in shape[i + 1 :]) for i in range(len(shape))), 0
        )
        self.out += b"\x89ccollections\nOrderedDict\n)R"
        if not storage:
            self.value(np.dtype(tensor.dtype), 0)
        self.out += b"tR"
        self.tensors.append(tensor)
