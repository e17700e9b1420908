"""Files that must not be read: each gives one line that names it, and none runs code."""

import argparse
import builtins
import collections
import datetime
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from dico_jax.errors import UsageError
from dico_jax.pytorch import pickles
from dico_jax.pytorch.tensors import values_in
from dico_jax.pytorch.torch_files import open_tensors, select_weights, write_pt, write_safetensors
from tests.pytorch_files import (
    HOOKS,
    REBUILD,
    dict_of,
    flat,
    number,
    numbers,
    pickled,
    storage,
    tensor,
    text,
    tuple_of,
    zip_pt,
)

RAW = np.arange(6, dtype=np.float32).tobytes()


class Ran(BaseException):
    """Raised where code from a file would run; no handler of Exception swallows it."""


@pytest.fixture(autouse=True)
def traps(monkeypatch):
    """Makes the usual ways to run code from a pickle fail the test."""

    def trap(*args, **kwargs):
        raise Ran(f"code ran: {args}")

    monkeypatch.setattr(os, "system", trap)
    monkeypatch.setattr(os, "popen", trap)
    monkeypatch.setattr(builtins, "eval", trap)
    # Pickles must not even be able to import something.
    monkeypatch.setitem(sys.modules, "this_module_is_a_trap", None)


def read_all(path):
    with open_tensors(path) as file:
        values = flat(file.tree)
        select_weights(file)
        return values


def refusal(path, *parts):
    """The message of the UsageError that reading all of `path` gives."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(UsageError) as caught:
            read_all(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    for part in (os.path.basename(path), *parts):
        assert part in message
    assert "\n" not in message
    assert len(message) < 600
    assert peak < 500 << 20
    assert time.process_time() - start < 20
    return message


def refused_pickle(tmp_path, body, *parts, storages=(RAW,)):
    data = body if body.startswith(b"\x80") else pickled(body)
    return refusal(zip_pt(tmp_path / "evil.pt", data, storages), *parts)


# Pickles that would run code.


class Payload:
    """Pickled as a call of whatever it is given."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class OwnClass:
    """A class of another module than the accepted ones."""


