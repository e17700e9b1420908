"""Files of Inception's weights: read in all their forms, converted, downloaded, or refused."""

import hashlib
import io
import struct

import flax
import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.evaluation import inception_weights
from dico_jax.evaluation.inception_weights import (
    FILE_NAMES,
    KEY_MAP,
    convert_inception,
    load_inception,
    state_shapes,
)
from dico_jax.pytorch.key_maps import entries
from dico_jax.pytorch.torch_files import open_tensors, write_pt, write_safetensors
from tests import commands
from tests.pytorch_files import (
    HOOKS,
    REBUILD,
    assert_same,
    number,
    numbers,
    pickled,
    text,
    tuple_of,
)

CONV, BN, FC = "Mixed_6b.branch7x7_2.conv.weight", "Mixed_6b.branch7x7_2.bn", "fc.weight"


def torch_shapes():
    tree = {k: np.empty(s, np.int8) for k, s in state_shapes().items()}
    found = entries(flax.traverse_util.unflatten_dict(tree, sep="/"), KEY_MAP)
    return {entry.key: entry.torch_shape for entry in found}


def weights(**changes):
    """A state dict of small numbers, quickly made; float16, so that files are small."""
    rng = np.random.default_rng(0)
    found = {}
    for key, shape in torch_shapes().items():
        low = 0.5 if key.endswith("running_var") else -0.1
        found[key] = np.resize(rng.uniform(low, 1, 1009), shape).astype(np.float16)
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "good.pth"
    write_pt(path, weights())
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_params(found, state):
    """Batch norm is folded, by the formula; kernels lie as HWIO."""
    layer = found["Mixed_6b"]["branch7x7_2"]
    names = ("weight", "bias", "running_mean", "running_var")
    scale, bias, mean, var = (state[f"{BN}.{name}"].astype(np.float64) for name in names)
    factor = scale / np.sqrt(var + 1e-3)
    kernel = state[CONV].transpose(2, 3, 1, 0) * factor
    assert layer["kernel"].shape == (1, 7, 128, 128)
    np.testing.assert_allclose(layer["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(layer["bias"], bias - mean * factor, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found["fc"]["kernel"], state[FC].T)


def test_a_file_of_other_weights_is_taken_and_named(good):
    found = load_inception(good)
    assert_params(found.params, weights())
    assert found.digest == sha256(good)
    assert not found.is_published
    leaves = flax.traverse_util.flatten_dict(found.params).values()
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    # In float64 nothing is rounded after the folding.
    layer = load_inception(good, dtype=np.float64).params["Mixed_6b"]["branch7x7_2"]
    assert np.abs(layer["kernel"] - layer["kernel"].astype(np.float32)).max() > 0


def test_other_forms(good, tmp_path):
    state = weights(**{f"{BN}__num_batches_tracked": np.asarray(3)})
    write_safetensors(tmp_path / "a.safetensors", {f"module.{k}": v for k, v in state.items()})
    found = load_inception(tmp_path / "a.safetensors")
    assert_params(found.params, state)
    assert found.digest == sha256(tmp_path / "a.safetensors")


# The format from before PyTorch 1.6, of which the published file is.


def legacy(path, state, keys=None, tail=b"", view=b"N", count=None, system=None):
    """Writes a state dict as torch.save did; arguments spoil it."""
    body, storages = b"ccollections\nOrderedDict\n)R(", {}
    for i, (name, value) in enumerate(state.items()):
        key = str(94000 + i)
        storages[key] = value
        pid = text("storage") + b"ctorch\nHalfStorage\n" + text(key) + text("cpu")
        pid = b"(" + pid + number(value.size) + view + b"tQ"
        strides = np.array(value.strides) // value.itemsize
        args = pid + number(0) + numbers(value.shape) + numbers(map(int, strides)) + b"\x89" + HOOKS
        body += text(name) + REBUILD + b"(" + args + b"tR"
    out = io.BytesIO()
    out.write(pickled(b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"))
    out.write(pickled(b"M" + struct.pack("<H", 1001)))
    out.write(pickled(b"}(" + text("little_endian") + (system or b"\x88") + b"u"))
    out.write(pickled(body + b"u"))
    keys = list(storages) if keys is None else keys
    out.write(pickled(b"](" + b"".join(map(text, keys)) + b"e"))
    for key in keys:
        value = storages.get(key, np.zeros(1, np.float16))
        out.write(struct.pack("<q", value.size if count is None else count) + value.tobytes())
    path.write_bytes(out.getvalue() + tail)
    return path


def test_the_format_of_the_published_file(good, tmp_path, monkeypatch):
    path = legacy(tmp_path / FILE_NAMES[0], weights())
    found, direct = load_inception(path), load_inception(good)
    flat, wanted = (flax.traverse_util.flatten_dict(w.params) for w in (found, direct))
    assert flat.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_same(flat[key], value)
    assert found.digest == sha256(path)
    assert not found.is_published
    monkeypatch.setattr(inception_weights, "PUBLISHED_SHA256", sha256(path))
    assert load_inception(path).is_published


SMALL = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(2, np.float16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": ["94000"]}, "its list of storages is not of those it uses"),
        ({"keys": ["94000", "1"]}, "its list of storages is not of those it uses"),
        ({"count": 7}, "is damaged: the size of storage '94000'"),
        ({"tail": b"x"}, "its storages end at byte"),
        ({"view": tuple_of(text("v"), number(0), number(1))}, "is refused: a persistent id"),
        ({"system": b"\x89"}, "not of a little-endian machine"),
    ],
)
def test_damaged_legacy_files(changes, message, tmp_path):
    path = legacy(tmp_path / "a.pth", SMALL, **changes)
    with pytest.raises(UsageError, match=f"^--inception={path}: .*{message}"):
        load_inception(path)


@pytest.mark.parametrize("length", [0, 16, 17, 30, 80, 200, -3])
def test_legacy_files_cut_short(length, tmp_path):
    path = legacy(tmp_path / "a.pth", SMALL)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UsageError, match=f"^--inception={path}: ") as caught:
        load_inception(path)
    assert "\n" not in str(caught.value)


def test_legacy_files_run_no_code(tmp_path):
    path = legacy(tmp_path / "a.pth", SMALL)
    data = path.read_bytes().replace(b"ctorch\nHalfStorage\n", b"cos\nsystem\n")
    path.write_bytes(data)
    with pytest.raises(UsageError, match="its list of storages is not of those it uses"):
        load_inception(path)


# Refused.


def torchvision():
    shapes = torch_shapes() | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    shapes |= {"AuxLogits.fc.weight": (1000, 768), "AuxLogits.fc.bias": (1000,)}
    return {key: np.zeros(shape, np.float16) for key, shape in shapes.items()}


def spoiled(key, value):
    found = weights()[key].copy()
    found.flat[3] = value
    return weights() | {key: found}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: weights(**{CONV: None}), f"missing {CONV}"),
        (lambda: weights(what=np.ones(3, np.float16)), "unexpected what"),
        (
            lambda: weights(**{CONV: np.ones((128, 128, 7, 1), np.float16)}),
            rf"{CONV} is \(128, 128, 7, 1\) instead of \(128, 128, 1, 7\)",
        ),
        (torchvision, r"it is torchvision's Inception \(1000 classes\)"),
        (lambda: {"x_embedder.weight": np.ones(3)}, "it is no Inception network: 1 tensors such"),
        (lambda: {"epoch": 3}, "no tensors by name"),
        (lambda: spoiled(CONV, np.nan), "weights are NaN or infinite.*: Mixed_6b/branch7x7_2/kern"),
        (lambda: spoiled(FC, np.inf), "weights are NaN or infinite.*: fc/kernel"),
        (lambda: spoiled(f"{BN}.running_var", -1), "variances negative: Mixed_6b/branch7x7_2/kern"),
        (lambda: weights(**{CONV: np.ones((128, 128, 1, 7), np.int8)}), "must be floating-point"),
    ],
)
def test_other_weights(state, message, tmp_path):
    path, out = tmp_path / "a.pth", tmp_path / "out.safetensors"
    write_pt(path, state())
    for run, flag in (
        (lambda: load_inception(path), "--inception"),
        (lambda: load_inception(path, flag="config.eval.inception"), "config.eval.inception"),
        (lambda: convert_inception(path, out), "--input"),
    ):
        with pytest.raises(UsageError, match=f"^{flag}={path}: .*{message}") as caught:
            run()
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("data", [None, b"", b"PK\3\4", b"<html>", b"\x89PNG\r\n\x1a\n" * 9])
def test_files_that_are_no_weights(data, tmp_path):
    path = tmp_path / "a.pth"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=f"^--inception={path}: "):
        load_inception(path)


