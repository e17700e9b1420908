"""Folders: workdirs, checkpoints, prepared latents, samples, exports, pictures."""

import functools
import json
import math
import os
from typing import Any

import numpy as np

from dico_jax.checkpoints import steps
from dico_jax.checkpoints.steps import DamagedCheckpointError
from dico_jax.errors import UsageError
from dico_jax.files import Deferred, as_path, files_below, is_remote, names_in, opened
from dico_jax.pytorch.hub import local_file
from dico_jax.pytorch.tensors import refusing
from dico_jax.showing import files
from dico_jax.showing.files import Found
from dico_jax.showing.tensors import Row, numbers, size, weights

_READ_RECORDS = 64  # of prepared latents, without --full
_SHOWN = ("hidden_size", "depth", "num_heads", "patch_size", "dtype", "layout", "mixer",
          "window_size", "channel_attention", "kernel_size", "activation",
          "source", "path", "image_size", "batch_size")  # fmt: skip


def describe_folder(path: str, full: bool) -> Found | None:
    """What a folder is, or None where it is of no kind that is known."""
    folder, names = as_path(path), set(names_in(path))
    if not names:
        raise UsageError(f"{path} is empty: name another folder")
    if folder.name.isdecimal() and {"meta", steps.CHECKSUMS} & names:
        return Found("a checkpoint", _step(folder, full))
    if folder.name == steps.FOLDER:
        return describe_folder(str(folder.parent), full)
    if steps.FOLDER in names or {"config.json", "metrics.jsonl"} <= names:
        return _workdir(folder, names, full)
    if {"manifest.json", "plan.json"} & names:
        return _latents(path, full)
    if {"meta.json", "sampler.stablehlo"} & names:
        return _export(folder, names, full)
    if index := sorted(name for name in names if name.endswith(".safetensors.index.json")):
        return Found(*weights(local_file(folder / index[0]), full))
    if "sampling.json" in names:
        rows = _rows_of(folder / "sampling.json")
        count = sum(name.endswith(".png") and name[0].isdigit() for name in names)
        rows.insert(0, ("images", f"{count:,}"))
        return _with_picture("samples", rows, folder, {"grid.png"} & names or names)
    if pictures := [name for name in names if name.lower().endswith(files.PICTURES)]:
        return _with_picture("pictures", [("pictures", f"{len(pictures):,}")], folder, names)
    return _classes(folder, names)


def _workdir(folder: Any, names: set[str], full: bool) -> Found:
    saved, rows, title = sorted(steps.saved_steps(folder)), list[Row](), "a workdir"
    config = _fields(folder / "config.json") if "config.json" in names else {}
    planned = config.get("training", {}).get("num_steps", 0)
    listed = ", ".join(f"{step:,}" for step in saved[-8:]) or "none yet"
    rows.append(("checkpoints", f"{listed}" + f"; {planned:,} steps are planned" * (planned > 0)))
    if "metrics.jsonl" in names and not is_remote(folder):
        last = files.describe_lines(str(folder / "metrics.jsonl")).rows
        few = ("steps", "loss", "images_per_second")
        said = [f"{k} {v}" for k, v in last if k in few or k.startswith("eval/")]
        rows.append(("metrics", ", ".join(said)))
    if bad := [folder / name for name in names if name.startswith("bad_examples")]:
        count = sum(file.read_bytes().count(b"\n") for file in bad)
        rows.append(("bad examples", f"{count:,}"))
    if saved:
        newest = _step(folder / steps.FOLDER / str(saved[-1]), full)
        title = "a converted checkpoint" if dict(newest).get("made of") else title
        rows = newest[:2] + rows + newest[2:]
    elif config:
        rows = _rows_of(folder / "config.json") + rows
    grids = names_in(folder / "samples") if "samples" in names else []
    return _with_picture(title, rows, folder / "samples", grids)


def _step(folder: Any, full: bool) -> list[Row]:
    """Model, data, versions, what there is, and the numbers of the averaged weights."""
    recorded = steps.recorded_checksums(folder) or {}
    there = files_below(folder) if recorded else {}
    for name, about in recorded.items():
        if (found := there.get(name, {}).get("size")) != about["size"]:
            said = "is missing" if found is None else f"has {found:,} bytes of {about['size']:,}"
            raise DamagedCheckpointError(folder, f"{name} {said}", steps.ADVICE)
    if full:
        steps.verified(folder)
    meta = steps.read_meta(folder)
    items = sorted(item for item in names_in(folder) if (folder / item / "_METADATA").exists())
    if not items:
        raise DamagedCheckpointError(folder, "it has no weights", steps.ADVICE)
    item = next((item for item in steps.ITEMS.values() if item in items), items[0])
    leaves, config = stored_arrays(folder / item), meta.get("config", {})
    parts = config.get("model", {}), config.get("data", {})
    own, data = (
        ", ".join(f"{name} {part[name]}" for name in _SHOWN if part.get(name) is not None)
        for part in parts
    )
    count, classes = sum(math.prod(leaf.shape) for leaf in leaves.values()), meta.get("class_names")
    if classes:
        data += f", classes {', '.join(classes[:5])}{' ...' * (len(classes) > 5)}"
    rows = [("network", f"{parts[0].get('name')}, {count:,} parameters ({own})"), ("data", data)]
    if converted := meta.get("converted"):
        rows.append(("made of", f"{converted['file']}, {converted['weights']}"))
    nbytes = size(sum(about["size"] for about in recorded.values()))
    checked = "all bytes are as written" if full else "all files are there, of their sizes"
    whole = f", {nbytes}; {checked}" if recorded else ", without checksums"
    rows.append(("step", f"{folder.name}: {', '.join(items)}{whole}"))
    versions = ", ".join(f"{k} {v}" for k, v in meta.get("versions", {}).items())
    return [*rows, ("versions", versions or "it does not say"), *numbers(leaves, full)]


