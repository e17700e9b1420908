"""Statistics of features, the npz files they are in, and files of images to compute them from.

Three layouts are read: ADM's (`mu`, `sigma`, `mu_s`, `sigma_s`, and `arr_0` with
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
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
from numpy.lib import format as npy

from dico_jax.data.image_sets import ImageSet
from dico_jax.errors import UsageError
from dico_jax.files import new_file

_ASYMMETRY = 1e-4  # of a covariance stored in float16
_METADATA, _VERSION = "dico_jax", 1  # array with the JSON of our own files
_ABOUT = {"features": str, "count": int | None, "info": dict}
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
    TypeError, ValueError, MemoryError,
)  # fmt: skip
# Ranges of numbers that are no uint8 images, and what makes them ones.
_MENDED = {(0, 1): "round(255 * x)", (-1, 1): "clip(127.5 * x + 128, 0, 255)", (0, 255): "round(x)"}


def check_rows(rows: Any, what: str, first_row: int = 0, width: int | None = None) -> np.ndarray:
    """`rows` as an array; UsageError unless it is (N, `width`), floating-point and finite."""
    rows = np.asarray(rows)
    right = rows.ndim == 2 and width in (None, rows.shape[1])
    if not right or not jnp.issubdtype(rows.dtype, np.floating):
        raise UsageError(
            f"{what} are {rows.dtype}{list(rows.shape)}: floating-point numbers of one feature "
            f"network (N, {width or 'D'}) are expected"
        )
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise UsageError(
            f"{bad.size} of {len(rows)} rows of {what} are NaN or infinite, row "
            f"{first_row + bad[0]} first: look at that image and at the weights it comes from"
        )
    return rows


def check_moments(mean: Any, covariance: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """A mean (D,) and a covariance (D, D) in float64; UsageError, naming `what`, for others."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
        raise UsageError(
            f"{what}: a mean of shape {mean.shape} and a covariance of shape {covariance.shape} "
            "are not (D,) and (D, D)"
        )
    for name, array in (("mean", mean), ("covariance", covariance)):
        if bad := np.count_nonzero(~np.isfinite(array)):
            raise UsageError(
                f"{what}: {bad} of {array.size} numbers of the {name} are NaN or infinite: "
                "compute them again, from finite features"
            )
    off = np.max(np.abs(covariance - covariance.T))
    if off > _ASYMMETRY * np.max(np.abs(covariance)):
        raise UsageError(
            f"{what}: the covariance is not symmetric (by up to {off:.2g}): compute it again"
        )
    return mean, covariance


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a set of images is to the metrics.

    Attributes:
      features: name of the feature network, such as "inception".
      mean: float64 (D,) of the pooled features.
      covariance: float64 (D, D), divided by the number of images less 1.
      spatial_mean, spatial_covariance: the same of the spatial features (S), or None.
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
    images: "NpzImages | None" = None


def open_reference(
    path: str | os.PathLike, features: str = "inception"
) -> "Statistics | NpzImages":
    """What the npz file `path` holds: statistics, or images alone.

    Args:
      path: a local file, in one of the layouts of this module.
      features: the feature network of files that do not name theirs.

    Raises:
      UsageError: naming the file, and what it should hold.
    """
    path = os.fspath(path)
    with _opened(path) as file:
        images = NpzImages(path) if "arr_0" in file else None
        if images and "mu" not in file and "sigma" not in file:
            return images
        about = _metadata(file, path) if _METADATA in file else {"features": features}
        moments = _moments(file, path, "mu", "sigma")
        spatial = "mu_s" in file or "sigma_s" in file
        moments += _moments(file, path, "mu_s", "sigma_s") if spatial else ()
        rows = None
        if "pool_features" in file:
            rows = _floats(file, path, "pool_features")
            check_rows(rows, f"{path}, pool_features", width=len(moments[0]))
        found: Any = dict(zip(_ARRAYS, moments, strict=False), pool_features=rows)
        return Statistics(**about, **found, digest=file_digest(path), images=images)


def save_statistics(path: str | os.PathLike, statistics: Statistics) -> str:
    """Writes statistics as an npz file, which appears when it is complete. Images are left out.

    Returns:
      The sha256 (hex) of the file.

    Raises:
      UsageError: there is something at `path`, or it cannot be written.
    """
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: give another name, or remove it")
    about = {name: getattr(statistics, name) for name in _ABOUT}
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


