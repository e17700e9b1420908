"""PyTorch's .pt files, read and written without PyTorch and without running their code.

Format facts, from PyTorch's notes on serialization semantics and from files that torch 2.13 wrote:
torch.save writes a zip file of one folder, entries uncompressed, their data at multiples of 64
bytes (padded with an extra field of id "FB"). `data.pkl` in it is the object as a pickle, see
`dico_jax.pytorch.pickles`. A storage there is the persistent id ("storage", storage class, key,
device, number of elements), and its bytes are the entry `data/KEY`. `byteorder` says "little" or
"big" (older files have no such entry and are little-endian). A CRC-32 of 0 means no checksum.

Before version 1.6 (as the public Inception weights are): five pickles, one after the other: a magic
number, the version 1001, a dict with `little_endian`, the object, and the list of the keys of its
storages. Then the storages in the order of that list, each as its number of elements (int64) and
its numbers. The persistent id has a sixth part, a view, which is None.
"""

import argparse
import collections
import hashlib
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.files import is_tensor, new_file, write_array
from dico_jax.pytorch import pickles
from dico_jax.pytorch.pickles import STORAGES, Storage
from dico_jax.pytorch.tensors import AGAIN, Blob, InputFile, dtype_name, refusing, shown, values_in

_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the pickled magic number
_LEGACY_VERSION = 1001
_MAX_LEGACY = 8 << 20  # bytes of all five pickles; a network of 500 tensors has 0.1 million
_MAX_ENTRIES = 20_000  # a training checkpoint of DiCo-XL has about 5,000
_MAX_DIRECTORY = 16 << 20  # bytes

_ALIGNMENT = 64  # bytes
_ZIP64_FROM = 1 << 30  # bytes; the zip format needs it from 4 GiB on, zipfile's estimate from 2
_MAX_BITS = 256  # of an integer
_KEYS: set[Any] = {str, int, float, bool, type(None)}
_WRITTEN: set[Any] = _KEYS | {dict, collections.OrderedDict, list, tuple, argparse.Namespace}
_STORAGE_OF = {dtype: storage for storage, dtype in STORAGES.items()}


def read_tree(file: InputFile) -> Any:
    """The object in a .pt file, as `pickles.load` makes it; UsageError for all that is not one."""
    start = file.read(0, min(file.size, 512))
    if start.startswith(_LEGACY):
        return _legacy_tree(file)
    if not start.startswith(b"PK\3\4"):
        _refuse_other(file, start)
    with refusing(file.name):
        blobs = _entries(file)
    root = _root(file, list(blobs))
    if f"{root}byteorder" in blobs:
        order = blobs[f"{root}byteorder"].read_small(16)
        if order != b"little":
            what = f"has byte order {shown(order)}, only b'little' is read"
            raise UsageError(f"{file.name} {what}; save it again on a little-endian machine")

    def storage(pid: Any) -> Storage:
        dtype, key, nbytes = _declared(pid)
        blob = blobs.get(f"{root}data/{key}")
        if blob is None:
            raise ValueError(f"the storage {shown(key)} has no entry in the file")
        if blob.nbytes != nbytes:
            raise ValueError(f"storage {shown(key)} does not match its {blob.nbytes} bytes")
        return Storage(dtype, blob)

    stream = pickles.PickleBytes(blobs[f"{root}data.pkl"].read_small(pickles.MAX_BYTES))
    return pickles.load(stream, f"{file.name}: its pickle", file.size, storage)


def _declared(pid: Any) -> tuple[Any, str, int]:
    """(dtype or None, key, number of bytes) of the storage that a persistent id names."""
    kind, cls, key, _, count = pid
    types = type(cls), type(key), type(count)
    if kind != "storage" or types != (Storage, str, int) or count < 0 or len(key) > 100:
        raise ValueError(f"a persistent id {shown(pid)} is not a storage's")
    return cls.dtype, key, count * np.dtype(cls.dtype or "u1").itemsize


def _refuse_other(file: InputFile, start: bytes) -> None:
    """Names the usual files that are something else than torch.save's."""
    if start[257:262] == b"ustar":
        how = "torch.save(torch.load(old, map_location='cpu'), new)"
        raise UsageError(f"{file.name} is a legacy (tar) PyTorch file; re-save it: {how}")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.size:
        raise UsageError(f"{file.name} holds safetensors; rename it to .safetensors")
    file.refuse_placeholder()
    what = f"is not a zip file as torch.save writes it (it starts with {shown(start[:8])})"
    raise UsageError(f"{file.name} {what}; convert it with PyTorch, or {AGAIN}")


