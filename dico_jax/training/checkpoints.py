"""Checkpoints of runs, on Orbax.

A folder of checkpoints holds one folder per step with the items `params`, `ema_params`, `opt_state`
and `meta` (JSON: config, class names, versions). The items are apart so that sampling reads the
averaged weights alone. A run needs no other state: data order and randomness follow from the step.

A converted checkpoint has the same layout, with `ema_params` alone or with all items; its meta also
says, under "converted", where it came from (see docs/conversion.md).
"""

import importlib.metadata
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from dico_jax.errors import UsageError
from dico_jax.interop.file_writers import Deferred
from dico_jax.training.state import TrainState
from dico_jax.training.streaming import deferred_handler, stored_leaves

FOLDER = "checkpoints"
WEIGHTS = {"ema": "ema_params", "params": "params"}
_PACKAGES = ("dico_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout, not installed
            versions[package] = "not installed"
    return versions


class Checkpointer:
    """Saves (in the background) and restores the states of one run. Use as a context manager."""

    def __init__(self, workdir: pathlib.Path, meta: dict, keep: int):
        """Opens (or makes) the checkpoints of `workdir`.

        Args:
          workdir: folder of the run.
          meta: what to write beside the weights: "config" and "class_names".
          keep: how many of the newest checkpoints to keep.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        # Orbax needs an absolute path; a relative one fails later, in a background thread.
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            item_names=("params", "ema_params", "opt_state", "meta"),
            options=options,
        )
        self._meta = meta | {"versions": library_versions()}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._manager.wait_until_finished()
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving `state` as `step`; a step that is saved already is left as it is."""
        if step in self._manager.all_steps():
            return
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema_params=ocp.args.StandardSave(state.ema_params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(self._meta),
            ),
        )
        if not saved:  # Orbax says so, and nothing else
            raise RuntimeError(f"Orbax refused to save step {step} in {self._manager.directory}")

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, with the shapes, dtypes and shardings of `like`.

        Raises:
          UsageError: the checkpoint has converted weights and no optimizer state.
        """
        folder = pathlib.Path(self._manager.directory)
        if not (folder / str(step) / "opt_state").is_dir():
            raise UsageError(
                f"{folder} has converted weights without a training state, so no run can go on "
                "from there: give another --workdir, and "
                f"--config.training.init_from={folder.parent} to start from these weights"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                ema_params=ocp.args.StandardRestore(abstract.ema_params),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        step_array = jax.device_put(jax.numpy.asarray(step, like.step.dtype), like.step.sharding)
        return TrainState(step_array, items.params, items.ema_params, items.opt_state)


def write_checkpoint(
    workdir: pathlib.Path, step: int, items: dict[str, Any], meta: dict[str, Any]
) -> None:
    """Writes one checkpoint leaf by leaf, in the layout of `Checkpointer`.

    Args:
      workdir: an existing folder.
      step: the checkpoint's step.
      items: trees of `Deferred` leaves, by item: params, ema_params, opt_state.
      meta: what to write beside them: "config", "class_names", ...
    """
    handlers: dict[str, Any] = {name: deferred_handler() for name in items}
    with ocp.CheckpointManager(
        (workdir / FOLDER).absolute(),
        item_handlers=handlers | {"meta": ocp.JsonCheckpointHandler()},
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
    ) as manager:
        saved = manager.save(
            step,
            args=ocp.args.Composite(
                meta=ocp.args.JsonSave(meta | {"versions": library_versions()}),
                **{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()},
            ),
        )
    if not saved:
        raise RuntimeError(f"Orbax refused to save step {step} in {workdir}")


class SavedWeights:
    """The weights of a checkpoint, for reading.

    Attributes:
      folder: as given.
      step: the step of the checkpoint.
      config: the config it was made with, a dict.
      class_names: of the classes it was trained on.
      converted: of a converted checkpoint, where it came from; else None.
    """

    def __init__(self, folder: str, step: int | None = None, flag: str = "--ckpt"):
        """Opens the newest checkpoint of a workdir (or of a converted one), or that of `step`.

        Args:
          folder: the workdir.
          step: of the checkpoint; the newest if None.
          flag: what messages call the folder.

        Raises:
          UsageError: there is no such folder, no checkpoint in it, or no such step.
        """
        self.folder = folder
        path = pathlib.Path(folder).absolute()
        if not path.is_dir():
            raise UsageError(
                f"{flag}={folder}: no such folder; give the workdir of a run or a converted "
                "checkpoint"
            )
        steps = saved_steps(path)
        if not steps:
            raise UsageError(
                f"{flag}={folder} holds no checkpoint (looked for {FOLDER}/STEP in it): "
                "give the workdir of a run or a converted checkpoint"
            )
        if step is not None and step not in steps:
            raise UsageError(
                f"--step={step}: {folder} has steps {', '.join(map(str, sorted(steps)))}"
            )
        self.step = max(steps) if step is None else step
        self._path = path / FOLDER / str(self.step)
        meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(self._path / "meta")
        self.config, self.class_names = meta["config"], meta["class_names"]
        self.converted = meta.get("converted")

    def read(self, weights: str, abstract_params: Any) -> Any:
        """The parameter tree called `weights`: "ema" or "params".

        Args:
          weights: which.
          abstract_params: tree of ShapeDtypeStruct with shardings.

        Raises:
          UsageError: this checkpoint does not have those weights.
        """
        item = self._item(weights)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            return reader.restore(item, args=ocp.args.StandardRestore(abstract_params))

    def available(self) -> list[str]:
        """The weights that this checkpoint has, of "ema" and "params"."""
        return [name for name, folder in WEIGHTS.items() if (self._path / folder).is_dir()]

    def leaves(self, weights: str) -> dict[tuple[str, ...], Deferred]:
        """The arrays of the parameter tree called `weights` by path, each read when asked for.

        Raises:
          UsageError: this checkpoint does not have those weights.
        """
        return stored_leaves(self._item(weights))

    def optimizer_leaves(self) -> dict[tuple[str, ...], Deferred]:
        """The arrays of the optimizer's state by path, each read when asked for.

        Raises:
          UsageError: this checkpoint has none.
        """
        if not (self._path / "opt_state").is_dir():
            raise UsageError(f"{self._path} has weights alone, and no state of an optimizer")
        return stored_leaves(self._path / "opt_state")

    def _item(self, weights: str) -> pathlib.Path:
        item = self._path / WEIGHTS[weights]
        if not item.is_dir():
            have = ", ".join(self.available()) or "none"
            raise UsageError(f"--weights={weights}: {self._path} has only {have}")
        return item


def saved_steps(workdir: pathlib.Path) -> set[int]:
    """Steps whose save was finished: Orbax renames a folder to its number at the end."""
    folder = workdir / FOLDER
    if not folder.is_dir():
        return set()
    return {int(p.name) for p in folder.iterdir() if p.name.isdecimal() and (p / "meta").is_dir()}
