"""Sets of pictures to be measured: every one once, in order, all of one size."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from dico_jax.data.class_files import FolderSource
from dico_jax.data.paths import (
    join,
    list_folder,
    path_errors,
    picture_names,
    printable,
    read_picture_file,
)
from dico_jax.data.pictures import BadExample, load_whole_picture
from dico_jax.data.pipeline import read_ahead
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError

# What `dico_jax.sample` writes beside its images.
_SEED = 2020
_BESIDE_SAMPLES = {"grid.png", "sampling.json"}


class ImageSet:
    """Pictures of one `shape` (H, W, C), read batch by batch; `name` is for messages, results."""

    name: str
    shape: tuple[int, int, int]

    def __init__(self, name: str, indices: Sequence[int] | np.ndarray):
        self.name, self._indices = name, np.asarray(indices)
        self.shape = self._load(int(self._indices[0])).shape

    def _load(self, index: int) -> np.ndarray:
        raise NotImplementedError

    def __len__(self):
        return len(self._indices)

    def take(self, count: int) -> None:
        """Leaves so many, which a fixed seed draws: the first may all be of a few classes."""
        drawn = np.random.RandomState(_SEED).permutation(len(self))[:count]
        self._indices = self._indices[np.sort(drawn)]

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Pictures start to stop (all by default) in their order: uint8 (<= size, H, W, C).

        One that cannot be read, or has another shape, is a UsageError.
        """
        indices = self._indices[start:stop]
        if len(indices):
            pictures = grain.MapDataset.source(indices).map(self._load)
            yield from read_ahead(pictures.batch(size), num_workers=0)


class FolderImages(ImageSet):
    """The pictures in a folder by the order of their names, or of those in its subfolders.

    Nothing is cropped or scaled. Beside the pictures may lie what `dico_jax.sample` leaves there.
    """

    def __init__(self, path: str, flag: str):
        """Lists a folder, local or gs://, that messages call `flag`; other files are refused."""
        with _about(flag), path_errors(path):
            folders, files, others = list_folder(path)
        names = sorted(set(files) - _BESIDE_SAMPLES)
        self._path, self._flag, self._source = path, flag, None
        self._names = picture_names(names)
        others += set(names).difference(self._names)
        if self._names:
            others += [f"{name}/" for name in folders]
        elif folders:
            with _about(flag):
                self._source = FolderSource(path)
            others += self._source.skipped
        else:
            raise UsageError(f"{flag}={path}: there are no pictures in it")
        if others:
            listed = ", ".join(printable(name) for name in sorted(others)[:3])
            what = f"more than the pictures to be measured ({len(others)}, such as {listed})"
            raise UsageError(f"{flag}={path} holds {what}: move them elsewhere")
        super().__init__(f"{flag}={path}", range(len(self._source or self._names)))

    def _load(self, index):
        source = self._source
        file = join(self._path, source.example_id(index) if source else self._names[index])
        try:
            data = source[index]["image"] if source else read_picture_file(file)
            picture = load_whole_picture(data)
        except BadExample as error:
            raise UsageError(f"{self._flag}: {file} cannot be read: {error}") from error
        shape = getattr(self, "shape", picture.shape)
        if picture.shape != shape:
            differ = f"{file} is {picture.shape} pixels, the first picture {shape}"
            raise UsageError(f"{self._flag}: {differ}: all must have one size")
        return picture


class SourceImages(ImageSet):
    """The examples of a source of pictures, as training sees them but never mirrored.

    At most `limit` of them, spread evenly.
    """

    def __init__(self, source: Source, read: Callable[[Any, bool], np.ndarray], limit: int | None):
        if source.kind != "pictures":
            raise UsageError(f"{source!r} has {source.kind}: pictures are needed")
        self._source, self._read = source, read
        count = len(source) if limit is None else min(limit, len(source))
        super().__init__(repr(source), np.linspace(0, len(source) - 1, count).round().astype(int))

    def _load(self, index):
        position = int(index)
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
