"""How state and batches lie on meshes, and that it changes no result."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dico_jax.checkpoints.state import create_state, initializer
from dico_jax.diffusion import create_diffusion
from dico_jax.errors import UsageError
from dico_jax.experiment import model_from_config
from dico_jax.models import abstract_params, count_parameters, create_model
from dico_jax.models.block_stacks import (
    stack_blocks,
    stack_shardings,
    unstack_blocks,
    whole_where_used,
)
from dico_jax.ops import cpu
from dico_jax.ops.cpu import use_all_cores
from dico_jax.parallel.mesh import batch_sharding, create_mesh, data_shard, replicated, to_global
from dico_jax.parallel.sharding import (
    DEFAULT_RULES,
    parse_rules,
    partition_spec,
    say_unmet,
    state_sharding,
)
from dico_jax.training import speed
from dico_jax.training.optimizer import create_optimizer
from dico_jax.training.step import gradients
from tests.test_training import digits, run_steps

HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_mesh_axes():
    assert dict(create_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(create_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(create_mesh(data=1, fsdp=4, tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    for sizes in ({"fsdp": 3}, {"data": 4}, {"data": 4, "fsdp": 4}, {"tensor": 0}, {"data": 0}):
        with pytest.raises(UsageError, match=r"mesh.data=-?\d, config.mesh.fsdp=\d and config"):
            create_mesh(**sizes)


@pytest.mark.parametrize(
    ("given", "cores", "count"),
    [
        ({}, 16, 8),
        ({}, 3, 3),
        ({"fits": lambda count: 6 % count == 0}, 4, 3),
        ({"fits": lambda count: False}, 4, 1),
    ],
)
def test_all_cores(monkeypatch, given, cores, count):
    set_to = {}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    use_all_cores(**given)
    assert set_to == {"jax_num_cpu_devices": count}


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=7"}, 7),
        ({"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "5"}, 5),
        ({"XLA_FLAGS": ""}, min(os.cpu_count(), 8)),
    ],
)
def test_a_number_of_devices_that_is_given_stays(environment, count):
    code = "import jax, dico_jax.ops.cpu as m; m.use_all_cores(); print(jax.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == count


def test_a_run_gets_as_many_devices_as_its_batch_mesh_and_memory_allow(monkeypatch):
    def most(memory=2**40, **fields):
        monkeypatch.setattr(cpu, "copies_fit", lambda size, count: size * count <= memory)
        monkeypatch.setattr(speed, "copies_fit", cpu.copies_fit)
        config = digits.get_config()
        config.update_from_flattened_dict(fields)
        fits = speed.run_fits(config)
        return next((count for count in range(8, 0, -1) if fits(count)), None)

    size = {"data.batch_size": 24}
    assert most(**size) == 8
    assert most(**{"data.batch_size": 10}) == 5
    assert most(**{"data.batch_size": 7}) == 7
    assert most(**size, **{"training.accumulation_steps": 2}) == 6
    assert most(**size, **{"training.accumulation_steps": 5}) is None
    assert most(**size, **{"mesh.data": 1}) == 1
    assert most(**size, **{"mesh.data": 2, "mesh.fsdp": 2}) == 4
    assert most(**size, **{"mesh.tensor": 5}) == 5
    assert most(**size, **{"mesh.fsdp": 0}) is None
    state = 24 * count_parameters(model_from_config(digits.get_config()))
    assert most(**size, memory=3 * state) == 3
    assert most(**size, **{"mesh.fsdp": 2}, memory=3 * state) == 6
    assert most(**size, **{"model.name": "unknown"}) == 8  # the run itself refuses it
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert most(**size) is None


def test_copies_fit_into_half_of_the_memory():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    assert cpu.copies_fit(memory // 8, 4)
    assert not cpu.copies_fit(memory // 4, 4)
    assert cpu.copies_fit(2 * memory, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc to keep memory")
def test_memory_that_is_kept_is_not_cleared_again():
    code = """
import ctypes, resource, sys, threading
from dico_jax.ops.cpu import use_all_cores

use_all_cores(keep_memory=sys.argv[1] == "keep")
libc, size, faults = ctypes.CDLL(None), 100_000_000, []
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

