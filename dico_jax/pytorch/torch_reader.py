"""What is in a .pt or .pth file of PyTorch, without PyTorch and without running its code.

Format facts, from PyTorch's notes on serialization semantics and from files that torch 2.13 wrote:
torch.save writes a zip file of one folder. `data.pkl` in it is the object as a protocol-2 pickle.
A tensor there is a call of `torch._utils._rebuild_tensor_v2(storage, offset, size, stride,
requires_grad, hooks)`, counted in elements; dtypes without an old storage class use
`_rebuild_tensor_v3`, with the dtype as the seventh argument. A storage is the persistent id
("storage", storage class, key, device, number of elements), and its bytes are the entry `data/KEY`.
`byteorder` says "little" or "big" (older files have no such entry and are little-endian).
A CRC-32 of 0 means that the file was written without checksums.
"""

import argparse
import dataclasses
from collections.abc import Iterator

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.pytorch import restricted_pickle
from dico_jax.pytorch.restricted_pickle import Constant, RefusedError
from dico_jax.pytorch.tensor_refs import (
    DTYPES,
    Blob,
    FileBytes,
    TensorRef,
    check_total,
    refuse_placeholder,
    shown,
    tensor_ref,
)
from dico_jax.pytorch.zip_directory import ZipEntry, check_stored, read_directory

# The class of a storage names the dtype of its numbers.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_MAX_PICKLE = 64 << 20  # bytes
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # before torch 1.6


