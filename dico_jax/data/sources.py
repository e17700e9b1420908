"""Sources of training examples by name, and those of arrays; docs/data.md is for their users."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from dico_jax.data.paths import MAX_CLASSES, path_errors, required_path, wrong_path
from dico_jax.errors import UsageError, one_line


class Source(Protocol):
    """An indexed sequence of examples, read by threads and pickled into worker processes.

    Its repr tells what it reads and is the same in every process.

    Attributes:
      kind: what the images are: "pictures", "latents" (float, scaled) or "moments" (of the
        autoencoder's posterior). The latter two also have `image_shape`, the (H, W, C) of one
        orientation.
      class_names: one name per class, in the order of the labels.
      skipped: id to reason, of what was found among the examples but is none.
    """

    kind: str
    class_names: list[str]
    skipped: dict[str, str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image", "label", ...}: the label is an int, the position in `class_names`.

        Those of captioned pictures have "captions", texts, at least one, and may have no label.

        Pictures are bytes of a picture file or uint8 (H, W, 1 or 3). Latents and moments are
        floats (H, W, C) or, with the mirrored picture's, (2, H, W, C). Further fields are what the
        source has: text, numbers, bytes, arrays, or lists and dicts of these. A network's
        `read_condition` takes what it wants.

        Raises:
          BadExample: this one example cannot be read.
          OSError: the disk or the network fails.
        """
        ...

    def example_id(self, index: int) -> str:
        """What names an example to the user, such as CLASS/FILE; its image is not decoded."""
        ...


class _Arrays:
    """Examples in two arrays, whose ids are their positions."""

    def _take(self, examples: np.ndarray, labels: np.ndarray) -> None:
        self._examples, self._labels = examples, labels
        self.kind = "pictures" if examples.dtype == np.uint8 else "latents"
        self.image_shape = examples.shape[-3:]
        self.class_names = [str(i) for i in range(int(labels.max()) + 1)]
        self.skipped: dict[str, str] = {}

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index) -> dict[str, Any]:
        return {"image": np.asarray(self._examples[index]), "label": int(self._labels[index])}

    def example_id(self, index) -> str:
        """The position of an example."""
        return str(range(len(self))[index])


class DigitsSource(_Arrays):
    """scikit-learn's 1,797 pictures of digits: uint8 (8, 8, 1), ink 255, ten classes."""

    def __init__(self):
        from sklearn import datasets

        digits = datasets.load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        self._take(pixels, digits.target.astype(np.int32))

    def __repr__(self):
        return "DigitsSource()"


class ArraySource(_Arrays):
    """Two NumPy files in a folder, memory-mapped: `examples.npy` and `labels.npy`.

    `examples.npy` has uint8 pixels (N, H, W, 1 or 3), scaled float latents (N, H, W, C), or those
    of each picture and its mirror image (N, 2, H, W, C). `labels.npy` has (N,) integers from 0.
    """

    def __init__(self, path: str | None):
        what = "the folder of examples.npy and labels.npy"
        self.path = path = required_path(path, what, local="NumPy files")
        with path_errors(self.path):
            try:
                examples, labels = (_opened(f"{path}/{n}.npy") for n in ("examples", "labels"))
            except OSError:
                raise
            except Exception as error:  # of many classes, for damaged heads
                what = f"examples.npy or labels.npy is no NumPy array: {one_line(error)}"
                raise wrong_path(self.path, what) from error
        if reason := _wrong_arrays(examples, labels):
            raise wrong_path(self.path, reason)
        self._take(examples, labels)

    def __reduce__(self):
        return ArraySource, (self.path,)

    def __repr__(self):
        return f"ArraySource({self.path!r})"


def _opened(file: str) -> np.ndarray:
    with open(file, "rb") as stream:
        if stream.read(7) != b"\x93NUMPY\x01":  # other versions may have headers of 4 GB
            raise ValueError(f"{file} is not of format 1")
    return np.load(file, mmap_mode="r")


def _wrong_arrays(examples: np.ndarray, labels: np.ndarray) -> str | None:
    shape, dtype = examples.shape, examples.dtype
    is_pixels = dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3)
    is_latents = dtype.kind == "f" and (len(shape) == 4 or (len(shape) == 5 and shape[1] == 2))
    if not is_pixels and not is_latents:
        wanted = "uint8 (N, H, W, 1 or 3), or float (N, H, W, C) or, mirrored too, (N, 2, H, W, C)"
        return f"examples.npy is {dtype} {shape}, but must be {wanted}"
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        wanted = f"integers ({shape[0]},), one per example, at least one"
        return f"labels.npy is {labels.dtype} {labels.shape}, but must be {wanted}"
    low, high = labels.min(), labels.max()
    if low < 0 or low == 1 or high >= MAX_CLASSES:
        wrong = high if high >= MAX_CLASSES else low  # the least label, where it is 1
        return f"labels.npy has {wrong}: count from 0, to {MAX_CLASSES - 1} at most"
    return None


def _module(name: str) -> Any:
    return importlib.import_module(f"dico_jax.data.{name}")


# What opens each, by `config.data`; modules are imported when they are needed.
SOURCES: dict[str, Callable[[Any], Source]] = {
    "latents": lambda c: _module("latents").PreparedLatents.from_config(c),
    "folder": lambda c: _module("class_files").FolderSource(c.path),
    "zip": lambda c: _module("class_files").ZipSource(c.path),
    "captions": lambda c: _module("captions").CaptionedFiles(c.path, c.captions, c.split),
    "tar": lambda c: _module("captions").TarSource(c.path),
    "tfds": lambda c: _module("records").TfdsSource(c.name, c.path, c.split),
    "array_record": lambda c: _module("records").ArrayRecordSource(c.path),
    "arrays": lambda c: ArraySource(c.path),
    "digits": lambda c: DigitsSource(),
    "worded_digits": lambda c: _module("worded_digits").WordedDigits(),
}


def create_source(config) -> Source:
    """The source of `config.data`; a UsageError if it is unknown, or what it refuses itself."""
    name = config.source
    if name not in SOURCES:
        raise UsageError("data.source", name, f"is unknown: use one of {', '.join(SOURCES)}")
    try:
        return SOURCES[name](config)
    except ImportError as error:
        packages = "scikit-learn" if "digits" in name else "tensorflow-datasets array_record"
        fix = f"needs {packages} ({one_line(error)}): pip install {packages}"
        raise UsageError("data.source", name, fix) from error
