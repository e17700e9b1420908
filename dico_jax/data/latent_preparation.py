"""Pictures to prepared latents: every example once, shard by shard, encoded on the devices."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from array_record.python import array_record_module

from dico_jax.autoencoders import Autoencoder, encode_in_parts, to_model_range
from dico_jax.data.bad_examples import check_bad
from dico_jax.data.latents import (
    ARRAY,
    DTYPES,
    NULL_TEXT,
    Manifest,
    Plan,
    Shard,
    finished_shards,
    read_json,
)
from dico_jax.data.pictures import BadExample, PictureReader
from dico_jax.data.pipeline import read_ahead
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.files import (
    as_path,
    file_digest,
    files_below,
    is_remote,
    library_versions,
    names_in,
    new_file,
    size_of,
    upload,
)
from dico_jax.parallel.mesh import batch_sharding, create_mesh, replicated, to_global
from dico_jax.terminal import Bar
from dico_jax.text.encoders import ClipEncoder

_TOLD = 32  # examples whose captions are encoded at once


@dataclasses.dataclass(frozen=True)
class Options:
    """How latents are prepared."""

    image_size: int = 256  # side in pixels, after the centre crop
    exif_rotation: bool = False  # turn pictures as their EXIF data say
    crop: str = "adm"  # a key of `pictures.CROPS`
    mirrored: bool = True  # the mirrored picture too, which training with horizontal flips needs
    dtype: str = "float16"  # of the moments, a name of `DTYPES`
    shard_size: int = 4096  # examples; a shard that is not finished is made anew after a kill
    batch_size: int = 32  # pictures at a time, rounded up to a multiple of the devices
    max_bad_fraction: float = 0.001  # of all examples; more bad ones are an error
    num_workers: int = 0  # processes that read and decode; 0 for threads
    process_index: int = 0  # whose shards are to be made
    process_count: int = 1


def source_digest(source: Source) -> str:
    """The sha256 of a source's class names, its size and the ids of examples spread over it."""
    count = len(source)
    digest = hashlib.sha256(json.dumps([list(source.class_names), count]).encode())
    # Not of all ids, because some sources have them in their records.
    for index in np.unique(np.linspace(0, count - 1, 1000).round().astype(int)):
        digest.update(source.example_id(int(index)).encode() + b"\n")
    return digest.hexdigest()


def _field_names(source: Source) -> tuple[str, ...]:
    for index in range(len(source)):
        with contextlib.suppress(BadExample):
            return tuple(sorted(source[index].keys() - {"image"}))
    return ()


