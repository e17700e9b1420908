"""Files of weights: golden ones, round trips, and what is chosen from them."""

import argparse
import collections
import json
import os
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dico_jax.errors import UsageError
from dico_jax.pytorch.tensors import DTYPES
from dico_jax.pytorch.torch_files import (
    Deferred,
    open_tensors,
    select_weights,
    write_pt,
    write_safetensors,
)
from tests import golden
from tests.pytorch_files import (
    assert_same,
    flat,
    pickled,
    storage,
    tensor,
    tuple_of,
    write_shards,
    zip_pt,
)

SHAPES = [(), (1,), (7,), (0,), (0, 3), (2, 0, 5), (3, 4), (2, 3, 4), (2, 1, 3, 2, 5)]


def example(dtype, shape, seed=0):
    """Any bits, but 0 or 1 for bool."""
    rng = np.random.default_rng([seed, *shape])
    dtype = np.dtype(dtype)
    size = int(np.prod(shape))
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).reshape(shape)


def examples():
    return {f"{n}{list(s)}": example(d, s) for n, d in DTYPES.items() for s in SHAPES}


# Golden files.


@golden.requires_golden
@pytest.mark.parametrize("name", ["dico_tiny.pt", "dico_tiny.safetensors"])
def test_golden_weights_are_the_recipe_s(name):
    with open_tensors(golden.FOLDER / name) as file:
        found = {k: v.read() for k, v in file.tensors.items()}
    drawn = golden.draw({k: v.shape for k, v in found.items()}, 101, "A")
    digest = "fd2df2e031a0eee2fd4e5b944eb86b058182a4bb0d1a365ee66c9ea9ae16010a"
    assert golden.digest(found) == golden.digest(drawn) == digest
    for key, value in drawn.items():
        assert_same(found[key], value)


@golden.requires_golden
def test_golden_pt_keeps_the_declaration_order():
    with open_tensors(golden.FOLDER / "dico_tiny.pt") as file:
        names = list(file.tensors)
        assert type(file.tree) is collections.OrderedDict
    assert names[:2] == ["x_embedder.proj.weight", "x_embedder.proj.bias"]
    assert names == list(golden.load("train_checkpoint_arrays.npz")["names"])


@golden.requires_golden
def test_golden_dit_with_its_position_embedding():
    with open_tensors(golden.FOLDER / "dit_tiny.pt") as file:
        tensors = file.tensors
        assert next(iter(tensors)) == "pos_embed"
        assert tensors["pos_embed"].shape == (1, 64, 64)


