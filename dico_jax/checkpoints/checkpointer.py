"""Checkpoints of runs.

WORKDIR/checkpoints has one folder per step with an item for every field of `TrainState` but the
step (`params`, `ema_params`, `opt_state`) and `meta` (config, class names, versions). The items are
apart so that sampling reads the averaged weights alone. A run needs no other state: data order and
randomness follow from the step.

A converted checkpoint has the same layout, with `ema_params` alone or with all items, and without
checksums; its meta also says, under "converted", where it came from (see docs/conversion.md).
"""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dico_jax.checkpoints.checksums import find_damage
from dico_jax.checkpoints.reader import (
    FOLDER,
    DamagedCheckpointError,
    damaged,
    key_names,
    read_meta,
    read_tree,
    stored_leaves,
)
from dico_jax.checkpoints.state import TrainState
from dico_jax.checkpoints.writer import StepWriter
from dico_jax.errors import UsageError
from dico_jax.files import library_versions

_ITEMS = tuple(f.name for f in dataclasses.fields(TrainState) if f.name != "step")
_MAX_LISTED = 5


class Checkpointer(StepWriter):
    """Saves (in the background) and restores the states of one run. Use as a context manager.

    With several processes, all of them make every call, with the same arguments.
    """

    def __init__(self, workdir: pathlib.Path, meta: dict, keep: int, keep_every: int = 0):
        """Opens (or makes) the checkpoints of `workdir`.

        Args:
          workdir: folder of the run.
          meta: what to write beside the weights: "config" and "class_names".
          keep: how many of the newest checkpoints to keep.
          keep_every: a checkpoint whose step this divides is kept for ever; 0 for none.
        """
        policies = ocp.checkpoint_managers
        preserved: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            preserved.append(policies.EveryNSteps(keep_every))
        super().__init__(workdir / FOLDER, policies.AnyPreservationPolicy(preserved))
        self._meta = meta | {"versions": library_versions()}

    def save(self, step: int, state: TrainState, extra: dict[str, Any] | None = None) -> None:
        """Starts saving `state` as `step`; a step that is saved already is left as it is.

        Args:
          step: the checkpoint's step.
          state: what to save.
          extra: more of the run's state, JSON values, for `extra`.

        Raises:
          UsageError, RuntimeError: see `StepWriter.write`.
        """
        self.wait()
        if step not in self.steps():
            self.write(step, _trees(state), self._meta | {"extra": extra or {}})

    def extra(self, step: int) -> dict[str, Any]:
        """What `save` was given besides the state; {} if nothing."""
        return read_meta(self._folder / str(step)).get("extra", {})

    def restore(self, step: int, target: TrainState) -> TrainState:
        """The state saved at `step`, with the shapes, dtypes and shardings of `target`.

        Args:
          step: which.
          target: a state, or its shapes and shardings: leaves are arrays or ShapeDtypeStruct, each
            with a sharding, on any mesh.

        Raises:
          DamagedCheckpointError: a file is missing, cut or changed.
          UsageError: the checkpoint has converted weights and no optimizer state, or is of another
            model or optimizer.
        """
        folder = self._folder / str(step)
        verified = self._verify(folder)
        _check_is_training_state(folder)
        trees = jax.tree.map(_abstract, _trees(target))
        with _read_errors(folder, verified):
            differences = _differences(folder, trees)
        if differences:
            raise UsageError(
                f"{folder} is of another model or optimizer than this config "
                f"({listed(differences, _MAX_LISTED)}): use the config that it was trained with, "
                "or another --workdir"
            )
        with _read_errors(folder, verified):
            items = {name: read_tree(folder / name, tree) for name, tree in trees.items()}
        number = np.asarray(step, target.step.dtype)
        array = jax.make_array_from_callback((), target.step.sharding, lambda _: number)
        return target.replace(step=array, **items)

    def restore_newest(
        self, target: TrainState, say: Callable[[str], None] = print
    ) -> tuple[TrainState, int] | None:
        """The newest state that can be read, and its step; None if nothing is saved.

        A damaged checkpoint that is passed over is renamed to broken-STEP, so that its step can be
        saved again; it is never deleted.

        Args:
          target: as for `restore`.
          say: takes a line for each damaged checkpoint, in the first process.

        Raises:
          UsageError: checkpoints are there and none can be read, or as `restore`.
        """
        reasons: dict[int, str] = {}
        for step in sorted(self.steps(), reverse=True):
            try:
                state = self.restore(step, target)
            except DamagedCheckpointError as error:
                reasons[step] = str(error)
                continue
            self._set_aside(reasons, step, say)
            return state, step
        if reasons:
            fix = "put back a copy of one, or start again in another --workdir"
            raise UsageError(f"no checkpoint can be read ({'; '.join(reasons.values())}): {fix}")
        return None

    def _set_aside(self, reasons: dict[int, str], step: int, say: Callable[[str], None]) -> None:
        if not reasons:
            return
        if jax.process_index() == 0:
            for number, reason in reasons.items():
                new = _free_name(self._folder / f"broken-{number}")
                (self._folder / str(number)).rename(new)
                say(f"warning: {reason}: renamed to {new.name}, going on from step {step}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def _verify(self, folder: pathlib.Path) -> bool:
        """Whether the files have checksums; each process looks at its share of them."""
        verified, reason = find_damage(folder, part=jax.process_index(), parts=jax.process_count())
        reason = _first_of_all_processes(reason)
        if reason:
            raise damaged(folder, reason)
        return verified


def write_checkpoint(
    workdir: pathlib.Path, step: int, items: dict[str, Any], meta: dict[str, Any]
) -> None:
    """Writes one checkpoint leaf by leaf, in the layout of `Checkpointer`.

    Args:
      workdir: an existing folder.
      step: the checkpoint's step.
      items: trees of `Deferred` leaves, by item: params, ema_params, opt_state.
      meta: what to write beside them: "config", "class_names", ...

    Raises:
      UsageError, RuntimeError: see `StepWriter.write`.
    """
    with StepWriter(workdir / FOLDER, deferred=tuple(items)) as writer:
        writer.write(step, items, meta | {"versions": library_versions()})


def listed(problems: list[str], at_most: int) -> str:
    """The first of the problems, and how many more there are."""
    more = f"; and {len(problems) - at_most} more" if len(problems) > at_most else ""
    return "; ".join(problems[:at_most]) + more


def _trees(state: TrainState) -> dict[str, Any]:
    """The items of a state that have leaves."""
    trees = {name: getattr(state, name) for name in _ITEMS}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if leaf.sharding is None:  # Orbax would ask for the devices that it was saved on
        raise ValueError(f"the target of a restore needs shardings, and {leaf} has none")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _first_of_all_processes(reason: str | None) -> str | None:
    """The first process's reason that has one, so that all take the same decision."""
    if jax.process_count() == 1:
        return reason
    data = (reason or "").encode()[:400].ljust(400, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(data, np.uint8))
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
    return next((text for text in texts if text), None)


@contextlib.contextmanager
def _read_errors(folder: pathlib.Path, verified: bool) -> Iterator[None]:
    """Says that a checkpoint is damaged where reading it fails, unless its files are verified."""
    try:
        yield
    except (UsageError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # what Orbax and TensorStore raise has many types, also this one
        # Other processes may have read their parts, and wait for this one: they cannot be asked.
        if verified or jax.process_count() > 1:
            raise
        raise damaged(folder, error) from error


def _check_is_training_state(folder: pathlib.Path) -> None:
    if (folder / "opt_state").is_dir():
        return
    if "converted" not in read_meta(folder):
        raise damaged(folder, "opt_state is missing")
    raise UsageError(
        f"{folder.parent} has converted weights without a training state, so no run can go on "
        f"from there: give another --workdir, and --config.training.init_from="
        f"{folder.parent.parent} to start from these weights"
    )


def _differences(folder: pathlib.Path, trees: dict[str, Any]) -> list[str]:
    """What a target wants otherwise than the checkpoint has it: items, leaves and shapes."""
    found = []
    for name, tree in trees.items():
        if not (folder / name).is_dir():
            found.append(f"{name} is wanted and not there")
            continue
        stored = {path: leaf.shape for path, leaf in stored_leaves(folder / name).items()}
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        wanted = {key_names(path): leaf.shape for path, leaf in leaves}
        for path in sorted(stored.keys() | wanted.keys()):
            there, here = (shapes.get(path, "missing") for shapes in (stored, wanted))
            if there != here:
                found.append(f"{name} {'.'.join(path)} is {there} there and {here} here")
    return found


def _free_name(path: pathlib.Path) -> pathlib.Path:
    names = itertools.chain(
        [path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    )
    return next(name for name in names if not name.exists())
