"""Blocks in one loop, and recomputed in the backward pass, are the blocks one by one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dico_jax.models import abstract_params, create_model
from dico_jax.models.block_stacks import Stage
from dico_jax.models.dico import DiCoBlock
from dico_jax.models.dit import DiTBlock
from tests import golden

FAMILIES = ["DiCo", "DiT"]
NETWORKS = {
    "DiCo": {"hidden_size": 8, "depth": (1, 3, 1, 1, 1), "num_classes": 10},
    "DiT": {"hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 10},
}
WAYS = [(True, "none"), (True, "blocks"), (True, "dots"), (False, "blocks"), (False, "dots")]


def make_stage(family, depth, scan=False, remat="none", dtype="float32"):
    dtype = jnp.dtype(dtype)
    block = {
        "DiCo": functools.partial(DiCoBlock, 8, 2.0, dtype),
        "DiT": functools.partial(DiTBlock, 16, 2, 4.0, dtype),
    }[family]
    return Stage(depth, block, dtype, scan, remat)


def stage_inputs(family, dtype="float32"):
    """Activations (8, ...) and conditioning vectors of a stage."""
    rng = np.random.default_rng(3)
    shapes = {"DiCo": ((8, 4, 4, 8), (8, 8)), "DiT": ((8, 16, 16), (8, 16))}[family]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def stage_params(family, depth, dtype="float32"):
    """Parameters of which every one matters: initial ones are zero in the gates."""
    stage, rng = make_stage(family, depth), np.random.default_rng(4)
    abstract = jax.eval_shape(stage.init, jax.random.key(0), *stage_inputs(family))["params"]
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), dtype), abstract)


def network_inputs(n=4):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(n, 8, 8, 4)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 1000, n)), jnp.asarray(rng.integers(0, 11, n))


def output_and_gradient(model, argnums=0):
    """The function (params, *args) -> (output, gradient of a sum in which all of it matters)."""

    def loss(params, *args):
        out = model.apply({"params": params}, *args)
        return jnp.sin(out + 1).sum(), out

    def both(*args):
        gradient, out = jax.grad(loss, argnums, has_aux=True)(*args)
        return out, gradient

    return both


def stage_function(*args, **kwargs):
    """Output of a stage and its gradient by parameters, activations and conditioning."""
    return jax.jit(output_and_gradient(make_stage(*args, **kwargs), argnums=(0, 1, 2)))


def run(function, params, args):
    out, gradient = function(params, *args)
    return out, {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(gradient)}


@functools.cache
def compiled_stage(family, depth, scan, remat, dtype):
    args = stage_params(family, depth, dtype), *stage_inputs(family, dtype)
    return stage_function(family, depth, scan, remat, dtype).lower(*args).compile()


def assert_close(found, reference, forward, gradient):
    """Distances of the outputs, and of each tensor of the gradients, relative to the peak."""
    assert found[0].dtype == reference[0].dtype
    assert golden.distance(found[0], reference[0]) < forward
    assert found[1].keys() == reference[1].keys()
    for key, value in reference[1].items():
        assert np.any(value), key
        assert found[1][key].dtype == value.dtype
        assert golden.distance(found[1][key], value) < gradient, key


@pytest.mark.parametrize(
    ("depth", "dtype", "ways"),
    [
        (3, "float32", WAYS[1::2]),
        (1, "float64", WAYS[:1]),
        pytest.param(3, "float64", WAYS[2:3], marks=pytest.mark.slow),
        pytest.param(3, "float32", WAYS, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_run_the_blocks_gives_the_same(family, depth, dtype, ways):
    tolerances = {"float32": (1e-6, 1e-5), "float64": (1e-12, 1e-12)}[dtype]
    with jax.enable_x64(dtype == "float64"):
        params, args = stage_params(family, depth, dtype), stage_inputs(family, dtype)
        reference = run(compiled_stage(family, depth, False, "none", dtype), params, args)
        for scan, remat in ways:
            found = run(compiled_stage(family, depth, scan, remat, dtype), params, args)
            assert_close(found, reference, *tolerances)


def test_gradient_of_a_whole_network():
    models = [
        create_model("DiT", **NETWORKS["DiT"], **options)
        for options in ({}, {"scan_blocks": True, "remat": "dots"})
    ]
    params = golden.drawn_params(models[0], 1, "B")
    reference, found = (
        run(jax.jit(output_and_gradient(model)), params, network_inputs()) for model in models
    )
    assert_close(found, reference, 1e-6, 1e-5)


@pytest.mark.slow
def test_bfloat16():
    params, args = stage_params("DiCo", 3), stage_inputs("DiCo", "bfloat16")
    reference, found = (
        run(stage_function("DiCo", 3, scan, dtype="bfloat16"), params, args)
        for scan in (False, True)
    )
    assert_close(found, reference, 2e-2, 0.1)  # what rounding to 8 bits in another order leaves


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_cast_before_they_are_stacked(family):
    params = stage_params(family, 3)
    stage = make_stage(family, 3, scan=True, dtype="bfloat16")
    program = jax.make_jaxpr(stage.apply)({"params": params}, *stage_inputs(family, "bfloat16"))
    stacks = re.findall(r":(\w+)\[3,[\d,]*\] = stack", str(program))
    assert len(stacks) == len(jax.tree.leaves(params["0"]))
    assert set(stacks) == {"bf16"}


@pytest.mark.parametrize("way", [(True, "none"), (False, "blocks")])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_lie_and_start_as_in_separate_blocks(family, way):
    models = [
        create_model(family, **NETWORKS[family], scan_blocks=scan, remat=remat)
        for scan, remat in ((False, "none"), way)
    ]
    assert abstract_params(models[0]) == abstract_params(models[1])
    programs = [
        str(jax.make_jaxpr(lambda key, m=m: m.init(key, *network_inputs()))(jax.random.key(0)))
        for m in models
    ]
    assert programs[0] == programs[1]


@pytest.mark.slow
def test_the_program_has_one_size_for_all_depths():
    def size(function, *args):
        """Number of equations, those of inner functions included."""
        return str(jax.make_jaxpr(function)(*args)).count(" = ")

    def sizes(depth, scan):
        model = create_model("DiCo", **{**NETWORKS["DiCo"], "depth": depth}, scan_blocks=scan)
        params = abstract_params(model)
        yield size(model.apply, {"params": params}, *network_inputs())
        yield size(output_and_gradient(model), params, *network_inputs())

    shallow, deep = (2, 2, 2, 2, 2), (5, 5, 5, 5, 5)
    assert list(sizes(shallow, True)) == list(sizes(deep, True))
    assert next(sizes(deep, False)) > 1.5 * next(sizes(shallow, False))


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_saves_memory(family):
    none, dots, blocks = (
        compiled_stage(family, 3, True, remat, "float32").memory_analysis().temp_size_in_bytes
        for remat in ("none", "dots", "blocks")
    )
    assert blocks < 0.9 * dots
    assert dots < 0.8 * none


def test_recomputing_costs_operations_in_separate_blocks_too():
    """Memory would not show it: XLA orders operations for a CPU without regard to it."""
    none, dots, blocks = (
        compiled_stage("DiT", 3, False, remat, "float32").cost_analysis()["flops"]
        for remat in ("none", "dots", "blocks")
    )
    assert none < dots < blocks


@pytest.mark.parametrize(("family", "are_split"), [("DiCo", True), ("DiT", False)])
def test_on_eight_devices(family, are_split):
    """The batch split over a mesh, and the parameters whole or split as well.

    In float64: in float32 the order of sums, which differs, decides more than the bar.
    """
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def place(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def last(leaf):  # every width here divides by eight
        return (*[None] * (leaf.ndim - 1), "data") if are_split else ()

    with jax.enable_x64(True):
        params, args = stage_params(family, 3, "float64"), stage_inputs(family, "float64")
        reference = run(compiled_stage(family, 3, True, "dots", "float64"), params, args)
        params = jax.tree.map(lambda leaf: place(leaf, *last(leaf)), params)
        function = stage_function(family, 3, scan=True, remat="dots", dtype="float64")
        found = run(function, params, [place(x, "data") for x in args])
        assert len(found[0].sharding.device_set) == 8
        assert_close(found, reference, 1e-12, 1e-12)


@golden.requires_golden
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_published_numbers(dtype):
    g = golden.load("dico_tiny_forward.npz")
    with jax.enable_x64(dtype == "float64"):
        model = create_model("DiCo", dtype=dtype, scan_blocks=True, remat="blocks", **golden.TINY)
        params = golden.drawn_params(model, *golden.TINY_DRAWS["B"][:1], "B")
        params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
        args = jnp.asarray(golden.nhwc(g["x"]), dtype), jnp.asarray(g["t"]), jnp.asarray(g["y"])
        out = jax.jit(model.apply)({"params": params}, *args)
        assert golden.distance(out, golden.nhwc(g["B_out_f64"])) < golden.TOLERANCE["B", dtype]
