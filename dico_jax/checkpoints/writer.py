"""The one writer of steps, on Orbax: states of runs, snapshots of averages, converted weights.

A folder holds one folder per step, with an item (a folder) for every tree of arrays and `meta`
(JSON). Orbax writes a step in the background to a folder of another name, which gets the step's
number when all of it is there, with checksums.json, and on the disk: a step is there whole or not
at all. In a bucket, where nothing is renamed, one without commit_success.txt, which is written
last, is not there. Leaves may be `Deferred`: they are made when their turn comes, so that a tree
may be larger than the memory. Orbax's own way keeps it all, and a copy of it: 1.9 GB for 0.6 GB of
arrays.
"""

import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dico_jax.checkpoints.reader import orbax_path
from dico_jax.checkpoints.steps import CHECKSUMS, checksums, files_of, saved_steps
from dico_jax.errors import UsageError, one_line
from dico_jax.files import Deferred, as_path, is_remote, library_versions, sync

_UNFINISHED = "{}.orbax-checkpoint-tmp*"  # as Orbax names the folder of a step
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Leaves of about this many bytes are compressed and written together while the next ones are read.
_GROUP_BYTES = 32 << 20


class StepWriter:
    """Writes the steps of one folder, in the background; all processes make every call alike.

    A policy of Orbax's says which steps are kept; `deferred` names items of `Deferred` leaves. What
    a killed process has left of a step is cleared.
    """

    def __init__(self, folder: Any, preserved: Any = None, deferred: Sequence[str] = ()):
        # In the background Orbax fails late on relative paths and folders that it cannot make.
        self._folder = folder = folder.absolute()
        self._saving = -1  # the step of the save that may still be under way
        self._deferred = deferred
        _drop_reports()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserved,
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=jax.process_count() > 1,
            temporary_path_class=_StepInBucket if is_remote(folder) else _NewStep,
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        more = {"options": options, "handler_registry": _registry(deferred) if deferred else None}
        self._manager = ocp.CheckpointManager(orbax_path(folder), **more)

    def __enter__(self):
        return self

    def __exit__(self, exc_type, exc, traceback):
        try:
            self.wait()
        except Exception as error:
            if exc is None:
                raise
            print(f"warning: {error}", file=sys.stderr)  # what ended the run matters more
        finally:
            with contextlib.suppress(Exception):  # it raises again what a failed save has
                self._manager.close()

    def steps(self) -> list[int]:
        return list(self._manager.all_steps())

    def remove(self, step: int) -> None:
        self._manager.delete(step)

    def write(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing a step, later than all saved ones; returns when arrays may be donated.

        Raises UsageError where this save cannot start, or the one before it failed, for want of
        space or permission; else RuntimeError. Nothing of it is left, and older steps stay.
        """
        self.wait()
        self._saving = step
        save = ocp.args.PyTreeSave if self._deferred else ocp.args.StandardSave
        args = {name: save(tree) for name, tree in items.items() if jax.tree.leaves(tree)}
        more = {"versions": library_versions(), "checksums": "crc32"}
        args["meta"] = ocp.args.JsonSave({**meta, **more})
        with self._explained():
            saved = self._manager.save(step, args=ocp.args.Composite(**args))
        if not saved:  # Orbax gives no reason
            raise RuntimeError(f"Orbax refused to save step {step} in {self._folder}")

    def check(self) -> None:
        """Raises what `write` raises, where the save in the background has failed by now."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in the background is finished; raises what `write` raises."""
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            _remove_unfinished(self._folder, self._saving)
            failed = f"{self._folder}: step {self._saving} could not be saved"
            if is_remote(self._folder):
                fix = "see to the bucket, and give the same command again, which goes on from the"
                raise UsageError(f"{failed} ({one_line(error)}): {fix} newest step") from error
            if (number := _system_error(error)) is None:
                raise RuntimeError(f"{failed} ({error})") from error
            there = next(path for path in (self._folder, *self._folder.parents) if path.exists())
            free = shutil.disk_usage(there).free / 1e6
            reason = f"{os.strerror(number)}; {free:,.0f} MB free there"
            fix = "make room" if number in _NO_ROOM else "mend that"
            steps = saved_steps(self._folder.parent)
            then = f"goes on from step {max(steps)}" if steps else "starts from the beginning"
            fix += f" and give the same command again, which {then}"
            raise UsageError(f"{failed} ({reason}): {fix}") from error


class _NewStep(ocp.path.atomicity.AtomicRenameTemporaryPath):
    async def finalize(self) -> None:
        """Gives a written step its checksums and name; one process calls it before old ones go."""
        folder, final = pathlib.Path(self.get()), pathlib.Path(self.get_final())
        if not final.name.isdecimal():  # an item of a step
            return await super().finalize()
        sums = {"step": int(final.name), "files": checksums(folder, files_of(folder))}
        (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))
        sync(folder, *folder.rglob("*"))
        await super().finalize()  # which writes files of its own, without which a step can be read
        sync(*final.parents[:2], final, *final.iterdir())


