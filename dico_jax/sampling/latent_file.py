"""latents.npy beside the images of a folder: rows written in any order, by several processes."""

import contextlib
import pathlib

import numpy as np

from dico_jax.errors import UsageError


def create_latents(path: pathlib.Path, count: int, shape: tuple[int, ...], keep: bool) -> None:
    """Makes a file of zeros, float32 (N, *shape), at least `count` rows; or keeps what is there.

    It takes room on the disk for the rows alone that are written.
    """
    known = None
    with contextlib.suppress(OSError, ValueError):  # of files that a power cut has left
        known = np.load(path, mmap_mode="r") if keep else None
    if known is not None and known.shape[1:] != shape:
        known = None
    rows = count if known is None else max(count, len(known))
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, *shape)}
    with path.open("wb" if known is None else "r+b") as stream:
        np.lib.format.write_array_header_1_0(stream, header)  # as long for any number of rows
        stream.truncate(stream.tell() + 4 * rows * int(np.prod(shape)))


class LatentFile:
    """A file of `create_latents`, for reading and writing."""

    def __init__(self, path: pathlib.Path):
        """Opens the file."""
        self._path, self._rows = path, np.load(path, mmap_mode="r")

    def has(self, index: int) -> bool:
        """Whether a row is there: latents are never zeros alone."""
        return bool(self._rows[index].any())

    def write(self, index: int, row: np.ndarray) -> None:
        """Writes a row; UsageError where the disk has no room."""
        data = np.ascontiguousarray(row, "<f4").tobytes()
        try:
            # No store into the mapped file: where the disk is full that ends the process.
            with self._path.open("r+b") as stream:
                stream.seek(self._rows.offset + index * len(data))
                stream.write(data)
        except OSError as error:
            raise UsageError(f"{self._path} cannot be written: {error.strerror}") from error
