"""What a run compiles besides the training step: samples, their decoding, and their features."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dico_jax.evaluation import inception
from dico_jax.evaluation.inception_weights import InceptionFeatures
from dico_jax.evaluation.networks import jit_features
from dico_jax.experiment import Experiment, sampling_from_config
from dico_jax.models.block_stacks import whole_where_used
from dico_jax.parallel.mesh import batch_sharding, num_batch_shards, replicated
from dico_jax.planning import aot
from dico_jax.sampling.programs import (
    Noise,
    guided_steps,
    make_programs,
    shardings,
    steps_at_a_time,
)

Program = Callable[[ConfigDict, Experiment, Any, Mesh], aot.Found]


def _images(config: ConfigDict, mesh: Mesh) -> int:
    """How many a run makes at a time."""
    shards = num_batch_shards(mesh)
    return -(-config.sampling.batch_size // shards) * shards


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def sampler(config: ConfigDict, experiment: Experiment, params: Any, mesh: Mesh) -> aot.Found:
    """Of a run's grids: guided steps in a loop, whose body XLA counts once, without the decoder."""
    process, options = sampling_from_config(config)
    model, size, scales = experiment.model, _images(config, mesh), options.scales(process)
    network, kind = (experiment.autoencoder, experiment.latent_shape), guided_steps(scales)
    programs = make_programs(model, process, *network, options, mesh)
    lie = jax.tree.map(lambda leaf: leaf.sharding, params)
    weights, noise = whole_where_used(params, model, lie), Noise(np.uint32(0), np.arange(size))
    given = weights, *_shapes((noise, np.float32(scales))), None
    begun = programs.begin.eval_shape(*given, model.zero_condition(size), None, kind)
    places = shardings(begun, mesh, size)
    carry = jax.tree.map(lambda a, place: a.update(sharding=place), begun, places)
    some = np.int32(0), steps_at_a_time(len(scales) - 1), kind
    return aot.compile_program(programs.advance, *given, *carry, *some)


def decoder(config: ConfigDict, experiment: Experiment, params: Any, mesh: Mesh) -> aot.Found:
    """Pictures of a batch of latents."""
    split, whole = batch_sharding(mesh), replicated(mesh)
    decode, shapes = experiment.autoencoder.decode, experiment.autoencoder.shapes()
    latents = jax.ShapeDtypeStruct((_images(config, mesh), *experiment.latent_shape), jnp.float32)
    jitted = jax.jit(decode, in_shardings=(whole, split), out_shardings=split)
    return aot.compile_program(jitted, shapes, latents)


def features(config: ConfigDict, experiment: Experiment, params: Any, mesh: Mesh) -> aot.Found:
    """Inception's features of a batch of pictures, as FID takes them."""
    side, network = config.data.image_size, InceptionFeatures({}, "")
    pictures = jax.ShapeDtypeStruct((_images(config, mesh), side, side, 3), jnp.uint8)
    return aot.compile_program(jit_features(network, mesh), inception.abstract_params(), pictures)


PROGRAMS: dict[str, Program] = {"sample": sampler, "decode": decoder, "features": features}
