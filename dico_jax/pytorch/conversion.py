"""Weights between PyTorch files and this project's checkpoints, see docs/conversion.md.

Nothing is written before names, shapes and dtypes of all tensors are checked; then one tensor after
the other is read, laid out anew and written.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dico_jax.checkpoints.reader import FOLDER, SavedWeights
from dico_jax.checkpoints.writer import StepWriter
from dico_jax.config import DEFAULTS, config_errors
from dico_jax.errors import UsageError
from dico_jax.files import Deferred, check_new, new_folder
from dico_jax.models import abstract_params, create_model, model_options
from dico_jax.models.dit import DiT, position_embedding
from dico_jax.pytorch import optimizer_state
from dico_jax.pytorch.detection import TABLE, Network, check_table, detect_network, parameters
from dico_jax.pytorch.hub import local_file
from dico_jax.pytorch.key_maps import KEY_MAPS, Entry
from dico_jax.pytorch.lazy_trees import (
    ByteProgress,
    Health,
    deferred_state_dict,
    deferred_tree,
    load_params,
)
from dico_jax.pytorch.optimizer_state import AdamWState
from dico_jax.pytorch.tensors import about, values_in
from dico_jax.pytorch.torch_files import (
    TensorFile,
    open_tensors,
    select_weights,
    write_pt,
    write_safetensors,
)

_OPTIMIZER_KEYS = ("opt", "optimizer", "optimizer_state_dict")
_LATENT_CHANNELS = 4  # of Stable Diffusion's autoencoder
_LATENT_DOWNSAMPLING = 8

_SLACK = 1.02  # of the size of what is written over the size of its tensors


def load_pytorch(path: str | os.PathLike, model: Any, weights: str = "auto") -> Any:
    """The parameters of `model` from a file of PyTorch weights.

    Args:
      path: .pt, .pth or .safetensors, the index of sharded .safetensors, or hf://OWNER/REPO/FILE.
      model: the network, see `create_model`.
      weights: "ema", "model", or "auto": of a training checkpoint the averaged weights.

    Returns:
      A tree of NumPy arrays, float32, for `model.apply({"params": params}, ...)`. Put it on devices
      with `jax.device_put`, whole or sharded.

    Raises:
      UsageError: the file cannot be read, or its tensors are not those of the model; all missing,
        unexpected and misshapen ones are listed.
    """
    with open_tensors(local_file(path)) as file, about(f"{path}"):
        tensors = select_weights(file, weights).tensors
        check_table(tensors, model.hidden_size)
        return load_params(tensors, abstract_params(model), KEY_MAPS[type(model).__name__])


def from_pytorch(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    model: str | None = None,
    weights: str = "auto",
    image_size: int | None = None,
    num_classes: int | None = None,
    num_heads: int | None = None,
    training: bool = False,
) -> str:
    """Writes the weights in a file as a checkpoint, for sample, evaluate and main.

    Args:
      source: the file, as in `load_pytorch`.
      out: the folder to make: config.json and checkpoints/STEP with `ema_params`.
      model: its name; found from the shapes if None.
      weights: which weights of a training checkpoint, as in `load_pytorch`.
      image_size: side in pixels of the images; None for that of the run, or 256.
      num_classes: where the label tables have as many rows, there is no null class.
      num_heads: of a DiT of no published width.
      training: write the whole state of a training checkpoint, so that the run can go on.

    Returns what was found and done, in two lines; after a UsageError nothing is left.
    """
    source, out = os.fspath(source), os.fspath(out)
    if model is not None:
        model_options(model)  # an unknown name is refused before a download
    path, bar, health = local_file(source), ByteProgress(), Health()
    with open_tensors(path, on_bytes=bar.advance) as file, about(source):
        content = _content(file, weights, training)
        network = detect_network(
            content.any_weights,
            model,
            num_classes=num_classes,
            likely_classes=content.arguments.get("num_classes"),
            num_heads=num_heads,
        )
        adamw = None
        if training:
            given = content.optimizer, content.any_weights, network.wanted
            adamw = optimizer_state.read_adamw(*given)
        step = adamw.step if adamw else 0
        config = converted_config(
            network.fields,
            network.model.size_divisor,
            image_size=image_size,
            tokens=network.tokens,
            arguments=content.arguments,
            optimizer=adamw.options if adamw else None,
            step=step,
        )
        with about(f"{source}, read as {network.title}"):
            items = _items(content, network, adamw, health)
        name = pathlib.PurePath(source).name
        converted = {"file": name, "weights": content.source, "arguments": content.arguments}
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        check_new(out, int(_SLACK * nbytes))
        with bar.running(nbytes, "reading"), new_folder(out) as folder, _write_errors(out):
            text = json.dumps(config, indent=2, sort_keys=True)
            (folder / "config.json").write_text(text + "\n")
            meta = {"config": config, "class_names": [], "converted": converted}
            with StepWriter(folder / FOLDER, deferred=tuple(items)) as writer:
                writer.write(step, items, meta)
    health.warn()
    written = pathlib.PurePath(out) / FOLDER / str(step)
    return f"{network.description()}; {content.source} of {name}\n{written} is written"


def latent_side(config: Mapping[str, Any]) -> int:
    """The side of the network's input, where the autoencoder is Stable Diffusion's or none."""
    is_latent = config["autoencoder"]["name"] != "identity"
    return config["data"]["image_size"] // (_LATENT_DOWNSAMPLING if is_latent else 1)


def to_pytorch(
    ckpt: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | None = None,
    weights: str = "ema",
    training: bool = False,
    side_of: Callable[[Mapping[str, Any]], int] = latent_side,
    rate_of: Callable[[Mapping[str, Any], int], float] | None = None,
) -> str:
    """Writes a checkpoint's weights as a file that PyTorch code loads.

    Args:
      ckpt: workdir of a run, or a converted checkpoint.
      out: the file: .pt or .pth, or .safetensors (weights alone).
      step: of the checkpoint; the newest if None.
      weights: "ema" or "params".
      training: write a training checkpoint: model, ema, opt (with AdamW's state), args.
      side_of: gives the side of the network's input for a config, which a DiT's table follows.
      rate_of: gives the learning rate for a config and a number of steps taken; needed for training
        checkpoints of runs whose rate changes.

    Returns what was done, in a line; after a UsageError nothing is left.
    """
    ckpt, out = os.fspath(ckpt), os.fspath(out)
    suffix = pathlib.PurePath(out).suffix.lower()
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise UsageError(f"--out={out}: name a .pt, .pth or .safetensors file")
    if training and suffix == ".safetensors":
        raise UsageError(f"--out={out}: a training checkpoint is more than tensors; name a .pt")
    saved, health, bar = SavedWeights(ckpt, step), Health(), ByteProgress()
    with about(f"--ckpt={ckpt}"), config_errors():
        options = {k: v for k, v in saved.config["model"].items() if v is not None}
        model = create_model(**options)
    table = {}
    if isinstance(model, DiT):
        rows = side_of(saved.config) // model.patch_size
        found = position_embedding(rows, rows, model.hidden_size)
        table = {TABLE: found.astype(np.float32)[None]}
    tree: dict[str, Any]
    if training:
        tree = _training_checkpoint(saved, parameters(model), table, health, rate_of)
    else:
        tree = _state_dict(saved, parameters(model), table, weights, health)
    nbytes = sum(t.nbytes for t in values_in(tree) if isinstance(t, Deferred | np.ndarray))
    check_new(out, int(_SLACK * nbytes))
    write = write_safetensors if suffix == ".safetensors" else write_pt
    with bar.running(nbytes, "writing"):
        write(out, tree, on_bytes=bar.advance)
    health.warn()
    what = "model, ema, opt and args" if training else f"the weights {weights!r}"
    return f"{what} of {saved.config['model']['name']}, step {saved.step}: {out} is written"


@dataclasses.dataclass(frozen=True)
class _Content:
    """What is taken from a file, tensors unread."""

    source: str  # what it is, for the user
    weights: dict[str, dict[str, Any]]  # by the checkpoint item that each becomes
    optimizer: object  # its state dict, or None
    arguments: dict[str, Any]  # of the training script, as JSON values

    @property
    def any_weights(self) -> dict[str, Any]:
        return next(iter(self.weights.values()))


def _content(file: TensorFile, weights: str, training: bool) -> _Content:
    tree: Mapping = file.tree if isinstance(file.tree, Mapping) else {}
    arguments = _arguments(tree.get("args"))
    if not training:
        source, tensors = select_weights(file, weights)
        source = "the only weights" if source == "weights" else f"the weights {source!r}"
        return _Content(source, {"ema_params": tensors}, None, arguments)
    optimizer = next((tree[key] for key in _OPTIMIZER_KEYS if key in tree), None)
    if optimizer is None:
        what = f"no optimizer's state in the file ({', '.join(_OPTIMIZER_KEYS)})"
        raise UsageError(f"{what}: convert its weights alone, without --training")
    items = {"params": "model", "ema_params": "ema"}
    both = {item: select_weights(file, name).tensors for item, name in items.items()}
    return _Content("the whole training state", both, optimizer, arguments)


def _arguments(args: object) -> dict[str, Any]:
    """The training script's arguments as JSON values."""
    found = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(found, Mapping):
        return {}
    return json.loads(json.dumps({str(k): v for k, v in found.items()}, default=str))


def _items(
    content: _Content, network: Network, adamw: AdamWState | None, health: Health
) -> dict[str, Any]:
    key_map = KEY_MAPS[type(network.model).__name__]

    def tree(tensors: Mapping[str, Any]) -> Any:
        return deferred_tree(tensors, network.wanted, key_map, health)

    items = {name: tree(tensors) for name, tensors in content.weights.items()}
    if adamw is not None:
        step = Deferred(np.int32, (), lambda: np.asarray(adamw.step, np.int32))
        empty = optimizer_state.published_state(items["params"])
        moments = tree(adamw.exp_avg), tree(adamw.exp_avg_sq)
        items["opt_state"] = optimizer_state.to_optax(empty, step, *moments)
    return items


@contextlib.contextmanager
def _write_errors(out: str) -> Iterator[None]:
    """Lets a UsageError of what is read pass through the writer; makes one of a disk's error."""
    try:
        yield
    except RuntimeError as error:
        raise (error.__cause__ if isinstance(error.__cause__, UsageError) else error) from None
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error}") from error


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

    `model` are its fields that the weights decide. An image_size of None is that of the run's
    `arguments`, of the position table's `tokens`, or 256, in this order.
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
        what = f"latents are {downsampling} times smaller, and divide by {size_divisor}"
        fix = f"must be a multiple of {step_size} ({what}): give another --image_size"
        raise UsageError("config.data.image_size", data["image_size"], fix)
    return config


