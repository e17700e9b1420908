"""Pictures in a zip file with one folder per class."""

import collections
import contextlib
import itertools
import os
import struct
import threading
import zipfile
import zlib

import numpy as np

from dico_jax.data.class_files import ClassFiles, is_picture_name, no_picture_reason, printable
from dico_jax.data.paths import (
    MAX_FILE_BYTES,
    is_hidden,
    is_remote,
    open_file,
    path_errors,
    required_path,
)
from dico_jax.data.pictures import BadExample
from dico_jax.errors import UsageError

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1

# What zipfile needs to know of an entry to read it: attributes of ZipInfo.
_FIELDS = {
    "header_offset": np.int64,
    "compress_size": np.int64,
    "file_size": np.int64,
    "CRC": np.uint32,
    "compress_type": np.uint16,
    "flag_bits": np.uint16,
}


class ZipSource(ClassFiles):
    """CLASS/FILE in a zip file, stored or deflated, local or gs://.

    Folders that all entries have in common above the classes are left out of the names. Of two
    entries with one name the later counts, as for every program that unpacks.
    """

    def __init__(self, path: str | None):
        """Reads the zip file's directory.

        Raises:
          UsageError: it is not there, may not be read, is damaged or encrypted, or has another
            layout.
        """
        path = required_path(path, "a zip file with one folder of pictures per class")
        with path_errors(path):
            infos, size = _directory(path)
        pictures, skipped, self._prefix = _classes(path, infos)
        super().__init__(path, {name: list(files) for name, files in pictures.items()}, skipped)
        chosen = [
            pictures[name][file] for name in self.class_names for file in sorted(pictures[name])
        ]
        self._entries = _entries(path, chosen, size)
        self._local = threading.local()

    def _read(self, index, class_name, file_name):
        info = zipfile.ZipInfo(f"{self._prefix}{class_name}/{file_name}")
        for field in _FIELDS:
            setattr(info, field, self._entries[field][index].item())
        if info.file_size > MAX_FILE_BYTES:
            raise BadExample(f"its zip entry declares {info.file_size} bytes")
        try:
            return self._reader().read(info)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            UnicodeDecodeError,
        ) as error:
            reason = " ".join(str(error).split()) or "it ends early"
            raise BadExample(f"its zip entry is damaged: {reason}") from error

    def _reader(self) -> zipfile.ZipFile:
        """This thread's zip file: threads must not share a position, nor forked processes."""
        if getattr(self._local, "process", None) != os.getpid():
            self._local.reader, self._local.process = _EntryReader(self.path), os.getpid()
        return self._local.reader

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state):
        self.__dict__.update(state, _local=threading.local())


class _EntryReader(zipfile.ZipFile):
    """A zip file to read known entries from.

    Reading the directory takes seconds a million entries; no thread and worker shall do it again.
    """

    def __init__(self, path: str):
        if is_remote(path):
            self._opened = open_file(path)  # kept, because it closes the file when it goes
            super().__init__(self._opened.__enter__())
        else:
            super().__init__(path)  # which closes the file itself

    def _RealGetContents(self):  # noqa: N802 - reads the directory
        pass


def _directory(path: str) -> tuple[list[zipfile.ZipInfo], int]:
    """The entries of a zip file and the file's size."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_file(path))
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except IsADirectoryError as error:
            raise UsageError(
                f"data.path={path}: it is a folder, not a zip file: use data.source='folder'"
            ) from error
        except zipfile.BadZipFile as error:
            raise UsageError(
                f"data.path={path}: it is not a zip file, or damaged ({error}): copy it again"
            ) from error
        except (struct.error, ValueError, NotImplementedError, EOFError) as error:
            raise _damaged(path, str(error)) from error
        return infos, file.seek(0, os.SEEK_END)


def _damaged(path: str, what: str) -> UsageError:
    return UsageError(f"data.path={path}: its zip directory is damaged ({what}): copy it again")


def _classes(
    path: str, infos: list[zipfile.ZipInfo]
) -> tuple[dict[str, dict[str, zipfile.ZipInfo]], dict[str, str], str]:
    """Pictures by class and file name, what was skipped, and what all their names start with."""
    visible = {i.filename: i for i in infos if not any(map(is_hidden, i.filename.split("/")))}
    pictures = [name for name in visible if is_picture_name(name)]
    prefix = _common_folders(pictures)
    classes: dict[str, dict[str, zipfile.ZipInfo]] = collections.defaultdict(dict)
    skipped: dict[str, str] = {}
    for name, info in visible.items():
        class_name, inside, file_name = name.removeprefix(prefix).partition("/")
        is_picture = is_picture_name(name)
        if not name.startswith(prefix) or not class_name + inside:
            continue
        if not inside:
            if is_picture:
                skipped[printable(class_name)] = "it lies beside the class folders"
        elif "/" not in file_name:
            files = classes[class_name]
            if is_picture:
                files[file_name] = info
            elif file_name:  # none: it is the folder's own entry
                skipped[printable(f"{class_name}/{file_name}")] = no_picture_reason(file_name)
        elif is_picture:
            raise UsageError(
                f"data.path={path}: pictures lie deeper than CLASS/FILE ({printable(name)}): pack "
                "one folder of class folders"
            )
    if not classes:
        raise UsageError(
            f"data.path={path}: it has no folders of pictures ({len(pictures)} pictures lie in no "
            "folder): pack one folder per class (one is enough)"
        )
    return classes, skipped, prefix


def _common_folders(pictures: list[str]) -> str:
    """The folders that the class folders of all pictures are in, such as "data/train/"."""
    above = [folder.split("/")[:-1] for folder in {name.rpartition("/")[0] for name in pictures}]
    first_and_last = zip(min(above, default=[]), max(above, default=[]), strict=False)
    common = itertools.takewhile(lambda pair: pair[0] == pair[1], first_and_last)
    return "".join(f"{folder}/" for folder, _ in common)


def _entries(path: str, infos: list[zipfile.ZipInfo], size: int) -> np.ndarray:
    """The `_FIELDS` of each entry, checked."""
    try:
        rows = (tuple(getattr(info, field) for field in _FIELDS) for info in infos)
        entries = np.fromiter(rows, list(_FIELDS.items()), len(infos))
    except OverflowError as error:
        raise _damaged(path, "it declares an impossible size") from error
    at, nbytes = entries["header_offset"], entries["compress_size"]
    wrong = np.flatnonzero((at < 0) | (nbytes < 0) | (at > size) | (nbytes > size - at))
    if wrong.size:
        name = printable(infos[wrong[0]].filename)
        raise _damaged(path, f"{name} lies outside the file")
    locked = np.flatnonzero(entries["flag_bits"] & _ENCRYPTED)
    if locked.size:
        name = printable(infos[locked[0]].filename)
        raise UsageError(f"data.path={path}: {name} is encrypted: pack it without a password")
    packed = np.flatnonzero(~np.isin(entries["compress_type"], _METHODS))
    if packed.size:
        info = infos[packed[0]]
        raise UsageError(
            f"data.path={path}: {printable(info.filename)} is packed with method "
            f"{info.compress_type}: pack it with deflate, or without compression"
        )
    return entries
