"""Bad input to the conversion: one line that says what is wrong, and nothing left on the disk."""

import argparse
import collections
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from dico_jax import files
from dico_jax.errors import UsageError
from dico_jax.models import abstract_params, create_model
from dico_jax.pytorch import conversion, optimizer_state
from dico_jax.pytorch.conversion import from_pytorch, load_pytorch, to_pytorch
from dico_jax.pytorch.key_maps import KEY_MAPS
from dico_jax.pytorch.torch_files import Deferred, open_tensors, write_pt, write_safetensors
from tests.commands import call
from tests.pytorch_files import pickled, tensor, write_shards, zip_pt
from tests.state_dicts import state_dict_shapes

MODEL = create_model("DiCo", hidden_size=8, depth=(1, 1, 1, 1, 1), num_classes=3)
RNG = np.random.default_rng(0)
WEIGHTS = {
    key: RNG.normal(size=shape).astype(np.float32)
    for key, shape in state_dict_shapes(abstract_params(MODEL), KEY_MAPS["DiCo"]).items()
}


def everything(folder):
    """All files and folders, hidden ones too, with their contents."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def refused(folder, source, message, **options):
    """The conversion refuses `source`, and changes nothing in `folder`; the message."""
    before = everything(folder)
    with pytest.raises(UsageError, match=message) as caught:
        from_pytorch(str(folder / source), str(folder / "out"), **options)
    assert "\n" not in str(caught.value)
    assert everything(folder) == before
    return str(caught.value)


# Files.


def cut_short(path):
    write_pt(path, WEIGHTS)
    os.truncate(path, path.stat().st_size // 2)


def legacy(path):
    """As PyTorch 1.5 saved: pickles one after the other."""
    with open(path, "wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}):
            pickle.dump(part, file, protocol=2)


def zip_bomb(path):
    zip_pt(path, pickled(tensor((50 << 20,))), [bytes(200 << 20)], compression=zipfile.ZIP_DEFLATED)


def not_weights(path):
    write_pt(path, {"epoch": 3, "names": ["a"]})


def integers(path):
    write_pt(path, {k: v.astype(np.int64) for k, v in WEIGHTS.items()})


def scaled_table(path):
    table = np.zeros((1, 16, 12), np.float32)
    dit = create_model("DiT", hidden_size=12, depth=1, num_heads=3, num_classes=3)
    shapes = state_dict_shapes(abstract_params(dit), KEY_MAPS["DiT"])
    write_pt(path, {"pos_embed": table, **{k: np.zeros(s, "f4") for k, s in shapes.items()}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cut_short, "cut short|damaged"),
        (legacy, "the list of storages is refused"),
        (zip_bomb, "compressed|refused|larger"),
        (not_weights, "no tensors by name"),
        (integers, "weights must be floating-point numbers: x_embedder.proj.weight is int64"),
        (scaled_table, "pos_embed is not the fixed sine-cosine table"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.mkdir(), "is a folder or a device"),
        (lambda path: None, "cannot be opened: No such file"),
    ],
)
def test_files_that_are_no_weights(tmp_path, make, message):
    make(tmp_path / "a.pt")
    refused(tmp_path, "a.pt", message, num_heads=3 if make is scaled_table else None)


class Runs:
    """Pickles as a call of `function`, which PyTorch's default loading would make."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.system, "touch ran"), r"posix\.system"),
        (Runs(eval, "open('ran', 'w')"), r"builtins__?\.eval|builtin__\.eval"),
        (Runs(subprocess.Popen, ["touch", "ran"]), r"\.Popen"),
        (collections.Counter(), r"collections\.Counter"),
        (pathlib.PurePosixPath("x"), r"pathlib(\._local)?\.PurePosixPath"),  # Python 3.13: _local
    ],
)
def test_pickles_that_run_code(tmp_path, monkeypatch, value, name):
    monkeypatch.chdir(tmp_path)
    zip_pt(
        tmp_path / "a.pt",
        pickle.dumps({"model": {"a.w": value}, "ema": {"a.w": value}, "opt": {}}, protocol=2),
    )
    refused(tmp_path, "a.pt", name)
    assert not (tmp_path / "ran").exists()
    refused(tmp_path, "a.pt", name, training=True)
    with pytest.raises(UsageError, match=name):
        load_pytorch(tmp_path / "a.pt", MODEL)