CALLS = {
    "posix.system": (os.system, ("exit 3",)),
    "eval": (eval, ("1 + 1",)),
    "exec": (exec, ("import os",)),
    "getattr": (getattr, (1, "real")),
    "__import__": (__import__, ("this_module_is_a_trap",)),
    "OwnClass": (OwnClass, ()),
    "_reconstruct": (np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b")),
    "frombuffer": (np.frombuffer, (b"12345678",)),
    "open": (open, ("/etc/passwd",)),
}


def inert(tmp_path, body):
    """The tree of a pickle with such a value, in which nothing is a function."""
    data = body if body.startswith(b"\x80") else pickled(body)
    with open_tensors(zip_pt(tmp_path / "evil.pt", data, (RAW,))) as file:
        for value in values_in(file.tree):
            assert not callable(value)
        return file.tree


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", CALLS)
def test_calls_of_other_functions(tmp_path, monkeypatch, name, protocol):
    monkeypatch.undo()  # to pickle the real functions
    tree = {"model": {"a.w": Payload(*CALLS[name])}}
    data = pickle.dumps(tree, protocol)
    with pytest.MonkeyPatch.context() as again:
        again.setattr(os, "system", lambda *_: pytest.fail("code ran"))
        message = refused_pickle(tmp_path, data, name)
        assert "no code of the file was run" in message
        tree = pickle.dumps({"args": [Payload(*CALLS[name])]}, protocol)
        assert name in inert(tmp_path, tree)["args"][0].name


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "posix system",
        "nt system",
        "subprocess Popen",
        "builtins eval",
        "__builtin__ eval",
        "builtins getattr",
        "builtins __import__",
        "operator attrgetter",
        "functools partial",
        "importlib import_module",
        "torch.hub load",
        "torch.jit._serialization load",
        "torch.nn.modules.linear Linear",
        "torch.storage _load_from_bytes",
        "torch device",
        "torch load",
        "torch ComplexFloatStorage",
        "_codecs encode",
        "pathlib PosixPath",
        "collections defaultdict",
        "collections Counter",
        "argparse Action",
        "dico_jax.errors UsageError",
        "this_module_is_a_trap anything",
        "copyreg _reconstructor",
        "pickle loads",
    ],
)
def test_other_globals_are_inert(tmp_path, name):
    module, attribute = name.split()
    full = f"{module}.{attribute}"
    plain = f"c{module}\n{attribute}\n".encode()
    by_stack = text(module) + text(attribute) + b"\x93"
    for body in (
        plain + tuple_of(text("touch owned")) + b"R",
        plain,  # mentioned, not called
        plain + b"0N",  # mentioned and dropped
        by_stack + tuple_of(text("touch owned")) + b"R",
        b"](" + text("a") + plain + b"e",
        dict_of(args=plain + b")\x81" + dict_of(a=b"N") + b"b" + dict_of(a=plain) + b"b"),
        dict_of(args=plain + b")\x81" + text("a") + plain + b"s" + plain + b"a"),
        tuple_of(text("storage"), plain, text("0"), text("cpu"), number(6)) + b"Q",
        REBUILD + tuple_of(plain + b")R", number(0), numbers((2, 3)), numbers((3, 1))) + b"R",
    ):
        inert(tmp_path, body)
        refused_pickle(tmp_path, body)
    refused_pickle(
        tmp_path, b"}" + text("a.w") + plain + b")Rs", full, "no code of the file was run"
    )
    for body in (plain + b"Q", f"i{module}\n{attribute}\n".encode()):
        refused_pickle(tmp_path, body, "is refused")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "_utils._rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_tensor_v2.__class__"),
        ("collections", "OrderedDict.fromkeys"),
        ("argparse", "Namespace.__init__.__globals__"),
        ("collections", "abc.Callable"),
        ("torch.storage", "UntypedStorage.from_file"),
        ("torch._utils ", "_rebuild_tensor_v2"),
        ("collections", "__builtins__"),
        ("", "eval"),
        ("os\nx", "system"),
        ("o" * 5000, "s"),
        ("collections", "\udc80"),
    ],
)
def test_names_with_dots_and_oddities(tmp_path, module, name):
    def raw(value):
        value = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(value)) + value

    data = b"\x80\x04}" + raw("a.w") + raw(module) + raw(name) + b"\x93)Rs."
    refused_pickle(tmp_path, data, "is not weights")


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_extension_registry(tmp_path, code):
    refused_pickle(tmp_path, code + b")R", "opcode EXT")


# Pickles that misuse what is accepted.

GOOD = (storage("0", 6), number(0), numbers((2, 3)), numbers((3, 1)), b"\x89", HOOKS)


