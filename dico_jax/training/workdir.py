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


_DEFAULTS = flatten(json.loads(json.dumps(DEFAULTS)))


def check_workdir(workdir: str, config: ConfigDict) -> None:
    """Raises UsageError unless `open_workdir` may use the folder; touches nothing."""
    path = pathlib.Path(workdir)
    file = path / "config.json"
    if path.exists() and not path.is_dir():
        raise UsageError(f"--workdir={workdir} is a file: give a folder")
    if file.exists():
        _check_same_run(workdir, _read(file), config_to_dict(config))
    elif path.is_dir() and (path / "checkpoints").exists():
        raise UsageError(
            f"--workdir={workdir} has checkpoints but no config.json: give another folder"
        )


def open_workdir(workdir: str, config: ConfigDict) -> pathlib.Path:
    """Makes the folder of a run and writes config.json; a folder of the same run is used again.

    Of several processes, the first one writes.

    Raises:
      UsageError: the path is a file or not writable, holds something else, or holds a run whose
        config differs in a field that may not change. Nothing in it is touched then.
    """
    check_workdir(workdir, config)
    path = pathlib.Path(workdir)
    with _write_errors(workdir):
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            text = json.dumps(config_to_dict(config), indent=2, sort_keys=True) + "\n"
            temporary = path / "config.json.tmp"
            temporary.write_text(text)
            os.replace(temporary, path / "config.json")
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
    path = pathlib.Path(workdir)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--workdir={workdir} is a file: give a folder")
    with _write_errors(workdir):
        path.mkdir(parents=True, exist_ok=True)
        file = (path / ".lock").open("a+")  # not "w": it may be another run's
    with file:
        _lock(file, workdir)
        with _write_errors(workdir):
            _write_owner(file)
        yield


def _lock(file: IO[str], workdir: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(
                f"--workdir={workdir} is in use by another run ({_owner(file)}): wait for its end, "
                "stop it, or give another --workdir"
            ) from error
        print(
            f"warning: --workdir={workdir} cannot be locked ({error.strerror}): see to it that no "
            "other run uses it",
            file=sys.stderr,
        )


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


@contextlib.contextmanager
def _write_errors(workdir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be written: {error}") from error


def _read(file: pathlib.Path) -> dict:
    try:
        return without_gone(json.loads(file.read_text()))
    except ValueError as error:
        raise UsageError(
            f"{file} is not JSON ({error}): give another --workdir, or restore the file"
        ) from error


def _may_change(field: str) -> bool:
    return any(
        field.startswith(name) if name.endswith(".") else field == name for name in MUTABLE_FIELDS
    )


def _ends_the_schedule(config: dict) -> bool:
    return config["optimizer.schedule"] != "constant"


def _check_same_run(workdir: str, old: dict, new: dict) -> None:
    # Fields that are newer than the run have done what their defaults do.
    old, new = _DEFAULTS | flatten(old), flatten(new)
    differing = [
        f"config.{key} was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and (not _may_change(key) or (key == "training.num_steps" and _ends_the_schedule(new)))
    ]
    if differing:
        raise UsageError(
            f"--workdir={workdir} belongs to a run of another config ({'; '.join(differing)}): "
            "use these values again, or another --workdir"
        )
