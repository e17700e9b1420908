"""Data out of a pickle that nobody has to trust.

A pickle is a program for a small stack machine. This is Python's own machine (that in Python: the
one in C would allocate 16 GiB for a memo index) with the opcodes that data needs, and no others. A
global must be in `_KNOWN`, which holds values and functions that only look at their arguments;
nothing is imported, looked up or called by a name from the file, and reads are bounded.

A tensor is a call of `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad,
hooks)`, in elements; dtypes without an old storage class use `_rebuild_tensor_v3`, with the dtype
as the seventh argument. A storage is a persistent id. (Facts of files that torch 2.13 wrote.)
"""

import argparse
import collections
import dataclasses
import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.files import Deferred
from dico_jax.pytorch.tensors import DTYPES, Blob, refusing, shown, tensor, values_in

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
MAX_BYTES = 64 << 20  # of a pickle

_MAX_READS = 4_000_000  # a training checkpoint of DiCo-XL takes about 200,000
_MAX_VALUES = 500_000  # likewise
_MAX_TOTAL_FACTOR = 10  # bytes of all tensors over the file's size
_MAX_TOTAL_FREE = 64 << 20  # bytes
_DATA = (str, int, float, type(None), dict, list, tuple, argparse.Namespace, np.dtype)
_OPCODES = (
    "PROTO MARK POP POP_MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST "
    "APPEND APPENDS EMPTY_DICT BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL "
    "INST REDUCE BINPERSID"
)


class PickleBytes(io.BytesIO):
    """The bytes of pickles; reading past their end, or too often, raises ValueError."""

    reads = 0

    def read(self, count: int | None = -1) -> bytes:
        """The next `count` bytes."""
        self.reads += 1
        if self.reads > _MAX_READS:
            raise ValueError(f"it takes more than {_MAX_READS} reads, far more than any checkpoint")
        data = super().read(count)
        if len(data) != count:
            raise ValueError("it ends early")
        return data


@dataclasses.dataclass(frozen=True)
class StorageClass:
    """A storage class; dtype is None where the storage is untyped bytes."""

    dtype: np.dtype | None


@dataclasses.dataclass(frozen=True)
class Storage:
    """Its bytes in the file, and the dtype that its class names."""

    blob: Blob
    dtype: np.dtype | None


def load(stream: PickleBytes, where: str, size: int, storage: Callable[[Any], Storage]) -> Any:
    """The value of the pickle that begins where the stream is, which is left behind it.

    Messages call it `where`. `size` is the file's: its tensors may not be far larger. `storage`
    gives the storage of a persistent id.

    The value is a tree of dict, OrderedDict, list, tuple, argparse.Namespace, str, int, float,
    bool, None, np.dtype (for a torch dtype) and Deferred (for a tensor or parameter). torch.Size
    becomes a tuple; attributes of an OrderedDict are dropped. UsageError: it asks for anything
    else, is malformed, contains itself, or would be far larger than any checkpoint.
    """
    with refusing(where, "is refused"):
        tree = _Unpickler(stream, storage).load()
        total = 0
        for count, value in enumerate(values_in(tree, where)):
            total += value.nbytes if isinstance(value, Deferred) else 0
            if not isinstance(value, (*_DATA, Deferred)):
                name = getattr(value, "__name__", type(value).__name__)
                raise ValueError(f"it holds {name} by itself, which is not data")
            if count > _MAX_VALUES:
                raise ValueError(f"it stands for over {_MAX_VALUES} values, by shared ones")
    # A few bytes of expanded tensors could ask for terabytes.
    if total > _MAX_TOTAL_FACTOR * size + _MAX_TOTAL_FREE:
        what = f"the file is {size} bytes long, and its tensors would be {total} bytes: refused"
        fix = "save views of a few stored numbers with .contiguous()"
        raise UsageError(f"{where}: {what}; {fix}")
    return tree


class _Opcodes(dict):
    def __missing__(self, code: int) -> Any:
        names = {ord(op.code): op.name for op in pickletools.opcodes}
        name = names.get(code, f"0x{code:02x}")
        raise ValueError(f"opcode {name} is none that torch.save writes for weights")


_MACHINE: Any = pickle._Unpickler  # which is not documented, so its attributes have no types