def without(index, *instead):
    return REBUILD + tuple_of(*GOOD[:index], *instead, *GOOD[index + 1 :]) + b"R"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (REBUILD + b")R", "is refused"),
        (REBUILD + b"NR", "is refused"),
        (REBUILD + b"]R", "is refused"),
        (without(0, b"N"), "no storage"),
        (without(0, text("x")), "no storage"),
        (without(0, storage("0", 24, "UntypedStorage", "torch.storage")), "no storage"),
        (without(1, number(-1)), "offset"),
        (without(1, b"\x88"), "offset"),
        (without(1, b"G" + bytes(8)), "offset"),
        (without(1, number(1)), "past its storage"),
        (without(1, number(1 << 61)), "past its storage"),
        (without(1, number(1 << 70)), "offset"),
        (without(2, numbers((3, 3))), "past its storage"),
        (without(2, numbers((-2, 3))), "shape"),
        (without(2, numbers((2, 3, 1))), "strides"),
        (without(2, numbers([1] * 33)), "shape"),
        (without(2, b"N"), "shape"),
        (without(2, b"](K\x02K\x03e"), "shape"),
        (without(2, numbers((0, 1 << 40, 1 << 40))), "strides"),
        (without(2, b"(K\x02Nt"), "shape"),
        (without(3, numbers((-3, 1))), "strides"),
        (without(3, numbers((1 << 40, 1))), "past its storage"),
        (without(3, numbers((1 << 61, 1))), "past its storage"),
        (without(3, text("ab")), "strides"),
        (without(6, dict_of(conj=b"\x88")), "metadata"),
        (without(6, b"}", b"N"), "is refused"),
        (b"ctorch._utils\n_rebuild_tensor_v3\n" + tuple_of(*GOOD, b"N") + b"R", "no dtype"),
        (b"ctorch._utils\n_rebuild_tensor_v3\n" + tuple_of(*GOOD) + b"R", "is refused"),
        (
            b"ctorch._utils\n_rebuild_parameter\n" + tuple_of(b"N", b"\x88", HOOKS) + b"R",
            "NoneType",
        ),
        (b"ctorch\nSize\n" + tuple_of(tuple_of(b"N")) + b"R", "holds tuple"),
        (b"ctorch\nSize\n)\x81", "is refused"),
        (b"ctorch\nFloatStorage\n)R", "is refused"),
        (b"ctorch\nfloat32\n)R", "is refused"),
        (b"ccollections\nOrderedDict\n](]K\x01aK\x02ae\x85R", "is refused"),
        (b"cargparse\nNamespace\n(K\x01tR", "is refused"),
        (b"cargparse\nNamespace\nN\x81", "is refused"),
        (b"N)R", "is refused"),
        (text("os.system") + tuple_of(text("x")) + b"R", "is refused"),
        (REBUILD + b"}b", "holds function"),
        (REBUILD + dict_of(__code__=b"N") + b"b", "holds function"),
        (b"cargparse\nNamespace\n" + dict_of(a=b"N") + b"b", "holds function"),
        (tensor((2, 3)) + dict_of(shape=b"N") + b"b", "holds Deferred"),
        (b"}" + dict_of(a=b"N") + b"b", "no tensors by name"),
        (b"]" + dict_of(a=b"N") + b"b", "holds list"),
        (HOOKS + tuple_of(b"}", dict_of(a=b"N")) + b"b", "no tensors by name"),
        (
            b"cargparse\nNamespace\n)\x81" + tuple_of(b"N", dict_of(a=b"N")) + b"b",
            "holds Namespace",
        ),
        (b"cargparse\nNamespace\n)\x81" + dict_of(__class__=b"N") + b"b", "holds Namespace"),
        (b"cargparse\nNamespace\n)\x81" + dict_of(_get_kwargs=b"N") + b"b", "holds Namespace"),
        (b"cargparse\nNamespace\n)\x81}K\x01NsbN0", "holds Namespace"),
        (b"}]K\x01s", "no tensors by name"),
        (b"})K\x01s", "no tensors by name"),
        (b"}" + tensor((2, 3)) + b"Ns", "no tensors by name"),
        (b"NK\x01a", "is refused"),
        (b")K\x01a", "is refused"),
        (b"N(K\x01K\x02u", "items of a NoneType"),
        (b"}(K\x01u", "is refused"),
        (REBUILD, "holds function"),
        (storage("0", 6), "holds Storage"),
        (b"]ctorch\nFloatStorage\na", "holds list"),
    ],
)
def test_misuse_of_what_is_accepted(tmp_path, body, part):
    refused_pickle(tmp_path, body, part)


@pytest.mark.parametrize(
    ("pid", "part"),
    [
        (b"N", "is refused"),
        (text("0"), "is refused"),
        (b")", "is refused"),
        (
            tuple_of(text("storage"), text("FloatStorage"), text("0"), text("cpu"), number(6)),
            "not a",
        ),
        (
            tuple_of(text("module"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), number(6)),
            "",
        ),
        (
            tuple_of(text("storage"), b"ctorch\nfloat32\n", text("0"), text("cpu"), number(6)),
            "not a",
        ),
        (
            tuple_of(text("storage"), b"ctorch\nFloatStorage\n", number(0), text("c"), number(6)),
            "not",
        ),
        (
            tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), b"\x88"),
            "not",
        ),
        (
            tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("c"), number(-1)),
            "not",
        ),
        (tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("c")), "not"),
        (storage("7", 6)[:-1], "'7' has no entry"),
        (storage("../data/0", 6)[:-1], "no entry"),
        (storage("../byteorder", 6)[:-1], "no entry"),
        (storage("0/", 6)[:-1], "no entry"),
        (storage("0", 7)[:-1], "does not match"),
        (storage("0", 5)[:-1], "does not match"),
        (storage("0", 6, "DoubleStorage")[:-1], "does not match"),
        (storage("0", 6, "UntypedStorage", "torch.storage")[:-1], "does not match"),
        (storage("0", 1 << 62)[:-1], "does not match"),
    ],
)
def test_persistent_ids(tmp_path, pid, part):
    refused_pickle(tmp_path, pid + b"Q", part)


