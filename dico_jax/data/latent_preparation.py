"""Pictures to prepared latents: every example once, shard by shard, encoded on the devices."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Generator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from dico_jax.autoencoders.registry import Autoencoder, encode_in_parts, to_model_range
from dico_jax.data.bad_examples import too_many_bad
from dico_jax.data.latent_folder import (
    DTYPES,
    Manifest,
    Plan,
    claim_folder,
    finished_shards,
    remove_leftovers,
    shard_writer,
    write_manifest,
)
from dico_jax.data.pictures import BadExample, PictureReader
from dico_jax.data.pipeline import read_ahead
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.files import library_versions
from dico_jax.parallel.mesh import batch_sharding, create_mesh, replicated, to_global

_DIGEST_IDS = 1000


@dataclasses.dataclass(frozen=True)
class Options:
    """How latents are prepared.

    Attributes:
      image_size: side of the pictures in pixels, after the centre crop.
      exif_rotation: whether to turn pictures as their EXIF data say.
      mirrored: encode the mirrored picture too, which training with horizontal flips needs.
      dtype: of the moments, a name of `DTYPES`.
      shard_size: examples per shard. A shard that is not finished is made anew after a kill.
      batch_size: pictures at a time over all devices; rounded up to a multiple of them.
      max_bad_fraction: of all examples; more bad ones are an error.
      num_workers: processes that read and decode; 0 for threads.
      process_index, process_count: which shards are this process's.
    """

    image_size: int = 256
    exif_rotation: bool = False
    mirrored: bool = True
    dtype: str = "float16"
    shard_size: int = 4096
    batch_size: int = 32
    max_bad_fraction: float = 0.001
    num_workers: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        for field in ("image_size", "shard_size", "batch_size", "process_count"):
            self._require(field, getattr(self, field) >= 1, "at least 1")
        self._require("num_workers", self.num_workers >= 0, "at least 0")
        self._require("max_bad_fraction", 0 <= self.max_bad_fraction <= 1, "in [0, 1]")
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        last = self.process_count - 1
        wanted = f"in 0 to {last}, as --process_count={self.process_count}"
        self._require("process_index", 0 <= self.process_index <= last, wanted)

    def _require(self, field: str, right: bool, wanted: str) -> None:
        if not right:
            raise UsageError(f"--{field}", getattr(self, field), f"must be {wanted}")


def source_digest(source: Source) -> str:
    """The sha256 of a source's class names, its size and the ids of examples spread over it.

    Not of all ids, because some sources have them in their records.
    """
    count = len(source)
    digest = hashlib.sha256(json.dumps([list(source.class_names), count]).encode())
    for index in np.unique(np.linspace(0, count - 1, _DIGEST_IDS).round().astype(int)):
        digest.update(source.example_id(int(index)).encode() + b"\n")
    return digest.hexdigest()


def _field_names(source: Source) -> tuple[str, ...]:
    """What the first good example has besides its image."""
    for index in range(len(source)):
        with contextlib.suppress(BadExample):
            return tuple(sorted(source[index].keys() - {"image"}))
    return ()


def make_plan(source: Source, autoencoder: Autoencoder, options: Options) -> Plan:
    """What is going to be made.

    Raises:
      UsageError: the source has no pictures, or their size does not fit the autoencoder.
    """
    size, step = options.image_size, autoencoder.downsampling
    if source.kind != "pictures":
        raise UsageError(f"--source: {source!r} has {source.kind}, not pictures to encode")
    if autoencoder.encoder_digest is None or autoencoder.channels is None:
        raise UsageError(f"--vae: {autoencoder.name!r} has no encoder")
    if size % step:
        raise UsageError("--image_size", size, f"must be a multiple of {step}")
    return Plan(
        source=repr(source),
        source_digest=source_digest(source),
        num_examples=len(source),
        image_size=size,
        exif_rotation=options.exif_rotation,
        autoencoder=autoencoder.name,
        encoder_digest=autoencoder.encoder_digest,
        shape=(1 + options.mirrored, size // step, size // step, 2 * autoencoder.channels),
        dtype=options.dtype,
        shard_size=options.shard_size,
        class_names=tuple(source.class_names),
        fields=_field_names(source),
    )


def prepare_latents(
    source: Source, autoencoder: Autoencoder, out: str, options: Options
) -> Manifest | None:
    """Encodes this process's shards that are not there yet; the last process writes the manifest.

    Args:
      source: pictures.
      autoencoder: with an encoder.
      out: the folder, local or gs://; see `dico_jax.data.latent_folder`.
      options: how.

    Returns:
      The manifest, or None while other processes are still at work.

    Raises:
      UsageError: something does not fit, the folder belongs to another plan, or too many bad
        examples. Finished shards stay.
    """
    plan, folder = make_plan(source, autoencoder, options), epath.Path(out)
    claim_folder(folder, plan)
    remove_leftovers(folder, options.process_index)
    mine = range(plan.num_shards)[options.process_index :: options.process_count]
    finished = finished_shards(folder, plan, mine)
    todo = [plan.shard_range(shard) for shard in mine if shard not in finished]
    bad = dict(source.skipped)
    for done in finished.values():
        bad |= done.bad
    _check_bad(bad, source, options)
    total, left = sum(len(plan.shard_range(shard)) for shard in mine), sum(map(len, todo))
    with (
        contextlib.closing(_encoded(source, autoencoder, plan, todo, options)) as examples,
        tqdm.tqdm(total=total, initial=total - left, unit="image", dynamic_ncols=True) as bar,
    ):
        for indices in todo:
            shard = indices.start // plan.shard_size
            with shard_writer(folder, plan, shard, options.process_index) as writer:
                if shard == 0:
                    writer.add_bad(source.skipped)
                for (index, fields, reason), moments in itertools.islice(examples, len(indices)):
                    name = source.example_id(index)
                    if reason is None:
                        writer.add(moments, fields, name)
                    else:
                        writer.add_bad({name: reason})
                        bad[name] = reason
                        _check_bad(bad, source, options)
                    bar.update()
    return write_manifest(folder, plan, library_versions())


def _check_bad(bad: dict[str, str], source: Source, options: Options) -> None:
    total = len(source) + len(source.skipped)
    if len(bad) > options.max_bad_fraction * total:
        raise too_many_bad(bad, total, options.max_bad_fraction, "--max_bad_fraction")


# Of an example: its index, its fields but the image, why it is bad or None.
_Example = tuple[int, dict[str, Any], str | None]


def _load(source: Source, read: PictureReader, index: int) -> tuple[np.ndarray, _Example]:
    """An example's picture, uint8 (H, W, 3), and the rest of it."""
    try:
        fields = dict(source[int(index)])
        return read(fields.pop("image"), False), (int(index), fields, None)
    except BadExample as error:
        black = np.zeros((read.size, read.size, read.channels), np.uint8)
        return black, (int(index), {}, str(error))


