"""The one reader of steps that `StepWriter` has written, of this version and of older ones."""

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from dico_jax.checkpoints.checksums import find_damage
from dico_jax.errors import UsageError
from dico_jax.files import Deferred

FOLDER = "checkpoints"


class DamagedCheckpointError(UsageError):
    """A step of which a file is missing, cut or changed."""


def damaged(path: pathlib.Path, reason: object, advice: str = "") -> DamagedCheckpointError:
    """The error for a step or item that cannot be read for some reason, in a line."""
    text = " ".join(str(reason).split())
    if len(text) > 300:  # TensorStore's name every operation and key
        text = f"{text[:150]} ... {text[-150:]}"
    return DamagedCheckpointError(f"{path} is damaged ({text}){advice}")


def steps_in(folder: pathlib.Path) -> set[int]:
    """The steps in a folder; one whose save was not finished has no number for its name."""
    if not folder.is_dir():
        return set()
    return {int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()}


def saved_steps(workdir: pathlib.Path) -> set[int]:
    """The steps of the checkpoints of a workdir, or of a converted checkpoint."""
    return steps_in(workdir / FOLDER)


def verify(folder: pathlib.Path, item: str, advice: str = "") -> None:
    """Raises DamagedCheckpointError where the files of an item differ from their checksums."""
    _, reason = find_damage(folder, item)
    if reason:
        raise damaged(folder, reason, advice)


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The JSON values that lie beside the arrays of the folder of a step.

    Raises:
      DamagedCheckpointError: they cannot be read.
    """
    try:
        return json.loads((folder / "meta" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise damaged(folder / "meta", error) from error


def read_tree(item: pathlib.Path, target: Any) -> Any:
    """The tree of an item, with the shapes, dtypes and shardings of `target`, of ShapeDtypeStruct.

    Every device reads its own part and nothing else.
    """
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(item, args=ocp.args.StandardRestore(target))


def stored_leaves(item: pathlib.Path) -> dict[tuple[str, ...], Deferred]:
    """The leaves of the tree of an item, by path, each read when asked for.

    A path has the keys of dicts, the indices of lists and tuples, and the names of fields.
    """
    metadata = ocp.StandardCheckpointHandler().metadata(epath.Path(item))
    leaves = jax.tree_util.tree_leaves_with_path(getattr(metadata, "tree", metadata))
    return {
        key_names(path): Deferred(leaf.dtype, leaf.shape, functools.partial(_read, item, leaf.name))
        for path, leaf in leaves
    }


def key_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A path of JAX's as `stored_leaves` has it."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _read(item: pathlib.Path, name: str) -> np.ndarray:
    # TensorStore, which Orbax writes with, and not Orbax's own handlers of types: those are to go.
    files = {"driver": "file", "path": f"{item.absolute()}/"}
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": files, "path": f"{name}/"}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())
