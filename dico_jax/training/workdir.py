"""The folder of a run: the rule that it belongs to one config, and its lock."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
from collections.abc import Iterator
from typing import IO

import jax
from ml_collections import ConfigDict

from dico_jax.config import DEFAULTS, config_to_dict, flatten, without_gone
from dico_jax.errors import UsageError
from dico_jax.files import new_file

# Fields (or sections, with a dot at the end) that may change between two runs in one workdir: they
# decide how long a run goes on, how fast it is and what it reports, not what it computes.
MUTABLE_FIELDS = (
    "data.source",
    "data.name",
    "data.split",
    "data.path",
    "data.max_bad_fraction",
    "data.num_workers",
    "data.verify_checksums",
    "data.cache_dir",
    "autoencoder.path",
    "autoencoder.tile_size",
    "model.scan_blocks",  # this one, the next and the mesh change the rounding of sums
    "model.remat",
    "mesh.",
    "training.num_steps",
    "training.accumulation_steps",
    "training.ema_snapshot_every_steps",
    "training.log_every_steps",
    "training.checkpoint_every_steps",
    "training.keep_checkpoints",
    "training.keep_every_steps",
    "training.preemption_exit_status",
    "training.on_nan",
    "training.stall_warning_seconds",
    "training.compilation_cache",
    "profile.",
    "logging.",
    "sampling.",
    "eval.",
)


def check_workdir(workdir: str, config: ConfigDict) -> None:
    """Raises UsageError unless `open_workdir` may use the folder; touches nothing."""
    path = _folder(workdir)
    file = path / "config.json"
    if file.exists():
        try:
            old = without_gone(json.loads(file.read_text()))
        except ValueError as error:
            fix = "give another --workdir, or restore the file"
            raise UsageError(f"{file} is not JSON ({error}): {fix}") from error
        if differing := _differences(old, config_to_dict(config)):
            text = f"belongs to a run of another config ({'; '.join(differing)})"
            fix = "use these values again, or another --workdir"
            raise UsageError("--workdir", workdir, f"{text}: {fix}")
    elif (path / "checkpoints").exists():
        fix = "has checkpoints but no config.json: give another folder"
        raise UsageError("--workdir", workdir, fix)


def open_workdir(workdir: str, config: ConfigDict) -> pathlib.Path:
    """Makes the folder of a run and writes config.json; a folder of the same run is used again.

    Of several processes, the first one writes.

    Raises:
      UsageError: the path is a file or not writable, holds something else, or holds a run whose
        config differs in a field that may not change. Nothing in it is touched then.
    """
    check_workdir(workdir, config)
    path = _folder(workdir, make=True)
    if jax.process_index() == 0:
        text = json.dumps(config_to_dict(config), indent=2, sort_keys=True) + "\n"
        with new_file(path / "config.json") as file:
            file.write(text.encode())
    return path


@contextlib.contextmanager
def workdir_lock(workdir: str, process_index: int = 0) -> Iterator[None]:
    """While it lasts, no other run gets this folder; makes the folder if it is not there.

    The lock is the kernel's (flock on WORKDIR/.lock), so it ends with the process, however that
    ends. On NFS the server keeps it, and it also holds against other hosts; on file systems that
    keep locks to themselves, such as a bucket mounted by gcsfuse, it holds on this host only.

    Args:
      workdir: folder of the run.
      process_index: of this process in its run; only the first one takes the lock.

    Raises:
      UsageError: another run has the folder, or it cannot be written.
    """
    if process_index != 0:
        yield
        return
    path = _folder(workdir, make=True)
    with _write_errors(workdir):
        file = (path / ".lock").open("a+")  # not "w": it may be another run's
    with file:
        _lock(file, workdir)
        with _write_errors(workdir):
            _write_owner(file)
        yield


def _folder(workdir: str, make: bool = False) -> pathlib.Path:
    path = pathlib.Path(workdir)
    if path.exists() and not path.is_dir():
        raise UsageError("--workdir", workdir, "is a file: give a folder")
    if make:
        with _write_errors(workdir):
            path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _write_errors(workdir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError("--workdir", workdir, f"cannot be written: {error}") from error


def _lock(file: IO[str], workdir: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            fix = "wait for its end, stop it, or give another --workdir"
            text = f"is in use by another run ({_owner(file)}): {fix}"
            raise UsageError("--workdir", workdir, text) from error
        text = f"warning: --workdir={workdir} cannot be locked ({error.strerror})"
        print(f"{text}: see to it that no other run uses it", file=sys.stderr)


def _write_owner(file: IO[str]) -> None:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    file.truncate(0)
    file.write(json.dumps(owner) + "\n")
    file.flush()


def _owner(file: IO[str]) -> str:
    try:
        file.seek(0)
        owner = json.load(file)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun to write
        return "just started"


def _differences(old: dict, new: dict) -> list[str]:
    """What may not change between two configs and does."""
    # Fields that are newer than the run have done what their defaults do.
    before = flatten(json.loads(json.dumps(DEFAULTS))) | flatten(old)
    now = flatten(new)
    fixed = {field for field in before.keys() | now.keys() if not _may_change(field)}
    if now["optimizer.schedule"] != "constant":
        fixed.add("training.num_steps")  # where the schedule ends
    return [
        f"config.{field} was {json.dumps(before.get(field))}, is {json.dumps(now.get(field))}"
        for field in sorted(fixed)
        if before.get(field) != now.get(field)
    ]


def _may_change(field: str) -> bool:
    return any(
        field.startswith(name) if name.endswith(".") else field == name for name in MUTABLE_FIELDS
    )
