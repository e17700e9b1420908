"""Writes folders of prepared latents: the plan, shards one by one, and at last the manifest."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module
from etils import epath

from dico_jax.data.latent_folder import (
    DTYPES,
    Manifest,
    Plan,
    Shard,
    file_sha256,
    finished_shard,
    read_json,
    shard_json,
)
from dico_jax.data.paths import is_remote
from dico_jax.errors import UsageError

_DIGEST_IDS = 1000


def source_digest(source) -> str:
    """The sha256 of a source's class names, its size and the ids of examples spread over it.

    Not of all ids, because some sources have them in their records.
    """
    count = len(source)
    digest = hashlib.sha256(json.dumps([list(source.class_names), count]).encode())
    for index in np.unique(np.linspace(0, count - 1, _DIGEST_IDS).round().astype(int)):
        digest.update(source.example_id(int(index)).encode() + b"\n")
    return digest.hexdigest()


def claim_folder(folder: epath.Path, plan: Plan) -> None:
    """Makes the folder of a plan, or checks that it is the folder of just this plan.

    Raises:
      UsageError: it cannot be made, holds latents of another plan, or something else.
    """
    file = folder / "plan.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            old, new = read_json(file), plan.to_json()
            differing = [key for key in new if old.get(key) != new[key]]
            if differing:
                said = "; ".join(
                    f"{k} was {_short(old.get(k))}, is {_short(new[k])}" for k in differing
                )
                raise UsageError(
                    f"--out={folder} holds latents that were made in another way ({said}): "
                    "give another folder"
                )
        elif any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UsageError(f"--out={folder} is not empty and has no plan.json: give a new folder")
        else:
            write_json(file, plan.to_json())
    except OSError as error:
        raise UsageError(f"--out={folder} cannot be written: {error}") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextlib.contextmanager
def shard_writer(
    folder: epath.Path, plan: Plan, shard: int, process_index: int = 0
) -> Iterator["ShardWriter"]:
    """A writer whose shard appears in the folder, with its JSON file, when the block ends well.

    Nothing is left of a block that fails; of one that is killed, what `remove_leftovers` removes.
    """
    remote = is_remote(str(folder))
    with tempfile.TemporaryDirectory(
        prefix=_scratch_prefix(process_index), dir=None if remote else os.fspath(folder)
    ) as scratch:
        path = os.path.join(scratch, plan.shard_file(shard))
        writer = ShardWriter(path, plan)
        yield writer
        done = writer.close()
        target = folder / done.file
        if remote:
            epath.Path(path).copy(target, overwrite=True)
        else:
            os.replace(path, target)
        write_json(shard_json(target), dataclasses.asdict(done))


def _scratch_prefix(process_index: int) -> str:
    return f".writing-{process_index}-"


def remove_leftovers(folder: epath.Path, process_index: int) -> None:
    """Removes what a killed process of this index has left half written."""
    for path in folder.glob(f"{_scratch_prefix(process_index)}*"):
        path.rmtree()


class ShardWriter:
    """Writes the records of one shard. Made by `shard_writer`."""

    def __init__(self, path: str, plan: Plan):
        self._path, self._plan = path, plan
        # One record a group: a record is read without the ones around it. Noise does not compress.
        self._writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        self._count, self._bad = 0, dict[str, str]()

    def add(self, moments: np.ndarray, label: int, example_id: str) -> None:
        """Adds an example: moments of the plan's shape."""
        assert moments.shape == self._plan.shape
        data = np.ascontiguousarray(moments.astype(DTYPES[self._plan.dtype])).tobytes()
        record = {"moments": data, "label": int(label), "id": example_id}
        self._writer.write(msgpack.packb(record))
        self._count += 1

    def add_bad(self, bad: Mapping[str, str]) -> None:
        """Notes examples that could not be read, id to reason."""
        self._bad |= bad

    def close(self) -> Shard:
        """Ends the file and tells what is in it."""
        self._writer.close()
        size = os.path.getsize(self._path)
        name = os.path.basename(self._path)
        return Shard(name, self._count, size, file_sha256(epath.Path(self._path)), self._bad)


def write_manifest(folder: epath.Path, plan: Plan, versions: dict[str, str]) -> Manifest | None:
    """Writes manifest.json if all shards are complete, else returns None.

    Args:
      folder: the folder.
      plan: its plan.
      versions: of the libraries, for the record.
    """
    shards = []
    for index in range(plan.num_shards):
        shard = finished_shard(folder, plan, index)
        if shard is None:
            return None
        shards.append(shard)
    values = {
        "plan": plan.to_json(),
        "shards": [dataclasses.asdict(s) for s in shards],
        "versions": versions,
    }
    write_json(folder / "manifest.json", values)
    return Manifest(plan, shards)


def write_json(file: epath.Path, values: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    temporary = file.parent / f".{file.name}.{os.getpid()}"
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(file)
