"""Data out of a pickle that nobody has to trust.

A pickle is a program for a small stack machine. `load` is that machine with the instructions that
build data, and nothing else: a global that the caller has not listed is refused by its name when
the pickle mentions it, and "calling" a listed one means that the caller's own function looks at the
arguments. Nothing is imported, looked up or called by a name from the file.

`pickle.Unpickler` with a `find_class` is not enough for files from the internet: its BUILD sets
attributes on whatever find_class returned, and six bytes (a memo index) make it allocate 16 GiB.

Format facts: the documentation of Python's `pickle` and the opcode descriptions of `pickletools`.
The opcodes are those that picklers of protocols 2 to 5 write for containers, numbers and strings;
torch.save writes protocol 2.
"""

import argparse
import collections
import dataclasses
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from dico_jax.errors import UsageError
from dico_jax.pytorch.tensor_refs import shown
from dico_jax.pytorch.tree_limits import check_tree

_MAX_BYTES = 64 << 20
_MAX_STEPS = 2_000_000  # a training checkpoint of DiCo-XL takes about 125,000
_MAX_INT_BYTES = 32

Call = Callable[[tuple], object]


class RefusedError(Exception):
    """Raised by a caller's function whose arguments make no sense; becomes a UsageError."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A listed global that is a value: mentioning it gives `value`."""

    value: object


@dataclasses.dataclass(frozen=True)
class _Global:
    """A listed global that can be called, as it lies on the stack."""

    name: str
    call: Call


def load(
    data: bytes,
    where: str,
    known: Mapping[tuple[str, str], Call | Constant],
    persistent: Call,
    leaves: tuple[type, ...] = (),
) -> object:
    """The value that pickle `data` builds.

    Args:
      data: the pickle.
      where: what messages call it, with its file.
      known: the globals that may be mentioned besides collections.OrderedDict and
        argparse.Namespace, by (module, name): a value, or a function of the tuple of arguments.
      persistent: gives the value of a persistent id (a tuple).
      leaves: types that `known` and `persistent` give and the result may hold, besides str, int,
        float, bool and None.

    Returns:
      A tree of dict, OrderedDict, list, tuple, Namespace and leaves. Shared values stay shared.
      Attributes of an OrderedDict (`_metadata` of a state dict) are dropped.

    Raises:
      UsageError: the pickle mentions another global, is malformed, contains itself, or would be far
        larger in memory than any checkpoint.
    """
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{where} is {len(data)} bytes long; at most {_MAX_BYTES} are read")
    machine = _Machine(data, where, known, persistent)
    try:
        value = machine.run()
    except RefusedError as error:
        raise UsageError(f"{where}: {error}") from None
    check_tree(value, where, leaves)
    return value


