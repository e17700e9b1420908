"""The pictures of classes, CLASS/FILE, as folders and zip files hold them.

Names of a million files are kept as bytes in one array, which takes a third of the memory of a list
of strings and pickles 20 times faster.
"""

import abc
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from dico_jax.data.paths import (
    Listing,
    is_picture_name,
    join,
    list_folder,
    path_errors,
    printable,
    read_picture_file,
    required_path,
    wrong_path,
)

# Folders that are listed at once; what takes time is a bucket or a network disk.
_LISTERS = 16


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

    def __init__(self, path: str, files: dict[str, list[str]], skipped: dict[str, str]):
        """Takes what `sort_files` gives."""
        self.path, self.skipped, self.class_names = path, skipped, list(files)
        self._starts = np.cumsum([0, *map(len, files.values())])
        self._names = Names(file for names in files.values() for file in names)

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
        return printable("/".join(self._locate(index)[2:]))

    def __repr__(self):
        return f"{type(self).__name__}({self.path!r})"


class FolderSource(ClassFiles):
    """PATH/CLASS/FILE, local or gs://."""

    def __init__(self, path: str | None):
        """Lists the folder.

        Raises:
          UsageError: it is not there, may not be read, or has another layout.
        """
        path = required_path(path, "a folder with one subfolder of pictures per class")
        with path_errors(path):
            top = list_folder(path)
            folders = sorted(top.folders)
            with concurrent.futures.ThreadPoolExecutor(_LISTERS) as pool:
                listings = list(pool.map(list_folder, [join(path, name) for name in folders]))
            classes = dict(zip(folders, listings, strict=True))
            names = [f"{name}/" for name in folders] + sorted(top.files)
            names += [file for name in folders for file in _below(path, name, classes[name])]
        files, skipped = sort_files(
            path,
            names,
            lambda name: (
                f"if {printable(name)} is not a class but holds the classes, give "
                f"data.path={printable(join(path, name))}"
            ),
        )
        for name in folders:
            for other in sorted(filter(is_picture_name, classes[name].others)):
                skipped[printable(f"{name}/{other}")] = "it is not a file, or a broken link"
        super().__init__(path, files, skipped)

    def _read(self, index, class_name, file_name):
        return read_picture_file(join(self.path, class_name, file_name))


def _below(path: str, folder: str, listing: Listing) -> Iterator[str]:
    """Names, from `path` on, of all files in its subfolder `folder` and deeper."""
    for name in listing.files:
        yield f"{folder}/{name}"
    for name in sorted(listing.folders):
        deeper = f"{folder}/{name}"
        yield from _below(path, deeper, list_folder(join(path, deeper)))


def sort_files(
    path: str, names: Iterable[str], nested_fix: Callable[[str], str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The pictures of every class, sorted, and why other files were skipped, by printable name.

    Args:
      path: `data.path`.
      names: of visible files below it, such as "cat/1.jpg"; "cat/" is a folder.
      nested_fix: what to do where a class of this name has pictures in folders of its own.

    Raises:
      UsageError: there are no classes, one is empty, or pictures lie deeper.
    """
    files: dict[str, list[str]] = {}
    skipped = {}
    for name in names:
        class_name, inside, file_name = name.partition("/")
        is_picture = is_picture_name(name)
        if not inside:
            if is_picture:
                skipped[printable(name)] = "it lies beside the class folders"
        elif "/" not in file_name:
            of_class = files.setdefault(class_name, [])
            if is_picture:
                of_class.append(file_name)
            elif file_name:
                suffix = os.path.splitext(file_name)[1]
                reason = f"{suffix} is not a picture's suffix" if suffix else "it has no suffix"
                skipped[printable(name)] = reason
        elif is_picture:
            raise wrong_path(
                path,
                f"pictures lie deeper than CLASS/FILE ({printable(name)}): "
                f"{nested_fix(class_name)}",
            )
    if not files:
        raise wrong_path(
            path,
            f"it has no folders of pictures ({len(skipped)} pictures lie in no folder): give one "
            "folder of pictures per class (one is enough)",
        )
    files = {name: sorted(files[name]) for name in sorted(files)}
    skipped = dict(sorted(skipped.items()))
    empty = [printable(name) for name, found in files.items() if not found]
    if empty:
        others = [name for name in skipped if name.partition("/")[0] in empty]
        hint = f" (skipped in them: {len(others)}, such as {others[0]})" if others else ""
        raise wrong_path(
            path, f"no pictures in the class folders {', '.join(empty)}{hint}: fill or remove them"
        )
    return files, skipped