def _state_dict(
    saved: SavedWeights, wanted: list[Entry], table: dict[str, Any], weights: str, health: Health
) -> collections.OrderedDict[str, Any]:
    name = f"{saved.folder}: the weights {weights!r}"
    tensors = deferred_state_dict(saved.leaves(weights), wanted, name, health)
    return collections.OrderedDict(table | tensors)


def _training_checkpoint(
    saved: SavedWeights,
    wanted: list[Entry],
    table: dict[str, Any],
    health: Health,
    rate_of: Callable[[Mapping[str, Any], int], float] | None,
) -> dict[str, Any]:
    """Model, ema, opt and args, as the released training script saves them."""
    raw, ema = (_state_dict(saved, wanted, table, name, health) for name in ("params", "ema"))
    with about(f"--ckpt={saved.folder}"):
        options = optimizer_state.check_adamw(saved.config["optimizer"])
    count, *averages = optimizer_state.from_optax(saved.optimizer_leaves())
    step = int(count.read())
    exp_avg, exp_avg_sq = (
        deferred_state_dict(leaves, wanted, f"{saved.folder}: opt_state", health)
        for leaves in averages
    )
    if options["schedule"] != "constant" or options["warmup_steps"]:
        if rate_of is None:
            raise ValueError("the run's learning rate changes: give rate_of")
        # PyTorch's options are those of now.
        options = options | {"learning_rate": rate_of(saved.config, step)}
    opt = optimizer_state.write_adamw(AdamWState(step, exp_avg, exp_avg_sq, options), raw)
    return {"model": raw, "ema": ema, "opt": opt, "args": _namespace(saved)}


def _namespace(saved: SavedWeights) -> argparse.Namespace:
    """The training script's arguments: those the run came with, or what the config says of them."""
    if saved.converted and saved.converted["arguments"]:
        return argparse.Namespace(**saved.converted["arguments"])
    config = saved.config
    return argparse.Namespace(
        model=config["model"]["name"],
        image_size=config["data"]["image_size"],
        num_classes=config["model"]["num_classes"],
        global_batch_size=config["data"]["batch_size"],
        global_seed=config["seed"],
        log_every=config["training"]["log_every_steps"],
        ckpt_every=config["training"]["checkpoint_every_steps"],
    )
