"""Weights in files: .pt, .pth and .safetensors in, and out again.

`open_tensors` reads a file's structure and leaves its tensors in the file until they are asked for,
one by one; `select_weights` finds the weights in what a training run saves; `write_pt` and
`write_safetensors` write files that PyTorch code reads. Nothing here needs PyTorch, and no code in
a file is ever run.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dico_jax.errors import UsageError
from dico_jax.files import Deferred, is_tensor
from dico_jax.pytorch.safetensors_files import read_safetensors, read_sharded, write_safetensors
from dico_jax.pytorch.tensors import InputFile, shown
from dico_jax.pytorch.torch_format import read_tree, write_pt

__all__ = ["Deferred", "TensorFile", "Weights", "open_tensors", "select_weights", "write_pt",
           "write_safetensors"]  # fmt: skip

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_EMA_KEYS = ("ema", "model_ema", "ema_state_dict")
_MODEL_KEYS = ("model", "model_state_dict")
_WRAPPER = "state_dict"
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel, of torch.compile


class TensorFile(contextlib.ExitStack):
    """An open file of tensors; a context manager, after which tensors cannot be read (ValueError).

    `format` is "pt", "safetensors" or "sharded safetensors"; `tree` what the file holds, with a
    Deferred for each tensor, see `pickles.load`, or a dict of tensors; `metadata` are strings.
    """

    def __init__(
        self, path: str, format: str, tree: object, metadata: dict, files: list[InputFile]
    ):
        super().__init__()
        self.path, self.format, self.tree, self.metadata = path, format, tree, metadata
        for file in files:
            self.callback(file.close)

    @property
    def tensors(self) -> dict[str, Deferred]:
        """The weights of a file that holds nothing else, by name in the file's order."""
        found = select_weights(self)
        if found.source != "weights":
            raise UsageError(f"{self.path} is a training checkpoint; choose among its weights")
        return found.tensors


def open_tensors(
    path: str | os.PathLike, *, on_bytes: Callable[[int], object] | None = None
) -> TensorFile:
    """Opens a .pt, .pth or .safetensors file, or the index of sharded .safetensors.

    Only the structure is read here. The format follows from the suffix (.pt, .pth, .bin, .ckpt;
    .safetensors; .json for an index), without one of these from the first bytes. `on_bytes` is
    called with the number of bytes whenever some of a tensor were read. UsageError: the file is
    missing, damaged, of another kind, or holds something that is refused.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".json":
        return TensorFile(path, "sharded safetensors", *read_sharded(path, on_bytes))
    file = InputFile(path, on_bytes)
    with contextlib.ExitStack() as opened:  # closes it, should it be refused
        opened.callback(file.close)
        looks_safe = suffix not in _TORCH_SUFFIXES and file.size > 9 and file.read(8, 1) == b"{"
        if suffix == ".safetensors" or looks_safe:
            found = TensorFile(path, "safetensors", *read_safetensors(file), [file])
        else:
            found = TensorFile(path, "pt", read_tree(file), {}, [file])
        opened.pop_all()
    return found


class Weights(NamedTuple):
    """One set of weights: the checkpoint's key of it, or "weights", and tensors by name."""

    source: str
    tensors: dict[str, Any]


def select_weights(tree: object, weights: str = "auto") -> Weights:
    """The weights in a state dict or in a training checkpoint.

    A training checkpoint is a dict with weights under "model" or "model_state_dict", and under
    "ema", "model_ema" or "ema_state_dict". A dict around either with the key "state_dict" is
    unwrapped. A prefix "module." or "_orig_mod." is taken off where every name has it.

    Args:
      tree: a TensorFile, its tree, or a tree of arrays.
      weights: "ema", "model", or "auto": the EMA weights where there are some. A plain state dict
        answers to "auto" and "model".
    """
    name = tree.path if isinstance(tree, TensorFile) else "the checkpoint"
    if weights not in ("auto", "ema", "model"):
        raise UsageError(f"weights={weights!r} is not one of auto, ema, model")
    found = _unwrapped(tree.tree if isinstance(tree, TensorFile) else tree)
    if not isinstance(found, Mapping):
        raise UsageError(f"{name} holds a {type(found).__name__}, not weights by name")
    groups = {key: value for key, value in found.items() if isinstance(value, Mapping)}
    ema = [key for key in _EMA_KEYS if key in groups]
    model = [key for key in _MODEL_KEYS if key in groups]
    if not ema and not model:
        if weights == "ema":
            raise UsageError(f"{name} has no ema weights, only one set of weights without a name")
        return Weights("weights", _flat(name, found))
    choice = {"auto": ema + model, "ema": ema, "model": model}[weights]
    if not choice:
        have = ", ".join(shown(key) for key in list(found)[:20])
        raise UsageError(f"{name} has no {weights} weights; it has {have}")
    return Weights(choice[0], _flat(f"{name}: {choice[0]}", _unwrapped(groups[choice[0]])))


def _unwrapped(tree: object) -> object:
    """What is under "state_dict", if that is there; a wrapper may have other keys too."""
    while isinstance(tree, Mapping) and isinstance(tree.get(_WRAPPER), Mapping):
        tree = tree[_WRAPPER]
    return tree


def _flat(name: str, weights: object) -> dict[str, Any]:
    """The tensors by name, without a prefix that all names share."""
    assert isinstance(weights, Mapping)
    wrong = [key for key, value in weights.items() if type(key) is not str or not is_tensor(value)]
    if wrong or not weights:
        listed = ", ".join(shown(key, 40) for key in wrong[:5]) or "nothing at all"
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(f"{name} should hold tensors by name, and has {listed}{more}")
    tensors = dict(weights)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors
