"""Files of reference statistics, and of reference images to compute them from.

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
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from dico_jax.errors import UsageError
from dico_jax.evaluation.frechet import check_moments
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
_LOOKED_AT = 64 << 20  # bytes of wrong images that are read to say what they are
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# What zipfile and NumPy raise for a damaged file.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,  # also NotImplementedError
    ValueError,
)


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
    images: "NpzImages | None" = None


@dataclasses.dataclass(frozen=True)
class ReferenceImages:
    """A file of images alone, of which the statistics have to be computed.

    Attributes:
      images: the images.
      labels: `arr_1`, integers (N,), or None.
      digest: sha256 (hex) of the file.
    """

    images: "NpzImages"
    labels: np.ndarray | None
    digest: str


class NpzImages:
    """The uint8 images (N, H, W, C) of an npz file, read in batches and never as a whole.

    Attributes:
      path: the file.
      shape: (N, H, W, C); C is 1 or 3.
    """

    def __init__(self, path: str | os.PathLike, name: str = "arr_0"):
        """Looks at the array `name`, without reading it.

        Raises:
          UsageError: no npz file, no such array, or one that is no uint8 NHWC.
        """
        self.path, self._name = os.fspath(path), name
        with _NpzFile(self.path) as file, file.open(name) as member:
            _check_images(member)
            count, height, width, channels = member.shape
        self.shape = (count, height, width, channels)

    def __len__(self):
        return self.shape[0]

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Images start to stop (all by default) in order: uint8 (<= size, H, W, C).

        Raises:
          UsageError: the file is cut short or damaged.
        """
        start, stop, _ = slice(start, stop).indices(len(self))
        nbytes = math.prod(self.shape[1:])
        with _NpzFile(self.path) as file, file.open(self._name) as member:
            member.skip(start * nbytes)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                batch = np.frombuffer(member.read(count * nbytes), np.uint8)
                yield batch.reshape(count, *self.shape[1:])


def open_reference(
    path: str | os.PathLike, features: str = "inception"
) -> Statistics | ReferenceImages:
    """What the npz file `path` holds: statistics, or images alone.

    Args:
      path: a local file, in one of the layouts of this module.
      features: the feature network of files that do not name theirs.

    Raises:
      UsageError: naming the file, and what it should hold.
    """
    with _NpzFile(os.fspath(path)) as file:
        metadata = _metadata(file) if _METADATA in file.arrays else {}
        images = NpzImages(path) if "arr_0" in file.arrays else None
        if "mu" in file.arrays or "sigma" in file.arrays:
            return _statistics(file, metadata or {"features": features}, images)
        if images is not None:
            return ReferenceImages(images, _labels(file, len(images)), _digest(file.path))
        raise UsageError(
            f"{file.path} holds {file.listing()}: a reference has mu and sigma (statistics), or "
            "arr_0 (uint8 images, NHWC)"
        )


def save_statistics(path: str | os.PathLike, statistics: Statistics) -> str:
    """Writes statistics as an npz file, which appears when it is complete. Images are left out.

    Returns:
      The sha256 (hex) of the file.

    Raises:
      UsageError: there is something at `path`, or it cannot be written.
    """
    path = os.fspath(path)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: give another name, or remove it")
    metadata = {
        "version": _VERSION,
        "features": statistics.features,
        "count": statistics.count,
        "info": statistics.info,
    }
    arrays = {
        name: getattr(statistics, field)
        for field, name in _ARRAYS.items()
        if getattr(statistics, field) is not None
    }
    with new_file(path) as stream:
        np.savez(
            stream, allow_pickle=False, **arrays, **{_METADATA: np.array(json.dumps(metadata))}
        )
    return _digest(path)


def check_width(statistics: Statistics, width: int, name: str) -> None:
    """Raises UsageError, naming the file `name`, unless the features have `width` numbers."""
    if len(statistics.mean) != width:
        raise UsageError(
            f"{name} has statistics of {len(statistics.mean)} features, and the feature network "
            f"has {width}: take statistics of the same network"
        )


def check_features(statistics: Statistics, features: str, name: str) -> None:
    """Raises UsageError, naming the file `name`, unless they are of the network `features`."""
    if statistics.features != features:
        raise UsageError(
            f"{name} has statistics of the feature network {statistics.features!r}, and "
            f"{features!r} is used: take statistics of the same network"
        )


