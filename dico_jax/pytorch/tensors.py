"""Tensors inside files, read one at a time, little-endian in all formats.

A tensor of a file is a `Deferred`, so that a program holds one tensor of 2.8 GB and not all. Files
are not memory-mapped: pages of a map count as the process's memory until it is closed.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import reprlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from dico_jax.errors import UsageError
from dico_jax.files import Deferred

# PyTorch's name of a dtype, and NumPy's dtype of the same bits.
DTYPES: dict[str, np.dtype] = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16")},
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    },
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u")
       for bits in (64, 32, 16, 8)},
    "bool": np.dtype(bool),
}  # fmt: skip

MAX_JSON = 16 << 20  # bytes; 20,000 tensors take about two million
AGAIN = "download or save it again"  # the fix in messages about damaged files

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 4 << 20  # bytes per read
_MAX_DIMS = 32
_MAX_DEPTH = 64


class _Short(reprlib.Repr):
    """Looks at a few parts of containers alone: those of a file may be deep, or shared ones."""

    def repr_instance(self, x: object, level: int) -> str:
        return repr(x) if x is None or isinstance(x, float | np.dtype) else type(x).__name__

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 200 else f"a number of {x.bit_length()} bits"

    repr_bool = repr_int


def shown(value: object, limit: int = 100) -> str:
    """`value` from a file, printable, short and in one line for a message; strings are quoted."""
    text = repr(value[: 2 * limit]) if isinstance(value, str | bytes) else _SHORT.repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring = 3, 100


def dtype_name(dtype: Any) -> str:
    """PyTorch's name of a NumPy dtype of either byte order; TypeError where it has none."""
    dtype = np.dtype(dtype)
    name = _NAMES.get(dtype.newbyteorder("=") if dtype.byteorder == ">" else dtype)
    if name is None:
        raise TypeError(f"tensors of dtype {dtype} cannot be saved; use one of {', '.join(DTYPES)}")
    return name


@contextlib.contextmanager
def refusing(what: str, how: str = "is damaged or cut short") -> Iterator[None]:
    """Makes a UsageError, `what` `how`, of whatever libraries raise about what somebody bent."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{what} {how}: {reason[:300]}; {AGAIN}") from None


@contextlib.contextmanager
def about(name: str, source: str = "") -> Iterator[None]:
    """Starts a UsageError with the file or flag it is about, in place of the file `source`."""
    try:
        yield
    except UsageError as error:
        text = str(error)
        if text.startswith(("--", name)):
            raise
        if source:
            text = text.removeprefix(f"{source} ").removeprefix(f"{source}: ")
        raise UsageError(f"{name}: {text}") from error


class InputFile:
    """An ordinary file, read by byte ranges; threads may share it.

    `on_bytes` is called with the number of bytes whenever tensor data was read.
    """

    def __init__(self, path: str | os.PathLike, on_bytes: Callable[[int], object] | None = None):
        self.name, self.on_bytes = os.fspath(path), on_bytes
        # A pipe would wait for its writer.
        if os.path.exists(self.name) and not os.path.isfile(self.name):
            raise UsageError(f"{self.name} is a folder or a device; name a file")
        try:
            self.stream = open(self.name, "rb")  # noqa: SIM115 (closed by close)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{self.name} cannot be opened: {reason}") from error
        self.size = os.fstat(self.stream.fileno()).st_size

    def close(self) -> None:
        """Reading afterwards raises ValueError."""
        self.stream.close()

    def read_into(self, start: int, buffer: memoryview, report: bool = False) -> None:
        """Fills `buffer` (of bytes) from byte `start` on; counts it for `on_bytes` if `report`."""
        while buffer:
            count = os.preadv(self.stream.fileno(), [buffer[:_CHUNK]], start)
            if not count:
                raise UsageError(f"{self.name} is cut short: it ends at byte {start}; {AGAIN}")
            buffer, start = buffer[count:], start + count
            if report and self.on_bytes:
                self.on_bytes(count)

    def read(self, start: int, count: int) -> bytes:
        """The `count` bytes from `start` on."""
        if start < 0 or start + count > self.size:
            raise UsageError(f"{self.name} is cut short or damaged; {AGAIN}")
        buffer = bytearray(count)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def refuse_placeholder(self) -> None:
        """Raises UsageError for what often lies in a download's place."""
        start = self.read(0, min(self.size, 64))
        if not start:
            raise UsageError(f"{self.name} is empty; {AGAIN}")
        if start.startswith(b"version https://git-lfs"):
            raise UsageError(f"{self.name} is a Git LFS pointer; fetch the file (git lfs pull)")
        if start.lstrip()[:1] == b"<":
            raise UsageError(f"{self.name} is a web page; download the file itself")