def stored_arrays(item: Any) -> dict[str, Deferred]:
    """The arrays of an item by their paths joined with dots, each read when asked for."""
    import tensorstore  # late: most kinds do without

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})

    def read(name: str) -> np.ndarray:
        try:
            return steps.read_array(item, name, context)
        except ValueError as error:
            raise DamagedCheckpointError(item, error, steps.ADVICE) from error

    found = {}
    try:
        for about in json.loads((item / "_METADATA").read_text())["tree_metadata"].values():
            name = ".".join(str(part["key"]) for part in about["key_metadata"])
            kind, shape = (about["value_metadata"].get(k) for k in ("value_type", "write_shape"))
            if kind not in ("None", "Dict", "List", "Tuple"):
                shape = read(name).shape if shape is None else shape  # older ones do not say
                found[name] = Deferred(np.float32, shape, functools.partial(read, name))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(item, error, steps.ADVICE) from error
    return found


def _latents(path: str, full: bool) -> Found:
    from dico_jax.data.latents import PreparedLatents  # late: it takes longer than others

    source = PreparedLatents(path)
    plan, shards = source.manifest.plan, source.manifest.shards
    if full:
        source.check_checksums()
    nbytes, bad = size(sum(shard.bytes for shard in shards)), len(source.manifest.bad)
    checked = "as their checksums say" if full else "all there, of their sizes"
    shape = f"{plan.dtype} (orientations, h, w, 2 channels) {plan.shape}"
    rows = [
        ("made of", plan.source),
        ("examples", f"{len(source):,} of {len(plan.class_names):,} classes, {bad:,} bad ones"),
        ("latents", f"{shape}, of {plan.image_size} pixels by {plan.autoencoder}"),
        ("shards", f"{len(shards):,}, {nbytes}, {checked}"),
        ("fields", ", ".join(sorted(source.manifest.fields))),
    ]
    count = len(source) if full else min(_READ_RECORDS, len(source))
    total, squares, nans, good = 0.0, 0.0, 0, 0
    with refusing(path):
        for index in np.linspace(0, len(source) - 1, count, dtype=int):
            means = np.split(source[int(index)]["image"].astype(np.float64), 2, axis=-1)[0]
            finite = means[np.isfinite(means)]
            total, squares = total + finite.sum(), squares + np.square(finite).sum()
            nans, good = nans + means.size - finite.size, good + finite.size
    mean, square = total / max(1, good), squares / max(1, good)
    text = f"mean {mean:.4g}, deviation {math.sqrt(max(0, square - mean**2)):.4g}, {nans:,} NaN "
    text += f"or infinite; of {count:,} of {len(source):,} examples"
    text += ": --full reads all" * (count < len(source))
    return Found("prepared latents", [*rows, ("means", text)])


def _export(folder: Any, names: set[str], full: bool) -> Found:
    for name in ("meta.json", "sampler.stablehlo", "weights.npz", "run.py"):
        if name not in names:
            raise UsageError(f"{folder} lacks {name}: copy all of the export, or export again")
    arrays = files.describe_npz(local_file(folder / "weights.npz"), full).rows
    return Found("an exported sampler", _rows_of(folder / "meta.json") + arrays)


def _rows_of(file: Any) -> list[Row]:
    return files.describe_json(local_file(file, shards=False)).rows


def _classes(folder: Any, names: set[str]) -> Found | None:
    there = {name: [n for n in names_in(folder / name) if n.lower().endswith(files.PICTURES)]
             for name in sorted(names)}  # fmt: skip
    if not (there := {name: pictures for name, pictures in there.items() if pictures}):
        return None
    rows = files.class_rows({name: len(pictures) for name, pictures in there.items()})
    return _with_picture("pictures in class folders", rows, folder / min(there), there[min(there)])


def _with_picture(title: str, rows: list[Row], folder: Any, names: Any) -> Found:
    """With the last picture of a folder by name, as of the grids of a run."""
    pictures = [name for name in names if name.lower().endswith(files.PICTURES)]
    if not pictures:
        return Found(title, rows)
    file = folder / max(pictures)
    with opened(file) as stream:
        picture = files.describe_picture(os.fspath(file), stream).picture
    return Found(title, rows, picture, os.fspath(file))


def _fields(file: Any) -> dict[str, Any]:
    with refusing(str(file), "is not JSON"):
        return dict(json.loads(file.read_text()))
