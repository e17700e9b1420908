"""Files, local and in buckets, that are there whole or not at all, and the arrays in them.

Every path that a user gives is made by `as_path`. In a bucket (gs://, s3://) an object is there
when all of it is, there are no folders, and nothing is renamed or appended to: what a disk does by
these, the functions here do by other means.
"""

import contextlib
import errno
import functools
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
import tempfile
import traceback
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, BinaryIO

import numpy as np
from etils import epath

from dico_jax import __version__
from dico_jax.errors import UsageError, one_line

BUCKETS = ("gs://", "s3://")
_CLIENTS = re.compile(r"/(gcsfs|s3fs|fsspec|aiohttp|google/auth|google/cloud/storage)/")
_CHUNK = 4 << 20  # bytes per write, between two calls of on_bytes
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(BUCKETS)


def as_path(path: str | os.PathLike) -> Any:
    """A path to work with: pathlib's, or in a bucket one with the same methods."""
    return _BucketPath(path) if is_remote(path) else pathlib.Path(path)


class _BucketPath(type(epath.Path())):  # type: ignore[misc]
    """A path in a bucket; its errors are OSErrors, and those of `_CLIENTS`."""

    @property
    def _backend(self):
        _set_up_clients()
        return super()._backend

    def absolute(self):
        return self

    def mkdir(self, *args, **kwargs) -> None:
        """Does nothing: there are objects alone, whose names have slashes."""


@functools.cache
def _set_up_clients() -> None:
    import fsspec

    # Others write there too: what was listed before may not be asked again.
    for scheme in ("gcs", "gs", "s3"):
        fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks more, and warns


def url_of(path: str | os.PathLike) -> str:
    """The address of a folder in a bucket, for TensorStore."""
    scheme, _, rest = str(as_path(path)).partition("://")
    return f"{scheme}://{urllib.parse.quote(rest)}/"


def opened(path: str | os.PathLike) -> contextlib.AbstractContextManager[IO[bytes]]:
    """A file to read bytes from, in a with statement."""
    return as_path(path).open("rb") if is_remote(path) else open(path, "rb")


def size_of(path: str | os.PathLike) -> int:
    """The bytes of a file."""
    return as_path(path).stat().length if is_remote(path) else os.path.getsize(path)


def names_in(folder: str | os.PathLike) -> list[str]:
    """What is in a folder; nothing, where there is none."""
    path = as_path(folder)
    if not is_remote(folder):
        return os.listdir(path) if path.is_dir() else []
    try:
        found = path._backend.fs(path).ls(str(path), detail=False)
    except FileNotFoundError:
        return []
    # Consoles and gcsfuse make an empty object FOLDER/, which would be in itself.
    above = str(path).partition("://")[2]
    return [os.path.basename(name) for name in (n.rstrip("/") for n in found) if name != above]


