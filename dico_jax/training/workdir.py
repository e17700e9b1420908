"""The folder of a run: the rule that it belongs to one config, and its lock."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorstore
from ml_collections import ConfigDict

from dico_jax.checkpoints import reader
from dico_jax.checkpoints import steps as stored
from dico_jax.checkpoints.reader import saved_steps
from dico_jax.config import DEFAULTS, config_to_dict, flatten, without_gone
from dico_jax.configs.default import CAREFUL_FIELDS, MUTABLE_FIELDS, MUTABLE_SECTIONS
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError, one_line
from dico_jax.files import append, as_path, is_remote, url_of, write_json
from dico_jax.models.text_conditional import Texts
from dico_jax.parallel import processes

# Seconds: between two signs of life of a run's lock in a bucket, and how long one waits for one.
_RENEWAL, _SILENCE = 10.0, 40.0


def data_of(source: Source, texts: Texts | None = None) -> dict[str, Any]:
    """What a run remembers: classes, count, digests of 1,000 names and of all those in memory.

    Also the digest of what reads its texts, or has read those of prepared latents; or None.
    """
    some = np.linspace(0, len(source) - 1, min(len(source), 1_000), dtype=int)
    ids = json.dumps([source.example_id(int(index)) for index in some]).encode()
    which = [len(source), hashlib.sha256(ids).hexdigest()]
    if (names := getattr(source, "names", None)) is not None:
        which.append(hashlib.sha256(names.tobytes()).hexdigest())
    digest = texts.digest if texts else getattr(source, "text_digest", None)
    return {"class_names": list(source.class_names), "examples": which, "text_digest": digest}


def check_workdir(workdir: str, config: ConfigDict, allowed=(), data: Any = None) -> list[str]:
    """Raises UsageError where checkpoints there are of another config or data; touches nothing.

    Returns what has changed: of `CAREFUL_FIELDS` only those that are `allowed` may.
    """
    if not workdir:
        raise UsageError("--workdir", workdir, "is empty: name a folder")
    folders = (path := as_path(workdir)), path / stored.FOLDER
    items = () if is_remote(workdir) else (*folders, *path.glob("*.json*"), path / ".lock")
    for item in items:  # a pipe would be waited for
        right, kind = (item.is_dir(), "folder") if item in folders else (item.is_file(), "file")
        if item.exists() and not (right and os.access(item, os.R_OK | os.W_OK)):
            text = f"cannot be used: {item} is no {kind} that you may read and write: give another"
            raise UsageError("--workdir", workdir, text)
    if not (steps := saved_steps(workdir)):
        return []
    file, changes = path / "config.json", []
    try:
        newest = file.parent / stored.FOLDER / str(max(steps))
        meta = stored.read_meta(stored.verified(newest, "meta").parent, "config", "class_names")
    except stored.DamagedCheckpointError:  # said by what restores it
        meta = {"class_names": []}
    try:
        if "model.name" not in (old := without_gone(json.loads(file.read_text()))):
            raise ValueError("it is no config")
    except (OSError, ValueError) as error:
        text = f"{file} cannot be read ({error}): "
        if "config" not in meta:
            raise UsageError(f"{text}restore it, or give another --workdir") from error
        old, changes = without_gone(meta["config"]), [f"{text}made again from step {max(steps)}"]
    differing = _differences(old, config_to_dict(config))
    if refused := [text for field, text in differing.items() if field not in allowed]:
        text = f"belongs to a run of another config ({'; '.join(refused)})"
        fix = "use these values again, or another --workdir"
        if differing.keys() <= set(CAREFUL_FIELDS):
            fix += "".join(f", or --allow_config_change={field}" for field in differing)
        raise UsageError("--workdir", workdir, f"{text}: {fix}")
    if data and (found := reader.class_differences(meta["class_names"], data["class_names"])):
        text = f"belongs to a run on data of other classes ({found})"
        raise UsageError("--workdir", workdir, f"{text}: use that data, or another --workdir")
    if data and (was := meta.get("text_digest")) and was != (now := data["text_digest"]):
        found = f"here {now:.12}" if now else "here none"
        text = f"belongs to a run told texts by another encoder ({was:.12}, {found})"
        raise UsageError("--workdir", workdir, f"{text}: use that one, or another --workdir")
    there, here = meta.get("examples"), data and data["examples"]
    if here and there and there != here[: len(there)]:  # older runs have no digest of all names
        changes.append(f"the run had {there[0]} examples and goes on with {here[0]}, or others")
    return changes + list(differing.values())


def open_workdir(workdir: str, config: ConfigDict, *more) -> Any:
    """Makes the folder of a run, where it is not there; the first process writes config.json.

    It says and records what `check_workdir` finds to have changed, which is given all arguments.
    """
    changes, path = check_workdir(workdir, config, *more), _made(workdir)
    if jax.process_index() == 0:
        for change in changes:
            print(f"warning: {change}", file=sys.stderr)
            line = json.dumps({"step": max(saved_steps(path)), "change": change}) + "\n"
            append(path / "config_changes.jsonl", line.encode())
        write_json(path / "config.json", dict(sorted(config_to_dict(config).items())))
    return path


@contextlib.contextmanager
def workdir_lock(workdir: str, process_index: int = 0) -> Iterator[None]:
    """While it lasts, no other run gets this folder, which is made; the first process takes it.

    The lock is the kernel's (flock on WORKDIR/.lock) and ends with the process. It holds against
    other hosts on NFS, and not on a bucket mounted by gcsfuse; in one itself see `_BucketLock`.
    UsageError: another run has it.
    """
    with contextlib.ExitStack() as stack:
        if process_index == 0 and is_remote(workdir):
            stack.enter_context(_BucketLock(workdir))
        elif process_index == 0:
            file = stack.enter_context((_made(workdir) / ".lock").open("a+"))  # it may be another's
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise _in_use(workdir, file.read()) from error
            except OSError as error:
                text = f"warning: --workdir={workdir} cannot be locked ({error.strerror})"
                print(f"{text}: see to it that no other run uses it", file=sys.stderr)
            file.truncate(0)
            file.write(f"{_who()}\n")
            file.flush()
        yield


def _who() -> str:
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


def _in_use(workdir: str, by: str) -> UsageError:
    text = f"is in use by another run ({by.strip() or 'just started'})"
    fix = "wait for its end, stop it, or give another --workdir"
    return UsageError("--workdir", workdir, f"{text}: {fix}")


class _BucketLock(contextlib.AbstractContextManager):
    """The object WORKDIR/.lock, which its run writes anew every few seconds.

    Each write has the condition that nobody else has written since: a generation. One that a
    killed run has left is taken over when its process is known to be gone, or stays silent.
    """

    def __init__(self, workdir: str):
        self._workdir, self._left = workdir, threading.Event()
        machine = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine += f"-{os.stat('/proc/self/ns/pid').st_ino}"  # numbers of processes are of a space
        self._mark = {"who": _who(), "machine": machine, "pid": os.getpid()}
        self._mark["token"] = secrets.token_hex(8)

    def __enter__(self):
        try:
            self._store = tensorstore.KvStore.open(url_of(self._workdir)).result()
            there, found = self._read()
            if found and not self._is_gone(found):
                who = found.get("who", "")
                print(
                    f"warning: --workdir={self._workdir} has the lock of {who}: waiting "
                    f"{_SILENCE:.0f} s for a sign of life", file=sys.stderr, flush=True,
                )  # fmt: skip
                before, until = there, time.monotonic() + _SILENCE
                while found and time.monotonic() < until:
                    time.sleep(min(1.0, _SILENCE / 8))
                    there, found = self._read()
                    if found and there != before:
                        raise _in_use(self._workdir, who)
            if not self._write(there):
                raise _in_use(self._workdir, self._read()[1].get("who", ""))
        except UsageError:
            raise
        except Exception as error:  # TensorStore's have many types
            text = f"cannot be locked: {one_line(error)}"
            raise UsageError("--workdir", self._workdir, text) from error
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def _read(self) -> tuple[bytes, dict[str, Any]]:
        """The generation, and what the lock says; {} where there is none."""
        found = self._store.read(".lock").result()
        with contextlib.suppress(ValueError, TypeError):
            return found.stamp.generation, dict(json.loads(found.value or "{}"))
        return found.stamp.generation, {"who": "it does not say"}

    def _write(self, generation: bytes) -> bool:
        """Whether this run has the lock now; it is no more than tried where another has written."""
        value = json.dumps({**self._mark, "at": time.time()})
        stamp = self._store.write(".lock", value, if_equal=generation).result()
        now = stamp.generation
        if not now:  # another has written, or the answer to a first try was lost
            now, found = self._read()
            if found.get("token") != self._mark["token"]:
                return False
        self._generation = now
        return True

    def _is_gone(self, found: dict[str, Any]) -> bool:
        if found.get("machine") != self._mark["machine"] or found["pid"] == os.getpid():
            return False
        try:
            os.kill(int(found["pid"]), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def _renew(self) -> None:
        while not self._left.wait(_RENEWAL):
            has_it = True
            with contextlib.suppress(Exception):  # of many classes: it may be away
                has_it = self._write(self._generation)
            if not has_it and not self._left.is_set():
                text = f"--workdir={self._workdir} was taken over by another run"
                processes.end(f"{text}, as this one was silent for long", 1)

    def __exit__(self, *exc):
        self._left.set()
        with contextlib.suppress(Exception):  # one that is left is found to be silent
            self._store.write(".lock", None, if_equal=self._generation).result()


def _made(workdir: str) -> Any:
    (path := as_path(workdir)).mkdir(parents=True, exist_ok=True)
    return path


def _differences(old: dict, new: dict) -> dict[str, str]:
    # Fields that are newer than the run have done what their defaults do.
    before, now = flatten(json.loads(json.dumps(DEFAULTS))) | flatten(old), flatten(new)
    mutable = {f"{section}.{n}" for section, names in MUTABLE_FIELDS.items() for n in names.split()}
    mutable |= {field for field in before | now if field.partition(".")[0] in MUTABLE_SECTIONS}
    ends = {"training.num_steps"} if now["optimizer.schedule"] != "constant" else set()
    return {
        field: f"config.{field} was {json.dumps(a)}, is {json.dumps(b)}"
        for field in sorted(before.keys() | now.keys())
        if (a := before.get(field)) != (b := now.get(field)) and field not in mutable - ends
    }