def test_a_storage_is_looked_up_in_the_file_alone(tmp_path):
    for key in ("../1", "/etc/passwd", "²", "", "1_0"):
        more = {"archive/data/": RAW, "etc/passwd": RAW, "archive/1": RAW}
        path = zip_pt(tmp_path / "x.pt", pickled(tensor((6,), f"{key}x")), more=more)
        refusal(path, "no entry")


# Pickles that would fill the memory or the stack, or that are broken.


def doubling(levels, opener, closer):
    """A container that holds the one before twice, `levels` times: a hundred bytes for 2^levels."""
    step = b"0" + opener + b"h\x00h\x00" + closer + b"q\x00"
    return b"K\x01q\x00" + step * levels


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (doubling(40, b"(", b"t"), "shared ones"),
        (doubling(40, b"](", b"e"), "shared ones"),
        (doubling(10_000, b"](", b"e"), "64 levels"),
        (b"]q\x00h\x00a", "contains itself"),
        (b"}q\x00" + text("a") + b"h\x00s", "contains itself"),
        (b"]q\x00(" + b"h\x00" * 1000 + b"e", "contains itself"),
        (b"N" + b"\x85" * 100_000, "64 levels"),
        (b"]" * 100_000 + b"a" * 99_999, "64 levels"),
        (b"](" * 100_000 + b"e" * 100_000, "64 levels"),
        (b"(" * 100_000, "is refused"),
        (b"\x8b\xff\xff\xff\x7f", "opcode LONG4"),
        (b"X\xff\xff\xff\xff", "ends early"),
        (b"\x8d" + b"\xff" * 8, "is refused"),
        (b"\x8d\x00\x00\x00\x00\x01\x00\x00\x00abc", "ends early"),
        (b"X\x01\x00\x00\x00\xff", "is refused"),
        (b"Nr\xff\xff\xff\x7f0", "is refused"),
        (b"h\x05", "is refused"),
        (b"j\xff\xff\xff\xff", "is refused"),
        (b"", "is refused"),
        (b"q\x00N", "is refused"),
        (b"t", "is refused"),
        (b"\x80\x02N", "ends early"),
        (b"\x80\x06N.", "is refused"),
        (b"cos", "is refused"),
        (b"\xff", "opcode 0xff"),
        (b"I1\n", "opcode INT"),
        (b"L1L\n", "opcode LONG"),
        (b"F1\n", "opcode FLOAT"),
        (b"S'a'\n", "opcode STRING"),
        (b"Va\n", "opcode UNICODE"),
        (b"U\x01a", "holds str"),
        (b"C\x01a", "holds bytes"),
        (b"\x8e" + b"\xff" * 8, "is refused"),
        (b"\x96" + b"\xff" * 8, "is refused"),
        (b"\x97", "opcode NEXT_BUFFER"),
        (b"P0\n", "opcode PERSID"),
        (b"(N)o", "opcode OBJ"),
        (b"N2\x86", "opcode DUP"),
        (b"\x8f", "holds list"),
        (b"N)}\x92", "is refused"),
        (b"(l", "opcode LIST"),
        (b"p0\n", "opcode PUT"),
    ],
)
def test_bombs_and_broken_pickles(tmp_path, body, part):
    data = body if body.startswith(b"\x80") else pickled(body)
    refused_pickle(tmp_path, data, part)


