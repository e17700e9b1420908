"""Latents prepared ahead of training: ArrayRecord shards of posterior moments and a manifest.

A folder holds

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

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
import tqdm
from array_record.python import array_record_data_source, array_record_module
from etils import epath

from dico_jax.data.paths import is_remote
from dico_jax.errors import UsageError

FORMAT = "dico_jax latents 1"
_DIGEST_IDS = 1000
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a folder of latents is made; two calls that differ in it cannot share a folder.

    Attributes:
      source: what the examples came from, in words.
      source_digest: see `source_digest`; tells another list of examples.
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


def write_json(file: epath.Path, values: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    temporary = file.parent / f".{file.name}.{os.getpid()}"
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(file)


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
        write_json(_shard_json(target), dataclasses.asdict(done))


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
        return Shard(name, self._count, size, _sha256(epath.Path(self._path)), self._bad)


def _shard_json(file: epath.Path) -> epath.Path:
    return file.parent / f"{file.name.removesuffix('.array_record')}.json"


def _sha256(file: epath.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def finished_shard(folder: epath.Path, plan: Plan, shard: int) -> Shard | None:
    """What a shard's JSON file says, or None if the shard is not complete yet."""
    file = folder / plan.shard_file(shard)
    if not _shard_json(file).exists() or not file.exists():
        return None
    return _parsed_shard(read_json(_shard_json(file)), _shard_json(file))


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


def check_files(folder: epath.Path, shards: Iterable[Shard]) -> None:
    """Raises UsageError unless every shard is there in its size."""
    for shard in shards:
        file = folder / shard.file
        try:
            size = file.stat().length
        except OSError as error:
            raise UsageError(f"{file} of the manifest cannot be read: {error}") from error
        if size != shard.bytes:
            raise UsageError(
                f"{file} has {size} bytes, its manifest says {shard.bytes}: copy it again, or "
                "delete it and run the same dico_jax.prepare again"
            )


def check_checksums(folder: epath.Path, shards: list[Shard]) -> None:
    """Reads the shards and compares them with their checksums, with a progress bar.

    Raises:
      UsageError: naming the first shard that differs.
    """
    check_files(folder, shards)
    total = sum(shard.bytes for shard in shards)
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm.tqdm(
            total=total, unit="B", unit_scale=True, desc="checksums", dynamic_ncols=True, delay=2
        ) as bar,
    ):
        digests = pool.map(lambda shard: _sha256(folder / shard.file), shards)
        for shard, digest in zip(shards, digests, strict=True):
            if digest != shard.sha256:
                pool.shutdown(cancel_futures=True)
                raise UsageError(
                    f"{folder / shard.file} has a wrong checksum ({digest[:12]} instead of "
                    f"{shard.sha256[:12]}): copy it again, or delete it and run the same "
                    "dico_jax.prepare again"
                )
            bar.update(shard.bytes)


@dataclasses.dataclass
class _WholeFile:
    """How ArrayRecordDataSource is told the number of records without opening the file."""

    filename: str
    examples_in_shard: int
    skip: int = 0

    @property
    def take(self) -> int:
        return self.examples_in_shard


