"""Weights between PyTorch files and this project's checkpoints, see docs/conversion.md.

Nothing is written before names, shapes and dtypes of all tensors are checked; then one tensor after
the other is read, laid out anew and written.
"""

import collections
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dico_jax.checkpoints.reader import FOLDER, SavedWeights
from dico_jax.checkpoints.writer import StepWriter
from dico_jax.errors import UsageError, within
from dico_jax.files import Deferred, as_path, check_new, new_folder, result_path
from dico_jax.models import abstract_params, model_options
from dico_jax.models.dit import DiT, position_embedding
from dico_jax.pytorch import lazy_trees, optimizer_state, run_config, torch_files
from dico_jax.pytorch.detection import TABLE, check_table, parameters
from dico_jax.pytorch.hub import local_file
from dico_jax.pytorch.key_maps import KEY_MAPS, Entry
from dico_jax.pytorch.lazy_trees import ByteProgress, Health
from dico_jax.pytorch.tensors import about, values_in
from dico_jax.pytorch.torch_files import open_tensors, select_weights

_OPTIMIZER_KEYS = ("opt", "optimizer", "optimizer_state_dict")
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
    _check_published(model)
    with open_tensors(local_file(path)) as file, about(f"{path}"):
        tensors = select_weights(file, weights).tensors
        check_table(tensors, model.hidden_size)
        return lazy_trees.load_params(
            tensors, abstract_params(model), KEY_MAPS[type(model).__name__]
        )


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
    check_new(out, 0)  # before a download
    if model is not None:
        model_options(model)  # an unknown name is refused before a download
    path, bar, health = local_file(source), ByteProgress(), Health()
    with open_tensors(path, on_bytes=bar.advance) as file, about(source):
        arguments = run_config.read_arguments(file.tree, file.metadata)
        optimizer = _optimizer(file.tree) if training else None
        wanted = {"params": "model", "ema_params": "ema"} if training else {"ema_params": weights}
        sets = {item: select_weights(file, which) for item, which in wanted.items()}
        chosen, tensors = next(iter(sets.values()))
        known: Any = {"num_classes": num_classes, "num_heads": num_heads}
        network = run_config.network_of(tensors, arguments, model, **known)
        found = "the only weights" if chosen == "weights" else f"the weights {chosen!r}"
        step, options, trees = 0, None, {item: its.tensors for item, its in sets.items()}
        if training:
            found = "the whole training state"
            adamw = optimizer_state.read_adamw(optimizer, tensors, network.wanted)
            step, options = adamw.step, adamw.options
            trees |= {"mu": adamw.exp_avg, "nu": adamw.exp_avg_sq}
        config = run_config.converted_config(network, arguments, image_size, options, step)
        key_map = KEY_MAPS[type(network.model).__name__]
        with about(f"{source}, read as {network.title}"):
            items = {
                item: lazy_trees.deferred_tree(given, network.wanted, key_map, health)
                for item, given in trees.items()
            }
        if training:
            count = Deferred(np.int32, (), lambda: np.asarray(step, np.int32))
            empty = optimizer_state.published_state(items["params"])
            moments = items.pop("mu"), items.pop("nu")
            items["opt_state"] = optimizer_state.to_optax(empty, count, *moments)
        name = os.path.basename(source)
        converted = {"file": name, "weights": found, "arguments": arguments}
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        check_new(out, int(_SLACK * nbytes))
        failed: list[BaseException] = []
        leaves = jax.tree.map(lambda leaf: _never_failing(leaf, failed), items)
        with bar.running(nbytes, "reading"), new_folder(out) as folder:
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (folder / "config.json").write_text(text)
            meta = {"config": config, "class_names": [], "converted": converted}
            with StepWriter(folder / FOLDER, deferred=tuple(items)) as writer:
                writer.write(step, leaves, meta)
            if failed:
                raise failed[0]
    health.warn()
    written = as_path(out) / FOLDER / str(step)
    return f"{network.description()}; {found} of {name}\n{written} is written"


