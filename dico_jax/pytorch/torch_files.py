"""Weights in files: .pt, .pth and .safetensors in, and out again.

`open_tensors` reads a file's structure and leaves its tensors in the file until they are asked for,
one by one; `select_weights` finds the weights in what a training run saves; `write_pt` and
`write_safetensors` write files that PyTorch code reads. Nothing here needs PyTorch, and no code in
a file is ever run.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dico_jax.errors import UsageError
from dico_jax.files import Deferred, is_tensor
from dico_jax.pytorch.key_maps import KEY_MAPS
from dico_jax.pytorch.pickles import Inert
from dico_jax.pytorch.safetensors_files import read_safetensors, weight_map, write_safetensors
from dico_jax.pytorch.tensors import AGAIN, InputFile, shown
from dico_jax.pytorch.torch_format import read_tree, write_pt

__all__ = ["Deferred", "TensorFile", "Weights", "open_tensors", "select_weights", "write_pt",
           "write_safetensors"]  # fmt: skip

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_DENOISERS = f"{KEY_MAPS['TextDiCo'].root}|{KEY_MAPS['DiT'].root}"  # the first has DiCo's
# Parts of names that wrappers add anywhere: "module" (DistributedDataParallel), "_orig_mod"
# (torch.compile), "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module" ...
_WRAPPERS = re.compile(r"(?<![^.])(module|_\w*mod(ule)?)\.")
_NEUTRAL = ["state_dict", "module"]  # containers whose names say nothing
_AVERAGED = re.compile(
    r"(?<![A-Za-z])(ema|EMA|Ema|swa)s?(?![a-z])|(?<=[a-z])(EMA|Ema)|(?i:shadow|averag|polyak|teacher)"
)
# Where no weights are looked for: states of optimizers and the like, and arguments.
_OTHERS = re.compile(r"opt|lr_|sched|(grad_)?scaler|arg|cfg|conf|hparam|hyper|rng|random", re.I)
_MAX_NAME = 300
_STATE_DICT = "no code of the file was run; save the network's state_dict() with PyTorch"


class TensorFile(contextlib.ExitStack):
    """An open file of tensors; a context manager, after which tensors cannot be read (ValueError).

    `tree` is what the file holds, with a Deferred for each tensor, see `pickles.load`, or a dict of
    tensors; `metadata` are strings.
    """

    def __init__(self, path: str, tree: object, metadata: Mapping[str, str]):
        super().__init__()
        self.path, self.tree, self.metadata = path, tree, metadata

    @property
    def tensors(self) -> dict[str, Deferred]:
        """The tensors of a file that holds nothing else, by name in the file's order."""
        if not isinstance(self.tree, dict) or not all(map(is_tensor, self.tree.values())):
            raise UsageError(f"{self.path} is a training checkpoint; choose among its weights")
        return self.tree


