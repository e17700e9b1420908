"""Objects from a config, checked before anything is compiled.

Every wrong field ends in a UsageError that starts with its full name, `config.a.b=value`.
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from dico_jax.autoencoders import Autoencoder, create_autoencoder
from dico_jax.data.sources import Source, create_source
from dico_jax.defaults import DEFAULTS
from dico_jax.diffusion import Diffusion, create_diffusion
from dico_jax.errors import UsageError
from dico_jax.generation import SamplingOptions
from dico_jax.models import create_model


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys such as "model.name"."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


FIELDS = frozenset(flatten(DEFAULTS))


def check_fields(config: ConfigDict) -> None:
    """Raises UsageError unless the config has exactly the fields of configs/default.py."""
    fields = flatten(config.to_dict()).keys()
    for field in sorted(FIELDS - fields):
        raise UsageError(f"config.{field} is missing: start from configs/default.py")
    for field in sorted(fields - FIELDS):
        close = difflib.get_close_matches(field, FIELDS, n=1)
        hint = (
            f"did you mean config.{close[0]}?" if close else "configs/default.py lists the fields"
        )
        raise UsageError(f"config.{field}: no such field; {hint}")


@contextlib.contextmanager
def config_errors(section: str = "") -> Iterator[None]:
    """Completes the name of the field that an error starts with: "config." and the section."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"config.{section}{error}") from error


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config describes, without its data.

    Attributes:
      model: the network, a linen module.
      diffusion: the process it is trained with.
      autoencoder: between pictures and latents.
      latent_shape: (H, W, C) of the network's input.
    """

    model: Any
    diffusion: Diffusion
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]


def experiment_from_config(config: ConfigDict) -> Experiment:
    """The network, process and autoencoder of a config.

    Raises:
      UsageError: naming the field, its value and the fix.
    """
    with config_errors():
        options = {k: v for k, v in config.model.items() if k != "name" and v is not None}
        model = create_model(config.model.name, **options)
    with config_errors("diffusion."):
        diffusion = create_diffusion(
            noise_schedule=config.diffusion.noise_schedule,
            diffusion_steps=config.diffusion.diffusion_steps,
            learn_sigma=config.model.learn_sigma,
        )
    with config_errors():
        autoencoder = create_autoencoder(config.autoencoder.name)
        if autoencoder.channels not in (None, model.in_channels):
            raise UsageError(
                f"model.in_channels={model.in_channels} does not fit config.autoencoder.name="
                f"{config.autoencoder.name!r}: use {autoencoder.channels}"
            )
        side = _latent_side(config.data.image_size, autoencoder.downsampling, model.size_divisor)
    return Experiment(model, diffusion, autoencoder, (side, side, model.in_channels))


def _latent_side(image_size: int, downsampling: int, size_divisor: int) -> int:
    step = downsampling * size_divisor
    if image_size < step or image_size % step:
        below = image_size // step * step
        choices = [str(size) for size in (below, below + step) if size > 0]
        raise UsageError(
            f"data.image_size={image_size} must be a multiple of {step} (the autoencoder shrinks "
            f"images by {downsampling}, the network's input must divide by {size_divisor}): "
            f"use {' or '.join(choices)}"
        )
    return image_size // downsampling


def sampling_from_config(config: ConfigDict) -> tuple[Diffusion, SamplingOptions]:
    """The respaced process and the options that a config's samples are made with.

    Raises:
      UsageError: naming the field, its value and the fix.
    """
    sampling = config.sampling
    with config_errors():
        options = SamplingOptions(
            seed=config.seed,
            sampler=sampling.sampler,
            ddim_eta=sampling.ddim_eta,
            cfg_scale=sampling.cfg_scale,
            cfg_channels=sampling.cfg_channels,
        )
        for field in ("num_steps", "batch_size", "grid_rows", "grid_columns"):
            _check_at_least(sampling, "sampling", field, 1)
        _check_at_least(sampling, "sampling", "grid_every_steps", 0)
    try:
        process = create_diffusion(
            timestep_respacing=str(sampling.num_steps),
            noise_schedule=config.diffusion.noise_schedule,
            diffusion_steps=config.diffusion.diffusion_steps,
            learn_sigma=config.model.learn_sigma,
        )
    except UsageError as error:
        raise UsageError(f"config.sampling.num_steps={sampling.num_steps}: {error}") from error
    return process, options


def source_from_config(config: ConfigDict, experiment: Experiment) -> Source:
    """The training examples of a config.

    Raises:
      UsageError: naming the field, its value and the fix.
    """
    with config_errors():
        source = create_source(config.data)
        if source.image_shape != experiment.latent_shape:
            raise UsageError(
                f"data.image_size={config.data.image_size} with "
                f"config.model.in_channels={config.model.in_channels} needs examples of shape "
                f"{experiment.latent_shape}, but {source!r} has {source.image_shape}"
            )
        if len(source.class_names) > experiment.model.num_classes:
            raise UsageError(
                f"model.num_classes={experiment.model.num_classes} is too few for {source!r}: "
                f"use {len(source.class_names)}"
            )
    return source


def check_training(config: ConfigDict) -> None:
    """Raises UsageError for numbers of `config.training` that make no sense."""
    training = config.training
    with config_errors():
        for field in ("num_steps", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints"):
            _check_at_least(training, "training", field, 1)
        if not 0 <= training.ema_decay < 1:
            raise UsageError(f"training.ema_decay={training.ema_decay} must be in [0, 1)")
        _check_at_least(config.eval, "eval", "class_agreement_samples", 0)


def _check_at_least(section: ConfigDict, name: str, field: str, low: int) -> None:
    if section[field] < low:
        raise UsageError(f"{name}.{field}={section[field]} must be at least {low}")
