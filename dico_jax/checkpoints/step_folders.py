"""Folders that Orbax writes in the background, one a step: their meta, their seal, failed saves.

Orbax writes a step to a folder of another name and renames it to the step's number at the end.
"""

import contextlib
import pathlib
import re
import shutil
import threading
import time
from typing import Any

import jax
import orbax.checkpoint as ocp

from dico_jax.checkpoints.checksums import write_checksums

_PAUSE_SECONDS, _QUIET_SECONDS, _MOST_SECONDS = 0.05, 0.5, 10.0


def read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """The JSON values that lie beside the arrays of the folder of a step."""
    return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "meta")


def check_accepted(saved: bool, step: int, folder: pathlib.Path) -> None:
    """Raises RuntimeError where the `save` of Orbax's manager says no; it gives no reason."""
    if not saved:
        raise RuntimeError(f"Orbax refused to save step {step} in {folder}")


def seal(folder: pathlib.Path, step: int) -> None:
    """Adds checksums to a step whose files are all written, before its folder is renamed.

    To be called by Orbax, which does so in one process.

    Args:
      folder: the one that holds the folders of all steps.
      step: which is being saved.
    """
    folders = _unfinished(folder, step)
    if len(folders) != 1:
        raise RuntimeError(f"{folder} has {folders} for step {step}")
    write_checksums(folders[0])


def remove_unfinished(folder: pathlib.Path, step: int) -> None:
    """Removes what a failed save has written, which may be what fills the disk.

    TensorStore's threads cannot be waited for, and may write a file, its folder included, after the
    others have given up. So it removes until nothing has come for a while; at the latest the next
    run removes the rest.
    """
    _join_writers()
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


def _unfinished(folder: pathlib.Path, step: int) -> list[pathlib.Path]:
    return list(folder.glob(f"{step}.orbax-checkpoint-tmp*"))


def _join_writers() -> None:
    """Waits for the threads that still write other items of a save that has failed."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax") and thread is not threading.current_thread():
            with contextlib.suppress(Exception):  # it raises what the thread has raised
                thread.join(timeout=60)


def system_error(error: BaseException) -> int | None:
    """The number of the system's error behind this one, or None; TensorStore has it in its text."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        if match := re.search(r"os_error_code='(\d+)'", str(seen)):
            return int(match[1])
        seen = seen.__cause__ or seen.__context__
    return None
