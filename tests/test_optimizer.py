"""The optimizer and its learning rate, and what the conversion finds in their states."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dico_jax.checkpoints.checkpointer import Checkpointer
from dico_jax.checkpoints.state import TrainState
from dico_jax.config import DEFAULTS, check_values
from dico_jax.configs import default
from dico_jax.errors import UsageError
from dico_jax.models import abstract_params, create_model
from dico_jax.parallel.mesh import create_mesh, replicated
from dico_jax.pytorch.conversion import to_pytorch
from dico_jax.pytorch.optimizer_state import from_optax, to_optax
from dico_jax.pytorch.torch_files import open_tensors
from dico_jax.training.optimizer import create_optimizer, is_kernel, learning_rate_schedule

PARAMS = {
    "a": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([1.0, -1.0])},
    "b": {"embedding": jnp.array([[2.0, 1.0]])},
}


def fields(**changes):
    return ConfigDict(DEFAULTS["optimizer"] | changes)


def gradients(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def run(optimizer, steps=3, scale=1.0):
    """The updates of some steps, and the state after them."""
    state, found = optimizer.init(PARAMS), []
    update = jax.jit(optimizer.update)
    for i in range(steps):
        grads = jax.tree.map(lambda g: g * scale, gradients(i))
        updates, state = update(grads, state, PARAMS)
        found.append(updates)
    return found, state


def test_default_is_optax_adamw_to_the_bit_and_has_its_state():
    config = fields(weight_decay=0.01)
    plain = optax.adamw(1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    ours, theirs = run(create_optimizer(config, 10)), run(plain)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    kinds = [type(part).__name__ for part in ours[1]]
    assert kinds == ["ScaleByAdamState", "EmptyState", "EmptyState"]


def test_lion_takes_steps_of_the_scheduled_length():
    config = fields(name="lion", b2=0.99, warmup_steps=3, schedule="cosine")
    config.min_learning_rate_ratio = 0.1
    updates, _ = run(create_optimizer(config, 7), steps=7)
    schedule = learning_rate_schedule(config, 7)
    for step, update in enumerate(updates):
        for leaf in jax.tree.leaves(update):
            np.testing.assert_allclose(np.abs(leaf), schedule(step), rtol=1e-6)


def test_learning_rates():
    constant = learning_rate_schedule(fields(), 10)
    assert [float(constant(n)) for n in (0, 5, 100)] == [1e-4] * 3
    rising = jax.jit(learning_rate_schedule(fields(warmup_steps=4), 10))
    np.testing.assert_allclose(
        [rising(np.int32(n)) for n in range(6)],
        [0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4],
        rtol=1e-6,
    )
    config = fields(schedule="cosine", warmup_steps=100, min_learning_rate_ratio=0.2)
    rates = np.asarray(jax.jit(jax.vmap(learning_rate_schedule(config, 1100)))(np.arange(1200)))
    step = np.arange(1, 1201)
    wave = 0.2 + 0.8 * (1 + np.cos(np.pi * np.clip((step - 100) / 1000, 0, 1))) / 2
    np.testing.assert_allclose(rates, 1e-4 * np.where(step < 100, step / 100, wave), rtol=1e-5)
    # Step 600 is in the middle, and the last one has the minimum.
    np.testing.assert_allclose(rates[[99, 599, 1099]], [1e-4, 0.6e-4, 0.2e-4], rtol=1e-5)
    unwarmed = learning_rate_schedule(fields(schedule="cosine"), 10)
    np.testing.assert_allclose([unwarmed(4), unwarmed(9)], [0.5e-4, 0], atol=1e-11)


def test_gradients_are_clipped_by_their_norm_over_all_parameters():
    def first_average(clip_norm, scale):
        optimizer = create_optimizer(fields(clip_norm=clip_norm), 10)
        return optax.tree.get(run(optimizer, steps=1, scale=scale)[1], "mu")

    norm = optax.tree.norm(gradients(0))
    clipped = first_average(0.5, scale=10.0)
    wanted = jax.tree.map(lambda g: 0.1 * g * 0.5 / norm, gradients(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, wanted)
    unneeded, none = first_average(1e3, scale=10.0), first_average(0.0, scale=10.0)
    jax.tree.map(np.testing.assert_array_equal, unneeded, none)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_what_decays(name):
    def decayed(mask):
        config = fields(name=name, learning_rate=0.1, weight_decay=0.5, weight_decay_mask=mask)
        updates = run(create_optimizer(config, 10), steps=1, scale=0.0)[0][0]
        return jax.tree.map(lambda u, p: float(jnp.max(jnp.abs(u + 0.05 * p))) < 1e-7, updates,
                            PARAMS)  # fmt: skip

    assert decayed("all") == {"a": {"kernel": True, "bias": True}, "b": {"embedding": True}}
    assert decayed("kernels") == {"a": {"kernel": True, "bias": False}, "b": {"embedding": False}}


@pytest.mark.parametrize(("family", "depth"), [("DiCo", (1,) * 5), ("DiT", 1)])
def test_kernels_of_the_networks(family, depth):
    options = {"num_heads": 2, "patch_size": 2} if family == "DiT" else {}
    params = abstract_params(create_model(family, hidden_size=16, depth=depth, **options))
    marked = flatten_dict(is_kernel(params))
    others = {path[-1] for path, mark in marked.items() if not mark}
    assert others == {"bias", "embedding"}
    assert {path[-1] for path, mark in marked.items() if mark} == {"kernel"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedule": "cosine", "warmup_steps": 10},
            "optimizer.warmup_steps=10 must be less than config.training.num_steps=10",
        ),
    ],
)
def test_wrong_fields(changes, message):
    for make in (create_optimizer, learning_rate_schedule):
        with pytest.raises(UsageError) as error:
            make(fields(**changes), 10)
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "name='adam': use 'adamw' or 'lion'"),
        ({"schedule": "linear"}, "schedule='linear': use 'constant' or 'cosine'"),
        ({"weight_decay_mask": ""}, "weight_decay_mask='': use 'all' or 'kernels'"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be finite"),
        ({"clip_norm": float("inf")}, "clip_norm=inf must be finite"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"eps": -1e-8}, "eps=-1e-08 must be at least 0"),
        ({"b1": 1.0}, "b1=1.0 must be in [0, 1)"),
        ({"b2": float("nan")}, "b2=nan must be finite"),
        ({"min_learning_rate_ratio": 1.5}, "min_learning_rate_ratio=1.5 must be in [0, 1]"),
    ],
)
def test_values_out_of_range(changes, message):
    config = default.get_config()
    config.optimizer.update(changes)
    with pytest.raises(UsageError) as error:
        check_values(config, "optimizer")
    assert str(error.value).startswith(f"config.optimizer.{message}")


# In PyTorch's files.

OPTIONS = [
    {},
    {"clip_norm": 1.0},
    {"warmup_steps": 2, "schedule": "cosine", "clip_norm": 1.0, "weight_decay_mask": "kernels"},
]


def leaves_by_path(state):
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


@pytest.mark.parametrize("changes", OPTIONS)
def test_adamw_is_found_in_every_state_of_it(changes):
    optimizer = create_optimizer(fields(**changes), 10)
    _, state = run(optimizer)
    count, mu, nu = from_optax(leaves_by_path(state))
    assert count == 3
    for name, found in (("mu", mu), ("nu", nu)):
        wanted = flatten_dict(optax.tree.get(state, name))
        assert found.keys() == wanted.keys()
        assert all(found[path] is wanted[path] for path in wanted)
    filled = to_optax(
        jax.eval_shape(optimizer.init, PARAMS),
        count,
        optax.tree.get(state, "mu"),
        optax.tree.get(state, "nu"),
    )
    jax.tree.map(np.testing.assert_array_equal, filled, state)


def test_lions_state_is_none_of_adamw():
    with pytest.raises(UsageError, match="not AdamW's: it has no mu, nu and count"):
        from_optax(leaves_by_path(run(create_optimizer(fields(name="lion"), 10))[1]))


def save_run(workdir, **changes):
    """A checkpoint of a run of four steps; its optimizer's averages."""
    config = copy.deepcopy(DEFAULTS)
    config["model"] |= {"name": "DiCo", "hidden_size": 4, "depth": [1] * 5, "mlp_ratio": 2.0}
    config["model"] |= {"num_classes": 3}
    config["optimizer"] |= changes
    config["training"]["num_steps"] = 8
    model = create_model("DiCo", hidden_size=4, depth=(1,) * 5, num_classes=3)
    rng = np.random.default_rng(0)

    def draw():
        return jax.tree.map(
            lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract_params(model)
        )

    params, mu, nu = draw(), draw(), draw()
    optimizer = create_optimizer(fields(**changes), 8)
    values = {"count": np.int32(4), "mu": mu}
    empty = jax.eval_shape(optimizer.init, params)
    opt_state = optax.tree_utils.tree_set(
        empty, **values, **({} if changes.get("name") == "lion" else {"nu": nu})
    )
    state = TrainState(np.int32(4), params, params, opt_state)
    with Checkpointer(workdir, {"config": config, "class_names": []}, keep=1) as saver:
        saver.save(4, jax.device_put(state, replicated(create_mesh(jax.devices()[:1]))))
    return mu, nu


