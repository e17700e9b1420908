"""Makers of files for tests: .pt files written byte by byte, and shards with their index."""

import json
import struct
import zipfile

import numpy as np

from dico_jax.pytorch.torch_files import write_safetensors

# Pickle opcodes, protocol 2.
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


def pickled(body):
    """A pickle of protocol 2 that builds what `body` leaves on the stack."""
    return b"\x80\x02" + body + b"."


def text(value):
    """Opcodes that push a string."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    """Opcodes that push an integer."""
    return b"J" + struct.pack("<i", value) if abs(value) < 1 << 31 else _long(value)


def _long(value):
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*parts):
    """Opcodes that push a tuple of what `parts` push."""
    return b"(" + b"".join(parts) + b"t"


def dict_of(**parts):
    """Opcodes that push a dict of what `parts` push."""
    return b"}(" + b"".join(text(k) + v for k, v in parts.items()) + b"u"


def numbers(values):
    """Opcodes that push a tuple of integers."""
    return tuple_of(*map(number, values))


def storage(key, count, kind="FloatStorage", module="torch"):
    """Opcodes that push a storage."""
    pid = tuple_of(
        text("storage"),
        f"c{module}\n{kind}\n".encode(),
        text(key),
        text("cuda:0"),
        number(count),
    )
    return pid + b"Q"


def tensor(shape, key="0", count=None, strides=None, offset=0, tail=b"\x89" + HOOKS):
    """Opcodes that push a float32 tensor."""
    count = int(np.prod(shape)) if count is None else count
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    args = storage(key, count) + number(offset) + numbers(shape) + numbers(strides) + tail
    return REBUILD + b"(" + args + b"tR"


def zip_pt(path, data, storages=(), more=None, compression=zipfile.ZIP_STORED):
    """Writes a .pt file with the pickle `data` and `storages` (bytes) under keys 0, 1, ..."""
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/byteorder", b"little")
        for key, raw in enumerate(storages):
            z.writestr(f"archive/data/{key}", raw)
        for name, raw in (more or {}).items():
            z.writestr(name, raw)
    return path


def write_shards(folder, tensors, count):
    """Writes `count` shards m-N.safetensors and their index; its path."""
    names = list(tensors)
    shards = {f"m-{i}.safetensors": names[i::count] for i in range(count)}
    for shard, own in shards.items():
        write_safetensors(folder / shard, {name: tensors[name] for name in own})
    path = folder / "m.safetensors.index.json"
    files = {name: shard for shard, own in shards.items() for name in own}
    weight_map = {name: files[name] for name in names}
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def flat(tree, prefix=""):
    """The leaves of a tree of dict, list and tuple by path, tensors read."""
    if hasattr(tree, "read"):
        return {prefix: tree.read()}
    if hasattr(tree, "_get_kwargs"):
        tree = vars(tree)
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}


def assert_same(found, wanted):
    """The arrays are equal to the bit, with shape and dtype."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()