# Conversion.


def test_conversion_by_the_command(good, tmp_path, monkeypatch):
    out = tmp_path / "a.safetensors"
    done = commands.call("dico_jax.convert", "inception", f"--input={good}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert f"23,885,392 numbers, other weights (sha256 {sha256(good)})" in done.stdout
    assert f"{out} is written" in done.stdout
    found, direct = load_inception(out), load_inception(good)
    assert found.digest == direct.digest == sha256(good)
    flat, wanted = (flax.traverse_util.flatten_dict(w.params) for w in (found, direct))
    for key, value in wanted.items():
        assert_same(flat[key], value)
    with open_tensors(out) as file:
        assert file.metadata["format"] == "dico_jax.Inception"
        assert file.metadata["source_name"] == "good.pth"
    # The digest of the source is what makes weights the published ones.
    monkeypatch.setattr(inception_weights, "PUBLISHED_SHA256", sha256(good))
    assert load_inception(out).is_published
    # And converted once more, nothing changes.
    again = tmp_path / "b.safetensors"
    assert "the published weights" in convert_inception(out, again)
    assert load_inception(again).is_published
    for args, message in [
        ((f"--input={good}", f"--out={out}"), f"--out={out} exists"),
        ((f"--input={good}", "--out=a.npz"), "--out=a.npz: name a .safetensors file"),
        ((f"--input={good}", "--out=x.safetensors", "--step=3"), "--step is for to_pytorch"),
        ((f"--input={tmp_path}/no", "--out=x.safetensors"), f"--input={tmp_path}/no: cannot be op"),
    ]:
        done = commands.call("dico_jax.convert", "inception", *args, cwd=tmp_path)
        commands.assert_refused(done, message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "dico_jax.Inception.2"},
        {"tensors": {"fc/bias": np.ones(1008, "f4")}},
        {"tensors": {"what": np.ones(8, "f4")}},
    ],
)
def test_converted_files_that_were_changed(changes, good, tmp_path):
    out = tmp_path / "a.safetensors"
    convert_inception(good, out)
    with open_tensors(out) as file:
        tensors = {k: v.read() for k, v in file.tensors.items()} | changes.pop("tensors", {})
        metadata = file.metadata | changes
    write_safetensors(out, tensors, metadata)
    with pytest.raises(UsageError, match=f"^--inception={out}: .*it is damaged, was changed, or"):
        load_inception(out)