def json_object(path: str) -> dict[str, Any]:
    """The JSON object that a file holds."""
    with contextlib.closing(InputFile(path)) as file:
        file.refuse_placeholder()
        if file.size > MAX_JSON:
            raise UsageError(f"{path} is {file.size} bytes long; at most {MAX_JSON}")
        with refusing(path, "is not JSON"):
            found = json.loads(file.read(0, file.size))
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a JSON object")
    return found


@dataclasses.dataclass(eq=False)
class Blob:
    """Bytes of a file from `start` on, under the format's name of them.

    Their CRC-32, where there is one, is checked when they are first read.
    """

    file: InputFile
    name: str
    start: int
    nbytes: int
    crc: int | None = None

    def read_into(self, offset: int, buffer: memoryview, report: bool = True) -> None:
        """Fills `buffer` with the bytes from `offset` (within the blob) on."""
        if self.crc is not None and len(buffer) < self.nbytes:
            found = 0
            for at in range(0, self.nbytes, _CHUNK):
                part = self.file.read(self.start + at, min(_CHUNK, self.nbytes - at))
                found = zlib.crc32(part, found)
            self._compare(found)
        self.file.read_into(self.start + offset, buffer, report)
        if self.crc is not None:
            self._compare(zlib.crc32(buffer))

    def _compare(self, found: int) -> None:
        if found != self.crc:
            what = f"the checksum of {shown(self.name)} does not match its data"
            raise UsageError(f"{self.file.name} is damaged: {what}; {AGAIN}")
        self.crc = None  # once is enough

    def read_small(self, limit: int) -> bytes:
        """All bytes; raises UsageError for more than `limit`."""
        if self.nbytes > limit:
            what = f"{shown(self.name)} is {self.nbytes} bytes long; at most {limit}"
            raise UsageError(f"{self.file.name}: {what}")
        data = bytearray(self.nbytes)
        self.read_into(0, memoryview(data), report=False)
        return bytes(data)


def tensor(
    blob: Blob, dtype: np.dtype, shape: Any, offset: Any = 0, strides: Any = None
) -> Deferred:
    """A tensor in stored bytes; its `read` gives a new C-contiguous array.

    `shape`, `offset` and `strides` count elements as PyTorch does, and are checked: UsageError
    where they are no counts, or the tensor does not fit into the stored bytes.
    """
    where = f"{blob.file.name}: a tensor in {shown(blob.name)}"
    if strides is None and _are_counts(shape):
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if (
        not (_are_counts(shape) and _are_counts((offset,)) and _are_counts(strides))
        or len(strides) != len(shape)
        # NumPy refuses an empty array whose other dimensions would overflow.
        or math.prod(max(d, 1) for d in shape) * dtype.itemsize >= 1 << 62
    ):
        what = shown((shape, offset, strides))
        raise UsageError(f"{where} has no sensible shape, offset and strides: {what}")
    span = 1 + sum((d - 1) * s for d, s in zip(shape, strides, strict=True))
    needed = (offset + span) * dtype.itemsize if math.prod(shape) else 0
    if needed > blob.nbytes:
        what = f"shape {list(shape)}, strides {list(strides)} and offset {offset} need {needed}"
        raise UsageError(f"{where} reaches past its storage: {what} bytes of {blob.nbytes}")

    def read() -> np.ndarray:
        if not math.prod(shape):
            return np.empty(shape, dtype)
        raw = np.empty(span * dtype.itemsize, np.uint8)
        blob.read_into(offset * dtype.itemsize, raw.data)
        # Any other byte makes a NumPy bool that is neither true nor false.
        if dtype == np.bool_ and raw.max() > 1:
            what = f"a bool in {shown(blob.name)} is not 0/1"
            raise UsageError(f"{blob.file.name} is damaged: {what}")
        steps = tuple(s * dtype.itemsize for s in strides)
        return np.asarray(np.ndarray(shape, dtype, raw.data, 0, steps), order="C")

    return Deferred(dtype, shape, read)


def _are_counts(values: object) -> bool:
    return (
        type(values) is tuple
        and len(values) <= _MAX_DIMS
        and all(type(v) is int and 0 <= v < 1 << 62 for v in values)
    )


def values_in(tree: object, where: str = "the tree", level: int = 0) -> Iterator[object]:
    """All values in a tree of dicts, lists, tuples and Namespaces, itself included."""
    if level > _MAX_DEPTH:
        deep = f"is nested more than {_MAX_DEPTH} levels deep, or contains itself"
        raise UsageError(f"{where} {deep}")
    yield tree
    if isinstance(tree, argparse.Namespace):
        tree = vars(tree)
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from values_in(value, where, level + 1)
