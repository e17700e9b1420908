"""Sets of pictures to be measured: every one once, in order, all of one size."""

from collections.abc import Iterator

import grain
import numpy as np

from dico_jax.data.class_files import FolderSource
from dico_jax.data.pictures import BadExample, load_whole_picture
from dico_jax.data.pipeline import Reader, read_ahead
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError

_SEED = 2020
# What `dico_jax.sample` writes beside its images.
_BESIDE_SAMPLES = {"grid.png", "sampling.json"}


class ImageSet:
    """Pictures of one `shape` (H, W, C), read batch by batch; `name` is for messages, results."""

    name: str
    shape: tuple[int, int, int]
    _indices: np.ndarray  # of the pictures that are to be read

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
        raise NotImplementedError


class SourceImages(ImageSet):
    """The examples of a source of pictures, as training sees them but never mirrored.

    At most `limit` of them, spread evenly.
    """

    def __init__(self, source: Source, read: Reader, limit: int | None, name: str = ""):
        self._source, self._read, name = source, read, name or repr(source)
        if source.kind != "pictures":
            raise UsageError(f"{name} has {source.kind}: pictures are needed")
        count = len(source) if limit is None else min(limit, len(source))
        self._indices = np.linspace(0, len(source) - 1, count).round().astype(int)
        self.name, self.shape = name, self._load(0).shape

    def batches(self, size, start=0, stop=None):
        """See `ImageSet`."""
        indices = self._indices[start:stop]
        if len(indices):
            pictures = grain.MapDataset.source(indices).map(self._load)
            yield from read_ahead(pictures.batch(size), num_workers=0)

    def _load(self, index):
        try:
            picture = self._read(self._source[int(index)]["image"], False)
            shape = getattr(self, "shape", picture.shape)
            if picture.shape != shape:
                differ = f"it is {picture.shape} pixels, the first picture {shape}"
                raise BadExample(f"{differ}: all must have one size")
            return picture
        except BadExample as error:
            named = self._source.example_id(int(index))
            raise UsageError(f"{self.name}: {named} cannot be read: {error}") from error


class FolderImages(SourceImages):
    """The pictures in a folder by the order of their names, or of those in its subfolders.

    Nothing is cropped or scaled. Beside the pictures may lie what `dico_jax.sample` leaves there.
    """

    def __init__(self, path: str, flag: str):
        """Lists a folder, local or gs://, that messages call `flag`; other files are refused."""
        try:
            source = FolderSource(path, flat=True, beside=_BESIDE_SAMPLES)
        except UsageError as error:
            raise UsageError(str(error).replace("data.path", flag)) from error
        if others := source.skipped:
            listed = ", ".join(sorted(others)[:3])
            what = f"more than the pictures to be measured ({len(others)}, such as {listed})"
            raise UsageError(f"{flag}={path} holds {what}: move them elsewhere")
        whole = load_whole_picture
        super().__init__(source, lambda data, _: whole(data), None, f"{flag}={path}")
