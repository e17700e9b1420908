"""Folders of latents prepared ahead of training, read and written; docs/data.md lists their files.

A record is msgpack: {"moments": bytes, "label": int, "id": str, "fields": {...}}, the last with
what else the example had. The bytes are float16 or bfloat16 of shape (orientations, h, w,
2 * channels): mean, then log variance of the autoencoder's posterior, not scaled, of the picture
and (with two orientations) of the mirrored picture.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
from array_record.python import array_record_module
from etils import epath

from dico_jax.data.paths import is_remote
from dico_jax.errors import UsageError

FORMAT = "dico_jax latents 1"
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_ARRAY = 1  # msgpack's code for an array: msgpack of its dtype, shape and bytes
_SHOWN = 60  # characters of a value that differs
_FIRST_FIELDS = ("label",)  # all that the first folders kept, which do not tell


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a folder of latents is made; two calls that differ in it cannot share a folder."""

    source: str  # what the examples came from, in words
    source_digest: str  # tells another list of examples
    num_examples: int  # bad ones included
    image_size: int
    exif_rotation: bool
    autoencoder: str
    encoder_digest: str
    shape: tuple[int, int, int, int]  # (orientations, h, w, 2 * channels) of an example
    dtype: str  # a name of `DTYPES`
    shard_size: int
    class_names: tuple[str, ...]
    fields: tuple[str, ...] = _FIRST_FIELDS  # of the first good example, besides its image
    format: str = FORMAT

    def __post_init__(self):
        if self.format != FORMAT:
            raise ValueError(f"its format is {self.format!r}, not {FORMAT!r}")

    @property
    def num_shards(self) -> int:
        """How many shards the examples fill."""
        return -(-self.num_examples // self.shard_size)

    def shard_range(self, shard: int) -> range:
        """The source's examples in a shard."""
        return range(self.num_examples)[shard * self.shard_size :][: self.shard_size]

    def shard_file(self, shard: int) -> str:
        """The name of a shard's file."""
        return f"latents-{shard:05d}-of-{self.num_shards:05d}.array_record"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A complete shard."""

    file: str
    count: int
    bytes: int
    sha256: str
    bad: dict[str, str]  # id to reason, of the examples that are missing in it
    fields: tuple[str, ...] = _FIRST_FIELDS  # what all of its examples have besides their images


class Manifest(NamedTuple):
    """What manifest.json says: the plan and its shards in order."""

    plan: Plan
    shards: list[Shard]

    @property
    def num_examples(self) -> int:
        """Examples in all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def bad(self) -> dict[str, str]:
        """Id to reason, of all examples that could not be read."""
        return {key: reason for shard in self.shards for key, reason in shard.bad.items()}

    @property
    def fields(self) -> set[str]:
        """What all examples have besides their images."""
        return set.intersection(*(set(shard.fields) for shard in self.shards if shard.count))


def _read_json(file: epath.Path, make: Callable[[Any], Any]) -> Any:
    """What `make` makes of the values in a file."""
    try:
        return make(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    except (TypeError, KeyError) as error:
        raise UsageError(f"{file} does not describe latents of format {FORMAT!r}") from error


def _from_json(kind: type, values: Any) -> Any:
    names = [field.name for field in dataclasses.fields(kind) if field.name in values]
    lists = {name: tuple(values[name]) for name in names if isinstance(values[name], list)}
    return kind(**{name: values[name] for name in names} | lists)


_plan, _shard = (functools.partial(_from_json, kind) for kind in (Plan, Shard))


def _manifest(values: Any) -> Manifest:
    return Manifest(_plan(values["plan"]), list(map(_shard, values["shards"])))


def _write_json(file: epath.Path, values: dict[str, Any]) -> None:
    # Not `files.write_json`: processes on several machines may write the same file at once.
    temporary = file.parent / f".{file.name}.{os.getpid()}"
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(file)


def file_sha256(file: epath.Path) -> str:
    """The checksum of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def finished_shards(folder: epath.Path, plan: Plan, which: Iterable[int]) -> dict[int, Shard]:
    """Those of some shards that are complete: a shard's JSON file appears when it is."""
    found = {}
    for shard in which:
        file = folder / plan.shard_file(shard)
        told = file.with_suffix(".json")
        if file.exists() and told.exists():
            found[shard] = _read_json(told, _shard)
    return found


def read_manifest(folder: epath.Path) -> Manifest:
    """The manifest of a folder.

    Raises:
      UsageError: there is none, which may mean that preparation is not finished, or it is damaged.
    """
    file, plan_file = folder / "manifest.json", folder / "plan.json"
    if not folder.exists():
        raise UsageError(f"{folder} does not exist")
    if file.exists():
        return _read_json(file, _manifest)
    if not plan_file.exists():
        raise UsageError(f"{folder} has no manifest.json: give a folder made by dico_jax.prepare")
    plan = _read_json(plan_file, _plan)
    done = len(finished_shards(folder, plan, range(plan.num_shards)))
    raise UsageError(
        f"{folder} is not finished ({done} of {plan.num_shards} shards): run the same "
        "dico_jax.prepare again"
    )


def write_manifest(folder: epath.Path, plan: Plan, versions: dict[str, str]) -> Manifest | None:
    """Writes manifest.json, with the libraries' versions, if all shards are complete."""
    shards = list(finished_shards(folder, plan, range(plan.num_shards)).values())
    if len(shards) < plan.num_shards:
        return None
    values = {"plan": dataclasses.asdict(plan), "shards": list(map(dataclasses.asdict, shards))}
    _write_json(folder / "manifest.json", values | {"versions": versions})
    return Manifest(plan, shards)


def claim_folder(folder: epath.Path, plan: Plan) -> None:
    """Makes the folder of a plan, or checks that it is the folder of just this plan.

    Raises:
      UsageError: it cannot be made, holds latents of another plan, or something else.
    """
    file, new = folder / "plan.json", dataclasses.asdict(plan)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            old = dataclasses.asdict(_read_json(file, _plan))
            differing = [key for key in new if old[key] != new[key]]
            if differing:
                said = (f"{k} was {_short(old[k])}, is {_short(new[k])}" for k in differing)
                raise UsageError(
                    f"--out={folder} holds latents that were made in another way "
                    f"({'; '.join(said)}): give another folder"
                )
        elif any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UsageError(f"--out={folder} is not empty and has no plan.json: give a new folder")
        else:
            _write_json(file, new)
    except OSError as error:
        raise UsageError(f"--out={folder} cannot be written: {error}") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def remove_leftovers(folder: epath.Path, process_index: int) -> None:
    """Removes what a killed process of this index has left half written."""
    for path in folder.glob(f".writing-{process_index}-*"):
        path.rmtree()


@contextlib.contextmanager
def shard_writer(
    folder: epath.Path, plan: Plan, shard: int, process_index: int = 0
) -> Iterator["ShardWriter"]:
    """A writer whose shard appears in the folder, with its JSON file, when the block ends well.

    Nothing is left of a block that fails; of one that is killed, what `remove_leftovers` removes.
    """
    remote, target = is_remote(str(folder)), folder / plan.shard_file(shard)
    with tempfile.TemporaryDirectory(
        prefix=f".writing-{process_index}-", dir=None if remote else os.fspath(folder)
    ) as scratch:
        file = epath.Path(scratch) / target.name
        writer = ShardWriter(file, plan)
        yield writer
        done = writer.close()
        if remote:
            file.copy(target, overwrite=True)
        else:
            file.replace(target)
        _write_json(target.with_suffix(".json"), dataclasses.asdict(done))


class ShardWriter:
    """Writes the records of one shard. Made by `shard_writer`."""

    def __init__(self, file: epath.Path, plan: Plan):
        self._file, self._plan = file, plan
        # One record a group: a record is read without the ones around it. Noise does not compress.
        options = "group_size:1,uncompressed"
        self._writer = array_record_module.ArrayRecordWriter(os.fspath(file), options)
        self._bad = dict[str, str]()
        self._fields: list[set[str]] = []  # of every example

    def add(self, moments: np.ndarray, fields: Mapping[str, Any], example_id: str) -> None:
        """Adds an example: moments of the plan's shape, and its other fields.

        These are text, numbers, bytes, None, arrays, or lists and dicts of these.

        Raises:
          UsageError: a field is something else.
        """
        assert moments.shape == self._plan.shape
        stored, others = moments.astype(DTYPES[self._plan.dtype]), dict(fields)
        label = {"label": others.pop("label")} if "label" in others else {}
        record = {"moments": stored.tobytes(), **label, "id": example_id}
        record |= {"fields": others} if others else {}
        try:
            self._writer.write(msgpack.packb(record, default=_pack_array))
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{example_id} has a field that cannot be kept: {error}") from error
        self._fields.append(set(fields))

    def add_bad(self, bad: Mapping[str, str]) -> None:
        """Notes examples that could not be read, id to reason."""
        self._bad |= bad

    def close(self) -> Shard:
        """Ends the file and tells what is in it."""
        self._writer.close()
        fields = sorted(set.intersection(*self._fields)) if self._fields else ()
        size, digest = self._file.stat().length, file_sha256(self._file)
        return Shard(self._file.name, len(self._fields), size, digest, self._bad, tuple(fields))


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a {type(value).__name__}")
    if value.dtype.hasobject:
        return value.tolist()
    dtype = value.dtype.name if value.dtype.kind == "V" else value.dtype.str  # V: such as bfloat16
    return msgpack.ExtType(_ARRAY, msgpack.packb((dtype, value.shape, value.tobytes())))


def unpack_record(data: bytes) -> tuple[bytes, str, dict[str, Any]]:
    """The moments, id and fields of a record."""
    record = msgpack.unpackb(data, ext_hook=_unpack_array, strict_map_key=False)
    moments, example_id = record.pop("moments"), record.pop("id")
    return moments, example_id, record.pop("fields", {}) | record


def _unpack_array(code: int, data: bytes) -> Any:
    dtype, shape, content = msgpack.unpackb(data)
    return np.frombuffer(content, np.dtype(dtype)).reshape(shape)