@pytest.mark.parametrize("limit", [2000, pytest.param(1_500_000, marks=pytest.mark.slow)])
def test_a_pickle_of_too_many_steps(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(pickles, "_MAX_READS", limit)
    refused_pickle(tmp_path, pickled(b"]\x94" * (limit * 3 // 4)), f"more than {limit} reads")


def test_a_memo_index_takes_no_memory(tmp_path):
    """pickle.Unpickler allocates 16 GiB for these few bytes."""
    path = zip_pt(tmp_path / "x.pt", pickled(b"Nr\xff\xff\xff\x3f"))
    tracemalloc.start()
    with open_tensors(path) as file:
        assert file.tree is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_tensors_that_expand_a_few_numbers(tmp_path):
    refused_pickle(tmp_path, tensor((1 << 45,), count=6, strides=(0,)), ".contiguous()")
    many = b"](" + tensor((6000, 6), count=6, strides=(0, 1)) + b"q\x07"
    refused_pickle(tmp_path, many + b"h\x07" * 10_000 + b"e", ".contiguous()")


def test_a_pickle_of_more_than_64_mib(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", pickled(text("a" * (64 << 20))))
    refusal(path, "at most 67108864")


# Zip files that are wrong.


@pytest.fixture
def good(tmp_path):
    """A small valid .pt file of two tensors."""
    path = tmp_path / "good.pt"
    write_pt(path, {"a": np.arange(100, dtype=np.float32), "b": np.ones((3, 4), np.int64)})
    return path


def test_truncations(good):
    data = good.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        good.write_bytes(data[:length])
        refusal(good)


def test_appended_bytes(good):
    good.write_bytes(good.read_bytes() + b"more")
    refusal(good, "end")


def test_prepended_bytes(good):
    good.write_bytes(b"PK\3\4more" + good.read_bytes())
    refusal(good)


def test_compressed_entries(tmp_path):
    bomb = bytes(200 << 20)
    path = zip_pt(
        tmp_path / "x.pt",
        pickled(tensor((len(bomb) // 4,))),
        [bomb],
        compression=zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 1 << 20
    del bomb
    refusal(path, "compressed")


def patched(path, old, new):
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new))


def entry_field(path, name, offset, layout, value):
    """Overwrites a field of the central header of `name`."""
    data = bytearray(path.read_bytes())
    at = data.rfind(b"archive/" + name.encode()) - 46
    assert data[at : at + 4] == b"PK\1\2"
    struct.pack_into(layout, data, at + offset, value)
    path.write_bytes(data)


@pytest.mark.parametrize("size", [1 << 20, 0xFFFFFFFE, 0xFFFFFFFF, 401])
def test_sizes_beyond_the_file(good, size):
    entry_field(good, "data/0", 20, "<L", size)
    entry_field(good, "data/0", 24, "<L", size)
    refusal(good)


def test_size_that_only_the_expansion_has(good):
    entry_field(good, "data/0", 24, "<L", 1 << 30)
    refusal(good, "compressed")


def test_encrypted_entry(good):
    entry_field(good, "data/0", 8, "<H", 1)
    refusal(good, "encrypted")


def test_overlapping_entries(tmp_path):
    """Two entries of the directory for the same bytes, under two names that both headers have.

    Python 3.13 says it itself, in other words.
    """
    path = zip_pt(tmp_path / "x.pt", pickled(tensor((6,), "1")), [RAW, RAW])
    data = bytearray(path.read_bytes())
    first = data.find(b"archive/data/0") - 30
    entry_field(path, "data/1", 42, "<L", first)
    refusal(path, "verlap")
    # An entry whose data reach over the next entry.
    path = zip_pt(tmp_path / "y.pt", pickled(tensor((6,), "0")), [RAW, RAW])
    entry_field(path, "data/0", 20, "<L", 60)
    entry_field(path, "data/0", 24, "<L", 60)
    refusal(path, "verlap")


def test_repeated_names(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.warns(UserWarning, match="Duplicate"):
        zip_pt(path, pickled(b"N"), more={"archive/byteorder": b"little"})
    refusal(path, "two zip entries named 'archive/byteorder'")


def test_two_directories_in_one_file(good):
    data = good.read_bytes()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as z:
        z.writestr("archive/data.pkl", pickled(b"cos\nsystem\n"))
    good.write_bytes(data + other.getvalue())
    refusal(good)


def test_a_directory_of_too_many_entries(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as z:
        for i in range(20_001):
            z.writestr(f"a/{i}", b"")
    refusal(path, "20001 zip entries")


def test_damaged_numbers_are_noticed(good):
    data = bytearray(good.read_bytes())
    data[data.find(np.arange(1, 9, dtype=np.float32).tobytes())] ^= 1
    good.write_bytes(data)
    refusal(good, "checksum of 'archive/data/0'")
    with open_tensors(good) as file:  # the other tensor is whole
        assert file.tensors["b"].read().sum() == 12


def test_damaged_numbers_are_noticed_by_a_view_of_others(tmp_path):
    base = np.arange(50_000, dtype=np.float32)
    path = zip_pt(tmp_path / "x.pt", pickled(tensor((2,), count=50_000)), [base.tobytes()])
    data = bytearray(path.read_bytes())
    data[data.find(base[-10:].tobytes())] ^= 1
    path.write_bytes(data)
    refusal(path, "checksum")


def test_checksum_0_is_none(good):
    """So torch.save writes files where checksums are switched off."""
    data = bytearray(good.read_bytes())
    data[data.find(np.arange(1, 9, dtype=np.float32).tobytes())] ^= 1
    good.write_bytes(data)
    entry_field(good, "data/0", 16, "<L", 0)
    with open_tensors(good) as file:
        assert file.tensors["a"].read().shape == (100,)


def test_file_that_shrinks_while_it_is_open(tmp_path):
    path = tmp_path / "x.pt"
    write_pt(path, {"a": np.ones(100), "b": np.ones(100_000)})
    with open_tensors(path) as file:
        os.truncate(path, path.stat().st_size - 700_000)
        assert file.tensors["a"].read().size == 100
        with pytest.raises(UsageError, match=r"x\.pt is cut short"):
            file.tensors["b"].read()


# Files of another kind.


def test_missing_file_folder_and_pipe(tmp_path):
    refusal(tmp_path / "none.pt", "No such file")
    (tmp_path / "folder.pt").mkdir()
    refusal(tmp_path / "folder.pt", "folder")
    os.mkfifo(tmp_path / "pipe.pt")
    refusal(tmp_path / "pipe.pt", "device")
    with pytest.raises(UsageError, match="cannot be opened"):
        open_tensors("nul\0.pt")


def tar_bytes():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("sys_info"))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "it ends early"),
        (tar_bytes(), "re-save it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"\x1f\x8b\x08\x00abc", "is not a zip file"),
        (pickle.dumps({"a": 1}), "is not a zip file"),
        (b"PK\5\6" + bytes(18), "is not a zip file"),
        (b"PK\3\4" + bytes(500), "no zip directory"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "pth", "PT", "bin", "ckpt", ""])
def test_other_kinds(tmp_path, content, part, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    refusal(path, part)


def test_torchscript_and_other_zip_files(tmp_path):
    path = zip_pt(tmp_path / "x.pt", pickled(b"N"), more={"archive/constants.pkl": pickled(b")")})
    refusal(path, "TorchScript")
    np.savez(tmp_path / "y.npz", a=np.ones(3))
    os.rename(tmp_path / "y.npz", tmp_path / "y.pt")
    refusal(tmp_path / "y.pt", "torch.save did not write it", "'a.npy'")
    path = zip_pt(tmp_path / "z.pt", pickled(b"N"), more={"other/data.pkl": pickled(b"N")})
    refusal(path, "several data.pkl")


def test_big_endian_file(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", pickled(b"N"))
        z.writestr("archive/byteorder", b"big")
    refusal(path, "byte order b'big'")


def test_suffixes_that_lie(tmp_path):
    write_pt(tmp_path / "a.pt", {"a": np.ones(3)})
    write_safetensors(tmp_path / "b.safetensors", {"a": np.ones(3)})
    for path in ("a.pt", "b.safetensors"):
        os.link(tmp_path / path, tmp_path / "blob")  # no suffix: the content decides
        with open_tensors(tmp_path / "blob") as file:
            assert list(file.tensors) == ["a"]
        os.unlink(tmp_path / "blob")
    os.rename(tmp_path / "a.pt", tmp_path / "c.safetensors")
    os.rename(tmp_path / "b.safetensors", tmp_path / "d.pt")
    refusal(tmp_path / "c.safetensors", "PyTorch zip", ".pt")
    refusal(tmp_path / "d.pt", "holds safetensors", ".safetensors")


# Safetensors.


def raw_safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ({"a": entry(offsets=(0, 9))}, "is damaged"),
        ({"a": entry(offsets=(4, 12))}, "is damaged"),
        ({"a": entry(offsets=(8, 0))}, "is damaged"),
        ({"a": entry(offsets=(-8, 0))}, "is damaged"),
        ({"a": entry(offsets=(0, 1 << 70))}, "is damaged"),
        ({"a": entry(offsets=(0, True))}, "is damaged"),
        ({"a": entry(offsets=(0, 4.0))}, "is damaged"),
        ({"a": entry(offsets=(0,))}, "is damaged"),
        ({"a": entry(offsets="08")}, "is damaged"),
        ({"a": entry(offsets=(0, 4))}, "is damaged"),
        ({"a": entry(shape=(1,))}, "is damaged"),
        ({"a": entry(shape=(3,))}, "is damaged"),
        ({"a": entry(shape=(-2,))}, "is damaged"),
        ({"a": entry(shape=(2.0,))}, "is damaged"),
        ({"a": entry(shape=(1 << 70, 0))}, "is damaged"),
        ({"a": entry(shape=(1 << 61, 1 << 61, 0))}, "is damaged"),
        ({"a": entry(shape=[1] * 40)}, "is damaged"),
        ({"a": entry(shape=None)}, "is damaged"),
        ({"a": entry(shape="2")}, "is damaged"),
        ({"a": entry(dtype="F12")}, "is damaged"),
        ({"a": entry("C64", (1,))}, "is C64"),
        ({"a": entry(dtype=["F32"])}, "is damaged"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "is damaged"),
        ({"a": None}, "is damaged"),
        ({"a": [1]}, "is damaged"),
        ({}, "is damaged"),
        ({"a": entry(shape=(1,), offsets=(0, 4))}, "is damaged"),
        ({"a": entry(shape=(1,), offsets=(4, 8))}, "is damaged"),
        ({"a": entry(), "b": entry()}, "is damaged"),
        ({"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))}, "is damaged"),
        ({"__metadata__": {"a": 1}}, "is damaged"),
        ({"__metadata__": [1]}, "is damaged"),
        ({"a": entry("BOOL", (8,), (0, 8))}, "0/1"),
        ([1], "is damaged"),
        (b"null", "is damaged"),
        (b'{"a": ', "is damaged"),
        (b"{'a': 1}", "is damaged"),
        (b'{"\xff": 1}', "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"a":' * 50_000, "is damaged"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "is damaged"),
        (b'{"a": 1, "a": 2}', "is damaged"),
    ],
)
def test_safetensors_headers(tmp_path, header, part):
    refusal(
        raw_safetensors(tmp_path / "x.safetensors", header, b"\x02" * 8),
        part,
    )


@pytest.mark.parametrize("name", ["x.safetensors", "x.safetensors.index.json"])
def test_what_lies_in_a_download_s_place(tmp_path, name):
    path = tmp_path / name
    for content, part in (
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
    ):
        path.write_bytes(content)
        refusal(path, part)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 63) - 1, (1 << 64) - 1])
def test_safetensors_header_lengths(tmp_path, length):
    path = tmp_path / "x.safetensors"
    refusal(raw_safetensors(path, {"a": entry()}, bytes(8), length), "header cannot be")


def test_safetensors_header_of_more_than_16_mib(tmp_path):
    refusal(raw_safetensors(tmp_path / "x.safetensors", b" " * (17 << 20)), "header cannot be")


def test_safetensors_truncations(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(3), "b": np.ones((2, 2), np.int8)})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refusal(path)
    path.write_bytes(data + b"\0")
    refusal(path, "not fully covered")


# Sharded safetensors.


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.numpy.save_file({"a": np.ones(3), "b": np.ones(2)}, folder / "one.safetensors")
    safetensors.numpy.save_file({"c": np.ones(4)}, folder / "two.safetensors")
    safetensors.numpy.save_file({"c": np.ones(4)}, tmp_path / "outside.safetensors")
    return folder


def index(folder, **files):
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors", **files}
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if v}}))
    return path


def test_a_good_index(sharded):
    with open_tensors(index(sharded)) as file:
        assert {k: v.read().size for k, v in file.tensors.items()} == {"a": 3, "b": 2, "c": 4}


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "../model/two.safetensors",
        "./two.safetensors",
        "sub/two.safetensors",
        "..\\outside.safetensors",
        "C:two.safetensors",
        "/etc/passwd",
        "ABSOLUTE",
        "..",
        ".",
        "two.safetensors\0",
        "file:///etc/passwd",
        "two.pt",
        "index.json",
    ],
)
def test_index_that_names_files_elsewhere(sharded, name):
    if name == "ABSOLUTE":
        name = str(sharded / "two.safetensors")
    refusal(index(sharded, c=name), "refused", repr(name)[1:-1])


