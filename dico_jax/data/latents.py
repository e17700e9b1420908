"""Folders of latents prepared ahead of training, as a source; docs/data.md lists their files.

A record is msgpack: {"moments": bytes, "label": int, "id": str, "fields": {...}}, the last with
what else the example had, and float16 "tokens" (K, L, E) and "pooled" (K, P), the features of its K
captions, where a text encoder was given. The bytes are float16 or bfloat16 of shape (orientations,
h, w, 2 * channels): mean, then log variance of the autoencoder's posterior, not scaled, of the
picture and (with two orientations) of the mirrored picture.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
from array_record.python import array_record_data_source

from dico_jax.data.paths import required_path
from dico_jax.data.ranges import RangedRecords
from dico_jax.errors import UsageError, one_line, within
from dico_jax.files import (
    as_path,
    download,
    file_digest,
    files_below,
    is_remote,
    names_in,
    size_of,
)
from dico_jax.terminal import Bar

if TYPE_CHECKING:
    from dico_jax.text.encoders import Constants

FORMAT = "dico_jax latents 1"
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_THREADS = 8  # that ask a bucket
ARRAY = 1  # msgpack's code for an array: msgpack of its dtype, shape and bytes
NULL_TEXT = "null_text.npz"  # the features of "", and of which encoder
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
    text_digest: str = ""  # of the encoder whose features of captions there are
    text_length: int = 0  # tokens of each caption
    crop: str = "adm"  # a key of `pictures.CROPS`

    def __post_init__(self):
        if self.format != FORMAT:
            raise ValueError(f"its format is {self.format!r}, not {FORMAT!r}")

    @functools.cached_property
    def shards(self) -> list[range]:
        """The source's examples in every shard."""
        examples, size = range(self.num_examples), self.shard_size
        return [examples[start : start + size] for start in examples[::size]]

    def shard_file(self, shard: int) -> str:
        return f"latents-{shard:05d}-of-{len(self.shards):05d}.array_record"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A complete shard."""

    file: str
    count: int
    bytes: int
    sha256: str
    bad: dict[str, str]  # id to reason, of the examples that are missing in it
    fields: tuple[str, ...] = _FIRST_FIELDS  # what all of its examples have besides their images
    captions: int = 0  # whose features there are
    cut: int = 0  # of these, longer than the text encoder reads
    crc32c: str = ""  # as the bucket keeps it that it was written to


class Manifest(NamedTuple):
    """What manifest.json says: the plan and its shards in order."""

    plan: Plan
    shards: list[Shard]

    @property
    def bad(self) -> dict[str, str]:  # as in a `Shard`
        return {key: reason for shard in self.shards for key, reason in shard.bad.items()}

    @property
    def fields(self) -> set[str]:  # as in a `Shard`
        return set.intersection(*(set(shard.fields) for shard in self.shards if shard.count))


def _from_json(kind: type, values: Any) -> Any:
    known = {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


def read_json(file: Any, kind: type) -> Any:
    """The `Plan`, `Shard` or `Manifest` in a file, or None where there is no file."""
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text())
        if kind is not Manifest:
            return _from_json(kind, values)
        shards = [_from_json(Shard, shard) for shard in values["shards"]]
        return Manifest(_from_json(Plan, values["plan"]), shards)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} does not describe latents of {FORMAT!r}: {error}") from error


def finished_shards(folder: Any, plan: Plan, which: Iterable[int]) -> dict[int, Shard]:
    """Those of some shards that are complete: a shard's JSON file appears when it is."""
    there, files = set(names_in(folder)), {s: folder / plan.shard_file(s) for s in which}
    wholes = {s: f.with_suffix(".json") for s, f in files.items() if f.name in there}
    wholes = {s: f for s, f in wholes.items() if f.name in there}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda file: read_json(file, Shard), wholes.values())
        return dict(zip(wholes, found, strict=True))


def read_manifest(folder: Any) -> Manifest:
    """The manifest of a folder; a UsageError if it is not there, not finished, or damaged."""
    if not folder.exists():
        raise UsageError(f"{folder} does not exist")
    if (manifest := read_json(folder / "manifest.json", Manifest)) is not None:
        return manifest
    if (plan := read_json(folder / "plan.json", Plan)) is None:
        raise UsageError(f"{folder} has no manifest.json: give a folder made by dico_jax.prepare")
    count = len(plan.shards)
    done = f"{len(finished_shards(folder, plan, range(count)))} of {count} shards"
    raise UsageError(f"{folder} is not finished ({done}): run the same dico_jax.prepare again")


