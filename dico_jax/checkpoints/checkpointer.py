"""Checkpoints of runs, on Orbax.

A folder of checkpoints holds one folder per step with an item for every field of `TrainState` but
the step (`params`, `ema_params`, `opt_state`) and `meta` (JSON: config, class names, versions). The
items are apart so that sampling reads the averaged weights alone. A run needs no other state: data
order and randomness follow from the step. checksums.json is made of all of it before Orbax commits
the folder by renaming it, so that damage is noticed when it is read.

A converted checkpoint has the same layout, with `ema_params` alone or with all items, and without
checksums; its meta also says, under "converted", where it came from (see docs/conversion.md).
"""

import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dico_jax.checkpoints.checksums import find_damage
from dico_jax.checkpoints.orbax_reports import unreported
from dico_jax.checkpoints.state import TrainState
from dico_jax.checkpoints.step_folders import (
    check_accepted,
    read_meta,
    remove_unfinished,
    seal,
    system_error,
)
from dico_jax.checkpoints.streaming import deferred_handler, stored_leaves
from dico_jax.errors import UsageError
from dico_jax.files import library_versions

FOLDER = "checkpoints"
_ITEMS = tuple(f.name for f in dataclasses.fields(TrainState) if f.name != "step")
_MAX_LISTED = 5
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedCheckpointError(UsageError):
    """A checkpoint of which a file is missing, cut or changed."""


class Checkpointer:
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
        # Orbax needs an absolute path; a relative one fails later, in a background thread.
        self._folder = (workdir / FOLDER).absolute()
        self._saving = -1  # the step of the save that may still be under way
        policies = ocp.checkpoint_managers
        preserved: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            preserved.append(policies.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=(*_ITEMS, "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserved),
                cleanup_tmp_directories=True,
                single_host_load_and_broadcast=jax.process_count() > 1,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=lambda: seal(self._folder, self._saving),
                    # Where folders cannot be made, Orbax's threads would wait 5 minutes for them.
                    create_directories_asynchronously=False,
                ),
            ),
        )
        self._meta = meta | {"versions": library_versions()}
        self._failed = False
        self._resources = contextlib.ExitStack()

    def __enter__(self):
        self._resources.enter_context(unreported())
        return self

    def __exit__(self, exc_type, exc, traceback):
        try:
            self.wait()
        except Exception as error:
            if exc is None:
                raise
            print(f"warning: {error}", file=sys.stderr)  # what ended the run matters more
        finally:
            self._manager.close()
            if not self._failed:  # what is left of a failed save reports itself to the very end
                self._resources.close()

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, extra: dict[str, Any] | None = None) -> None:
        """Starts saving `state` as `step`; a step that is saved already is left as it is.

        Args:
          step: the checkpoint's step.
          state: what to save.
          extra: more of the run's state, JSON values, for `extra`.

        Raises:
          UsageError: this save cannot start, or the one before it failed, for want of space or
            permission. Nothing of it is left, and the checkpoints before it are as they were.
          RuntimeError: it failed otherwise.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}
        self._saving = step
        with self._explained():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    meta=ocp.args.JsonSave(self._meta | {"extra": extra or {}}), **items
                ),
            )
        check_accepted(saved, step, self._folder)

    def extra(self, step: int) -> dict[str, Any]:
        """What `save` was given besides the state; {} if nothing."""
        return read_meta(self._folder / str(step)).get("extra", {})

    def wait(self) -> None:
        """Waits until the save in the background is finished; raises what `save` raises."""
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns an error of the save under way into one that says what is to be done."""
        try:
            yield
        except Exception as error:
            self._failed = True
            remove_unfinished(self._folder, self._saving)
            raise self._explanation(error) from error

    def _explanation(self, error: Exception) -> Exception:
        failed = f"{self._folder}: step {self._saving} could not be saved"
        number = system_error(error)
        if number is None:
            return RuntimeError(f"{failed} ({error})")
        there = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        fix = "make room" if number in _NO_ROOM else "mend that"
        steps = saved_steps(self._folder.parent)
        then = f"goes on from step {max(steps)}" if steps else "starts from the beginning"
        return UsageError(
            f"{failed} ({os.strerror(number)}; {free / 1e6:,.0f} MB free there): {fix} and give "
            f"the same command again, which {then}"
        )

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
                f"({_listed(differences)}): use the config that it was trained with, or another "
                "--workdir"
            )
        args = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        with _read_errors(folder, verified):
            items = self._manager.restore(step, args=ocp.args.Composite(**args))
        number = np.asarray(step, target.step.dtype)
        array = jax.make_array_from_callback((), target.step.sharding, lambda _: number)
        return target.replace(step=array, **{name: items[name] for name in trees})

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
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self.restore(step, target)
            except DamagedCheckpointError as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step, say)
            return state, step
        if damaged:
            raise UsageError(
                f"no checkpoint can be read ({'; '.join(damaged.values())}): put back a copy of "
                "one, or start again in another --workdir"
            )
        return None

    def _set_aside(self, damaged: dict[int, str], step: int, say: Callable[[str], None]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            for number, reason in damaged.items():
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
            raise DamagedCheckpointError(f"{folder} is damaged ({reason})")
        return verified


def _trees(state: TrainState) -> dict[str, Any]:
    """The items of a state; Orbax does not save a tree without leaves."""
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
    text = np.zeros(400, np.uint8)
    data = (reason or "").encode()[: text.size]
    text[: len(data)] = np.frombuffer(data, np.uint8)
    gathered = multihost_utils.process_allgather(text)
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in gathered]
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
        reason = " ".join(str(error).split())
        if len(reason) > 300:  # TensorStore's name every operation and key
            reason = f"{reason[:150]} ... {reason[-150:]}"
        raise DamagedCheckpointError(f"{folder} is damaged ({reason})") from error


def _check_is_training_state(folder: pathlib.Path) -> None:
    if (folder / "opt_state").is_dir():
        return
    with _read_errors(folder, verified=False):
        converted = "converted" in read_meta(folder)
    if not converted:
        raise DamagedCheckpointError(f"{folder} is damaged (opt_state is missing)")
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
        wanted = {
            tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf.shape
            for path, leaf in leaves
        }
        for path in sorted(stored.keys() | wanted.keys()):
            there, here = (shapes.get(path, "missing") for shapes in (stored, wanted))
            if there != here:
                found.append(f"{name} {'.'.join(path)} is {there} there and {here} here")
    return found


def _listed(differences: list[str]) -> str:
    more = len(differences) - _MAX_LISTED
    listed = "; ".join(differences[:_MAX_LISTED])
    return f"{listed}; and {more} more" if more > 0 else listed


def _free_name(path: pathlib.Path) -> pathlib.Path:
    name, number = path, 1
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}-{number}")
    return name


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
    with (
        # Where an item fails, its thread must have ended before anybody removes the folder.
        contextlib.closing(ocp.JsonCheckpointHandler()) as meta_handler,
        ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            item_handlers=handlers | {"meta": meta_handler},
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        ) as manager,
    ):
        saved = manager.save(
            step,
            args=ocp.args.Composite(
                meta=ocp.args.JsonSave(meta | {"versions": library_versions()}),
                **{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()},
            ),
        )
    check_accepted(saved, step, workdir)


def saved_steps(workdir: pathlib.Path) -> set[int]:
    """Steps whose save was finished: Orbax renames a folder to its number at the end."""
    folder = workdir / FOLDER
    if not folder.is_dir():
        return set()
    return {int(p.name) for p in folder.iterdir() if p.name.isdecimal() and (p / "meta").is_dir()}