@pytest.mark.parametrize("shard", ["../b.safetensors", "/etc/b.safetensors", "x/../b.safetensors"])
def test_index_that_names_files_outside_its_folder(tmp_path, shard):
    folder = tmp_path / "in"
    folder.mkdir()
    write_safetensors(tmp_path / "b.safetensors", WEIGHTS)
    index = {"metadata": {}, "weight_map": dict.fromkeys(WEIGHTS, shard)}
    (folder / "a.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "in/a.safetensors.index.json", "not a file in the index's own folder")


def test_index_that_has_lost_a_shard(tmp_path):
    """The index, too, says nothing of it: only the missing names do."""
    path = write_shards(tmp_path, WEIGHTS, 3)
    index = json.loads(path.read_text())
    lost = sorted(set(index["weight_map"].values()))[1]
    gone = [k for k, file in index["weight_map"].items() if file == lost]
    index["weight_map"] = {k: f for k, f in index["weight_map"].items() if f != lost}
    path.write_text(json.dumps(index))
    (tmp_path / lost).unlink()
    message = refused(tmp_path, path.name, "do not fit the model")
    assert all(f"missing {key}" in message for key in gone)


# Tensors.


def test_missing_extra_and_misshapen_tensors_are_all_listed(tmp_path):
    weights = dict(WEIGHTS)
    weights["latent.0.conv1.weights"] = weights.pop("latent.0.conv1.weight")
    del weights["final_layer.out_proj.bias"]
    weights["up2_1.body.0.weight"] = np.zeros((3, 3), np.float32)
    write_pt(tmp_path / "a.pt", weights)
    message = refused(tmp_path, "a.pt", "a.pt, read as DiCo: the weights do not fit the model")
    for part in (
        "missing latent.0.conv1.weight (closest: latent.0.conv1.weights)",
        "missing final_layer.out_proj.bias",
        "up2_1.body.0.weight is (3, 3) instead of (32, 16, 3, 3)",
        "unexpected latent.0.conv1.weights (closest: latent.0.conv1.weight)",
    ):
        assert part in message
    assert message.count(";") == 3
    with pytest.raises(UsageError, match=r"a\.pt: the weights do not fit the model: missing lat"):
        load_pytorch(tmp_path / "a.pt", MODEL)


def test_weights_of_another_model_than_was_said(tmp_path):
    write_pt(tmp_path / "a.pt", WEIGHTS)
    message = r"read as DiCo-S \(it looks like a DiCo\): the weights do not fit"
    refused(tmp_path, "a.pt", message, model="DiCo-S")
    refused(tmp_path, "a.pt", "--model=DiT-S/2: these are the weights of a DiCo", model="DiT-S/2")
    refused(tmp_path, "a.pt", "model.name='DiCo-SX' is unknown: use 'DiCo-S'", model="DiCo-SX")
    refused(tmp_path, "a.pt", "--num_classes=7 does not fit", num_classes=7)
    refused(tmp_path, "a.pt", "image_size=30 must be a multiple of 32", image_size=30)
    refused(tmp_path, "a.pt", "weights='params' is not one of", weights="params")
    refused(tmp_path, "a.pt", "has no ema weights", weights="ema")


# Optimizer states.


def training_checkpoint(**changes):
    moments = {
        i: {"step": np.float32(5), "exp_avg": v, "exp_avg_sq": v * v}
        for i, v in enumerate(WEIGHTS.values())
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    group |= {"params": list(range(len(WEIGHTS)))}
    opt = {"state": moments, "param_groups": [group]}
    args = argparse.Namespace(model="DiCo")
    return {"model": WEIGHTS, "ema": WEIGHTS, "opt": opt, "args": args} | changes


def change(tree, path, value):
    """A change of what is at `path` in a training checkpoint; None removes it."""
    *most, last = path
    for key in most:
        tree = tree[key]
    if value is None:
        del tree[last]
    else:
        tree[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("opt",), None, "no optimizer's state in the file .* without --training"),
        (("ema",), None, "has no ema weights; it has 'model', 'opt'"),
        (("opt", "state"), None, "no state and param_groups"),
        (("opt", "state", 3), None, "no state of t_embedder_1.mlp.0.bias"),
        (("opt", "state", 3, "exp_avg"), None, "no exp_avg of t_embedder_1.mlp.0.bias"),
        (("opt", "state", 3, "exp_avg_sq"), np.zeros(3), r"exp_avg_sq of .* is \(3,\), not \(8,\)"),
        (("opt", "state", 3, "step"), np.float32(6), "5 steps for .* and 6 for others"),
        (("opt", "state", 3, "step"), np.float32(np.nan), "step of .* is nan"),
        (("opt", "state", 3, "step"), np.zeros(2), "step of .* not a number"),
        (("opt", "state", 3, "step"), None, "step of .* not a number"),
        (("opt", "param_groups"), [{}, {}], "2 groups of parameters"),
        (("opt", "param_groups", 0, "params"), [0, 1], "2 parameters and the model 99"),
        (("opt", "param_groups", 0, "betas"), None, "options are not AdamW's"),
        (("opt", "param_groups", 0, "amsgrad"), True, "amsgrad=True, which Optax's AdamW lacks"),
        (("opt", "param_groups", 0, "lr"), -1.0, "optimizer.learning_rate=-1.0 must be"),
    ],
)
def test_states_that_cannot_go_on(tmp_path, path, value, message):
    tree = training_checkpoint()
    change(tree, path, value)
    write_pt(tmp_path / "a.pt", tree)
    refused(tmp_path, "a.pt", message, training=True)