class _StepInBucket(ocp.path.atomicity.CommitFileTemporaryPath):
    async def finalize(self) -> None:
        """Gives a written step its checksums, then what says that all of it is there."""
        if (folder := as_path(self.get_final())).name.isdecimal():
            kind = "crc32c" if os.fspath(folder).startswith("gs://") else "crc32"
            files = files_of(folder)
            sums = {"step": int(folder.name), "files": checksums(folder, files, kind)}
            (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))
        await super().finalize()


def _remove_unfinished(folder: Any, step: int) -> None:
    """Removes what a failed save has written, which may be what fills the disk."""
    for thread in threading.enumerate():  # those that still write other items
        if type(thread).__module__.startswith("orbax") and thread is not threading.current_thread():
            with contextlib.suppress(Exception):  # it raises what the thread has raised
                thread.join(timeout=60)
    # TensorStore's threads cannot be waited for, and may write later; the next run removes that.
    if is_remote(folder):
        with contextlib.suppress(Exception):  # the next run removes it as well
            if step not in saved_steps(folder.parent, folder.name) and not jax.process_index():
                (folder / str(step)).rmtree(missing_ok=True)
        return
    for _ in range(0 if jax.process_index() else 20):
        for unfinished in folder.glob(_UNFINISHED.format(step)):
            shutil.rmtree(unfinished, ignore_errors=True)
        time.sleep(0.05)


def _system_error(error: BaseException | None) -> int | None:
    while error is not None:
        if match := re.search(r"(?:\[Errno |os_error_code=')(\d+)", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


@functools.cache
def _drop_reports() -> None:
    """From now on drops what Orbax and asyncio print of failed saves, which are raised once."""
    report_others = sys.unraisablehook

    def is_other(record: logging.LogRecord) -> bool:
        source = record.pathname if record.name == "absl" else record.getMessage()
        return record.levelno < logging.ERROR or "orbax" not in source

    def report(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report_others(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_other)
    sys.unraisablehook = report


def _registry(items: Sequence[str]) -> Any:
    deferred = _DeferredHandler(deepcopy_host_arrays=False)  # nobody else holds the arrays
    arrays = ocp.type_handlers.ArrayHandler()  # Orbax warns where it is missing
    pairs = (Deferred, deferred), (jax.Array, arrays)
    types = ocp.type_handlers.create_type_handler_registry(*pairs)
    handlers = {name: ocp.PyTreeCheckpointHandler(type_handler_registry=types) for name in items}
    handlers["meta"] = ocp.JsonCheckpointHandler()
    return ocp.handlers.create_default_handler_registry(**handlers)


class _DeferredHandler(ocp.type_handlers.NumpyHandler):
    """Saves Deferred leaves as NumPy arrays, at most two groups of them in memory."""

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        groups = np.cumsum([leaf.nbytes for leaf in values]) // _GROUP_BYTES
        rows = zip(groups, values, infos, args, strict=True)
        futures: Sequence[Any] = ()
        # Waits for all, also where one fails: nobody may still write when the caller cleans up.
        with contextlib.ExitStack() as waits:
            for _, group in itertools.groupby(rows, lambda row: row[0]):
                _, leaves, *rest = zip(*group, strict=True)
                arrays = [np.asarray(leaf.read()) for leaf in leaves]
                waits.close()
                futures = await super().serialize(arrays, *rest)
                for future in futures:
                    waits.callback(future.result)
            waits.pop_all()
        return futures
