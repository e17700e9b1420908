"""Tensors of files: what network they are of, and what their numbers say, as far as time allows."""

import argparse
import collections
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dico_jax.errors import UsageError, several
from dico_jax.files import Deferred, is_tensor
from dico_jax.pytorch.detection import TABLE, describe, detect_model
from dico_jax.pytorch.key_maps import KEY_MAPS, known_names
from dico_jax.pytorch.tensors import shown, values_in
from dico_jax.pytorch.torch_files import open_tensors, select_weights
from dico_jax.terminal import Bar

BYTES, SECONDS = 256 << 20, 0.4  # that are read, without --full
_PIECE = 1 << 18  # numbers at once
_MOST = 12  # parts of a network that are listed

Row = tuple[str, str]  # a name and a text


def weights(path: str, full: bool) -> tuple[str, list[Row]]:
    """Title and rows of a .pt, .pth or .safetensors file, or the index of several."""
    with open_tensors(path) as file:
        tree, rows, title = file.tree, list[Row](), "weights"
        rows += [(name, text) for name, text in file.metadata.items() if name != "format"]
        if isinstance(tree, Mapping) and not all(map(is_tensor, tree.values())):
            title = "a training checkpoint"
            rows += [(str(key), _content(value)) for key, value in list(tree.items())[:_MOST]]
        try:
            source, found = select_weights(file)
            rows += [("weights", source)] if source != "weights" else []
        except UsageError as error:
            rows.append(("note", str(error).removeprefix(path).strip()))
            inside = [part for part in values_in(tree) if is_tensor(part)]
            found = {f"tensor {i}": tensor for i, tensor in enumerate(inside)}
        found = {name: tensor for name, tensor in found.items() if isinstance(tensor, Deferred)}
        return title, [("network", network(found)), *rows, *numbers(found, full)]


def network(tensors: Mapping[str, Any]) -> str:
    """What network tensors by PyTorch's names are of, as their names and shapes say."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        try:
            fields = dict(detect_model(shapes))
        except UsageError:  # heads do not show in a DiT of no published width
            fields = dict(detect_model(shapes, likely_heads=1)) | {"num_heads": None}
        vocabulary = fields.pop("vocab_size", 0)
        count = sum(math.prod(shape) for name, shape in shapes.items() if name != TABLE)
        return describe(fields, count, vocabulary)
    except UsageError as error:
        reason = str(error)
    if any(re.search(r"(^|\.)Mixed_\d\w\.", name) for name in shapes):
        return "an Inception network of features"
    for name, kind in (("CLIP", "CLIP, towers of "), ("AutoencoderKL", "an autoencoder (SD VAE)")):
        known = known_names(shapes, KEY_MAPS[name])
        if any(re.match(KEY_MAPS[name].root, key) for key in known):
            return kind + " and ".join(
                sorted({k.partition("_")[0] for k in known if "_model" in k})
            )
    return reason


def _content(value: object) -> str:
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    tensors = [part for part in values_in(value) if isinstance(part, Deferred)]
    if tensors:
        return f"{len(tensors):,} tensors, {size(sum(tensor.nbytes for tensor in tensors))}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={shown(part, 30)}" for key, part in list(value.items())[:8])
    return shown(value)


def size(nbytes: float) -> str:
    """Bytes in a unit that suits."""
    scale, unit = next(((n, u) for n, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if nbytes >= n),
                       (1, "bytes"))  # fmt: skip
    return f"{nbytes / scale:.4g} {unit}"


def numbers(tensors: Mapping[str, Any], full: bool) -> Iterator[Row]:
    """What is said of `Deferred` tensors by name: how many, their parts, their norm and NaNs."""
    dtypes = collections.Counter(map(_dtype, tensors.values())).most_common(4)
    kinds = ", ".join(f"{count} {name}" if len(dtypes) > 1 else name for name, count in dtypes)
    nbytes = size(sum(tensor.nbytes for tensor in tensors.values()))
    yield "tensors", f"{len(tensors):,} of {_count(tensors.values()):,} numbers, {nbytes}, {kinds}"
    floats = {name: x for name, x in tensors.items() if "float" in x.dtype.name and x.nbytes}
    found, parts = _read(floats, full), dict[str, list[str]]()
    for name in tensors:
        parts.setdefault(re.split("[./]", name)[0], []).append(name)
    for part, names in list(parts.items())[:_MOST] if len(tensors) > 1 else ():
        text = f"{len(names):>4} tensors  {_count(tensors[name] for name in names):>13,}"
        if len(names) == 1:
            text = f"{_dtype(tensor := tensors[names[0]])} {'x'.join(map(str, tensor.shape))}"
        norm = math.sqrt(sum(found[name][0] for name in names if name in found))
        yield f"  {part}", text + f"  norm {norm:.4g}" * all(name in found for name in names)
    if len(parts) > _MOST:
        yield "  ...", f"and {len(parts) - _MOST} more"
    if not floats:
        return
    squares, nans, infinite = (sum(sums) for sums in zip(*found.values(), (0, 0, 0), strict=True))
    text = f"{math.sqrt(squares):.6g}, no NaN, none infinite"
    if nans or infinite:
        where = several([name for name, sums in found.items() if any(sums[1:])], 3)
        text = f"{math.sqrt(squares):.6g} of what is finite; {nans:,} NaN, {infinite:,} infinite "
        text += f"in {where}"
    if len(found) < len(floats):
        read = size(sum(floats[name].nbytes for name in found))
        text += f"; of {len(found):,} of {len(floats):,} tensors ({read} read): --full reads all"
    yield "norm", text


def _dtype(tensor: Any) -> str:
    return "text" if tensor.dtype.kind in "US" else tensor.dtype.name


def _count(tensors: Any) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _read(tensors: Mapping[str, Any], full: bool) -> dict[str, tuple[float, int, int]]:
    """Per tensor that was read the sum of squares of what is finite, NaN and infinite numbers."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    names, left = list(tensors), math.inf if full else BYTES
    end, found = time.monotonic() + (math.inf if full else SECONDS), {}
    if not full and total > BYTES:
        names.sort(key=lambda name: tensors[name].nbytes)  # as many as there is time for
    style: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": not full, "delay": 1}
    with Bar(total=total, desc="reading", leave=False, **style) as bar:
        for name in names:
            if time.monotonic() < end and tensors[name].nbytes <= left:
                found[name] = _sums(tensors[name].read())
                left -= tensors[name].nbytes
                bar.update(tensors[name].nbytes)
    return found


def _sums(array: np.ndarray) -> tuple[float, int, int]:
    flat, squares, nans, infinite = array.reshape(-1), 0.0, 0, 0
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        if not math.isfinite(square := _square(piece)):
            nans, infinite = (
                nans + int(np.isnan(piece).sum()),
                infinite + int(np.isinf(piece).sum()),
            )
            square = _square(piece[np.isfinite(piece)])
        squares += square
    return squares, nans, infinite


def _square(piece: np.ndarray) -> float:
    # Faster than products of a copy in float64, for which OpenBLAS also starts threads.
    return float(np.einsum("i,i->", piece, piece, dtype=np.float64, casting="unsafe"))
