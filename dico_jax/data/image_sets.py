"""Sets of pictures to be measured: every one once, in order, all of one size."""

from collections.abc import Iterator

import grain
import numpy as np

from dico_jax.data.bad_examples import check_bad
from dico_jax.data.class_files import FolderSource
from dico_jax.data.pictures import BadExample, load_whole_picture
from dico_jax.data.pipeline import Reader, read_ahead
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError

_SEED = 2020
# What `dico_jax.sample` writes beside its images.
_BESIDE_SAMPLES = {"grid.png", "sampling.json", "prompts.txt", "latents.npy"}
_BESIDE_SAMPLES |= {"trajectory.png", "trajectory.gif"}


class ImageSet:
    """Pictures of one `shape` (H, W, C), read batch by batch; `name` is for messages, results.

    `bad` has name and reason of those that were to be read and could not be.
    """

    name: str
    shape: tuple[int, int, int]
    bad: dict[str, str]
    _indices: np.ndarray

    def __len__(self):
        return len(self._indices)

    @property
    def indices(self) -> np.ndarray:
        """Which of all pictures, by number, are left."""
        return self._indices

    def take(self, count: int) -> None:
        """Leaves so many, which a fixed seed draws: the first may all be of a few classes."""
        drawn = np.random.RandomState(_SEED).permutation(len(self))[:count]
        self._indices = self._indices[np.sort(drawn)]

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Pictures start to stop (all by default) in their order: uint8 (<= size, H, W, C).

        Without those that cannot be read, or have another shape; UsageError for too many.
        """
        raise NotImplementedError


class SourceImages(ImageSet):
    """The examples of a source of pictures, as training sees them but never mirrored.

    At most `limit` of them, spread evenly, at most a fraction of them bad: one, if it is not 0.
    """

    def __init__(self, source: Source, read: Reader, limit=None, max_bad_fraction=0.0, name=""):
        self._source, self._read, self.name = source, read, name or repr(source)
        self.bad = {}
        if source.kind != "pictures":
            raise UsageError(f"{self.name} has {source.kind}: pictures are needed")
        count = len(source) if limit is None else min(limit, len(source))
        self._indices = np.linspace(0, len(source) - 1, count).round().astype(int)
        self._fraction = max(max_bad_fraction, 1.5 * (max_bad_fraction > 0) / count)
        first = (picture.shape for index in self._indices for picture in self._load([index]))
        self.shape = next(first, (1, 1, 3))  # there is one, unless all may be bad

    def batches(self, size, start=0, stop=None):
        indices = self._indices[start:stop]
        parts = [indices[first : first + size] for first in range(0, len(indices), size)]
        for batch in read_ahead(grain.MapDataset.source(parts).map(self._load), num_workers=0):
            if len(batch):
                yield np.stack(batch)

    def _load(self, indices) -> list[np.ndarray]:
        good: list[np.ndarray] = []
        for index in map(int, indices):
            try:
                picture = self._read(self._source[index]["image"], False)
                shape = getattr(self, "shape", picture.shape)
                if picture.shape != shape:
                    differ = f"it is {picture.shape} pixels, the first picture {shape}"
                    raise BadExample(f"{differ}: all must have one size")
                good.append(picture)
            except BadExample as error:
                self.bad[self._source.example_id(index)] = str(error)
        check_bad(self.bad, len(self), self._fraction, f"{self.name}: data.max_bad_fraction")
        return good


class FolderImages(SourceImages):
    """The pictures in a folder by the order of their names, or of those in its subfolders.

    Nothing is cropped or scaled. Beside the pictures may lie what `dico_jax.sample` leaves there.
    """

    def __init__(self, path: str, flag: str, max_bad_fraction: float = 0.0):
        """Lists a folder, local or gs://, that messages call `flag`; other files are refused."""
        try:
            source = FolderSource(path, flat=True, beside=_BESIDE_SAMPLES)
        except UsageError as error:
            raise UsageError(str(error).replace("data.path", flag)) from error
        if others := source.skipped:
            listed = ", ".join(sorted(others)[:3])
            what = f"more than the pictures to be measured ({len(others)}, such as {listed})"
            raise UsageError(f"{flag}={path} holds {what}: move them elsewhere")
        whole, name = load_whole_picture, f"{flag}={path}"
        super().__init__(source, lambda data, _: whole(data), None, max_bad_fraction, name)
