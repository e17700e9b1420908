"""Files to checkpoints and back: recorded outputs, exact round trips, runs that go on."""

import argparse
import functools
import json
import shutil
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from configs import default
from dico_jax.checkpoints.checkpointer import Checkpointer
from dico_jax.checkpoints.reader import SavedWeights, WarmStart
from dico_jax.checkpoints.state import TrainState, initializer
from dico_jax.config import DEFAULTS
from dico_jax.errors import UsageError
from dico_jax.models import abstract_params, create_model
from dico_jax.models.dit import position_embedding
from dico_jax.parallel.mesh import create_mesh, replicated
from dico_jax.pytorch import run_config
from dico_jax.pytorch.conversion import from_pytorch, load_pytorch, to_pytorch
from dico_jax.pytorch.key_maps import KEY_MAPS
from dico_jax.pytorch.tensors import DTYPES
from dico_jax.pytorch.torch_files import open_tensors, write_pt
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.image_folder import save
from dico_jax.training import program, run
from dico_jax.training.loop import train
from dico_jax.training.optimizer import create_optimizer
from tests import golden
from tests.commands import call
from tests.golden import TINY, distance, nhwc
from tests.pytorch_files import assert_same, flat, write_shards
from tests.state_dicts import from_state_dict, state_dict_shapes, to_state_dict

SMALL = {**TINY, "hidden_size": 8}  # of the training checkpoint
DIT = {"hidden_size": 64, "depth": 3, "num_heads": 4, "patch_size": 2, "num_classes": 10}
TRAIN = golden.FOLDER / "train_checkpoint.pt"


def forward(model, params, g):
    return compiled(model)({"params": params}, nhwc(g["x"]), g["t"], g["y"])


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def read(path):
    """Everything in a file, by path in the tree."""
    with open_tensors(path) as file:
        return flat(file.tree)


def assert_same_file(path, other):
    """The same tree: keys in the same order, arrays to the bit, everything else equal."""
    found, wanted = read(path), read(other)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert_same(found[key], value)
        else:
            assert found[key] == value, key


def write_random(path, family, seed=0, **options):
    """A file of random weights (any bits) of a small network; its model."""
    model = create_model(family, **options)
    shapes = state_dict_shapes(abstract_params(model), KEY_MAPS[family])
    rng = np.random.default_rng(seed)
    write_pt(path, {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()})
    return model


# Recorded outputs.


@golden.requires_golden
@pytest.mark.parametrize("form", ["pt", "safetensors", "sharded", "wrapped", "converted"])
def test_dico_gives_the_recorded_output_in_all_forms(form, tmp_path):
    g = golden.load("dico_tiny_forward.npz")
    model, path = create_model("DiCo", **TINY), golden.FOLDER / "dico_tiny.pt"
    if form == "safetensors":
        path = golden.FOLDER / "dico_tiny.safetensors"
    elif form == "sharded":
        with open_tensors(path) as file:
            path = write_shards(tmp_path, file.tensors, 3)
    elif form == "wrapped":  # as DistributedDataParallel and others leave it
        with open_tensors(path) as file:
            prefixed = {f"module.{k}": ref for k, ref in file.tensors.items()}
            write_pt(path := tmp_path / "a.pt", {"state_dict": prefixed})
    if form == "converted":
        from_pytorch(path, tmp_path / "out")
        params = SavedWeights(tmp_path / "out").read("ema", abstract_params(model))
    else:
        params = load_pytorch(path, model)
    assert distance(forward(model, params, g), nhwc(g["A_out_f64"])) < 5e-6


@golden.requires_golden
@pytest.mark.parametrize("weights", ["auto", "ema", "model"])
def test_training_checkpoint_gives_the_recorded_output(weights):
    g = golden.load("train_checkpoint_arrays.npz")
    model = create_model("DiCo", **SMALL)
    out = forward(model, load_pytorch(TRAIN, model, weights), g)
    name = "model" if weights == "model" else "ema"
    other = "ema" if weights == "model" else "model"
    assert distance(out, nhwc(g[f"out_{name}_f64"])) < 1e-5
    assert distance(out, nhwc(g[f"out_{other}_f64"])) > 1e-2