def test_index_that_leaves_its_folder_by_a_link(sharded):
    (sharded / "link.safetensors").symlink_to("../outside.safetensors")
    refusal(index(sharded, c="link.safetensors"), "link to a file outside")
    (sharded / "link.safetensors").unlink()
    (sharded / "link.safetensors").symlink_to("two.safetensors")
    with open_tensors(index(sharded, c="link.safetensors")) as file:
        assert file.tensors["c"].read().size == 4


def test_index_with_missing_and_repeated_tensors(sharded):
    refusal(index(sharded, c="three.safetensors"), "'three.safetensors' is missing")
    refusal(index(sharded, d="two.safetensors"), "'two.safetensors' lacks ['d']")
    refusal(index(sharded, a="two.safetensors"), "'two.safetensors' lacks ['a']")
    refusal(index(sharded, b=None), "'one.safetensors' lacks []", "has ['b']")
    safetensors.numpy.save_file({"c": np.ones(4), "b": np.ones(2)}, sharded / "two.safetensors")
    refusal(index(sharded), "'two.safetensors' lacks []", "has ['b']")


def test_index_with_a_broken_shard(sharded):
    (sharded / "two.safetensors").write_bytes(b"PK\3\4 and so on")
    with pytest.raises(UsageError, match=r"two\.safetensors is a PyTorch zip"):
        open_tensors(index(sharded))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": null}',
        b'{"weight_map": {}}',
        b'{"weight_map": ["one.safetensors"]}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": ""}}',
        b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_index_that_is_none(sharded, content):
    path = sharded / "m.safetensors.index.json"
    path.write_bytes(content)
    refusal(path)


