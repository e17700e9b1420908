"""Sources of the pictures of classes, CLASS/FILE, in a folder or a zip file."""

import concurrent.futures
import itertools
import operator
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dico_jax.data.paths import (
    MAX_FILE_BYTES,
    Listing,
    is_hidden,
    join,
    list_folder,
    open_file,
    path_errors,
    picture_names,
    printable,
    read_picture_file,
    required_path,
    wrong_path,
)
from dico_jax.data.pictures import BadExample, one_line

# Folders that are listed at once; what takes time is a bucket or a network disk.
_LISTERS = 16

# What is kept of a zip file's entry to read it: attributes of ZipInfo.
_FIELDS = dict.fromkeys(("header_offset", "compress_size", "file_size"), np.int64) | {
    "CRC": np.uint32,
    "compress_type": np.uint16,
    "flag_bits": np.uint16,
}
_HEADER = struct.Struct("<4s22xHH")  # before an entry's data: magic, lengths of name and extra
_ENCRYPTED, _UTF8 = 0x1, 0x800


class ClassFiles:
    """A source of encoded pictures, sorted by class and file name; ids are CLASS/FILE."""

    kind = "pictures"
    _read: Callable[[int, str, str], bytes]  # of position, class name, file name

    def __init__(self, path: str, files: dict[str, list[str]], skipped: dict[str, str]):
        self.path, self.skipped, self.class_names = path, skipped, list(files)
        self._starts = np.cumsum([0, *map(len, files.values())])
        # A third of the memory of a list of strings, and pickled 20 times faster.
        names = itertools.chain.from_iterable(files.values())
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._ends = np.cumsum(np.fromiter(map(len, [b"", *encoded]), np.int64))
        self._names = b"".join(encoded)

    def _locate(self, index) -> tuple[int, int, str, str]:
        index = range(len(self))[index]  # raises IndexError
        label = int(np.searchsorted(self._starts, index, side="right")) - 1
        name = self._names[self._ends[index] : self._ends[index + 1]]
        return index, label, self.class_names[label], name.decode("utf-8", "surrogateescape")

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, index) -> dict[str, Any]:
        index, label, class_name, file_name = self._locate(index)
        return {"image": self._read(index, class_name, file_name), "label": label}

    def example_id(self, index) -> str:
        """CLASS/FILE, without the surrogates of `printable`."""
        return printable("/".join(self._locate(index)[2:]))

    def __repr__(self):
        return f"{type(self).__name__}({self.path!r})"


class FolderSource(ClassFiles):
    """PATH/CLASS/FILE, local or gs://."""

    def __init__(self, path: str | None):
        path = required_path(path, "a folder with one subfolder of pictures per class")
        with path_errors(path):
            top = list_folder(path)
            folders = [join(path, name) for name in top.folders]
            with concurrent.futures.ThreadPoolExecutor(_LISTERS) as pool:
                listings = list(pool.map(list_folder, folders))
            names = map(_names_below, folders, listings)
            classes = dict(zip(top.folders, names, strict=True))
        files, skipped = sort_files(path, top.files, classes)
        for name, listing in sorted(zip(top.folders, listings, strict=True)):
            for other in sorted(picture_names(listing.others)):
                skipped[printable(f"{name}/{other}")] = "it is not a file, or a broken link"
        super().__init__(path, files, skipped)

    def _read(self, index, class_name, file_name):
        return read_picture_file(join(self.path, class_name, file_name))


def _names_below(folder: str, listing: Listing) -> list[str]:
    """Names of all files in a listed folder and deeper."""
    for name in listing.folders:
        deeper = join(folder, name)
        listing.files.extend(f"{name}/{file}" for file in _names_below(deeper, list_folder(deeper)))
    return listing.files


class ZipSource(ClassFiles):
    """CLASS/FILE in a zip file, stored or deflated, local or gs://.

    Folders that all entries have in common above the classes are left out of the names. Of two
    entries with one name the later counts, as for every program that unpacks. As `zipfile` takes
    seconds for a directory of a million entries, threads and workers read entries without it.
    """

    def __init__(self, path: str | None):
        path = required_path(path, "a zip file with one folder of pictures per class")
        infos, size = _directory(path)
        visible = {i.filename: i for i in infos if not any(map(is_hidden, i.filename.split("/")))}
        self._prefix = prefix = _common_folders(picture_names(visible))
        loose: list[str] = []
        classes: dict[str, list[str]] = {}
        for name in visible:
            class_name, inside, file_name = name.removeprefix(prefix).partition("/")
            if name.startswith(prefix) and name != prefix:
                names = classes.setdefault(class_name, []) if inside else loose
                names.append(file_name if inside else class_name)
        files, skipped = sort_files(path, loose, classes)
        super().__init__(path, files, skipped)
        entries = [visible[f"{prefix}{c}/{file}"] for c in files for file in files[c]]
        self._entries = _entries(path, entries, size)

    def _read(self, index, class_name, file_name):
        entry = dict(zip(_FIELDS, self._entries[index].item(), strict=True))
        if entry["file_size"] > MAX_FILE_BYTES:
            raise BadExample(f"its zip entry declares {entry['file_size']} bytes")
        with open_file(self.path) as file:
            file.seek(entry["header_offset"])
            try:
                return _content(file, entry, f"{self._prefix}{class_name}/{file_name}")
            except (ValueError, struct.error, zlib.error) as error:
                raise BadExample(f"its zip entry is damaged: {one_line(error)}") from error