@golden.requires_golden
def test_dit_gives_the_recorded_output(tmp_path):
    g = golden.load("dit_tiny.npz")
    model = create_model("DiT", **DIT)
    params = load_pytorch(golden.FOLDER / "dit_tiny.pt", model)
    assert distance(forward(model, params, g), nhwc(g["A_out_f64"])) < 5e-6


# Round trips.


@golden.requires_golden
@pytest.mark.parametrize("name", ["dico_tiny", "dit_tiny"])
def test_round_trip_of_golden_weights(name, tmp_path):
    source = golden.FOLDER / f"{name}.pt"
    done = from_pytorch(source, tmp_path / "ckpt", num_heads=4 if "dit" in name else None)
    assert done.startswith("DiCo of no published size (hidden_size=32" if "dico" in name else "DiT")
    assert "10 classes and a null class" in done
    to_pytorch(tmp_path / "ckpt", tmp_path / "back.pt")
    assert_same_file(tmp_path / "back.pt", source)
    to_pytorch(tmp_path / "ckpt", tmp_path / "back.safetensors")
    assert_same_file(tmp_path / "back.safetensors", source)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("DiCo", {**SMALL, "in_channels": 1, "learn_sigma": False, "class_dropout_prob": 0.0}),
        ("DiT", {**DIT, "hidden_size": 12, "num_heads": 3, "patch_size": 4, "in_channels": 3}),
    ],
)
def test_round_trip_of_other_networks(family, options, tmp_path):
    model = write_random(tmp_path / "a.pt", family, **options)
    from_pytorch(
        tmp_path / "a.pt", tmp_path / "ckpt", image_size=16, num_classes=10,
        num_heads=options.get("num_heads"),
    )  # fmt: skip
    saved = SavedWeights(tmp_path / "ckpt")
    assert saved.config["data"]["image_size"] == 16
    assert saved.config["autoencoder"]["name"] == "identity"
    assert saved.config["sampling"]["cfg_scale"] == (1.4 if model.null_class else 1.0)
    to_pytorch(tmp_path / "ckpt", tmp_path / "back.pt")
    found, wanted = read(tmp_path / "back.pt"), read(tmp_path / "a.pt")
    found.pop("/pos_embed", None)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert_same(found[key], value)


@golden.requires_golden
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(dtype, tmp_path, capsys):
    with open_tensors(golden.FOLDER / "dit_tiny.pt") as file:
        tensors = {k: ref.read().astype(DTYPES[dtype]) for k, ref in file.tensors.items()}
    write_pt(tmp_path / "a.pt", tensors)
    from_pytorch(tmp_path / "a.pt", tmp_path / "ckpt", num_heads=4)
    leaves = SavedWeights(tmp_path / "ckpt").leaves("ema")
    kernel = leaves["blocks", "0", "attn", "qkv", "kernel"]
    assert_same(kernel.read(), tensors["blocks.0.attn.qkv.weight"].astype(np.float32).T)
    assert ("float64 tensors, rounded to float32" in capsys.readouterr().err) == (
        dtype == "float64"
    )


@golden.requires_golden
def test_position_table_of_another_size_is_made_anew(tmp_path):
    """A DiT for 128 pixels, converted for 256, gets the table of 256."""
    source = golden.FOLDER / "dit_tiny.pt"
    from_pytorch(source, tmp_path / "small", num_heads=4)
    assert SavedWeights(tmp_path / "small").config["data"]["image_size"] == 128
    from_pytorch(source, tmp_path / "large", num_heads=4, image_size=256)
    to_pytorch(tmp_path / "large", tmp_path / "back.pt")
    found, wanted = read(tmp_path / "back.pt"), read(source)
    assert found.pop("/pos_embed").shape == (1, 256, 64)
    assert wanted.pop("/pos_embed").shape == (1, 64, 64)
    for key, value in wanted.items():
        assert_same(found[key], value)


# The state of a run.


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The golden training checkpoint, converted with the optimizer's state."""
    out = tmp_path_factory.mktemp("resumed") / "run"
    done = from_pytorch(TRAIN, out, training=True)
    assert "the whole training state of train_checkpoint.pt" in done
    return out


@pytest.fixture(scope="module")
def restored(resumed):
    """The state of the converted run, as the loop restores it, and its optimizer and config."""
    config = ConfigDict(json.loads((resumed / "config.json").read_text()))
    optimizer = create_optimizer(config.optimizer, 10)
    model = create_model("DiCo", **SMALL)
    like = empty_state(initializer(model, optimizer, (32, 32, 4)), 0, replicated(create_mesh()))
    with Checkpointer(resumed, {}, keep=1) as saver:
        return saver.restore(max(saver.steps()), like), optimizer, config


