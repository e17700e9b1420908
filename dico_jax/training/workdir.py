"""The folder of a run: the rule that it belongs to one config, and its lock."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from dico_jax.config import DEFAULTS, config_to_dict, flatten, without_gone
from dico_jax.errors import UsageError
from dico_jax.files import write_json

# Fields by section, and whole sections, that may change between two runs in one workdir: they
# decide how long a run goes on, how fast it is and what it reports, not what it computes.
MUTABLE_FIELDS = {
    "data": "source name split path max_bad_fraction num_workers verify_checksums cache_dir",
    "autoencoder": "path tile_size",
    "model": "scan_blocks remat",  # these and the mesh change the rounding of sums
    "training": "num_steps accumulation_steps ema_snapshot_every_steps log_every_steps "
    "checkpoint_every_steps keep_checkpoints keep_every_steps preemption_exit_status on_nan "
    "stall_warning_seconds compilation_cache",
}
MUTABLE_SECTIONS = ("mesh", "profile", "logging", "sampling", "eval")


def check_workdir(workdir: str, config: ConfigDict) -> None:
    """Raises UsageError where the folder holds a run of another config; touches nothing."""
    file = pathlib.Path(workdir) / "config.json"
    if file.exists():
        try:
            old = without_gone(json.loads(file.read_text()))
        except ValueError as error:
            text = f"{file} is not JSON ({error}): restore it, or give another --workdir"
            raise UsageError(text) from error
        if differing := _differences(old, config_to_dict(config)):
            text = f"belongs to a run of another config ({'; '.join(differing)})"
            fix = "use these values again, or another --workdir"
            raise UsageError("--workdir", workdir, f"{text}: {fix}")
    elif (file.parent / "checkpoints").exists():
        fix = "has checkpoints but no config.json: give another folder"
        raise UsageError("--workdir", workdir, fix)


def open_workdir(workdir: str, config: ConfigDict) -> pathlib.Path:
    """Makes the folder of a run, where it is not there; the first process writes config.json.

    UsageError: see `check_workdir`, or it is a file or not writable. Nothing is touched then.
    """
    check_workdir(workdir, config)
    with _made(workdir) as path:
        if jax.process_index() == 0:
            write_json(path / "config.json", dict(sorted(config_to_dict(config).items())))
        return path


@contextlib.contextmanager
def workdir_lock(workdir: str, process_index: int = 0) -> Iterator[None]:
    """While it lasts, no other run gets this folder, which is made; the first process takes it.

    The lock is the kernel's (flock on WORKDIR/.lock) and ends with the process. It holds against
    other hosts on NFS, and not on a bucket mounted by gcsfuse. UsageError: another run has it.
    """
    with contextlib.ExitStack() as stack:
        if process_index == 0:
            with _made(workdir) as path:  # not "w": it may be another run's
                file = stack.enter_context((path / ".lock").open("a+"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError) as error:
                    file.seek(0)
                    text = f"is in use by another run ({file.read().strip() or 'just started'})"
                    fix = "wait for its end, stop it, or give another --workdir"
                    raise UsageError("--workdir", workdir, f"{text}: {fix}") from error
                except OSError as error:
                    text = f"warning: --workdir={workdir} cannot be locked ({error.strerror})"
                    print(f"{text}: see to it that no other run uses it", file=sys.stderr)
                since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
                file.flush()
        yield


@contextlib.contextmanager
def _made(workdir: str) -> Iterator[pathlib.Path]:
    """The folder, which is there now; where it cannot be written, it is --workdir that is wrong."""
    path = pathlib.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        text = "is a file: give a folder" if path.is_file() else f"cannot be written: {error}"
        raise UsageError("--workdir", workdir, text) from error


def _differences(old: dict, new: dict) -> list[str]:
    """What may not change between two configs and does."""
    # Fields that are newer than the run have done what their defaults do.
    before, now = flatten(json.loads(json.dumps(DEFAULTS))) | flatten(old), flatten(new)
    mutable = {f"{section}.{n}" for section, names in MUTABLE_FIELDS.items() for n in names.split()}
    mutable |= {field for field in before | now if field.partition(".")[0] in MUTABLE_SECTIONS}
    ends = {"training.num_steps"} if now["optimizer.schedule"] != "constant" else set()
    return [
        f"config.{field} was {json.dumps(before.get(field))}, is {json.dumps(now.get(field))}"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field) and field not in mutable - ends
    ]
