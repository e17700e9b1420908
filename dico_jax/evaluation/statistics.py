"""Statistics of features: how they add up in float64, and the npz files they are in.

Read are ADM's layout (`mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0` with uint8 images), pytorch-fid's
(`mu`, `sigma`), and that of `save_statistics`, which both others can read; no object arrays.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
from numpy.lib import format as npy
from scipy.linalg import blas

from dico_jax.data.image_sets import ImageSet
from dico_jax.errors import UsageError
from dico_jax.files import as_path, file_digest, new_file, opened, size_of

# Fastest of 256 to 4096 at a width of 2048 on two cores; a block is 17 MB there.
_BLOCK_ROWS = 1024
SPLIT_SIZE = 5000  # samples in a chunk of the published Inception Score
_SEED = 2020  # of the order in which samples are dealt to chunks
_ASYMMETRY = 1e-4  # of a covariance stored in float16
_UNPACKED = 1 << 28  # bytes of arrays that files may have, or four times their own
_LONGEST_JSON = 1 << 22  # characters, of which the first are read
_METADATA, _VERSION = "dico_jax", 1  # array with the JSON of our own files
_ABOUT = ("features", "count", "info")
_ARRAYS = {"mean": "mu", "covariance": "sigma"}  # name of a field to that of its array
_ARRAYS |= {"spatial_mean": "mu_s", "spatial_covariance": "sigma_s"}
_ARRAYS["pool_features"] = "pool_features"


def check_rows(rows: Any, what: str, first_row: int = 0, width: int | None = None) -> np.ndarray:
    """`rows` as an array; UsageError unless it is (N, `width`), floating-point and finite."""
    rows = np.asarray(rows)
    right = rows.ndim == 2 and width in (None, rows.shape[1])
    if not right or not jnp.issubdtype(rows.dtype, np.floating):
        found, wanted = f"{rows.dtype}{list(rows.shape)}", f"(N, {width or 'D'})"
        raise UsageError(f"{what} are {found}: floating-point numbers {wanted} are expected")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        fix = f"row {first_row + bad[0]} first: look at that image, and at the network's weights"
        raise UsageError(f"{bad.size} of {len(rows)} rows of {what} are NaN or infinite, {fix}")
    return rows


def check_moments(mean: Any, covariance: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """A mean (D,) and a covariance (D, D) in float64; UsageError, naming `what`, for others."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
        shapes = f"a mean of shape {mean.shape} and a covariance of shape {covariance.shape}"
        raise UsageError(f"{what}: {shapes} are not (D,) and (D, D)")
    for name, array in (("mean", mean), ("covariance", covariance)):
        if bad := np.count_nonzero(~np.isfinite(array)):
            numbers = f"{bad} of {array.size} numbers of the {name}"
            raise UsageError(f"{what}: {numbers} are NaN or infinite: compute them again")
    off = np.max(np.abs(covariance - covariance.T))
    if off > _ASYMMETRY * np.max(np.abs(covariance)):
        raise UsageError(f"{what}: the covariance is not symmetric (by up to {off:.2g})")
    return mean, covariance


