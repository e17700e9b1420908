"""What is in a .pt or .pth file of PyTorch, without PyTorch and without running its code.

Format facts, from PyTorch's notes on serialization semantics and from files that torch 2.13 wrote:
torch.save writes a zip file of one folder, entries uncompressed. `data.pkl` in it is the object as
a pickle (see `dico_jax.pytorch.pickles`). A storage there is the persistent id ("storage", storage
class, key, device, number of elements), and its bytes are the entry `data/KEY`. `byteorder` says
"little" or "big" (older files have no such entry and are little-endian). A CRC-32 of 0 means that
the file was written without checksums.

Before version 1.6 (as the public Inception weights are): five pickles, one after the other: a magic
number, the version 1001, a dict with `little_endian`, the object, and the list of the keys of its
storages. Then the storages in the order of that list, each as its number of elements (int64) and
its numbers. The persistent id has a sixth part, a view, which is None.
"""

import struct
import zipfile
from typing import Any

from dico_jax.errors import UsageError
from dico_jax.pytorch import pickles
from dico_jax.pytorch.pickles import Storage, StorageClass
from dico_jax.pytorch.tensors import AGAIN, Blob, InputFile, refusing, shown

_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the pickled magic number
_LEGACY_VERSION = 1001
_MAX_LEGACY = 8 << 20  # bytes of all five pickles; a network of 500 tensors has 0.1 million
_COUNT_BYTES = 8  # bytes of a number of elements
_MAX_ENTRIES = 100_000
_MAX_DIRECTORY = 16 << 20  # bytes


def read_tree(file: InputFile) -> Any:
    """The object in .pt file `file`, with a Deferred for each tensor.

    Returns:
      A tree as `pickles.load` makes it.

    Raises:
      UsageError: it is not such a file, it is damaged, or it holds anything else.
    """
    start = file.read(0, min(file.size, 512))
    if start.startswith(_LEGACY):
        return _legacy_tree(file)
    if not start.startswith(b"PK\3\4"):
        _refuse_other(file, start)
    with refusing(file.name):
        blobs = _entries(file)
    root = _root(file, list(blobs))
    if f"{root}byteorder" in blobs:
        order = blobs[f"{root}byteorder"].read_small(16)
        if order != b"little":
            raise UsageError(
                f"{file.name} has byte order {shown(order)}, only b'little' is read; save it again "
                "on a little-endian machine"
            )

    def storage(pid: Any) -> Storage:
        dtype, key, count = _declared(pid)
        blob = blobs.get(f"{root}data/{key}")
        if blob is None:
            raise ValueError(f"the storage {shown(key)} has no entry in the file")
        if blob.nbytes != count * (dtype.itemsize if dtype else 1):
            raise ValueError(
                f"the storage {shown(key)} of {count} elements does not match its {blob.nbytes} "
                "bytes in the file"
            )
        return Storage(blob, dtype)

    stream = pickles.PickleBytes(blobs[f"{root}data.pkl"].read_small(pickles.MAX_BYTES))
    return pickles.load(stream, f"{file.name}: its pickle", file.size, storage)


def _declared(pid: Any) -> tuple[Any, str, int]:
    """(dtype or None, key, number of elements) of the storage that a persistent id names."""
    kind, cls, key, _, count = pid
    types = type(cls), type(key), type(count)
    if kind != "storage" or types != (StorageClass, str, int) or count < 0:
        raise ValueError(f"a persistent id {shown(pid)} is not a storage's")
    return cls.dtype, key, count


def _refuse_other(file: InputFile, start: bytes) -> None:
    """Names the usual files that are something else than torch.save's."""
    if start[257:262] == b"ustar":
        raise UsageError(
            f"{file.name} is a legacy (tar) PyTorch file; re-save it with PyTorch: torch.save("
            "torch.load(old, map_location='cpu'), new, _use_new_zipfile_serialization=True)"
        )
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.size:
        raise UsageError(
            f"{file.name} holds safetensors, not a PyTorch zip; rename it to .safetensors"
        )
    file.refuse_placeholder()
    raise UsageError(
        f"{file.name} is not a zip file as torch.save writes it (it starts with "
        f"{shown(start[:8])}); convert it with PyTorch, or download it again"
    )


