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
import importlib.metadata
import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dico_jax.defaults import with_defaults
from dico_jax.errors import UsageError
from dico_jax.interop.file_writers import Deferred
from dico_jax.training.checksums import find_damage, write_checksums
from dico_jax.training.orbax_reports import unreported
from dico_jax.training.state import TrainState
from dico_jax.training.streaming import deferred_handler, stored_leaves

FOLDER = "checkpoints"
WEIGHTS = {"ema": "ema_params", "params": "params"}
_ITEMS = tuple(f.name for f in dataclasses.fields(TrainState) if f.name != "step")
_MAX_LISTED = 5
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
                    post_finalization_callback=self._seal,
                    # Where folders cannot be made, Orbax's threads would wait 5 minutes for them.
                    create_directories_asynchronously=False,
                ),
            ),
        )
        self._meta = meta | {"versions": library_versions()}
        self._saving = -1  # the step of the save that may still be under way
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
        if not saved:  # Orbax says so, and nothing else
            raise RuntimeError(f"Orbax refused to save step {step} in {self._folder}")

    def extra(self, step: int) -> dict[str, Any]:
        """What `save` was given besides the state; {} if nothing."""
        return _read_meta(self._folder / str(step)).get("extra", {})

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
            _join_writers()
            if jax.process_index() == 0:
                for folder in self._unfinished():  # it may be what fills the disk
                    shutil.rmtree(folder, ignore_errors=True)
            raise self._explanation(error) from error

    def _explanation(self, error: Exception) -> Exception:
        failed = f"{self._folder}: step {self._saving} could not be saved"
        number = _system_error(error)
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

    def _unfinished(self) -> list[pathlib.Path]:
        """The folder that Orbax writes the step under way to, before it renames it."""
        return list(self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"))

    def _seal(self) -> None:
        """Orbax calls this in one process, when all files of a checkpoint are written."""
        folders = self._unfinished()
        if len(folders) != 1:
            raise RuntimeError(f"{self._folder} has {folders} for step {self._saving}")
        write_checksums(folders[0])

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


def _join_writers() -> None:
    """Waits for the threads that still write other items of a save that has failed."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax") and thread is not threading.current_thread():
            with contextlib.suppress(Exception):  # it raises what the thread has raised
                thread.join(timeout=60)


def _system_error(error: BaseException) -> int | None:
    """The number of the system's error behind this one, or None; TensorStore has it in its text."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        if match := re.search(r"os_error_code='(\d+)'", str(seen)):
            return int(match[1])
        seen = seen.__cause__ or seen.__context__
    return None


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
        converted = "converted" in _read_meta(folder)
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


def _read_meta(folder: pathlib.Path) -> dict[str, Any]:
    return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "meta")


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
    if not saved:
        raise RuntimeError(f"Orbax refused to save step {step} in {workdir}")


class SavedWeights:
    """The weights of a checkpoint, for reading.

    Attributes:
      folder: as given.
      step: the step of the checkpoint.
      config: the config it was made with, a dict; fields it did not have yet have their defaults.
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
          UsageError: there is no such folder, no checkpoint in it, or no such step; its meta is
            damaged.
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
        self._check("meta")
        meta = _read_meta(self._path)
        self.config, self.class_names = with_defaults(meta["config"]), meta["class_names"]
        self.converted = meta.get("converted")

    def read(self, weights: str, abstract_params: Any) -> Any:
        """The parameter tree called `weights`: "ema" or "params".

        Args:
          weights: which.
          abstract_params: tree of ShapeDtypeStruct with shardings.

        Raises:
          UsageError: this checkpoint does not have those weights, or they are damaged.
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
          UsageError: this checkpoint does not have those weights, or they are damaged.
        """
        return stored_leaves(self._item(weights))

    def optimizer_leaves(self) -> dict[tuple[str, ...], Deferred]:
        """The arrays of the optimizer's state by path, each read when asked for.

        Raises:
          UsageError: this checkpoint has none, or it is damaged.
        """
        if not (self._path / "opt_state").is_dir():
            raise UsageError(f"{self._path} has weights alone, and no state of an optimizer")
        self._check("opt_state")
        return stored_leaves(self._path / "opt_state")

    def _item(self, weights: str) -> pathlib.Path:
        item = self._path / WEIGHTS[weights]
        if not item.is_dir():
            have = ", ".join(self.available()) or "none"
            raise UsageError(f"--weights={weights}: {self._path} has only {have}")
        self._check(WEIGHTS[weights])
        return item

    def _check(self, item: str) -> None:
        """Raises DamagedCheckpointError where the files of an item differ from their checksums."""
        _, reason = find_damage(self._path, item)
        if reason:
            raise DamagedCheckpointError(
                f"{self._path} is damaged ({reason}): use the checkpoint of another step"
            )


def saved_steps(workdir: pathlib.Path) -> set[int]:
    """Steps whose save was finished: Orbax renames a folder to its number at the end."""
    folder = workdir / FOLDER
    if not folder.is_dir():
        return set()
    return {int(p.name) for p in folder.iterdir() if p.name.isdecimal() and (p / "meta").is_dir()}
