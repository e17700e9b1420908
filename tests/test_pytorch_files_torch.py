"""The files against PyTorch itself, where it is installed."""

import argparse
import collections

import numpy as np
import pytest

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
from tests.pytorch_files import assert_same

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

SHAPES = [(), (1,), (0,), (0, 3), (2, 0, 5), (3, 4), (2, 3, 4, 5)]


def raw(tensor):
    """A tensor's bytes, whatever its dtype."""
    return tensor.detach().contiguous().clone().reshape(-1).view(torch.uint8).numpy().tobytes()


def example(name, shape):
    """A tensor of any bits, but 0 or 1 for bool."""
    dtype = getattr(torch, name)
    size = int(np.prod(shape))
    rng = np.random.default_rng([len(name), *shape])
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, shape).astype(bool)).reshape(shape)
    data = bytearray(rng.bytes(size * dtype.itemsize))
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def assert_equals_torch(array, tensor):
    assert array.dtype == DTYPES[str(tensor.dtype).removeprefix("torch.")]
    assert array.shape == tuple(tensor.shape)
    assert array.tobytes() == raw(tensor)


# Ours, read by PyTorch.


def test_torch_load_reads_all_dtypes_and_shapes(tmp_path):
    wanted = {f"{name}{list(s)}": example(name, s) for name in DTYPES for s in SHAPES}
    arrays = {
        key: np.frombuffer(raw(t), DTYPES[str(t.dtype).removeprefix("torch.")]).reshape(t.shape)
        for key, t in wanted.items()
    }
    path = tmp_path / "ours.pt"
    write_pt(path, arrays)
    for options in ({}, {"mmap": True}):
        found = torch.load(path, weights_only=True, **options)
        assert list(found) == list(wanted)
        for key, tensor in found.items():
            assert tensor.dtype == wanted[key].dtype
            assert tensor.shape == wanted[key].shape
            assert tensor.stride() == torch.empty(tensor.shape).stride()
            assert raw(tensor) == raw(wanted[key])


def test_torch_load_reads_values_of_all_kinds(tmp_path):
    tree = {
        "nested": [None, True, False, (1, -2, 255, 65536, 2**40, -(2**40), 10**30), {}, [], ()],
        "floats": [1.5, -0.0, float("inf")],
        "texts": ["", "ü😀\n"],
        "ordered": collections.OrderedDict([("z", 1), ("a", 2)]),
        0: {"lr": 1e-4, "betas": (0.9, 0.999)},
    }
    write_pt(tmp_path / "ours.pt", {**tree, "dtype": np.dtype("float16")})
    found = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert found.pop("dtype") == torch.float16
    assert found == tree
    assert type(found["ordered"]) is collections.OrderedDict
    assert list(found["ordered"]) == ["z", "a"]


def test_tensors_do_not_share_memory_after_loading(tmp_path):
    same = np.zeros(4, np.float32)
    write_pt(tmp_path / "ours.pt", {"model": {"w": same}, "ema": {"w": same}})
    found = torch.load(tmp_path / "ours.pt", weights_only=True)
    found["model"]["w"] += 1
    assert found["ema"]["w"].sum() == 0


def test_state_dict_loads_strictly(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.GELU())
    arrays = {k: v.numpy() for k, v in net.state_dict().items()}
    lazy = {k: Deferred(v.dtype, v.shape, lambda v=v: v) for k, v in arrays.items()}
    write_pt(tmp_path / "ours.pt", lazy)
    again = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.GELU())
    found = torch.load(tmp_path / "ours.pt", weights_only=True)
    again.load_state_dict(found, strict=True)
    assert list(found) == list(net.state_dict())
    for key, value in again.state_dict().items():
        assert_same(value.numpy(), arrays[key])


@golden.requires_golden
def test_golden_training_checkpoint_through_ours(tmp_path):
    source = golden.FOLDER / "train_checkpoint.pt"
    with open_tensors(source) as file:
        write_pt(tmp_path / "ours.pt", file.tree)
    with pytest.raises(Exception, match="Namespace"):
        torch.load(tmp_path / "ours.pt", weights_only=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        ours = torch.load(tmp_path / "ours.pt", weights_only=True)
        theirs = torch.load(source, weights_only=True, map_location="cpu")
    assert list(ours) == list(theirs)
    assert ours["args"] == theirs["args"]
    for part in ("model", "ema"):
        assert list(ours[part]) == list(theirs[part])
        assert all(torch.equal(ours[part][k], v) for k, v in theirs[part].items())
    # The optimizer takes it, and the next step is the same.
    steps = []
    for checkpoint in (ours, theirs):
        params = [torch.nn.Parameter(p.clone()) for p in checkpoint["model"].values()]
        opt = torch.optim.AdamW(params, lr=1e-3)
        opt.load_state_dict(checkpoint["opt"])
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        steps.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


def test_safetensors_of_ours(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    names = [n for n in DTYPES if not n.startswith("uint") or n == "uint8"]
    wanted = {f"{name}{list(s)}": example(name, s) for name in names for s in SHAPES}
    with_arrays = {
        key: np.frombuffer(raw(t), DTYPES[str(t.dtype).removeprefix("torch.")]).reshape(t.shape)
        for key, t in wanted.items()
    }
    write_safetensors(tmp_path / "ours.safetensors", with_arrays)
    found = library.load_file(tmp_path / "ours.safetensors")
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
        assert raw(found[key]) == raw(tensor)
    library.save_file(wanted, tmp_path / "theirs.safetensors")
    with open_tensors(tmp_path / "theirs.safetensors") as file:
        for key, tensor in wanted.items():
            assert_equals_torch(file.tensors[key].read(), tensor)


# PyTorch's, read by ours.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_save_of_all_dtypes_and_shapes(tmp_path, protocol):
    wanted = {f"{name}{list(s)}": example(name, s) for name in DTYPES for s in SHAPES}
    torch.save(wanted, tmp_path / "theirs.pt", pickle_protocol=protocol)
    with open_tensors(tmp_path / "theirs.pt") as file:
        assert list(file.tensors) == list(wanted)
        for key, tensor in wanted.items():
            assert_equals_torch(file.tensors[key].read(), tensor)


def test_torch_save_of_views(tmp_path):
    base = torch.arange(120.0).reshape(4, 5, 6)
    wanted = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "sliced": base[1:, ::2, 3],
        "expanded": base[0, 0].expand(7, 6),
        "channels_last": base[None].contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base[2]),
        "diagonal": base[0].diagonal(),
        "scalar": base[3, 4, 5],
    }
    torch.save(wanted, tmp_path / "theirs.pt")
    with open_tensors(tmp_path / "theirs.pt") as file:
        for key, tensor in wanted.items():
            assert_equals_torch(file.tensors[key].read(), tensor)


