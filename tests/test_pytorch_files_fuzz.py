"""A thousand mutations and more of valid files: each is refused cleanly or read completely."""

import argparse
import collections
import contextlib
import itertools
import json
import pickletools
import random
import resource
import time
import zipfile

import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.pytorch.torch_files import open_tensors, select_weights, write_pt, write_safetensors
from tests import golden
from tests.pytorch_files import flat, write_shards

SEED = 20250511
EVIL = [
    b"cos\nsystem\nX\x05\x00\x00\x00falseq\x00\x85R",
    b"c__builtin__\neval\nX\x01\x00\x00\x001\x85R",
    b"cargparse\nNamespace\n)\x81",
    b"ccollections\nOrderedDict\n)R",
    b"ctorch\nFloatStorage\n",
    b"\x80\x04",
    b"r\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"J\xff\xff\xff\xff",
    b"(((((((",
    b"]" * 200,
    b"\x85" * 200,
    b"2222R",
    b"Q",
    b"b",
]


def weights():
    rng = np.random.default_rng(SEED)
    return collections.OrderedDict(
        (f"block.{i}.weight", rng.standard_normal((i + 1, 3, 2)).astype(dtype))
        for i, dtype in enumerate(["f4", "f2", "f8", "i8", "u1", "f4"])
    )


def training():
    model, moments = weights(), weights()
    state = {
        i: {"step": np.float32(2).reshape(()), "exp_avg": m, "exp_avg_sq": m * m}
        for i, m in enumerate(moments.values())
    }
    groups = [{"lr": 1e-4, "betas": (0.9, 0.999), "params": list(state), "fused": None}]
    args = argparse.Namespace(model="DiCo-S", image_size=256, ckpt=None, results="results")
    opt = {"state": state, "param_groups": groups}
    return {"model": model, "ema": weights(), "opt": opt, "args": args}


def mutate_bytes(rng, data):
    """A copy of `data` with one to three wounds of the usual kinds."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 2, 4, 8, 30, 200]))
        kind = rng.randrange(8)
        if kind == 0:  # bits
            for _ in range(rng.choice([1, 1, 4, 20])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # the end is missing
            del data[at:]
        elif kind == 2:  # a part is missing
            del data[at:end]
        elif kind == 3:  # a part comes twice
            data[at:at] = data[at:end]
        elif kind == 4:  # a part from elsewhere, in its place
            other = rng.randrange(len(data) + 1)
            data[at:end] = data[other : other + end - at]
        elif kind == 5:  # a block of something
            block = rng.choice([bytes(40), b"\xff" * 40, rng.randbytes(60), b"PK\3\4", b"PK\5\6"])
            data[at:at] = block
        elif kind == 6:  # a number that is extreme
            data[at : at + 8] = rng.choice([bytes(8), b"\xff" * 8, b"\0" * 7 + b"\x80"])
        else:  # as the one before, but near the end, where zip files have their directory
            at = max(0, len(data) - rng.randrange(1, 500))
            data[at : at + 4] = rng.choice([bytes(4), b"\xff" * 4, rng.randbytes(4)])
        if not data:
            break
    return bytes(data)


def mutate_pickle(rng, data):
    """A copy of the pickle `data` with one to three changes to its opcodes."""
    cuts = [at for _, _, at in pickletools.genops(data)] + [len(data)]
    steps = [data[a:b] for a, b in itertools.pairwise(cuts)]
    codes = [op.code.encode("latin-1") for op in pickletools.opcodes]
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(steps))
        kind = rng.randrange(8)
        if kind == 0:  # another opcode, with the same argument
            steps[at] = rng.choice(codes) + steps[at][1:]
        elif kind == 1:
            steps[at] = b""
        elif kind == 2:
            steps[at] = steps[rng.randrange(len(steps))]
        elif kind == 3:
            other = rng.randrange(len(steps))
            steps[at], steps[other] = steps[other], steps[at]
        elif kind == 4:
            steps.insert(at, rng.choice(EVIL))
        elif kind == 5:  # another argument
            steps[at] = steps[at][:1] + rng.randbytes(max(0, len(steps[at]) - 1))
        elif kind == 6:
            steps.insert(at, rng.choice(codes))
        else:  # a whole stretch once more
            steps[at:at] = steps[at : at + rng.randrange(1, 40)]
    return b"".join(steps)


def repacked(path, source, change):
    """Writes `path` as the .pt file `source` with its pickle changed; checksums are right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)


