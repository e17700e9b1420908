"""The config that goes with converted weights."""

import copy
import math
from collections.abc import Mapping
from typing import Any

from dico_jax.config import DEFAULTS

_LATENT_CHANNELS = 4  # of Stable Diffusion's autoencoder
_LATENT_DOWNSAMPLING = 8
_DEFAULT_IMAGE_SIZE = 256
# Arguments of the released training script that decide what a field says.
_ARGUMENTS = {
    "global_seed": ("seed",),
    "global_batch_size": ("data", "batch_size"),
    "image_size": ("data", "image_size"),
}


def converted_config(
    model: dict[str, Any],
    *,
    image_size: int | None = None,
    tokens: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, float] | None = None,
    step: int = 0,
) -> dict[str, Any]:
    """A complete config, as plain JSON values, for weights that came without one.

    Args:
      model: the fields of `config.model` that the weights decide.
      image_size: side of the images in pixels; None takes it from the arguments of the run, from
        the position table, or as 256, in this order.
      tokens: rows of the position table of a DiT.
      arguments: of the training script, as a training checkpoint has them.
      optimizer: fields of `config.optimizer`; None for the published ones.
      step: how many steps the weights were trained, as far as is known.
    """
    config = copy.deepcopy(DEFAULTS)
    is_latent = model["in_channels"] == _LATENT_CHANNELS
    config["model"] |= model
    if not is_latent:
        config["autoencoder"]["name"] = "identity"
    config["optimizer"] |= dict(optimizer or {})
    config["training"]["num_steps"] = max(config["training"]["num_steps"], step)
    if not is_latent:
        config["sampling"]["cfg_channels"] = "all"
    if not model["class_dropout_prob"]:
        config["sampling"]["cfg_scale"] = 1.0  # guidance needs the null class
    if tokens is not None:
        side = math.isqrt(tokens) * _patch_size(model)
        config["data"]["image_size"] = side * (_LATENT_DOWNSAMPLING if is_latent else 1)
    for name, path in _ARGUMENTS.items():
        value = (arguments or {}).get(name)
        if type(value) is int and value > 0:
            _set(config, path, value)
    if image_size is not None:
        config["data"]["image_size"] = image_size
    return config


def _patch_size(model: Mapping[str, Any]) -> int:
    return model["patch_size"] or int(model["name"].rpartition("/")[2])


def _set(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        config = config[name]
    config[path[-1]] = value
