"""Files that are there whole or not at all, and the arrays that go into them."""

import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np

from dico_jax import __version__
from dico_jax.errors import UsageError

_CHUNK = 4 << 20  # bytes per write, between two calls of on_bytes
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


@runtime_checkable
class LazyTensor(Protocol):
    """A tensor that is made when it is written; `Deferred` is one.

    Attributes:
      dtype: NumPy's dtype.
      shape: the shape.
    """

    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The array of that dtype and shape."""


class Deferred:
    """A tensor given by a function that makes it, for the writers.

    Args:
      dtype: its dtype.
      shape: its shape.
      make: returns the array; called once, when its turn comes.
    """

    def __init__(self, dtype: Any, shape: tuple[int, ...], make: Callable[[], Any]):
        self.dtype = np.dtype(dtype)
        self.shape = tuple(shape)
        self.read = make

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_tensor(value: object) -> bool:
    """Whether the writers take `value` as a tensor: it has dtype and shape, and is no scalar."""
    return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, np.generic)


def write_array(
    stream: BinaryIO, tensor: Any, on_bytes: Callable[[int], object] | None, name: str
) -> None:
    """Writes the numbers of a tensor, row-major, holding it and nothing else.

    Raises:
      ValueError: a lazy tensor made an array of another shape or dtype than it had said.
    """
    array = np.asarray(tensor.read() if isinstance(tensor, LazyTensor) else tensor)
    if array.shape != tuple(tensor.shape) or array.dtype != np.dtype(tensor.dtype):
        raise ValueError(
            f"{name} was announced as {np.dtype(tensor.dtype).name}{list(tensor.shape)} and came "
            f"as {array.dtype.name}{list(array.shape)}"
        )
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for at in range(0, len(raw), _CHUNK):
        part = raw[at : at + _CHUNK]
        stream.write(part)
        if on_bytes:
            on_bytes(len(part))


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A stream whose bytes appear as file `path` when the block ends, and nowhere when it fails.

    They go to a temporary file in the same folder, which then replaces an older `path`.

    Raises:
      UsageError: the folder does not exist, may not be written to, or is full.
    """
    target, temporary = _beside(path)
    try:
        with _os_errors(path):
            if target.is_dir():
                raise UsageError(f"{path} is a folder; name the file to write")
            with temporary.open("xb") as stream:
                yield stream
            temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder that appears as `path` when the block ends, and nowhere when it fails.

    It is a temporary folder beside `path` at first, see `check_new` for what may be there already.

    Raises:
      UsageError: the parent does not exist or may not be written to, or there is something at
        `path` in the end.
    """
    target, temporary = _beside(path)
    try:
        with _os_errors(path):
            temporary.mkdir()
        yield temporary
        with _os_errors(path):
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: str | os.PathLike) -> tuple[pathlib.Path, pathlib.Path]:
    """The path, and a free one in the same folder."""
    # Not tempfile's: those are private to the user, whatever the umask says.
    target = pathlib.Path(path).absolute()
    return target, target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def _os_errors(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def check_new(path: str | os.PathLike, nbytes: int) -> None:
    """Checks that `path` is free (or an empty folder or file) and that the disk has room.

    Args:
      path: the file or folder to make.
      nbytes: about how large it will be.

    Raises:
      UsageError: there is something already, the parent does not exist, or the disk is too full.
    """
    target = pathlib.Path(path).absolute()
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"--out={path} exists and is not empty: give another name, or remove it")
    if target.is_file() and target.stat().st_size:
        raise UsageError(f"--out={path} exists: give another name, or remove it")
    if not target.parent.is_dir():
        raise UsageError(f"--out={path}: the folder {target.parent} does not exist, make it first")
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise UsageError(
            f"--out={path} needs about {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free "
            "there: make room, or give another place"
        )


def result_path(out: str, suffix: str) -> pathlib.Path:
    """The path of a file that can be written.

    Raises:
      UsageError: it is there already, has another suffix, or its folder is not there.
    """
    path = pathlib.Path(out)
    if path.suffix != suffix:
        raise UsageError(f"--out={out}: name a {suffix} file")
    if path.exists():
        raise UsageError(f"--out={out} exists: give another name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--out={out}: there is no folder {path.absolute().parent}")
    return path


def write_json(file: str | os.PathLike, result: Mapping[str, Any]) -> None:
    """Writes a result; the file appears when it is complete."""
    with new_file(file) as stream:
        stream.write((json.dumps(result, indent=2) + "\n").encode())


def library_versions() -> dict[str, str]:
    """This project's version, and that of each library that decides numbers, by package."""
    return {"dico_jax": __version__} | {
        name: importlib.metadata.version(name) for name in _LIBRARIES
    }
