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


def check_models(names: Sequence[str]) -> list[str]:
    """The names of published sizes, each once; UsageError for others, or none."""
    known = [name for name, (_, sizes) in MODELS.items() if sizes]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
            raise UsageError("--models", name, f"is no published size: use {' or '.join(close)}")
    if not names:
        raise UsageError("--models", "", "is empty: name some, such as DiCo-S,DiT-S/2")
    return [*dict.fromkeys(names)]


def check_sizes(texts: Sequence[str], names: Sequence[str]) -> list[int]:
    """Sides of images in pixels, each once, rising; UsageError for what a network cannot take."""
    step = _DOWNSAMPLING * max(create_model(name).size_divisor for name in names)
    for text in texts or [""]:
        if not text.isdecimal() or int(text) % step or not 0 < int(text) <= _LARGEST:
            fix = f"must be multiples of {step}, up to {_LARGEST}: use some such as 256,512,1024"
            raise UsageError("--image_sizes", text, fix)
    return sorted({int(text) for text in texts})


def measure(names: Sequence[str], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row per network and image size: the totals of `_COUNTS`, and under "stages" their parts."""
    rows = []
    for name in names:
        model = create_model(name)
        for size in sizes:
            print(f"{name} at {size}x{size} pixels ...", file=sys.stderr, flush=True)
            side = size // _DOWNSAMPLING
            stages = by_stage(model, (side, side, model.in_channels))
            totals = {c: sum(stage[c] for stage in stages.values()) for c in _COUNTS}
            rows.append({"model": name, "image_size": size, **totals, "stages": stages})
    return rows


def by_stage(model: Denoiser, latent_shape: tuple[int, int, int]) -> dict[str, dict[str, int]]:
    """Per stage of blocks, and of what is between them, the `_COUNTS` of one example.

    Activation bytes are what the backward pass needs of the forward pass.
    """
    ones = [1 for _ in np.ravel(model.depth)]

    def macs(depths: Sequence[int]) -> int:  # which grow by as much for every block
        depth = tuple(depths) if isinstance(model.depth, tuple) else depths[0]
        return int(forward_macs(model.clone(depth=depth), latent_shape) or 0)

    kept, found = kept_activations(model, latent_shape), {}
    for at, (stage, depth) in enumerate(zip(model.stages, np.ravel(model.depth), strict=True)):
        blocks = int(depth) * (macs([1 + (i == at) for i in range(len(ones))]) - macs(ones))
        counts = count_parameters(model, [stage]), blocks, round(kept[stage])
        found[stage] = dict(zip(_COUNTS, counts, strict=True))
    totals = count_parameters(model), int(forward_macs(model, latent_shape) or 0)
    counts = *totals, sum(stage["activation_bytes"] for stage in found.values()) + round(kept[REST])
    rest = {c: n - sum(s[c] for s in found.values()) for c, n in zip(_COUNTS, counts, strict=True)}
    return found | {REST: rest}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The totals of rows as a table of Markdown."""
    cells = [("model", "pixels", "parameters", "multiply-adds", "activations")]
    for row in rows:
        macs, kept = row["multiply_adds"] / 1e9, row["activation_bytes"] / 1e9
        numbers = f"{row['parameters']:,}", f"{macs:.2f}G", f"{kept:.2f} GB"
        cells.append((row["model"], str(row["image_size"]), *numbers))
    return markdown(cells)


def figures(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """Totals against the image size, then where they come from at the largest one."""
    names, sizes = ([*dict.fromkeys(row[key] for row in rows)] for key in ("model", "image_size"))
    labels = {"multiply_adds": ("multiply-adds", 1e9, "G"), "activation_bytes": ("kept for the "
              "backward pass", 1e9, "GB"), "parameters": ("parameters", 1e6, "M")}  # fmt: skip
    figure = Figure(figsize=(2.6 * WIDTH, HEIGHT + 0.6))
    panels = figure.subplots(1, 2)
    for axes, count in zip(panels, ("multiply_adds", "activation_bytes"), strict=True):
        for name in names:
            values = [row[count] / 1e9 for row in rows if row["model"] == name]
            dashed = "--" if name.startswith("DiT") else "-"
            axes.plot(sizes, values, marker="o", ms=3, ls=dashed, label=name)
        title, _, unit = labels[count]
        axes.set(xscale="log", yscale="log", xlabel="pixels a side", ylabel=f"{title} ({unit})")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    yield "cost_by_size", figure
    figure = Figure(figsize=(2.6 * WIDTH, max(HEIGHT, 0.3 * len(names) + 1.2)))
    panels = figure.subplots(1, 3, sharey=True)
    largest = [row for row in rows if row["image_size"] == sizes[-1]]
    stages = [*dict.fromkeys(stage for row in largest for stage in row["stages"])]
    stages = [stage for stage in stages if stage != REST] + [REST]
    for axes, (count, (title, scale, unit)) in zip(panels, labels.items(), strict=True):
        left = np.zeros(len(names))
        for stage in stages:
            of = [row["stages"].get(stage, {}).get(count, 0) / scale for row in largest]
            axes.barh(names, of, left=left, label=stage.replace("_", " "), height=0.7)
            left += of
        axes.set(xlabel=f"{title} ({unit})")
    panels[0].invert_yaxis()
    figure.suptitle(f"by stage, at {sizes[-1]}x{sizes[-1]} pixels")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    yield "cost_by_stage", figure