@golden.requires_golden
def test_training_state_is_what_the_file_says(restored):
    g, (state, _, config) = golden.load("train_checkpoint_arrays.npz"), restored
    adam = state.opt_state[0]
    assert int(state.step) == int(adam.count) == 2
    trees = {"model_": state.params, "ema_": state.ema_params, "exp_avg_": adam.mu,
             "exp_avg_sq_": adam.nu}  # fmt: skip
    for name, tree in trees.items():
        flat_tree = to_state_dict(tree, KEY_MAPS["DiCo"])
        assert list(flat_tree) == g["names"].tolist()
        sums = [v.astype(np.float64).sum() for v in flat_tree.values()]
        np.testing.assert_allclose(sums, g[f"{name}sum_f64"], rtol=1e-12)
    assert config.optimizer.to_dict() == DEFAULTS["optimizer"]
    assert config.data.image_size == 256


@golden.requires_golden
def test_the_optimizers_next_step(restored):
    """AdamW by hand in float64, from the file's own numbers, against Optax's from the converted."""
    state, optimizer, _ = restored
    contents = read(TRAIN)
    names = [k.removeprefix("/model/") for k in contents if k.startswith("/model/")]
    rng = np.random.default_rng(0)
    state_dict = {n: contents[f"/model/{n}"] for n in names}
    gradients = {n: rng.normal(size=v.shape).astype(np.float32) for n, v in state_dict.items()}
    tree = from_state_dict(gradients, state.params, KEY_MAPS["DiCo"])
    # On one device, outside of the mesh, where the next step is one small program.
    one = jax.device_get((state.params, state.opt_state))
    updates, new = jax.jit(optimizer.update)(tree, one[1], one[0])
    after = to_state_dict(jax.tree.map(np.add, one[0], updates), KEY_MAPS["DiCo"])
    lr, b1, b2, eps, step = 1e-4, 0.9, 0.999, 1e-8, 3
    for i, n in enumerate(names):
        m, v, p, grad = (
            np.asarray(a, np.float64)
            for a in (
                contents[f"/opt/state/{i}/exp_avg"],
                contents[f"/opt/state/{i}/exp_avg_sq"],
                state_dict[n],
                gradients[n],
            )
        )
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        wanted = p - lr * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
        # Half a unit in the last place of the parameter, and 1e-5 of the step itself.
        tolerance = np.spacing(np.abs(p).astype(np.float32)).astype(np.float64) + 1e-5 * lr
        assert (np.abs(after[n] - wanted) <= tolerance).all(), n
    assert int(new[0].count) == 3


@golden.requires_golden
def test_training_checkpoint_comes_back_to_the_bit(resumed, tmp_path):
    to_pytorch(resumed, tmp_path / "back.pt", training=True)
    assert_same_file(tmp_path / "back.pt", TRAIN)
    for weights, name in (("ema", "ema"), ("params", "model")):
        to_pytorch(resumed, tmp_path / f"{name}.pt", weights=weights)
        found, contents = read(tmp_path / f"{name}.pt"), read(TRAIN)
        wanted = {k.removeprefix(f"/{name}"): v for k, v in contents.items() if f"/{name}/" in k}
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert_same(found[key], value)


def dit_checkpoint(path):
    """A training checkpoint of a DiT, whose position table has a number and no state."""
    model = write_random(path, "DiT", **DIT | {"hidden_size": 12, "num_heads": 3})
    table = position_embedding(4, 4, 12).astype(np.float32)[None]
    weights = {"pos_embed": table} | {k.strip("/"): v for k, v in read(path).items()}
    moments = {
        i: {"step": np.float32(7), "exp_avg": v, "exp_avg_sq": v * v}
        for i, v in enumerate(weights.values())
        if i
    }
    group = {"lr": 3e-4, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.01}
    group |= {"params": list(range(len(weights)))}
    opt = {"state": moments, "param_groups": [group]}
    args = argparse.Namespace(global_seed=5, global_batch_size=32, image_size=64)
    write_pt(path, {"model": weights, "ema": weights, "opt": opt, "args": args})
    return model


