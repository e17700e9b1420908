"""Folders of latents prepared ahead of training: what is in them, read and written.

A folder holds ArrayRecord shards of posterior moments and a manifest:

  plan.json                              how everything in it is made; written first
  latents-00000-of-00313.array_record    `shard_size` examples in the source's order
  latents-00000-of-00313.json            written when its shard is complete: count, sha256, bad ones
  manifest.json                          the plan and all shards; written last

A record is msgpack: {"moments": bytes, "label": int, "id": str, "fields": {...}}, the last with
what else the example had. The bytes are float16 or bfloat16 of shape (orientations, h, w,
2 * channels): mean, then log variance of the autoencoder's posterior, not scaled, of the picture
and (with two orientations) of the mirrored picture. An example takes 4 * orientations * h * w *
channels bytes: 32 KiB for a 256x256 picture with both, 42 GB for ImageNet; 128 KiB and 168 GB at
512x512.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a folder of latents is made; two calls that differ in it cannot share a folder.

    Attributes:
      source: what the examples came from, in words.
      source_digest: see `latent_preparation.source_digest`; tells another list of examples.
      num_examples: examples of the source, bad ones included.
      image_size: side of the pictures in pixels.
      exif_rotation: whether pictures were turned as their EXIF data say.
      autoencoder: name of the autoencoder.
      encoder_digest: sha256 of its encoder's weights.
      shape: (orientations, h, w, 2 * channels) of an example.
      dtype: a name of `DTYPES`.
      shard_size: examples per shard.
      class_names: by label.
    """

    source: str
    source_digest: str
    num_examples: int
    image_size: int
    exif_rotation: bool
    autoencoder: str
    encoder_digest: str
    shape: tuple[int, int, int, int]
    dtype: str
    shard_size: int
    class_names: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        """How many shards the examples fill."""
        return -(-self.num_examples // self.shard_size)

    def shard_range(self, shard: int) -> range:
        """The source's examples in a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_examples))

    def shard_file(self, shard: int) -> str:
        """The name of a shard's file."""
        return f"latents-{shard:05d}-of-{self.num_shards:05d}.array_record"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, values: Any, file: epath.Path) -> "Plan":
        """The plan of a file's content.

        Raises:
          UsageError: it is no plan of this format.
        """
        try:
            if values["format"] != FORMAT:
                raise KeyError
            known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
            lists = {k: tuple(v) for k, v in known.items() if isinstance(v, list)}
            return cls(**known | lists)
        except (TypeError, KeyError) as error:
            raise UsageError(f"{file} does not describe latents of format {FORMAT!r}") from error


@dataclasses.dataclass(frozen=True)
class Shard:
    """A complete shard.

    Attributes:
      file: its name.
      count: examples in it.
      bytes: its size.
      sha256: of its content.
      bad: id to reason, of the examples that are missing in it.
      fields: what all of its examples have besides their images.
    """

    file: str
    count: int
    bytes: int
    sha256: str
    bad: dict[str, str]
    fields: tuple[str, ...] | list[str] = ("label",)  # all that the first folders could keep

    @classmethod
    def from_json(cls, values: Any, file: epath.Path) -> "Shard":
        """The shard of a file's content.

        Raises:
          UsageError: it is none.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(f"{file} does not describe a shard of latents") from error


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


def shard_json(file: epath.Path) -> epath.Path:
    """The JSON file that tells of a shard, which is there when the shard is complete."""
    return file.with_suffix(".json")


def finished_shard(folder: epath.Path, plan: Plan, shard: int) -> Shard | None:
    """What a shard's JSON file says, or None if the shard is not complete yet."""
    file = folder / plan.shard_file(shard)
    told = shard_json(file)
    return Shard.from_json(read_json(told), told) if told.exists() and file.exists() else None