class PreparedLatents:
    """The examples of a folder of prepared latents, a `Source`, or a UsageError.

    source[i] is {"image": moments (orientations, h, w, 2 * channels) in the stored dtype, "label"}
    and what else its record has; `manifest.fields` tells what all have. In a bucket each record is
    read by itself where it is; of its shards as many as fit in `cache_gb`, or all, are copied to
    a folder of their own in `cache_dir` before, if one is given.
    """

    kind = "moments"

    def __init__(self, path: str, *, cache_dir: str | None = None, cache_gb: float | None = None):
        self.path, self._folder = path, as_path(path)
        self.manifest = read_manifest(self._folder)
        plan, shards = self.manifest.plan, self.manifest.shards
        self._there = _there(self._folder, shards)
        for shard in shards:
            if self._there.get(shard.file, {}).get("size") != shard.bytes:
                said = f"has not the {shard.bytes} bytes that its manifest says"
                raise _damaged(self._folder, shard, said)
        self.class_names = list(plan.class_names)
        self.skipped: dict[str, str] = {}  # those of the manifest are no examples any more
        self.image_shape = plan.shape[1:]  # of one orientation's moments
        shards = [shard for shard in shards if shard.count]
        if not shards:
            raise UsageError(f"{path} has no examples")
        if is_remote(path):
            files = [(shard.file, shard.bytes) for shard in shards]
            if cache_dir is not None:  # others may lie there, of the same names and sizes
                which = "".join(shard.sha256 for shard in shards).encode()
                cache_dir = os.path.join(cache_dir, hashlib.sha256(which).hexdigest()[:16])
            cached = _cached(self._folder, shards, cache_dir, cache_gb)
            self._records: Any = RangedRecords(path, files, cache_dir or "", cached)
            if len(self._records) != sum(shard.count for shard in shards):
                raise UsageError(f"{path} has not the examples that its manifest says")
            return
        parts = [f"{self._folder / shard.file}[0:{shard.count}]" for shard in shards]
        self._records = array_record_data_source.ArrayRecordDataSource(parts)

    @classmethod
    def from_config(cls, config) -> "PreparedLatents":
        """The source of `config.data`; a UsageError if it does not fit the config."""
        path = required_path(config.path, "a folder made by dico_jax.prepare latents")
        with within(f"data.path={path}: "):
            source = cls(path, cache_dir=config.cache_dir, cache_gb=config.cache_gb)
            plan, size = source.manifest.plan, config.image_size
            if plan.image_size != size:
                said = f"prepared for config.data.image_size={plan.image_size}, not {size}"
                raise UsageError(said)
            if config.horizontal_flip and plan.shape[0] == 1:
                fix = "use config.data.horizontal_flip=False, or prepare them"
                raise UsageError(f"prepared without mirrored pictures: {fix}")
        return source

    def check_checksums(self, process_index: int = 0, process_count: int = 1) -> None:
        """Compares this process's part of the shards with their checksums, or raises UsageError.

        A bucket is asked for its own, where they are known; else all is read.
        """
        shards = self.manifest.shards[process_index::process_count]
        kept = {name: about.get("crc32c", "") for name, about in self._there.items()}
        if all(shard.crc32c and kept.get(shard.file) for shard in shards):
            for shard in shards:
                if shard.crc32c != kept[shard.file]:
                    raise _damaged(self._folder, shard, "is not what was written (its CRC-32C)")
            return
        total = sum(shard.bytes for shard in shards)
        bar = Bar(total=total, desc="checksums", unit="B", unit_scale=True, delay=2)
        with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(lambda shard: file_digest(self._folder / shard.file), shards)
            for shard, digest in zip(shards, digests, strict=True):
                if digest != shard.sha256:
                    pool.shutdown(cancel_futures=True)
                    said = f"has a wrong checksum ({digest[:12]} instead of {shard.sha256[:12]})"
                    raise _damaged(self._folder, shard, said)
                bar.update(shard.bytes)

    @property
    def text_digest(self) -> str | None:
        """The digest of the encoder of the captions; None for latents without features of them."""
        return self.manifest.plan.text_digest or None

    @property
    def text_length(self) -> int | None:
        """L of the features "tokens" (K, L, E); None for latents without."""
        return self.manifest.plan.text_length or None

    @property
    def null_text(self) -> "Constants | None":
        """The features of no text, float16 "tokens" (L, E) and "pooled" (P,); None without any.

        UsageError: its file is missing, damaged or of another encoder.
        """
        if self.text_digest is None:
            return None
        from dico_jax.text.encoders import Constants  # late: workers that read need no JAX

        file = as_path(self.path) / NULL_TEXT
        try:
            with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in ("tokens", "pooled")}
                digest = str(arrays["digest"])
        except Exception as error:  # of many classes, for damaged files
            fix = "delete it, if it is there, and run the same dico_jax.prepare again"
            raise UsageError(f"{file} cannot be read ({one_line(error)}): {fix}") from error
        if digest != self.text_digest:
            said = f"is of the text encoder {digest[:12]}, the captions of {self.text_digest[:12]}"
            raise UsageError(f"{file} {said}: copy the folder again")
        return Constants(**found)

    def __len__(self):
        return len(self._records)

    def _record(self, index) -> dict[str, Any]:
        return msgpack.unpackb(self._records[index], ext_hook=_unpack_array, strict_map_key=False)

    def __getitem__(self, index):
        record, plan = self._record(index), self.manifest.plan
        image = np.frombuffer(record.pop("moments"), DTYPES[plan.dtype]).reshape(plan.shape)
        del record["id"]
        return record.pop("fields", {}) | record | {"image": image}

    def example_id(self, index) -> str:
        """The id that the example had in the source."""
        return self._record(index)["id"]

    def __repr__(self):
        return f"PreparedLatents({self.path!r})"


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    dtype, shape, content = msgpack.unpackb(data)
    return np.frombuffer(content, np.dtype(dtype)).reshape(shape)


