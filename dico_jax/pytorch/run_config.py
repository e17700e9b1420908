"""What a training script's arguments say of a run, and a config for weights that came without."""

import argparse
import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dico_jax.checkpoints.reader import SavedWeights
from dico_jax.config import DEFAULTS
from dico_jax.errors import UsageError
from dico_jax.models import MODELS, create_model, model_options
from dico_jax.models.denoiser import Denoiser
from dico_jax.models.text_conditional import TextConditional
from dico_jax.pytorch.detection import Network, detect_network
from dico_jax.pytorch.pickles import Inert
from dico_jax.pytorch.tensors import shown

OWN = "dico_jax"  # attribute of a state dict with hidden options
_SPECIAL_TOKENS = 3  # start, end, and what is unknown
_TEXT_OPTIONS = ("text_length", "text_dropout_prob")  # which do not show in weights
_ARGUMENT_KEYS = ("args", "cfg", "config", "hparams", "hyper_parameters", "opts")
_OBJECTIVE_KEYS = ("prediction", "prediction_type", "objective", "parameterization")
_NOISE = ("noise", "pred_noise", "eps", "epsilon", "ddpm", "diffusion", "none", "false", "")
_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_SCHEDULES |= {name: name for name in _SCHEDULES.values()}
_MAX_ARGUMENTS, _MAX_TEXT, _MAX_LEVELS = 10_000, 10_000, 16
_LATENT_CHANNELS = 4  # of Stable Diffusion's autoencoder
_LATENT_DOWNSAMPLING = 8


def read_arguments(tree: object, more: Mapping[str, str] = {}) -> dict[str, Any]:
    """The script's arguments in a checkpoint or its metadata (`more`), as JSON values.

    UsageError where they say that the network was not trained to predict noise.
    """
    there = [tree.get(key) for key in _ARGUMENT_KEYS] if isinstance(tree, dict) else []
    texts = {k: int(v[:9]) if v.isdecimal() else v for k, v in more.items()}
    there += [getattr(tree, OWN, None), texts]
    found = (_json(values, iter(range(_MAX_ARGUMENTS))) for values in there)
    arguments = next((values for values in found if isinstance(values, dict)), {})
    for key, value in _flat(arguments):
        text = str(value).lower()
        other = key in _OBJECTIVE_KEYS and text not in _NOISE
        if other or key == "path_type" or (key == "model" and text.startswith("sit")):
            what = "is of another objective than noise: samples would be wrong, and it is refused"
            raise UsageError(f"args.{key}", value, what)
    return arguments


def network_of(
    tensors: Mapping[str, Any], arguments: Mapping[str, Any], name: str | None = None, **known: Any
) -> Network:
    """The network of a state dict, where a script's arguments may help; see `detect_model`."""
    likely = {f"likely_{what}": arguments.get(f"num_{what}") for what in ("classes", "heads")}
    likely["likely_length"] = arguments.get("text_length")
    return detect_network(tensors, name, **known, **likely)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from _flat(value) if isinstance(value, dict) else [(key, value)]


def _json(value: Any, left: Iterator[int], level: int = 0) -> Any:
    if next(left, None) is None or level > _MAX_LEVELS:
        return "..."
    if isinstance(value, argparse.Namespace) or (isinstance(value, Inert) and value.state):
        value = value.state if isinstance(value, Inert) else vars(value)
        for key in ("_content", "_val"):  # OmegaConf's names of what it holds
            if key in value:
                return _json(value[key], left, level + 1)
    if isinstance(value, dict):
        items = itertools.islice(value.items(), _MAX_ARGUMENTS)
        return {str(k)[:_MAX_TEXT]: _json(v, left, level + 1) for k, v in items}
    if isinstance(value, list | tuple):
        return [_json(v, left, level + 1) for v in value[:_MAX_ARGUMENTS]]
    if value is None or (isinstance(value, float | int) and abs(value) < 2**63):
        return value
    value = value.name if isinstance(value, Inert) else value
    return value[:_MAX_TEXT] if isinstance(value, str) else shown(value)


def hidden_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What does not show in weights, and is not what is taken where nothing is said."""
    found = {"num_heads": config["model"]["num_heads"], **config["diffusion"]}
    found = {k: value for k, value in found.items() if value != DEFAULTS["diffusion"].get(k)}
    return found | _text_options(config)


def _text_options(config: Mapping[str, Any]) -> dict[str, Any]:
    model, text = config["model"], config["text"]
    if not issubclass(MODELS[model["name"]][0], TextConditional):
        return {}
    found = {k: v for k in _TEXT_OPTIONS if (v := model[k]) is not None}
    return found | {f"text_{k}": v for k, v in text.items() if v != DEFAULTS["text"][k]}


def saved_model(config: Mapping[str, Any]) -> Denoiser:
    """The network of a checkpoint's config, one that does not read texts itself."""
    given = config["model"]
    known = model_options(given["name"], given["layout"])
    told = {k: v for k, v in given.items() if k in known or v != DEFAULTS["model"][k]}
    return create_model(**{k: v for k, v in told.items() if v is not None})