class Moments:
    """Mean and covariance of rows of `width` numbers; a large common offset costs no digits.

    Rows are added in blocks, so that batches do not even change the rounding.
    """

    def __init__(self, width: int):
        # Of the outer products of centred rows, only the upper triangle is kept up to date.
        scatter = np.zeros((width, width), order="F")
        self._waiting = [np.empty((0, width))]
        self._sums: dict[str, Any] = {"count": 0, "mean": np.zeros(width), "scatter": scatter}

    def to_arrays(self) -> dict[str, Any]:
        """Everything as arrays, to be saved; what goes on from them goes on exactly."""
        return self._sums | {"pending": np.concatenate(self._waiting)}

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Goes on from what `to_arrays` gave."""
        self._waiting = [arrays["pending"]]
        self._sums = {name: arrays[name] for name in self._sums}

    @property
    def count(self) -> int:
        """How many rows there were."""
        return int(self._sums["count"]) + sum(map(len, self._waiting))

    def update(self, rows: Any) -> None:
        """Adds rows (N, width) of any floating dtype; none, and UsageError, where one is wrong."""
        rows = check_rows(rows, "features", self.count, len(self._sums["mean"]))
        self._waiting.append(rows.astype(np.float64))
        if sum(map(len, self._waiting)) >= _BLOCK_ROWS:
            rows = np.concatenate(self._waiting)
            *blocks, rest = np.split(rows, range(_BLOCK_ROWS, len(rows) + 1, _BLOCK_ROWS))
            self._waiting = [rest]
            for block in blocks:
                self._add(block)

    def merge(self, other: "Moments") -> None:
        """Adds all rows of `other`, which stays as it is."""
        check_rows(other._sums["mean"][None], "features", width=len(self._sums["mean"]))
        theirs = other._complete()
        if theirs["count"]:
            self._sums, self._waiting = self._complete(), [theirs["mean"][None][:0]]
            shift = self._move(theirs["count"], theirs["mean"])
            self._sums["scatter"] += theirs["scatter"] + np.outer(shift, shift)

    @property
    def mean(self) -> np.ndarray:
        """The mean of the rows, float64 (D,); UsageError where there is none."""
        return self._complete(1)["mean"]

    @property
    def covariance(self) -> np.ndarray:
        """Of the rows (divided by count - 1), float64 (D, D); UsageError for fewer than two."""
        upper = np.triu(self._complete(2)["scatter"]) / (self.count - 1)
        return upper + np.triu(upper, 1).T

    def _complete(self, fewest: int = 0) -> dict[str, Any]:
        if self.count < fewest:
            raise UsageError(f"{self.count} rows of features are too few: give {fewest}")
        done = copy.deepcopy(self)
        if len(rows := np.concatenate(self._waiting)):
            done._add(rows)
        return done._sums

    def _add(self, block: np.ndarray) -> None:
        """One symmetric product, with the shift of the mean as a row."""
        mean, old = block.mean(axis=0), self._sums["scatter"]
        rows = np.concatenate([block - mean, self._move(len(block), mean)[None]])
        self._sums["scatter"] = blas.dsyrk(1.0, rows.T, beta=1.0, c=old, overwrite_c=True)

    def _move(self, count: int, mean: np.ndarray) -> np.ndarray:
        """Takes up `count` rows of this mean; what their shift adds is the result's square."""
        before, total = self._sums["count"], self._sums["count"] + count
        delta = mean - self._sums["mean"]
        self._sums |= {"count": total, "mean": self._sums["mean"] + delta * (count / total)}
        return delta * np.sqrt(before * count / total)


class InceptionScore:
    """exp(mean KL(p(class | image) || p(class))) of `split_size` samples at a time, averaged.

    Salimans et al., arXiv 1606.03498. A probability of 0 contributes 0; published code gives NaN.
    """

    def __init__(self, num_classes: int, split_size: int = SPLIT_SIZE, total: int | None = None):
        """Of `total` samples, a fixed seed decides which are in one chunk; else their order does.

        Samples often come class by class, and a chunk of a few classes has a far lower score.
        """
        places = None if total is None else np.random.RandomState(_SEED).permutation(total)
        self._split_size, self._places, self.count = split_size, places, 0
        # Of each chunk the sums of p and of p log(p), and how many samples it has.
        self._sums = np.zeros((0, num_classes + 2))

    def to_arrays(self) -> dict[str, Any]:
        """See `Moments`."""
        return {"count": self.count, "sums": self._sums}

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """See `Moments`."""
        self.count, self._sums = int(arrays["count"]), arrays["sums"]

    def update(self, logits: Any) -> None:
        """Adds samples by their logits without bias (N, classes); none where one is wrong."""
        width = self._sums.shape[1] - 2
        logits = check_rows(logits, "logits", self.count, width).astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        self.update_probabilities(exponentials / exponentials.sum(axis=1, keepdims=True))

    def update_probabilities(self, probabilities: Any) -> None:
        """Adds samples by their class probabilities (N, classes), as they are."""
        rows = np.asarray(probabilities, np.float64)
        places = np.arange(self.count, self.count + len(rows))
        chunks = (places if self._places is None else self._places[places]) // self._split_size
        more = max(0, int(chunks.max(initial=-1)) + 1 - len(self._sums))
        self._sums = np.pad(self._sums, ((0, more), (0, 0)))
        for chunk, row in zip(chunks, rows, strict=True):  # one by one, whatever the batches
            self._sums[chunk] += np.append(row, (_sum_p_log_p(row), 1))
        self.count += len(rows)

    def result(self) -> tuple[float, float | None]:
        """Mean and standard deviation (divided by their number) over the chunks; None for one."""
        if not self.count:
            raise UsageError("no samples: there is no Inception Score")
        means = [chunk[:-1] / chunk[-1] for chunk in self._sums if chunk[-1]]
        scores = [math.exp(mean[-1] - _sum_p_log_p(mean[:-1])) for mean in means]
        return float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None


