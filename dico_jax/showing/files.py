"""Files that are no weights: arrays, pictures, JSON, and what runs write beside them."""

import functools
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from dico_jax.errors import UsageError, one_line
from dico_jax.files import Deferred
from dico_jax.planning.report import plan_text
from dico_jax.pytorch.tensors import AGAIN, refusing, shown
from dico_jax.showing.tensors import Row, numbers, size

_BESIDE, _LISTED, _TEXT = 8, 12, 300  # pictures side by side; lines; characters
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_ROWS = 64 << 20  # bytes of an array that are read at once


class Found(NamedTuple):
    """What a file or folder is: a line, named lines, and a picture, uint8 (H, W, 3)."""

    title: str
    rows: list[Row]
    picture: np.ndarray | None = None
    file: str | None = None  # where the picture is


_OF_PLAN = ("run", "memory per device", "time", "cost")  # sections that are shown
# Fields by which a JSON file is known, what it is, and what is shown of it; "*" stands for all.
_JSON = (
    ("sections topology", "a plan (dico_jax.plan)", ""),
    ("sweep", "results of a sweep over guidance (dico_jax.evaluate)",
     "samples.ckpt samples.step samples.weights samples.count reference.path features.name"),
    ("metrics features samples", "a result (dico_jax.evaluate)",
     "metrics.* samples.count reference.path features.name versions date"),
    ("settings versions", "how images were made (dico_jax.sample)",
     "settings.ckpt settings.step settings.weights settings.model.name settings.sampling.sampler "
     "settings.sampling.num_steps settings.sampling.cfg_scale settings.seed versions"),
    ("made_of platforms", "an exported sampler (dico_jax.export)",
     "batch_size platforms num_classes cfg_scale made_of.ckpt made_of.step versions"),
    ("plan shards", "prepared latents (dico_jax.prepare)", "plan.*"),
    ("model training data", "the config of a run",
     "model.name data.source data.path data.image_size data.batch_size training.num_steps "
     "diffusion.objective optimizer.learning_rate seed"),
)  # fmt: skip


def class_rows(counts: Mapping[str, int]) -> list[Row]:
    """What is said of pictures in folders, of which these have so many."""
    some = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())[:8])
    return [("classes", f"{len(counts):,}: {some}{' ...' * (len(counts) > 8)}"),
            ("pictures", f"{sum(counts.values()):,}")]  # fmt: skip


def describe_json(path: str) -> Found:
    """A result, a plan, a config, or what an unknown JSON file has at its top."""
    with refusing(path, "is not JSON, or cut short"), open(path, "rb") as stream:
        value = json.loads(stream.read())
    for needed, title, wanted in _JSON if isinstance(value, dict) else ():
        if set(needed.split()) <= value.keys():
            with refusing(path, "is not what its fields say"):
                if needed == "sweep":
                    return Found(title, [*_fields(value["sweep"][0], wanted), *_by_scale(value)])
                if wanted:
                    return Found(title, list(_fields(value, wanted)))
                of = {name: value["sections"].get(name, {}) for name in _OF_PLAN}
                lines = plan_text(value | {"sections": of, "notes": []}).splitlines()
                return Found(title, [("", line) for line in lines])
    if not isinstance(value, dict):
        return Found(f"JSON, {type(value).__name__}", [("holds", shown(value, _TEXT))])
    rows = [(key, _short(part)) for key, part in list(value.items())[:_LISTED]]
    return Found(f"JSON of {len(value):,} fields, which no command here writes", rows)


def _fields(value: Any, wanted: str) -> Iterator[Row]:
    for name in wanted.split():
        found = value
        for part in name.split("."):
            if part == "*":
                yield from ((key, _short(item)) for key, item in found.items())
                break
            found = found.get(part) if isinstance(found, dict) else None
        else:
            yield name.removeprefix("settings."), _short(found)


def _by_scale(value: Any) -> Iterator[Row]:
    for result in sorted(value["sweep"], key=lambda r: r["samples"]["sampling"]["cfg_scale"]):
        said = [f"{name} {v:.6g}" for name, v in result["metrics"].items() if v is not None]
        yield f"guidance {result['samples']['sampling']['cfg_scale']:g}", ", ".join(said)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        plain = all(isinstance(item, str | int | float) for item in value.values())
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if plain else ""
        some = f"{len(value):,} fields: {', '.join(map(str, value))[:100]}"
        return text if 0 < len(text) < _TEXT else some
    if isinstance(value, list):
        return f"{len(value):,}: {shown(value)}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def describe_lines(path: str) -> Found:
    """JSON lines, such as metrics.jsonl: how many, and the last."""
    values, broken = list[dict[str, Any]](), 0
    with open(path, "rb") as stream:
        for line in filter(bytes.strip, stream):
            try:
                values.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                broken += 1
    if not values:
        raise UsageError(f"{path} has no line of JSON: {AGAIN}")
    rows = [("lines", f"{len(values):,}" + f", and {broken} that are broken" * (broken > 0))]
    last, steps = values[-1], [value["step"] for value in values if "step" in value]
    if steps:  # an evaluation has a line of its own
        rows, last = [*rows, ("steps", f"{min(steps):,} to {max(steps):,}")], values[-2:][0] | last
    return Found("JSON lines", rows + [(k, _short(v)) for k, v in last.items() if k != "step"])


def describe_text(path: str) -> Found:
    """The first lines of a text."""
    with open(path, "rb") as stream, refusing(path, "is no text"):
        lines = stream.read(1 << 20).decode().splitlines()
    return Found("text", [("lines", f"{len(lines):,}"), *(("", line) for line in lines[:_LISTED])])