def written_arguments(saved: SavedWeights) -> argparse.Namespace:
    """The script's arguments: those the run came with, or what the config says of them."""
    config = saved.config
    if saved.converted and saved.converted["arguments"]:
        return argparse.Namespace(**saved.converted["arguments"] | hidden_options(config))
    return argparse.Namespace(
        model=config["model"]["name"],
        image_size=config["data"]["image_size"],
        num_classes=config["model"]["num_classes"],
        global_batch_size=config["data"]["batch_size"],
        global_seed=config["seed"],
        log_every=config["training"]["log_every_steps"],
        ckpt_every=config["training"]["checkpoint_every_steps"],
        class_dropout_prob=config["model"]["class_dropout_prob"],
        diffusion_steps=config["diffusion"]["diffusion_steps"],
        noise_schedule=config["diffusion"]["noise_schedule"],
        num_heads=config["model"]["num_heads"],
        **_text_options(config),
    )


def converted_config(
    network: Network,
    arguments: Mapping[str, Any],
    image_size: int | None = None,
    optimizer: Mapping[str, float] | None = None,
    step: int = 0,
) -> dict[str, Any]:
    """A complete config, as plain JSON values, for weights that came without one.

    An image_size of None is that of the `arguments`, of the position table's tokens, or 256, in
    this order.
    """
    config, model = copy.deepcopy(DEFAULTS), network.fields
    downsampling = _LATENT_DOWNSAMPLING
    if model["in_channels"] != _LATENT_CHANNELS:  # a model of pixels
        downsampling = 1
        config["autoencoder"]["name"] = "identity"
        config["sampling"]["cfg_channels"] = "all"
    config["model"] |= model
    what = "text_dropout_prob" if "text_fusion" in model else "class_dropout_prob"
    dropout = _fraction(arguments.get(what))
    if dropout is not None and (dropout or "text_fusion" in model) and model[what]:
        config["model"][what] = dropout
    if not config["model"][what]:
        config["sampling"]["cfg_scale"] = 1.0  # guidance needs the null class, or text
    if "text_fusion" in model:
        config["text"] |= _texts(network, arguments)
    config["optimizer"] |= dict(optimizer or {})
    config["training"]["num_steps"] = max(config["training"]["num_steps"], step)
    said = {k: v for k, v in arguments.items() if type(v) is int and v > 0}
    config["seed"] = said.get("global_seed", config["seed"])
    data, diffusion = config["data"], config["diffusion"]
    diffusion["diffusion_steps"] = said.get("diffusion_steps", diffusion["diffusion_steps"])
    schedule = arguments.get("noise_schedule") or diffusion["noise_schedule"]
    if str(schedule) not in _SCHEDULES:
        raise UsageError("args.noise_schedule", schedule, f"is none of {', '.join(_SCHEDULES)}")
    diffusion["noise_schedule"] = _SCHEDULES[str(schedule)]
    data["batch_size"] = said.get("global_batch_size", data["batch_size"])
    if network.tokens is not None:
        side = math.isqrt(network.tokens)
        data["image_size"] = side * network.model.size_divisor * downsampling
    data["image_size"] = image_size or said.get("image_size", data["image_size"])
    step_size = downsampling * (divisor := network.model.size_divisor)
    if data["image_size"] % step_size:
        what = f"latents are {downsampling} times smaller, and divide by {divisor}"
        fix = f"must be a multiple of {step_size} ({what}): give another --image_size"
        raise UsageError("config.data.image_size", data["image_size"], fix)
    return config


def _fraction(value: object) -> float | None:
    """A probability below 1, also one in a text as metadata have it."""
    try:
        found = float(value) if isinstance(value, str | float | int) else math.nan
    except ValueError:
        return None
    return found if 0 <= found < 1 else None


def _texts(network: Network, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`config.text` of a network that is told a text."""
    given = {name: str(arguments.get(f"text_{name}") or "") for name in DEFAULTS["text"]}
    found = {name: value for name, value in given.items() if value}
    count = len({*found.get("words", "").split()}) + _SPECIAL_TOKENS
    if network.vocab_size and count != network.vocab_size:
        what = f"has an encoder of {network.vocab_size} words and marks"
        fix = "these words are not in the file: convert what `to_pytorch` wrote"
        raise UsageError(f"the network {what}, and {fix}")
    return found | ({"encoder": "words"} if network.vocab_size else {"encoder": "clip"})


def latent_side(config: Mapping[str, Any]) -> int:
    """The side of the network's input, where the autoencoder is Stable Diffusion's or none."""
    is_latent = config["autoencoder"]["name"] != "identity"
    return config["data"]["image_size"] // (_LATENT_DOWNSAMPLING if is_latent else 1)