def _moments(file: Any, path: str, mean: str, covariance: str) -> tuple[np.ndarray, ...]:
    arrays = _floats(file, path, mean), _floats(file, path, covariance)
    return check_moments(*arrays, f"{path}, {mean} and {covariance}")


def _floats(file: Any, path: str, name: str) -> np.ndarray:
    if name not in file:
        raise UsageError(
            f"{path} holds {', '.join(file) or 'no arrays'}, and no {name}: a reference has mu and "
            "sigma (statistics), or arr_0 (uint8 images, NHWC)"
        )
    array = np.asarray(file[name])  # bytes, where they are no array
    if array.dtype.kind != "f":
        raise UsageError(f"{path}, {name} is no array of floating-point numbers")
    return array


def _metadata(file: Any, path: str) -> dict[str, Any]:
    with contextlib.suppress(TypeError, ValueError, KeyError):
        found = json.loads(str(file[_METADATA]))
        about = {key: found[key] for key in _ABOUT}
        if found["version"] == _VERSION and all(
            isinstance(about[key], kind) for key, kind in _ABOUT.items()
        ):
            return about
    raise UsageError(
        f"{path}, {_METADATA} is no description of statistics that this version knows: write the "
        "file again with save_statistics"
    )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Whatever is wrong with a file is a UsageError that names it."""
    if "://" in path:
        raise UsageError(f"{path} is no local file: copy it to this machine first")
    try:
        with np.load(path, allow_pickle=False) as file:
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


class NpzImages(ImageSet):
    """The uint8 images (N, H, W, C) in `arr_0` of an npz file, read in batches, never as a whole.

    Attributes:
      name: what messages and results call it.
      shape: (H, W, C) of an image; C is 1 or 3.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None):
        """Looks at the array, without reading it; UsageError where it is no uint8 NHWC."""
        self._path = os.fspath(path)
        self.name = name or self._path
        with _opened(self._path) as file:
            if "arr_0" not in file:
                raise UsageError(f"{path} has no arr_0, uint8 images (NHWC)")
            with file.zip.open("arr_0.npy") as stream:
                header = _read_header(stream)
                _check_images(f"{path}, arr_0", stream, *header)
                nbytes = file.zip.getinfo("arr_0.npy").file_size - stream.tell()
        self._count, height, width, channels = header[0]
        self.shape = height, width, channels
        if nbytes != math.prod(header[0]):
            raise UsageError(f"{path}, arr_0 of shape {header[0]} has {nbytes} bytes: get it again")

    def __len__(self):
        return self._count

    def batches(self, size, start=0, stop=None):
        """See `ImageSet`."""
        start, stop, _ = slice(start, stop).indices(len(self))
        nbytes = math.prod(self.shape)
        with _opened(self._path) as file, file.zip.open("arr_0.npy") as stream:
            _read_header(stream)
            stream.seek(start * nbytes, os.SEEK_CUR)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                batch = np.frombuffer(stream.read(count * nbytes), np.uint8)
                yield batch.reshape(count, *self.shape)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, dtype."""
    return _READ_HEADER[npy.read_magic(stream)](stream)


def _check_images(
    name: str, stream: IO[bytes], shape: tuple[int, ...], fortran_order: bool, dtype: np.dtype
) -> None:
    wrong = ""
    if len(shape) != 4 or 0 in shape:
        wrong = ": images (N, H, W, C) are expected"
    elif dtype != np.uint8:
        wrong = f"{_found(stream, shape, dtype)}: uint8 images from 0 to 255 are expected"
    elif shape[3] not in (1, 3):
        nchw = ", which is NCHW" if shape[1] in (1, 3) else ""
        wrong = f"{nchw}: NHWC with 1 or 3 channels is expected"
    elif fortran_order:
        wrong = " in Fortran order, and no C order: save np.ascontiguousarray of it"
    if wrong:
        raise UsageError(f"{name} is {dtype}{list(shape)}{wrong}")


def _found(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> str:
    """What the first of wrong images holds, and how to make uint8 of it."""
    if dtype.kind not in "iuf":
        return ""
    values = np.frombuffer(stream.read(math.prod(shape[1:]) * dtype.itemsize), dtype)
    for (least, most), mend in _MENDED.items():
        if least <= values.min() and values.max() <= most:
            return f" in [{least}, {most}] (save {mend} as uint8)"
    return f" from {values.min():.4g} to {values.max():.4g}"