def to_pytorch(
    ckpt: str | os.PathLike,
    out: str | os.PathLike,
    *,
    step: int | None = None,
    weights: str = "ema",
    training: bool = False,
    model_of: Callable[[Mapping[str, Any]], Any] = run_config.saved_model,
    side_of: Callable[[Mapping[str, Any]], int] = run_config.latent_side,
    rate_of: Callable[[Mapping[str, Any], int], float] | None = None,
) -> str:
    """Writes a checkpoint's weights as a file that PyTorch code loads.

    Args:
      ckpt: workdir of a run, or a converted checkpoint.
      out: the file: .pt or .pth, or .safetensors (weights alone).
      step: of the checkpoint; the newest if None.
      weights: "ema" or "params".
      training: write a training checkpoint: model, ema, opt (with AdamW's state), args.
      model_of: gives the network for a config.
      side_of: gives the side of the network's input for a config, which a DiT's table follows.
      rate_of: gives the learning rate for a config and a number of steps taken; needed for training
        checkpoints of runs whose rate changes.

    Returns what was done, in a line; after a UsageError nothing is left.
    """
    ckpt, out = os.fspath(ckpt), os.fspath(out)
    kinds = ".pt or .pth" if training else ".pt, .pth or .safetensors"  # the last: tensors alone
    suffix = result_path(out, kinds).suffix.lower()
    saved, health, bar = SavedWeights(ckpt, step), Health(), ByteProgress()
    with about(f"--ckpt={ckpt}"), within("config."):
        _check_published(model := model_of(saved.config), saved.config["model"]["name"])
    table = {}
    if isinstance(model, DiT):
        rows = side_of(saved.config) // model.patch_size
        table = {TABLE: position_embedding(rows, rows, model.hidden_size)[None].astype(np.float32)}
    tree: dict[str, Any]
    hidden = run_config.hidden_options(saved.config)
    if training:
        tree = _training_checkpoint(saved, model, table, health, rate_of)
    else:
        tree = _state_dict(saved, parameters(model), table, weights, health)
        vars(tree).update({run_config.OWN: hidden} if hidden else {})
    nbytes = sum(t.nbytes for t in values_in(tree) if isinstance(t, Deferred | np.ndarray))
    check_new(out, int(_SLACK * nbytes))
    with bar.running(nbytes, "writing"):
        if suffix == ".safetensors":
            metadata = {"format": "pt"} | {key: str(value) for key, value in hidden.items()}
            torch_files.write_safetensors(out, tree, metadata, on_bytes=bar.advance)
        else:
            torch_files.write_pt(out, tree, on_bytes=bar.advance)
    health.warn()
    what = "model, ema, opt and args" if training else f"the weights {weights!r}"
    return f"{what} of {saved.config['model']['name']}, step {saved.step}: {out} is written"


def _check_published(model: Any, name: str = "") -> None:
    """Raises UsageError for a network of which no published PyTorch code is known."""
    field = model.variant or "two_times" * model.two_times
    if not field and type(model).__name__ not in KEY_MAPS:
        field = "layout" if hasattr(model, "layout") else "name"
    if field:
        value = name or type(model).__name__ if field == "name" else getattr(model, field)
        fix = "cannot be converted: no PyTorch code of such a network is known"
        raise UsageError(f"model.{field}", value, fix)


def _optimizer(tree: object) -> object:
    for key in _OPTIMIZER_KEYS:
        if isinstance(tree, Mapping) and key in tree:
            return tree[key]
    what = f"no optimizer's state in the file ({', '.join(_OPTIMIZER_KEYS)})"
    raise UsageError(f"{what}: convert its weights alone, without --training")


def _never_failing(leaf: Deferred, failed: list[BaseException]) -> Deferred:
    """The leaf, with zeros from the first error on, which is kept.

    An error in the middle would leave threads of TensorStore, which cannot be waited for, writing
    into a folder that is being removed.
    """

    def read() -> Any:
        if not failed:
            try:
                return leaf.read()
            except BaseException as error:
                failed.append(error)
        return np.zeros(leaf.shape, leaf.dtype)

    return Deferred(leaf.dtype, leaf.shape, read)


def _state_dict(
    saved: SavedWeights, wanted: list[Entry], table: dict[str, Any], weights: str, health: Health
) -> collections.OrderedDict[str, Any]:
    name = f"{saved.folder}: the weights {weights!r}"
    tensors = lazy_trees.deferred_state_dict(saved.leaves(weights), wanted, name, health)
    return collections.OrderedDict(table | tensors)


def _training_checkpoint(
    saved: SavedWeights,
    model: Any,
    table: dict[str, Any],
    health: Health,
    rate_of: Callable[[Mapping[str, Any], int], float] | None,
) -> dict[str, Any]:
    """Model, ema, opt and args, as the released training script saves them."""
    wanted = parameters(model)
    raw, ema = (_state_dict(saved, wanted, table, name, health) for name in ("params", "ema"))
    with about(f"--ckpt={saved.folder}"):
        options = optimizer_state.check_adamw(saved.config["optimizer"])
    count, *averages = optimizer_state.from_optax(saved.optimizer_leaves())
    step = int(count.read())
    exp_avg, exp_avg_sq = (
        lazy_trees.deferred_state_dict(leaves, wanted, f"{saved.folder}: opt_state", health)
        for leaves in averages
    )
    if options["schedule"] != "constant" or options["warmup_steps"]:
        if rate_of is None:
            raise ValueError("the run's learning rate changes: give rate_of")
        # PyTorch's options are those of now.
        options = options | {"learning_rate": rate_of(saved.config, step)}
    adamw = optimizer_state.AdamWState(step, exp_avg, exp_avg_sq, options)
    opt = optimizer_state.write_adamw(adamw, raw)
    arguments = run_config.written_arguments(saved)
    return {"model": raw, "ema": ema, "opt": opt, "args": arguments}