def _there(folder: Any, shards: list[Shard]) -> dict[str, dict[str, Any]]:
    """The "size" and more of those shards that are in a folder."""
    if is_remote(folder):  # which is asked once
        found = files_below(folder)
        return {shard.file: found[shard.file] for shard in shards if shard.file in found}
    files = [folder / shard.file for shard in shards]
    return {file.name: {"size": size_of(file)} for file in files if file.exists()}


def _damaged(folder: Any, shard: Shard, said: str) -> UsageError:
    fix = "copy it again, or delete it and run the same dico_jax.prepare again"
    return UsageError(f"{folder / shard.file} {said}: {fix}")


def _cached(
    folder: Any, shards: list[Shard], cache_dir: str | None, cache_gb: float | None = None
) -> set[str]:
    """Copies the first shards of a bucket that fit, where they are missing; the names of those."""
    if cache_dir is None:
        return set()
    most = math.inf if cache_gb is None else cache_gb * 1e9
    room = np.cumsum([shard.bytes for shard in shards]) <= most
    kept = [shard for shard, fits in zip(shards, room, strict=True) if fits]
    local = as_path(cache_dir)
    local.mkdir(parents=True, exist_ok=True)
    there = _there(local, kept)

    def copy(shard: Shard) -> None:
        temporary = local / f".{shard.file}.{os.getpid()}"
        download(folder / shard.file, temporary)
        temporary.replace(local / shard.file)

    todo = [s for s in kept if there.get(s.file, {}).get("size") != s.bytes]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        copied = pool.map(copy, todo)
        for _ in Bar(copied, f"copying to {local}", total=len(todo)):
            pass
    return {shard.file for shard in kept}


def verify(path: str) -> Manifest:
    """Checks everything in a folder: files, checksums, and every record, or raises UsageError."""
    source = PreparedLatents(path)
    source.check_checksums()
    fields, classes = source.manifest.fields, (-1, *range(len(source.class_names)))
    _ = source.null_text  # or an error
    for index in Bar(range(len(source)), "records", unit="image"):
        right = False
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            example = source[index]
            arrays, features = [example["image"]], list[np.ndarray]()
            if source.text_digest is not None:
                features = [example["tokens"], example["pooled"]]
            right = (
                fields <= example.keys()
                and example.get("label", -1) in classes
                and all(len(array) == len(example["captions"]) for array in features)
                and all(array.shape[1] == source.text_length for array in features[:1])
                and all(np.isfinite(a.astype(np.float32)).all() for a in arrays + features)
            )
        if not right:
            said = f"record {index} cannot be read, lacks a field, is of no class or not finite"
            raise UsageError(f"{path}: {said}")
    return source.manifest
