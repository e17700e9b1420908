"""Prepared latents as a source, and checks of their folders, which `latent_folder` describes."""

import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import msgpack
import numpy as np
import tqdm
from array_record.python import array_record_data_source
from etils import epath

from dico_jax.data.latent_folder import DTYPES, Manifest, Shard, file_sha256, read_manifest
from dico_jax.data.paths import is_remote
from dico_jax.errors import UsageError


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
        digests = pool.map(lambda shard: file_sha256(folder / shard.file), shards)
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
