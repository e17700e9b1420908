"""Weights between PyTorch files and this project's checkpoints, tensor by tensor.

docs/conversion.md says what users see of it. Nothing is written before names, shapes and dtypes of
all tensors are checked; then one tensor after the other is read, laid out anew and written.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dico_jax.checkpoints.checkpointer import FOLDER, write_checkpoint
from dico_jax.checkpoints.saved_weights import SavedWeights
from dico_jax.errors import UsageError
from dico_jax.experiment import experiment_from_config, model_from_config
from dico_jax.files import Deferred, check_new, new_folder
from dico_jax.models import abstract_params, create_model, model_options
from dico_jax.models.denoiser import Denoiser
from dico_jax.models.dit import DiT, position_embedding
from dico_jax.pytorch.converted_config import converted_config
from dico_jax.pytorch.detection import detect_model
from dico_jax.pytorch.hub import local_file
from dico_jax.pytorch.key_maps import KEY_MAPS, Entry, KeyMap, entries
from dico_jax.pytorch.lazy_trees import Health, deferred_state_dict, deferred_tree, load_params
from dico_jax.pytorch.optimizer_state import (
    AdamWState,
    from_optax,
    read_adamw,
    to_optax,
    write_adamw,
)
from dico_jax.pytorch.progress import ByteProgress
from dico_jax.pytorch.torch_files import (
    TensorFile,
    open_tensors,
    select_weights,
    write_pt,
    write_safetensors,
)
from dico_jax.training.optimizer import create_optimizer, learning_rate_schedule

_OPTIMIZER_KEYS = ("opt", "optimizer", "optimizer_state_dict")
_TABLE = "pos_embed"  # of a DiT: fixed, so it is checked and not stored
_TABLE_TOLERANCE = 1e-6
_HALF_TABLE_TOLERANCE = 1e-2  # of files in half precision
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
    with open_tensors(local_file(path)) as file, _about(f"{path}"):
        tensors = select_weights(file, weights).tensors
        _check_table(tensors, model.hidden_size)
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
      training: from a training checkpoint, write the whole state (`params`, `ema_params`,
        `opt_state`), so that the run can go on.

    Returns:
      What was found and done, in two lines.

    Raises:
      UsageError: something cannot be read, does not fit, or may not be written; nothing is left.
    """
    source, out = os.fspath(source), os.fspath(out)
    if model is not None:
        model_options(model)  # an unknown name is refused before a download
    path, bar, health = local_file(source), ByteProgress(), Health()
    with open_tensors(path, on_bytes=bar.advance) as file, _about(source):
        content = _content(file, weights, training)
        network = _network(content, model, num_classes, num_heads)
        adamw = None
        if training:
            adamw = read_adamw(content.optimizer, content.any_weights, network.wanted)
        config = converted_config(
            network.fields,
            image_size=image_size,
            tokens=network.tokens,
            arguments=content.arguments,
            optimizer=adamw.options if adamw else None,
            step=adamw.step if adamw else 0,
        )
        experiment_from_config(ConfigDict(config))  # nothing is written that sample would refuse
        with _about(f"{source}, read as {network.title}"):
            items = _items(content, network, adamw, config, health)
        converted = {
            "file": pathlib.PurePath(source).name,
            "weights": content.source,
            "arguments": content.arguments,
        }
        meta = {"config": config, "class_names": [], "converted": converted}
        step = adamw.step if adamw else 0
        _write_folder(out, step, items, meta, bar)
    health.warn()
    return (
        f"{network.description()}; {content.source} of {converted['file']}\n"
        f"{pathlib.PurePath(out) / FOLDER / str(step)} is written"
    )


def to_pytorch(
    ckpt: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | None = None,
    weights: str = "ema",
    training: bool = False,
) -> str:
    """Writes a checkpoint's weights as a file that PyTorch code loads.

    Args:
      ckpt: workdir of a run, or a converted checkpoint.
      out: the file: .pt or .pth, or .safetensors (weights alone).
      step: of the checkpoint; the newest if None.
      weights: "ema" or "params".
      training: write a training checkpoint: model, ema, opt (with AdamW's state), args.

    Returns:
      What was done, in a line.

    Raises:
      UsageError: something is missing, or may not be written; nothing is left.
    """
    ckpt, out = os.fspath(ckpt), os.fspath(out)
    suffix = pathlib.PurePath(out).suffix.lower()
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise UsageError(f"--out={out}: name a .pt, .pth or .safetensors file")
    if training and suffix == ".safetensors":
        raise UsageError(f"--out={out}: a training checkpoint is more than tensors; name a .pt")
    saved, health, bar = SavedWeights(ckpt, step), Health(), ByteProgress()
    with _about(f"--ckpt={ckpt}"):
        model = model_from_config(ConfigDict(saved.config))
    tree: dict[str, Any]
    if training:
        tree = _training_checkpoint(saved, model, health)
    else:
        tree = _state_dict(saved, model, weights, health)
    nbytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in _tensors(tree))
    check_new(out, int(_SLACK * nbytes))
    write = write_safetensors if suffix == ".safetensors" else write_pt
    with bar.running(nbytes, "writing"):
        write(out, tree, on_bytes=bar.advance)
    health.warn()
    what = "model, ema, opt and args" if training else f"the weights {weights!r}"
    return f"{what} of {saved.config['model']['name']}, step {saved.step}: {out} is written"