def open_tensors(
    path: str | os.PathLike, *, on_bytes: Callable[[int], object] | None = None
) -> TensorFile:
    """Opens a .pt, .pth or .safetensors file, or the index of several .safetensors or .bin.

    Only the structure is read here. The format follows from the suffix (.pt, .pth, .bin, .ckpt;
    .safetensors; .json for an index), without one of these from the first bytes. `on_bytes` is
    called with the number of bytes whenever some of a tensor were read. UsageError: the file is
    missing, damaged, of another kind, or holds something that is refused.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1].lower()
    with contextlib.ExitStack() as opened:  # closes files, should one of them be refused
        if suffix == ".json":
            parts: Any = _shards(path, on_bytes, opened)
        else:
            file = InputFile(path, on_bytes)
            opened.callback(file.close)
            looks_safe = suffix not in _TORCH_SUFFIXES and file.size > 9 and file.read(8, 1) == b"{"
            looks_safe |= suffix == ".safetensors"
            parts = read_safetensors(file) if looks_safe else (read_tree(file), {})
        found = TensorFile(path, *parts)
        found.push(opened.pop_all())
    return found


def _shards(
    index_path: str, on_bytes: Callable[[int], object] | None, opened: contextlib.ExitStack
) -> tuple[dict[str, Deferred], dict[str, str]]:
    """Tensors in the order of an index (`*.safetensors.index.json`), and metadata."""
    files = weight_map(index_path)
    folder = os.path.dirname(os.path.abspath(index_path))
    # In the cache of huggingface_hub, index and shards are links to files that lie together.
    allowed = {os.path.realpath(folder), os.path.dirname(os.path.realpath(index_path))}
    tensors: dict[str, Deferred] = {}
    metadata: dict[str, str] = {}
    for shard in dict.fromkeys(files.values()):
        path, where = os.path.join(folder, shard), f"{index_path}: the shard {shown(shard)}"
        if os.path.dirname(os.path.realpath(path)) not in allowed:
            raise UsageError(f"{where} is a link to a file outside of the index's folder")
        if not os.path.exists(path):
            raise UsageError(f"{where} is missing; put all files of the index into one folder")
        file = opened.enter_context(open_tensors(path, on_bytes=on_bytes))
        wanted = {name for name, its in files.items() if its == shard}
        if wanted != (found := file.tensors).keys():
            missing, more = sorted(wanted - found.keys()), sorted(found.keys() - wanted, key=str)
            what = f"lacks {shown(missing)} of the index, and has {shown(more)} that it has not"
            raise UsageError(f"{where} {what}; {AGAIN}")
        tensors |= found
        metadata |= file.metadata
    return {name: tensors[name] for name in files}, metadata


class Weights(NamedTuple):
    """One set of weights: its name in the checkpoint, or "weights", and tensors by name."""

    source: str
    tensors: dict[str, Any]


def select_weights(tree: object, weights: str = "auto", root: str = _DENOISERS) -> Weights:
    """The weights in a state dict or in a training checkpoint.

    A checkpoint is dicts and lists of dicts, of any names, and sets of tensors by name. Wrappers'
    parts of names are taken out; what is before `root` names the set: "net_ema.x" is x of net_ema,
    "ema.1" the second of a list. It is averaged where a name on the way to it says so. What is no
    tensor is passed over.

    Args:
      tree: a TensorFile, its tree, or a tree of arrays.
      weights: "ema", "model", or "auto": the averaged weights where there are some; or the name of
        a set. A plain state dict answers to "auto" and "model".
      root: of the network's `KeyMap`; where no name has it, all names count.

    Raises:
      UsageError: there is no such set, more than one, or averages that cannot be read.
    """
    where = tree.path if isinstance(tree, TensorFile) else "the checkpoint"
    found = tree.tree if isinstance(tree, TensorFile) else tree
    if not isinstance(found, Mapping):
        what = f"holds {type(found).__name__}{_told(found)}, not weights by name"
        raise UsageError(f"{where} {what}; {_STATE_DICT}")
    sets, unread = _sets(found, re.compile(rf"(?:^|\.)({root})"), where)
    averaged = [path for path in sets if _AVERAGED.search(path)]
    known = ["auto", "ema", "model", *(name for name in sets if name not in ("ema", "model"))]
    if weights not in known:
        raise UsageError(f"weights={weights!r} is not one of {', '.join(known[:20])}")
    if weights in ("auto", "ema") and not averaged and unread:
        fix = "save them by name, or give --weights=model for the others"
        raise UsageError(f"{where} has averages that are not read ({', '.join(unread[:5])}); {fix}")
    raw = [path for path in sets if path not in averaged]
    chosen = {"auto": averaged or raw, "ema": averaged, "model": raw}.get(weights, [])
    chosen = [weights] if weights in sets else chosen
    if len(chosen) > 1:
        fix = "name one of them by --weights" if root == _DENOISERS else "save the one by itself"
        raise UsageError(f"{where} has several sets: {', '.join(map(shown, chosen[:20]))}; {fix}")
    if not chosen:
        what = f"no {weights} weights" if sets else "no tensors by name"
        have = ", ".join(f"{shown(k)}{_told(v)}" for k, v in list(found.items())[:20]) or "nothing"
        raise UsageError(f"{where} has {what}; it has {have}")
    for key, value in sets[chosen[0]].items():
        if isinstance(value, Inert):
            raise UsageError(f"{where}: {key} is not weights{_told(value)}; {_STATE_DICT}")
    return Weights("weights" if chosen == _NEUTRAL[:1] else chosen[0], sets[chosen[0]])


def _told(value: object) -> str:
    return f" ({shown(value.name)})" if isinstance(value, Inert) else ""


def _sets(
    tree: Mapping, root: re.Pattern, where: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The sets of weights by name, "state_dict" where it has none; names of averages not read."""
    sets: dict[str, dict[str, Any]] = {}
    others: dict[str, dict[str, Any]] = {}  # tensors whose names do not have the root
    unread = []
    for path, key, value in _leaves(tree, ()):
        if not is_tensor(value) and not (isinstance(value, Inert) and "." in key):
            parts = value if isinstance(value, list | tuple) else [value]
            if _AVERAGED.search(f"{path}.{key}") and any(
                is_tensor(part) or isinstance(part, Inert) for part in parts
            ):
                unread.append(shown(f"{path}.{key}".lstrip(".")))
            continue
        if len(key) > _MAX_NAME or not key.isprintable():
            raise UsageError(f"{where}: {shown(key)} is not the name of a tensor")
        name = _WRAPPERS.sub("", key)
        at = root.search(name)
        start = at.start(1) if at else 0
        path = f"{path}.{name[:start]}".strip(".")
        found = (sets if at else others).setdefault(path, {})
        if found.setdefault(name[start:], value) is not value:
            raise UsageError(f"{where} has {name} twice")
    # Some averages are kept under names without dots, or as one tensor.
    sample = next((name.replace(".", "") for found in sets.values() for name in found), None)
    for path, found in others.items():
        large = [f"{path}.{k}" for k, v in found.items() if "." not in k and v.nbytes > 8]
        unread += [shown(k.lstrip(".")) for k in large if _AVERAGED.search(k)]
        unread += [shown(key) for key in found if sample and key.replace(".", "").endswith(sample)]
        if path in sets:  # told of later, as unexpected; but not a count beside the weights
            sets[path] |= {k: v for k, v in found.items() if not is_tensor(v) or v.nbytes > 8}
    return {
        path or _NEUTRAL[0]: found
        for path, found in (sets or others).items()
        if not ("online" in path and _AVERAGED.search(path))
    }, unread


def _leaves(
    tree: Mapping, path: tuple[str, ...], aside: bool = False
) -> Iterator[tuple[str, str, Any]]:
    """All that has a name and may be, or hold, weights: where it is, its name, itself.

    What lies `aside`, with an optimizer or arguments, is of interest only in lists, as averages.
    """
    for key, value in tree.items():
        if type(key) is not str or getattr(value, "shape", None) == ():
            continue
        if isinstance(value, Mapping) and value and str not in map(type, value):
            value = list(value.values())  # by number
        if isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
            value = {str(i): part for i, part in enumerate(value)}
        if isinstance(value, Mapping):
            inner = path if key in _NEUTRAL else (*path, key)
            yield from _leaves(value, inner, aside or bool(_OTHERS.match(key)))
        elif not aside or (isinstance(value, list | tuple) and any(map(is_tensor, value))):
            yield ".".join(path), key, value
