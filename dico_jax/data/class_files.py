"""Sources of the pictures of classes, CLASS/FILE, in a folder or a zip file."""

import concurrent.futures
import itertools
import json
import operator
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from dico_jax.data import paths
from dico_jax.data.pictures import BadExample
from dico_jax.errors import one_line, shown
from dico_jax.files import opened

LISTERS = 16  # of folders at once; what takes time is a bucket or a network disk
# What is kept of a zip file's entry to read it: attributes of ZipInfo.
_FIELDS: dict[str, Any] = dict.fromkeys(("header_offset", "compress_size", "file_size"), np.int64)
_FIELDS |= {"CRC": np.uint32, "compress_type": np.uint16, "flag_bits": np.uint16}
_HEADER = struct.Struct("<4s22xHH")  # before an entry's data: magic, lengths of name and extra
_ENCRYPTED, _UTF8 = 0x1, 0x800
_LABELS = "dataset.json"


class ClassFiles:
    """A source of encoded pictures, sorted by class and file name; ids are CLASS/FILE."""

    kind = "pictures"
    _read: Callable[[int, str], bytes]  # of position, name

    def __init__(self, path: str, files: dict[str, list[str]], skipped: dict[str, str]):
        self.path, self.skipped, self.class_names = path, skipped, list(files)
        self._starts = np.cumsum([0, *map(len, files.values())])
        # A third of the memory of a list of strings, and pickled 20 times faster.
        names = itertools.chain.from_iterable(files.values())
        self.names = np.array([name.encode("utf-8", "surrogateescape") for name in names])

    def _name(self, index) -> str:
        return self.names[index].decode("utf-8", "surrogateescape")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index) -> dict[str, Any]:
        label = np.searchsorted(self._starts, range(len(self))[index], side="right") - 1
        return {"image": self._read(index, self._name(index)), "label": int(label)}

    def example_id(self, index) -> str:
        """CLASS/FILE, as it can be printed."""
        return shown(self._name(index))

    def __repr__(self):
        return f"{type(self).__name__}({self.path!r})"


class FolderSource(ClassFiles):
    """PATH/CLASS/FILE, local or gs://."""

    def __init__(self, path: str | None, *, flat: bool = False, beside: Collection[str] = ()):
        """Lists the folders; a `flat` one may be of pictures alone, but for files `beside` them."""
        path = paths.required_path(path, "a folder with one subfolder of pictures per class")
        with paths.path_errors(path):
            folders, files, others = paths.list_folder(path)
            with concurrent.futures.ThreadPoolExecutor(LISTERS) as pool:
                inside = pool.map(lambda name: list_below(os.path.join(path, name)), folders)
                listings = dict(zip(folders, inside, strict=True))
            there = _LABELS in files and not flat
            labels = paths.read_file(os.path.join(path, _LABELS)) if there else None
        loose = set(files).difference(beside)
        if flat and (pictures := paths.picture_names(loose)):
            others += [*loose.difference(pictures), *(f"{name}/" for name in folders)]
            listings, loose = {"": (pictures, [])}, set()
        classes = {name: inside for name, (inside, _) in listings.items()}
        sorted_files, skipped = sort_files(path, loose, classes, labels)
        broken = [f"{name}/{other}" for name, (_, there) in listings.items() for other in there]
        why = "it is not a file, or a broken link"
        skipped |= {shown(name): why for name in sorted(paths.picture_names(broken))}
        skipped |= dict.fromkeys(map(shown, others if flat else ()), "it is no picture")
        super().__init__(path, sorted_files, skipped)

    def _read(self, index, name):
        return paths.read_file(os.path.join(self.path, name))


def list_below(folder: str, depth: int = 3) -> tuple[list[str], list[str]]:
    """Names of all files in a folder and deeper, though not for ever, and of what else is in it."""
    folders, files, others = paths.list_folder(folder)
    for name in folders if depth else ():  # links may lead in circles
        files += [f"{name}/{f}" for f in list_below(os.path.join(folder, name), depth - 1)[0]]
    return files, others


