"""Pictures in a zip file with one folder per class."""

import contextlib
import itertools
import os
import struct
import zipfile
import zlib

import numpy as np

from dico_jax.data.class_files import ClassFiles, sort_files
from dico_jax.data.paths import (
    MAX_FILE_BYTES,
    is_hidden,
    is_picture_name,
    open_file,
    path_errors,
    printable,
    required_path,
    wrong_path,
)
from dico_jax.data.pictures import BadExample, one_line
from dico_jax.errors import UsageError

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED, _UTF8 = 0x1, 0x800

# What is kept of an entry to read it: attributes of ZipInfo.
_FIELDS = {
    "header_offset": np.int64,
    "compress_size": np.int64,
    "file_size": np.int64,
    "CRC": np.uint32,
    "compress_type": np.uint16,
    "flag_bits": np.uint16,
}
_HEADER = struct.Struct("<4s22xHH")  # before an entry's data: magic, lengths of name and extra


class ZipSource(ClassFiles):
    """CLASS/FILE in a zip file, stored or deflated, local or gs://.

    Folders that all entries have in common above the classes are left out of the names. Of two
    entries with one name the later counts, as for every program that unpacks.

    The directory is read once, by `zipfile`; as that takes seconds a million entries, threads and
    workers read single entries without it.
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
        visible = {i.filename: i for i in infos if not any(map(is_hidden, i.filename.split("/")))}
        self._prefix = prefix = _common_folders(filter(is_picture_name, visible))
        names = (n[len(prefix) :] for n in visible if n.startswith(prefix) and n != prefix)
        files, skipped = sort_files(path, names, lambda name: "pack one folder of class folders")
        super().__init__(path, files, skipped)
        self._entries = _entries(
            path, [visible[f"{prefix}{c}/{file}"] for c in files for file in files[c]], size
        )

    def _read(self, index, class_name, file_name):
        entry = dict(zip(_FIELDS, self._entries[index].item(), strict=True))
        if entry["file_size"] > MAX_FILE_BYTES:
            raise BadExample(f"its zip entry declares {entry['file_size']} bytes")
        name = f"{self._prefix}{class_name}/{file_name}"
        with open_file(self.path) as file:
            file.seek(entry["header_offset"])
            try:
                return _content(file, entry, name)
            except (ValueError, struct.error, zlib.error) as error:
                raise BadExample(f"its zip entry is damaged: {one_line(error)}") from error


def _content(file, entry: dict[str, int], name: str) -> bytes:
    """The unpacked data of the entry that starts here.

    Raises:
      ValueError, struct.error, zlib.error: it is damaged.
    """
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


def _directory(path: str) -> tuple[list[zipfile.ZipInfo], int]:
    """The entries of a zip file and the file's size."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_file(path))
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except IsADirectoryError as error:
            raise wrong_path(
                path, "it is a folder, not a zip file: use data.source='folder'"
            ) from error
        except zipfile.BadZipFile as error:
            raise wrong_path(
                path, f"it is not a zip file, or damaged ({error}): copy it again"
            ) from error
        except (struct.error, ValueError, NotImplementedError, EOFError) as error:
            raise _damaged(path, str(error)) from error
        return infos, file.seek(0, os.SEEK_END)


def _damaged(path: str, what: str) -> UsageError:
    return wrong_path(path, f"its zip directory is damaged ({what}): copy it again")


def _common_folders(pictures) -> str:
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

    def first(wrong) -> zipfile.ZipInfo | None:
        return infos[int(np.argmax(wrong))] if wrong.any() else None

    at, nbytes = entries["header_offset"], entries["compress_size"]
    if info := first((at < 0) | (nbytes < 0) | (at > size) | (nbytes > size - at)):
        raise _damaged(path, f"{printable(info.filename)} lies outside the file")
    if info := first(entries["flag_bits"] & _ENCRYPTED):
        raise wrong_path(
            path, f"{printable(info.filename)} is encrypted: pack it without a password"
        )
    if info := first(~np.isin(entries["compress_type"], _METHODS)):
        raise wrong_path(
            path,
            f"{printable(info.filename)} is packed with method {info.compress_type}: pack it with "
            "deflate, or without compression",
        )
    return entries