# From a file.


@dataclasses.dataclass(frozen=True)
class _Content:
    """What is taken from a file, tensors unread.

    Attributes:
      source: what it is, for the user.
      weights: sets of weights by the checkpoint item that each becomes.
      optimizer: the optimizer's state dict, or None.
      arguments: of the training script, as JSON values.
    """

    source: str
    weights: dict[str, dict[str, Any]]
    optimizer: object
    arguments: dict[str, Any]

    @property
    def any_weights(self) -> dict[str, Any]:
        """A set of weights; names and shapes are the same in all."""
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
        raise UsageError(
            f"no optimizer's state in the file ({', '.join(_OPTIMIZER_KEYS)}): "
            "convert its weights alone, without --training"
        )
    both = {
        "params": select_weights(file, "model").tensors,
        "ema_params": select_weights(file, "ema").tensors,
    }
    return _Content("the whole training state", both, optimizer, arguments)


def _arguments(args: object) -> dict[str, Any]:
    """The training script's arguments as JSON values."""
    found = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(found, Mapping):
        return {}
    return json.loads(json.dumps({str(k): v for k, v in found.items()}, default=str))


@dataclasses.dataclass(frozen=True)
class _Network:
    """The network that weights belong to.

    Attributes:
      title: its name, for messages.
      fields: of `config.model`, as JSON values.
      key_map: of its family.
      wanted: its parameters.
      tokens: rows of a DiT's position table, or None.
    """

    title: str
    fields: dict[str, Any]
    key_map: KeyMap
    wanted: list[Entry]
    tokens: int | None

    def description(self) -> str:
        """A line: name or sizes, parameters, channels, classes."""
        sizes = ("hidden_size", "depth", "mlp_ratio", "num_heads", "patch_size")
        own = ", ".join(f"{k}={self.fields[k]}" for k in sizes if self.fields[k] is not None)
        return (
            f"{self.fields['name']}{f' of no published size ({own})' if own else ''}, "
            f"{sum(math.prod(entry.shape) for entry in self.wanted):,} parameters, "
            f"{self.fields['in_channels']} input channels, {self.fields['num_classes']} classes "
            f"{'and a' if self.fields['class_dropout_prob'] else 'without a'} null class, "
            f"{'learned' if self.fields['learn_sigma'] else 'fixed'} variance"
        )


def _network(
    content: _Content, name: str | None, num_classes: int | None, num_heads: int | None
) -> _Network:
    tensors = content.any_weights
    shapes = {key: tuple(ref.shape) for key, ref in tensors.items()}
    detect = functools.partial(
        detect_model,
        shapes,
        num_classes=num_classes,
        likely_classes=content.arguments.get("num_classes"),
    )
    fields = detect(name, num_heads=num_heads)
    title = fields["name"]
    if name is not None:
        with contextlib.suppress(UsageError):  # nothing else is known of it
            found = detect()["name"]
            title += f" (it looks like a {found})" if found != title else ""
    options = {k: v for k, v in fields.items() if k != "name" and v is not None}
    model = create_model(fields["name"], **options)
    key_map = KEY_MAPS[type(model).__name__]
    return _Network(
        title,
        json.loads(json.dumps(fields)),  # lists for tuples, as the config's file has them
        key_map,
        entries(abstract_params(model), key_map),
        _check_table(tensors, model.hidden_size),
    )


def _check_table(tensors: Mapping[str, Any], width: int) -> int | None:
    """Checks the position table, if there is one; the number of its rows.

    Raises:
      UsageError: it is not the fixed table, which the network here computes itself.
    """
    ref = tensors.get(_TABLE)
    if ref is None:
        return None
    side = math.isqrt(ref.shape[1]) if len(ref.shape) == 3 else 0
    if ref.shape != (1, side * side, width) or not side:
        raise UsageError(f"{_TABLE} is {ref.shape} instead of (1, n * n, {width})")
    table = ref.read().astype(np.float64)[0]
    tolerance = _TABLE_TOLERANCE if ref.dtype.itemsize >= 4 else _HALF_TABLE_TOLERANCE
    distance = np.abs(table - position_embedding(side, side, width)).max()
    if not distance <= tolerance:
        raise UsageError(
            f"{_TABLE} is not the fixed sine-cosine table (off by up to {distance:.2g}): models "
            "with a position table of their own cannot be converted"
        )
    return side * side


