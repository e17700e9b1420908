"""Data out of a pickle that nobody has to trust.

A pickle is a program for a small stack machine. This is Python's own machine (that in Python: the
one in C would allocate 16 GiB for a memo index) with the opcodes that data needs, and no others. A
global is a value or function in `_KNOWN`, which only looks at its arguments, or else `Inert`: what
it makes, whatever that is, is a name. Nothing is imported, looked up or called by a name from the
file, and reads are bounded.

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
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.files import Deferred
from dico_jax.pytorch.tensors import DTYPES, refusing, shown, tensor, values_in

# The class of a storage names the dtype of its numbers.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
}
MAX_BYTES = 64 << 20  # of a pickle

_MAX_READS = 1_500_000  # a training checkpoint of DiCo-XL takes about 200,000
_MAX_VALUES = 500_000  # likewise
_MAX_TOTAL_FACTOR = 10  # bytes of all tensors over the file's size
_MAX_TOTAL_FREE = 64 << 20  # bytes
_MAX_NUMBER_KEYS = 10_000  # of dicts; numbers can be chosen so that all take the same place
_MAX_NUMBER = 8  # bytes
_OPCODES = (
    "PROTO MARK POP POP_MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES "
    "BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT BINPUT LONG_BINPUT "
    "MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID APPEND APPENDS"
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


@dataclasses.dataclass(eq=False)
class Inert:
    """Stands for an object of no interest: it has what was set of it, and does nothing."""

    name: str  # of the global that it would be, or be made by
    state: dict = dataclasses.field(default_factory=dict)

    def append(self, item: Any) -> None:
        """Adds nothing."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage, or a class of them without bytes; dtype is None for untyped bytes."""

    dtype: np.dtype | None
    blob: Any = None  # a Blob


def load(stream: PickleBytes, where: str, size: int, storage: Callable[[Any], Storage]) -> Any:
    """The value of the pickle that begins where the stream is, which is left behind it.

    Messages call it `where`. `size` is the file's: its tensors may not be far larger. `storage`
    gives the storage of a persistent id.

    The value is a tree of dict, OrderedDict, list, tuple, argparse.Namespace, str, bytes, int,
    float, bool, None, np.dtype (also for a torch dtype) and Deferred (for a tensor or parameter),
    with `Inert` for all else. torch.Size becomes a tuple, a set a list, a NumPy scalar a number;
    attributes of tensors are dropped. UsageError: it is malformed, contains itself, or would be far
    larger than any checkpoint.
    """
    with refusing(where, "is refused"):
        tree = _Unpickler(stream, storage).load()
        total = 0
        for count, value in enumerate(values_in(tree, where)):
            total += value.nbytes if isinstance(value, Deferred) else 0
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
        name = {ord(op.code): op.name for op in pickletools.opcodes}.get(code, f"0x{code:02x}")
        raise ValueError(f"opcode {name} is none that torch.save writes for weights")


_MACHINE: Any = pickle._Unpickler  # which is not documented, so its attributes have no types


class _Unpickler(_MACHINE):
    """Python's machine, cut down. What is callable on its stack is a function in `_KNOWN`."""

    def __init__(self, stream: PickleBytes, storage: Callable[[Any], Storage]):
        super().__init__(stream, encoding="utf-8", errors="surrogateescape")
        self._storage, self._number_keys = storage, 0

    def persistent_load(self, pid: Any) -> Any:
        """The storage of an id; one of an unknown class is as inert as that."""
        if type(pid) is tuple and len(pid) > 1 and type(pid[1]) is Inert:
            return pid[1]
        return self._storage(pid)

    def find_class(self, module: str, name: str) -> Any:
        """The value of a global that is known. Dots in a name are not followed."""
        return _KNOWN.get((module, name), Inert(f"{module[:100]}.{name[:100]}"))

    def load_frame(self) -> None:
        """Frames are a hint for readers of streams."""
        self.read(8)

    def load_reduce(self) -> None:
        """Calls a known function."""
        arguments, function = self.stack.pop(), self.stack[-1]
        if type(function) is Inert:
            made = _NUMBERS.get(function.name, lambda *_: None)(*arguments[:2])
            self.stack[-1] = Inert(function.name) if made is None else made
        else:
            self.stack[-1] = function(*arguments[:10])  # a large tuple may be given many times

    def load_newobj_ex(self) -> None:
        """Makes an object, with arguments by name."""
        self.stack.pop()
        self.load_reduce()

    def load_setitem(self) -> None:
        """Adds an item to a dict."""
        self.load_setitems([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self, pairs: list[Any] | None = None) -> None:
        """Adds to a dict."""
        pairs = self.pop_mark() if pairs is None else pairs
        target = self.stack[-1]
        target = target.state if type(target) is Inert else target
        if not isinstance(target, dict):
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str and key is not None:
                self._number_keys += 1
                if self._number_keys > _MAX_NUMBER_KEYS:
                    raise ValueError(f"it has over {_MAX_NUMBER_KEYS} keys that are no strings")
                # Comparing or hashing nested keys could recurse without bound.
                key = key if isinstance(key, int | float) else Inert("a key")
            target[key] = value

    def load_build(self) -> None:
        """Takes the attributes of what has some of interest."""
        state, target = self.stack.pop(), self.stack[-1]
        kinds = (Inert, argparse.Namespace, collections.OrderedDict)
        if type(state) is dict and type(target) in kinds:
            # By reference: a large one could be set again and again.
            setattr(target, "state" if type(target) is Inert else "__dict__", state)

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
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_reduce,
            pickle.NEWOBJ_EX[0]: load_newobj_ex,
            # What takes the place of another: lists of sets, bytes of a bytearray.
            pickle.EMPTY_SET[0]: _MACHINE.dispatch[pickle.EMPTY_LIST[0]],
            pickle.ADDITEMS[0]: _MACHINE.dispatch[pickle.APPENDS[0]],
            pickle.FROZENSET[0]: _MACHINE.dispatch[pickle.LIST[0]],
            pickle.BYTEARRAY8[0]: _MACHINE.dispatch[pickle.BINBYTES8[0]],
        }
    )