for _ in range(3):  # a step of XLA runs in any thread
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
print(faults[0], faults[-1])
"""
    faults = {}
    for what in ("keep", "give back"):
        done = subprocess.run(
            [sys.executable, "-c", code, what], env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        faults[what] = [int(number) for number in done.stdout.split()]
    assert faults["keep"][-1] < 100 < faults["give back"][-1]
    if "[never]" not in HUGE_PAGES.read_text():
        assert faults["keep"][0] < faults["give back"][0] / 10


def test_batches_are_split_over_data_and_fsdp_and_whole_along_tensor():
    rows = np.arange(16, dtype=np.float32)[:, None]
    for axes, per_device in (({"fsdp": 2}, 2), ({"fsdp": 2, "tensor": 2}, 4)):
        sharding = batch_sharding(create_mesh(**axes))
        assert data_shard(sharding) == (0, 1)
        batch = to_global(rows, sharding)
        np.testing.assert_array_equal(batch, rows)
        assert {shard.data.shape for shard in batch.addressable_shards} == {(per_device, 1)}


def test_specs_of_rules():
    mesh = create_mesh(fsdp=2, tensor=2)

    def spec(path, shape, rules=DEFAULT_RULES):
        return partition_spec(path, shape, mesh, rules)

    assert spec("latent/0/conv1/kernel", (8, 8)) == P("fsdp", "tensor")
    assert spec("latent/0/conv3/kernel", (8, 8)) == P("tensor", "fsdp")
    assert spec("latent/0/conv2/kernel", (3, 3, 1, 8)) == P(None, None, None, "tensor")
    assert spec("latent/0/conv3/bias", (8,)) == P()
    assert spec("latent/0/conv1/kernel", (7, 8)) == P(None, "tensor")  # 7 does not divide
    assert spec("a/kernel", (8, 8), (("a/", ("tensor",)), ("a", ("fsdp",)))) == P("tensor")
    with pytest.raises(UsageError, match=r"mesh.rules: 'bias' has 2 axes, a/bias has shape"):
        spec("a/bias", (8,), (("bias", ("fsdp", "tensor")),))
    assert parse_rules([["a", ["fsdp", None]]]) == (("a", ("fsdp", None)),)
    for rule in ("a", ("(", ()), ("a", ("model",)), ("a", ("fsdp", "fsdp")), ("a", 3)):
        with pytest.raises(UsageError, match=r"mesh.rules: .* is not"):
            parse_rules([rule])


@pytest.mark.parametrize("name", ["DiCo-XL", "DiT-XL/2"])
def test_nearly_all_of_a_state_is_shared(name):
    """Parameters, averages and moments: what is left whole on every device is under 1%."""
    model = create_model(name)
    optimizer = create_optimizer(digits.get_config().optimizer, 10)
    state = jax.eval_shape(initializer(model, optimizer, (32, 32, 4), (0.05,)), jax.random.key(0))
    sharding = state_sharding(state, create_mesh(fsdp=4, tensor=2))
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(sharding), strict=True)
    own = sum(np.prod(s.shard_shape(leaf.shape), dtype=np.int64) for leaf, s in leaves)
    whole = sum(np.prod(leaf.shape, dtype=np.int64) for leaf in jax.tree.leaves(state))
    assert whole > 5 * 6.7e8
    assert own / whole < 1 / 8 + 0.01


def test_a_state_is_made_in_its_place():
    model = create_model("DiT", hidden_size=8, depth=1, num_heads=1, in_channels=1)
    init = initializer(model, create_optimizer(digits.get_config().optimizer, 10), (8, 8, 1))
    mesh = create_mesh(fsdp=8)
    state = create_state(init, 0, state_sharding(jax.eval_shape(init, jax.random.key(0)), mesh))
    kernel = state.params["blocks"]["0"]["attn"]["qkv"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 24)}
    moment = state.opt_state[0].mu["blocks"]["0"]["attn"]["qkv"]["kernel"]
    assert moment.sharding == kernel.sharding
    whole = create_state(
        init, 0, state_sharding(jax.eval_shape(init, jax.random.key(0)), create_mesh())
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(whole))


NETWORKS = {
    "DiCo": {"hidden_size": 8, "depth": (1,) * 5},
    "DiT": {"hidden_size": 8, "depth": 2, "num_heads": 2},
}


def loss_and_gradients(family="DiCo", data=1, fsdp=1, tensor=1, parts=1, stacked=False, **options):
    """Of fixed weights and draws, on a mesh of the first devices; blocks are given back apart."""
    count, rng = data * fsdp * tensor, np.random.default_rng(0)
    mesh = create_mesh(jax.devices()[:count], data=data, fsdp=fsdp, tensor=tensor)
    model = create_model(family, **NETWORKS[family], in_channels=1, num_classes=10, **options)
    params = jax.tree.map(
        lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(np.float32), abstract_params(model)
    )
    x, noise = rng.normal(size=(2, 8, 8, 8, 1)).astype(np.float32)
    labels, t = rng.integers(0, 10, 8), rng.integers(0, 1000, 8)
    sharding, split = state_sharding(params, mesh), batch_sharding(mesh)
    if stacked:
        params = stack_blocks(jax.device_put(params, sharding), model.stages)
        sharding = stack_shardings(sharding, model.stages)
    compiled = jax.jit(
        lambda p, b, t, n: gradients(p, model, create_diffusion(), b, t, n, parts, sharding),
        in_shardings=(sharding, split, split, split),
        out_shardings=(sharding, replicated(mesh)),
    )
    grads, terms = compiled(params, {"x": x, "condition": {"label": labels}}, t, noise)
    return jax.device_get((unstack_blocks(grads) if stacked else grads, terms))


@functools.cache
def plain(family):
    return loss_and_gradients(family)


def slow(**how):
    return pytest.param(how, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "how",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},  # wrong where XLA partitions products along "fsdp"
        slow(fsdp=4),
        slow(data=2, fsdp=4),
        slow(fsdp=2, tensor=2),
        slow(fsdp=4, tensor=2),
        slow(fsdp=2, tensor=4),
        slow(data=4, tensor=2),
        slow(data=2, tensor=4),
        # test_multiprocess.py has it too.
        slow(data=4, parts=2),
        *(
            slow(family=family, data=2, fsdp=2, tensor=2, **more)
            for family in NETWORKS
            for more in (
                {},
                {"parts": 2},
                {"remat": "blocks"},
                {"remat": "dots"},
                {"scan_blocks": True},
                {"scan_blocks": True, "stacked": True},
                {"scan_blocks": True, "stacked": True, "remat": "dots"},
            )
        ),
    ],
    ids=str,
)
def test_losses_and_gradients_are_the_same(how):
    (grads, terms), (found_grads, found_terms) = (
        plain(how.get("family", "DiCo")),
        loss_and_gradients(**how),
    )
    for name, value in terms.items():  # example by example, in their order
        np.testing.assert_allclose(found_terms[name], value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
        found_grads,
        grads,
    )


def test_a_network_gets_whole_what_the_batch_s_axes_split():
    mesh = create_mesh(data=2, fsdp=2, tensor=2)
    model = create_model("DiT", **NETWORKS["DiT"], scan_blocks=True, dtype="bfloat16")
    params = abstract_params(model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params)
    sharding = state_sharding(params, mesh)
    # A rule for one block alone: a loop treats them all as the first.
    sharding["blocks"]["1"]["mlp"]["fc1"]["kernel"] = replicated(mesh)
    boxed = whole_where_used(params, model, sharding)
    boxes = [boxed["blocks"][i]["mlp"]["fc1"]["kernel"] for i in ("0", "1")]
    assert [box.names for box in boxes] == [("fsdp", "tensor")] * 2
    kernel = jax.jit(lambda box: box.unbox())(boxes[0])
    assert kernel.sharding.spec == P(None, "tensor")
    assert kernel.dtype == jnp.bfloat16
    assert isinstance(boxed["blocks"]["0"]["mlp"]["fc1"]["bias"], np.ndarray)  # only "tensor"

    whole = whole_where_used(params, model, replicated(mesh))
    assert jax.tree.structure(whole) == jax.tree.structure(params)


@functools.cache
def plain_run(family):
    return run_steps(jax.devices()[:1], family, learning_rate=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("DiCo", {"fsdp": 4}),
        ("DiCo", {"fsdp": 2, "tensor": 2}),
        ("DiCo", {"fsdp": 2, "tensor": 2, "accumulation_steps": 2}),
        ("DiCo", {"accumulation_steps": 2}),
        ("DiT", {"fsdp": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_meshes_and_accumulation_train_alike(family, how):
    expected, state = plain_run(family)
    found, found_state = run_steps(jax.devices(), family, learning_rate=1e-4, **how)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(  # Adam's parameters hardly tell a wrong gradient, its moments do
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
        found_state.opt_state[0].mu,
        state.opt_state[0].mu,
    )


def test_parameters_have_the_paths_that_the_rules_name():
    """A rule that no parameter matches would be a mistake."""
    import re

    paths, sizes = [], {"hidden_size": 32, "depth": (1, 1, 1, 1, 1), "num_classes": 10}
    kinds = [{"channel_attention": kind} for kind in ("squeeze_excite", "self_attention")]
    variants = [create_model("DiCo", **sizes, **kind) for kind in kinds]
    for model in (*map(create_model, ("DiCo-S", "DiT-S/2", "FCDM-S")), *variants):
        tree = jax.tree_util.tree_leaves_with_path(abstract_params(model))
        paths += ["/".join(key.key for key in path) for path, _ in tree]
    for pattern, _ in DEFAULT_RULES:
        assert any(re.search(pattern, path) for path in paths), pattern


def test_rules_and_parameters_that_miss_each_other_are_said(capsys):
    params = {
        "a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        "b": {"kernel": jnp.ones((2, 2))},
    }
    shared = create_mesh(fsdp=2)
    say_unmet(params, create_mesh())
    say_unmet(params, shared, parse_rules([("a/kernel", ("fsdp",)), ("^b", ())]))
    assert capsys.readouterr().err == ""
    say_unmet(params, create_mesh(), parse_rules([("a/kernel", ("fsdp",)), ("c", ("fsdp",))]))
    one, other = capsys.readouterr().err.splitlines()
    assert one == "mesh.rules: 'c' finds no parameter"
    assert other.startswith("mesh.rules: no rule is for b/kernel (2, 2)")
    say_unmet(params, shared)  # the rules in force are for other networks
    assert len(capsys.readouterr().err.splitlines()) == 2
    for name in ("DiCo-S", "DiT-S/2"):
        say_unmet(abstract_params(create_model(name)), shared)
    assert capsys.readouterr().err == ""
