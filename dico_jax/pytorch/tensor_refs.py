"""Tensors inside files, read one at a time.

`TensorRef` says where a tensor lies in a file and reads it when asked, so that a program that goes
through a file of 2.8 GB holds one tensor and not the file. Files are read with seek and readinto
and not memory-mapped: pages of a map count as the process's memory until the map is closed.

Tensors are little-endian in both file formats, and so is every machine that JAX runs on.
"""

import dataclasses
import math
import os
import stat
import threading
import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from dico_jax.errors import UsageError

# PyTorch's name of a dtype, and NumPy's dtype of the same bits.
DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}

AGAIN = "download or save it again"  # the fix in messages about damaged files

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 4 << 20  # bytes per read: small enough that the checksum finds them in the cache
_MAX_DIMS = 32
_MAX_TOTAL_FACTOR = 10  # logical bytes of all tensors over the file's size
_MAX_TOTAL_FREE = 64 << 20  # bytes


def shown(value: object, limit: int = 100) -> str:
    """`value` from a file, fit for a one-line message: strings quoted, long ones cut."""
    text = repr(value[: 2 * limit]) if isinstance(value, str | bytes) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def dtype_name(dtype: Any) -> str:
    """PyTorch's name of a NumPy dtype, of either byte order.

    Raises:
      TypeError: it has none here.
    """
    dtype = np.dtype(dtype)
    name = _NAMES.get(dtype.newbyteorder("=") if dtype.byteorder == ">" else dtype)
    if name is None:
        raise TypeError(f"tensors of dtype {dtype} cannot be saved; use one of {', '.join(DTYPES)}")
    return name


class FileBytes:
    """An ordinary file, read by byte ranges; threads may share it.

    Args:
      path: the file.
      on_bytes: called with the number of bytes whenever tensor data was read, for progress bars.

    Attributes:
      name: the path, as messages give it.
      size: the file's length in bytes.

    Raises:
      UsageError: there is no such file, it is a folder or a device, or it may not be read.
    """

    def __init__(self, path: str | os.PathLike, on_bytes: Callable[[int], object] | None = None):
        self.name = os.fspath(path)
        self.on_bytes = on_bytes
        self._lock = threading.Lock()
        try:
            # Before opening: opening a pipe would wait for its writer.
            if not stat.S_ISREG(os.stat(self.name).st_mode):
                raise UsageError(f"{self.name} is a folder or a device; name a file")
            self._file = open(self.name, "rb")  # noqa: SIM115 (closed by close)
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{self.name} cannot be opened: {reason}") from error
        self.size = os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Closes the file; reading afterwards raises ValueError."""
        self._file.close()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` (of bytes) with the file's bytes from `start` on."""
        with self._lock:
            self._file.seek(start)
            # A buffered file returns less than asked only at its end.
            if self._file.readinto(buffer) != len(buffer):
                raise UsageError(f"{self.name} is cut short: it ends before byte {start}; {AGAIN}")

    def read(self, start: int, count: int) -> bytes:
        """The `count` bytes from `start` on."""
        if start < 0 or count < 0 or start + count > self.size:
            raise UsageError(f"{self.name} is cut short or damaged; {AGAIN}")
        buffer = bytearray(count)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)


def refuse_placeholder(file: FileBytes) -> None:
    """Names what often lies in a download's place.

    Raises:
      UsageError: the file is empty, a Git LFS pointer or a web page.
    """
    start = file.read(0, min(file.size, 512))
    if not start:
        raise UsageError(f"{file.name} is empty; {AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{file.name} is a Git LFS pointer; fetch the file itself (git lfs pull)")
    if start.lstrip()[:1] == b"<":
        raise UsageError(f"{file.name} is a web page; download the file itself")


@dataclasses.dataclass(eq=False)
class Blob:
    """A run of bytes in a file, with its checksum where the format has one.

    Attributes:
      file: the file.
      name: what the format calls these bytes (a zip entry, the data of a .safetensors file).
      start: position of the first byte in the file.
      nbytes: their number.
      crc: their CRC-32, or None. It is checked when the blob is first read.
    """

    file: FileBytes
    name: str
    start: int
    nbytes: int
    crc: int | None = None

    def read_into(self, offset: int, buffer: memoryview, report: bool = True) -> None:
        """Fills `buffer` with the bytes from `offset` (within the blob) on.

        Args:
          offset: the first byte's position in the blob.
          buffer: of bytes.
          report: whether these bytes count for `on_bytes`.

        Raises:
          UsageError: the file ended early, or the checksum is wrong.
        """
        whole = offset == 0 and len(buffer) == self.nbytes
        if self.crc is not None and not whole:
            self._check_all()
        crc = 0
        for at in range(0, len(buffer), _CHUNK):
            part = buffer[at : at + _CHUNK]
            self.file.read_into(self.start + offset + at, part)
            if self.crc is not None and whole:
                crc = zlib.crc32(part, crc)
            if report and self.file.on_bytes:
                self.file.on_bytes(len(part))
        if whole:
            self._compare(crc)

    def _check_all(self) -> None:
        """Checks the checksum in pieces: a view reads a part, the checksum is of the whole."""
        piece = memoryview(bytearray(min(_CHUNK, self.nbytes)))
        crc = 0
        for at in range(0, self.nbytes, _CHUNK):
            part = piece[: min(_CHUNK, self.nbytes - at)]
            self.file.read_into(self.start + at, part)
            crc = zlib.crc32(part, crc)
        self._compare(crc)

    def _compare(self, crc: int) -> None:
        if self.crc is not None and crc != self.crc:
            raise UsageError(
                f"{self.file.name} is damaged: the checksum of {shown(self.name)} does not match "
                f"its data; {AGAIN}"
            )
        self.crc = None  # once is enough