def test_torch_save_of_modules_and_optimizers(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net(torch.randn(5, 3)).square().mean().backward()
    opt.step()
    tree = {
        "model": net.state_dict(),
        "ema": torch.nn.DataParallel(net).state_dict(),
        "opt": opt.state_dict(),
        "args": argparse.Namespace(lr=1e-3, size=torch.Size([3, 4]), dtype=torch.bfloat16),
    }
    torch.save(tree, tmp_path / "theirs.pt")
    with open_tensors(tmp_path / "theirs.pt") as file:
        for source in ("model", "ema"):
            found = select_weights(file, source)
            assert found.source == source
            arrays = {key: t for key, t in net.state_dict().items() if t.ndim}
            assert list(found.tensors) == list(arrays)
            for key, tensor in arrays.items():
                assert_equals_torch(found.tensors[key].read(), tensor)
        state = file.tree["opt"]["state"]
        assert state[0]["step"].read() == 1
        assert_equals_torch(state[1]["exp_avg"].read(), opt.state_dict()["state"][1]["exp_avg"])
        assert file.tree["opt"]["param_groups"] == opt.state_dict()["param_groups"]
        assert file.tree["args"].size == (3, 4)
        assert file.tree["args"].dtype == DTYPES["bfloat16"]


def test_torch_save_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "theirs.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with open_tensors(tmp_path / "theirs.pt") as file:
        assert file.tensors["a"].read().sum() == 3


def test_torch_save_of_what_is_refused(tmp_path):
    net = torch.nn.Linear(2, 2)
    conj = torch.ones(2, dtype=torch.float32)._neg_view()
    cases = {
        "torch.nn.modules.linear.Linear": net,
        "torch._utils._rebuild_sparse_tensor": torch.eye(3).to_sparse(),
        "torch.ComplexFloatStorage": torch.ones(2, dtype=torch.complex64),
        "torch.device": torch.device("cuda", 0),
        "metadata": conj,
    }
    for part, value in cases.items():
        torch.save({"a.w": value}, tmp_path / "theirs.pt")
        with (
            open_tensors(tmp_path / "theirs.pt") as file,
            pytest.raises(UsageError, match=r"theirs\.pt") as error,
        ):
            select_weights(file)
        assert part in str(error.value)
    torch.save(net.state_dict(), tmp_path / "theirs.pt", _use_new_zipfile_serialization=False)
    with open_tensors(tmp_path / "theirs.pt") as file:  # of before version 1.6: read all the same
        for key, value in net.state_dict().items():
            assert_equals_torch(file.tensors[key].read(), value)


def test_torch_save_of_what_is_beside_weights(tmp_path):
    parameter, buffer = torch.nn.Parameter(torch.ones(2)), torch.nn.Buffer(torch.ones(3))
    parameter.note = buffer.note = "mine"
    tree = {
        "model": {"a.w": parameter, "a.b": buffer},
        "rng": [torch.get_rng_state(), np.arange(3), np.float64(1)],
        "device": torch.device("cuda", 0),
        "storage": torch.ones(2).untyped_storage(),
        "dtypes": {torch.complex64, torch.float32},
    }
    for legacy in (False, True):
        torch.save(tree, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        with open_tensors(tmp_path / "x.pt") as file:
            found = select_weights(file).tensors
            assert {key: ref.read().sum() for key, ref in found.items()} == {"a.w": 2, "a.b": 3}


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "theirs.pt")
    with pytest.raises(UsageError, match="TorchScript"):
        open_tensors(tmp_path / "theirs.pt")


def test_ours_on_both_sides_of_the_zip64_limits(tmp_path, monkeypatch):
    monkeypatch.setattr("dico_jax.pytorch.torch_format._ZIP64_FROM", 100)
    tree = {str(i): np.full(i, i, np.float32) for i in range(0, 60, 7)}
    write_pt(tmp_path / "ours.pt", tree)
    found = torch.load(tmp_path / "ours.pt", weights_only=True)
    with open_tensors(tmp_path / "ours.pt") as file:
        for key, value in tree.items():
            assert_same(found[key].numpy(), value)
            assert_same(file.tensors[key].read(), value)