class ZipSource(ClassFiles):
    """CLASS/FILE in a zip file, stored or deflated, local or gs://.

    Folders that all entries have in common above the classes are left out of the names. Of two
    entries with one name the later counts, as for every program that unpacks. As `zipfile` takes
    seconds for a directory of a million entries, threads and workers read entries without it.
    """

    def __init__(self, path: str | None):
        path = paths.required_path(path, "a zip file with one folder of pictures per class")
        infos, size = _directory(path)
        slash = "/" if any("/" in info.filename for info in infos) else "\\"  # as of Windows
        visible = {info.filename.replace(slash, "/"): info for info in infos}
        visible = {n: i for n, i in visible.items() if not any(map(paths.is_hidden, n.split("/")))}
        self._prefix = prefix = _common_folders(paths.picture_names(visible))
        loose: list[str] = []
        classes: dict[str, list[str]] = {}
        for name in visible:
            class_name, inside, file_name = name.removeprefix(prefix).partition("/")
            if name.startswith(prefix) and name != prefix:
                names = classes.setdefault(class_name, []) if inside else loose
                names.append(file_name if inside else class_name)
        self.path, labels = path, None
        if _LABELS in loose:
            self._entries = _entries(path, [visible[prefix + _LABELS]], size)
            labels = self._read(0, _LABELS)
        files, skipped = sort_files(path, loose, classes, labels)
        super().__init__(path, files, skipped)
        entries = [visible[prefix + name] for names in files.values() for name in names]
        self._entries = _entries(path, entries, size)

    def _read(self, index, name):
        entry = dict(zip(_FIELDS, self._entries[index].item(), strict=True))
        if entry["file_size"] > paths.MAX_FILE_BYTES:
            raise BadExample(f"its zip entry declares {entry['file_size']} bytes")
        with opened(self.path) as file:
            file.seek(entry["header_offset"])
            try:
                return _content(file, entry, f"{self._prefix}{name}")
            except (ValueError, struct.error, zlib.error) as error:
                raise BadExample(f"its zip entry is damaged: {one_line(error)}") from error


def _directory(path: str) -> tuple[list[zipfile.ZipInfo], int]:
    with paths.path_errors(path):
        try:
            with opened(path) as file, zipfile.ZipFile(file) as archive:
                return archive.infolist(), file.seek(0, os.SEEK_END)
        except (zipfile.BadZipFile, struct.error, ValueError, RuntimeError, EOFError) as error:
            what = f"it is not a zip file, or damaged ({one_line(error)})"
            raise paths.wrong_path(path, f"{what}: copy it again") from error


def _common_folders(pictures: Iterable[str]) -> str:
    """The folders that the class folders of all pictures are in, such as "data/train/"."""
    above = [folder.split("/")[:-1] for folder in {name.rpartition("/")[0] for name in pictures}]
    common = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*above, strict=False))
    return "".join(f"{names[0]}/" for names in common)


def _entries(path: str, infos: Sequence[zipfile.ZipInfo], size: int) -> np.ndarray:
    try:
        rows = map(operator.attrgetter(*_FIELDS), infos)
        entries = np.fromiter(rows, list(_FIELDS.items()), len(infos))
    except OverflowError as error:
        raise paths.wrong_path(path, "it declares an impossible size: copy it again") from error
    at, nbytes, method = (entries[f] for f in ("header_offset", "compress_size", "compress_type"))
    outside = (at < 0) | (nbytes < 0) | (at > size) | (nbytes > size - at)
    known = (method == zipfile.ZIP_STORED) | (method == zipfile.ZIP_DEFLATED)
    for wrong, reason in (
        (outside, "lies outside the file: copy it again"),
        (entries["flag_bits"] & _ENCRYPTED, "is encrypted: pack it without a password"),
        (~known, "is packed with another method than deflate or none: use one of these"),
    ):
        if wrong.any():
            name = shown(infos[int(np.argmax(wrong))].filename)
            raise paths.wrong_path(path, f"its entry {name} {reason}")
    return entries


