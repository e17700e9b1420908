"""The config that goes with converted weights."""

import copy
import math
from collections.abc import Mapping
from typing import Any

from dico_jax.config import DEFAULTS
from dico_jax.errors import UsageError

_LATENT_CHANNELS = 4  # of Stable Diffusion's autoencoder
_LATENT_DOWNSAMPLING = 8


def converted_config(
    model: dict[str, Any],
    size_divisor: int,
    *,
    image_size: int | None = None,
    tokens: int | None = None,
    arguments: Mapping[str, Any],
    optimizer: Mapping[str, float] | None = None,
    step: int = 0,
) -> dict[str, Any]:
    """A complete config, as plain JSON values, for weights that came without one.

    Args:
      model: the fields of `config.model` that the weights decide.
      size_divisor: of the network.
      image_size: side of the images in pixels; None takes it from the arguments of the run, from
        the position table, or as 256, in this order.
      tokens: rows of the position table of a DiT.
      arguments: of the training script, as a training checkpoint has them.
      optimizer: fields of `config.optimizer`; None for the published ones.
      step: how many steps the weights were trained, as far as is known.

    Raises:
      UsageError: no network of this kind makes images of that size.
    """
    config = copy.deepcopy(DEFAULTS)
    downsampling = _LATENT_DOWNSAMPLING
    if model["in_channels"] != _LATENT_CHANNELS:  # a model of pixels
        downsampling = 1
        config["autoencoder"]["name"] = "identity"
        config["sampling"]["cfg_channels"] = "all"
    if not model["class_dropout_prob"]:
        config["sampling"]["cfg_scale"] = 1.0  # guidance needs the null class
    config["model"] |= model
    config["optimizer"] |= dict(optimizer or {})
    config["training"]["num_steps"] = max(config["training"]["num_steps"], step)
    said = {k: v for k, v in arguments.items() if type(v) is int and v > 0}
    config["seed"] = said.get("global_seed", config["seed"])
    data = config["data"]
    data["batch_size"] = said.get("global_batch_size", data["batch_size"])
    if tokens is not None:
        data["image_size"] = math.isqrt(tokens) * size_divisor * downsampling
    data["image_size"] = image_size or said.get("image_size", data["image_size"])
    step_size = downsampling * size_divisor
    if data["image_size"] % step_size:
        raise UsageError(
            "config.data.image_size", data["image_size"],
            f"must be a multiple of {step_size} (latents are {downsampling} times smaller, and the "
            f"network's input must divide by {size_divisor}): give another --image_size",
        )  # fmt: skip
    return config


def latent_side(config: Mapping[str, Any]) -> int:
    """The side of the network's input, where the autoencoder is Stable Diffusion's or none."""
    is_latent = config["autoencoder"]["name"] != "identity"
    return config["data"]["image_size"] // (_LATENT_DOWNSAMPLING if is_latent else 1)