def _directory(path: str) -> tuple[list[zipfile.ZipInfo], int]:
    """The entries of a zip file and the file's size."""
    with path_errors(path):
        try:
            with open_file(path) as file, zipfile.ZipFile(file) as archive:
                return archive.infolist(), file.seek(0, os.SEEK_END)
        except (zipfile.BadZipFile, struct.error, ValueError, RuntimeError, EOFError) as error:
            what = f"it is not a zip file, or damaged ({one_line(error)})"
            raise wrong_path(path, f"{what}: copy it again") from error


def _common_folders(pictures: Iterable[str]) -> str:
    """The folders that the class folders of all pictures are in, such as "data/train/"."""
    above = [folder.split("/")[:-1] for folder in {name.rpartition("/")[0] for name in pictures}]
    common = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*above, strict=False))
    return "".join(f"{names[0]}/" for names in common)


def _entries(path: str, infos: Sequence[zipfile.ZipInfo], size: int) -> np.ndarray:
    """The `_FIELDS` of each entry, checked."""
    try:
        rows = map(operator.attrgetter(*_FIELDS), infos)
        entries = np.fromiter(rows, list(_FIELDS.items()), len(infos))
    except OverflowError as error:
        raise wrong_path(path, "it declares an impossible size: copy it again") from error
    at, nbytes, method = (entries[f] for f in ("header_offset", "compress_size", "compress_type"))
    outside = (at < 0) | (nbytes < 0) | (at > size) | (nbytes > size - at)
    known = (method == zipfile.ZIP_STORED) | (method == zipfile.ZIP_DEFLATED)
    for wrong, reason in (
        (outside, "lies outside the file: copy it again"),
        (entries["flag_bits"] & _ENCRYPTED, "is encrypted: pack it without a password"),
        (~known, "is packed with another method than deflate or none: use one of these"),
    ):
        if wrong.any():
            name = printable(infos[int(np.argmax(wrong))].filename)
            raise wrong_path(path, f"its entry {name} {reason}")
    return entries


def _content(file, entry: dict[str, int], name: str) -> bytes:
    """The unpacked data of the entry that starts here."""
    magic, name_length, extra_length = _HEADER.unpack(file.read(_HEADER.size))
    if magic != b"PK\3\4":
        raise ValueError("Bad magic number for its header")
    if file.read(name_length) != name.encode("utf-8" if entry["flag_bits"] & _UTF8 else "cp437"):
        raise ValueError("its names in the directory and in its header differ")
    file.seek(extra_length, os.SEEK_CUR)
    data, size = file.read(entry["compress_size"]), entry["file_size"]
    if entry["compress_type"] == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    if len(data) != size:
        raise ValueError(f"it has not the {size} bytes that it declares")
    if zlib.crc32(data) != entry["CRC"]:
        raise ValueError("Bad CRC-32")
    return data


def sort_files(
    path: str, loose: Iterable[str], classes: dict[str, list[str]]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The pictures of every class, sorted, and why other files were skipped, by printable name.

    `loose` are names beside the class folders, those in `classes` are "1.jpg" or "deeper/1.jpg".
    """
    skipped = dict.fromkeys(picture_names(loose), "it lies beside the class folders")
    if not classes:
        what = f"it has no folders of pictures ({len(skipped)} pictures lie in no folder)"
        raise wrong_path(path, f"{what}: give one folder of pictures per class (one is enough)")
    files: dict[str, list[str]] = {}
    for class_name, names in sorted(classes.items()):
        pictures = files[class_name] = sorted(picture_names(names))
        if deep := next((name for name in pictures if "/" in name), None):
            what = f"pictures lie deeper than CLASS/FILE ({printable(f'{class_name}/{deep}')})"
            raise wrong_path(path, f"{what}: give or pack the folder that holds the classes")
        for name in set(names).difference(pictures) if len(pictures) < len(names) else ():
            if name and "/" not in name:
                suffix = os.path.splitext(name)[1]
                skipped[f"{class_name}/{name}"] = f"its suffix {suffix!r} is not a picture's"
    skipped = {printable(name): skipped[name] for name in sorted(skipped)}
    if empty := [printable(name) for name, pictures in files.items() if not pictures]:
        inside = [name for name in skipped if name.partition("/")[0] in empty]
        hint = f" (skipped in them: {len(inside)}, such as {inside[0]})" if inside else ""
        what = f"no pictures in the class folders {', '.join(empty)}{hint}"
        raise wrong_path(path, f"{what}: fill or remove them")
    return files, skipped