def describe_records(path: str) -> Found:
    """ArrayRecord: how many records."""
    from array_record.python import array_record_module

    with refusing(path):
        count = array_record_module.ArrayRecordReader(path).num_records()
    return Found("ArrayRecord, as of latents or pictures", [("records", f"{count:,}")])


def describe_picture(path: str, stream: Any = None) -> Found:
    """A picture, decoded as a whole: a cut one is an error. It is in a file, or in a `stream`."""
    with refusing(path), Image.open(stream or path) as image:
        frames = getattr(image, "n_frames", 1)
        text = f"{image.width} x {image.height}, {image.mode}" + f", {frames} frames" * (frames > 1)
        picture = np.asarray(image.convert("RGB"))
        texts = list(getattr(image, "text", {}).items())[:_LISTED]  # of a PNG, such as an app's
        rows = [(one_line(name)[:20], one_line(said)[: 4 * _TEXT]) for name, said in texts]
        return Found(f"a picture ({image.format})", [("size", text), *rows], picture, path)


def describe_npy(path: str, full: bool) -> Found:
    """An array in a file of NumPy's."""
    with refusing(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is no array")
    count = len(array) if array.ndim else 0
    step = max(1, _ROWS * count // max(1, array.nbytes))
    cuts = [array[start : start + step] for start in range(0, count, step)]
    read = functools.partial(functools.partial, np.asarray)
    parts = {f"rows {i}": Deferred(cut.dtype, cut.shape, read(cut)) for i, cut in enumerate(cuts)}
    rows = [("array", f"{array.dtype.name} {array.shape}, {size(array.nbytes)}")]
    rows += [row for row in numbers(parts, full) if row[0] == "norm"]
    return Found("an array", rows, _beside(array[:_BESIDE]) if count else None)


def describe_npz(path: str, full: bool) -> Found:
    """Arrays in an npz file: samples, statistics of features, a classifier, or others."""
    with refusing(path), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        tensors = {name.removesuffix(".npy"): _member(path, archive, name) for name in names}
        if not tensors:
            raise ValueError("it holds no arrays")
        title, rows = _npz_kind(tensors)
        rows += numbers(tensors, full)  # also finds what is broken
        pictures = (_first(archive, *item) for item in tensors.items())
        return Found(title, rows, next((p for p in pictures if p is not None), None))


def _member(path: str, archive: zipfile.ZipFile, name: str) -> Deferred:
    with archive.open(name) as stream:
        long = {(1, 0): False, (2, 0): True}[npy.read_magic(stream)]
        header = npy.read_array_header_2_0 if long else npy.read_array_header_1_0
        shape, _, dtype = header(stream)
        there = archive.getinfo(name).file_size - stream.tell()
    if dtype.hasobject:
        raise UsageError(f"{path}: {name} holds Python objects, which are not read: save it anew")
    if there != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {there} bytes, not those of {dtype}{list(shape)}")

    def read() -> np.ndarray:
        with refusing(f"{path}: the array {shown(name)}"), archive.open(name) as stream:
            return np.asarray(npy.read_array(stream, allow_pickle=False))

    return Deferred(dtype, shape, read)


def _npz_kind(tensors: Mapping[str, Deferred]) -> tuple[str, list[Row]]:
    """What the arrays are, and what is said of that."""

    def small(name: str) -> np.ndarray:
        if tensors[name].nbytes > _ROWS:
            raise ValueError(f"{name} has {tensors[name].nbytes:,} bytes")
        return tensors[name].read()

    names, rows = set(tensors), list[Row]()
    if {"mu", "sigma"} <= names:
        about = json.loads(str(small("dico_jax"))) if "dico_jax" in names else {}
        rows = [(name, _short(text)) for name, text in about.items()]
        return "statistics of features, a reference", rows
    if "about" in names:
        about = json.loads(small("about").tobytes())
        rows = [(name, _short(text)) for name, text in dict(about).items()]
        return "a classifier, or an evaluation that goes on", rows
    if {"tokens", "pooled", "digest"} <= names:
        return "features of no text, of prepared latents", rows
    if "arr_0" in names and len(tensors["arr_0"].shape) == 4:
        rows.append(("images", f"{tensors['arr_0'].shape} {tensors['arr_0'].dtype.name}"))
        if "arr_1" in names:
            labels = np.unique(small("arr_1"))
            rows.append(("labels", f"{len(labels):,}: {shown(labels.tolist())}"))
        return "images, as ADM's evaluator reads them", rows
    exported = any(name.startswith("network/") for name in names)
    return "weights of an exported sampler" if exported else "arrays", rows


def _first(archive: zipfile.ZipFile, name: str, tensor: Deferred) -> np.ndarray | None:
    """The first pictures of an array of them, of which no more is read."""
    shape = tensor.shape if len(tensor.shape) == 4 else (1, *tensor.shape)
    if tensor.dtype != np.uint8 or len(shape) != 4 or 0 in shape or shape[-1] not in (1, 3):
        return None
    with archive.open(f"{name}.npy") as stream:  # whose header is right
        stream.seek(archive.getinfo(f"{name}.npy").file_size - tensor.nbytes)
        count = min(_BESIDE, shape[0])
        data = stream.read(count * math.prod(shape[1:]))
    return _beside(np.frombuffer(data, np.uint8).reshape(count, *shape[1:]))


def _beside(images: np.ndarray) -> np.ndarray | None:
    """Pictures, uint8 (N, H, W, 1 or 3), side by side; None of what are none."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        return None
    row = np.concatenate(list(images), axis=1)
    return np.ascontiguousarray(np.broadcast_to(row, (*row.shape[:2], 3)))