def test_options_of_an_optimizer_may_be_arrays():
    numbers = {"lr": np.array([1e-4]), "betas": [np.float64(0.9), np.array(0.5, np.float32)]}
    found = optimizer_state._options(numbers | {"eps": np.float32(0), "weight_decay": 0})
    assert list(found.values()) == [1e-4, 0.9, 0.5, 0, 0]


def test_all_problems_of_a_state_are_listed(tmp_path):
    tree = training_checkpoint()
    change(tree, ("opt", "state", 0), None)
    change(tree, ("opt", "state", 5, "exp_avg"), np.zeros(1))
    write_pt(tmp_path / "a.pt", tree)
    message = refused(tmp_path, "a.pt", "state does not fit the model", training=True)
    assert "no state of x_embedder.proj.weight" in message
    assert "exp_avg of t_embedder_1.mlp.2.bias is (1,), not (8,)" in message
    from_pytorch(tmp_path / "a.pt", tmp_path / "out")  # its weights alone are good


# Places.


@pytest.fixture
def good(tmp_path):
    """A folder with a good file and its checkpoint."""
    write_pt(tmp_path / "a.pt", WEIGHTS)
    from_pytorch(tmp_path / "a.pt", tmp_path / "ckpt")
    return tmp_path


def refused_out(folder, out, message, **options):
    before = everything(folder)
    with pytest.raises(UsageError, match=message):
        to_pytorch(str(folder / "ckpt"), str(folder / out), **options)
    assert everything(folder) == before


def test_what_is_there_is_not_overwritten(good):
    refused_out(good, "a.pt", "--out=.*a.pt exists: give another name")
    refused_out(good, "ckpt", "name a .pt, .pth or .safetensors file")
    refused_out(good, "b.txt", "name a .pt, .pth or .safetensors file")
    refused_out(good, "b.safetensors", "name a .pt", training=True)
    refused_out(good, "no/b.pt", "there is no folder .*no, make it first")
    refused_out(good, "a.pt", "a.pt exists", step=3)  # the place comes first
    refused_out(good, "b.pt", "--step=3: .* has steps 0", step=3)
    refused_out(good, "b.pt", "--weights=params: .* has only ema", weights="params")
    for out, message in [
        ("ckpt", "--out=.*ckpt exists: give another name"),
        ("a.pt", "--out=.*a.pt exists: give another name"),
        ("no/b", "there is no folder .*no, make it first"),
    ]:
        with pytest.raises(UsageError, match=message):
            from_pytorch(good / "a.pt", good / out)
    (good / "empty").mkdir()
    from_pytorch(good / "a.pt", good / "empty")  # an empty folder is as good as none
    assert (good / "empty" / "config.json").exists()


def test_checkpoints_that_are_none(good):
    for ckpt, message in [("nowhere", "no such folder"), ("a.pt", "no such folder")]:
        with pytest.raises(UsageError, match=f"--ckpt=.*{ckpt}: {message}"):
            to_pytorch(str(good / ckpt), str(good / "b.pt"))
    meta = good / "ckpt" / "checkpoints" / "0" / "meta" / "metadata"
    config = json.loads(meta.read_text())
    config["config"]["model"]["hidden_size"] = 4
    assert config.pop("checksums") == "crc32"  # those of now would find the change
    (meta.parents[1] / "checksums.json").unlink()
    meta.write_text(json.dumps(config))
    refused_out(
        good,
        "b.pt",
        r"not those of the config's model: decoder_level_1.0.adaLN_modulation.1.bias is \(",
    )