def test_pytorch_gets_the_averages_and_the_learning_rate_of_now(tmp_path):
    config = fields(**OPTIONS[2])
    mu, _ = save_run(tmp_path / "run", **OPTIONS[2])
    to_pytorch(
        tmp_path / "run",
        tmp_path / "a.pt",
        training=True,
        rate_of=lambda config, step: float(learning_rate_schedule(fields(**OPTIONS[2]), 8)(step)),
    )
    with open_tensors(tmp_path / "a.pt") as file:
        opt = file.tree["opt"]
        names = list(file.tree["model"])
        bias = opt["state"][names.index("x_embedder.proj.bias")]["exp_avg"].read()
        assert opt["state"][0]["step"].read() == 4
    np.testing.assert_array_equal(bias, mu["x_embedder"]["proj"]["bias"])
    (group,) = opt["param_groups"]
    assert group["lr"] == float(learning_rate_schedule(config, 8)(4)) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lion"}, "config.optimizer.name='lion' is not AdamW: convert its weights alone"),
        (
            {"weight_decay": 0.1, "weight_decay_mask": "kernels"},
            "config.optimizer.weight_decay_mask='kernels' does not fit the one group",
        ),
    ],
)
def test_what_pytorch_cannot_go_on_with(changes, message, tmp_path):
    save_run(tmp_path / "run", **changes)
    with pytest.raises(UsageError) as error:
        to_pytorch(tmp_path / "run", tmp_path / "a.pt", training=True)
    assert f"--ckpt={tmp_path / 'run'}: {message}" in str(error.value)
    assert not (tmp_path / "a.pt").exists()