def test_index_as_large_as_a_checkpoint(sharded):
    path = sharded / "m.safetensors.index.json"
    with open(path, "wb") as f:
        f.truncate(1 << 40)
    refusal(path, "at most 16777216")


HUGE = b"\x8a\xff" + b"\x7f" * 255  # an integer of 2040 bits
DEEP = b"N" + b"\x85" * 10_000


@pytest.mark.parametrize("value", [doubling(40, b"(", b"t"), DEEP, HUGE, text("\x1b[31m" * 10_000)])
def test_messages_about_hostile_values_are_short(tmp_path, value):
    """Also where the values are within persistent ids and the arguments of a tensor."""
    for body in (
        value + b"Q",
        tuple_of(text("storage"), value, text("0"), text("cpu"), number(6)) + b"Q",
        tuple_of(text("storage"), b"ctorch\nFloatStorage\n", value, text("cpu"), number(6)) + b"Q",
        tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), value) + b"Q",
        *(without(index, value) for index in (0, 1, 2, 3)),
        without(6, value),
        b"}" + text("\x1b]0;x\x07" * 100) + tensor((2, 3)) + b"s",
        dict_of(model=b"}" + text("a\x1b[0mb.w") + tensor((2, 3)) + b"s"),
    ):
        message = refused_pickle(tmp_path, body)
        assert message.isprintable()


