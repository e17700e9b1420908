"""Examples in NumPy files."""

import os
from typing import Any

import numpy as np

from dico_jax.data.paths import path_errors, require_local, required_path
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
        path = required_path(path, "the folder of examples.npy and labels.npy")
        require_local(path, "NumPy files")
        self.path = path
        self._open()
        examples, labels = self._examples, self._labels
        self.kind = "pictures" if examples.dtype == np.uint8 else "latents"
        if examples.dtype != np.uint8 and examples.dtype.kind != "f":
            raise UsageError(
                f"data.path={path}: examples.npy is {examples.dtype}, but must be uint8 pixels or "
                "float latents"
            )
        pairs = examples.ndim == 5 and examples.shape[1] == 2
        if self.kind == "pictures" and (examples.ndim != 4 or examples.shape[-1] not in (1, 3)):
            raise UsageError(
                f"data.path={path}: examples.npy is uint8 {examples.shape}, "
                "but must be (N, H, W, 1 or 3)"
            )
        if examples.ndim != 4 and not pairs:
            raise UsageError(
                f"data.path={path}: examples.npy is {examples.shape}, "
                "but must be (N, H, W, C), or (N, 2, H, W, C) with mirrored ones"
            )
        if labels.shape != examples.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
            raise UsageError(
                f"data.path={path}: labels.npy is {labels.dtype} {labels.shape}, "
                f"but must be integers ({len(examples)},), one per example, at least one"
            )
        if labels.min() < 0:
            raise UsageError(f"data.path={path}: labels.npy has {labels.min()}: count from 0")
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


def _memory_map(path: str, name: str) -> np.ndarray:
    file = os.path.join(path, name)
    with path_errors(path):
        try:
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"data.path={path}: {file} is no NumPy array: {reason}") from error