def test_training_state_of_a_dit(tmp_path):
    dit_checkpoint(tmp_path / "a.pt")
    from_pytorch(tmp_path / "a.pt", tmp_path / "run", training=True, num_heads=3)
    config = SavedWeights(tmp_path / "run").config
    assert config["optimizer"] == DEFAULTS["optimizer"] | {
        "learning_rate": 3e-4, "b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.01
    }  # fmt: skip
    assert (config["seed"], config["data"]["batch_size"], config["data"]["image_size"]) == (
        5, 32, 64
    )  # fmt: skip
    to_pytorch(tmp_path / "run", tmp_path / "back.pt", training=True)
    found, wanted = read(tmp_path / "back.pt"), read(tmp_path / "a.pt")
    assert set(wanted) <= set(found)
    assert "/opt/state/0/step" not in found
    for key, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert_same(found[key], value)
        else:
            assert found[key] == value


# What the other commands make of a converted checkpoint.


def latents(folder, count=32, side=8, classes=10):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    np.save(folder / "examples.npy", rng.normal(size=(count, side, side, 4)).astype(np.float32))
    np.save(folder / "labels.npy", (np.arange(count) % classes).astype(np.int32))
    return str(folder)


def short(config, data, steps):
    """A config for a few steps on a few latents."""
    config.data.update(
        source="arrays", path=data, batch_size=8, image_size=64, horizontal_flip=False
    )
    config.training.update(num_steps=steps, log_every_steps=1)
    config.sampling.update(grid_every_steps=0)
    return config


@golden.requires_golden
def test_sampling_from_a_converted_checkpoint(tmp_path):
    from_pytorch(golden.FOLDER / "dico_tiny.pt", tmp_path / "ckpt", image_size=64)
    sampler = CheckpointSampler(str(tmp_path / "ckpt"), overrides={"num_steps": 2}, vae="preview")
    save(sampler, str(tmp_path / "images"), num_images=2, classes="3,7")
    assert (tmp_path / "images" / "000001.png").exists()
    with pytest.raises(UsageError, match="--weights=params: .* has only ema"):
        CheckpointSampler(str(tmp_path / "ckpt"), weights="params", vae="preview")


def counting_step(model, diffusion, optimizer, **_):
    """A training step that only counts."""

    def step(state, batch, attempt):
        count = state.opt_state[0].count + 1
        opt_state = optax.tree_utils.tree_set(state.opt_state, count=count)
        metrics = dict.fromkeys(("loss", "mse", "vb", "grad_norm"), jnp.zeros(()))
        metrics["finite"] = jnp.array(True)
        return state.replace(step=state.step + 1, opt_state=opt_state), metrics

    return step


def empty_state(init, seed, sharding):
    """A fresh state of zeros."""
    state = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init, jax.random.key(0))
    )
    return jax.device_put(state, sharding)


STEPS = pytest.mark.parametrize("step", ["counting", pytest.param("true", marks=pytest.mark.slow)])


def use_step(step, monkeypatch):
    """Spares the quick tests what takes half a minute to compile, and is tested elsewhere."""
    if step == "counting":
        monkeypatch.setattr(program, "make_train_step", counting_step)
        monkeypatch.setattr(run, "create_state", empty_state)
        monkeypatch.setattr(program, "create_mesh", lambda *_, **__: create_mesh(jax.devices()[:1]))


@golden.requires_golden
@STEPS
def test_a_run_goes_on_from_pytorch_and_back_to_it(step, tmp_path, monkeypatch):
    """In the middle of a run from PyTorch to JAX, two steps there, and back."""
    use_step(step, monkeypatch)
    with open_tensors(TRAIN) as file:
        args = argparse.Namespace(**vars(file.tree["args"]) | {"image_size": 64})
        args.global_batch_size = 8
        write_pt(tmp_path / "a.pt", {**file.tree, "args": args})
    run = tmp_path / "run"
    from_pytorch(tmp_path / "a.pt", run, training=True)
    config = ConfigDict(json.loads((run / "config.json").read_text()))
    short(config, latents(tmp_path / "data"), 4).data.horizontal_flip = True
    # The conversion takes it that the run goes on with prepared latents; here they are arrays.
    (run / "config.json").write_text(config.to_json())
    train(config, str(run))
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(logged) == 3
    to_pytorch(run, tmp_path / "back.pt", training=True)
    found, before = read(tmp_path / "back.pt"), read(TRAIN)
    assert found["/opt/state/0/step"] == 4
    assert found["/args/global_batch_size"] == 8
    assert found["/args/model"] == "DiCo"
    moved = {k: np.abs(v - before[k]).max() for k, v in found.items() if k.startswith("/model")}
    if step == "true":
        assert 0 < max(moved.values()) < 3e-4  # two steps of 1e-4
    else:
        assert max(moved.values()) == 0