def outcome(path):
    """The leaves that reading `path` gives, or None where it is refused cleanly."""
    start = time.monotonic()
    leaves, message = None, None
    try:
        with open_tensors(path) as file:
            leaves = flat(file.tree)
            with contextlib.suppress(UsageError):
                select_weights(file)
    except UsageError as error:
        message = str(error)
    assert time.monotonic() - start < 5
    # The file itself, or a shard beside it.
    assert message is None or (str(path.parent) in message and "\n" not in message)
    return leaves


def equal(found, wanted):
    return list(found) == list(wanted) and all(
        np.asarray(found[k]).tobytes() == np.asarray(v).tobytes() for k, v in wanted.items()
    )


@pytest.fixture(autouse=True)
def memory():
    """Mutations must not make the process grow."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


@pytest.mark.parametrize("what", ["weights", "training"])
def test_mutated_pt_files(tmp_path, what):
    """Every entry that is read has a checksum: what is read at all is what was written."""
    rng = random.Random(SEED)
    path = tmp_path / "x.pt"
    write_pt(path, globals()[what]())
    data, wanted = path.read_bytes(), outcome(path)
    read = 0
    for case in range(600):
        path.write_bytes(mutate_bytes(rng, data))
        found = outcome(path)
        if found is not None:
            read += 1
            assert equal(found, wanted), f"case {case}"
    assert 0 < read < 300  # paddings and dates do not matter, the rest does


def test_mutated_pickles(tmp_path):
    rng = random.Random(SEED)
    source, path = tmp_path / "source.pt", tmp_path / "x.pt"
    refused = 0
    for tree in (weights(), training()):
        write_pt(source, tree)
        for _ in range(500):
            repacked(path, source, lambda data: mutate_pickle(rng, data))
            refused += outcome(path) is None
    assert 500 < refused < 1000


def test_mutated_pickle_bytes(tmp_path):
    rng = random.Random(SEED)
    source, path = tmp_path / "source.pt", tmp_path / "x.pt"
    write_pt(source, training())
    for _ in range(400):
        repacked(path, source, lambda data: mutate_bytes(rng, data))
        outcome(path)


def test_mutated_safetensors(tmp_path):
    """Numbers have no checksum in this format; names, shapes and sizes must still make sense."""
    rng = random.Random(SEED)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, weights())
    data, wanted = path.read_bytes(), outcome(path)
    for case in range(1000):
        path.write_bytes(mutate_bytes(rng, data))
        found = outcome(path)
        if found is not None:
            sizes = sum(v.nbytes for v in found.values())
            assert sizes == sum(v.nbytes for v in wanted.values()), f"case {case}"


def test_mutated_index(tmp_path):
    rng = random.Random(SEED)
    path = write_shards(tmp_path, weights(), 3)
    data, wanted = path.read_bytes(), outcome(path)
    for case in range(400):
        path.write_bytes(mutate_bytes(rng, data))
        found = outcome(path)
        if found is not None:
            # An index may lose a shard with all of its tensors and still be one.
            assert found.keys() <= wanted.keys(), f"case {case}"
    names = ["../x", "/etc/passwd", "", ".", "x.safetensors", "\0", "\ud800", "a" * 300]
    for _ in range(100):
        changed = json.loads(data)
        for _ in range(rng.choice([1, 2])):
            key = rng.choice(list(changed["weight_map"]))
            changed["weight_map"][key] = rng.choice([*names, *changed["weight_map"].values()])
        path.write_text(json.dumps(changed))
        found = outcome(path)
        assert found is None or equal(found, wanted)


@golden.requires_golden
@pytest.mark.parametrize("name", ["train_checkpoint.pt", "dico_tiny.safetensors"])
def test_mutated_golden_files(tmp_path, name):
    rng = random.Random(SEED)
    data = (golden.FOLDER / name).read_bytes()
    path = tmp_path / name
    for _ in range(40):
        path.write_bytes(mutate_bytes(rng, data))
        outcome(path)
    if name.endswith(".pt"):
        for _ in range(20):
            repacked(path, golden.FOLDER / name, lambda data: mutate_pickle(rng, data))
            outcome(path)