def _content(file, entry: dict[str, int], name: str) -> bytes:
    """The unpacked data of the entry that starts here."""
    magic, name_length, extra_length = _HEADER.unpack(file.read(_HEADER.size))
    if magic != b"PK\3\4":
        raise ValueError("Bad magic number for its header")
    encoded = name.encode("utf-8" if entry["flag_bits"] & _UTF8 else "cp437")
    if file.read(name_length).replace(b"\\", b"/") != encoded.replace(b"\\", b"/"):
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
    path: str, loose: Iterable[str], classes: dict[str, list[str]], labels: bytes | None = None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The pictures of every class, sorted, and why other files were skipped, by printable name.

    `loose` are names beside the class folders, those in `classes` are "1.jpg" or "deeper/1.jpg".
    Classes that all are numbers lie in their order. `labels` is a dataset.json, in their place.
    """
    if labels is not None:
        inside = [f"{name}/{file}" for name, names in classes.items() for file in names]
        return _labelled(path, sorted(paths.picture_names([*loose, *inside])), labels)
    skipped = dict.fromkeys(paths.picture_names(loose), "it lies beside the class folders")
    if not classes:
        what = f"it has no folders of pictures ({len(skipped)} pictures lie in no folder)"
        fix = "give one folder of pictures per class (one is enough)"
        raise paths.wrong_path(path, f"{what}: {fix}")
    if len(classes) > paths.MAX_CLASSES or max(map(len, classes)) > 255:
        fix = f"up to {paths.MAX_CLASSES} classes are read, with names of up to 255 characters"
        raise paths.wrong_path(path, f"it has {len(classes)} class folders: {fix}")
    files: dict[str, list[str]] = {}
    numbers = all(name.isdecimal() for name in classes)
    for class_name in sorted(classes, key=lambda name: (int(name) if numbers else 0, name)):
        names = classes[class_name]
        above = f"{class_name}/" if class_name else ""
        pictures = sorted(paths.picture_names(names))
        files[class_name] = [above + name for name in pictures]
        if deep := next((name for name in pictures if "/" in name), None):
            what = f"pictures lie deeper than CLASS/FILE ({shown(above + deep)})"
            raise paths.wrong_path(path, f"{what}: give or pack the folder that holds the classes")
        for name in set(names).difference(pictures) if len(pictures) < len(names) else ():
            if name and "/" not in name:
                suffix = os.path.splitext(name)[1]
                skipped[f"{class_name}/{name}"] = f"its suffix {suffix!r} is not a picture's"
    skipped = {shown(name): skipped[name] for name in sorted(skipped)}
    if empty := [shown(name) for name, pictures in files.items() if not pictures]:
        inside = [name for name in skipped if name.partition("/")[0] in empty]
        hint = f" (skipped in them: {len(inside)}, such as {inside[0]})" if inside else ""
        what = f"no pictures in the class folders {', '.join(empty[:10])}{hint}"
        raise paths.wrong_path(path, f"{what}: fill or remove them")
    return files, skipped


def _labelled(path: str, names: list[str], text: bytes) -> tuple[dict, dict[str, str]]:
    """What `sort_files` gives for a dataset.json, as EDM and StyleGAN write it."""
    try:
        pairs = json.loads(text)["labels"]
        label_of = dict.fromkeys(names, 0) if pairs is None else dict(pairs)
        labels = [label_of[name] for name in names]
        low, high = min(labels), max(labels)
        if {*map(type, labels)} != {int} or low < 0 or low == 1 or high >= paths.MAX_CLASSES:
            raise ValueError(f"they are {low} to {high}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"its {_LABELS} does not give all pictures whole numbers from 0 on as labels"
        raise paths.wrong_path(path, f"{what} ({type(error).__name__}: {error})") from error
    files: dict[str, list[str]] = {str(label): [] for label in range(high + 1)}
    for name, label in zip(names, labels, strict=True):
        files[str(label)].append(name)
    return files, {}