def test_what_does_not_show_in_weights_goes_there_and_back(tmp_path):
    """The heads of a DiT of a published width, and the noise schedule: in the arguments."""
    shapes = {"hidden_size": 384, "depth": 1, "num_heads": 4, "patch_size": 8, "num_classes": 2}
    write_random(tmp_path / "a.pt", "DiT", **shapes)
    with open_tensors(tmp_path / "a.pt") as file:
        args = {"num_heads": 4, "noise_schedule": "cosine", "diffusion_steps": 50}
        args |= {"image_size": 64, "class_dropout_prob": 0.25}
        write_pt(tmp_path / "b.pt", {"ema": file.tree, "args": argparse.Namespace(**args)})
    from_pytorch(tmp_path / "b.pt", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["name"] == "DiT"
    assert config["model"]["num_heads"] == 4
    assert config["model"]["class_dropout_prob"] == 0.25
    assert config["diffusion"]["noise_schedule"] == "squaredcos_cap_v2"
    assert config["diffusion"]["diffusion_steps"] == 50
    for out in ("c.pt", "c.safetensors"):  # weights alone
        to_pytorch(str(tmp_path / "run"), str(tmp_path / out))
        from_pytorch(tmp_path / out, tmp_path / f"{out}.run")
        found = json.loads((tmp_path / f"{out}.run" / "config.json").read_text())
        assert found["diffusion"] == config["diffusion"]
        assert found["model"]["num_heads"] == 4
    saved = SavedWeights(str(tmp_path / "run"), None)
    args["noise_schedule"] = "squaredcos_cap_v2"
    assert vars(run_config.written_arguments(saved)) == args
    saved.converted["arguments"] = {}  # a run of our own
    again = run_config.read_arguments({"args": run_config.written_arguments(saved)})
    assert args.items() <= again.items()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "SiT-S/4"}, "args.model='SiT-S/4' is of another objective"),
        ({"prediction": "velocity"}, "args.prediction='velocity' is of another"),
        ({"transport": {"path_type": "Linear"}}, "args.path_type='Linear' is of another"),
        ({"noise_schedule": "sigmoid"}, "args.noise_schedule='sigmoid' is none of linear"),
    ],
)
def test_other_objectives_are_refused(args, message, tmp_path):
    write_random(tmp_path / "a.pt", "DiT", **DIT)
    for kind in (dict, lambda **given: argparse.Namespace(**given)):
        with open_tensors(tmp_path / "a.pt") as file:
            write_pt(tmp_path / "b.pt", {"model": file.tree, "args": kind(**args)})
        with pytest.raises(UsageError, match=message):
            from_pytorch(tmp_path / "b.pt", tmp_path / "run", num_heads=4)


@golden.requires_golden
def test_weights_alone_do_not_make_a_run(tmp_path):
    from_pytorch(golden.FOLDER / "dico_tiny.pt", tmp_path / "ckpt")
    with (
        Checkpointer(tmp_path / "ckpt", {}, keep=1) as saver,
        pytest.raises(UsageError, match=r"without a training state: .* --config.training.init_"),
    ):
        saver.restore(max(saver.steps()), None)
    with pytest.raises(UsageError, match="--weights=params: .* has only ema"):
        to_pytorch(tmp_path / "ckpt", tmp_path / "a.pt", training=True)
    with pytest.raises(UsageError, match="has weights alone"):
        SavedWeights(tmp_path / "ckpt").optimizer_leaves()


def warm_config(init_from, tmp_path, **model):
    config = default.get_config()
    with config.unlocked():
        short(config, latents(tmp_path / "data"), 1)
        config.model.update(name="DiCo", **{**SMALL, **model})
        config.training.init_from = str(init_from)
    return config


