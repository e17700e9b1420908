"""The conversion against PyTorch itself, where it is installed."""

import argparse
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dico_jax.checkpoints.checkpointer import Checkpointer
from dico_jax.checkpoints.state import TrainState
from dico_jax.config import DEFAULTS
from dico_jax.models import abstract_params, create_model
from dico_jax.parallel.mesh import create_mesh, replicated
from dico_jax.pytorch.conversion import from_pytorch, to_pytorch
from dico_jax.pytorch.key_maps import KEY_MAPS
from dico_jax.training.optimizer import create_optimizer
from tests import golden
from tests.state_dicts import from_state_dict, state_dict_shapes, to_state_dict

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

DICO = {"hidden_size": 8, "depth": (1, 2, 1, 1, 1), "num_classes": 3}
DIT = {"hidden_size": 12, "depth": 2, "num_heads": 3, "patch_size": 2, "num_classes": 3}
LR, BETAS, EPS = 1e-3, (0.9, 0.99), 1e-7


class Skeleton(torch.nn.Module):
    """Modules and parameters of the published names, in their order, without a forward pass."""

    def __init__(self, shapes, fixed=()):
        super().__init__()
        for key, shape in shapes.items():
            *path, name = key.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            value = torch.nn.Parameter(torch.randn(*shape), requires_grad=key not in fixed)
            module.register_parameter(name, value)


def skeleton(family, options):
    torch.manual_seed(0)
    shapes = state_dict_shapes(abstract_params(create_model(family, **options)), KEY_MAPS[family])
    if family == "DiCo":
        return Skeleton(shapes)
    from dico_jax.models.dit import position_embedding

    module = Skeleton({"pos_embed": (1, 16, options["hidden_size"]), **shapes}, {"pos_embed"})
    table = position_embedding(4, 4, options["hidden_size"]).astype(np.float32)[None]
    module.pos_embed.data = torch.from_numpy(table)
    return module


def assert_same_state(found, wanted):
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
        assert found[key].dtype == value.dtype


@golden.requires_golden
@pytest.mark.parametrize(("name", "num_heads"), [("dico_tiny", None), ("dit_tiny", 4)])
def test_published_weights_load_strictly(name, num_heads, tmp_path):
    source = golden.FOLDER / f"{name}.pt"
    from_pytorch(source, tmp_path / "ckpt", num_heads=num_heads)
    to_pytorch(tmp_path / "ckpt", tmp_path / "a.pt")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    wanted = torch.load(source, weights_only=True, map_location="cpu")
    assert_same_state(found, wanted)
    module = Skeleton({k: tuple(v.shape) for k, v in wanted.items()})
    assert list(module.state_dict()) == list(found)
    module.load_state_dict(found, strict=True)
    to_pytorch(tmp_path / "ckpt", tmp_path / "a.safetensors")
    safetensors = pytest.importorskip("safetensors.torch")
    module.load_state_dict(safetensors.load_file(tmp_path / "a.safetensors"), strict=True)
    assert_same_state(module.state_dict(), wanted)


@golden.requires_golden
def test_keys_of_a_published_model_load_strictly(tmp_path):
    """DiCo-S, whose keys and shapes are recorded from the published code."""
    recorded = json.loads((golden.FOLDER / "state_dict_keys.json").read_text())["DiCo-S"]
    module = Skeleton({key: tuple(shape) for key, shape in recorded.items()})
    torch.save(module.state_dict(), tmp_path / "a.pt")
    assert from_pytorch(tmp_path / "a.pt", tmp_path / "ckpt").startswith("DiCo-S, 33,137,672")
    to_pytorch(tmp_path / "ckpt", tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt", weights_only=True, mmap=True)
    assert_same_state(found, module.state_dict())
    Skeleton({k: tuple(s) for k, s in recorded.items()}).load_state_dict(found, strict=True)


def trained(family, options, path, steps=3):
    """A module after some AdamW steps and its optimizer, saved as the released script does."""
    module = skeleton(family, options)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1
    )
    for _ in range(steps):
        step(module, optimizer)
    ema = {k: v.clone() * 0.5 if k != "pos_embed" else v for k, v in module.state_dict().items()}
    args = argparse.Namespace(model=family, image_size=64, lr=LR, ckpt=None, names=["a", "b"])
    checkpoint = {"model": module.state_dict(), "ema": ema, "opt": optimizer.state_dict()}
    torch.save({**checkpoint, "args": args}, path)
    return module, optimizer, checkpoint