class PreparedLatents:
    """The examples of a folder of prepared latents, a `Source`.

    source[i] is {"image": moments (orientations, h, w, 2 * channels) in the stored dtype, "label"}.

    Attributes:
      manifest: what the folder says of itself.
      image_shape: (h, w, 2 * channels) of one orientation's moments.
    """

    kind = "moments"

    def __init__(self, path: str, *, cache_dir: str | None = None):
        """Opens a folder.

        Args:
          path: the folder, local or gs://.
          cache_dir: where the shards of a gs:// folder are copied to, if they are not there yet.

        Raises:
          UsageError: unfinished, damaged, missing, or gs:// without cache_dir.
        """
        self.path = path
        self._folder = epath.Path(path)
        self.manifest = read_manifest(self._folder)
        if is_remote(path):
            self._folder = _cached(self._folder, self.manifest, cache_dir)
        check_files(self._folder, self.manifest.shards)
        plan = self.manifest.plan
        self.class_names = list(plan.class_names)
        self.skipped: dict[str, str] = {}  # those of the manifest are no examples any more
        self.image_shape = plan.shape[1:]
        self._dtype = DTYPES[plan.dtype]
        files = [
            _WholeFile(os.fspath(self._folder / shard.file), shard.count)
            for shard in self.manifest.shards
            if shard.count
        ]
        if not files:
            raise UsageError(f"{path} has no examples")
        self._records = array_record_data_source.ArrayRecordDataSource(files)

    @classmethod
    def from_config(cls, config) -> "PreparedLatents":
        """The source of `config.data`.

        Raises:
          UsageError: see above.
        """
        if config.path is None:
            raise UsageError("data.path is not set: give a folder made by dico_jax.prepare latents")
        with _named(f"data.path={config.path}"):
            source = cls(config.path, cache_dir=config.cache_dir)
            if source.manifest.plan.image_size != config.image_size:
                raise UsageError(
                    f"prepared for config.data.image_size={source.manifest.plan.image_size}, "
                    f"not {config.image_size}"
                )
            if config.horizontal_flip and source.manifest.plan.shape[0] == 1:
                raise UsageError(
                    "prepared without mirrored pictures: use config.data.horizontal_flip=False, "
                    "or prepare them"
                )
        return source

    def check_checksums(self, process_index: int = 0, process_count: int = 1) -> None:
        """Compares this process's part of the shards with their checksums.

        Raises:
          UsageError: naming the shard that differs.
        """
        with _named(f"data.path={self.path}"):
            check_checksums(self._folder, self.manifest.shards[process_index::process_count])

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        record = self._record(index)
        moments = np.frombuffer(record["moments"], self._dtype)
        return {
            "image": moments.reshape(self.manifest.plan.shape),
            "label": record["label"],
        }

    def example_id(self, index) -> str:
        """The id that the example had in the source."""
        return self._record(index)["id"]

    def _record(self, index) -> dict[str, Any]:
        return msgpack.unpackb(self._records[index])

    def __repr__(self):
        return f"PreparedLatents({self.path!r})"


@contextlib.contextmanager
def _named(field: str) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{field}: {error}") from error


def _cached(folder: epath.Path, manifest: Manifest, cache_dir: str | None) -> epath.Path:
    """The local copy of a remote folder's shards; copies what is missing."""
    if cache_dir is None:
        raise UsageError(
            "ArrayRecord files cannot be read in a bucket: set config.data.cache_dir to a local "
            "folder to copy them into, or mount the bucket"
        )
    local = epath.Path(cache_dir)
    local.mkdir(parents=True, exist_ok=True)
    for shard in tqdm.tqdm(manifest.shards, desc=f"copying to {local}", dynamic_ncols=True):
        target = local / shard.file
        if not target.exists() or target.stat().length != shard.bytes:
            temporary = local / f".{shard.file}.{os.getpid()}"
            (folder / shard.file).copy(temporary, overwrite=True)
            temporary.replace(target)
    return local


def verify(folder: epath.Path) -> Manifest:
    """Checks everything in a folder: files, checksums, and every record.

    Raises:
      UsageError: naming the first thing that is wrong.
    """
    manifest = read_manifest(folder)
    check_checksums(folder, manifest.shards)
    source = PreparedLatents(os.fspath(folder))
    plan = manifest.plan
    for index in tqdm.tqdm(range(len(source)), unit="image", desc="records", dynamic_ncols=True):
        try:
            example = source[index]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder}: record {index} cannot be read: {error}") from error
        if not 0 <= example["label"] < len(plan.class_names):
            raise UsageError(
                f"{folder}: record {index} has label {example['label']}, but there are "
                f"{len(plan.class_names)} classes"
            )
        if not np.isfinite(example["image"].astype(np.float32)).all():
            raise UsageError(f"{folder}: record {index} holds values that are not finite")
    return manifest
