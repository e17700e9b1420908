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
from dico_jax.sampling.generate import guided_steps, jit_generate

Program = Callable[[ConfigDict, Experiment, Any, Mesh], aot.Found]


def _images(config: ConfigDict, mesh: Mesh) -> int:
    """How many a run makes at a time."""
    shards = num_batch_shards(mesh)
    return -(-config.sampling.batch_size // shards) * shards


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def sampler(config: ConfigDict, experiment: Experiment, params: Any, mesh: Mesh) -> aot.Found:
    """Of a run's grids: all guided steps in a loop, whose body XLA counts once, and the decoder."""
    process, options = sampling_from_config(config)
    model, size, scales = experiment.model, _images(config, mesh), options.scales(process)
    network = experiment.autoencoder, experiment.latent_shape
    jitted = jit_generate(model, process, *network, options, mesh)
    lie = jax.tree.map(lambda leaf: leaf.sharding, params)
    given = np.zeros(size, np.int32), model.zero_condition(size), np.uint32(0), np.float32(scales)
    decoder, weights = experiment.autoencoder.shapes(), whole_where_used(params, model, lie)
    arguments = decoder, weights, None, *_shapes(given), guided_steps(scales)
    return aot.compile_program(jitted, *arguments)


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
