"""The pictures of classes, as folders and zip files hold them: CLASS/FILE.

Names of a million files are kept as bytes in one array, which takes a third of the memory of a list
of strings and pickles 20 times faster.
"""

import abc
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dico_jax.data.pictures import picture_suffixes
from dico_jax.errors import UsageError


class Names:
    """A sequence of strings in little memory."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        name = self._bytes[start : self._ends[index]].tobytes()
        return name.decode("utf-8", "surrogateescape")


class ClassFiles(abc.ABC):
    """A source of the encoded pictures of classes, sorted by class and file name.

    Labels are positions in the sorted class names; ids are CLASS/FILE.

    Attributes:
      path: where it is.
      class_names: names of the classes.
      skipped: id to reason, of the files that are no pictures.
    """

    kind = "pictures"

    def __init__(self, path: str, files: Mapping[str, list[str]], skipped: dict[str, str]):
        """Takes names of pictures by class, in any order.

        Raises:
          UsageError: a class has none.
        """
        self.path, self.skipped = path, skipped
        self.class_names = sorted(files)
        _check_classes(path, self.class_names, files, skipped)
        counts = [len(files[name]) for name in self.class_names]
        self._starts = np.cumsum([0, *counts])
        self._names = Names(file for name in self.class_names for file in sorted(files[name]))

    @abc.abstractmethod
    def _read(self, index: int, class_name: str, file_name: str) -> bytes:
        """The content of a file."""

    def _locate(self, index) -> tuple[int, int, str, str]:
        index = range(len(self))[index]  # raises IndexError
        label = int(np.searchsorted(self._starts, index, side="right")) - 1
        return index, label, self.class_names[label], self._names[index]

    def __len__(self):
        return len(self._names)

    def __getitem__(self, index) -> dict[str, Any]:
        index, label, class_name, file_name = self._locate(index)
        return {"image": self._read(index, class_name, file_name), "label": label}

    def example_id(self, index) -> str:
        """CLASS/FILE of an example."""
        _, _, class_name, file_name = self._locate(index)
        return printable(f"{class_name}/{file_name}")

    def __repr__(self):
        return f"{type(self).__name__}({self.path!r})"


def printable(name: str) -> str:
    """A file's name without the surrogates that stand for bytes which are not UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_picture_name(name: str) -> bool:
    """Whether a name has the suffix of a picture."""
    return os.path.splitext(name)[1].lower() in picture_suffixes()


def no_picture_reason(name: str) -> str:
    """Why a file is not taken for a picture."""
    suffix = os.path.splitext(name)[1]
    return f"{suffix} is not a picture's suffix" if suffix else "it has no suffix"


def _check_classes(
    path: str, class_names: list[str], files: Mapping[str, list[str]], skipped: dict[str, str]
) -> None:
    empty = [name for name in class_names if not files[name]]
    if not empty:
        return
    others = [name for name in skipped if name.split("/", 1)[0] in set(map(printable, empty))]
    hint = f" (skipped in them: {len(others)}, such as {others[0]})" if others else ""
    raise UsageError(
        f"data.path={path}: no pictures in the class folders "
        f"{', '.join(map(printable, empty))}{hint}: fill or remove them"
    )