def read_manifest(folder: epath.Path) -> Manifest:
    """The manifest of a folder.

    Raises:
      UsageError: there is none, which may mean that preparation is not finished, or it is damaged.
    """
    file, plan_file = folder / "manifest.json", folder / "plan.json"
    if not folder.exists():
        raise UsageError(f"{folder} does not exist")
    if not file.exists():
        if not plan_file.exists():
            raise UsageError(
                f"{folder} has no manifest.json: give a folder made by dico_jax.prepare"
            )
        plan = Plan.from_json(read_json(plan_file), plan_file)
        done = sum(finished_shard(folder, plan, i) is not None for i in range(plan.num_shards))
        raise UsageError(
            f"{folder} is not finished ({done} of {plan.num_shards} shards): run the same "
            "dico_jax.prepare again"
        )
    values = read_json(file)
    plan, shards = Plan.from_json(values.get("plan"), file), values.get("shards")
    if not isinstance(shards, list):
        raise UsageError(f"{file} does not describe latents")
    return Manifest(plan, [Shard.from_json(shard, file) for shard in shards])


def read_json(file: epath.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UsageError: it cannot be read or is not an object.
    """
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file} is not a JSON object")
    return values


def pack_record(moments: np.ndarray, example_id: str, fields: Mapping[str, Any]) -> bytes:
    """A record of the moments and the fields of an example.

    Fields are text, numbers, bytes, None, arrays, or lists and dicts of these.

    Raises:
      UsageError: a field is something else.
    """
    others = {name: value for name, value in fields.items() if name != "label"}
    record = {
        "moments": np.ascontiguousarray(moments).tobytes(),
        **({"label": fields["label"]} if "label" in fields else {}),
        "id": example_id,
        **({"fields": others} if others else {}),
    }
    try:
        return msgpack.packb(record, default=_pack_array)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{example_id} has a field that cannot be kept: {error}") from error


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


def file_sha256(file: epath.Path) -> str:
    """The checksum of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def claim_folder(folder: epath.Path, plan: Plan) -> None:
    """Makes the folder of a plan, or checks that it is the folder of just this plan.

    Raises:
      UsageError: it cannot be made, holds latents of another plan, or something else.
    """
    file, new = folder / "plan.json", plan.to_json()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            old = read_json(file)
            said = [
                f"{key} was {_short(old.get(key))}, is {_short(new[key])}"
                for key in new
                if old.get(key) != new[key]
            ]
            if said:
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
        done, target = writer.close(), folder / plan.shard_file(shard)
        if remote:
            epath.Path(path).copy(target, overwrite=True)
        else:
            os.replace(path, target)
        _write_json(shard_json(target), dataclasses.asdict(done))


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
        self._fields: set[str] | None = None  # of all examples

    def add(self, moments: np.ndarray, fields: Mapping[str, Any], example_id: str) -> None:
        """Adds an example: moments of the plan's shape, and its other fields."""
        assert moments.shape == self._plan.shape
        moments = moments.astype(DTYPES[self._plan.dtype])
        self._writer.write(pack_record(moments, example_id, fields))
        self._fields = set(fields) & (set(fields) if self._fields is None else self._fields)
        self._count += 1

    def add_bad(self, bad: Mapping[str, str]) -> None:
        """Notes examples that could not be read, id to reason."""
        self._bad |= bad

    def close(self) -> Shard:
        """Ends the file and tells what is in it."""
        self._writer.close()
        return Shard(
            file=os.path.basename(self._path),
            count=self._count,
            bytes=os.path.getsize(self._path),
            sha256=file_sha256(epath.Path(self._path)),
            bad=self._bad,
            fields=sorted(self._fields or ()),
        )


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
    values = {"plan": plan.to_json(), "shards": list(map(dataclasses.asdict, shards))}
    _write_json(folder / "manifest.json", values | {"versions": versions})
    return Manifest(plan, shards)


def _write_json(file: epath.Path, values: dict[str, Any]) -> None:
    # Not `files.write_json`: processes on several machines may write the same file at once.
    temporary = file.parent / f".{file.name}.{os.getpid()}"
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(file)
