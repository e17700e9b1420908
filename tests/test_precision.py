"""What bfloat16 costs: outputs and gradients against those of float32, with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.models import abstract_params, create_model
from tests.golden import distance

DICO = ("DiCo", {"hidden_size": 32, "depth": (1, 1, 2, 1, 1), "num_classes": 10})
DEEPER_DICO = ("DiCo", {**DICO[1], "depth": (2, 2, 2, 2, 2)})
DIT = ("DiT", {"hidden_size": 64, "depth": 4, "num_heads": 4, "num_classes": 10})
# Of the peak. A bfloat16 number has 8 bits: a rounding is 2^-9 of it, and errors of the layers add.
OUTPUT_BUDGET = 0.02
GRADIENT_BUDGET = 0.08


def drawn(model):
    """Parameters none of which is zero, each near its own scale."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 50
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map(draw, abstract_params(model))


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(DICO, id="DiCo", marks=pytest.mark.slow),
        pytest.param(DIT, id="DiT"),
        pytest.param(DEEPER_DICO, id="deeper DiCo", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_stays_within_its_budget(network):
    name, sizes = network
    rng = np.random.default_rng(1)
    x, weights = (jnp.asarray(rng.normal(size=(2, 32, 32, c)), jnp.float32) for c in (4, 8))
    t, y = jnp.asarray([10, 700]), jnp.asarray([3, 10])
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = create_model(name, dtype=dtype, **sizes)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(model))} == {"float32"}
        params = drawn(model)

        def loss(params, model=model):
            out = model.apply({"params": params}, x, t, y)
            # Not a mean square alone, whose gradients are small differences of large sums.
            return (weights * out).sum() + jnp.square(out).mean(), out

        found[dtype] = jax.jit(jax.grad(loss, has_aux=True))(params)
    gradients, output = found["bfloat16"]
    exact_gradients, exact_output = found["float32"]
    assert output.dtype == jnp.float32
    assert 1e-4 < distance(output, exact_output) < OUTPUT_BUDGET
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    errors = {
        jax.tree_util.keystr(path): distance(leaf, exact)
        for (path, leaf), exact in zip(leaves, jax.tree.leaves(exact_gradients), strict=True)
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < GRADIENT_BUDGET, worst
