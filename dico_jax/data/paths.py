"""Local and gs:// paths of data: listing, reading, and errors that name them."""

import contextlib
import os
from collections.abc import Iterable, Iterator

from dico_jax.config import expanded
from dico_jax.data.pictures import BadExample, picture_suffixes
from dico_jax.errors import UsageError, one_line
from dico_jax.files import as_path, is_remote, opened

# Larger than a file of MAX_PIXELS, even without compression (0.7 GB).
MAX_FILE_BYTES = 1 << 30
MAX_CLASSES = 100_000

_LEFT_BEHIND = {"thumbs.db", "desktop.ini", "__macosx", "lost+found", "@eadir"}


def wrong_path(path: str, what: str) -> UsageError:
    """The error about `data.path`, with the fix."""
    return UsageError(f"data.path={path}: {what}")


def required_path(path: str | None, what: str, *, local: str = "") -> str:
    """`data.path`, which is to be `what`, and `local` if buckets cannot have it; "~" expanded."""
    if not path:
        raise UsageError(f"data.path is not set: give {what}")
    if "://" in path and not is_remote(path):
        raise wrong_path(path, "only local and gs:// paths can be read")
    if local and is_remote(path):
        fix = "copy them to a local disk, or mount the bucket (gcsfuse)"
        raise wrong_path(path, f"{local} cannot be read in a bucket: {fix}")
    return expanded("data.path", "data.path", path)


def is_hidden(name: str) -> bool:
    """Whether a name is one that file managers and archivers leave behind, or starts with a dot."""
    return name.lower() in _LEFT_BEHIND or (name[:1] == "." and name not in (".", ".."))


def picture_names(names: Iterable[str]) -> list[str]:
    """Those with the suffix of a picture."""
    suffixes = picture_suffixes()
    return [name for name in names if name[name.rfind(".") :].lower() in suffixes]


def list_folder(path: str) -> tuple[list[str], list[str], list[str]]:
    """Folders, files and others (broken links, pipes) in a folder, but hidden ones; or OSError."""
    found: tuple[list[str], list[str], list[str]] = ([], [], [])
    if is_remote(path):
        # The first step of a walk tells files and folders apart in one request.
        for _, folders, files in as_path(path).walk(on_error=_fail):
            # A bucket may have an empty object in the place of a folder.
            found = [name.rstrip("/") for name in folders], list(filter(None, files)), []
            break
    else:
        folders, files, others = found
        with os.scandir(path) as entries:
            for entry in entries:  # which knows what it is, but for links
                if entry.is_file():
                    files.append(entry.name)
                else:
                    (folders if entry.is_dir() else others).append(entry.name)
    folders, files, others = ([n for n in names if not is_hidden(n)] for names in found)
    return folders, files, others


def _fail(error: OSError) -> None:
    raise error


def read_file(path: str) -> bytes:
    """The content of a file; BadExample if it is gone, may not be read or is too large."""
    try:
        with opened(path) as file:
            if file.seek(0, os.SEEK_END) > MAX_FILE_BYTES:
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
    except Exception as error:  # the client libraries of buckets have errors of many classes
        if isinstance(error, UsageError) or not (isinstance(error, OSError) or is_remote(path)):
            raise
        fix = ": pip install gcsfs" if isinstance(error, ImportError) else ""
        raise wrong_path(path, f"{type(error).__name__}: {one_line(error)}{fix}") from error
