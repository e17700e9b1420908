"""The folder of a run: the rule that it belongs to one config, and its lock."""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dico_jax.checkpoints import reader
from dico_jax.checkpoints.reader import saved_steps
from dico_jax.config import DEFAULTS, config_to_dict, flatten, without_gone
from dico_jax.configs.default import CAREFUL_FIELDS, MUTABLE_FIELDS, MUTABLE_SECTIONS
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.files import write_json
from dico_jax.models.text_conditional import Texts


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
    folders = (path := pathlib.Path(workdir)), path / reader.FOLDER
    for item in (*folders, *path.glob("*.json*"), path / ".lock"):  # a pipe would be waited for
        right, kind = (item.is_dir(), "folder") if item in folders else (item.is_file(), "file")
        if item.exists() and not (right and os.access(item, os.R_OK | os.W_OK)):
            text = f"cannot be used: {item} is no {kind} that you may read and write: give another"
            raise UsageError("--workdir", workdir, text)
    if not (steps := saved_steps(workdir)):
        return []
    file, changes = path / "config.json", []
    try:
        newest = file.parent / reader.FOLDER / str(max(steps))
        meta = reader.read_meta(reader.verified(newest, "meta").parent, "config", "class_names")
    except reader.DamagedCheckpointError:  # said by what restores it
        meta = {"class_names": []}
    try:
        if "model.name" not in (old := without_gone(json.loads(file.read_text()))):
            raise ValueError("it is no config")
    except (OSError, ValueError, AssertionError) as error:
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


def open_workdir(workdir: str, config: ConfigDict, *more) -> pathlib.Path:
    """Makes the folder of a run, where it is not there; the first process writes config.json.

    It says and records what `check_workdir` finds to have changed, which is given all arguments.
    """
    changes, path = check_workdir(workdir, config, *more), _made(workdir)
    if jax.process_index() == 0:
        for change in changes:
            print(f"warning: {change}", file=sys.stderr)
            with (path / "config_changes.jsonl").open("a") as log:
                log.write(json.dumps({"step": max(saved_steps(path)), "change": change}) + "\n")
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
            file = stack.enter_context((_made(workdir) / ".lock").open("a+"))  # it may be another's
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


def _made(workdir: str) -> pathlib.Path:
    (path := pathlib.Path(workdir)).mkdir(parents=True, exist_ok=True)
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
