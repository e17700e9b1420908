"""Checkpoints of runs.

WORKDIR/checkpoints has one folder per step with an item for every field of `TrainState` but the
step, and `meta` (config, class names, versions). The items are apart so that sampling reads the
averaged weights alone. A run needs no other state: data order and randomness follow from the step.
Converted weights have the same layout, with `ema_params` alone or all items; their meta also says,
under "converted", where they came from.
"""

import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dico_jax.checkpoints import reader
from dico_jax.checkpoints import steps as stored
from dico_jax.checkpoints.state import TrainState
from dico_jax.checkpoints.steps import DamagedCheckpointError
from dico_jax.checkpoints.writer import StepWriter
from dico_jax.errors import UsageError
from dico_jax.parallel.mesh import from_same


class Checkpointer(StepWriter):
    """Saves (in the background), keeps and restores the states of one run; a context manager."""

    def __init__(self, workdir: pathlib.Path, meta: dict, keep: int, keep_every: int = 0):
        policies = ocp.checkpoint_managers
        kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        super().__init__(workdir / stored.FOLDER, policies.AnyPreservationPolicy(kept))
        self._meta = meta

    def save(self, step: int, state: TrainState, extra: dict[str, Any] | None = None) -> None:
        """Starts saving `state`, and JSON values for `extra`; a saved step is left as it is."""
        self.wait()
        if step not in self.steps():
            self.write(step, _trees(state), self._meta | {"extra": extra or {}})

    def extra(self, step: int) -> dict[str, Any]:
        """What `save` was given besides the state; {} if nothing."""
        return stored.read_meta(self._folder / str(step)).get("extra", {})

    def restore(self, step: int, target: TrainState) -> TrainState:
        """The state saved at `step`, with the shapes, dtypes and shardings of `target`."""
        folder = self._folder / str(step)
        self._verify(folder)
        if not (folder / "opt_state").is_dir():
            if "converted" not in stored.read_meta(folder):
                raise DamagedCheckpointError(folder, "opt_state is missing")
            what = f"{self._folder} has converted weights without a training state: give another "
            fix = f"--workdir, and --config.training.init_from={self._folder.parent}"
            raise UsageError(what + fix)
        trees = jax.tree.map(_abstract, _trees(target))
        try:
            there = {
                (name, *path): leaf.shape
                for name in trees
                if (folder / name).is_dir()
                for path, leaf in reader.stored_leaves(folder / name).items()
            }
            leaves = jax.tree_util.tree_leaves_with_path(trees)
            here = {reader.path_names(path): leaf.shape for path, leaf in leaves}
            if differing := reader.differences(there, here):
                text = f"is of another model or optimizer than this config ({differing})"
                fix = "use the config that it was trained with, or another --workdir"
                raise UsageError(f"{folder} {text}: {fix}")
            items = {name: reader.read_tree(folder / name, tree) for name, tree in trees.items()}
        except (UsageError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # what Orbax and TensorStore raise has many types
            # Other processes may have read their parts, and wait: they cannot be asked.
            if (folder / stored.CHECKSUMS).exists() or jax.process_count() > 1:
                raise
            raise DamagedCheckpointError(folder, error) from error
        number = from_same(np.asarray(step, target.step.dtype), target.step.sharding)
        return target.replace(step=number, **items)

    def restore_newest(self, target: TrainState, say=print) -> tuple[TrainState, int] | None:
        """The newest state that can be read, and its step; None if none is saved, or a UsageError.

        A damaged one is said and renamed to broken-STEP, so that its step can be saved again.
        """
        reasons: dict[int, str] = {}
        for step in sorted(self.steps(), reverse=True):
            try:
                state = self.restore(step, target)
            except DamagedCheckpointError as error:
                reasons[step] = str(error)
            else:
                self._set_aside(reasons, step, say)
                return state, step
        if not reasons:
            return None
        fix = "put back a copy of one, or start again in another --workdir"
        raise UsageError(f"no checkpoint can be read ({'; '.join(reasons.values())}): {fix}")

    def _set_aside(self, reasons: dict[int, str], step: int, say: Callable[[str], None]) -> None:
        for number, reason in reasons.items() if jax.process_index() == 0 else ():
            new, copies = f"broken-{number}", itertools.count(2)
            while (self._folder / new).exists():
                new = f"broken-{number}-{next(copies)}"
            (self._folder / str(number)).rename(self._folder / new)
            say(f"warning: {reason}: renamed to {new}, going on from step {step}")
        if reasons and jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def _verify(self, folder: pathlib.Path) -> None:
        parts, reason = jax.process_count(), None
        try:
            stored.verified(folder, "", jax.process_index(), parts)
        except DamagedCheckpointError as error:
            reason = error.reason
        if parts > 1:  # all say the first reason, so that all decide alike
            data = np.frombuffer((reason or "").encode()[:400].ljust(400, b"\0"), np.uint8)
            rows = multihost_utils.process_allgather(data)
            texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
            reason = next(filter(None, texts), None)
        if reason:
            raise DamagedCheckpointError(folder, reason)


def _trees(state: TrainState) -> dict[str, Any]:
    return {k: v for k, v in vars(state).items() if k != "step" and jax.tree.leaves(v)}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if leaf.sharding is None:  # Orbax would ask for the devices that it was saved on
        raise ValueError(f"the target of a restore needs shardings, and {leaf} has none")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
