"""Sources of examples by name: indexed sequences of {"image", "label"}.

An image is either uint8 (H, W, C) pixels or float (H, W, C) latents, already scaled.
"""

import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from dico_jax.errors import UsageError


class Source(Protocol):
    """An indexed sequence of examples.

    Attributes:
      image_shape: (H, W, C) of every example.
      class_names: one name per class, in the order of the labels.
    """

    image_shape: tuple[int, int, int]
    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class ArraySource:
    """Two NumPy files in a folder, memory-mapped: `examples.npy` and `labels.npy`.

    `examples.npy` is (N, H, W, C), uint8 pixels or float latents; or (N, 2, H, W, C), where the
    second of each pair is the mirrored example (latents cannot be mirrored afterwards: encode both
    pictures). `labels.npy` is (N,) integers from 0.

    Raises:
      UsageError: a file is missing or has another form.
    """

    def __init__(self, path: str | None):
        if path is None:
            raise UsageError("data.path is not set: give the folder of examples.npy and labels.npy")
        examples, labels = (self._open(pathlib.Path(path) / f"{n}.npy") for n in self._FILES)
        if examples.ndim not in (4, 5) or (examples.ndim == 5 and examples.shape[1] != 2):
            raise UsageError(
                f"data.path={path}: examples.npy is {examples.shape}, "
                "but must be (N, H, W, C), or (N, 2, H, W, C) with mirrored ones"
            )
        if labels.shape != examples.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
            raise UsageError(
                f"data.path={path}: labels.npy is {labels.dtype} {labels.shape}, "
                f"but must be integers ({len(examples)},), one per example, at least one"
            )
        self.path, self.examples, self.labels = path, examples, labels
        self.has_mirrored = examples.ndim == 5
        self.image_shape = examples.shape[-3:]
        self.class_names = [str(i) for i in range(int(labels.max()) + 1)]

    _FILES = ("examples", "labels")

    @staticmethod
    def _open(file: pathlib.Path) -> np.ndarray:
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"data.path: cannot read {file}: {error}") from error

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": np.asarray(self.examples[index]), "label": int(self.labels[index])}

    def __repr__(self):
        return f"ArraySource({self.path!r})"


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits: uint8 (8, 8, 1), ink 255, ten classes.

    Raises:
      UsageError: scikit-learn is not installed.
    """

    has_mirrored = False

    def __init__(self):
        try:
            from sklearn import datasets
        except ImportError as error:
            raise UsageError(
                "data.source='digits' needs scikit-learn: pip install 'dico_jax[demo]'"
            ) from error
        digits = datasets.load_digits()
        self.images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        self.labels = digits.target.astype(np.int32)
        self.image_shape = (8, 8, 1)
        self.class_names = [str(i) for i in range(10)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": int(self.labels[index])}

    def __repr__(self):
        return "DigitsSource()"


SOURCES: dict[str, Callable[[Any], Source]] = {
    "arrays": lambda config: ArraySource(config.path),
    "digits": lambda config: DigitsSource(),
}


def create_source(config) -> Source:
    """The source of `config.data`.

    Raises:
      UsageError: an unknown name, or what the source itself refuses.
    """
    if config.source not in SOURCES:
        raise UsageError(
            f"data.source={config.source!r} is unknown: use one of {', '.join(SOURCES)}"
        )
    return SOURCES[config.source](config)