def _sum_p_log_p(p: np.ndarray) -> float:
    return float(np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0)))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a set of images is to the metrics."""

    features: str  # name of the feature network, such as "inception"
    mean: np.ndarray  # float64 (D,) of the pooled features
    covariance: np.ndarray  # float64 (D, D), divided by the number of images less 1
    spatial_mean: np.ndarray | None = None  # the same of the spatial features
    spatial_covariance: np.ndarray | None = None
    pool_features: np.ndarray | None = None  # (N, D), for precision, recall and KID
    count: int | None = None  # how many images the means are of, where the file says it
    digest: str = ""  # sha256 (hex) of the file; "" before there is one
    info: dict[str, Any] = dataclasses.field(default_factory=dict)  # how it was made, as JSON
    images: "NpzImages | None" = None  # that the file holds besides; need not be all of `count`


def open_reference(path: str | os.PathLike, features: str = "inception") -> Any:
    """The `Statistics` or `NpzImages` of a local npz file, by default of the network `features`."""
    path = os.fspath(path)
    with _opened(path) as file:
        images = NpzImages(path) if "arr_0" in file else None
        if images and "mu" not in file and "sigma" not in file:
            return images
        about = _metadata(file, path) if _METADATA in file else {"features": features}
        moments: tuple[np.ndarray, ...] = ()
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if not moments or mean in file or covariance in file:
                arrays = _floats(file, path, mean), _floats(file, path, covariance)
                moments += check_moments(*arrays, f"{path}, {mean} and {covariance}")
        found: Any = dict(zip(_ARRAYS, moments, strict=False))
        if "pool_features" in file:
            rows, what = _floats(file, path, "pool_features"), f"{path}, pool_features"
            found["pool_features"] = check_rows(rows, what, width=len(moments[0]))
        return Statistics(**about, **found, digest=file_digest(path), images=images)


def save_statistics(path: str | os.PathLike, statistics: Statistics) -> str:
    """Writes statistics, without images, as a new npz file; returns its sha256 (hex)."""
    if os.path.lexists(path) or as_path(path).exists():
        raise UsageError(f"{path} exists: give another name, or remove it")
    about = {"version": _VERSION} | {name: getattr(statistics, name) for name in _ABOUT}
    found = {name: getattr(statistics, field) for field, name in _ARRAYS.items()}
    arrays: Any = {name: array for name, array in found.items() if array is not None}
    arrays[_METADATA] = np.array(json.dumps(about))
    with new_file(path) as stream:
        np.savez(stream, **arrays)
    return file_digest(path)


def save_arrays(path: str | os.PathLike, about: Any, arrays: Mapping[str, Any]) -> None:
    """Writes arrays and what JSON can say of them as an npz file, whole or not at all."""
    text: Any = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
    with new_file(path) as stream:
        np.savez(stream, **text, **arrays)


def load_arrays(path: str | os.PathLike, wrong: str) -> tuple[Any, dict[str, np.ndarray]]:
    """What `save_arrays` has written; UsageError, saying what is `wrong`, for something else."""
    with _opened(path, wrong) as file:
        arrays = dict(file)
        return json.loads(arrays.pop("about")[:_LONGEST_JSON].tobytes()), arrays


def _floats(file: Any, path: str, name: str) -> np.ndarray:
    if name not in file:
        fix = "a reference has mu and sigma, or arr_0 (uint8 images)"
        raise UsageError(f"{path} holds {', '.join(file) or 'no arrays'}, and no {name}: {fix}")
    array = np.asarray(file[name])  # bytes, where they are no array
    if array.dtype.kind != "f":
        raise UsageError(f"{path}, {name} is no array of floating-point numbers")
    return array


def _metadata(file: Any, path: str) -> dict[str, Any]:
    with contextlib.suppress(TypeError, ValueError, KeyError):
        found = json.loads(str(file[_METADATA])[:_LONGEST_JSON])
        known = found.pop("version") == _VERSION and isinstance(found["info"], dict)
        if known and isinstance(found["count"], int | None):
            return {key: found[key] for key in _ABOUT}
    raise UsageError(f"{path}: {_METADATA} is no description of statistics that this version knows")


@contextlib.contextmanager
def _opened(path: Any, wrong: str = "is no npz file, damaged or cut short") -> Iterator[Any]:
    try:
        with opened(path) as stream, np.load(stream, allow_pickle=False) as file:
            members = [m for m in file.zip.infolist() if m.filename != "arr_0.npy"]  # is not kept
            most = max(_UNPACKED, 4 * size_of(path))
            if (size := sum(member.file_size for member in members)) > most:
                raise ValueError(f"it would unpack to {size / 1e9:.1f} GB")
            yield file
    except UsageError:
        raise
    except Exception as error:  # of many classes, in zipfile and NumPy
        reason = getattr(error, "strerror", None) or [*str(error).splitlines(), "it ends"][0]
        raise UsageError(f"{path} {wrong}: {reason}") from error


class NpzImages(ImageSet):
    """The uint8 images (N, H, W, 1 or 3) in `arr_0` of an npz file, never read as a whole."""

    def __init__(self, path: str | os.PathLike, name: str | None = None):
        """Looks at the array, without reading it; `name` is for messages and results."""
        self._path = os.fspath(path)
        self.name, self.bad = name or self._path, {}
        with _opened(self._path) as file:
            if "arr_0" not in file:
                raise UsageError(f"{path} has no arr_0, uint8 images (NHWC)")
            with file.zip.open("arr_0.npy") as stream:
                shape, fortran_order, dtype = _read_header(stream)
                nbytes = file.zip.getinfo("arr_0.npy").file_size - stream.tell()
        wrong = len(shape) != 4 or 0 in shape or shape[3] not in (1, 3) or dtype != np.uint8
        if wrong or fortran_order or nbytes != math.prod(shape):
            what = f"{dtype}{list(shape)}{' in Fortran order' * fortran_order} of {nbytes} bytes"
            fix = "uint8 images from 0 to 255 (N, H, W, 1 or 3) are expected"
            raise UsageError(f"{path}, arr_0 is {what}: {fix}")
        self._indices, self.shape = np.arange(shape[0]), shape[1:]

    def batches(self, size, start=0, stop=None):
        indices, nbytes = self._indices[start:stop], math.prod(self.shape)
        with _opened(self._path) as file, file.zip.open("arr_0.npy") as stream:
            _read_header(stream)
            begin = stream.tell()
            for first in range(0, len(indices), size):
                batch, part = b"", indices[first : first + size]
                for run in np.split(part, np.flatnonzero(np.diff(part) > 1) + 1):
                    stream.seek(begin + int(run[0]) * nbytes)
                    batch += stream.read(len(run) * nbytes)
                yield np.frombuffer(batch, np.uint8).reshape(-1, *self.shape)


def _read_header(stream: IO[bytes]) -> Any:
    is_long = {(1, 0): False, (2, 0): True}[npy.read_magic(stream)]
    return (npy.read_array_header_2_0 if is_long else npy.read_array_header_1_0)(stream)