@dataclasses.dataclass(frozen=True)
class StorageClass:
    """A storage class; dtype is None where the storage is untyped bytes."""

    dtype: np.dtype | None


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage: its bytes in the file, and the dtype that its class names."""

    blob: Blob
    dtype: np.dtype | None


def read_tree(file: FileBytes) -> object:
    """The object in .pt file `file`, with a TensorRef for each tensor.

    Returns:
      A tree of dict, OrderedDict, list, tuple, argparse.Namespace, str, int, float, bool, None,
      np.dtype (for a torch dtype) and TensorRef. torch.Size becomes a tuple, a parameter becomes
      its tensor.

    Raises:
      UsageError: it is not such a file, it is damaged, or it holds anything else.
    """
    _check_kind(file)
    entries = read_directory(file)
    root = _root(file, entries)
    check_stored(file, entries)
    blobs = {
        name[len(root) :]: Blob(file, name, e.start, e.nbytes, e.crc or None)
        for name, e in entries.items()
        if name.startswith(root)
    }
    _check_byte_order(file, blobs)
    data = _small(blobs["data.pkl"], _MAX_PICKLE)
    rebuild = Rebuild(blobs)
    where = f"{file.name}: the pickle"
    leaves = (TensorRef, np.dtype)
    tree = restricted_pickle.load(data, where, rebuild.known(), rebuild.storage, leaves)
    check_total(file, sum(ref.nbytes for ref in tensors_in(tree)))
    return tree


def tensors_in(tree: object) -> Iterator[TensorRef]:
    """The TensorRefs of a tree, in its order."""
    if isinstance(tree, TensorRef):
        yield tree
    elif isinstance(tree, argparse.Namespace):
        yield from tensors_in(vars(tree))
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


def _check_kind(file: FileBytes) -> None:
    """Names the usual files that are something else than a zip file."""
    start = file.read(0, min(file.size, 512))
    name = file.name
    if start.startswith(b"PK\3\4"):
        return
    if start.startswith(_LEGACY_START):
        raise UsageError(
            f"{name} is a legacy (non-zip) PyTorch file; re-save it with PyTorch: torch.save("
            "torch.load(old, map_location='cpu'), new, _use_new_zipfile_serialization=True)"
        )
    if start[257:262] == b"ustar":
        raise UsageError(
            f"{name} is a legacy (tar) PyTorch file; re-save it with PyTorch: torch.save("
            "torch.load(old, map_location='cpu'), new, _use_new_zipfile_serialization=True)"
        )
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.size:
        raise UsageError(f"{name} holds safetensors, not a PyTorch zip; rename it to .safetensors")
    refuse_placeholder(file)
    raise UsageError(
        f"{name} is not a zip file as torch.save writes it (it starts with {shown(start[:8])}); "
        "convert it with PyTorch, or download it again"
    )


def _root(file: FileBytes, entries: dict[str, ZipEntry]) -> str:
    """The one folder of the zip file, with its slash."""
    roots = [
        n[: -len("data.pkl")] for n in entries if n.endswith("/data.pkl") and n.count("/") == 1
    ]
    if any(n.endswith("/constants.pkl") and n.count("/") == 1 for n in entries):
        raise UsageError(
            f"{file.name} is a TorchScript archive (it has constants.pkl); save its weights with "
            "PyTorch: torch.save(torch.jit.load(old).state_dict(), new)"
        )
    if len(roots) != 1:
        hold = "several data.pkl" if roots else "no FOLDER/data.pkl"
        what = ", ".join(shown(n, 40) for n in list(entries)[:3])
        raise UsageError(
            f"{file.name} is a zip file with {hold}, so torch.save did not write it (it has {what})"
        )
    return roots[0]


def _small(blob: Blob, limit: int) -> bytes:
    """All bytes of a small entry."""
    if blob.nbytes > limit:
        raise UsageError(
            f"{blob.file.name}: {shown(blob.name)} is {blob.nbytes} bytes long; at most {limit}"
        )
    data = bytearray(blob.nbytes)
    blob.read_into(0, memoryview(data), report=False)
    return bytes(data)


def _check_byte_order(file: FileBytes, blobs: dict[str, Blob]) -> None:
    if "byteorder" not in blobs:
        return
    order = _small(blobs["byteorder"], 16)
    if order != b"little":
        raise UsageError(
            f"{file.name} has byte order {shown(order)}, only b'little' is read; save it again on "
            "a little-endian machine"
        )


class Rebuild:
    """The functions that a .pt file's pickle calls, as far as this reader knows them."""

    def __init__(self, blobs: dict[str, Blob]):
        self.blobs = blobs

    def known(self) -> dict[tuple[str, str], restricted_pickle.Call | Constant]:
        """The globals that are accepted, for `restricted_pickle.load`."""
        known: dict[tuple[str, str], restricted_pickle.Call | Constant] = {
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self.tensor_v3,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            ("torch", "Size"): self.size,
            ("torch.storage", "UntypedStorage"): Constant(StorageClass(None)),
        }
        for name, dtype in DTYPES.items():
            known["torch", name] = Constant(dtype)
        for name, dtype_name in STORAGES.items():
            known["torch", name] = Constant(StorageClass(DTYPES[dtype_name]))
        return known

    def storage(self, pid: tuple) -> Storage:
        """The storage of a persistent id."""
        kinds = [type(p) for p in pid]
        if kinds != [str, StorageClass, str, str, int] or pid[0] != "storage" or pid[4] < 0:
            raise RefusedError(f"a persistent id {shown(pid)} is refused, it is not a storage's")
        _, cls, key, _, count = pid
        blob = self.blobs.get(f"data/{key}")
        if blob is None or not key.isascii() or not key.isdecimal():
            raise RefusedError(f"the storage {shown(key)} has no entry in the file; save it again")
        if blob.nbytes != count * (cls.dtype.itemsize if cls.dtype else 1):
            raise RefusedError(
                f"the storage {shown(key)} of {count} elements does not match its {blob.nbytes} "
                "bytes in the file"
            )
        return Storage(blob, cls.dtype)

    def tensor_v2(self, args: tuple) -> TensorRef:
        """Of typed storage: (storage, offset, size, stride, requires_grad, hooks[, metadata])."""
        if not 6 <= len(args) <= 7 or type(args[0]) is not Storage or args[0].dtype is None:
            raise RefusedError(f"{len(args)} of them, or no storage of numbers first")
        return self._tensor(args[0].blob, args[0].dtype, args[1:4], args[4:6], args[6:])

    def tensor_v3(self, args: tuple) -> TensorRef:
        """Of untyped storage, with the dtype as the seventh argument."""
        if not 7 <= len(args) <= 8 or type(args[0]) is not Storage:
            raise RefusedError(f"{len(args)} of them, or no storage first")
        if not isinstance(args[6], np.dtype):
            raise RefusedError("the seventh is no dtype")
        return self._tensor(args[0].blob, args[6], args[1:4], args[4:6], args[7:])

    def _tensor(
        self, blob: Blob, dtype: np.dtype, place: tuple, flags: tuple, metadata: tuple
    ) -> TensorRef:
        if type(flags[0]) is not bool or flags[1]:
            raise RefusedError("a tensor with hooks")
        # Says that the values are to be negated or conjugated after reading.
        if metadata and metadata[0]:
            raise RefusedError(
                f"a tensor with metadata {shown(metadata[0])}; save it with .clone()"
            )
        offset, shape, strides = place
        return tensor_ref(blob, dtype, shape, offset, strides if strides is not None else ())

    def parameter(self, args: tuple) -> TensorRef:
        """A parameter is its tensor: (tensor, requires_grad, hooks)."""
        if len(args) != 3 or type(args[0]) is not TensorRef or args[2]:
            raise RefusedError(f"{len(args)} of them, or no tensor first")
        return args[0]

    def size(self, args: tuple) -> tuple[int, ...]:
        """A torch.Size is the tuple of its counts."""
        if len(args) != 1 or type(args[0]) is not tuple or any(type(v) is not int for v in args[0]):
            raise RefusedError("no tuple of counts")
        return args[0]
