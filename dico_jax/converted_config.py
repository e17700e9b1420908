"""The config that goes with converted weights."""

import copy
import math
from collections.abc import Mapping
from typing import Any

# The published recipe: the values of configs/default.py, which says what the fields mean. They are
# here too because configs/ is no part of the package. A test keeps them equal.
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "data": {
        "source": "arrays",
        "path": None,
        "image_size": 256,
        "batch_size": 256,
        "horizontal_flip": True,
    },
    "autoencoder": {"name": "latent_preview"},
    "model": {
        "name": "DiCo-S",
        "hidden_size": None,
        "depth": None,
        "mlp_ratio": None,
        "num_heads": None,
        "patch_size": None,
        "in_channels": 4,
        "num_classes": 1000,
        "class_dropout_prob": 0.1,
        "learn_sigma": True,
        "dtype": "float32",
    },
    "diffusion": {"diffusion_steps": 1000, "noise_schedule": "linear"},
    "optimizer": {
        "learning_rate": 1e-4,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
    },
    "training": {
        "num_steps": 400_000,
        "ema_decay": 0.9999,
        "log_every_steps": 100,
        "checkpoint_every_steps": 10_000,
        "keep_checkpoints": 3,
        "init_from": None,
    },
    "sampling": {
        "sampler": "ddpm",
        "num_steps": 250,
        "ddim_eta": 0.0,
        "cfg_scale": 1.4,
        "cfg_channels": "first_three",
        "batch_size": 64,
        "grid_every_steps": 10_000,
        "grid_rows": 8,
        "grid_columns": 8,
    },
    "eval": {"class_agreement_samples": 0},
}

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
      model: the fields of `config.model`.
      image_size: side of the images in pixels; None takes it from the arguments of the run, from
        the position table, or as 256, in this order.
      tokens: rows of the position table of a DiT.
      arguments: of the training script, as a training checkpoint has them.
      optimizer: fields of `config.optimizer`; None for the published ones.
      step: how many steps the weights were trained, as far as is known.
    """
    config = copy.deepcopy(DEFAULTS)
    is_latent = model["in_channels"] == _LATENT_CHANNELS
    config["model"] = model
    config["autoencoder"]["name"] = "latent_preview" if is_latent else "identity"
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
