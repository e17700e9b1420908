"""Blocks in stacks, as the training step has them, are the blocks of checkpoints."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import digits
from dico_jax.checkpoints.averages import rebuilt_ema, snapshot_steps
from dico_jax.checkpoints.reader import SavedWeights
from dico_jax.checkpoints.state import create_state, initializer
from dico_jax.models import create_model
from dico_jax.models.block_stacks import stack_blocks, stack_shardings, unstack_blocks
from dico_jax.parallel.mesh import create_mesh
from dico_jax.parallel.sharding import state_sharding
from dico_jax.training.loop import train
from dico_jax.training.optimizer import create_optimizer
from tests.test_scan import FAMILIES, make_stage, stage_inputs, stage_params
from tests.test_training import tiny_config

OPTIONS = {
    "DiCo": {"hidden_size": 8, "depth": (1, 2, 3, 1, 1), "in_channels": 1},
    "DiT": {"hidden_size": 8, "depth": 3, "num_heads": 1, "in_channels": 1},
}


def sharded_state(family, mesh):
    model = create_model(family, **OPTIONS[family], scan_blocks=True)
    optimizer = create_optimizer(digits.get_config().optimizer, 10)
    init = initializer(model, optimizer, (8, 8, 1), ema_widths=(0.05,))
    sharding = state_sharding(jax.eval_shape(init, jax.random.key(0)), mesh)
    return model, sharding, create_state(init, 0, sharding)


@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("DiT", {"data": 1, "fsdp": 4, "tensor": 2}),
        pytest.param("DiCo", {"fsdp": 8}, marks=pytest.mark.slow),
    ],
    ids=FAMILIES[::-1],
)
def test_a_state_comes_back_as_it_was(family, axes):
    model, sharding, state = sharded_state(family, create_mesh(**axes))
    values = jax.device_get(state)
    packed = stack_blocks(state, model.stages, consume=True)
    # A block's leaf is gone; what is not in stacks is the same array.
    stage = model.stages[-1]
    assert jax.tree.leaves(state.params[stage])[0].is_deleted()
    assert packed.opt_state[0].count is state.opt_state[0].count
    assert (
        packed.params["final_layer"]["adaLN_modulation"]
        == (state.params["final_layer"]["adaLN_modulation"])
    )
    for tree in (packed.params, packed.opt_state[0].mu, packed.width_emas["width_0_05"]):
        assert [set(tree[name]) for name in model.stages] == [{"stack"}] * len(model.stages)
    assert jax.tree.map(lambda leaf: leaf.sharding, packed) == stack_shardings(
        sharding, model.stages
    )
    found = unstack_blocks(packed)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == sharding
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), values)


def test_networks_without_loops_keep_their_state():
    model = create_model("DiT", **OPTIONS["DiT"])
    assert model.stacked_stages == ()
    tree = {"blocks": {"0": np.ones(3), "1": np.zeros(3)}}
    assert stack_blocks(tree, model.stacked_stages) == unstack_blocks(tree) == tree


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_takes_its_blocks_in_stacks(dtype):
    stage, params = make_stage("DiT", 3, scan=True, dtype=dtype), stage_params("DiT", 3)
    args = stage_inputs("DiT", dtype)

    @jax.jit
    def output_and_gradient(params):
        return jax.value_and_grad(lambda p: (stage.apply({"params": p}, *args) ** 2).mean())(params)

    expected, grads = output_and_gradient(params)
    stacked = stack_blocks({"blocks": params}, ("blocks",))["blocks"]
    found, stacked_grads = output_and_gradient(stacked)
    assert found == expected
    found_grads = unstack_blocks({"blocks": stacked_grads})["blocks"]
    jax.tree.map(np.testing.assert_array_equal, found_grads, grads)


@pytest.mark.slow  # the tests above have its parts
def test_a_run_may_change_between_blocks_and_stacks(tmp_path):
    """Its checkpoints are the same, and its numbers up to the rounding of sums."""
    weights = []
    for name, parts in {"plain": [(4, False)], "changed": [(2, True), (4, False)]}.items():
        workdir = tmp_path / name
        for num_steps, scan_blocks in parts:
            config = tiny_config()
            config.model.depth, config.model.scan_blocks = 2, scan_blocks
            config.training.num_steps = num_steps
            config.training.ema_widths, config.training.ema_snapshot_every_steps = (0.1,), 2
            config.eval.class_agreement_samples = config.sampling.grid_every_steps = 0
            config.optimizer.learning_rate = 1e-4
            train(config, str(workdir))
        assert snapshot_steps(str(workdir)) == [2, 4]
        leaves = SavedWeights(str(workdir)).leaves("ema")
        found = {path: leaf.read() for path, leaf in leaves.items()}
        average = flatten_dict(rebuilt_ema(str(workdir), 0.1, step=2))  # of the first part
        weights.append(found | {("width", *path): value for path, value in average.items()})
    assert weights[0].keys() == weights[1].keys()
    assert ("blocks", "1", "attn", "qkv", "kernel") in weights[0]
    for path, value in weights[0].items():
        np.testing.assert_allclose(weights[1][path], value, atol=1e-5, err_msg=str(path))