def _statistics(file: "_NpzFile", metadata: dict[str, Any], images: NpzImages | None) -> Statistics:
    mean, covariance = _moments(file, "mu", "sigma")
    spatial_mean = spatial_covariance = None
    if "mu_s" in file.arrays or "sigma_s" in file.arrays:
        spatial_mean, spatial_covariance = _moments(file, "mu_s", "sigma_s")
    return Statistics(
        features=metadata["features"],
        mean=mean,
        covariance=covariance,
        spatial_mean=spatial_mean,
        spatial_covariance=spatial_covariance,
        pool_features=_pool_features(file, len(mean)),
        count=metadata.get("count"),
        digest=_digest(file.path),
        info=metadata.get("info", {}),
        images=images,
    )


def _moments(file: "_NpzFile", mean: str, covariance: str) -> tuple[np.ndarray, np.ndarray]:
    for name in (mean, covariance):
        if name not in file.arrays:
            other = covariance if name == mean else mean
            raise UsageError(f"{file.path} holds {other} but no {name}: statistics need both")
    return check_moments(
        _floats(file, mean), _floats(file, covariance), f"{file.path}, {mean} and {covariance}"
    )


def _pool_features(file: "_NpzFile", width: int) -> np.ndarray | None:
    if "pool_features" not in file.arrays:
        return None
    rows = _floats(file, "pool_features")
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UsageError(
            f"{file.path}, pool_features has shape {rows.shape}: (N, {width}) is expected"
        )
    if not np.isfinite(rows).all():
        raise UsageError(f"{file.path}, pool_features has NaN or infinite values: write it again")
    return rows


def _floats(file: "_NpzFile", name: str) -> np.ndarray:
    with file.open(name) as member:
        if member.dtype.kind != "f":
            raise UsageError(
                f"{file.path}, {name} is of dtype {member.dtype}: floating-point numbers are "
                "expected"
            )
        return member.array()


def _labels(file: "_NpzFile", count: int) -> np.ndarray | None:
    if "arr_1" not in file.arrays:
        return None
    with file.open("arr_1") as member:
        if member.dtype.kind not in "iu" or member.shape != (count,):
            raise UsageError(
                f"{file.path}, arr_1 is {member.dtype}{list(member.shape)}: labels are expected, "
                f"one integer for each of the {count} images"
            )
        return member.array()


def _metadata(file: "_NpzFile") -> dict[str, Any]:
    with file.open(_METADATA) as member:
        text = str(member.array()) if member.dtype.kind == "U" and not member.shape else ""
    try:
        metadata = json.loads(text)
        version, types = metadata["version"], {"features": str, "info": dict, "count": int | None}
        wrong = [key for key, kind in types.items() if not isinstance(metadata[key], kind)]
    except (ValueError, KeyError, TypeError):
        version, wrong = None, []
    if version != _VERSION or wrong:
        raise UsageError(
            f"{file.path}, {_METADATA} is no description of statistics that this version knows: "
            "write the file again with save_statistics"
        )
    return metadata


def _check_images(member: "_Member") -> None:
    where = f"{member.where} is {member.described()}"
    if len(member.shape) != 4:
        raise UsageError(f"{where}: images (N, H, W, C) are expected")
    if 0 in member.shape:
        raise UsageError(f"{where}: there is no image in it")
    if member.dtype != np.uint8:
        raise UsageError(f"{where}{_found(member)}: uint8 images from 0 to 255 are expected")
    if member.shape[3] not in (1, 3):
        if member.shape[1] in (1, 3):
            raise UsageError(f"{where}, which is NCHW: NHWC is expected, transpose it (0, 2, 3, 1)")
        raise UsageError(f"{where}: 1 or 3 channels are expected in the last axis")
    if member.fortran_order:
        raise UsageError(
            f"{where} in Fortran order, which cannot be read image by image: save "
            "np.ascontiguousarray of it"
        )