def step(module, optimizer):
    """A step with random gradients; they by name."""
    gradients = {}
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.grad = gradients[key] = torch.randn_like(parameter)
    optimizer.step()
    return {k: v.numpy() for k, v in gradients.items()}


@pytest.mark.parametrize(("family", "options"), [("DiCo", DICO), ("DiT", DIT)])
def test_runs_go_to_jax_and_back(family, options, tmp_path):
    module, optimizer, checkpoint = trained(family, options, tmp_path / "a.pt")
    run = tmp_path / "run"
    from_pytorch(tmp_path / "a.pt", run, training=True, num_heads=options.get("num_heads"))
    to_pytorch(run, tmp_path / "b.pt", training=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(found) == ["model", "ema", "opt", "args"]
    assert vars(found["args"])["names"] == ["a", "b"]
    for name in ("model", "ema"):
        assert_same_state(found[name], checkpoint[name])
    other = skeleton(family, options)
    other.load_state_dict(found["model"], strict=True)
    other_optimizer = torch.optim.AdamW(other.parameters())
    other_optimizer.load_state_dict(found["opt"])
    assert_same_optimizer(other_optimizer, optimizer)
    # Both runs make the same next step.
    torch.manual_seed(1)
    step(module, optimizer)
    torch.manual_seed(1)
    step(other, other_optimizer)
    assert_same_state(other.state_dict(), module.state_dict())


def assert_same_optimizer(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    assert list(found["state"]) == list(wanted["state"])
    for number, state in wanted["state"].items():
        assert_same_state(found["state"][number], state)


@pytest.mark.parametrize(("family", "options"), [("DiCo", DICO), ("DiT", DIT)])
def test_optax_makes_the_step_that_pytorch_makes(family, options, tmp_path):
    module, optimizer, _ = trained(family, options, tmp_path / "a.pt")
    run = tmp_path / "run"
    from_pytorch(tmp_path / "a.pt", run, training=True, num_heads=options.get("num_heads"))
    config = ConfigDict(json.loads((run / "config.json").read_text()))
    assert config.optimizer.to_dict() == DEFAULTS["optimizer"] | {
        "learning_rate": LR, "b1": BETAS[0], "b2": BETAS[1], "eps": EPS, "weight_decay": 0.1
    }  # fmt: skip
    optax_optimizer = create_optimizer(config.optimizer, 10)
    abstract = abstract_params(create_model(family, **options))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    like = TrainState(np.int32(0), zeros, zeros, optax_optimizer.init(zeros))
    mesh = create_mesh(jax.devices()[:1])
    with Checkpointer(run, {}, keep=1) as saver:
        state = saver.restore(3, jax.device_put(like, replicated(mesh)))
    gradients = from_state_dict(step(module, optimizer), abstract, KEY_MAPS[family])
    updates, opt_state = jax.jit(optax_optimizer.update)(gradients, state.opt_state, state.params)
    found = to_state_dict(jax.tree.map(np.add, state.params, updates), KEY_MAPS[family])
    for key, value in found.items():
        wanted = module.state_dict()[key].numpy()
        np.testing.assert_allclose(value, wanted, rtol=3e-7, atol=1e-5 * LR)
    assert int(opt_state[0].count) == 4


def test_wrapped_modules(tmp_path):
    """Saved from DistributedDataParallel or torch.compile, in half precision."""
    module = skeleton("DiCo", DICO).to(torch.bfloat16)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        path = tmp_path / f"{prefix}pt"
        torch.save({f"{prefix}{k}": v for k, v in module.state_dict().items()}, path)
        from_pytorch(path, tmp_path / prefix)
        to_pytorch(tmp_path / prefix, tmp_path / f"{prefix}back.pt")
        found = torch.load(tmp_path / f"{prefix}back.pt", weights_only=True)
        assert_same_state(found, {k: v.float() for k, v in module.state_dict().items()})
