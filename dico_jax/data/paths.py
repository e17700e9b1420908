"""Local and gs:// paths of data: listing, reading, and errors that name them.

Local files are read directly, everything else through etils.epath.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import IO, NamedTuple

from etils import epath

from dico_jax.data.pictures import BadExample
from dico_jax.errors import UsageError

_REMOTE = ("gs://", "s3://")

# Larger than a file of MAX_PIXELS, even without compression (0.7 GB).
MAX_FILE_BYTES = 1 << 30


class Listing(NamedTuple):
    """The names in a folder, without those that are hidden, in no order.

    Attributes:
      folders: of folders.
      files: of files.
      others: of what is neither: broken links, sockets, devices.
    """

    folders: list[str]
    files: list[str]
    others: list[str]


def is_remote(path: str) -> bool:
    """Whether a path is in a bucket."""
    return path.startswith(_REMOTE)


def required_path(path: str | None, what: str) -> str:
    """`data.path`, with "~" expanded.

    Raises:
      UsageError: it is not set; `what` says what to give.
    """
    if not path:
        raise UsageError(f"data.path is not set: give {what}")
    if "://" in path and not is_remote(path):
        raise UsageError(f"data.path={path}: only local and gs:// paths can be read")
    return os.path.expanduser(path)


def require_local(path: str, what: str) -> None:
    """Raises UsageError for a path in a bucket, where `what` cannot be read."""
    if is_remote(path):
        raise UsageError(
            f"data.path={path}: {what} cannot be read in a bucket: copy them to a local disk, or "
            "mount the bucket (gcsfuse)"
        )


def is_hidden(name: str) -> bool:
    """Whether a name is one that file managers and archivers leave behind, or starts with a dot."""
    return name in ("Thumbs.db", "desktop.ini", "__MACOSX") or (
        name.startswith(".") and name not in (".", "..")
    )


def list_folder(path: str) -> Listing:
    """What is in a folder.

    Raises:
      OSError: it cannot be listed.
    """
    listing = _list_remote(path) if is_remote(path) else _list_local(path)
    return Listing(*([name for name in names if not is_hidden(name)] for names in listing))


def _list_local(path: str) -> Listing:
    listing = Listing([], [], [])
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_file():  # known from the listing, but for links
                listing.files.append(entry.name)
            elif entry.is_dir():
                listing.folders.append(entry.name)
            else:
                listing.others.append(entry.name)
    return listing


def _list_remote(path: str) -> Listing:
    def fail(error: OSError) -> None:
        raise error

    # The first step of a walk tells files and folders apart in one request.
    for _, folders, files in epath.Path(path).walk(on_error=fail):
        # A bucket may have an empty object in the place of a folder.
        return Listing([name.rstrip("/") for name in folders], [f for f in files if f], [])
    return Listing([], [], [])


def open_file(path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """A file to read bytes from, in a with statement.

    Raises:
      OSError: it cannot be opened.
    """
    return epath.Path(path).open("rb") if is_remote(path) else open(path, "rb")


def read_picture_file(path: str) -> bytes:
    """The content of the file of an example.

    Raises:
      BadExample: this one file is gone, may not be read, or is too large for a picture.
      OSError: the disk or the network fails.
    """
    try:
        with open_file(path) as file:
            file.seek(0, os.SEEK_END)
            if file.tell() > MAX_FILE_BYTES:
                raise BadExample(f"the file is larger than {MAX_FILE_BYTES} bytes")
            file.seek(0)
            return file.read()  # with a limit here, Python would allocate as much
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise BadExample(f"{type(error).__name__}: {error.strerror or error}") from error


@contextlib.contextmanager
def path_errors(path: str) -> Iterator[None]:
    """Turns what opening or listing `data.path` may raise into a UsageError that names it."""
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"data.path={path}: {_where(error, path)} does not exist") from error
    except PermissionError as error:
        raise UsageError(
            f"data.path={path}: no permission to read {_where(error, path)}"
        ) from error
    except NotADirectoryError as error:
        raise UsageError(f"data.path={path}: {_where(error, path)} is not a folder") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"data.path={path} cannot be read: {reason}") from error
    except ImportError as error:
        if not is_remote(path):
            raise
        raise UsageError(
            f"data.path={path}: gs:// needs gcsfs: pip install 'dico_jax[gcs]'"
        ) from error
    except Exception as error:  # of the client libraries of buckets, of many classes
        if not is_remote(path):
            raise
        reason = " ".join(str(error).split())
        raise UsageError(
            f"data.path={path} cannot be read: {type(error).__name__}: {reason}"
        ) from error


def _where(error: OSError, path: str) -> str:
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else path
    return "it" if name == path else name