def _tensor_v2(storage: Any, *rest: Any) -> Deferred | Inert:
    return _tensor(storage, getattr(storage, "dtype", None), *rest)


def _tensor_v3(storage: Any, *rest: Any) -> Deferred | Inert:
    return _tensor(storage, rest[5], *rest[:5], *rest[6:])


def _tensor(
    storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, grad: Any = None,
    hooks: Any = None, metadata: Any = None,
) -> Deferred | Inert:  # fmt: skip
    if metadata:  # says that the values are to be negated or conjugated after reading
        return Inert(f"tensor with metadata {shown(metadata)} (save it with .clone())")
    if type(storage) is Inert or type(dtype) is Inert:  # complex or quantized numbers
        return storage if type(storage) is Inert else dtype
    if type(storage) is not Storage or not storage.blob or not isinstance(dtype, np.dtype):
        raise ValueError("a tensor of no storage of numbers, or of no dtype")
    return tensor(storage.blob, dtype, size, offset, () if stride is None else stride)


def _first(value: Any, *attributes: Any) -> Any:
    """A parameter is its tensor, and a torch.Size its tuple."""
    return value


def _of_type(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor of a class of its own, or with attributes, is that tensor."""
    known = rebuild in (_tensor_v2, _tensor_v3, _first)
    return rebuild(*arguments) if known else Inert(getattr(rebuild, "name", "a tensor"))


def _encoded(text: Any = None, *_: Any) -> bytes | None:
    """Bytes, as protocol 2 has them; few are all that a number needs."""
    short = type(text) is str and len(text) <= _MAX_NUMBER
    return text.encode("latin-1", "replace") if short else None


def _numpy_dtype(code: Any = None, *_: Any) -> np.dtype | None:
    known = type(code) is str and re.fullmatch("[fiu][248]|[iub]1", code)
    return np.dtype(code) if known else None


def _numpy_scalar(dtype: Any = None, data: Any = None) -> Any:
    """The number of NumPy's that a file holds, as Python's."""
    right = isinstance(dtype, np.dtype) and type(data) is bytes and len(data) == dtype.itemsize
    return np.frombuffer(data, dtype)[0].item() if right else None


# What makes numbers of NumPy, by its name; None for others, which stay inert.
_NUMBERS: dict[str, Callable] = {"_codecs.encode": _encoded, "numpy.dtype": _numpy_dtype}
_NUMBERS |= {f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")}
_KNOWN: dict[tuple[str, str], Any] = {
    # Without arguments, and not the classes, whose state could be set.
    ("collections", "OrderedDict"): lambda: collections.OrderedDict(),
    ("argparse", "Namespace"): lambda: argparse.Namespace(),
    ("types", "SimpleNamespace"): lambda: argparse.Namespace(),
    ("torch._utils", "_rebuild_tensor"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Size"): _first,
    ("torch.storage", "UntypedStorage"): Storage(None),
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    **{("torch", name): Storage(DTYPES[dtype]) for name, dtype in STORAGES.items()},
}
