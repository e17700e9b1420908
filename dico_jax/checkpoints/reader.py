"""The one reader of steps that `StepWriter` has written, of this version and of older ones."""

import functools
import glob
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dico_jax.checkpoints.state import TrainState
from dico_jax.checkpoints.steps import (
    FOLDER,
    ITEMS,
    read_array,
    read_meta,
    saved_steps,
    verified,
)
from dico_jax.config import with_defaults
from dico_jax.errors import UsageError, several
from dico_jax.files import Deferred, as_path, is_remote
from dico_jax.models import abstract_params, find_model
from dico_jax.parallel.mesh import from_same

_MAX_LISTED = 10

Path = tuple[str, ...]


def orbax_path(path: Any) -> Any:
    """A path as Orbax takes it, which may have another name in a bucket."""
    return epath.Path(path) if is_remote(path) else LiteralPath(path)


class LiteralPath(type(epath.Path())):  # type: ignore[misc]
    """A path in which Orbax finds its files whatever its name: in others a [1] is a pattern."""

    def glob(self, pattern):
        return (self / name for name in glob.glob(pattern, root_dir=self))


def read_tree(item: pathlib.Path, target: Any) -> Any:
    """The tree of an item as `target` says, of ShapeDtypeStruct; devices read their own parts."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(orbax_path(item), args=ocp.args.StandardRestore(target))


def stored_leaves(item: pathlib.Path) -> dict[Path, Deferred]:
    """The leaves of the tree of an item by `path_names`, each read when asked for."""
    metadata = ocp.StandardCheckpointHandler().metadata(orbax_path(item))
    leaves = jax.tree_util.tree_leaves_with_path(getattr(metadata, "tree", metadata))
    read = functools.partial(functools.partial, read_array, item)
    return {path_names(path): Deferred(x.dtype, x.shape, read(x.name)) for path, x in leaves}


def path_names(path: tuple[Any, ...]) -> Path:
    """A path of JAX's as keys of dicts, indices of lists and tuples, and names of fields."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def differences(there: Mapping[Any, Any], here: Mapping[Any, Any]) -> str:
    """The first leaves whose shapes, by path, differ between a checkpoint and what is wanted."""
    both = {k: [d.get(k, "missing") for d in (there, here)] for k in there.keys() | here.keys()}
    found = [f"{'.'.join(k)} is {a} there and {b} here" for k, (a, b) in both.items() if a != b]
    return several(sorted(found), _MAX_LISTED)


def class_differences(*names: Sequence[str]) -> str:
    """The first labels that mean other classes there than here, if both have names."""
    there, here = ({(f"label {i}",): n[:60] for i, n in enumerate(row)} for row in names)
    return differences(there, here) if there and here else ""


class SavedWeights:
    """The weights of a checkpoint, for reading; UsageError where they are missing or damaged.

    Attributes:
      folder, step: which checkpoint it is.
      config: the config it was made with, a dict; fields it did not have yet have their defaults.
      class_names: of the classes it was trained on.
      text_digest: of what read its texts; None for a network that was told none.
      converted: of a converted checkpoint, where it came from; else None.
      available: the weights that it has, of "ema" and "params".
    """

    def __init__(self, folder: str, step: int | None = None, flag: str = "--ckpt"):
        """Opens the newest checkpoint of a workdir or converted checkpoint, or that of `step`."""
        self.folder = folder
        path = as_path(folder).absolute()
        steps = saved_steps(path)
        if not steps:
            lacks = f"holds no {FOLDER}/STEP" if path.is_dir() else ": no such folder"
            fix = f"{lacks}: give the workdir of a run or a converted checkpoint"
            raise UsageError(flag, folder, fix)
        self.step = max(steps) if step is None else step
        if self.step not in steps:
            fix = f": {folder} has steps {', '.join(map(str, sorted(steps)))}"
            raise UsageError("--step", step, fix)
        self._path = path / FOLDER / str(self.step)
        meta = read_meta(verified(self._path, "meta").parent, "config", "class_names")
        self.config, self.class_names = with_defaults(meta["config"]), meta["class_names"]
        self.text_digest = meta.get("text_digest")
        self.converted = meta.get("converted")
        self.available = [name for name, item in ITEMS.items() if (self._path / item).is_dir()]

    def read(self, weights: str, target: Any) -> Any:
        """The tree of "ema" or "params", as a tree of ShapeDtypeStruct with shardings says."""
        return read_tree(self._item(weights), target)

    def leaves(self, weights: str) -> dict[Path, Deferred]:
        """The arrays of "ema" or "params" by path, each read when asked for."""
        return stored_leaves(self._item(weights))

    def optimizer_leaves(self) -> dict[Path, Deferred]:
        if not (self._path / "opt_state").is_dir():
            raise UsageError(f"{self._path} has weights alone, and no state of an optimizer")
        return stored_leaves(verified(self._path, "opt_state"))

    def _item(self, weights: str) -> pathlib.Path:
        if weights not in self.available:
            there = ", ".join(self.available) or "none"
            raise UsageError("--weights", weights, f": {self._path} has only {there}")
        return verified(self._path, ITEMS[weights])


