"""Examples in memory or memory-mapped: NumPy files, and scikit-learn's digits."""

import os
from typing import Any

import numpy as np

from dico_jax.data.paths import path_errors, required_path, wrong_path
from dico_jax.data.pictures import one_line
from dico_jax.errors import UsageError


class ArraySource:
    """Two NumPy files in a folder, memory-mapped: `examples.npy` and `labels.npy`.

    `examples.npy` is (N, H, W, 1 or 3), uint8 pixels; or (N, H, W, C), scaled float latents; or
    (N, 2, H, W, C), where the second latents of each pair are those of the mirrored picture
    (latents cannot be mirrored afterwards). `labels.npy` is (N,) integers from 0.

    Attributes:
      kind: "pictures" or "latents".
      image_shape: (H, W, C) of an example, or of each of a pair.
      class_names: the labels as text.
      skipped: empty.
    """

    def __init__(self, path: str | None):
        """Opens the files.

        Raises:
          UsageError: a file is missing or has another form.
        """
        self.path = required_path(
            path, "the folder of examples.npy and labels.npy", local="NumPy files"
        )
        self._open()
        examples, labels = self._examples, self._labels
        self.kind = "pictures" if examples.dtype == np.uint8 else "latents"
        if reason := _wrong_arrays(examples, labels):
            raise wrong_path(self.path, reason)
        self.image_shape = examples.shape[-3:]
        self.class_names = [str(i) for i in range(int(labels.max()) + 1)]
        self.skipped: dict[str, str] = {}

    def _open(self) -> None:
        self._examples = _memory_map(self.path, "examples.npy")
        self._labels = _memory_map(self.path, "labels.npy")

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_examples", "_labels")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index) -> dict[str, Any]:
        return {"image": np.asarray(self._examples[index]), "label": int(self._labels[index])}

    def example_id(self, index) -> str:
        """The position of an example."""
        return str(range(len(self))[index])

    def __repr__(self):
        return f"ArraySource({self.path!r})"


class DigitsSource:
    """scikit-learn's 1,797 pictures of digits: uint8 (8, 8, 1), ink 255, ten classes."""

    kind = "pictures"

    def __init__(self):
        """Loads the digits.

        Raises:
          UsageError: scikit-learn is not installed.
        """
        try:
            from sklearn import datasets
        except ImportError as error:
            raise UsageError(
                "data.source='digits' needs scikit-learn: pip install 'dico_jax[demo]'"
            ) from error
        digits = datasets.load_digits()
        self._images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        self._labels = digits.target.astype(np.int32)
        self.class_names = [str(i) for i in range(10)]
        self.skipped: dict[str, str] = {}

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def example_id(self, index) -> str:
        """The position of a digit."""
        return str(range(len(self))[index])

    def __repr__(self):
        return "DigitsSource()"


def _memory_map(path: str, name: str) -> np.ndarray:
    file = os.path.join(path, name)
    with path_errors(path):
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise wrong_path(path, f"{file} is no NumPy array: {one_line(error)}") from error


def _wrong_arrays(examples: np.ndarray, labels: np.ndarray) -> str | None:
    """What is wrong with the arrays of a source, if anything is."""
    shape, pixels = examples.shape, examples.dtype == np.uint8
    if not pixels and examples.dtype.kind != "f":
        return f"examples.npy is {examples.dtype}, but must be uint8 pixels or float latents"
    if pixels and (len(shape) != 4 or shape[-1] not in (1, 3)):
        return f"examples.npy is uint8 {shape}, but must be (N, H, W, 1 or 3)"
    if len(shape) != 4 and not (len(shape) == 5 and shape[1] == 2):
        return (
            f"examples.npy is {shape}, but must be (N, H, W, C), or (N, 2, H, W, C) with mirrored "
            "ones"
        )
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        return (
            f"labels.npy is {labels.dtype} {labels.shape}, but must be integers ({len(examples)},),"
            " one per example, at least one"
        )
    if labels.min() < 0:
        return f"labels.npy has {labels.min()}: count from 0"
    return None
