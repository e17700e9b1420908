"""Records of ArrayRecord files in a bucket, each by one request for its bytes.

The library reads files of a disk alone. A file is Riegeli's: chunks of a head (40 bytes) and data,
interrupted by a head (24 bytes) at every multiple of 64 KiB. Those of prepared latents have one
record a chunk, not compressed, then a chunk with the place of each, and a last block of 64 KiB that
says where that chunk begins.
"""

import os
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore

from dico_jax.errors import UsageError, one_line
from dico_jax.files import url_of

_BLOCK, _BLOCK_HEAD = 1 << 16, 24
_HEAD = struct.Struct("<8xQ8xQQ")  # size, kind and number of records, size of the records alone
_WRONG = "it is not as dico_jax.prepare writes it"


class RangedRecords:
    """The records of some files in a row, as ArrayRecordDataSource gives those on a disk."""

    def __init__(self, folder: str, files: Sequence[tuple[str, int]], cache: str, cached: set[str]):
        """Reads where the records are: of every file its last block and its index.

        Args:
          folder: in a bucket.
          files: their names and sizes.
          cache: folder of a disk.
          cached: names of those that lie there, too.
        """
        self._folder, self._names = folder, [name for name, _ in files]
        disk = {"driver": "file", "path": f"{os.path.abspath(cache)}/"}
        stores = [tensorstore.KvStore.open(where).result() for where in (url_of(folder), disk)]
        self._stores = [stores[name in cached] for name in self._names]
        ends = [self._ask(k, size - _BLOCK, size) for k, (_, size) in enumerate(files)]
        starts = [self._index_start(k, end, files[k][1]) for k, end in enumerate(ends)]
        indices = [
            self._ask(k, start, size - _BLOCK)
            for k, (start, (_, size)) in enumerate(zip(starts, files, strict=True))
        ]
        self._bounds = [
            np.append(self._offsets(k, index, start), start)
            for k, (index, start) in enumerate(zip(indices, starts, strict=True))
        ]
        self._first = np.cumsum([0, *(len(bounds) - 1 for bounds in self._bounds)])

    def __len__(self):
        return int(self._first[-1])

    def __getitem__(self, index) -> bytes:
        index = range(len(self))[index]
        file = int(np.searchsorted(self._first, index, "right")) - 1
        start, stop = map(int, self._bounds[file][index - self._first[file] :][:2])
        return self._records(file, self._ask(file, start, stop), start, 1)

    def _ask(self, file: int, start: int, stop: int) -> Any:
        span = slice(start, stop)
        return self._stores[file].read(self._names[file], byte_range=span)

    def _answer(self, file: int, asked: Any) -> bytes:
        try:
            if (found := asked.result()).state == "value":
                return found.value
            reason = "it is gone"
        except ValueError as error:  # TensorStore's
            reason = one_line(error)
        raise self._wrong(file, reason)

    def _wrong(self, file: int, reason: str) -> UsageError:
        fix = "copy it again, or delete it and run the same dico_jax.prepare again"
        return UsageError(f"{self._folder}/{self._names[file]} cannot be read ({reason}): {fix}")

    def _chunk(self, file: int, asked: Any, start: int, count: int) -> tuple[bytes, int]:
        """The data of a chunk of so many records (0: any) at `start`, and their size alone."""
        raw = self._answer(file, asked)
        first = -start % _BLOCK
        parts = [raw[at + _BLOCK_HEAD : at + _BLOCK] for at in range(first, len(raw), _BLOCK)]
        data = b"".join([raw[:first], *parts])
        if len(data) > _HEAD.size:
            size, kind, records = _HEAD.unpack_from(data)
            data = data[_HEAD.size : _HEAD.size + size]
            plain = len(data) == size > 0 and kind & 255 == ord("r") and data[0] == 0
            if plain and count in (0, kind >> 8) and records < size:
                return data, records
        raise self._wrong(file, _WRONG)

    def _records(self, file: int, asked: Any, start: int, count: int) -> bytes:
        data, size = self._chunk(file, asked, start, count)
        return data[len(data) - size :]

    def _index_start(self, file: int, asked: Any, size: int) -> int:
        tag, start = _varints(self._records(file, asked, size - _BLOCK, 3))[:2]
        if tag != 8 or not 0 < start < size - _BLOCK:
            raise self._wrong(file, _WRONG)
        return int(start)

    def _offsets(self, file: int, asked: Any, start: int) -> np.ndarray:
        data, size = self._chunk(file, asked, start, 0)
        options = int(_varints(data[1:])[1])  # after the compression: the size of the sizes, these
        entries = _varints(data[len(data) - size + options :])
        # Messages of three fields: where a chunk begins, the size of its records, their number.
        if len(entries) % 6 or (entries.reshape(-1, 6)[:, [0, 2, 4, 5]] != [8, 16, 24, 1]).any():
            raise self._wrong(file, _WRONG)
        return entries[1::6].astype(np.int64)


def _varints(data: bytes) -> np.ndarray:
    """Numbers of seven bits a byte, the lowest first, the last byte below 128: uint64 (N,)."""
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 128)
    if not len(ends):
        return np.zeros(2, np.uint64)
    raw, starts = raw[: ends[-1] + 1], np.append(0, ends[:-1] + 1)
    place = np.arange(len(raw)) - np.repeat(starts, ends - starts + 1)
    return np.add.reduceat((raw & 127).astype(np.uint64) << (7 * place).astype(np.uint64), starts)