@golden.requires_golden
@pytest.mark.parametrize("num_classes", [10, 12])
def test_warm_start(num_classes, tmp_path):
    """Weights of ten classes at 256 pixels; the networks know nothing of the resolution."""
    from_pytorch(TRAIN, tmp_path / "ckpt")
    model = create_model("DiCo", **{**SMALL, "num_classes": num_classes})
    sharding = replicated(create_mesh())
    ones = jax.tree.map(
        lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), sharding), abstract_params(model)
    )
    start = WarmStart(str(tmp_path / "ckpt"), model)
    state = start.apply(TrainState(jnp.zeros((), jnp.int32), ones, ones, {"count": 0}))
    with open_tensors(TRAIN) as file:
        ema = {k: ref.read() for k, ref in file.tree["ema"].items()}
    found = to_state_dict(state.params, KEY_MAPS["DiCo"])
    for key, value in found.items():
        if key.startswith("y_embedder") and num_classes != 10:
            assert_same(value, np.ones(value.shape, np.float32))
        else:
            assert_same(value, ema[key])
    jax.tree.map(assert_same, state.ema_params, state.params)
    assert all(x.sharding == sharding for x in jax.tree.leaves((state.params, state.ema_params)))
    assert state.opt_state == {"count": 0}
    assert f"starting from the weights 'ema' of {tmp_path / 'ckpt'}, step 0" in str(start)
    fresh = "the label tables have 11 rows there, so they start fresh"
    assert (fresh in str(start)) == (num_classes != 10)


@golden.requires_golden
@STEPS
def test_a_warm_started_run_goes_on_without_its_start(step, tmp_path, monkeypatch, capsys):
    use_step(step, monkeypatch)
    from_pytorch(TRAIN, tmp_path / "ckpt")
    config = warm_config(tmp_path / "ckpt", tmp_path)
    train(config, str(tmp_path / "run"))
    assert capsys.readouterr().out.count("starting from the weights") == 1
    shutil.rmtree(tmp_path / "ckpt")
    with config.unlocked():
        config.training.num_steps = 2
    train(config, str(tmp_path / "run"))
    assert "starting" not in capsys.readouterr().out
    kernel = SavedWeights(str(tmp_path / "run")).leaves("params")["up3_2", "body", "0", "kernel"]
    with open_tensors(TRAIN) as file:
        wanted = file.tree["ema"]["up3_2.body.0.weight"].read().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(kernel.read(), wanted, rtol=0, atol=0 if step != "true" else 3e-4)
    # A run's own checkpoint is a start too.
    again_model = create_model("DiCo", **SMALL)
    again = WarmStart(str(tmp_path / "run"), again_model)
    assert "step 2" in str(again)
    assert "classes" not in str(again)
    names = ["other", *SavedWeights(str(tmp_path / "run")).class_names[1:]]
    again = WarmStart(str(tmp_path / "run"), again_model, types.SimpleNamespace(class_names=names))
    assert str(again).endswith("; the classes are others: label 0 is 0 there and other here")


