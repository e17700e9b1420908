"""Files of reference statistics, and of images to compute them from.

Three layouts are read, all npz files: ADM's (`mu`, `sigma`, `mu_s`, `sigma_s`, and `arr_0` with
uint8 images), pytorch-fid's (`mu`, `sigma`), and that of `save_statistics`, which the code of both
others can read too. Object arrays are never unpickled.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from dico_jax.data.image_sets import ImageSet
from dico_jax.errors import UsageError
from dico_jax.evaluation.distances import check_moments
from dico_jax.evaluation.moments import check_rows
from dico_jax.files import new_file

_METADATA = "dico_jax"  # array with the JSON of our own files
_VERSION = 1
_ARRAYS = {
    "mean": "mu",
    "covariance": "sigma",
    "spatial_mean": "mu_s",
    "spatial_covariance": "sigma_s",
    "pool_features": "pool_features",
}
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# What zipfile and NumPy raise for a damaged file.
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, KeyError, OSError, RuntimeError,
    ValueError,
)  # fmt: skip
# Ranges of numbers that are no uint8 images, and what makes them ones.
_MENDED = {(0, 1): "round(255 * x)", (-1, 1): "clip(127.5 * x + 128, 0, 255)", (0, 255): "round(x)"}


class NpzImages(ImageSet):
    """The uint8 images (N, H, W, C) in `arr_0` of an npz file, read in batches, never as a whole.

    Attributes:
      name: what messages and results call it.
      shape: (H, W, C) of an image; C is 1 or 3.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None):
        """Looks at the array, without reading it.

        Raises:
          UsageError: no npz file, no such array, or one that is no uint8 NHWC.
        """
        self._path = os.fspath(path)
        self.name = name or self._path
        with _opened(self._path) as file, _member(file, "arr_0") as member:
            _check_images(member)
        self._count, height, width, channels = member.shape
        self.shape = height, width, channels

    def __len__(self):
        return self._count

    def batches(self, size, start=0, stop=None):
        """See `ImageSet`."""
        start, stop, _ = slice(start, stop).indices(len(self))
        nbytes = math.prod(self.shape)
        with _opened(self._path) as file, _member(file, "arr_0") as member:
            member.stream.seek(start * nbytes, os.SEEK_CUR)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                batch = np.frombuffer(member.stream.read(count * nbytes), np.uint8)
                yield batch.reshape(count, *self.shape)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a set of images is to the metrics.

    Attributes:
      features: name of the feature network, such as "inception".
      mean: float64 (D,) of the pooled features.
      covariance: float64 (D, D), divided by the number of images less 1.
      spatial_mean: float64 (S,) of the spatial features, or None.
      spatial_covariance: float64 (S, S), or None.
      pool_features: (N, D) of a floating dtype, for precision, recall and KID, or None.
      count: how many images the means are of; None where the file does not say.
      digest: sha256 (hex) of the file; "" before there is one.
      info: how it was made, as JSON can say it; {} where the file does not say.
      images: those that the file holds besides, which need not be all of `count`, or None.
    """

    features: str
    mean: np.ndarray
    covariance: np.ndarray
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None
    pool_features: np.ndarray | None = None
    count: int | None = None
    digest: str = ""
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: NpzImages | None = None


def open_reference(path: str | os.PathLike, features: str = "inception") -> Statistics | NpzImages:
    """What the npz file `path` holds: statistics, or images alone.

    Args:
      path: a local file, in one of the layouts of this module.
      features: the feature network of files that do not name theirs.

    Raises:
      UsageError: naming the file, and what it should hold.
    """
    path = os.fspath(path)
    with _opened(path) as file:
        names = set(_names(file))
        metadata: dict[str, Any] = {"features": features}
        if _METADATA in names:
            metadata = _metadata(file)
        images = NpzImages(path) if "arr_0" in names else None
        if not names & {"mu", "sigma"}:
            if images is not None:
                return images
            raise UsageError(
                f"{path} holds {_listed(file)}: a reference has mu and sigma (statistics), or "
                "arr_0 (uint8 images, NHWC)"
            )
        mean, covariance = _moments(file, "mu", "sigma")
        spatial = names & {"mu_s", "sigma_s"}
        spatial_moments = _moments(file, "mu_s", "sigma_s") if spatial else (None, None)
        rows = _pool_features(file, len(mean)) if "pool_features" in names else None
        return Statistics(
            **metadata,
            mean=mean,
            covariance=covariance,
            spatial_mean=spatial_moments[0],
            spatial_covariance=spatial_moments[1],
            pool_features=rows,
            digest=file_digest(path),
            images=images,
        )


def save_statistics(path: str | os.PathLike, statistics: Statistics) -> str:
    """Writes statistics as an npz file, which appears when it is complete. Images are left out.

    Returns:
      The sha256 (hex) of the file.

    Raises:
      UsageError: there is something at `path`, or it cannot be written.
    """
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: give another name, or remove it")
    about = {name: getattr(statistics, name) for name in ("features", "count", "info")}
    found = {name: getattr(statistics, field) for field, name in _ARRAYS.items()}
    arrays: Any = {name: array for name, array in found.items() if array is not None}
    arrays[_METADATA] = np.array(json.dumps({"version": _VERSION} | about))
    with new_file(path) as stream:
        np.savez(stream, **arrays)
    return file_digest(path)


def file_digest(path: str | os.PathLike) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Arrays of statistics.


def _moments(file: zipfile.ZipFile, mean: str, covariance: str) -> tuple[np.ndarray, np.ndarray]:
    path = file.filename
    for name, other in ((mean, covariance), (covariance, mean)):
        if name not in _names(file):
            raise UsageError(f"{path} holds {other} but no {name}: statistics need both")
    arrays = _floats(file, mean), _floats(file, covariance)
    return check_moments(*arrays, f"{path}, {mean} and {covariance}")


def _pool_features(file: zipfile.ZipFile, width: int) -> np.ndarray:
    rows, what = _floats(file, "pool_features"), f"{file.filename}, pool_features"
    return check_rows(rows, what, width=width)


def _floats(file: zipfile.ZipFile, name: str) -> np.ndarray:
    with _member(file, name) as member:
        if member.dtype.kind != "f":
            raise UsageError(
                f"{member.where} is of dtype {member.dtype}: floating-point numbers are expected"
            )
    return _array(file, name)


def _metadata(file: zipfile.ZipFile) -> dict[str, Any]:
    types = {"features": str, "info": dict, "count": int | None}
    with _member(file, _METADATA) as member:
        text = str(_array(file, _METADATA)) if member.dtype.kind == "U" and not member.shape else ""
    try:
        metadata = json.loads(text)
        found = {key: metadata[key] for key in types}
        known = metadata["version"] == _VERSION
    except (ValueError, KeyError, TypeError):
        known = False
    if not known or not all(isinstance(found[key], kind) for key, kind in types.items()):
        raise UsageError(
            f"{member.where} is no description of statistics that this version knows: "
            "write the file again with save_statistics"
        )
    return found


# Reading. Whatever is wrong with a file is a UsageError that names it.


class _Member(NamedTuple):
    """An array of an npz file, of which the header has been read; `where` is for messages."""

    where: str
    stream: IO[bytes]
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def described(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@contextlib.contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    if "://" in path:
        raise UsageError(f"{path} is no local file: copy it to this machine first")
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except UsageError:
        raise
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.strerror:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        reason = [*str(error).splitlines(), "it ends too soon"][0]
        raise UsageError(
            f"{path} cannot be read ({reason}): it is no npz file, damaged or cut short"
        ) from error


def _names(file: zipfile.ZipFile) -> list[str]:
    """Of the arrays in it."""
    return sorted(name[:-4] for name in file.namelist() if name.endswith(".npy"))


@contextlib.contextmanager
def _member(file: zipfile.ZipFile, name: str) -> Iterator[_Member]:
    """An array that is neither cut short nor of objects, before its numbers are read."""
    if name not in _names(file):
        raise UsageError(f"{file.filename} holds {_listed(file)}, but no {name}")
    where, info = f"{file.filename}, {name}", file.getinfo(f"{name}.npy")
    with file.open(info) as stream:
        member = _Member(where, stream, *_READ_HEADER[npy.read_magic(stream)](stream))
        if member.dtype.hasobject:
            raise UsageError(
                f"{where} is an object array, which may run code when it is read: save plain "
                "numbers"
            )
        found = info.file_size - stream.tell()
        expected = math.prod(member.shape) * member.dtype.itemsize
        if found != expected:
            raise UsageError(
                f"{where} has {found} bytes, and {member.described} has {expected}: the file is "
                "damaged, get it again"
            )
        yield member


def _array(file: zipfile.ZipFile, name: str) -> np.ndarray:
    with file.open(f"{name}.npy") as stream:
        return npy.read_array(stream, allow_pickle=False)


def _listed(file: zipfile.ZipFile) -> str:
    return ", ".join(_names(file)) or "no arrays"


def _check_images(member: _Member) -> None:
    where, shape = f"{member.where} is {member.described}", member.shape
    if len(shape) != 4:
        raise UsageError(f"{where}: images (N, H, W, C) are expected")
    if 0 in shape:
        raise UsageError(f"{where}: there is no image in it")
    if member.dtype != np.uint8:
        raise UsageError(f"{where}{_found(member)}: uint8 images from 0 to 255 are expected")
    if shape[3] not in (1, 3):
        hint = ", which is NCHW: NHWC is expected, transpose it (0, 2, 3, 1)"
        other = ": 1 or 3 channels are expected in the last axis"
        raise UsageError(f"{where}{hint if shape[1] in (1, 3) else other}")
    if member.fortran_order:
        raise UsageError(
            f"{where} in Fortran order, which cannot be read image by image: save "
            "np.ascontiguousarray of it"
        )


def _found(member: _Member) -> str:
    """What the first of wrong images holds, and how to make uint8 of it."""
    if member.dtype.kind not in "iuf":
        return ""
    nbytes = math.prod(member.shape[1:]) * member.dtype.itemsize
    values = np.frombuffer(member.stream.read(nbytes), member.dtype)
    for (least, most), mend in _MENDED.items():
        if least <= values.min() and values.max() <= most:
            return f" in [{least}, {most}] (save {mend} as uint8)"
    return f" from {values.min():.4g} to {values.max():.4g}"
