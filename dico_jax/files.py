"""Files that are there whole or not at all, and the arrays that go into them."""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from dico_jax import __version__
from dico_jax.errors import UsageError

_CHUNK = 4 << 20  # bytes per write, between two calls of on_bytes
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Deferred:
    """A tensor of a dtype and shape that `make` returns when it is written or read."""

    def __init__(self, dtype: Any, shape: tuple[int, ...], make: Callable[[], Any]):
        self.dtype, self.shape, self.read = np.dtype(dtype), tuple(shape), make
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize


def is_tensor(value: object) -> bool:
    """Whether the writers take `value` as a tensor: it has dtype and shape, and is no scalar."""
    return hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, np.generic)


def write_array(stream: BinaryIO, tensor: Any, on_bytes: Callable | None, name: str) -> None:
    """Writes the numbers of a tensor, row-major and little-endian, holding it and nothing else."""
    array = np.asarray(tensor.read() if isinstance(tensor, Deferred) else tensor)
    if array.shape != tuple(tensor.shape) or array.dtype != np.dtype(tensor.dtype):
        said = f"{np.dtype(tensor.dtype).name}{list(tensor.shape)}"
        came = f"{array.dtype.name}{list(array.shape)}"
        raise ValueError(f"{name} was announced as {said} and came as {came}")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for at in range(0, len(raw), _CHUNK):
        stream.write(raw[at : at + _CHUNK])
        if on_bytes:
            on_bytes(len(raw[at : at + _CHUNK]))


@contextlib.contextmanager
def new_file(path: str | os.PathLike, survives: bool = True) -> Iterator[BinaryIO]:
    """A stream whose bytes appear as file `path` when the block ends, and nowhere when it fails.

    `survives`: also a power cut from then on, which costs the time of a disk's write.
    """
    with _appearing(path, survives) as temporary, temporary.open("xb") as stream:
        yield stream


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder that appears as `path` when the block ends, and nowhere when it fails."""
    with _appearing(path) as temporary:
        temporary.mkdir()
        yield temporary


@contextlib.contextmanager
def _appearing(path: str | os.PathLike, survives: bool = True) -> Iterator[pathlib.Path]:
    # Not tempfile's: those are private to the user, whatever the umask says.
    target = pathlib.Path(path).absolute()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if survives:
            sync(temporary, *temporary.rglob("*"))
        temporary.replace(target)
        if survives:
            sync(target.parent)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        shutil.rmtree(temporary, ignore_errors=True)


def sync(*paths: pathlib.Path) -> None:
    """Puts what files hold, and which files folders have, on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # of file systems that cannot do it for folders
                raise
        finally:
            os.close(descriptor)


def check_new(path: str | os.PathLike, nbytes: int, flag: str = "--out", exists=False) -> None:
    """UsageError unless --out is free, or an empty folder or file, and the disk has room for it."""
    target = pathlib.Path(path).absolute()
    full = any(target.iterdir()) if target.is_dir() else target.exists() and target.stat().st_size
    if full and not exists:
        raise UsageError(flag, path, "exists: give another name, or remove it")
    if not target.parent.is_dir():
        raise UsageError(flag, path, f": there is no folder {target.parent}, make it first")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(flag, path, f": the folder {target.parent} cannot be written to")
    if (free := shutil.disk_usage(target.parent).free) < nbytes:
        fix = f"needs about {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
        raise UsageError("--out", path, f"{fix}: make room, or give another place")


def result_path(out: str, suffix: str = "", flag: str = "--out", exists=False) -> pathlib.Path:
    """The path of a file, new or one that `exists`; UsageError if it cannot be written.

    `suffix` is what its name must end with, or a list such as ".pt or .pth".
    """
    path = pathlib.Path(out)
    if suffix and path.suffix.lower() not in re.findall(r"\.\w+", suffix):
        raise UsageError(flag, out, f": name a {suffix} file")
    if path.is_dir():
        raise UsageError(flag, out, "is a folder: name a file")
    check_new(path, 0, flag, exists)
    return path


def write_json(file: str | os.PathLike, result: Mapping[str, Any]) -> None:
    with new_file(file) as stream:
        stream.write((json.dumps(result, indent=2) + "\n").encode())


def json_lines(file: pathlib.Path, keep: Callable[[Any], Any]) -> list[Any]:
    """The values of JSON lines, if the file is there, that `keep` keeps; others are dropped.

    What is broken, or raises in `keep`, is said once, but for a last line that was cut.
    """
    kept, broken = [], 0
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            kept += [values] if keep(values := json.loads(line)) else []
        except (ValueError, LookupError, TypeError, RecursionError):
            broken += number < len(lines)
    if lines and (lines[-1] or len(kept) < len(lines) - 1):
        with new_file(file) as stream:
            stream.writelines(f"{json.dumps(values)}\n".encode() for values in kept)
    if broken:
        print(f"warning: {file}: {broken} broken lines are left out", file=sys.stderr)
    return kept


def file_digest(path: str | os.PathLike) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def arrays_digest(flat: Mapping[str, Any]) -> str:
    """sha256 (hex) over names and float32 numbers, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(flat[name], "<f4").data)
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """This project's version, and that of each library that decides numbers, by package."""
    return {"dico_jax": __version__} | {n: importlib.metadata.version(n) for n in _LIBRARIES}