@golden.requires_golden
def test_warm_start_from_what_does_not_fit(tmp_path):
    from_pytorch(TRAIN, tmp_path / "ckpt")
    for folder, model, message in [
        ("ckpt", {"hidden_size": 4}, r"another network .* is \(96,\) there and \(48,\) here"),
        ("ckpt", {"depth": (1, 1, 1, 2, 1)}, "another network .DiCo.* and missing here"),
        ("nowhere", {}, "config.training.init_from=.*nowhere.: no such folder"),
        ("data", {}, "config.training.init_from=.*data. holds no checkpoint"),
    ]:
        config = warm_config(tmp_path / folder, tmp_path, **model)
        with pytest.raises(UsageError, match=message):
            train(config, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


# The config, the command.


def test_defaults_are_those_of_the_default_config():
    assert default.get_config().to_dict() == DEFAULTS


@golden.requires_golden
def test_nan_weights_are_counted(tmp_path, capsys):
    with open_tensors(golden.FOLDER / "dico_tiny.pt") as file:
        tensors = {k: ref.read() for k, ref in file.tensors.items()}
    tensors["x_embedder.proj.bias"][:3] = np.nan
    tensors["latent.0.conv1.weight"][0, 0] = -np.inf
    tensors["latent.0.conv1.bias"][:] = 3e38  # large, but finite: their sum is not
    write_pt(tmp_path / "a.pt", tensors)
    wanted = (
        "warning: 4 weights are NaN or infinite, in 2 tensors: x_embedder.proj.bias (3); "
        "latent.0.conv1.weight (1)\n"
    )
    from_pytorch(tmp_path / "a.pt", tmp_path / "ckpt")
    assert capsys.readouterr().err.endswith(wanted)
    to_pytorch(tmp_path / "ckpt", tmp_path / "back.pt")
    assert capsys.readouterr().err.endswith(wanted)
    load_pytorch(tmp_path / "a.pt", create_model("DiCo", **TINY))
    assert capsys.readouterr().err.endswith(wanted)
    assert_same_file(tmp_path / "back.pt", tmp_path / "a.pt")


def test_an_ordinary_orbax_checkpoint_is_written(tmp_path):
    """Orbax alone reads it, without this package and without a target."""
    model = write_random(tmp_path / "a.pt", "DiCo", **SMALL)
    from_pytorch(tmp_path / "a.pt", tmp_path / "ckpt")
    with ocp.CheckpointManager(tmp_path / "ckpt" / "checkpoints") as manager:
        assert manager.all_steps() == [0]
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore(tmp_path / "ckpt" / "checkpoints" / "0" / "ema_params")
    jax.tree.map(assert_same, params, load_pytorch(tmp_path / "a.pt", model))


@golden.requires_golden
def test_files_of_the_hub(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with open_tensors(golden.FOLDER / "dico_tiny.pt") as file:
        (cache / "sub").mkdir(parents=True)
        write_shards(cache / "sub", file.tensors, 3)
    asked = []

    class Hub:
        @staticmethod
        def hf_hub_download(repo, name):
            asked.append((repo, name))
            if not (cache / name).exists():
                raise OSError("404 Client Error.\n\nEntry not found")
            return str(cache / name)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    index = "hf://shallowdream204/DiCo/sub/m.safetensors.index.json"
    assert "m.safetensors.index.json" in from_pytorch(index, str(tmp_path / "ckpt"))
    assert {repo for repo, _ in asked} == {"shallowdream204/DiCo"}
    assert sorted(name for _, name in asked) == sorted(
        str(p.relative_to(cache)) for p in (cache / "sub").iterdir()
    )
    for name, message in [
        ("hf://a/b", "write hf://OWNER/REPO/FILE"),
        ("hf://a/b/", "write hf://OWNER/REPO/FILE"),
        ("hf://a/b/c.pt", "c.pt of a/b cannot be downloaded: 404 Client Error"),
    ]:
        with pytest.raises(UsageError, match=message):
            from_pytorch(name, str(tmp_path / "other"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="needs huggingface_hub: pip install"):
        load_pytorch("hf://a/b/c.pt", create_model("DiCo", **TINY))


def command(*args):
    return call("dico_jax.convert", *args)


@golden.requires_golden
def test_the_command(tmp_path):
    done = command(
        "from_pytorch", f"--input={golden.FOLDER / 'dico_tiny.pt'}", f"--out={tmp_path / 'ckpt'}"
    )
    assert done.returncode == 0, done.stderr
    assert "1,003,080 parameters" in done.stdout
    assert "100%" in done.stderr  # the progress bar
    done = command("to_pytorch", f"--ckpt={tmp_path / 'ckpt'}", f"--out={tmp_path / 'a.pt'}")
    assert done.returncode == 0, done.stderr
    assert_same_file(tmp_path / "a.pt", golden.FOLDER / "dico_tiny.pt")


def test_help_is_quick():
    start = time.monotonic()
    done = call("dico_jax.convert", "--help", fresh=True)
    assert "from_pytorch --input=FILE --out=DIR" in done.stdout
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "what to do is missing: use convert from_pytorch or convert to_pytorch"),
        (("from_torch",), "'from_torch' is unknown: use convert from_pytorch or"),
        (("from_pytorch", "--out=x"), "from_pytorch needs --input"),
        (("to_pytorch", "--ckpt=x", "--out=y.pt", "--model=DiCo-S"), "--model is for from_pytorch"),
        (("from_pytorch", "--input=a", "--out=b", "--weights=params"), "a cannot be opened"),
        (("to_pytorch", "--ckpt=a", "--out=b", "--weights=ema", "--training"), "leave it out"),
    ],
)
def test_wrong_usage(args, message):
    done = command(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