def _together(examples: Sequence[tuple[np.ndarray, _Example]]) -> tuple[np.ndarray, list[_Example]]:
    pictures, rest = zip(*examples, strict=True)
    return np.stack(pictures), list(rest)


def _encoded(
    source: Source, autoencoder: Autoencoder, plan: Plan, shards: list[range], options: Options
) -> Generator[tuple[_Example, np.ndarray]]:
    """The examples of some shards in order, and their moments."""
    if not shards:
        return
    mesh = create_mesh(jax.local_devices())
    batch_size = -(-options.batch_size // mesh.size) * mesh.size
    encode = _make_encode_fn(autoencoder, plan, batch_size, mesh)
    load = functools.partial(_load, source, PictureReader(plan.image_size, 3, plan.exif_rotation))
    dataset = grain.MapDataset.source(np.concatenate(shards)).map(load)
    dataset = dataset.batch(batch_size, batch_fn=_together)
    with contextlib.closing(iter(read_ahead(dataset, options.num_workers))) as batches:
        # The next batch is on its way to the devices while the last one is taken apart.
        ahead = None
        for batch in itertools.chain(batches, [None]):
            behind, ahead = ahead, batch and (batch[1], encode(batch[0]))
            if behind is not None:
                yield from zip(behind[0], np.asarray(behind[1]), strict=False)  # padded


def _make_encode_fn(autoencoder: Autoencoder, plan: Plan, batch_size: int, mesh: jax.sharding.Mesh):
    """The function uint8 (n, H, W, 3) -> moments (batch_size, orientations, h, w, 2C).

    n may be smaller than batch_size: every call has one size on the devices and compiles once.
    """
    encode = encode_in_parts(autoencoder.encode_moments, mesh)
    dtype, split, whole = DTYPES[plan.dtype], batch_sharding(mesh), replicated(mesh)

    def moments(params, pictures):
        x = to_model_range(pictures)
        orientations = [x, x[:, :, ::-1]][: plan.shape[0]]
        return jnp.stack([encode(params, x) for x in orientations], axis=1).astype(dtype)

    compiled = jax.jit(moments, in_shardings=(whole, split), out_shardings=split)
    params = jax.device_put(autoencoder.params, whole)

    def padded(pictures):
        missing = batch_size - len(pictures)
        full = np.pad(pictures, ((0, missing), (0, 0), (0, 0), (0, 0)))
        return compiled(params, to_global(full, split))

    return padded