@dataclasses.dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor in a file, not yet read. Make it with `tensor_ref`, which checks the numbers.

    Attributes:
      dtype: NumPy's dtype (ml_dtypes' for bfloat16 and the 8-bit floats).
      shape: the tensor's shape.
      strides: steps in elements (not bytes), one per dimension, as PyTorch counts them.
      offset: position of the first element in `blob`, in bytes.
      blob: the stored bytes; several tensors may share them.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    blob: Blob

    @property
    def path(self) -> str:
        """The file's name, as messages give it."""
        return self.blob.file.name

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array that `read` returns."""
        return self.size * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other, the last dimension fastest."""
        return self.size == 0 or all(
            d == 1 or s == c
            for d, s, c in zip(self.shape, self.strides, _row_major(self.shape), strict=True)
        )

    def read(self) -> np.ndarray:
        """The tensor as a new C-contiguous array; the caller may write to it.

        Raises:
          UsageError: the file ended early, a checksum is wrong, or a bool is neither 0 nor 1.
        """
        if self.is_contiguous:
            out = np.empty(self.shape, self.dtype)
            self._fill(out)
        else:
            flat = np.empty(_span(self.shape, self.strides), self.dtype)
            self._fill(flat)
            steps = tuple(s * self.dtype.itemsize for s in self.strides)
            view = np.lib.stride_tricks.as_strided(flat, self.shape, steps)
            out = np.array(view, order="C")
        return out

    def _fill(self, array: np.ndarray) -> None:
        raw = array.reshape(-1).view(np.uint8)
        self.blob.read_into(self.offset, raw.data)
        # Any other byte makes a NumPy bool that is neither true nor false.
        if self.dtype == np.bool_ and raw.size and raw.max() > 1:
            raise UsageError(
                f"{self.path} is damaged: a bool in {shown(self.blob.name)} is not 0/1"
            )

    def __repr__(self) -> str:
        """The shape and dtype, and where the tensor lies."""
        return f"TensorRef({self.dtype.name}{list(self.shape)} in {self.blob.name})"


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements of the storage lie between a tensor's first and last, both included."""
    return 1 + sum((d - 1) * s for d, s in zip(shape, strides, strict=True))


def _are_counts(values: object) -> bool:
    return (
        type(values) is tuple
        and len(values) <= _MAX_DIMS
        and all(type(v) is int and 0 <= v < 1 << 62 for v in values)
    )


def tensor_ref(
    blob: Blob, dtype: np.dtype, shape: object, offset: object = 0, strides: object = None
) -> TensorRef:
    """A checked TensorRef.

    Args:
      blob: the stored bytes.
      dtype: NumPy's dtype.
      shape: a tuple of counts, as the file gives it.
      offset: the first element's position in the blob, in elements.
      strides: a tuple of steps in elements; None when contiguous.

    Raises:
      UsageError: the numbers are not counts, or the tensor does not fit into the stored bytes.
    """
    where = f"{blob.file.name}: a tensor in {shown(blob.name)}"
    if not _are_counts(shape) or not _are_counts((offset,)):
        raise UsageError(f"{where} has no sensible shape or offset: {shown((shape, offset))}")
    assert isinstance(shape, tuple)
    assert isinstance(offset, int)
    if strides is None:
        strides = _row_major(shape)
    if not _are_counts(strides) or len(strides) != len(shape):  # type: ignore[arg-type]
        raise UsageError(f"{where} has no sensible strides: {shown(strides)}")
    assert isinstance(strides, tuple)
    # NumPy refuses an empty array whose other dimensions would overflow.
    if math.prod(max(d, 1) for d in shape) * dtype.itemsize >= 1 << 62:
        raise UsageError(f"{where} has no sensible shape: {shown(shape)}")
    size = math.prod(shape)
    end = (offset + _span(shape, strides) if size else offset) * dtype.itemsize
    if end > blob.nbytes and size:
        raise UsageError(
            f"{where} reaches past its storage: shape {list(shape)}, strides {list(strides)} and "
            f"offset {offset} need {end} bytes of {blob.nbytes}"
        )
    return TensorRef(dtype, shape, strides, offset * dtype.itemsize, blob)


def check_total(file: FileBytes, nbytes: int) -> None:
    """Refuses files whose tensors, read one by one, would be far larger than the file.

    Views and expanded tensors may repeat stored numbers; a few bytes could so ask for terabytes.
    """
    if nbytes > _MAX_TOTAL_FACTOR * file.size + _MAX_TOTAL_FREE:
        raise UsageError(
            f"{file.name} is {file.size} bytes long, and its tensors would be {nbytes} bytes: "
            f"refused, as views of a few stored numbers; save them with .contiguous()"
        )
