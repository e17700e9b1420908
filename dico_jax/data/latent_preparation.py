"""Pictures to prepared latents: every example once, shard by shard, encoded on the devices."""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jax.sharding import Mesh

from dico_jax.autoencoders import Autoencoder
from dico_jax.autoencoders.encoding import encode_in_parts, to_model_range
from dico_jax.data.bad_examples import too_many_bad
from dico_jax.data.latent_folder import DTYPES, Manifest, Plan, finished_shard
from dico_jax.data.latent_writer import (
    claim_folder,
    remove_leftovers,
    shard_writer,
    source_digest,
    write_manifest,
)
from dico_jax.data.pictures import BadExample
from dico_jax.data.pipeline import read_ahead
from dico_jax.data.readers import PictureReader
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.files import library_versions
from dico_jax.parallel.mesh import batch_sharding, create_mesh, replicated, to_global


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
            if getattr(self, field) < 1:
                raise UsageError(f"--{field}={getattr(self, field)} must be at least 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype={self.dtype} is unknown: use one of {', '.join(DTYPES)}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UsageError(f"--max_bad_fraction={self.max_bad_fraction} must be in [0, 1]")
        if not 0 <= self.process_index < self.process_count:
            raise UsageError(
                f"--process_index={self.process_index} must be in 0 to {self.process_count - 1}, "
                f"as --process_count={self.process_count}"
            )


def make_plan(source: Source, autoencoder: Autoencoder, options: Options) -> Plan:
    """What is going to be made.

    Raises:
      UsageError: the source has no pictures, or their size does not fit the autoencoder.
    """
    if source.kind != "pictures":
        raise UsageError(f"--source: {source!r} has {source.kind}, not pictures to encode")
    if autoencoder.encoder_digest is None or autoencoder.channels is None:
        raise UsageError(f"--vae: {autoencoder.name!r} has no encoder")
    if options.image_size % autoencoder.downsampling:
        raise UsageError(
            f"--image_size={options.image_size} must be a multiple of {autoencoder.downsampling}"
        )
    side = options.image_size // autoencoder.downsampling
    return Plan(
        source=repr(source),
        source_digest=source_digest(source),
        num_examples=len(source),
        image_size=options.image_size,
        exif_rotation=options.exif_rotation,
        autoencoder=autoencoder.name,
        encoder_digest=autoencoder.encoder_digest,
        shape=(2 if options.mirrored else 1, side, side, 2 * autoencoder.channels),
        dtype=options.dtype,
        shard_size=options.shard_size,
        class_names=tuple(source.class_names),
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
    finished = {shard: finished_shard(folder, plan, shard) for shard in mine}
    todo = [shard for shard in mine if finished[shard] is None]
    bad = dict(source.skipped)
    for done in finished.values():
        bad |= done.bad if done else {}
    _check_bad(bad, plan, source, options)
    sizes = {shard: len(plan.shard_range(shard)) for shard in mine}
    left = sum(sizes[shard] for shard in todo)
    with (
        contextlib.closing(_encoded(source, autoencoder, plan, todo, options)) as examples,
        tqdm.tqdm(
            total=sum(sizes.values()), initial=sum(sizes.values()) - left, unit="image",
            dynamic_ncols=True,
        ) as bar,
    ):  # fmt: skip
        for shard in todo:
            with shard_writer(folder, plan, shard, options.process_index) as writer:
                if shard == 0:
                    writer.add_bad(source.skipped)
                for example in itertools.islice(examples, sizes[shard]):
                    name = source.example_id(example.index)
                    if example.reason is None:
                        writer.add(example.moments, example.label, name)
                    else:
                        writer.add_bad({name: example.reason})
                        bad[name] = example.reason
                        _check_bad(bad, plan, source, options)
                    bar.update()
    return write_manifest(folder, plan, library_versions())


def _check_bad(bad: dict[str, str], plan: Plan, source: Source, options: Options) -> None:
    total = plan.num_examples + len(source.skipped)
    if len(bad) > options.max_bad_fraction * total:
        raise too_many_bad(bad, total, options.max_bad_fraction, "--max_bad_fraction")


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """An example on its way to a shard; the moments of one with a reason mean nothing."""

    index: int
    label: int
    moments: np.ndarray
    reason: str | None


class _Loader:
    """Loads examples by index, for Grain's workers."""

    def __init__(self, source: Source, read: PictureReader):
        self._source, self._read = source, read

    def reason(self, index: int) -> str:
        """Why an example is bad."""
        try:
            self._read(self._source[index]["image"], False)
        except BadExample as error:
            return str(error)
        return "could not be read at first, and then could"

    def __call__(self, index: int) -> dict[str, Any]:
        """{"index", "label", "picture": uint8 (H, W, 3), "bad": whether it could not be read}."""
        size = self._read.size
        try:
            example = self._source[int(index)]
            picture, label, bad = self._read(example["image"], False), example["label"], False
        except BadExample:
            picture, label, bad = np.zeros((size, size, self._read.channels), np.uint8), 0, True
        return {
            "index": np.int64(index),
            "label": np.int64(label),
            "picture": picture,
            "bad": np.bool_(bad),
        }


def _encoded(
    source: Source, autoencoder: Autoencoder, plan: Plan, shards: list[int], options: Options
) -> Generator[_Encoded]:
    """The examples of some shards, in order."""
    mesh = create_mesh(jax.local_devices())
    batch_size = -(-options.batch_size // mesh.size) * mesh.size
    encode = _make_encode_fn(autoencoder, plan, batch_size, mesh)
    loader = _Loader(source, PictureReader(plan.image_size, 3, plan.exif_rotation))
    indices = np.concatenate([np.asarray(plan.shard_range(s)) for s in shards] or [np.arange(0)])
    if not len(indices):
        return
    dataset = grain.MapDataset.source(indices).map(loader).batch(batch_size)
    batches = iter(read_ahead(dataset, options.num_workers))
    try:
        # The next batch is on its way to the devices while the last one is taken apart.
        ahead = None
        for batch in itertools.chain(batches, [None]):
            behind, ahead = ahead, batch and (batch, encode(batch["picture"]))
            if behind is not None:
                yield from _taken_apart(*behind, loader)
    finally:
        batches.close()


def _taken_apart(batch: dict, moments, loader: _Loader) -> Iterator[_Encoded]:
    moments = np.asarray(moments)
    for i, (index, label, bad) in enumerate(
        zip(batch["index"], batch["label"], batch["bad"], strict=True)
    ):
        reason = loader.reason(int(index)) if bad else None
        yield _Encoded(int(index), int(label), moments[i], reason)


def _make_encode_fn(autoencoder: Autoencoder, plan: Plan, batch_size: int, mesh: Mesh):
    """The function uint8 (n, H, W, 3) -> moments (batch_size, orientations, h, w, 2C).

    n may be smaller than batch_size: every call has one size on the devices and compiles once.
    """
    encode = encode_in_parts(autoencoder.encode, mesh)
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
