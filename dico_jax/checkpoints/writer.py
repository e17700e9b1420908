"""The one writer of steps, on Orbax: states of runs, snapshots of averages, converted weights.

A folder holds one folder per step, with an item (a folder) for every tree of arrays and `meta`
(JSON). Orbax writes a step in the background to a folder of another name. When all of it is there,
checksums.json is made, and the folder is renamed to the step's number: a step is there whole or not
at all. Leaves may be `Deferred`: they are made when their turn comes, so that a tree may be larger
than the memory. Orbax's own way keeps it all, and a copy of it: 1.9 GB for 0.6 GB of arrays.
"""

import contextlib
import errno
import functools
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

from dico_jax.checkpoints.reader import saved_steps, write_checksums
from dico_jax.errors import UsageError
from dico_jax.files import Deferred, library_versions

_UNFINISHED = "{}.orbax-checkpoint-tmp*"  # as Orbax names the folder of a step
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Leaves of about this many bytes are compressed and written together while the next ones are read.
_GROUP_BYTES = 32 << 20


class StepWriter:
    """Writes the steps of one folder, in the background; all processes make every call alike."""

    def __init__(self, folder: pathlib.Path, preserved: Any = None, deferred: Sequence[str] = ()):
        """Opens (or makes) a folder of steps, and clears what a killed process has left there.

        A policy of Orbax's says which steps are kept; `deferred` names items of `Deferred` leaves.
        """
        # Orbax needs an absolute path; a relative one fails later, in a background thread.
        self._folder = folder = folder.absolute()
        self._saving = -1  # the step of the save that may still be under way
        self._deferred = deferred
        _drop_reports()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserved,
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=jax.process_count() > 1,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._seal,
                create_directories_asynchronously=False,  # which waits 5 minutes where it cannot
            ),
        )
        handlers = _registry(deferred) if deferred else None
        self._manager = ocp.CheckpointManager(folder, options=options, handler_registry=handlers)

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
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps saved."""
        return list(self._manager.all_steps())

    def remove(self, step: int) -> None:
        """Removes a saved step."""
        self._manager.delete(step)

    def write(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing a step, later than all saved ones; returns when arrays may be donated.

        Raises UsageError where this save cannot start, or the one before it failed, for want of
        space or permission; else RuntimeError. Nothing of it is left, and older steps stay.
        """
        self.wait()
        self._saving = step
        save = ocp.args.PyTreeSave if self._deferred else ocp.args.StandardSave
        # A tree without leaves is left out, for Orbax takes none.
        args = {name: save(tree) for name, tree in items.items() if jax.tree.leaves(tree)}
        args["meta"] = ocp.args.JsonSave({**meta, "versions": library_versions()})
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

    def _seal(self) -> None:
        """Adds checksums before the folder is renamed; Orbax calls it in one process."""
        if not self._deferred:  # whoever has converted weights has the file that they are from
            (folder,) = self._folder.glob(_UNFINISHED.format(self._saving))
            write_checksums(folder)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns an error of the save under way into one that says what is to be done."""
        try:
            yield
        except Exception as error:
            _remove_unfinished(self._folder, self._saving)
            failed = f"{self._folder}: step {self._saving} could not be saved"
            if (number := _system_error(error)) is None:
                raise RuntimeError(f"{failed} ({error})") from error
            there = next(path for path in (self._folder, *self._folder.parents) if path.exists())
            free = shutil.disk_usage(there).free
            fix = "make room" if number in _NO_ROOM else "mend that"
            steps = saved_steps(self._folder.parent)
            then = f"goes on from step {max(steps)}" if steps else "starts from the beginning"
            reason = f"{os.strerror(number)}; {free / 1e6:,.0f} MB free there"
            then = f"{fix} and give the same command again, which {then}"
            raise UsageError(f"{failed} ({reason}): {then}") from error


def _remove_unfinished(folder: pathlib.Path, step: int) -> None:
    """Removes what a failed save has written, which may be what fills the disk."""
    for thread in threading.enumerate():  # those that still write other items
        if type(thread).__module__.startswith("orbax") and thread is not threading.current_thread():
            with contextlib.suppress(Exception):  # it raises what the thread has raised
                thread.join(timeout=60)
    if jax.process_index():
        return
    # TensorStore's threads cannot be waited for, and may write a file, its folder included, after
    # the others have given up. The next run removes what comes later still.
    for _ in range(20):
        for unfinished in folder.glob(_UNFINISHED.format(step)):
            shutil.rmtree(unfinished, ignore_errors=True)
        time.sleep(0.05)


def _system_error(error: BaseException | None) -> int | None:
    """The number of the system's error behind this one, as Python or TensorStore say it."""
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
    """Handlers of items of Deferred leaves, and of meta."""
    types = ocp.type_handlers.create_type_handler_registry(
        (Deferred, _DeferredHandler(deepcopy_host_arrays=False)),  # nobody else holds the arrays
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns where it is missing
    )
    handlers = {name: ocp.PyTreeCheckpointHandler(type_handler_registry=types) for name in items}
    handlers["meta"] = ocp.JsonCheckpointHandler()
    return ocp.handlers.create_default_handler_registry(**handlers)


class _DeferredHandler(ocp.type_handlers.NumpyHandler):
    """Saves Deferred leaves as NumPy arrays, at most two groups of them in memory."""

    async def serialize(self, values, infos, args=None):
        """Writes the leaves; returns what is still to wait for."""
        args = args or [ocp.SaveArgs()] * len(values)
        futures: Sequence[Any] = ()
        # Waits for all, also where one fails: nobody may still write when the caller cleans up.
        with contextlib.ExitStack() as waits:
            for group in _groups(values):
                arrays = [np.asarray(leaf.read()) for leaf in values[group]]
                waits.close()
                futures = await super().serialize(arrays, infos[group], args[group])
                for future in futures:
                    waits.callback(future.result)
            waits.pop_all()
        return futures


def _groups(leaves: Sequence[Deferred]) -> Iterator[slice]:
    """The leaves, cut into runs of about _GROUP_BYTES."""
    start = size = 0
    for end, leaf in enumerate(leaves, 1):
        size += leaf.nbytes
        if size >= _GROUP_BYTES or end == len(leaves):
            yield slice(start, end)
            start, size = end, 0
