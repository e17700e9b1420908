"""Pictures in a folder with one subfolder per class."""

import concurrent.futures
from collections.abc import Iterator

from dico_jax.data.class_files import ClassFiles, is_picture_name, no_picture_reason, printable
from dico_jax.data.paths import (
    Listing,
    list_folder,
    path_errors,
    read_picture_file,
    required_path,
)
from dico_jax.errors import UsageError

# Folders that are listed at once; what takes time is a bucket or a network disk.
_LISTERS = 16


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
            if not top.folders:
                raise _no_classes(path, top)
            with concurrent.futures.ThreadPoolExecutor(_LISTERS) as pool:
                folders = [_join(path, name) for name in top.folders]
                listings = dict(zip(top.folders, pool.map(list_folder, folders), strict=True))
            skipped = {
                printable(name): "it lies beside the class folders"
                for name in sorted(top.files)
                if is_picture_name(name)
            }
            files = {}
            for name in sorted(listings):
                files[name] = _pictures(path, name, listings[name], skipped)
        super().__init__(path, files, skipped)

    def _read(self, index, class_name, file_name):
        return read_picture_file(_join(self.path, class_name, file_name))


def _join(*parts: str) -> str:
    return "/".join([parts[0].rstrip("/") or "/", *parts[1:]])


def _pictures(path: str, class_name: str, listing: Listing, skipped: dict[str, str]) -> list[str]:
    """The pictures of a class; notes other files."""
    for name in sorted(listing.folders):
        inside = next(_pictures_below(_join(path, class_name), name), None)
        if inside is not None:
            raise _nested(path, class_name, inside)
    pictures = list(filter(is_picture_name, listing.files))
    if len(pictures) < len(listing.files):
        for name in sorted(set(listing.files) - set(pictures)):
            skipped[printable(f"{class_name}/{name}")] = no_picture_reason(name)
    for name in sorted(listing.others):
        if is_picture_name(name):
            skipped[printable(f"{class_name}/{name}")] = "it is not a file, or a broken link"
    return pictures


def _pictures_below(folder: str, name: str) -> Iterator[str]:
    """Names, from `folder` on, of the pictures in its subfolder `name` and deeper."""
    listing = list_folder(_join(folder, name))
    for file in sorted(filter(is_picture_name, listing.files)):
        yield f"{name}/{file}"
    for subfolder in sorted(listing.folders):
        yield from _pictures_below(folder, f"{name}/{subfolder}")


def _no_classes(path: str, top: Listing) -> UsageError:
    pictures = sum(map(is_picture_name, top.files))
    if not pictures:
        return UsageError(
            f"data.path={path}: there are no folders in it: give a folder with one subfolder of "
            "pictures per class"
        )
    return UsageError(
        f"data.path={path}: {pictures} pictures lie in it, but no folders: put them into one "
        "subfolder per class (one is enough)"
    )


def _nested(path: str, class_name: str, inside: str) -> UsageError:
    return UsageError(
        f"data.path={path}: pictures lie deeper than CLASS/FILE ("
        f"{printable(f'{class_name}/{inside}')}): if {printable(class_name)} is not a class but "
        f"holds the classes, give data.path={printable(_join(path, class_name))}"
    )
