"""Prepared latents as a source, and checks of their folders, which `latent_folder` describes."""

import concurrent.futures
import os

import numpy as np
import tqdm
from array_record.python import array_record_data_source
from etils import epath

from dico_jax.data.latent_folder import (
    DTYPES,
    Manifest,
    Shard,
    file_sha256,
    read_manifest,
    unpack_record,
)
from dico_jax.data.paths import is_remote, wrong_path
from dico_jax.errors import UsageError, within


class PreparedLatents:
    """The examples of a folder of prepared latents, a `Source`.

    source[i] is {"image": moments (orientations, h, w, 2 * channels) in the stored dtype, "label"}
    and what else its record has; `manifest.fields` tells what all have.

    Args:
      path: the folder, local or gs://.
      cache_dir: where the shards of a gs:// folder are copied to, if they are not there yet.

    Attributes:
      manifest: what the folder says of itself.
      image_shape: (h, w, 2 * channels) of one orientation's moments.

    Raises:
      UsageError: unfinished, damaged, missing, or gs:// without cache_dir.
    """

    kind = "moments"

    def __init__(self, path: str, *, cache_dir: str | None = None):
        self.path, self._folder = path, epath.Path(path)
        self.manifest = read_manifest(self._folder)
        if is_remote(path):
            self._folder = _cached(self._folder, self.manifest, cache_dir)
        for shard in self.manifest.shards:
            if not _is_there(file := self._folder / shard.file, shard):
                raise _damaged(file, f"has not the {shard.bytes} bytes that its manifest says")
        plan = self.manifest.plan
        self.class_names = list(plan.class_names)
        self.skipped: dict[str, str] = {}  # those of the manifest are no examples any more
        self.image_shape = plan.shape[1:]
        files = [f"{self._folder / s.file}[0:{s.count}]" for s in self.manifest.shards if s.count]
        if not files:
            raise UsageError(f"{path} has no examples")
        self._records = array_record_data_source.ArrayRecordDataSource(files)

    @classmethod
    def from_config(cls, config) -> "PreparedLatents":
        """The source of `config.data`.

        Raises:
          UsageError: see above, or it does not fit the config.
        """
        path = config.path
        if path is None:
            raise UsageError("data.path is not set: give a folder made by dico_jax.prepare latents")
        with within(f"data.path={path}: "):
            source = cls(path, cache_dir=config.cache_dir)
        size, orientations = source.manifest.plan.image_size, source.manifest.plan.shape[0]
        if size != config.image_size:
            said = f"prepared for config.data.image_size={size}, not {config.image_size}"
            raise wrong_path(path, said)
        if config.horizontal_flip and orientations == 1:
            fix = "use config.data.horizontal_flip=False, or prepare them"
            raise wrong_path(path, f"prepared without mirrored pictures: {fix}")
        return source

    def check_checksums(self, process_index: int = 0, process_count: int = 1) -> None:
        """Compares this process's part of the shards with their checksums.

        Raises:
          UsageError: naming the first shard that differs.
        """
        shards = self.manifest.shards[process_index::process_count]
        bar = tqdm.tqdm(
            total=sum(shard.bytes for shard in shards), unit="B", unit_scale=True, delay=2,
            desc="checksums", dynamic_ncols=True,
        )  # fmt: skip
        with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = pool.map(lambda shard: file_sha256(self._folder / shard.file), shards)
            for shard, digest in zip(shards, digests, strict=True):
                if digest != shard.sha256:
                    pool.shutdown(cancel_futures=True)
                    said = f"has a wrong checksum ({digest[:12]} instead of {shard.sha256[:12]})"
                    raise _damaged(self._folder / shard.file, said)
                bar.update(shard.bytes)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        moments, _, fields = unpack_record(self._records[index])
        plan = self.manifest.plan
        return fields | {"image": np.frombuffer(moments, DTYPES[plan.dtype]).reshape(plan.shape)}

    def example_id(self, index) -> str:
        """The id that the example had in the source."""
        return unpack_record(self._records[index])[1]

    def __repr__(self):
        return f"PreparedLatents({self.path!r})"


def _is_there(file: epath.Path, shard: Shard) -> bool:
    return file.exists() and file.stat().length == shard.bytes


def _damaged(file: epath.Path, said: str) -> UsageError:
    fix = "copy it again, or delete it and run the same dico_jax.prepare again"
    return UsageError(f"{file} {said}: {fix}")


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
        if not _is_there(target, shard):
            temporary = local / f".{shard.file}.{os.getpid()}"
            (folder / shard.file).copy(temporary, overwrite=True)
            temporary.replace(target)
    return local


def verify(path: str) -> Manifest:
    """Checks everything in a folder: files, checksums, and every record.

    Raises:
      UsageError: naming the first thing that is wrong.
    """
    source = PreparedLatents(path)
    source.check_checksums()
    for index in tqdm.tqdm(range(len(source)), unit="image", desc="records", dynamic_ncols=True):
        if reason := _wrong_record(source, index):
            raise UsageError(f"{path}: record {index} {reason}")
    return source.manifest


def _wrong_record(source: PreparedLatents, index: int) -> str | None:
    try:
        example = source[index]
    except (ValueError, KeyError, TypeError) as error:
        return f"cannot be read: {error}"
    if missing := source.manifest.fields - example.keys():
        return f"has no {', '.join(sorted(missing))}"
    label, count = example.get("label", 0), len(source.class_names)
    if not 0 <= label < count:
        return f"has label {label}, but there are {count} classes"
    if not np.isfinite(example["image"].astype(np.float32)).all():
        return "holds values that are not finite"
    return None