def test_full_disks(good, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(9, 9, 1000))
    refused_out(good, "b.pt", "needs about .* GB, and .* GB are free")
    refused(good, "a.pt", "needs about .* GB, and .* GB are free")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failures_while_writing_leave_nothing(good, monkeypatch, error):
    """When the disk fills up after half of it, or the user stops it."""
    calls = []

    def fails(self, key, values):
        calls.append(key)
        if len(calls) > 50:
            raise error

    monkeypatch.setattr(conversion.Health, "look", fails)
    before = everything(good)
    wanted = UsageError if isinstance(error, OSError) else KeyboardInterrupt
    for convert, source, out in [
        (from_pytorch, "a.pt", "out"),
        (to_pytorch, "ckpt", "b.pt"),
        (to_pytorch, "ckpt", "b.safetensors"),
    ]:
        calls.clear()
        with pytest.raises(wanted):
            convert(str(good / source), str(good / out))
        assert len(calls) > 50
        assert everything(good) == before


def test_damage_in_the_middle_of_a_file_leaves_nothing(tmp_path):
    """The structure is whole and a tensor is not, which shows when it is read."""
    write_pt(tmp_path / "a.pt", WEIGHTS)
    data = bytearray((tmp_path / "a.pt").read_bytes())
    value = WEIGHTS["decoder_level_1.0.conv5.weight"].tobytes()
    data[data.find(value) + 100] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    refused(tmp_path, "a.pt", "is damaged: the checksum of .* does not match")


def test_damage_in_the_middle_of_a_run_leaves_nothing(tmp_path):
    """Of several trees that are written side by side, the writers of all have ended."""
    write_pt(tmp_path / "good.pt", training_checkpoint())
    data = (tmp_path / "good.pt").read_bytes()
    value = WEIGHTS["decoder_level_1.0.conv5.weight"]
    for raw in (value.tobytes(), (value * value).tobytes()):
        place = data.rindex(raw) + 100
        (tmp_path / "a.pt").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        refused(tmp_path, "a.pt", "is damaged: the checksum of .* does not match", training=True)
    time.sleep(1)
    assert not list(tmp_path.glob(".*"))


def test_a_terminated_conversion_leaves_nothing(tmp_path):
    """SIGTERM, as schedulers send it, in the middle of writing."""
    model = create_model("DiCo", hidden_size=96, depth=(2, 2, 2, 2, 2))
    shapes = state_dict_shapes(abstract_params(model), KEY_MAPS["DiCo"])
    zeros = {k: Deferred(np.float32, s, lambda s=s: np.ones(s, "f4")) for k, s in shapes.items()}
    write_pt(tmp_path / "a.pt", zeros)
    process = subprocess.Popen(
        [sys.executable, "-m", "dico_jax.convert", "from_pytorch", f"--input={tmp_path / 'a.pt'}",
         f"--out={tmp_path / 'out'}"],
        cwd=pathlib.Path(__file__).parents[1], stderr=subprocess.PIPE,
    )  # fmt: skip
    while process.poll() is None and not list(tmp_path.glob(".out.*.tmp/checkpoints/*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 0)  # 0 where it was quicker than we are
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == (["a.pt", "out"] if process.returncode == 0 else ["a.pt"])


def test_the_command_ends_with_one_line_and_status_2(tmp_path):
    cut_short(tmp_path / "a.pt")
    done = call(
        "dico_jax.convert",
        "from_pytorch",
        f"--input={tmp_path / 'a.pt'}",
        f"--out={tmp_path / 'out'}",
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'a.pt'}")
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_mutated_files_are_refused_or_converted_rightly(tmp_path):
    """The whole way, with bytes changed anywhere: a clean error and nothing left, or true weights.

    What the readers make of a thousand mutations is in test_pytorch_files_fuzz.py.
    """
    write_pt(tmp_path / "good.pt", WEIGHTS)
    data, rng, converted = (tmp_path / "good.pt").read_bytes(), np.random.default_rng(1), 0
    places = np.concatenate([rng.integers(0, 30_000, 15), rng.integers(0, len(data), 15)])
    for place in places:
        mutated = bytearray(data)
        mutated[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.pt").write_bytes(mutated)
        try:
            from_pytorch(tmp_path / "a.pt", tmp_path / "out")
        except UsageError:
            assert not (tmp_path / "out").exists()
            continue
        converted += 1
        to_pytorch(tmp_path / "out", tmp_path / "back.pt")
        with open_tensors(tmp_path / "back.pt") as file:
            for key, ref in file.tensors.items():
                assert ref.read().tobytes() == WEIGHTS[key].tobytes()
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "back.pt").unlink()
    assert not list(tmp_path.glob(".*"))
    assert converted < len(places) / 2