class WarmStart:
    """The weights that a run starts from; tables with another number of rows start fresh.

    So do, where that network was told something else, as a class and not a text, the parts for it.
    """

    def __init__(self, folder: str, model: Any, source: Any = None):
        """Opens the newest checkpoint of `folder` and compares shapes; no weights are read."""
        field = "config.training.init_from"
        saved = SavedWeights(folder, flag=field)
        self.folder, self._step = folder, saved.step
        self._others = class_differences(saved.class_names, source.class_names if source else [])
        self._weights = next(iter(saved.available), "ema")
        self._leaves = saved.leaves(self._weights)
        trees = flatten_dict(abstract_params(model)), self._leaves
        here, there = ({path: tuple(x.shape) for path, x in tree.items()} for tree in trees)
        theirs, ours = (
            set(network.condition_parts)
            for network in (find_model(saved.config["model"]["name"])[0], model)
        )
        self._left = [path for path in there if {*path} & (theirs - ours)]
        self._added = [path for path in here if {*path} & (ours - theirs)]
        self.fresh = [
            path
            for path, shape in here.items()
            if path[0] in model.condition_tables and path in there
            if there[path][0] != shape[0] and there[path][1:] == shape[1:]
        ]
        told = {path: here[path] for path in (*self.fresh, *self._added)}
        kept = {path: shape for path, shape in there.items() if path not in self._left}
        if found := differences(kept | told, here):
            name = saved.config["model"]["name"]
            raise UsageError(field, folder, f"has another network ({name}): {found}")

    def __str__(self) -> str:
        text = f"starting from the weights {self._weights!r} of {self.folder}, step {self._step}"
        if self.fresh:
            rows = self._leaves[self.fresh[0]].shape[0]
            text += f"; the label tables have {rows} rows there, so they start fresh"
        for paths, how in ((self._left, "not taken"), (self._added, "not there, so fresh")):
            text += f"; {how}: {', '.join(_parts(paths))}" if paths else ""
        return text + (f"; the classes are others: {self._others}" if self._others else "")

    def apply(self, state: TrainState) -> TrainState:
        params = flatten_dict(state.params)
        for path in params.keys() - {*self.fresh, *self._added}:
            array = np.asarray(self._leaves[path].read(), params[path].dtype)
            params[path] = from_same(array, params[path].sharding)
        tree = unflatten_dict(params)
        # The average starts as a copy: two names for one buffer could not both be donated.
        return state.replace(params=tree, ema_params=jax.tree.map(jnp.copy, tree))


def _parts(paths: Iterable[Path]) -> list[str]:
    """The modules that parameters are of, numbers of blocks as *."""
    names = (path[:-1][:3] for path in paths)
    return sorted({".".join("*" if part.isdecimal() else part for part in name) for name in names})
