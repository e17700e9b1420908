"""Networks of checkpoints, with images that are noised for them to be looked at."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.autoencoders import make_latents_fn
from dico_jax.data.pipeline import training_batches
from dico_jax.diffusion import Objective, Path, create_objective, image_keys
from dico_jax.diffusion.paths import alpha_sigma
from dico_jax.errors import UsageError
from dico_jax.experiment import reader_from_config, source_from_config
from dico_jax.parallel.mesh import batch_sharding
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.generate import check_finite
from dico_jax.sampling.pretrained import PREVIEW, open_weights

SAMPLES, DATA = "samples", "data"  # of --images
_NOISE = 2**31  # draws from here on are no sampler's


@dataclasses.dataclass
class Subject:
    """A network and its images; `layers` are the blocks to look at, STAGE/NUMBER."""

    ckpt: str
    sampler: CheckpointSampler
    process: Objective  # whose points from 1 on are the times to look at
    layers: tuple[str, ...]
    latents: Any = None  # float32 (N, H, W, C), without noise
    condition: Any = None

    @property
    def times(self) -> np.ndarray:
        """The times as the network is told them, clean data first, (T,)."""
        times = np.asarray(self.process.network_time(self.process.times[1:]), np.float64)
        return times.reshape(len(times), -1)[:, 0]  # of two, where a step begins

    def about(self, images: str) -> dict[str, Any]:
        """How the network and its images came to be, as JSON has it."""
        made = self.sampler.about() if images == SAMPLES else self.sampler.settings
        more = {"images": images, "num_images": len(self.latents), "seed": self.sampler.config.seed}
        return json.loads(json.dumps(made)) | more

    def batches(self, point: int) -> Iterator[tuple[Any, Any, Any]]:
        """Images (B, H, W, C) noised to a point, conditions, and weights (B,): 0 for what fills up.

        The noise of an image follows from the seed, its number and the point.
        """
        mesh, config = self.sampler.mesh, self.sampler.config
        alpha, sigma = (np.float32(table[point]) for table in alpha_sigma(self.process))

        def draw(key):
            shape = self.latents.shape[1:]
            return jax.random.normal(jax.random.fold_in(key, np.uint32(_NOISE + point)), shape)

        count = len(self.latents)
        size = -(-min(config.sampling.batch_size, count) // mesh.size) * mesh.size
        for first in range(0, count, size):
            rows = np.minimum(np.arange(first, first + size), count - 1)
            weights = (first + np.arange(size) < count).astype(np.float32)
            noise = np.asarray(jax.vmap(draw)(image_keys(config.seed, rows)))
            told = jax.tree.map(lambda leaf, rows=rows: leaf[rows], self.condition)
            x = alpha * self.latents[rows] + sigma * noise
            yield jax.device_put((x, told, weights), batch_sharding(mesh))

    def program(self, watch: Callable[..., Any], look: Callable[..., Any]) -> Callable[..., Any]:
        """The jitted (params, x, condition, weights, point) -> look(noise, output, seen, weights).

        `seen` is a dict, at first of what a sixth argument may give. For every call of a module
        inside of a block of `layers`, `watch(seen, layer, name, module, call, args)` notes there
        what it wants and gives what that call returns. `noise` is what the network predicts.
        """
        model = self.sampler.experiment.model.clone(scan_blocks=False, remat="none")
        process = self.process

        def program(params, x, condition, weights, point, given=MappingProxyType({})):
            seen = dict(given)

            def intercept(call, args, kwargs, context):
                path = context.module.path if context.method_name == "__call__" else ()
                layer, name = "/".join(path[:2]), "/".join(path[2:])
                if name and layer in self.layers:
                    return watch(seen, layer, name, context.module, call, args)
                return call(*args, **kwargs)

            def model_fn(x, t):
                how: Any = {"mutable": ["intermediates"]}  # with which blocks run one by one
                with nn.intercept_methods(intercept):
                    return model.apply({"params": params}, x, t, condition, **how)[0]

            output = Path(process, model_fn).output(x, point)
            noise = process.estimate(output, x, jnp.asarray(process.times)[point]).noise
            return look(noise, output, seen, weights)

        return jax.jit(program)


def open_subjects(
    ckpts: Sequence[str], images: str, num_times: int, layers: Sequence[str], how: Mapping[str, Any]
) -> list[Subject]:
    """The networks of checkpoints without images; `how` are arguments of `CheckpointSampler`.

    UsageError where they do not compare, or lack one of `layers`; () stands for all blocks.
    """
    subjects = [_open(ckpt, images, num_times, dict(how)) for ckpt in ckpts]
    for subject in subjects:
        both = [one.sampler for one in (subjects[0], subject)]
        was, now = ((s.config.data.image_size, s.experiment.latent_shape[0]) for s in both)
        if was != now:
            what = "has images of {} pixels a side (latents of {}), and --ckpt={} of {} ({})"
            said = what.format(*now, ckpts[0], *was)
            raise UsageError("--ckpt", subject.ckpt, f"{said}: compare checkpoints of one size")
        for layer in layers:
            if layer not in subject.layers:
                close = difflib.get_close_matches(layer, subject.layers, n=2, cutoff=0)
                fix = f"is no block of {subject.ckpt}: use {' or '.join(close)}"
                raise UsageError("--layers", layer, fix)
        subject.layers = tuple(x for x in subject.layers if x in layers or not layers)
    return subjects


def _open(ckpt: str, images: str, num_times: int, how: dict[str, Any]) -> Subject:
    saved = open_weights(ckpt, how["step"] if how["ema_width"] is None else None)
    if images == SAMPLES and saved.config["autoencoder"]["name"] == "sd_vae":
        how["vae"] = how["vae"] or PREVIEW  # latents are looked at, and never decoded
    sampler = CheckpointSampler(ckpt, with_latents=True, **how)
    model, options = sampler.experiment.model, sampler.config.diffusion
    process = create_objective(options, learn_sigma=model.learn_sigma, num_steps=num_times)
    depths = np.ravel(getattr(model, "depth", ()))  # of networks whose blocks differ, too
    stages = zip(model.stages or ["blocks"] * len(depths), depths, strict=True)
    layers = tuple(f"{stage}/{i}" for stage, depth in stages for i in range(depth))
    return Subject(ckpt, sampler, process, layers)


def give_images(subject: Subject, images: str, count: int, asked: Mapping[str, str]) -> None:
    """Gives a network its images: its own "samples", its config's "data", or those of a folder."""
    sampler, model = subject.sampler, subject.sampler.experiment.model
    if images == SAMPLES:
        conditions, made = sampler.conditions(count, **asked), []
        for numbers, _, finite, latents in sampler.batches(conditions, np.arange(count)):
            check_finite(numbers[~finite], len(numbers))
            made.append(latents)
        subject.latents = np.concatenate(made)
    else:
        subject.latents, conditions = _read(sampler, images, count)
    told = model.from_read(model.as_condition(conditions))
    subject.condition = jax.tree.map(np.asarray, told)


