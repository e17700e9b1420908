"""What a training step needs by sizes alone: memory, arithmetic, communication and time."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dico_jax.checkpoints.state import TrainState
from dico_jax.experiment import Experiment
from dico_jax.models import abstract_params, training_flops
from dico_jax.models.denoiser import Denoiser
from dico_jax.parallel.mesh import num_batch_shards
from dico_jax.planning import roofline
from dico_jax.planning.chips import Slice

_EXAMPLES = 67  # no other size of a network is it, so that what is kept per example is seen


class Need(NamedTuple):
    """Of one device, in bytes: what lies there from step to step, and during a step besides."""

    state: dict[str, int]  # by part: parameters, averages, optimizer
    gradients: int
    activations: dict[str, float]  # by stage of the network
    batch: int

    @property
    def step(self) -> float:
        """The most at one time in a step."""
        return self.total_state + self.gradients + sum(self.activations.values()) + self.batch

    @property
    def total_state(self) -> int:
        return sum(self.state.values())


class Traffic(NamedTuple):
    """What a device sends and gets along an axis of the mesh in one step."""

    axis: str
    kind: str
    times: int
    payload: float  # bytes that are gathered or summed
    wire: float  # bytes that pass its links, by rings


def need(config: ConfigDict, experiment: Experiment, target: TrainState, mesh: Mesh) -> Need:
    """The memory of a training step on each device; `target` has the shardings of its state."""
    model = experiment.model
    parts = {"parameters": target.params, "optimizer": (target.opt_state, target.step)}
    parts |= {"averages": (target.ema_params, target.width_emas)}
    state = {name: sum(map(_bytes_of_shard, jax.tree.leaves(p))) for name, p in parts.items()}
    rows = config.data.batch_size / num_batch_shards(mesh)
    per_example = kept_activations(model, experiment.latent_shape)
    share = rows / config.training.accumulation_steps / mesh.shape["tensor"]
    kept = {name: value * share for name, value in per_example.items()}
    batch = int(rows * math.prod(experiment.latent_shape) * 4)
    # Summed over parts, gradients are there twice.
    copies = 1 + (config.training.accumulation_steps > 1)
    return Need(state, copies * state["parameters"], kept, batch)


def _bytes_of_shard(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def kept_activations(model: Denoiser, latent_shape: tuple[int, ...]) -> dict[str, float]:
    """Bytes per example that the backward pass needs of the forward pass, by stage.

    They follow from JAX's own derivative of the network, traced; XLA may compute some again.
    """
    return dict(_kept(model.clone(scan_blocks=False), latent_shape))


@functools.lru_cache(maxsize=64)
def _kept(model: Denoiser, latent_shape: tuple[int, ...]) -> tuple[tuple[str, float], ...]:
    if not model.stages:
        return (("network", _kept_bytes(model, latent_shape)),)
    depths = np.ravel(model.depth).tolist()

    def with_depths(found):
        depth = tuple(found) if isinstance(model.depth, tuple) else found[0]
        return _kept_bytes(model.clone(depth=depth), latent_shape)

    ones = [1] * len(depths)
    base = with_depths(ones)  # all that grows with a depth, grows by as much for each block
    blocks = [
        with_depths([1 + (i == at) for i in range(len(ones))]) - base for at in range(len(ones))
    ]
    stages = {s: n * b for s, n, b in zip(model.stages, depths, blocks, strict=True)}
    return (*stages.items(), ("between the stages", base - sum(blocks)))


def _kept_bytes(model: Denoiser, latent_shape: tuple[int, ...]) -> float:
    inputs = model.example_inputs(_EXAMPLES, side=latent_shape[0])
    inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs)

    def backward(params, x, t, condition):
        return jax.vjp(lambda p: model.apply({"params": p}, x, t, condition), params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, abstract_params(model), *inputs))
    kept = (leaf for leaf in leaves if _EXAMPLES in leaf.shape[:2])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept) / _EXAMPLES


def traffic(
    config: ConfigDict, experiment: Experiment, target: TrainState, mesh: Mesh
) -> Iterator[Traffic]:
    """What devices exchange in a step."""
    model, sizes, parts = experiment.model, dict(mesh.shape), config.training.accumulation_steps
    leaves = jax.tree.leaves(target.params)
    split = [leaf for leaf in leaves if "fsdp" in leaf.sharding.spec]
    shares, all_ = (sum(map(_bytes_of_shard, found)) for found in (split, leaves))
    summed, n = all_ - shares, num_batch_shards(mesh)  # what no axis of the batch splits
    if n > 1 and summed:
        summed *= parts  # XLA sums those of each part among devices
        yield Traffic("batch", "all-reduce of gradients", parts, summed, _ring(n, 2 * summed))
    if (n := sizes["data"]) > 1 and shares:
        summed = parts * shares
        yield Traffic("data", "all-reduce of gradients", parts, summed, _ring(n, 2 * summed))
    if (n := sizes["fsdp"]) > 1 and shares:
        whole = shares * n
        used = whole * min(4, model.dtype.itemsize) / 4 * 2 * parts  # forward and backward
        yield Traffic("fsdp", "all-gather of parameters", 2 * parts, used, _ring(n, used))
        summed = parts * whole
        yield Traffic("fsdp", "reduce-scatter of gradients", parts, summed, _ring(n, summed))
    if (n := sizes["tensor"]) > 1 and hasattr(model, "stage_widths"):
        side = experiment.latent_shape[0] ** 2
        positions = side, side // 4, side // 16, side // 4, side
        stages = zip(model.depth, positions, model.stage_widths, strict=True)
        images = config.data.batch_size / num_batch_shards(mesh)
        # Two products per block (of an FCDM, one) end with a sum, as do their gradients.
        sums = 2 * model.sums_per_block
        one = sum(sums * depth * at * width for depth, at, width in stages) * model.dtype.itemsize
        payload, count = one * images, sums * sum(model.depth)
        yield Traffic("tensor", "all-reduce of activations", count, payload, _ring(n, 2 * payload))


def _ring(count: int, size: float) -> float:
    """Bytes that pass the links of each of so many devices, by a ring."""
    return (count - 1) / count * size


class StepTime(NamedTuple):
    """Seconds of a step, at least and at most, and what they consist of."""

    compute: tuple[float, float]
    optimizer: tuple[float, float]
    communication: tuple[float, float]

    @property
    def total(self) -> tuple[float, float]:
        """Communication is hidden behind the rest at best, and comes on top at worst."""
        least = max(self.compute[0] + self.optimizer[0], self.communication[0])
        return least, self.compute[1] + self.optimizer[1] + self.communication[1]


def step_time(
    config: ConfigDict, experiment: Experiment, needed: Need, sent: list[Traffic], mesh: Mesh,
    where: Slice,
) -> StepTime:  # fmt: skip
    """The range of a training step's time, analytic."""
    model, chip = experiment.model, where.chip
    side, shards = experiment.latent_shape[0], mesh.shape["tensor"]
    flops, dtype = training_flops(model, experiment.latent_shape), jnp.dtype(model.dtype).name
    images = config.data.batch_size / num_batch_shards(mesh)
    kept = sum(kept_activations(model.clone(remat="none"), experiment.latent_shape).values())
    stages = roofline.stages_of(model, side, flops // 6, kept)
    peak = chip.flops(dtype)
    forward = roofline.seconds(stages, images, shards, peak, chip.bandwidth)
    blocks = [s for s in stages if s.name.startswith("stage")]
    again = roofline.seconds(blocks or stages, images, shards, peak, chip.bandwidth)
    if model.remat == "dots":  # all but products, which are most of the time
        light = [s for s in blocks if "depthwise" in s.name]
        again = roofline.seconds(light, images, shards, peak, chip.bandwidth)
    elif model.remat == "none":
        again = 0.0, 0.0
    compute = tuple(3 * f + a for f, a in zip(forward, again, strict=True))
    # Gradients and the state are read, the state is written.
    moved = (2 * needed.total_state + needed.gradients) / chip.bandwidth
    wire = sum(t.wire for t in sent) / (chip.links / 2)
    return StepTime(
        (compute[0], compute[1]),
        (moved, moved / roofline.BANDWIDTH_SHARE),
        (wire, wire / roofline.LINK_SHARE),
    )
