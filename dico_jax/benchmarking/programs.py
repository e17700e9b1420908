"""The programs that are measured: a forward pass, a training step, a whole sampling."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict

from dico_jax.checkpoints.state import TrainState
from dico_jax.experiment import experiment_from_config, sampling_from_config
from dico_jax.models import abstract_params, forward_flops, training_flops
from dico_jax.models.block_stacks import STACK
from dico_jax.parallel.mesh import batch_sharding, replicated
from dico_jax.sampling.programs import make_latents_fn
from dico_jax.training.program import training_program

LOOPS_NOTE = "the program has loops, whose bodies XLA counts once"
NO_COUNT_NOTE = "XLA gives no count on this platform"


class Plan(NamedTuple):
    """A jitted function of (weights, arrays), and what it is called with."""

    function: jax.stages.Wrapped
    weights: Any  # shapes of parameters or of a `TrainState`, whole on every device
    arrays: Any  # a tree of NumPy arrays, which the mesh splits
    flops: int  # of one run over all devices, by the network's sizes


def plan_forward(config: ConfigDict, mesh: Mesh) -> Plan:
    model, shape, arrays = _network(config)
    function = _jitted(lambda params, args: model.apply({"params": params}, *args), mesh)
    flops = len(arrays[0]) * forward_flops(model, shape)
    return Plan(function, abstract_params(model), arrays, flops)


def plan_train(config: ConfigDict, mesh: Mesh) -> Plan:
    """The training step of a run on latents; the state is donated."""
    model, shape, (x, _, condition) = _network(config)
    program = training_program(config, experiment_from_config(config, sizes_alone=True), mesh)
    function = _jitted(program.step, mesh, donate_argnums=0, out_shardings=replicated(mesh))
    batch = {"x": x, "condition": condition}
    return Plan(function, program.stacked, batch, len(x) * training_flops(model, shape))


def plan_sample(config: ConfigDict, mesh: Mesh) -> Plan:
    """Latents from noise by the sampler of a run, without the autoencoder."""
    model, shape, (x, _, condition) = _network(config)
    process, options = sampling_from_config(config)
    latents = make_latents_fn(model, process, shape, options)
    arrays = np.arange(len(x), dtype=np.int32), condition
    passes = len(x) * process.num_steps * (1 if options.cfg_scale == 1 else 2)  # one without label
    function = _jitted(lambda params, args: latents(params, *args), mesh)
    return Plan(function, abstract_params(model), arrays, passes * forward_flops(model, shape))


PLANS = {"forward": plan_forward, "train": plan_train, "sample": plan_sample}


def _network(config: ConfigDict):
    """The network, (H, W, C) of its input, and random latents, timesteps and conditions."""
    experiment, size = experiment_from_config(config, sizes_alone=True), config.data.batch_size
    model, shape, rng = experiment.model, experiment.latent_shape, np.random.default_rng(0)
    x, t = rng.standard_normal((size, *shape), np.float32), rng.integers(0, 1000, size, np.int32)
    return model, shape, (x, t, model.zero_condition(size))


def _jitted(function: Callable[..., Any], mesh: Mesh, **options: Any) -> jax.stages.Wrapped:
    split, whole = batch_sharding(mesh), replicated(mesh)
    places: dict[str, Any] = {"in_shardings": (whole, split), "out_shardings": split}
    return jax.jit(function, **places | options)


class Compiled(NamedTuple):
    executable: jax.stages.Compiled
    trace_seconds: float  # Python's part, from the function to the program that XLA is given
    compile_seconds: float  # XLA's part
    has_loops: bool  # whose bodies XLA's counts contain once


def compile_ahead(function: Any, *args: Any) -> Compiled:
    """Traces and compiles a jitted function for arguments, of which only shapes matter."""
    start = time.perf_counter()
    lowered = (traced := function.trace(*args)).lower()
    between = time.perf_counter()
    executable = lowered.compile()
    seconds = between - start, time.perf_counter() - between
    return Compiled(executable, *seconds, _has_loops(traced.jaxpr.jaxpr))


def _has_loops(jaxpr) -> bool:
    return any(
        equation.primitive.name in {"scan", "while"}
        or any(map(_has_loops, core.jaxprs_in_params(equation.params)))
        for equation in jaxpr.eqns
    )


def xla_counts(compiled: Compiled, num_devices: int) -> dict[str, Any]:
    costs = compiled.executable.cost_analysis() or {}
    flops, read = costs.get("flops", 0), costs.get("bytes accessed", 0)
    note = LOOPS_NOTE if compiled.has_loops else None if flops > 0 else NO_COUNT_NOTE
    counts_bytes = read > 0 and not compiled.has_loops
    return {
        "flops_per_run_by_xla": None if note else flops * num_devices,
        "bytes_accessed_per_run_by_xla": read * num_devices if counts_bytes else None,
        "no_flops_by_xla_because": note,
    }


def memory_gb(compiled: Compiled) -> dict[str, float] | None:
    """What a program needs on a device, in GB (1e9 bytes); None where XLA does not say."""
    if (stats := compiled.executable.memory_analysis()) is None:
        return None
    outputs, in_place = stats.output_size_in_bytes, stats.alias_size_in_bytes
    sizes = {"arguments": stats.argument_size_in_bytes, "outputs": outputs}
    sizes |= {"outputs_not_in_place": outputs - in_place, "temporaries": stats.temp_size_in_bytes}
    return {name: size / 1e9 for name, size in sizes.items()}


class Program(NamedTuple):
    """A compiled plan with its arguments on the devices; `run` waits, and gives finite numbers."""

    compiled: Compiled
    flops: int
    run: Callable[[], Any]


def make_program(action: str, config: ConfigDict, mesh: Mesh) -> Program:
    """One of `PLANS`, compiled and ready, for a complete config."""
    plan = PLANS[action](config, mesh)
    compiled = compile_ahead(plan.function, plan.weights, plan.arrays)
    weights = draw(plan.weights, replicated(mesh))
    arrays = jax.device_put(plan.arrays, batch_sharding(mesh))

    def run():
        nonlocal weights
        result = jax.block_until_ready(compiled.executable(weights, arrays))
        if not isinstance(weights, TrainState):
            return result
        weights, metrics = result  # the state of the last step is donated
        return metrics

    return Program(compiled, plan.flops, run)


def draw(abstract: Any, sharding: Sharding) -> Any:
    """Random parameters without gates of zero, drawn on the host, or a state that has them."""
    rng = np.random.default_rng(0)

    def leaf(path, like):
        keys = [str(entry.key) for entry in path]
        shape = like.shape[1:] if STACK in keys else like.shape
        scale = 1 / math.sqrt(math.prod(shape[:-1])) if keys[-1] == "kernel" else 0.02
        values = rng.standard_normal(like.shape, np.float32)
        return jax.device_put(np.multiply(values, np.float32(scale), out=values), sharding)

    if not isinstance(abstract, TrainState):
        return jax.tree_util.tree_map_with_path(leaf, abstract)
    params, ema_params = draw(abstract.params, sharding), draw(abstract.ema_params, sharding)
    rest = abstract.replace(params=(), ema_params=())
    rest = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype, device=sharding), rest)
    return rest.replace(params=params, ema_params=ema_params)
