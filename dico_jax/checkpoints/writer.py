"""The one writer of steps, on Orbax: states of runs, snapshots of averages, converted weights.

A folder holds one folder per step, with an item (a folder) for every tree of arrays and `meta`
(JSON). Orbax writes a step in the background to a folder of another name. When all of it is there,
checksums.json is made, and the folder is renamed to the step's number: a step is there whole or not
at all, and damage is noticed when it is read. Converted weights have no checksums.

Leaves may be `Deferred`: they are made when their turn comes, so that a tree may be larger than the
memory. Orbax's own way keeps it all, and a copy of it: 1.9 GB for 0.6 GB of arrays.
"""

import contextlib
import errno
import logging
import math
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

from dico_jax.checkpoints.checksums import write_checksums
from dico_jax.checkpoints.reader import saved_steps
from dico_jax.errors import UsageError
from dico_jax.files import Deferred

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Leaves of about this many bytes are compressed and written together while the next ones are read.
_GROUP_BYTES = 32 << 20
_PAUSE_SECONDS, _QUIET_SECONDS, _MOST_SECONDS = 0.05, 0.5, 10.0


class StepWriter:
    """Writes the steps of one folder, in the background. Use as a context manager.

    With several processes, all of them make every call, with the same arguments.
    """

    def __init__(self, folder: pathlib.Path, preserved: Any = None, deferred: Sequence[str] = ()):
        """Opens (or makes) a folder of steps, and clears what a killed process has left there.

        Args:
          folder: see above.
          preserved: Orbax's policy of which steps to keep; all if None.
          deferred: the items whose leaves are `Deferred`.
        """
        # Orbax needs an absolute path; a relative one fails later, in a background thread.
        self._folder = folder.absolute()
        self._saving = -1  # the step of the save that may still be under way
        self._failed = False
        self._deferred, self._quiet = deferred, _Quiet()
        self._manager = ocp.CheckpointManager(
            self._folder,
            handler_registry=_registry(deferred) if deferred else None,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preserved,
                cleanup_tmp_directories=True,
                single_host_load_and_broadcast=jax.process_count() > 1,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._seal,
                    # Where folders cannot be made, Orbax's threads would wait 5 minutes for them.
                    create_directories_asynchronously=False,
                ),
            ),
        )

    def __enter__(self):
        self._quiet.start()
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
                self._quiet.stop()

    def steps(self) -> list[int]:
        """The steps saved."""
        return list(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def remove(self, step: int) -> None:
        """Removes a saved step."""
        self._manager.delete(step)

    def write(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing a step; returns when the arrays may be donated.

        Args:
          step: later than all that are saved.
          items: trees of arrays by name; one without leaves is left out, for Orbax takes none.
          meta: JSON values.

        Raises:
          UsageError: this save cannot start, or the one before it failed, for want of space or
            permission. Nothing of it is left, and the steps before it are as they were.
          RuntimeError: it failed otherwise.
        """
        self.wait()
        self._saving = step
        save = ocp.args.PyTreeSave if self._deferred else ocp.args.StandardSave
        args = {name: save(tree) for name, tree in items.items() if jax.tree.leaves(tree)}
        args["meta"] = ocp.args.JsonSave(dict(meta))
        with self._explained():
            saved = self._manager.save(step, args=ocp.args.Composite(**args))
        if not saved:  # Orbax gives no reason
            raise RuntimeError(f"Orbax refused to save step {step} in {self._folder}")

    def wait(self) -> None:
        """Waits until the save in the background is finished; raises what `write` raises."""
        with self._explained():
            self._manager.wait_until_finished()

    def _seal(self) -> None:
        """Adds checksums before the folder is renamed; Orbax calls it in one process.

        Converted weights get none: whoever has them has the file that they are from.
        """
        if self._deferred:
            return
        folders = _unfinished(self._folder, self._saving)
        if len(folders) != 1:
            raise RuntimeError(f"{self._folder} has {folders} for step {self._saving}")
        write_checksums(folders[0])

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns an error of the save under way into one that says what is to be done."""
        try:
            yield
        except Exception as error:
            self._failed = True
            _remove_unfinished(self._folder, self._saving)
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


# Saves that fail.


def _unfinished(folder: pathlib.Path, step: int) -> list[pathlib.Path]:
    return list(folder.glob(f"{step}.orbax-checkpoint-tmp*"))


def _remove_unfinished(folder: pathlib.Path, step: int) -> None:
    """Removes what a failed save has written, which may be what fills the disk.

    TensorStore's threads cannot be waited for, and may write a file, its folder included, after the
    others have given up. So it removes until nothing has come for a while; at the latest the next
    run removes the rest.
    """
    for thread in threading.enumerate():  # those that still write other items
        if type(thread).__module__.startswith("orbax") and thread is not threading.current_thread():
            with contextlib.suppress(Exception):  # it raises what the thread has raised
                thread.join(timeout=60)
    if jax.process_index():
        return
    end = time.monotonic() + _MOST_SECONDS
    quiet = 0.0
    while quiet < _QUIET_SECONDS and time.monotonic() < end:
        for unfinished in _unfinished(folder, step):
            shutil.rmtree(unfinished, ignore_errors=True)
            quiet = 0.0
        time.sleep(_PAUSE_SECONDS)
        quiet += _PAUSE_SECONDS


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


class _Quiet:
    """Drops what is printed of failed saves, which `StepWriter` raises itself, once.

    Orbax logs the traceback of every array that it could not write, and asyncio every task that
    nobody has waited for: thousands of lines for a full disk.
    """

    def start(self) -> None:
        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        self._hook = sys.unraisablehook
        for logger in self._loggers:
            logger.addFilter(self._is_other_record)
        sys.unraisablehook = self._report_others

    def stop(self) -> None:
        for logger in self._loggers:
            logger.removeFilter(self._is_other_record)
        sys.unraisablehook = self._hook

    def _is_other_record(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        return "orbax" not in (record.pathname if record.name == "absl" else record.getMessage())

    def _report_others(self, report) -> None:
        if str(report.exc_value) != "Event loop is closed":
            self._hook(report)


# Leaves that are made when their turn comes.


def _registry(items: Sequence[str]) -> Any:
    """Handlers of items of Deferred leaves, and of meta."""

    def handler():
        types = ocp.type_handlers.create_type_handler_registry(
            (Deferred, _DeferredHandler()),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns where it is missing
        )
        return ocp.PyTreeCheckpointHandler(type_handler_registry=types)

    return ocp.handlers.create_default_handler_registry(
        meta=ocp.JsonCheckpointHandler(), **{name: handler() for name in items}
    )


class _DeferredHandler(ocp.type_handlers.NumpyHandler):
    """Saves Deferred leaves as NumPy arrays, at most two groups of them in memory."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)  # nobody else holds the arrays

    async def serialize(self, values, infos, args=None):
        """Writes the leaves; returns what is still to wait for."""
        args = args or [ocp.SaveArgs()] * len(values)
        pending: Sequence[Any] = ()
        try:
            for group in _groups(values):
                arrays = [np.asarray(values[i].read()) for i in group]
                _wait(pending)
                pending = ()
                pending = await super().serialize(
                    arrays, [infos[i] for i in group], [args[i] for i in group]
                )
        except BaseException:
            _wait(pending)  # nobody may still be writing when the caller cleans up
            raise
        return pending


def _wait(futures: Sequence[Any]) -> None:
    """Waits for all of them, also where one has failed; raises what failed."""
    with contextlib.ExitStack() as waits:
        for future in futures:
            waits.callback(future.result)


def _groups(leaves: Sequence[Deferred]) -> Iterator[list[int]]:
    """Indices of the leaves, cut into runs of about _GROUP_BYTES."""
    group: list[int] = []
    size = 0
    for i, leaf in enumerate(leaves):
        group.append(i)
        size += math.prod(leaf.shape) * leaf.dtype.itemsize
        if size >= _GROUP_BYTES or i == len(leaves) - 1:
            yield group
            group, size = [], 0
