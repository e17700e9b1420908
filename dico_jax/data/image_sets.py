"""Sets of pictures to be measured: every one once, in order, all of one size."""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from dico_jax.data.class_files import FolderSource
from dico_jax.data.paths import (
    Listing,
    is_picture_name,
    list_folder,
    path_errors,
    printable,
    read_picture_file,
)
from dico_jax.data.pictures import BadExample, load_whole_picture
from dico_jax.data.pipeline import read_ahead
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError

# What `dico_jax.sample` writes beside its images.
_BESIDE_SAMPLES = {"grid.png", "sampling.json"}
_MAX_LISTED = 3


class ImageSet(abc.ABC):
    """Pictures of one size, read batch by batch.

    Attributes:
      name: what it is, for messages and results.
      shape: (H, W, C) of a picture.
    """

    name: str
    shape: tuple[int, int, int]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Pictures start to stop (all by default) in their order: uint8 (<= size, H, W, C).

        Raises:
          UsageError: a picture cannot be read, or has another size than the first.
        """


class _Loaded(ImageSet):
    """Pictures that are decoded one by one, in threads."""

    def __init__(self, name: str, count: int, load: Callable[[int], np.ndarray]):
        self.name, self._count, self._load = name, count, load
        self.shape = load(0).shape

    def __len__(self):
        return self._count

    def batches(self, size, start=0, stop=None):
        indices = np.arange(len(self))[start:stop]
        if len(indices):
            yield from read_ahead(
                grain.MapDataset.source(indices).map(self._load).batch(size), num_workers=0
            )


class FolderImages(_Loaded):
    """The pictures in a folder by the order of their names, or of those in its subfolders.

    Nothing is cropped or scaled. Beside the pictures may lie what `dico_jax.sample` leaves there.
    """

    def __init__(self, path: str, flag: str):
        """Lists the folder.

        Args:
          path: the folder, local or gs://.
          flag: what messages call it.

        Raises:
          UsageError: it cannot be listed, holds no pictures, or other files among them.
        """
        with _about(flag), path_errors(path):
            listing = list_folder(path)
        names = sorted(set(listing.files) - _BESIDE_SAMPLES)
        self._flag = flag
        if any(map(is_picture_name, names)):
            _refuse_others(path, flag, listing)
            self._files: Sequence[str] = [f"{path.rstrip('/')}/{name}" for name in names]
            super().__init__(f"{flag}={path}", len(names), self._read_file)
        elif listing.folders:
            with _about(flag):
                self._source = FolderSource(path)
            _refuse(path, flag, list(self._source.skipped) + names)
            super().__init__(f"{flag}={path}", len(self._source), self._read_example)
        else:
            raise UsageError(f"{flag}={path}: there are no pictures in it")

    def _read_file(self, index: int) -> np.ndarray:
        return self._decoded(self._files[index], lambda: read_picture_file(self._files[index]))

    def _read_example(self, index: int) -> np.ndarray:
        name = f"{self._source.path}/{self._source.example_id(index)}"
        return self._decoded(name, lambda: self._source[index]["image"])

    def _decoded(self, name: str, read: Callable[[], bytes]) -> np.ndarray:
        try:
            picture = load_whole_picture(read())
        except BadExample as error:
            raise UsageError(f"{self._flag}: {name} cannot be read: {error}") from error
        shape = getattr(self, "shape", picture.shape)
        if picture.shape != shape:
            raise UsageError(
                f"{self._flag}: {name} has {_size(picture.shape)}, the first picture has "
                f"{_size(shape)}: all must have one size"
            )
        return picture


class SourceImages(_Loaded):
    """The examples of a source, as training sees them but never mirrored.

    At most `limit` of them, spread evenly.
    """

    def __init__(self, source: Source, read: Callable[[Any, bool], np.ndarray], limit: int | None):
        """Takes pictures alone.

        Raises:
          UsageError: the source has latents.
        """
        if source.kind != "pictures":
            raise UsageError(f"{source!r} has {source.kind}: pictures are needed")
        self._source, self._read = source, read
        count = len(source) if limit is None else min(limit, len(source))
        self._indices = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
        super().__init__(repr(source), count, self._read_example)

    def _read_example(self, index: int) -> np.ndarray:
        position = int(self._indices[index])
        try:
            return self._read(self._source[position]["image"], False)
        except BadExample as error:
            name = self._source.example_id(position)
            raise UsageError(f"{self._source!r}: {name} cannot be read: {error}") from error


@contextlib.contextmanager
def _about(flag: str) -> Iterator[None]:
    """Puts a flag in the place of the field that errors of paths name."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).replace("data.path", flag)) from error


def _refuse_others(path: str, flag: str, listing: Listing) -> None:
    files = set(listing.files) - _BESIDE_SAMPLES
    others = [name for name in files if not is_picture_name(name)]
    _refuse(path, flag, others + [f"{name}/" for name in listing.folders] + listing.others)


def _refuse(path: str, flag: str, others: Sequence[str]) -> None:
    if others:
        listed = ", ".join(printable(name) for name in sorted(others)[:_MAX_LISTED])
        more = f" and {len(others) - _MAX_LISTED} more" if len(others) > _MAX_LISTED else ""
        raise UsageError(
            f"{flag}={path} holds more than the pictures to be measured ({listed}{more}): "
            "move them elsewhere"
        )


def _size(shape: Sequence[int]) -> str:
    height, width, channels = shape
    return f"{height}x{width} {'grey' if channels == 1 else 'RGB'} pixels"