def files_below(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """All files at any depth by their paths there, with "size" and what else a bucket says."""
    path = as_path(folder)
    if not is_remote(folder):
        files = [file for file in path.rglob("*") if file.is_file()]
        return {str(f.relative_to(path)): {"size": f.stat().st_size} for f in files}
    above = f"{str(path).partition('://')[2]}/"
    found = path._backend.fs(path).find(str(path), detail=True).items()
    return {name.removeprefix(above): about for name, about in found if name[-1] != "/"}


def append(file: Any, data: bytes) -> None:
    """Adds to a file; one in a bucket is written anew."""
    if is_remote(file):
        file.write_bytes((file.read_bytes() if file.exists() else b"") + data)
    else:
        with file.open("ab") as stream:
            stream.write(data)


def of_bucket(error: BaseException) -> bool:
    """Whether an error, of one of many classes, was raised in a library for buckets."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(_CLIENTS.search(frame.filename) for frame in frames)


def check_bucket(said: str, path: str, write: bool) -> None:
    """Raises UsageError where a bucket cannot be read, or a file be written; nothing is made."""
    if not is_remote(path):
        return
    if write and re.search(r"[#*?\[\]]", path):  # what is deleted there would be others', too
        fix = "has one of # * ? [ ], which libraries take for patterns: leave it out"
        raise UsageError(said, path, fix)
    scheme, _, rest = path.partition("://")
    bucket, _, name = rest.partition("/")
    package, extra = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}[scheme]
    _set_up_clients()
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UsageError(said, path, f"needs {package}: pip install 'dico_jax[{extra}]'") from error
    try:
        fs = (target := as_path(path))._backend.fs(target)
        if scheme == "s3":
            fs.ls(bucket)
            return
        try:
            fs.call("GET", "b/{}/o", bucket, prefix=name, maxResults=1, json_out=True)
        except FileNotFoundError as error:
            fix = f"is in no bucket that there is: gcloud storage buckets create gs://{bucket}"
            raise UsageError(said, path, fix) from error
        if write:  # an upload that is never finished: it needs the permission, and makes nothing
            started = {"uploadType": "resumable", "name": f"{name.rstrip('/')}/probe".lstrip("/")}
            where = f"{fs._location}/upload/storage/v1/b/{{}}/o"
            fs.call("POST", where, bucket, json={}, **started)
            fs.call("GET", "b/{}", bucket, json_out=True)  # as Orbax does
    except UsageError:
        raise
    except Exception as error:  # of many classes
        text = f"cannot be used ({one_line(error)}): {_fix(bucket)}"
        raise UsageError(said, path, text) from error


def _fix(bucket: str) -> str:
    import google.auth

    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        return "there are no credentials: run gcloud auth application-default login"
    return f"get roles/storage.admin or objectAdmin with legacyBucketReader of gs://{bucket}"


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
    if is_remote(path):
        try:
            with tempfile.NamedTemporaryFile() as stream:
                yield stream  # type: ignore[misc]
                stream.flush()
                _upload(stream.name, path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = f"{tempfile.gettempdir()}, where it is put together (TMPDIR), is full"
            raise UsageError(f"{path} cannot be written: {where}") from error
        return
    with _appearing(path, survives) as temporary, temporary.open("xb") as stream:
        yield stream


def upload(folder: str | os.PathLike, to: str | os.PathLike) -> None:
    """Copies the files of a local folder to one in a bucket, if it is another."""
    for name in files_below(folder) if is_remote(to) else ():
        _upload(os.path.join(folder, name), as_path(to) / name)


def download(path: Any, to: Any) -> None:
    """Copies an object of a bucket to a local file."""
    path._backend.fs(path).get_file(str(path), str(to))


def _upload(file: str, path: str | os.PathLike) -> None:
    target = as_path(path)
    try:
        target._backend.fs(target).put_file(file, str(target))
    except Exception as error:  # of many classes
        raise UsageError(f"{path} cannot be written: {one_line(error)}") from error


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Any]:
    """A folder that appears as `path` when the block ends, and nowhere when it fails.

    In a bucket its files appear one by one: what tells that all are there is to be the last.
    """
    if is_remote(path):
        try:
            yield (target := as_path(path))
        except BaseException:
            with contextlib.suppress(Exception):  # no rmtree: at its root it removes the bucket
                for name in files_below(target):
                    (target / name).unlink()
            raise
        return
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
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


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
    target = as_path(path).absolute()
    full = any(target.iterdir()) if target.is_dir() else target.exists() and size_of(target)
    if full and not exists:
        raise UsageError(flag, path, "exists: give another name, or remove it")
    if is_remote(path):
        return
    if not target.parent.is_dir():
        raise UsageError(flag, path, f": there is no folder {target.parent}, make it first")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(flag, path, f": the folder {target.parent} cannot be written to")
    if (free := shutil.disk_usage(target.parent).free) < nbytes:
        fix = f"needs about {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
        raise UsageError("--out", path, f"{fix}: make room, or give another place")


def result_path(out: str, suffix: str = "", flag: str = "--out", exists=False) -> Any:
    """The path of a file, new or one that `exists`; UsageError if it cannot be written.

    `suffix` is what its name must end with, or a list such as ".pt or .pth".
    """
    path = as_path(out)
    if suffix and path.suffix.lower() not in re.findall(r"\.\w+", suffix):
        raise UsageError(flag, out, f": name a {suffix} file")
    if path.is_dir():
        raise UsageError(flag, out, "is a folder: name a file")
    check_new(path, 0, flag, exists)
    return path


def write_json(file: str | os.PathLike, result: Mapping[str, Any]) -> None:
    with new_file(file) as stream:
        stream.write((json.dumps(result, indent=2) + "\n").encode())


def json_lines(file: Any, keep: Callable[[Any], Any]) -> list[Any]:
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
    with opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


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