class _Machine:
    """The stack machine: one method per opcode, named in `_OPCODES` at the module's end."""

    def __init__(self, data: bytes, where: str, known: Mapping, persistent: Call):
        self.data = data
        self.where = where
        self.persistent = persistent
        self.known = {
            ("collections", "OrderedDict"): _new_ordered_dict,
            ("argparse", "Namespace"): _new_namespace,
            **known,
        }
        self.at = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        """Executes the opcodes up to STOP."""
        for _ in range(_MAX_STEPS):
            code = self.take(1)[0]
            if code == ord("."):
                value = self.pop()
                if self.stack or self.below or self.at != len(self.data):
                    self.malformed("something is left over at its end")
                return value
            step = _OPCODES.get(code)
            if step is None:
                raise RefusedError(
                    f"opcode {_opcode_name(code)} at byte {self.at - 1} is {_REFUSED}"
                )
            step(self)
        raise RefusedError(f"it takes more than {_MAX_STEPS} steps, far more than any checkpoint")

    def malformed(self, what: str) -> NoReturn:
        """Refuses a pickle that no pickler writes."""
        raise RefusedError(f"it is cut short or damaged at byte {self.at}: {what}")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            self.malformed("it ends early")
        return self.data[start : self.at]

    def number(self, layout: str) -> Any:
        """The next number, in a layout of `struct`."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, length: int) -> str:
        """The next `length` bytes as a string."""
        try:
            return self.take(length).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            self.malformed("a string is not UTF-8")

    def line(self) -> str:
        """The bytes up to the next newline as a string."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            self.malformed("it ends early")
        text = self.text(end - self.at)
        self.at += 1
        return text

    def push(self, value: object) -> None:
        """Puts a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Takes the last value from the stack."""
        if not self.stack:
            self.malformed("a value is missing on the stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Takes the values above the last mark."""
        if not self.below:
            self.malformed("a mark is missing on the stack")
        values, self.stack = self.stack, self.below.pop()
        return values

    def top(self, kind: type, what: str) -> Any:
        """The last value on the stack, which must be of type `kind` exactly."""
        if not self.stack:
            self.malformed("a value is missing on the stack")
        if type(self.stack[-1]) is not kind:
            raise RefusedError(f"{what} {_kind(self.stack[-1])}, which is refused")
        return self.stack[-1]

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def drop(self) -> None:
        self.pop()

    def frame(self) -> None:
        self.number("<Q")  # frames are a hint for readers of streams

    def protocol(self) -> None:
        version = self.take(1)[0]
        if not 2 <= version <= 5:
            raise RefusedError(f"pickle protocol {version} is not one of 2 to 5; save it again")

    def integer(self) -> None:
        raw = self.take(self.take(1)[0])
        if len(raw) > _MAX_INT_BYTES:
            raise RefusedError(f"an integer of {len(raw)} bytes is refused")
        self.push(int.from_bytes(raw, "little", signed=True))

    def big_integer(self) -> None:
        raise RefusedError(f"an integer of {self.number('<I')} bytes is refused")

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append(self) -> None:
        value = self.pop()
        self.top(list, "it appends to").append(value)

    def appends(self) -> None:
        values = self.pop_to_mark()
        self.top(list, "it appends to").extend(values)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.update([key, value])

    def set_items(self) -> None:
        self.update(self.pop_to_mark())

    def update(self, pairs: list[Any]) -> None:
        """Adds [key, value, key, value, ...] to the dict on top of the stack."""
        if self.stack and type(self.stack[-1]) is collections.OrderedDict:
            target = self.stack[-1]
        else:
            target = self.top(dict, "it sets items of")
        if len(pairs) % 2:
            self.malformed("a key has no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Only these: comparing or hashing nested keys could recurse without bound.
            if type(key) not in (str, int, float, bool, type(None)):
                raise RefusedError(f"a dict key is {_kind(key)}, which is refused")
            target[key] = value

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1] if self.stack else self.pop()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            self.malformed(f"nothing is remembered as {index}")
        self.push(self.memo[index])

    def global_by_line(self) -> None:
        module = self.line()
        self.find(module, self.line())

    def global_by_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            self.malformed("a global's name is not a string")
        self.find(module, name)

    def instance(self) -> None:
        self.global_by_line()
        raise RefusedError("opcode INST is refused; torch.save does not write it")

    def extension(self) -> None:
        raise RefusedError("a global of the extension registry (EXT1, EXT2, EXT4) is refused")

    def find(self, module: str, name: str) -> None:
        """Pushes a listed global. The pair must match: dots in a name are not followed."""
        found = self.known.get((module, name))
        full = f"{module}.{name}"
        if found is None:
            # A name as Python writes them is given plainly, any other one quoted.
            plain = full.replace(".", "").replace("_", "").isalnum() and len(full) < 100
            raise RefusedError(
                f"it asks for {full if plain else shown(full)}, which is not weights and is "
                "refused; no code of the file was run. If you trust the file, save its state dict "
                "alone with PyTorch"
            )
        self.push(found.value if isinstance(found, Constant) else _Global(full, found))

    def call(self, args: object) -> None:
        target = self.pop()
        if type(target) is not _Global:
            raise RefusedError(f"it calls {_kind(target)}, which is refused")
        if type(args) is not tuple:
            raise RefusedError(f"it calls {target.name} with {_kind(args)} for arguments, refused")
        try:
            self.push(target.call(args))
        except RefusedError as error:
            raise RefusedError(
                f"it calls {target.name} with arguments that are refused: {error}"
            ) from None

    def reduce(self) -> None:
        self.call(self.pop())

    def new_object(self) -> None:
        args = self.pop()
        if self.stack and getattr(self.stack[-1], "call", None) is not _new_namespace:
            raise RefusedError(
                f"it makes a new object of {_kind(self.stack[-1])}, which is refused"
            )
        self.call(args)

    def build(self) -> None:
        state = self.pop()
        if self.stack and type(self.stack[-1]) is collections.OrderedDict:
            if type(state) is not dict:
                raise RefusedError(
                    f"the state of an OrderedDict is {_kind(state)}, which is refused"
                )
            return  # `_metadata`: versions of PyTorch's modules
        target = self.top(argparse.Namespace, "it sets the state of")
        if type(state) is not dict or not all(type(k) is str for k in state):
            raise RefusedError(
                f"the state of an argparse.Namespace is {_kind(state)}, which is refused"
            )
        for key, value in state.items():
            if hasattr(argparse.Namespace, key):  # would replace a method or the class
                raise RefusedError(f"an argparse.Namespace with attribute {shown(key)} is refused")
            vars(target)[key] = value

    def persistent_id(self) -> None:
        pid = self.pop()
        if type(pid) is not tuple:
            raise RefusedError(f"a persistent id is {_kind(pid)}, which is refused")
        self.push(self.persistent(pid))


def _new_ordered_dict(args: tuple) -> object:
    if args:
        raise RefusedError(f"{len(args)} of them, none expected")
    return collections.OrderedDict()


def _new_namespace(args: tuple) -> object:
    if args:
        raise RefusedError(f"{len(args)} of them, none expected")
    return argparse.Namespace()


def _kind(value: object) -> str:
    """What a value on the stack is, for messages."""
    return value.name if isinstance(value, _Global) else f"a {type(value).__name__}"


_REFUSED = "refused; torch.save does not write it for weights"


def _opcode_name(code: int) -> str:
    names = {op.code: op.name for op in pickletools.opcodes}
    return names.get(chr(code), f"0x{code:02x}")


_OPCODES: dict[int, Callable[[_Machine], object]] = {
    ord(code): step
    for code, step in {
        "\x80": _Machine.protocol,
        "\x95": _Machine.frame,
        "(": _Machine.mark,
        "0": _Machine.drop,
        "1": _Machine.pop_to_mark,
        # Numbers and strings.
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "K": lambda m: m.push(m.number("<B")),
        "M": lambda m: m.push(m.number("<H")),
        "J": lambda m: m.push(m.number("<i")),
        "\x8a": _Machine.integer,
        "\x8b": _Machine.big_integer,
        "G": lambda m: m.push(m.number(">d")),
        "\x8c": lambda m: m.push(m.text(m.number("<B"))),
        "X": lambda m: m.push(m.text(m.number("<I"))),
        "\x8d": lambda m: m.push(m.text(m.number("<Q"))),
        # Containers.
        ")": lambda m: m.push(()),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "t": lambda m: m.push(tuple(m.pop_to_mark())),
        "]": lambda m: m.push([]),
        "a": _Machine.append,
        "e": _Machine.appends,
        "}": lambda m: m.push({}),
        "s": _Machine.set_item,
        "u": _Machine.set_items,
        # The memo.
        "q": lambda m: m.remember(m.number("<B")),
        "r": lambda m: m.remember(m.number("<I")),
        "\x94": lambda m: m.remember(len(m.memo)),
        "h": lambda m: m.recall(m.number("<B")),
        "j": lambda m: m.recall(m.number("<I")),
        # Globals and what is made with them.
        "c": _Machine.global_by_line,
        "\x93": _Machine.global_by_stack,
        "i": _Machine.instance,
        "\x82": _Machine.extension,
        "\x83": _Machine.extension,
        "\x84": _Machine.extension,
        "R": _Machine.reduce,
        "\x81": _Machine.new_object,
        "b": _Machine.build,
        "Q": _Machine.persistent_id,
    }.items()
}