def _read(sampler: CheckpointSampler, images: str, count: int) -> tuple[np.ndarray, Any]:
    """Latents (count, H, W, C) and conditions of examples that the seed draws from a source."""
    config, experiment, size = sampler.config, sampler.experiment, sampler.mesh.size
    if images != DATA:
        config.data.update(source="folder", path=images)
    try:
        source = source_from_config(config)
        read = reader_from_config(config, experiment, source)
    except UsageError as error:
        said = str(error) if images == DATA else str(error).replace("config.data.path", "--images")
        raise UsageError(said) from error
    if count > len(source):
        raise UsageError("--num_images", count, f": {source!r} has {len(source)}")
    if sampler.class_names and images != DATA and source.class_names != sampler.class_names:
        few = ", ".join(sampler.class_names[:5])
        raise UsageError("--images", images, f"has other classes than the checkpoint ({few}, ...)")
    how: Any = {"batch_size": -(-count // size) * size, "seed": config.seed}
    how["max_bad_fraction"] = config.data.max_bad_fraction
    batches = training_batches(source, read, experiment.model.read_condition, **how)
    how = {"latent_sampling": "mean", "seed": 0, "mesh": sampler.mesh}
    made = make_latents_fn(source.kind, experiment.autoencoder, **how)(next(iter(batches)), 0)
    found = jax.tree.map(lambda leaf: np.asarray(leaf)[:count], made)
    return found["x"], found["condition"]