def _items(
    content: _Content,
    network: _Network,
    adamw: AdamWState | None,
    config: Mapping[str, Any],
    health: Health,
) -> dict[str, Any]:
    """The items of a checkpoint, trees of deferred leaves."""
    items = {
        name: deferred_tree(tensors, network.wanted, network.key_map, health)
        for name, tensors in content.weights.items()
    }
    if adamw is not None:
        exp_avg, exp_avg_sq = (
            deferred_tree(averages, network.wanted, network.key_map, health)
            for averages in (adamw.exp_avg, adamw.exp_avg_sq)
        )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), items["params"])
        optimizer = create_optimizer(
            ConfigDict(config["optimizer"]), config["training"]["num_steps"]
        )
        step = Deferred(np.int32, (), lambda: np.asarray(adamw.step, np.int32))
        empty = jax.eval_shape(optimizer.init, shapes)
        items["opt_state"] = to_optax(empty, step, exp_avg, exp_avg_sq)
    return items


def _write_folder(
    out: str, step: int, items: dict[str, Any], meta: dict[str, Any], bar: "ByteProgress"
) -> None:
    leaves = jax.tree.leaves(items)
    nbytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    check_new(out, int(_SLACK * nbytes))
    with bar.running(nbytes, "reading"), new_folder(out) as folder, _disk_errors(out):
        text = json.dumps(meta["config"], indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n")
        write_checkpoint(folder, step, items, meta)


@contextlib.contextmanager
def _disk_errors(out: str) -> Iterator[None]:
    """Makes a UsageError of what Orbax raises when the disk is full or the folder goes away."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        text = str(error)
        if isinstance(error, OSError) or "No space left" in text or "OS error" in text:
            raise UsageError(f"--out={out} cannot be written: {text[:300]}") from error
        raise


# From a checkpoint.


def _state_dict(
    saved: SavedWeights, model: Denoiser, weights: str, health: Health
) -> dict[str, Any]:
    """The state dict of saved weights, in the published order."""
    wanted = _wanted(model)
    name = f"{saved.folder}: the weights {weights!r}"
    tensors = deferred_state_dict(saved.leaves(weights), wanted, name, health)
    found = collections.OrderedDict[str, Any](tensors)
    if isinstance(model, DiT):
        height, width, _ = experiment_from_config(ConfigDict(saved.config)).latent_shape
        rows, columns = height // model.patch_size, width // model.patch_size
        table = position_embedding(rows, columns, model.hidden_size)
        found[_TABLE] = table.astype(np.float32)[None]
        found.move_to_end(_TABLE, last=False)
    return found


def _wanted(model: Denoiser) -> list[Entry]:
    return entries(abstract_params(model), KEY_MAPS[type(model).__name__])


def _training_checkpoint(saved: SavedWeights, model: Denoiser, health: Health) -> dict[str, Any]:
    """Model, ema, opt and args, as the released training script saves them."""
    raw, ema = (_state_dict(saved, model, name, health) for name in ("params", "ema"))
    options = _adamw_options(saved)
    count, *averages = from_optax(saved.optimizer_leaves())
    step = int(count.read())
    exp_avg, exp_avg_sq = (
        deferred_state_dict(leaves, _wanted(model), f"{saved.folder}: opt_state", health)
        for leaves in averages
    )
    if options["schedule"] != "constant" or options["warmup_steps"]:
        schedule = learning_rate_schedule(
            ConfigDict(options), saved.config["training"]["num_steps"]
        )
        options["learning_rate"] = float(schedule(step))  # PyTorch's options are those of now
    opt = write_adamw(AdamWState(step, exp_avg, exp_avg_sq, options), raw)
    return {"model": raw, "ema": ema, "opt": opt, "args": _namespace(saved)}


def _adamw_options(saved: SavedWeights) -> dict[str, Any]:
    """The fields of `config.optimizer`, with which PyTorch's AdamW can go on.

    Raises:
      UsageError: it cannot.
    """
    options = saved.config["optimizer"]
    reason = None
    if options["name"] != "adamw":
        reason = f"name={options['name']!r} is not AdamW"
    elif options["weight_decay"] and options["weight_decay_mask"] != "all":
        reason = (
            f"weight_decay_mask={options['weight_decay_mask']!r} does not fit the one group of "
            "parameters that can be converted"
        )
    if reason:
        raise UsageError(
            f"--ckpt={saved.folder}: config.optimizer.{reason}: convert its weights alone, "
            "without --training"
        )
    return options


def _namespace(saved: SavedWeights) -> argparse.Namespace:
    """The training script's arguments: those the run came with, or what the config says of them."""
    if saved.converted and saved.converted["arguments"]:
        return argparse.Namespace(**saved.converted["arguments"])
    config = ConfigDict(saved.config)
    return argparse.Namespace(
        model=config.model.name,
        image_size=config.data.image_size,
        num_classes=config.model.num_classes,
        global_batch_size=config.data.batch_size,
        global_seed=config.seed,
        log_every=config.training.log_every_steps,
        ckpt_every=config.training.checkpoint_every_steps,
    )


def _tensors(tree: Mapping[Any, Any]) -> Iterator[Any]:
    """The tensors in a tree of dicts."""
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif hasattr(value, "dtype"):
            yield value


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Starts a UsageError's message with the name of the file or flag that it is about."""
    try:
        yield
    except UsageError as error:
        text = str(error)
        raise UsageError(text if text.startswith(("--", name)) else f"{name}: {text}") from error