def make_plan(
    source: Source, autoencoder: Autoencoder, options: Options, text: ClipEncoder | None = None
) -> Plan:
    """What is going to be made; a UsageError where source, autoencoder and text do not fit."""
    size, step = options.image_size, autoencoder.downsampling
    if source.kind != "pictures":
        raise UsageError(f"--source: {source!r} has {source.kind}, not pictures to encode")
    if autoencoder.encoder_digest is None or autoencoder.channels is None:
        raise UsageError(f"--vae: {autoencoder.name!r} has no encoder")
    if size < 1 or size % step:
        raise UsageError("--image_size", size, f"must be a multiple of {step}")
    fields = _field_names(source)
    if text is not None:
        if "captions" not in fields:
            fix = "leave it out, or give --source=captions, tar or tfds"
            raise UsageError(f"--text: {source!r} has no captions to encode: {fix}")
        fields = tuple(sorted({*fields, "tokens", "pooled"}))
    same = ("image_size", "exif_rotation", "crop", "dtype", "shard_size")
    return Plan(
        **{name: getattr(options, name) for name in same},
        source=repr(source),
        source_digest=source_digest(source),
        num_examples=len(source),
        autoencoder=autoencoder.name,
        encoder_digest=autoencoder.encoder_digest,
        shape=(1 + options.mirrored, size // step, size // step, 2 * autoencoder.channels),
        class_names=tuple(source.class_names),
        fields=fields,
        text_digest=text.digest if text else "",
        text_length=text.length if text else 0,
    )


def _write_json(file: Any, values: dict[str, Any]) -> None:
    _write(file, (json.dumps(values, indent=1) + "\n").encode())


def _write(file: Any, data: bytes) -> None:
    if is_remote(file):
        with new_file(file) as stream:
            stream.write(data)
        return
    # Not `files.new_file`: processes on several machines may write the same file at once.
    temporary = file.parent / f".{file.name}.{os.getpid()}"
    temporary.write_bytes(data)
    temporary.replace(file)


def claim_folder(folder: Any, plan: Plan) -> None:
    """Makes the folder of a plan; a UsageError where there is something else than this plan."""
    file, new, fix = folder / "plan.json", dataclasses.asdict(plan), "give another folder"
    folder.mkdir(parents=True, exist_ok=True)
    if (found := read_json(file, Plan)) is not None:
        old = dataclasses.asdict(found)
        pairs = ((key, json.dumps(old[key]), json.dumps(new[key])) for key in new)
        said = "; ".join(f"{key} was {a:.60}, is {b:.60}" for key, a, b in pairs if a != b)
        if said:
            raise UsageError(f"--out={folder} has latents made otherwise ({said}): {fix}")
    elif any(not name.startswith(".") for name in names_in(folder)):
        raise UsageError(f"--out={folder} is not empty and has no plan.json: {fix}")
    else:
        _write_json(file, new)


def _write_null_text(file: Any, text: ClipEncoder) -> None:
    stream = io.BytesIO()
    null = text.null().arrays
    np.savez(stream, tokens=null["tokens"], pooled=null["pooled"], digest=np.array(text.digest))
    _write(file, stream.getvalue())


# Of an example: its id, its fields but the image, and why it is bad or None.
_Example = tuple[str, dict[str, Any], str | None]


def write_shard(
    folder: Any,
    plan: Plan,
    shard: int,
    examples: Iterable[tuple[_Example, np.ndarray]],
    bad: Mapping[str, str],
    process_index: int = 0,
    text: ClipEncoder | None = None,
) -> None:
    """Writes a shard that appears when it is complete; `bad` is what more could not be read."""
    cut_before, captions = text.tokenizer.cut if text else 0, 0
    examples = _with_features(iter(examples), text) if text else examples
    remote, target = is_remote(str(folder)), folder / plan.shard_file(shard)
    all_bad, fields = dict(bad), list[set[str]]()
    with tempfile.TemporaryDirectory(
        prefix=f".writing-{process_index}-", dir=None if remote else os.fspath(folder)
    ) as scratch:
        file = pathlib.Path(scratch, target.name)
        # One record a group: a record is read without the ones around it. Noise does not compress.
        writer = array_record_module.ArrayRecordWriter(os.fspath(file), "group_size:1,uncompressed")
        for (example_id, others, reason), moments in examples:
            if reason is not None:
                all_bad[example_id] = reason
                continue
            assert moments.shape == plan.shape
            fields.append(set(others))
            captions += len(others["captions"]) if text else 0
            writer.write(_record(example_id, moments.astype(DTYPES[plan.dtype]), dict(others)))
        writer.close()
        common = tuple(sorted(set.intersection(*fields))) if fields else ()
        size, digest = size_of(file), file_digest(file)
        cut = text.tokenizer.cut - cut_before if text else 0
        done = Shard(target.name, len(fields), size, digest, all_bad, common, captions, cut)
        if remote:
            upload(scratch, folder)
            kept = files_below(folder).get(target.name, {}).get("crc32c", "")
            done = dataclasses.replace(done, crc32c=kept)
        else:
            file.replace(target)
    _write_json(target.with_suffix(".json"), dataclasses.asdict(done))


def _with_features(
    examples: Iterator[tuple[_Example, np.ndarray]], text: ClipEncoder
) -> Iterator[tuple[_Example, np.ndarray]]:
    """The examples with "tokens" and "pooled" of their captions among their fields."""
    while group := list(itertools.islice(examples, _TOLD)):
        texts = [caption for (_, fields, _), _ in group for caption in fields.get("captions", ())]
        features, at = text(texts) if texts else {}, 0
        for (example_id, fields, reason), moments in group:
            end = at + len(fields.get("captions", ()))
            told = {name: array[at:end] for name, array in features.items()}
            yield (example_id, fields | told if end > at else fields, reason), moments
            at = end


def _record(example_id: str, moments: np.ndarray, fields: dict[str, Any]) -> bytes:
    label = {"label": fields.pop("label")} if "label" in fields else {}
    record = {"moments": moments.tobytes(), **label, "id": example_id}
    record |= {"fields": fields} if fields else {}
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
    return msgpack.ExtType(ARRAY, msgpack.packb((dtype, value.shape, value.tobytes())))


def write_manifest(folder: Any, plan: Plan, versions: dict[str, str]) -> Manifest | None:
    """Writes manifest.json, with the libraries' versions, if all shards are complete."""
    shards = list(finished_shards(folder, plan, range(len(plan.shards))).values())
    if len(shards) < len(plan.shards):
        return None
    values = {"plan": dataclasses.asdict(plan), "shards": list(map(dataclasses.asdict, shards))}
    _write_json(folder / "manifest.json", values | {"versions": versions})
    return Manifest(plan, shards)


def prepare_latents(
    source: Source,
    autoencoder: Autoencoder,
    out: str,
    options: Options,
    text: ClipEncoder | None = None,
) -> Manifest | None:
    """Encodes this process's shards of pictures that are not in the folder `out` yet.

    With `text` all captions of each as well, and "" once for all.

    Returns the manifest, which the last process writes, or None while others are still at work.
    A UsageError leaves the shards that are finished.
    """
    plan, folder = make_plan(source, autoencoder, options, text), as_path(out)
    claim_folder(folder, plan)
    if text is not None and not (folder / NULL_TEXT).exists():
        _write_null_text(folder / NULL_TEXT, text)
    unfinished = f".writing-{options.process_index}-*"
    for path in () if is_remote(folder) else folder.glob(unfinished):
        shutil.rmtree(path)  # what was left half written by a kill
    mine = range(len(plan.shards))[options.process_index :: options.process_count]
    finished = finished_shards(folder, plan, mine)
    todo = [shard for shard in mine if shard not in finished]
    bad = dict(source.skipped)
    for done in finished.values():
        bad |= done.bad
    indices = [index for shard in todo for index in plan.shards[shard]]
    total = sum(len(plan.shards[shard]) for shard in mine)

    def noted(item):
        example_id, _, reason = item[0]
        if reason is not None:
            bad[example_id] = reason
            check_bad(bad, *limit)
        return item

    limit = len(source) + len(source.skipped), options.max_bad_fraction, "--max_bad_fraction"
    check_bad(bad, *limit)
    with contextlib.closing(_encoded(source, autoencoder, plan, indices, options)) as encoded:
        progress: Any = {"total": total, "initial": total - len(indices), "unit": "image"}
        stream = map(noted, Bar(encoded, "encoding", compiles="compiling the encoder", **progress))
        for shard in todo:
            examples = itertools.islice(stream, len(plan.shards[shard]))
            skipped = source.skipped if shard == 0 else {}
            write_shard(folder, plan, shard, examples, skipped, options.process_index, text)
    return write_manifest(folder, plan, library_versions())


def _load(
    source: Source, read: PictureReader, captioned: bool, index: int
) -> tuple[np.ndarray, _Example]:
    example_id = source.example_id(int(index))
    try:
        fields = dict(source[int(index)])
        if captioned and not fields.get("captions"):
            raise BadExample("it has no caption")
        return read(fields.pop("image"), False), (example_id, fields, None)
    except BadExample as error:
        black = np.zeros((read.size, read.size, read.channels), np.uint8)
        return black, (example_id, {}, str(error))


def _encoded(
    source: Source, autoencoder: Autoencoder, plan: Plan, indices: list[int], options: Options
) -> Generator[tuple[_Example, np.ndarray]]:
    """Some examples in their order, and their moments (orientations, h, w, 2C)."""
    mesh = create_mesh(jax.local_devices())
    batch_size = -(-options.batch_size // mesh.size) * mesh.size
    encode, split = encode_in_parts(autoencoder.encode_moments, mesh), batch_sharding(mesh)

    def encode_both(params, pictures):
        x = to_model_range(pictures)
        both = [encode(params, way) for way in [x, x[:, :, ::-1]][: plan.shape[0]]]
        return jnp.stack(both, axis=1).astype(DTYPES[plan.dtype])

    jitted = jax.jit(encode_both, in_shardings=(replicated(mesh), split), out_shardings=split)
    params = jax.device_put(autoencoder.params, replicated(mesh))
    reader = PictureReader(plan.image_size, 3, plan.exif_rotation, plan.crop)
    load = functools.partial(_load, source, reader, bool(plan.text_digest))
    dataset = grain.MapDataset.source(np.asarray(indices)).map(load)
    dataset = dataset.batch(batch_size, batch_fn=lambda loaded: tuple(zip(*loaded, strict=True)))

    def launched():
        for pictures, examples in batches:
            full = np.zeros((batch_size, *pictures[0].shape), np.uint8)  # one size compiles once
            np.stack(pictures, out=full[: len(pictures)])
            yield examples, jitted(params, to_global(full, split))

    with contextlib.closing(iter(read_ahead(dataset, options.num_workers))) as batches:
        # The next batch is on its way to the devices while one is taken apart.
        for (examples, moments), _ in itertools.pairwise(itertools.chain(launched(), [None])):
            yield from zip(examples, np.asarray(moments), strict=False)
