"""Parameters, multiply-adds and activation bytes of networks, stage by stage (figures 2 and 3)."""

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dico_jax.benchmarking.report import markdown
from dico_jax.errors import UsageError
from dico_jax.models import MODELS, count_parameters, create_model, forward_macs
from dico_jax.models.denoiser import Denoiser
from dico_jax.planning.estimates import kept_activations
from dico_jax.reporting.figures import HEIGHT, WIDTH

REST = "between the stages"  # as `kept_activations` calls it
_DOWNSAMPLING, _LARGEST = 8, 2**14  # of Stable Diffusion's autoencoder; pixels of a side
_COUNTS = ("parameters", "multiply_adds", "activation_bytes")


def check(names: Sequence[str], texts: Sequence[str]) -> list[int]:
    """The sides of images, rising; UsageError for no published size, or no side that fits all."""
    known = [name for name, (_, sizes) in MODELS.items() if sizes]
    for name in names or [""]:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
            raise UsageError("--models", name, f"is no published size: use {' or '.join(close)}")
    step = _DOWNSAMPLING * max(create_model(name).size_divisor for name in names)
    for text in texts or [""]:
        if not text.isdecimal() or int(text) % step or not 0 < int(text) <= _LARGEST:
            fix = f"must be multiples of {step}, up to {_LARGEST}: use some such as 256,512,1024"
            raise UsageError("--image_sizes", text, fix)
    return sorted({int(text) for text in texts})


def measure(names: Sequence[str], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row per network and image size: the totals of `_COUNTS`, and under "stages" their parts."""
    rows = []
    for name in dict.fromkeys(names):
        for size in sizes:
            print(f"{name} at {size}x{size} pixels ...", file=sys.stderr, flush=True)
            stages = by_stage(create_model(name), size // _DOWNSAMPLING)
            totals = {c: sum(stage[c] for stage in stages.values()) for c in _COUNTS}
            rows.append({"model": name, "image_size": size, **totals, "stages": stages})
    return rows


def by_stage(model: Denoiser, side: int) -> dict[str, dict[str, int]]:
    """Per stage of blocks, and of what is between them, the `_COUNTS` of one example.

    Activation bytes are what the backward pass needs of the forward pass.
    """
    shape, depths = (side, side, model.in_channels), np.ravel(model.depth).tolist()
    kept = kept_activations(model, shape)

    def macs(found: Sequence[int]) -> int:
        depth = tuple(found) if isinstance(model.depth, tuple) else found[0]
        return int(forward_macs(model.clone(depth=depth), shape) or 0)

    base = np.array([count_parameters(model), macs(depths), round(sum(kept.values()))])
    counts = {}
    for at, stage in enumerate(model.stages):  # all grows by as much for every block
        block = macs([n + (i == at) for i, n in enumerate(depths)]) - macs(depths)
        counts[stage] = count_parameters(model, [stage]), depths[at] * block, round(kept[stage])
    counts[REST] = tuple(base - np.sum([*counts.values()], axis=0))
    return {s: dict(zip(_COUNTS, map(int, found), strict=True)) for s, found in counts.items()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The totals of rows as a table of Markdown."""
    cells = [("model", "pixels", "parameters", "multiply-adds", "activation bytes")]
    for row in rows:
        macs, kept = (f"{row[count] / 1e9:.2f}G" for count in _COUNTS[1:])
        cells.append((row["model"], str(row["image_size"]), f"{row['parameters']:,}", macs, kept))
    return markdown(cells)


def figures(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """Totals against the image size, and by stage the multiply-adds of the largest one."""
    names, sizes = ([*dict.fromkeys(row[key] for row in rows)] for key in ("model", "image_size"))
    titles = ("multiply-adds (G)", "kept for the backward pass (GB)")
    figure = Figure(figsize=(3.6 * WIDTH, HEIGHT + 0.3 * len(names)))
    *by_size, by_stage = figure.subplots(1, 3)
    for axes, count, title in zip(by_size, _COUNTS[1:], titles, strict=True):
        for name in names:
            values = [row[count] / 1e9 for row in rows if row["model"] == name]
            axes.plot(sizes, values, "o--" if "DiT" in name else "o-", ms=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="pixels a side", title=title)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    by_size[0].legend()
    largest = [row["stages"] for row in rows if row["image_size"] == sizes[-1]]
    left = np.zeros(len(names))
    for stage in sorted(dict.fromkeys(s for row in largest for s in row), key=REST.__eq__):
        of = [row.get(stage, {}).get("multiply_adds", 0) / 1e9 for row in largest]
        by_stage.barh(names, of, left=left, label=stage.replace("_", " "), height=0.7)
        left += of
    by_stage.set(title=f"{titles[0]} at {sizes[-1]} pixels")
    by_stage.invert_yaxis()
    figure.legend(*by_stage.get_legend_handles_labels(), loc="outside lower right", ncols=4)
    yield "cost", figure