def _entries(file: InputFile) -> dict[str, Blob]:
    """The entries of a zip file by name.

    What torch.save never writes is refused: compressed entries (so that none can grow when it is
    read), entries that share bytes or names, anything before, after or in place of the directory.
    """
    _check_end(file)
    blobs: dict[str, Blob] = {}
    with zipfile.ZipFile(file.stream) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if len(entries) > _MAX_ENTRIES:
            raise ValueError(f"it declares {len(entries)} zip entries; at most {_MAX_ENTRIES}")
        end = 0
        for entry in entries:
            name = entry.filename
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError(
                    f"zip entry {shown(name)} is compressed, which torch.save never does; pack it "
                    "again without compression (zip -0)"
                )
            if name in blobs:
                raise ValueError(f"there are two zip entries named {shown(name)}")
            if entry.header_offset < end or (not blobs and entry.header_offset):
                raise ValueError(f"zip entry {shown(name)} overlaps what is before it")
            with archive.open(entry):  # compares the two headers
                pass
            local = file.read(entry.header_offset, 30)
            start = entry.header_offset + 30 + sum(struct.unpack("<2H", local[26:]))
            blobs[name] = Blob(file, name, start, entry.file_size, entry.CRC or None)
            end = start + entry.file_size
        if end > archive.start_dir:
            raise ValueError("its last zip entry reaches past its end")
    return blobs


def _check_end(file: InputFile) -> None:
    """Checks the records at a zip file's end: zipfile would search for them, and read any size."""
    tail = file.read(max(0, file.size - 98), min(98, file.size)).rjust(98, b"\0")
    zip64, locator, end = tail[:56], tail[56:76], tail[76:]
    if end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise ValueError("there is no zip directory at its end")
    size = int.from_bytes(end[12:16], "little")
    if locator[:4] == b"PK\6\7":
        if zip64[:4] != b"PK\6\6":
            raise ValueError("its Zip64 end record is not one")
        size = int.from_bytes(zip64[40:48], "little")
    if size > _MAX_DIRECTORY:
        raise ValueError(f"its zip directory is {size} bytes long; at most {_MAX_DIRECTORY}")


def _root(file: InputFile, names: list[str]) -> str:
    """The one folder of the zip file, with its slash."""
    roots = [n[: -len("data.pkl")] for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
    if any(n.endswith("/constants.pkl") and n.count("/") == 1 for n in names):
        raise UsageError(
            f"{file.name} is a TorchScript archive (it has constants.pkl); save its weights with "
            "PyTorch: torch.save(torch.jit.load(old).state_dict(), new)"
        )
    if len(roots) != 1:
        hold = "several data.pkl" if roots else "no FOLDER/data.pkl"
        what = ", ".join(shown(n, 40) for n in names[:3])
        raise UsageError(
            f"{file.name} is a zip file with {hold}, so torch.save did not write it (it has {what})"
        )
    return roots[0]


# Files of before version 1.6.


def _legacy_tree(file: InputFile) -> Any:
    stream = pickles.PickleBytes(file.read(0, min(file.size, _MAX_LEGACY)))
    stream.seek(len(_LEGACY))
    storages: dict[str, Storage] = {}
    counts: dict[str, int] = {}

    def storage(pid: Any) -> Storage:
        dtype, key, count = _declared(pid[:5])
        if pid[5:] != (None,) or dtype is None or counts.setdefault(key, count) != count:
            raise ValueError(f"a persistent id {shown(pid)} of a view, without a dtype or size")
        blob = Blob(file, f"storage {key}", 0, count * dtype.itemsize)  # placed afterwards
        found = storages.setdefault(key, Storage(blob, dtype))
        if found.dtype != dtype:
            raise ValueError(f"the storage {shown(key)} is declared with two dtypes")
        return found

    def no_storage(pid: Any) -> Storage:
        raise ValueError(f"a persistent id {shown(pid)} where none belongs")

    def following(what: str, of_storage: Any = no_storage) -> Any:
        return pickles.load(stream, f"{file.name}: {what}", file.size, of_storage)

    version, system = following("the version"), following("the system")
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise UsageError(f"{file.name} is of version {shown(version)} of the format before 1.6")
    if system.get("little_endian") is not True:
        raise UsageError(f"{file.name} is not of a little-endian machine; save it again on one")
    tree, keys = following("the pickle", storage), following("the list of storages")
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise UsageError(f"{file.name} is damaged: its list of storages is not of those it uses")
    at = stream.tell()
    for key in keys:
        count = int.from_bytes(file.read(at, _COUNT_BYTES), "little")
        if count != counts.get(key):
            raise UsageError(f"{file.name} is damaged: the size of storage {shown(key)}; {AGAIN}")
        blob = storages[key].blob
        blob.start = at + _COUNT_BYTES
        at = blob.start + blob.nbytes
    if at != file.size:
        raise UsageError(
            f"{file.name} is {file.size} bytes long, and its storages end at byte {at}; {AGAIN}"
        )
    return tree