def _found(member: "_Member") -> str:
    """What wrong images hold, and how to make uint8 of them, as far as their beginning tells."""
    if member.dtype.kind not in "iuf":
        return ""
    size = member.dtype.itemsize
    raw = member.read(min(member.nbytes, _LOOKED_AT) // size * size)
    values = np.frombuffer(raw, member.dtype)
    low, high = float(values.min()), float(values.max())
    ranges = {
        "[0, 1]": (0, 1, "round(255 * x)"),
        "[-1, 1]": (-1, 1, "clip(127.5 * x + 128, 0, 255)"),
        "0 to 255": (0, 255, "round(x)"),
    }
    if member.dtype.kind in "iu":
        ranges = {"0 to 255": (0, 255, "x")}
    for found, (least, most, mend) in ranges.items():
        if least <= low and high <= most:
            return f" in {found} (save {mend} as uint8)"
    return f" from {low:.4g} to {high:.4g}"


class _NpzFile:
    """An npz file, open for reading; whatever is wrong with it is a UsageError that names it.

    Attributes:
      path: the file.
      arrays: names of the arrays in it.
    """

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> "_NpzFile":
        if "://" in self.path:
            raise UsageError(f"{self.path} is no local file: copy it to this machine first")
        try:
            self._stream: BinaryIO = open(self.path, "rb")
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror or error}") from error
        try:
            self._zip = zipfile.ZipFile(self._stream)
        except _DAMAGE as error:
            self._stream.seek(0)
            found = "an npz file cut short" if self._stream.read(2) == b"PK" else "no npz file"
            self._stream.close()
            raise UsageError(
                f"{self.path} is {found} ({error}): numpy.savez writes such files"
            ) from error
        members = [name for name in self._zip.namelist() if name.endswith(".npy")]
        self.arrays = {name.removesuffix(".npy") for name in members}
        return self

    def __exit__(self, *error):
        self._zip.close()
        self._stream.close()

    def listing(self) -> str:
        """The names of the arrays, for messages."""
        return ", ".join(sorted(self.arrays)) or "no arrays"

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator["_Member"]:
        """The array `name`.

        Raises:
          UsageError: there is none, it is damaged, or an object array.
        """
        if name not in self.arrays:
            raise UsageError(f"{self.path} holds {self.listing()}, but no {name}")
        where = f"{self.path}, {name}"
        with _damage(where):
            info = self._zip.getinfo(f"{name}.npy")
            stream = self._zip.open(info)
        with stream:
            yield _Member(where, stream, info.file_size)


class _Member:
    """An array of an npz file, of which the header has been read.

    Attributes:
      where: the file and the array, for messages.
      shape: its shape.
      dtype: its dtype.
      fortran_order: whether its first axis varies fastest.
      nbytes: bytes of its data.
    """

    def __init__(self, where: str, stream: IO[bytes], size: int):
        self.where, self._stream = where, stream
        with _damage(where):
            version = npy.read_magic(stream)
            if version not in _READ_HEADER:
                raise ValueError(f"npy version {version}")
            self.shape, self.fortran_order, self.dtype = _READ_HEADER[version](stream)
        if self.dtype.hasobject:
            raise UsageError(
                f"{where} is an object array, which may run code when it is read: save plain "
                "numbers"
            )
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        found = size - stream.tell()
        if found != self.nbytes:
            raise UsageError(
                f"{where} has {found} bytes, and {self.described()} has {self.nbytes}: the file is "
                "damaged, get it again"
            )

    def described(self) -> str:
        """Dtype and shape, for messages."""
        return f"{self.dtype}{list(self.shape)}"

    def skip(self, nbytes: int) -> None:
        """Goes on `nbytes` further."""
        with _damage(self.where):
            self._stream.seek(nbytes, os.SEEK_CUR)

    def read(self, nbytes: int) -> bytes:
        """The next `nbytes`."""
        with _damage(self.where):
            data = self._stream.read(nbytes)
            if len(data) != nbytes:
                raise EOFError(f"{nbytes - len(data)} bytes are missing")
        return data

    def array(self) -> np.ndarray:
        """All of it."""
        flat = np.frombuffer(self.read(self.nbytes), self.dtype)
        if self.fortran_order:
            return flat.reshape(self.shape[::-1]).T
        return flat.reshape(self.shape)


@contextlib.contextmanager
def _damage(where: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else "it is cut short"
        raise UsageError(
            f"{where} cannot be read ({reason}): the file is damaged, get it again"
        ) from error


def _digest(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