def _entries(file: InputFile) -> dict[str, Blob]:
    """The entries of a zip file by name; what torch.save never writes is refused.

    Such as compressed entries, which could grow, and entries that share bytes or names.
    """
    _check_end(file)
    blobs: dict[str, Blob] = {}
    with zipfile.ZipFile(file.stream) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if len(entries) > _MAX_ENTRIES:
            raise ValueError(f"it declares {len(entries)} zip entries; at most {_MAX_ENTRIES}")
        if any(e.filename.count("/") == 1 and "/constants.pkl" in e.filename for e in entries):
            how = "torch.save(torch.jit.load(old).state_dict(), new)"
            what = "is a TorchScript archive; save its weights with PyTorch"
            raise UsageError(f"{file.name} {what}: {how}")
        end = 0
        for entry in entries:
            name = entry.filename
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                fix = "is compressed, which torch.save never does; pack it again with zip -0"
                raise ValueError(f"zip entry {shown(name)} {fix}")
            if name in blobs:
                raise ValueError(f"there are two zip entries named {shown(name)}")
            if entry.header_offset < end or (not blobs and entry.header_offset):
                raise ValueError(f"zip entry {shown(name)} overlaps what is before it")
            with archive.open(entry):  # compares the two headers
                pass
            local = file.read(entry.header_offset, 30)
            start = entry.header_offset + 30 + sum(struct.unpack("<2H", local[26:]))
            blobs[name] = Blob(file, name, start, entry.file_size, entry.CRC or None)
            end = start + entry.file_size
        if end > archive.start_dir:
            raise ValueError("its last zip entry reaches past its end")
    return blobs


def _check_end(file: InputFile) -> None:
    """Checks the records at a zip file's end: zipfile would search for them, and read any size."""
    tail = file.read(max(0, file.size - 98), min(98, file.size)).rjust(98, b"\0")
    zip64, locator, end = tail[:56], tail[56:76], tail[76:]
    if end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise ValueError("there is no zip directory at its end")
    size = int.from_bytes(end[12:16], "little")
    if locator[:4] == b"PK\6\7":
        if zip64[:4] != b"PK\6\6":
            raise ValueError("its Zip64 end record is not one")
        size = int.from_bytes(zip64[40:48], "little")
    if size > _MAX_DIRECTORY:
        raise ValueError(f"its zip directory is {size} bytes long; at most {_MAX_DIRECTORY}")