# The published file.


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The cache folder, and the folder of torch.hub; both absent."""
    monkeypatch.setenv("DICO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache", tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def released(good, monkeypatch):
    """`good` is what was published, and lies at the address of the release."""
    monkeypatch.setattr(inception_weights, "URL", good.as_uri())
    monkeypatch.setattr(inception_weights, "PUBLISHED_SHA256", sha256(good))
    return good


def test_download(folders, released, monkeypatch):
    assert load_inception(None).is_published
    cache, _ = folders
    assert [p.name for p in cache.iterdir()] == [FILE_NAMES[0]]
    assert (cache / FILE_NAMES[0]).read_bytes() == released.read_bytes()
    # It is not downloaded again.
    monkeypatch.setattr(inception_weights, "URL", "file:///nowhere")
    assert load_inception(None).is_published


@pytest.mark.parametrize("name", FILE_NAMES)
def test_the_cache_of_torch_hub(name, folders, released, monkeypatch):
    monkeypatch.setattr(inception_weights, "URL", "file:///nowhere")
    cache, hub = folders
    hub.mkdir(parents=True)
    (hub / name).write_bytes(released.read_bytes())
    assert load_inception(None).is_published
    assert not cache.exists()


def test_a_download_of_something_else(folders, good, monkeypatch):
    monkeypatch.setattr(inception_weights, "URL", good.as_uri())
    cache, _ = folders
    with pytest.raises(UsageError) as caught:
        load_inception(None)
    for part in (good.as_uri(), str(cache / FILE_NAMES[0]), sha256(good), "6726825d0af5f729cebd58"):
        assert part in str(caught.value)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("where", [0, 1])
def test_damaged_files_in_the_caches(where, folders):
    path = folders[where] / FILE_NAMES[where]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half of it")
    with pytest.raises(UsageError, match=f"^{path} is damaged.*should be 6726825d.*; remove it"):
        load_inception(None)
    assert path.exists()


def test_no_network(folders, monkeypatch):
    cache, _ = folders
    monkeypatch.setattr(inception_weights, "URL", "http://localhost:9/weights.pth")
    message = f"^--inception is not given, and http.*put this file into {cache}, or give it by --i"
    with pytest.raises(UsageError, match=message) as caught:
        load_inception(None)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written(folders, released):
    folders[0].write_text("a file")
    with pytest.raises(UsageError, match="^--inception is not given, and .*cache"):
        load_inception(None)


@pytest.mark.parametrize("variables", [{"XDG_CACHE_HOME": "/x"}, {"HOME": "/h"}])
def test_where_the_caches_are(variables, monkeypatch):
    for name in ("DICO_JAX_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    base = "/x" if "XDG_CACHE_HOME" in variables else "/h/.cache"
    assert str(inception_weights.cache_folder()) == f"{base}/dico_jax"
    assert str(inception_weights._folder("TORCH_HOME", "torch")) == f"{base}/torch"
