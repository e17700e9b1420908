"""Files that PyTorch wrote before version 1.6, as the public Inception weights are.

Format facts, from files that torch 2.13 wrote with `_use_new_zipfile_serialization=False`: five
pickles, one after the other: a magic number, the version 1001, a dict with `little_endian`, the
object, and the list of the keys of its storages. Then the storages in the order of that list, each
as its number of elements (int64) and its numbers. A storage in the object is the persistent id
("storage", storage class, key, device, number of elements, view), where view is None.
"""

import contextlib
import io
import os
import pickletools

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.pytorch import restricted_pickle
from dico_jax.pytorch.restricted_pickle import RefusedError
from dico_jax.pytorch.tensor_refs import AGAIN, Blob, FileBytes, TensorRef, check_total, shown
from dico_jax.pytorch.torch_files import TensorFile, open_tensors, tensors_in
from dico_jax.pytorch.torch_reader import Rebuild, Storage, StorageClass

_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the pickled magic number
_VERSION = 1001
_MAX_PICKLES = 8 << 20  # bytes of all five; a network of 500 tensors has 0.1 million
_COUNT_BYTES = 8  # bytes of a number of elements


def open_any_tensors(path: str | os.PathLike) -> TensorFile:
    """`torch_files.open_tensors`, for files of the older format too.

    Raises:
      UsageError: as there.
    """
    file = FileBytes(path)
    with contextlib.ExitStack() as opened:
        opened.callback(file.close)
        if file.size < len(_START) or file.read(0, len(_START)) != _START:
            return open_tensors(path)
        tree = read_legacy_tree(file)
        opened.pop_all()
    return TensorFile(os.fspath(path), "pt", tree, {}, [file])


def read_legacy_tree(file: FileBytes) -> object:
    """The object in a file of the older format, with a TensorRef for each tensor.

    Returns:
      A tree as `torch_reader.read_tree` makes it.

    Raises:
      UsageError: the file is damaged, or it holds anything else.
    """
    pickles = _Pickles(file, start=len(_START))
    version, system = pickles.next("the version"), pickles.next("the system")
    if version != _VERSION or not isinstance(system, dict):
        raise UsageError(f"{file.name} is of version {shown(version)} of the format before 1.6")
    if system.get("little_endian") is not True:
        raise UsageError(f"{file.name} is not of a little-endian machine; save it again on one")
    rebuild = _LegacyRebuild(file)
    tree = pickles.next("the pickle", rebuild)
    _place(file, pickles.next("the list of storages"), pickles.at, rebuild)
    check_total(file, sum(ref.nbytes for ref in tensors_in(tree)))
    return tree


class _Pickles:
    """The pickles at the start of a file, one after the other.

    Attributes:
      at: where the next one begins, in bytes.
    """

    def __init__(self, file: FileBytes, start: int):
        self.at = start
        self._name = file.name
        self._data = file.read(0, min(file.size, _MAX_PICKLES))

    def next(self, what: str, rebuild: "_LegacyRebuild | None" = None) -> object:
        """The value of the next one, which may hold tensors where `rebuild` is given."""
        stream = io.BytesIO(self._data)
        stream.seek(self.at)
        try:  # going through opcodes and their arguments runs nothing
            opcodes = pickletools.genops(stream)
            stop = next(at or 0 for code, _, at in opcodes if code.name == "STOP")
        except (ValueError, StopIteration) as error:
            raise UsageError(
                f"{self._name} is cut short or damaged at {what}: {shown(str(error))}; {AGAIN}"
            ) from error
        data, self.at = self._data[self.at : stop + 1], stop + 1
        known, storage = (rebuild.known(), rebuild.storage) if rebuild else ({}, _no_storage)
        leaves = (TensorRef, np.dtype)
        return restricted_pickle.load(data, f"{self._name}: {what}", known, storage, leaves)


def _no_storage(pid: tuple) -> object:
    raise RefusedError(f"a persistent id {shown(pid)} where none belongs")


class _LegacyRebuild(Rebuild):
    """What the object's pickle calls; storages are placed in the file afterwards."""

    def __init__(self, file: FileBytes):
        super().__init__({})
        self.counts: dict[str, int] = {}
        self._file = file

    def storage(self, pid: tuple) -> Storage:
        """The storage of a persistent id."""
        kinds = [type(p) for p in pid]
        known = [str, StorageClass, str, str, int, type(None)]
        if kinds != known or pid[0] != "storage" or not 0 <= pid[4] <= self._file.size:
            raise RefusedError(f"a persistent id {shown(pid)} is refused, it is not a storage's")
        _, cls, key, _, count, _ = pid
        if cls.dtype is None:
            raise RefusedError(f"the storage {shown(key)} has no dtype")
        nbytes = count * cls.dtype.itemsize
        blob = self.blobs.setdefault(key, Blob(self._file, f"storage {key}", 0, nbytes))
        if blob.nbytes != nbytes or self.counts.setdefault(key, count) != count:
            raise RefusedError(f"the storage {shown(key)} is declared with two sizes")
        return Storage(blob, cls.dtype)


def _place(file: FileBytes, keys: object, at: int, rebuild: _LegacyRebuild) -> None:
    """Says of each storage where its numbers are; they follow from byte `at` to the file's end."""
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(rebuild.blobs):
        raise UsageError(f"{file.name} is damaged: its list of storages is not of those it uses")
    for key in keys:
        count = int.from_bytes(file.read(at, _COUNT_BYTES), "little")
        if count != rebuild.counts.get(key):
            raise UsageError(f"{file.name} is damaged: the size of storage {shown(key)}; {AGAIN}")
        blob = rebuild.blobs[key]
        blob.start = at + _COUNT_BYTES
        at = blob.start + blob.nbytes
    if at != file.size:
        raise UsageError(
            f"{file.name} is {file.size} bytes long, and its storages end at byte {at}; {AGAIN}"
        )