class _Unpickler(_MACHINE):
    """Python's machine, cut down. What is callable on its stack is a function in `_KNOWN`."""

    def __init__(self, stream: PickleBytes, storage: Callable[[Any], Storage]):
        super().__init__(stream)
        self.persistent_load = storage

    def find_class(self, module: str, name: str) -> Any:
        """The value of a global that is known. Dots in a name are not followed."""
        full = f"{module}.{name}"
        if (module, name) not in _KNOWN:
            # A name as Python writes them is given plainly, any other one quoted.
            plain = full.replace(".", "").replace("_", "").isalnum() and len(full) < 100
            raise ValueError(
                f"it asks for {full if plain else shown(full)}, which is not weights; no code of "
                "the file was run. If you trust the file, save its state dict alone with PyTorch"
            )
        return _KNOWN[module, name]

    def load_frame(self) -> None:
        """Frames are a hint for readers of streams."""
        self.read(8)

    def load_setitems(self) -> None:
        """Adds to a dict."""
        self._update(self.pop_mark())

    def load_setitem(self) -> None:
        """Adds an item to a dict."""
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def _update(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Only these: comparing or hashing nested keys could recurse without bound.
            if type(key) not in (str, int, float, bool, type(None)):
                raise ValueError(f"a dict key is a {type(key).__name__}")
            target[key] = value

    def load_build(self) -> None:
        """Sets the attributes of a Namespace."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is collections.OrderedDict and type(state) is dict:
            return  # `_metadata`: versions of PyTorch's modules
        if type(target) is not argparse.Namespace or type(state) is not dict:
            kinds = f"a {type(target).__name__} to a {type(state).__name__}"
            raise ValueError(f"it sets the state of {kinds}")
        for key, value in state.items():
            if type(key) is not str or hasattr(argparse.Namespace, key):
                raise ValueError(f"an argparse.Namespace with attribute {shown(key)}")
            vars(target)[key] = value

    dispatch = _Opcodes(
        {
            getattr(pickle, name)[0]: _MACHINE.dispatch[getattr(pickle, name)[0]]
            for name in _OPCODES.split()
        }
        | {
            pickle.FRAME[0]: load_frame,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.BUILD[0]: load_build,
            # A new object of a class is a call like any other, of a function in `_KNOWN`.
            pickle.NEWOBJ[0]: _MACHINE.dispatch[pickle.REDUCE[0]],
        }
    )


def _tensor_v2(storage: Any, *rest: Any) -> Deferred:
    if type(storage) is not Storage or storage.dtype is None:
        raise ValueError("a tensor of no storage of numbers")
    return _tensor(storage, storage.dtype, *rest)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Deferred:
    if type(storage) is not Storage or not isinstance(dtype, np.dtype):
        raise ValueError("a tensor of no storage, or of no dtype")
    return _tensor(storage, dtype, offset, size, stride, grad, hooks, *rest)


def _tensor(
    storage: Storage, dtype: np.dtype, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any,
    metadata: Any = None,
) -> Deferred:  # fmt: skip
    if hooks:
        raise ValueError("a tensor with hooks")
    if metadata:  # says that the values are to be negated or conjugated after reading
        raise ValueError(f"a tensor with metadata {shown(metadata)}; save it with .clone()")
    return tensor(storage.blob, dtype, size, offset, () if stride is None else stride)


def _parameter(value: Any, grad: Any, hooks: Any) -> Deferred:
    if type(value) is not Deferred or hooks:
        raise ValueError("a parameter of no tensor, or with hooks")
    return value


def _size(counts: Any) -> tuple[int, ...]:
    if type(counts) is not tuple or any(type(v) is not int for v in counts):
        raise ValueError("a torch.Size of no counts")
    return counts


_KNOWN: dict[tuple[str, str], Any] = {
    # Without arguments, and not the classes, whose state could be set.
    ("collections", "OrderedDict"): lambda: collections.OrderedDict(),
    ("argparse", "Namespace"): lambda: argparse.Namespace(),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _size,
    ("torch.storage", "UntypedStorage"): StorageClass(None),
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{("torch", name): StorageClass(DTYPES[dtype]) for name, dtype in STORAGES.items()},
}