def test_keys_that_collide_are_limited(tmp_path, monkeypatch):
    keys = b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(25_000))
    refused_pickle(tmp_path, b"}(" + keys + b"u", "10000 keys")


def test_what_is_no_weights_is_inert(tmp_path):
    """Arguments of any type, sets, bytes and tensors of unknown kinds are no reason to refuse."""
    value = argparse.Namespace(path=pathlib.PurePosixPath("x"), tags={"a"}, lr=np.float64(1))
    value.date, value.sets = datetime.date(2024, 1, 1), [frozenset("a"), b"raw"]
    value.tree = {(1, 2): 3, "counter": collections.Counter("aab")}
    for protocol in (2, 4, 5):
        data = pickle.dumps({"args": value}, protocol)[:-1] + text("model")
        data += dict_of(w=tensor((2, 3))) + b"s."
        with open_tensors(zip_pt(tmp_path / "x.pt", data, (RAW,))) as file:
            assert select_weights(file).source == "model"
            assert isinstance(file.tree["args"].path, pickles.Inert)
            assert file.tree["args"].lr == 1.0


def test_namespaces_are_what_argparse_makes(tmp_path):
    body = b"cargparse\nNamespace\n)\x81" + dict_of(lr=number(3)) + b"b"
    with open_tensors(zip_pt(tmp_path / "x.pt", pickled(body))) as file:
        assert file.tree == argparse.Namespace(lr=3)