def _root(file: InputFile, names: list[str]) -> str:
    roots = [n[: -len("data.pkl")] for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(roots) != 1:
        hold = "several data.pkl" if roots else "no FOLDER/data.pkl"
        why = f"with {hold}: torch.save did not write it (it has {shown(names[:3])})"
        raise UsageError(f"{file.name} is a zip file {why}")
    return roots[0]


def _legacy_tree(file: InputFile) -> Any:
    stream = pickles.PickleBytes(file.read(0, min(file.size, _MAX_LEGACY)))
    stream.seek(len(_LEGACY))
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        dtype, key, nbytes = _declared(pid[:5])
        if pid[5:] != (None,):
            raise ValueError(f"a persistent id {shown(pid)} of a view")
        new = Storage(dtype, Blob(file, f"storage {key}", 0, nbytes))  # it is placed afterwards
        found = storages.setdefault(key, new)
        if (found.dtype, found.blob.nbytes) != (dtype, new.blob.nbytes):
            raise ValueError(f"the storage {shown(key)} is declared in two ways")
        return found

    def following(what: str) -> Any:
        return pickles.load(stream, f"{file.name}: {what}", file.size, storage)

    version, system = following("the version"), following("the system")
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise UsageError(f"{file.name} is of version {shown(version)} of the format before 1.6")
    if system.get("little_endian") is not True:
        raise UsageError(f"{file.name} is not of a little-endian machine; save it again on one")
    tree, keys = following("the pickle"), following("the list of storages")
    as_texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not as_texts or sorted(keys) != sorted(storages):
        raise UsageError(f"{file.name} is damaged: its list of storages is not of those it uses")
    at = stream.tell()
    for key in keys:
        blob, width = storages[key].blob, np.dtype(storages[key].dtype or "u1").itemsize
        if int.from_bytes(file.read(at, 8), "little") * width != blob.nbytes:
            raise UsageError(f"{file.name} is damaged: the size of storage {shown(key)}; {AGAIN}")
        blob.start = at + 8
        at = blob.start + blob.nbytes
    if at != file.size:
        what = f"is {file.size} bytes long, and its storages end at byte {at}"
        raise UsageError(f"{file.name} {what}; {AGAIN}")
    return tree


def write_pt(
    path: str | os.PathLike, tree: object, *, on_bytes: Callable[[int], object] | None = None
) -> None:
    """Writes a zip-format .pt file that torch.load(path, weights_only=True) reads.

    With an argparse.Namespace in the tree it needs that class among the safe globals. The file
    appears when it is whole. Equal trees give equal files.

    Args:
      path: the file to write; an older one is replaced.
      tree: of dict, OrderedDict, list, tuple, argparse.Namespace, str, int, float, bool, None,
        NumPy scalars (written as numbers), np.dtype (as the torch dtype) and tensors: arrays (also
        of JAX) or `Deferred`, which are made one at a time. Every tensor gets a storage of its own
        on the device "cpu", so that none is an alias of another one after loading.
      on_bytes: called with the number of bytes whenever some of a tensor were written.

    Raises:
      TypeError: the tree holds something else, or a tensor whose dtype is none of `DTYPES`.
      ValueError: it is nested more than 64 levels deep, or a lazy tensor is not as announced.
    """
    for value in values_in(tree):
        if not _can_hold(value):
            raise TypeError(f"a .pt file cannot hold {type(value).__name__} here: {shown(value)}")
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, 2, fix_imports=False)
    pickler.dump(tree)
    with new_file(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        _add(archive, stream, "data.pkl", pickled.getvalue())
        _add(archive, stream, ".format_version", b"1")
        _add(archive, stream, ".storage_alignment", str(_ALIGNMENT).encode())
        _add(archive, stream, "byteorder", b"little")
        for key, tensor in enumerate(pickler.tensors):
            with _entry(archive, stream, f"data/{key}", tensor.nbytes) as entry:
                write_array(entry, tensor, on_bytes, f"tensor {key} of the tree")
        _add(archive, stream, "version", b"3\n")
        _add(archive, stream, ".data/serialization_id", _identifier(archive))


def _can_hold(value: Any) -> bool:
    if isinstance(value, dict) and {*map(type, value)} - _KEYS:
        return False
    if isinstance(value, int) and value.bit_length() >= _MAX_BITS:
        return False
    return type(value) in _WRITTEN or isinstance(value, np.generic | np.dtype) or is_tensor(value)


def _identifier(archive: zipfile.ZipFile) -> bytes:
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


_MACHINE: Any = pickle._Pickler  # which has no types


class _Pickler(_MACHINE):
    def __init__(self, stream: BinaryIO, *options: Any, **more: Any):
        super().__init__(stream, *options, **more)
        self.tensors: list[Any] = []  # whose numbers are to follow

    def save(self, value: Any, *options: Any, **more: Any) -> None:
        if isinstance(value, np.dtype):
            self.save_name("torch", dtype_name(value))
        elif is_tensor(value):
            self.save_tensor(value)
        else:
            super().save(value.item() if isinstance(value, np.generic) else value, *options, **more)

    def save_name(self, module: str, name: str) -> None:
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def save_tensor(self, value: Any) -> None:
        """A call that rebuilds a contiguous tensor from a storage of its own."""
        shape = tuple(int(d) for d in value.shape)
        name, size = dtype_name(value.dtype), math.prod(shape)
        # Newer dtypes have no storage class: their storage is bytes, and the dtype an argument.
        old = name in _STORAGE_OF
        # PyTorch counts an empty dimension as 1 in the strides of the ones before it.
        strides = [max(d, 1) for d in shape]
        self.save_name("torch._utils", f"_rebuild_tensor_v{2 if old else 3}")
        self.write(pickle.MARK + pickle.MARK)
        self.save("storage")
        storage = ("torch", _STORAGE_OF[name]) if old else ("torch.storage", "UntypedStorage")
        self.save_name(*storage)
        count = size if old else size * np.dtype(value.dtype).itemsize
        for part in (str(len(self.tensors)), "cpu", count):
            self.save(part)
        self.write(pickle.TUPLE + pickle.BINPERSID)
        self.tensors.append(value)
        steps = tuple(math.prod(strides[i + 1 :]) for i in range(len(strides)))
        arguments: tuple[Any, ...] = (0, shape, steps, False, collections.OrderedDict())
        for argument in arguments:
            self.save(argument)
        if not old:
            self.save_name("torch", name)
        self.write(pickle.TUPLE + pickle.REDUCE)
