"""Sizes of an autoencoder, from the names and shapes of its tensors and from a config.json.

Every size that shows in shapes is read off several tensors and the most frequent answer wins, so
that a file with a few missing or misshapen tensors still gives the right sizes, and an error that
names just these.
"""

import re
import statistics
from collections.abc import Mapping
from typing import Any

from dico_jax.autoencoders.kl import KLConfig
from dico_jax.errors import UsageError
from dico_jax.pytorch.detection import Shapes, vote
from dico_jax.pytorch.tensors import shown

_MAX_LEVELS, _MAX_LAYERS, _MAX_WIDTH = 8, 8, 1 << 14
_BLOCK = re.compile(
    r"encoder\.down_blocks\.(\d{1,4})\.resnets\.(\d{1,4})\.(conv1|conv2|norm2)\.bias"
)
# Where the number of latent channels shows.
_LATENT_CHANNELS = (
    "quant_conv.bias/0/2 post_quant_conv.bias/0/1 decoder.conv_in.weight/1/1 "
    "encoder.conv_out.bias/0/2"
)

# Fields of diffusers' config.json. What is in none of these is refused: it may change the network.
_SIZES = ("layers_per_block", "latent_channels", "norm_num_groups")
_SUPPORTED: dict[str, tuple[Any, ...]] = {  # with the values that this network has
    **dict.fromkeys(("in_channels", "out_channels"), (3,)),
    **dict.fromkeys(("latents_mean", "latents_std"), (None,)),
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), (True,)),
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0, 0.0),
}
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_NOTES = ("sample_size", "force_upcast")  # they change nothing that is computed here


def read_options(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `KLConfig` in diffusers' config; one that the network does not do is refused.

    `where` is its name in messages.
    """
    like = "AutoencoderKL" if "latent_channels" in options else "something else"
    network = options.get("_class_name", like)
    if network != "AutoencoderKL":
        what = f"is the config of another network ({shown(network)}), not of an AutoencoderKL"
        fix = "give its weights, or move these to a folder of their own"
        raise UsageError(f"{where}, beside the weights, {what}: {fix}")
    fields: dict[str, Any] = {}
    for name, value in options.items():
        said = f"{where}: {name}={shown(value)}"
        if name.startswith("_") or name in _NOTES:
            continue
        if name in _SUPPORTED:
            if not any(value == v and type(value) is type(v) for v in _SUPPORTED[name]):
                raise UsageError(f"{said} is not supported, only {_SUPPORTED[name][0]!r}")
        elif name in _BLOCK_TYPES:
            if not isinstance(value, list) or any(v != _BLOCK_TYPES[name] for v in value):
                raise UsageError(f"{said} is not supported, only {_BLOCK_TYPES[name]}")
        elif name == "block_out_channels" and isinstance(value, list):
            fields[name] = tuple(value)
        elif name in _SIZES:
            if type(value) is not int:
                raise UsageError(f"{said} must be a whole number")
            fields[name] = value
        elif name == "scaling_factor":
            if type(value) not in (int, float) or not 0 < value < 1e6:
                raise UsageError(f"{said} must be a number above 0")
            fields[name] = float(value)
        else:
            raise UsageError(f"{said} is not known here, and may change the network")
    return fields


def detect_config(shapes: Shapes, options: Mapping[str, Any]) -> KLConfig:
    """The sizes that shapes show, with `options` (or defaults) for those that they do not."""
    widths, depth = _levels(shapes)
    if not any(key.startswith("quant_conv.") for key in shapes):
        what = "the file has no quant_conv (use_quant_conv=False), as newer autoencoders"
        raise UsageError(f"{what}: those of Stable Diffusion 1, 2 and XL are supported")
    channels = vote(shapes, _LATENT_CHANNELS) or 0
    if (
        not 1 <= min(*widths, channels) <= max(*widths, channels) <= _MAX_WIDTH
        or len(widths) > _MAX_LEVELS
        or depth > _MAX_LAYERS
    ):
        found = f"block_out_channels={shown(widths)}, layers_per_block={depth}"
        what = f"{found}, latent_channels={channels}"
        raise UsageError(f"sizes that make no sense show in its shapes: {what}")
    sizes = {"block_out_channels": widths, "layers_per_block": depth, "latent_channels": channels}
    for name, size in sizes.items():
        if options.get(name, size) != size:
            raise UsageError(f"the config says {name}={shown(options[name])}, the weights {size}")
    try:
        return KLConfig(**{**options, **sizes})
    except UsageError as error:
        if "norm_num_groups" in options:
            raise
        fix = "put it there, or convert the file with convert vae --norm_num_groups"
        what = f"{error}: 32 is taken where no config.json lies beside the weights"
        raise UsageError(f"{what}; {fix}") from error


def _levels(shapes: Shapes) -> tuple[tuple[int, ...], int]:
    """The width of every level, and the number of residual blocks of each."""
    widths: dict[int, list[int]] = {}
    depths: dict[int, int] = {}
    for key, shape in shapes.items():
        block = _BLOCK.fullmatch(key)
        if block and len(shape) >= 1:
            level, layer = int(block[1]), int(block[2])
            widths.setdefault(level, []).append(shape[0])
            depths[level] = max(depths.get(level, 0), layer + 1)
    if not widths or sorted(widths) != list(range(len(widths))):
        some = f"{len(shapes)} tensors such as {', '.join(shown(key) for key in list(shapes)[:5])}"
        raise UsageError(f"it is no autoencoder (AutoencoderKL): {some}")
    found = tuple(statistics.mode(widths[level]) for level in range(len(widths)))
    return found, statistics.mode(depths.values())
