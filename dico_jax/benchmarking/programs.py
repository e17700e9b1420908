"""The programs that are measured: a forward pass, a training step, a whole sampling."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from ml_collections import ConfigDict

from dico_jax.benchmarking.compiled import Compiled, compile_ahead
from dico_jax.checkpoints.state import TrainState, abstract_state, initializer
from dico_jax.experiment import experiment_from_config, sampling_from_config
from dico_jax.models import (
    abstract_params,
    count_parameters,
    forward_flops,
    forward_macs,
    training_flops,
)
from dico_jax.models.block_stacks import STACK, map_stacks
from dico_jax.models.denoiser import Denoiser
from dico_jax.parallel.mesh import batch_sharding, replicated
from dico_jax.sampling.generate import make_latents_fn
from dico_jax.training.optimizer import create_optimizer
from dico_jax.training.step import StepOptions, make_train_step

_SMALL = 0.02  # standard deviation of parameters that are no kernels


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program has to do, by the network's sizes.

    Attributes:
      parameters: trainable parameters of the network.
      macs_per_image: multiply-adds of one forward pass, see `forward_macs`.
      flops: floating-point operations of one run over all devices.
    """

    parameters: int
    macs_per_image: int | None
    flops: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A program with its arguments on the devices.

    Attributes:
      compiled: see `Compiled`.
      work: see `Work`.
      run: runs it once and waits for the result, of which it returns what has to be finite.
    """

    compiled: Compiled
    work: Work
    run: Callable[[], Any]


def make_forward(config: ConfigDict, mesh: Mesh) -> Program:
    """`model.apply` on a batch split over the mesh, with whole parameters on every device.

    Args:
      config: complete; model and data are used.
      mesh: the devices.

    Raises:
      UsageError: naming the field, its value and the fix.
    """
    experiment = experiment_from_config(config)
    model, shape = experiment.model, experiment.latent_shape
    split, whole = batch_sharding(mesh), replicated(mesh)
    params, size = abstract_params(model), config.data.batch_size
    x, t, y = _abstract_inputs(size, shape)
    compiled = compile_ahead(
        jax.jit(
            lambda params, x, t, y: model.apply({"params": params}, x, t, y),
            in_shardings=(whole, split, split, split),
            out_shardings=split,
        ),
        (params, x, t, y),
    )
    args = draw_params(params, whole), *_inputs(size, shape, model.num_classes, split)
    work = _work(model, shape, size * forward_flops(model, shape))
    return Program(compiled, work, lambda: jax.block_until_ready(compiled.executable(*args)))


def train_function(config: ConfigDict, mesh: Mesh) -> tuple[jax.stages.Wrapped, tuple]:
    """The training step of a run on latents, jitted, and its abstract arguments.

    Args:
      config: complete; model, data, diffusion, optimizer and training are used.
      mesh: the devices; the batch is split over them, the state whole on every one.

    Raises:
      UsageError: naming the field, its value and the fix.
    """
    experiment = experiment_from_config(config)
    model, shape = experiment.model, experiment.latent_shape
    split, whole = batch_sharding(mesh), replicated(mesh)
    optimizer = create_optimizer(config.optimizer, config.training.num_steps)
    options = StepOptions(seed=config.seed, ema_decay=config.training.ema_decay)
    step = make_train_step(model, experiment.diffusion, optimizer, mesh=mesh, options=options)
    abstract = jax.eval_shape(
        lambda state: map_stacks(lambda *leaves: jnp.stack(leaves), state, model.stacked_stages),
        abstract_state(initializer(model, optimizer, shape)),
    )
    x, _, y = _abstract_inputs(config.data.batch_size, shape)
    function = jax.jit(
        lambda state, batch: step(state, batch),
        donate_argnums=0,
        in_shardings=(whole, split),
        out_shardings=(whole, whole),
    )
    return function, (abstract, {"x": x, "condition": {"label": y}})


def make_train(config: ConfigDict, mesh: Mesh) -> Program:
    """`train_function`, with state and batch on the devices."""
    function, (abstract, batch) = train_function(config, mesh)
    compiled = compile_ahead(function, (abstract, batch))
    experiment = experiment_from_config(config)
    model, shape, size = experiment.model, experiment.latent_shape, config.data.batch_size
    split, whole = batch_sharding(mesh), replicated(mesh)
    optimizer = create_optimizer(config.optimizer, config.training.num_steps)
    params, average = (draw_params(abstract.params, whole) for _ in range(2))
    state = TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), whole),
        params=params,
        ema_params=average,
        opt_state=jax.jit(optimizer.init, out_shardings=whole)(params),
    )
    x, _, y = _inputs(size, shape, model.num_classes, split)
    work = _work(model, shape, size * training_flops(model, shape))
    return Program(
        compiled, work, _train_run(compiled.executable, state, {"x": x, "condition": {"label": y}})
    )


def _train_run(executable, state: TrainState, batch: dict) -> Callable[[], Any]:
    """Takes the next step at every call: the state of the last one is donated."""

    def run():
        nonlocal state
        state, metrics = jax.block_until_ready(executable(state, batch))
        return metrics

    return run


def make_sample(config: ConfigDict, mesh: Mesh) -> Program:
    """Latents from noise by the sampler of a run, without the autoencoder.

    Args:
      config: complete; model, diffusion, sampling and data.image_size are used, and
        data.batch_size for the number of images.
      mesh: the devices; images are split over them.

    Raises:
      UsageError: naming the field, its value and the fix.
    """
    experiment = experiment_from_config(config)
    process, options = sampling_from_config(config)
    model, shape = experiment.model, experiment.latent_shape
    split, whole = batch_sharding(mesh), replicated(mesh)
    sample = make_latents_fn(model, process, shape, options)
    params, size = abstract_params(model), config.data.batch_size
    numbers = jax.ShapeDtypeStruct((size,), jnp.int32)
    compiled = compile_ahead(
        jax.jit(sample, in_shardings=(whole, split, split), out_shardings=split),
        (params, numbers, {"label": numbers}),
    )
    indices = np.arange(size, dtype=np.int32)
    args = (
        draw_params(params, whole),
        *jax.device_put((indices, model.default_conditions(indices, None)), split),
    )
    passes = size * process.num_steps * passes_per_step(options.cfg_scale)
    work = _work(model, shape, passes * forward_flops(model, shape))
    return Program(compiled, work, lambda: jax.block_until_ready(compiled.executable(*args)))


ACTIONS: Mapping[str, Callable[[ConfigDict, Mesh], Program]] = {
    "forward": make_forward,
    "train": make_train,
    "sample": make_sample,
}


def passes_per_step(cfg_scale: float) -> int:
    """Forward passes per image and sampling step: guidance has one with and one without label."""
    return 1 if cfg_scale == 1 else 2


def draw_params(abstract: Any, sharding: Sharding) -> Any:
    """Random parameters, of which none is zero.

    The networks' own initial values have gates of zero, so that their blocks add nothing. Here
    kernels are normal with variance 1 / fan-in, and everything else is normal and small. They are
    drawn on the host, because compiling initialisers takes longer.

    Args:
      abstract: the tree of their shapes; blocks may be stacked.
      sharding: how every one lies on the devices.
    """
    rng = np.random.default_rng(0)

    def leaf(path, like):
        keys = [str(entry.key) for entry in path]
        shape = like.shape[1:] if STACK in keys else like.shape
        scale = 1 / math.sqrt(math.prod(shape[:-1])) if keys[-1] == "kernel" else _SMALL
        values = rng.standard_normal(like.shape, np.float32)
        return jax.device_put(np.multiply(values, np.float32(scale), out=values), sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def check_finite(outputs: Any, name: str) -> None:
    """Raises FloatingPointError where a number of a tree of arrays is not finite."""
    finite = jax.jit(
        lambda tree: jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
    )
    if not finite(outputs):
        raise FloatingPointError(f"{name}: the result has numbers that are not finite")


def _work(model: Denoiser, shape: tuple[int, int, int], flops: int) -> Work:
    return Work(count_parameters(model), forward_macs(model, shape), flops)


def _abstract_inputs(size: int, shape: tuple[int, int, int]):
    numbers = jax.ShapeDtypeStruct((size,), jnp.int32)
    return jax.ShapeDtypeStruct((size, *shape), jnp.float32), numbers, numbers


def _inputs(size: int, shape: tuple[int, int, int], num_classes: int, sharding: Sharding):
    """Latents, timesteps and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((size, *shape), np.float32)
    t = rng.integers(0, 1000, size, np.int32)
    y = rng.integers(0, num_classes, size, np.int32)
    return jax.device_put((x, t, y), sharding)