@golden.requires_golden
@pytest.mark.parametrize("source", ["model", "ema", "auto"])
def test_golden_training_checkpoint_weights(source):
    arrays = golden.load("train_checkpoint_arrays.npz")
    with open_tensors(golden.FOLDER / "train_checkpoint.pt") as file:
        found = select_weights(file, source)
        assert found.source == ("ema" if source == "auto" else source)
        assert list(found.tensors) == list(arrays["names"])
        values = [v.read().astype(np.float64) for v in found.tensors.values()]
    sums = arrays[f"{found.source}_sum_f64"], arrays[f"{found.source}_sumsq_f64"]
    np.testing.assert_allclose([v.sum() for v in values], sums[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([(v**2).sum() for v in values], sums[1], rtol=1e-12)


@golden.requires_golden
def test_golden_training_checkpoint_optimizer_and_arguments():
    arrays = golden.load("train_checkpoint_arrays.npz")
    with open_tensors(golden.FOLDER / "train_checkpoint.pt") as file:
        tree = file.tree
        state = tree["opt"]["state"]
        assert list(state) == list(range(len(arrays["names"])))
        for kind, name in (("exp_avg", "exp_avg_sum_f64"), ("exp_avg_sq", "exp_avg_sq_sum_f64")):
            sums = [s[kind].read().astype(np.float64).sum() for s in state.values()]
            np.testing.assert_allclose(sums, arrays[name], rtol=1e-9, atol=1e-15)
        assert [float(s["step"].read()) for s in state.values()] == list(arrays["opt_step"])
        recorded = json.loads(str(arrays["param_groups"]))
        assert json.loads(json.dumps(tree["opt"]["param_groups"][0])) == recorded
        assert isinstance(tree["args"], argparse.Namespace)
        assert tree["args"].num_classes == 10
        with pytest.raises(UsageError, match="training checkpoint"):
            _ = file.tensors


@golden.requires_golden
def test_golden_training_checkpoint_round_trip(tmp_path):
    with open_tensors(golden.FOLDER / "train_checkpoint.pt") as file:
        write_pt(tmp_path / "again.pt", file.tree)
        with open_tensors(tmp_path / "again.pt") as again:
            one, two = flat(file.tree), flat(again.tree)
            assert list(one) == list(two)
            for key, value in one.items():
                assert_same(two[key], value)
            assert type(again.tree["model"]) is collections.OrderedDict
            assert again.tree["args"] == file.tree["args"]


# Round trips.


def test_pt_round_trip_of_all_dtypes_and_shapes(tmp_path):
    wanted = examples()
    write_pt(tmp_path / "x.pt", wanted)
    with open_tensors(tmp_path / "x.pt") as file:
        assert list(file.tensors) == list(wanted)
        for key, ref in file.tensors.items():
            assert isinstance(ref, Deferred)
            assert (ref.dtype, ref.shape) == (wanted[key].dtype, wanted[key].shape)
            assert ref.nbytes == wanted[key].nbytes
            assert_same(ref.read(), wanted[key])


def test_safetensors_round_trip_and_the_library_s_view(tmp_path):
    wanted = examples()
    path = tmp_path / "x.safetensors"
    write_safetensors(path, wanted, {"made": "here"})
    with open_tensors(path) as file, safetensors.safe_open(path, "numpy") as library:
        assert file.metadata == library.metadata() == {"made": "here"}
        assert set(file.tensors) == set(wanted) == set(library.keys())
        for key, value in wanted.items():
            assert_same(file.tensors[key].read(), value)
            # The library's NumPy side lacks the 8-bit floats.
            if "float8" not in key:
                assert_same(library.get_tensor(key), value)


def test_safetensors_of_the_library(tmp_path):
    wanted = {k: v for k, v in examples().items() if "float8" not in k}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(wanted, path)
    with open_tensors(path) as file:
        assert {k: v.read().tobytes() for k, v in file.tensors.items()} == {
            k: v.tobytes() for k, v in wanted.items()
        }
        assert file.metadata == {}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_writing_what_is_not_contiguous(tmp_path, suffix):
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    wanted = {
        "transposed": base.T,
        "sliced": base[:, ::2, 1:3],
        "reversed": base[::-1],
        "broadcast": np.broadcast_to(base[0, 0], (5, 4)),
        "big-endian": base.astype(">f4"),
        "fortran": np.asfortranarray(base),
        "jax": jnp.asarray(base, jnp.bfloat16),
    }
    path = tmp_path / f"x.{suffix}"
    (write_pt if suffix == "pt" else write_safetensors)(path, wanted)
    with open_tensors(path) as file:
        for key, value in wanted.items():
            value = np.asarray(value)
            assert_same(file.tensors[key].read(), value.astype(value.dtype.newbyteorder("=")))


def test_pt_round_trip_of_values_that_are_no_tensors(tmp_path):
    values = {
        "none": None,
        "bools": (True, False),
        "ints": [0, 1, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 2**63, -(2**63), 10**40],
        "floats": [0.0, -1.5, 1e-300, float("inf"), float("-inf")],
        "texts": ["", "a\nb", "ü😀", "x" * 300],
        "nested": [[], {}, (), [{"a": ({"b": 1},)}]],
        "keys": {0: 1, -5: 2, 1.5: 3, None: 4, "s": 5, True: 6},
        "dtype": np.dtype("float32"),
        "namespace": argparse.Namespace(lr=1e-4, tags=["a"]),
        "ordered": collections.OrderedDict([("z", 1), ("a", 2)]),
        "numpy": [np.float32(0.5), np.int64(3), np.bool_(True)],
    }
    write_pt(tmp_path / "x.pt", values)
    with open_tensors(tmp_path / "x.pt") as file:
        assert file.tree == values
        for key, value in values.items():
            assert type(file.tree[key]) is type(value)
        assert list(file.tree["ordered"]) == ["z", "a"]


def test_nan_keeps_its_bits(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800001], np.uint32).view(np.float32)
    write_pt(tmp_path / "x.pt", {"a": bits})
    with open_tensors(tmp_path / "x.pt") as file:
        assert_same(file.tensors["a"].read(), bits)


def test_read_arrays_may_be_written_to(tmp_path):
    write_pt(tmp_path / "x.pt", {"a": np.zeros(3, np.float32)})
    with open_tensors(tmp_path / "x.pt") as file:
        file.tensors["a"].read()[:] = 1
        assert file.tensors["a"].read().sum() == 0


def test_views_that_share_a_storage(tmp_path):
    base = np.arange(24, dtype=np.float32)
    views = {
        "whole": tensor((4, 6), count=24),
        "transposed": tensor((6, 4), count=24, strides=(1, 6)),
        "columns": tensor((4, 2), count=24, strides=(6, 1), offset=3),
        "row": tensor((6,), count=24, offset=12),
        "every": tensor((2, 3, 2), count=24, strides=(12, 4, 2), offset=1),
        "one": tensor((), count=24, offset=23),
        "expanded": tensor((5, 3), count=24, strides=(0, 1)),
        "none": tensor((0, 4), count=24, offset=24),
        "ones": tensor((1, 1, 24), count=24, strides=(99, 7, 1)),
    }
    body = b"}(" + b"".join(
        b"X" + len(k).to_bytes(4, "little") + k.encode() + v for k, v in views.items()
    )
    path = zip_pt(tmp_path / "x.pt", pickled(body + b"u"), [base.tobytes()])
    table = base.reshape(4, 6)
    wanted = {
        "whole": table,
        "transposed": table.T,
        "columns": table[:, 3:5],
        "row": table[2],
        "every": np.lib.stride_tricks.as_strided(base[1:], (2, 3, 2), (48, 16, 8)),
        "one": base[23],
        "expanded": np.broadcast_to(base[:3], (5, 3)),
        "none": base[:0].reshape(0, 4),
        "ones": base.reshape(1, 1, 24),
    }
    for order in (list(views), list(views)[::-1]):
        with open_tensors(path) as file:
            for key in order:
                found = file.tensors[key].read()
                assert found.flags.c_contiguous
                assert_same(found, wanted[key])


# The layout of what is written.


def test_layout_of_a_pt_file(tmp_path):
    write_pt(tmp_path / "x.pt", {f"t{i}": np.full(i, i, np.float32) for i in range(40)})
    raw = (tmp_path / "x.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as z:
        assert z.testzip() is None
        names = z.namelist()
        assert z.read("archive/version") == b"3\n"
        assert z.read("archive/byteorder") == b"little"
        assert z.read("archive/.data/serialization_id").isdigit()
        for info in z.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            at = info.header_offset
            lengths = raw[at + 26 : at + 30]
            start = at + 30 + int.from_bytes(lengths[:2], "little")
            start += int.from_bytes(lengths[2:], "little")
            assert start % 64 == 0
    assert names[0] == "archive/data.pkl"
    assert [n for n in names if "/data/" in n] == [f"archive/data/{i}" for i in range(40)]


def test_equal_trees_give_equal_files(tmp_path):
    for name in ("a.pt", "b.pt"):
        write_pt(tmp_path / name, {"a": np.ones(3)})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    write_pt(tmp_path / "c.pt", {"a": np.zeros(3)})
    numbers = set()
    for name in ("a.pt", "b.pt", "c.pt"):
        with zipfile.ZipFile(tmp_path / name) as z:
            numbers.add(z.read("archive/.data/serialization_id"))
    assert len(numbers) == 2
    assert {len(n) for n in numbers} == {40}


def test_wide_types_come_first_in_safetensors(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": np.ones(3, np.int8), "b": np.ones(2)})
    with open_tensors(tmp_path / "x.safetensors") as file:
        assert list(file.tensors) == ["b", "a"]  # as they lie
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert raw.find(np.ones(2).tobytes()) % 8 == 0


def test_zip64_entries_are_read(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as z:
        for name, raw in (("data.pkl", pickled(tensor((2,)))), ("data/0", bytes(8))):
            with z.open(f"archive/{name}", "w", force_zip64=True) as entry:
                entry.write(raw)
    with open_tensors(path) as file:
        assert_same(file.tree.read(), np.zeros(2, np.float32))


@pytest.mark.slow
def test_tensor_above_4_gib(tmp_path):
    size = (1 << 32) + 5

    def make():
        array = np.zeros(size, np.uint8)
        array[-6:] = range(6)
        return array

    path = tmp_path / "x.pt"
    write_pt(path, {"big": Deferred(np.uint8, (size,), make), "after": np.ones(3)})
    with zipfile.ZipFile(path) as z:
        assert z.getinfo("archive/data/0").file_size == size
    with open_tensors(path) as file:
        assert_same(file.tensors["after"].read(), np.ones(3))
        assert np.array_equal(file.tensors["big"].read()[-7:], [0, 0, 1, 2, 3, 4, 5])


# One tensor at a time.


def peak_bytes(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_memory_is_one_tensor(tmp_path, suffix):
    one, count = 8 << 20, 12
    path = tmp_path / f"x.{suffix}"
    write = write_pt if suffix == "pt" else write_safetensors
    lazy = {
        f"t{i}": Deferred(np.float32, (one // 4,), lambda i=i: np.full(one // 4, i, np.float32))
        for i in range(count)
    }
    assert peak_bytes(lambda: write(path, lazy)) < 1.5 * one

    def read():
        with open_tensors(path) as file:
            for i, ref in enumerate(file.tensors.values()):
                assert ref.read()[-1] == i

    assert peak_bytes(read) < 2.5 * one  # the old array lives until the new one has its name

    def copy():
        with open_tensors(path) as file:
            write(tmp_path / f"y.{suffix}", file.tensors)

    assert peak_bytes(copy) < 1.5 * one
    assert path.read_bytes() == (tmp_path / f"y.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_progress_counts_the_tensors_bytes(tmp_path, suffix):
    tensors = {"a": np.zeros(3_000_000, np.float32), "b": np.zeros((), np.int64), "c": np.ones(5)}
    total = sum(t.nbytes for t in tensors.values())
    path = tmp_path / f"x.{suffix}"
    seen = []
    (write_pt if suffix == "pt" else write_safetensors)(path, tensors, on_bytes=seen.append)
    assert sum(seen) == total
    assert len(seen) > 3  # the large one comes in pieces
    seen.clear()
    with open_tensors(path, on_bytes=seen.append) as file:
        assert seen == []
        for ref in file.tensors.values():
            ref.read()
    assert sum(seen) == total


def test_closed_file(tmp_path):
    write_pt(tmp_path / "x.pt", {"a": np.ones(3)})
    with open_tensors(tmp_path / "x.pt") as file:
        ref = file.tensors["a"]
    with pytest.raises(ValueError, match="closed"):
        ref.read()


# Shards.


def test_shards(tmp_path):
    tensors = {f"t{i}": np.full((4, 8), i, np.float32) for i in range(5)}  # 128 bytes each
    tensors["big"] = np.ones(200, np.float32)
    path = write_shards(tmp_path, tensors, 4)
    seen = []
    with open_tensors(path, on_bytes=seen.append) as file:
        assert list(file.tensors) == list(tensors)
        for key, value in tensors.items():
            assert_same(file.tensors[key].read(), value)
    assert sum(seen) == 5 * 128 + 800


def test_shards_as_the_hub_s_cache_keeps_them(tmp_path):
    """There a snapshot's files are links into a folder of blobs with other names."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    tensors = {"a": np.ones(3), "b": np.ones(4)}
    index = write_shards(snapshot, tensors, 2)
    for i, path in enumerate(list(snapshot.iterdir())):
        os.rename(path, blobs / f"{i:064x}")
        os.symlink(f"../../blobs/{i:064x}", path)
    with open_tensors(index) as file:
        assert_same(file.tensors["b"].read(), tensors["b"])


# What is chosen.


A, B = {"a.w": np.zeros(1)}, {"a.w": np.ones(1)}


def test_choice_in_a_training_checkpoint():
    tree = {"model": A, "ema": B, "opt": {}, "args": argparse.Namespace()}
    assert select_weights(tree) == ("ema", B)
    assert select_weights(tree, "ema") == ("ema", B)
    assert select_weights(tree, "model") == ("model", A)
    assert select_weights({"model": A, "opt": {}}) == ("model", A)


def test_choice_in_a_plain_state_dict():
    assert select_weights(A) == ("weights", A)
    assert select_weights(A, "model") == ("weights", A)
    with pytest.raises(UsageError, match="no ema weights"):
        select_weights(A, "ema")


@pytest.mark.parametrize(
    "wrapped", [{"state_dict": A, "epoch": 3}, {"state_dict": {"state_dict": A}}]
)
def test_state_dict_wrapper(wrapped):
    assert select_weights(wrapped) == ("weights", A)
    assert select_weights({"model": wrapped, "ema": {"state_dict": B}}, "model") == ("model", A)


def test_prefixes_that_every_name_has():
    tensor = np.ones(1)
    every = {"module._orig_mod.a": tensor, "module._orig_mod.b": tensor}
    assert list(select_weights(every).tensors) == ["a", "b"]
    inner = {"latent.0._checkpoint_wrapped_module.w": tensor, "_forward_module.latent.1.w": tensor}
    inner |= {"latent.2._fsdp_wrapped_module._fpw_module.w": tensor, "latent.3._module.w": tensor}
    assert list(select_weights(inner).tensors) == [f"latent.{i}.w" for i in range(4)]
    with pytest.raises(UsageError, match="has a twice"):
        select_weights({"module.a": tensor, "a": tensor + 1})


NAMES = (
    "ema ema_model model_ema params_ema ema_params state_dict_ema ema_state ema_state_dict "
    "ema_model_state_dict g_ema shadow netEMA ema_0.9999 swa_model teacher"
)


@pytest.mark.parametrize("ema", NAMES.split())
@pytest.mark.parametrize("model", ["model", "state_dict", "net", "model_state_dict"])
def test_averages_are_found_under_usual_names(model, ema):
    other = {"epoch": 3, "n": np.array(7), "optimizer": {"state": {0: {"ema.w": np.ones(2)}}}}
    tree = {model: A, ema: {"n_averaged": np.array(3), "module.a.w": B["a.w"]}, **other}
    assert select_weights(tree) == select_weights(tree, "ema") == (ema, B)
    assert select_weights({"checkpoint": tree}) == (f"checkpoint.{ema}", B)
    assert select_weights(tree, "model").tensors == A


def test_sets_that_prefixes_name():
    def named(*sets):
        return {f"{name}x_embedder.w": np.full(2, i) for i, name in enumerate(sets)}

    for raw, ema in [("net.", "net_ema."), ("model.", "model.ema."), ("", "ema_model.module.")]:
        tree = {"state_dict": named(raw, ema), "epoch": 3}
        assert select_weights(tree).tensors["x_embedder.w"][0] == 1
        assert select_weights(tree, "model").tensors["x_embedder.w"][0] == 0
    lucid = {"model": named(""), "ema": named("online_model.", "ema_model.")}
    assert select_weights(lucid).source == "ema.ema_model"
    assert select_weights(lucid, "model").source == "model"
    dotless = named("model.") | {"model_ema.x_embedderw": np.ones(2)}
    with pytest.raises(UsageError, match="averages that are not read"):
        select_weights(dotless)


def test_averages_in_a_list():
    assert select_weights({"model": A, "ema": [B]}) == ("ema.0", B)
    several = {"model": A, "emas": {0.999: A, 0.9999: B}}
    with pytest.raises(UsageError, match="several sets: 'emas.0', 'emas.1'; name one .* --weights"):
        select_weights(several)
    assert select_weights(several, "emas.1") == ("emas.1", B)
    assert select_weights(several, "model") == ("model", A)
    with pytest.raises(UsageError, match="not one of auto, ema, model, emas.0, emas.1"):
        select_weights(several, "best")


def test_choice_that_is_not_there(tmp_path):
    write_pt(tmp_path / "x.pt", {"model": A, "opt": {"state": {}}, "note": "hi"})
    with open_tensors(tmp_path / "x.pt") as file:
        with pytest.raises(UsageError) as error:
            select_weights(file, "ema")
        for part in ("x.pt", "no ema weights", "'model'", "'opt'", "'note'"):
            assert part in str(error.value)
    with pytest.raises(UsageError, match="'best' is not one of auto, ema, model"):
        select_weights(A, "best")


@pytest.mark.parametrize(
    ("tree", "part"),
    [
        ([1, 2], "list"),
        ({"epoch": 3}, "'epoch'"),
        ({}, "nothing"),
        ({"model": {0: np.ones(1)}}, "'model'"),
        ({"model": {"n": 1}, "ema": {}}, "no tensors by name"),
        (
            {"model": A, "ema": [np.ones(1)]},
            "averages .* not read .'ema'.; .* --weights=model",
        ),
        ({"model": A, "ema": {"shadow_params": [np.ones(1)]}}, "not read .'ema.shadow_params'"),
        ({"model": A, "ema": {0: np.ones(1)}}, "not read .'ema'"),
        ({"model": A, "ema_flat": np.ones(9)}, "not read .'ema_flat'"),
        ({"model": A, "optimizer_states": [{"ema": (np.ones(1),)}]}, "'optimizer_states.0.ema'"),
        ({"generator": A, "discriminator": B}, "several sets: 'generator', 'discriminator'"),
        ({"ema": A, "model_ema": B}, "several sets: 'ema', 'model_ema'"),
    ],
)
def test_weights_that_are_none(tree, part):
    with pytest.raises(UsageError, match=part):
        select_weights(tree)


# Failures of writing.


def failing(after):
    calls = []

    def make():
        calls.append(1)
        if len(calls) > after:
            raise RuntimeError("no more")
        return np.zeros(4, np.float32)

    return make


@pytest.mark.parametrize("write", [write_pt, write_safetensors])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, write):
    path = tmp_path / "x.out"
    path.write_text("old")
    make = failing(2)
    with pytest.raises(RuntimeError):
        write(path, {str(i): Deferred(np.float32, (4,), make) for i in range(4)})
    assert os.listdir(tmp_path) == ["x.out"]
    assert path.read_text() == "old"


def test_files_get_the_umask_s_mode(tmp_path):
    old = os.umask(0o027)
    try:
        write_pt(tmp_path / "x.pt", {})
    finally:
        os.umask(old)
    assert (tmp_path / "x.pt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("write", [write_pt, write_safetensors])
@pytest.mark.parametrize("path", ["missing/x.pt", "", "folder"])
def test_places_that_cannot_be_written(tmp_path, monkeypatch, write, path):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    with pytest.raises(UsageError):
        write(path, {"a": np.ones(2)})
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("write", [write_pt, write_safetensors])
@pytest.mark.parametrize("made", [np.zeros(4, np.float64), np.zeros(5, np.float32)])
def test_lazy_tensor_that_is_not_as_announced(tmp_path, write, made):
    with pytest.raises(ValueError, match="announced"):
        write(tmp_path / "x", {"a": Deferred(np.float32, (4,), lambda: made)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "value", [object(), b"bytes", {1, 2}, 1j, 1 << 300, np.ones(2, np.complex64)]
)
def test_values_that_a_pt_file_cannot_hold(tmp_path, value):
    with pytest.raises(TypeError):
        write_pt(tmp_path / "x.pt", {"a": value})
    with pytest.raises(TypeError):
        write_pt(tmp_path / "x.pt", {(1, 2): 1})
    assert os.listdir(tmp_path) == []


def test_a_tree_in_itself_is_not_written(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="levels"):
        write_pt(tmp_path / "x.pt", loop)


def test_what_safetensors_do_not_have(tmp_path):
    path = tmp_path / "x.safetensors"
    for bad in ({1: np.ones(2)}, {"__metadata__": np.ones(2)}):
        with pytest.raises(ValueError, match="named"):
            write_safetensors(path, bad)
    with pytest.raises(TypeError, match="complex64"):
        write_safetensors(path, {"a": np.ones(2, np.complex64)})
    with pytest.raises(ValueError, match="metadata"):
        write_safetensors(path, {}, {"a": 1})
    assert os.listdir(tmp_path) == []


def test_untyped_storage_and_bool(tmp_path):
    """What torch 2.13 writes for dtypes without a storage class."""
    args = (
        storage("0", 4, "UntypedStorage", "torch.storage")
        + b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rctorch\nuint16\n"
    )
    body = b"ctorch._utils\n_rebuild_tensor_v3\n(" + args + b"tR"
    path = zip_pt(tmp_path / "x.pt", pickled(tuple_of(body, body)), [b"\x01\x00\x00\x80"])
    with open_tensors(path) as file:
        assert_same(file.tree[1].read(), np.array([1, 0x8000], np.uint16))
