"""Folders of latents prepared ahead of training: what is in them and how it is described.

A folder holds ArrayRecord shards of posterior moments and a manifest:

  plan.json                              how everything in it is made; written first
  latents-00000-of-00313.array_record    `shard_size` examples in the source's order
  latents-00000-of-00313.json            written when its shard is complete: count, sha256, bad ones
  manifest.json                          the plan and all shards; written last

A record is msgpack: {"moments": bytes, "label": int, "id": str}. The bytes are float16 or bfloat16
of shape (orientations, h, w, 2 * channels): mean, then log variance of the autoencoder's posterior,
not scaled, of the picture and (with two orientations) of the mirrored picture. An example takes
4 * orientations * h * w * channels bytes: 32 KiB for a 256x256 picture with both, 42 GB for
ImageNet; 128 KiB and 168 GB at 512x512.
"""

import dataclasses
import hashlib
import json
import os
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from dico_jax.errors import UsageError

FORMAT = "dico_jax latents 1"
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a folder of latents is made; two calls that differ in it cannot share a folder.

    Attributes:
      source: what the examples came from, in words.
      source_digest: see `latent_writer.source_digest`; tells another list of examples.
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
    def from_json(cls, values: dict[str, Any], file: os.PathLike | str) -> "Plan":
        """The plan of a file's content.

        Raises:
          UsageError: it is no plan of this format.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if values.get("format") != FORMAT or not fields <= values.keys():
            raise UsageError(f"{file} does not describe latents of format {FORMAT!r}")
        known = {key: values[key] for key in fields}
        return cls(**known | {k: tuple(known[k]) for k in ("shape", "class_names")})


@dataclasses.dataclass(frozen=True)
class Shard:
    """A complete shard.

    Attributes:
      file: its name.
      count: examples in it.
      bytes: its size.
      sha256: of its content.
      bad: id to reason, of the examples that are missing in it.
    """

    file: str
    count: int
    bytes: int
    sha256: str
    bad: dict[str, str]


def shard_json(file: epath.Path) -> epath.Path:
    """The JSON file that tells of a shard, which is there when the shard is complete."""
    return file.parent / f"{file.name.removesuffix('.array_record')}.json"


def finished_shard(folder: epath.Path, plan: Plan, shard: int) -> Shard | None:
    """What a shard's JSON file says, or None if the shard is not complete yet."""
    file = folder / plan.shard_file(shard)
    if not shard_json(file).exists() or not file.exists():
        return None
    return _parsed_shard(read_json(shard_json(file)), shard_json(file))


def _parsed_shard(values: Any, file: epath.Path) -> Shard:
    try:
        return Shard(**values)
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


def read_manifest(folder: epath.Path) -> Manifest:
    """The manifest of a folder.

    Raises:
      UsageError: there is none, which may mean that preparation is not finished, or it is damaged.
    """
    file = folder / "manifest.json"
    if not folder.exists():
        raise UsageError(f"{folder} does not exist")
    if not file.exists():
        if (folder / "plan.json").exists():
            plan = Plan.from_json(read_json(folder / "plan.json"), folder / "plan.json")
            done = sum(finished_shard(folder, plan, i) is not None for i in range(plan.num_shards))
            raise UsageError(
                f"{folder} is not finished ({done} of {plan.num_shards} shards): run the same "
                "dico_jax.prepare again"
            )
        raise UsageError(f"{folder} has no manifest.json: give a folder made by dico_jax.prepare")
    values = read_json(file)
    if not isinstance(values.get("plan"), dict) or not isinstance(values.get("shards"), list):
        raise UsageError(f"{file} does not describe latents")
    plan = Plan.from_json(values["plan"], file)
    return Manifest(plan, [_parsed_shard(shard, file) for shard in values["shards"]])


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


def file_sha256(file: epath.Path) -> str:
    """The checksum of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
