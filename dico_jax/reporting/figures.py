"""Figures of runs in a paper's style, each as PDF and PNG."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

from dico_jax.config import with_defaults
from dico_jax.errors import UsageError, one_line
from dico_jax.experiment import model_from_config
from dico_jax.files import as_path, new_file, opened
from dico_jax.models import training_flops
from dico_jax.reporting import curves
from dico_jax.reporting.runs import Run

_STYLE: Any = {
    "font.family": "serif", "mathtext.fontset": "cm", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
    "figure.constrained_layout.use": True, "pdf.fonttype": 42, "lines.linewidth": 1.3,
}  # fmt: skip
WIDTH, HEIGHT = 3.4, 2.5  # inches: a column of a paper
_DASHED: dict[str, Any] = {"color": "0.5", "ls": "--", "marker": "D", "ms": 3}


def draw(runs: Sequence[Run], out: str) -> list[str]:
    """Draws what the runs have numbers for, into the folder `out`; a line per figure.

    UsageError where they have nothing to draw.
    """
    folder = as_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if names := save_figures(_figures(runs), folder):
        return [f"{folder / name}.pdf and .png" for name in names]
    raise UsageError("--out", out, ": the runs have no losses, evaluations or samples yet")


def save_figures(figures: Iterable[tuple[str, Figure]], folder: Any) -> list[str]:
    """Writes figures, made while this goes on, in a paper's style as PDF and PNG; their names."""
    names = []
    with rc_context(_STYLE):
        for name, figure in figures:
            for suffix in ("pdf", "png"):
                with new_file(folder / f"{name}.{suffix}") as stream:
                    figure.savefig(stream, dpi=300, format=suffix)
            names.append(name)
    return names


def _figures(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    yield from _guidance(runs)
    yield from _fid_by_step(runs)
    yield from _loss_by_compute(runs)
    for run in runs:
        if run.grids:
            yield f"samples_{run.name.replace('/', '_')}", _sheet(run)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _guidance(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """FID by guidance scale, a line per run and weights."""
    lines: dict[str, dict[float, float]] = {}
    for run in runs:
        for result in run.results:
            of, fid = result["samples"], result["metrics"].get("fid")
            scale = (of.get("sampling") or {}).get("cfg_scale")
            if fid is not None and scale is not None:
                name = f"{run.name}, {of.get('weights')}, step {of.get('step', 0):,}"
                lines.setdefault(name, {})[float(scale)] = float(fid)
    if lines:
        figure, axes = _axes("guidance scale", "FID")
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", ms=3, label=name)
        axes.legend()
        yield "fid_by_guidance", figure


def _fid_by_step(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """FID by step during training, beside the paper's."""
    names = {n for run in runs for n in run.evaluations if n.rsplit("/", 1)[-1] == "fid"}
    for name in sorted(names):
        figure, axes = _axes("steps", "FID")
        for run in (run for run in runs if name in run.evaluations):
            axes.plot(*run.evaluations[name], marker="o", ms=3, label=run.name)
        found = {p.name: p for run in runs if (p := curves.published_of(run.config))}
        for network, published in found.items():
            axes.plot(*published.numbers("fid"), label=f"{network}, paper", **_DASHED)
        axes.legend()
        yield f"fid_by_step_{name.split('/')[0]}" if len(names) > 1 else "fid_by_step", figure


def _loss_by_compute(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """The smoothed loss by FLOPs of training; by images seen, where they cannot be counted."""
    logged = [run for run in runs if "loss" in run.values]
    flops = [_flops_per_image(run) for run in logged]
    counted = None not in flops
    x = "training compute (FLOPs)" if counted else "images seen"
    figure, axes = _axes(x, "training loss (smoothed)")
    objectives = {run.config.get("diffusion.objective") for run in logged}
    for run, each in zip(logged, flops, strict=True):
        steps, means, _ = curves.bucketed(run.steps, {"loss": run.values["loss"]}, 1000)
        at = steps * run.batch_size * ((each or 1) if counted else 1)
        kind = f" ({run.config.get('diffusion.objective')})" if len(objectives) > 1 else ""
        axes.plot(at, curves.smoothed(means["loss"], 0.8), label=f"{run.name}{kind}")
        published = curves.published_of(run.config)
        if published and published.losses:
            images = np.array([*published.losses]) * 256 * ((each or 1) if counted else 1)
            axes.plot(images, [*published.losses.values()],
                      label=f"{published.name}, released", **_DASHED)  # fmt: skip
    if logged:
        axes.set(xscale="log", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend()
        yield "loss_by_compute", figure


def _flops_per_image(run: Run) -> int | None:
    try:
        config = ConfigDict(with_defaults(run.config))
        if config.model.num_classes is None:  # as the data says; tables are not multiplied
            config.model.num_classes = 1
        model = model_from_config(config)
        side = config.data.image_size // (1 if config.autoencoder.name == "identity" else 8)
        return training_flops(model, (side, side, model.in_channels))
    except Exception as error:  # of an older version, or of a network that is not here
        run.notes.append(f"its FLOPs cannot be counted ({one_line(error)})")
        return None


def _sheet(run: Run) -> Figure:
    """The newest grid of a run, with a title that says what it is."""
    step, file = run.grids[-1]
    with opened(file) as stream:
        image = Image.open(stream).convert("RGB")
    figure = Figure(figsize=(2 * WIDTH, 2 * WIDTH * image.height / image.width + 0.3))
    axes = figure.subplots()
    axes.imshow(np.asarray(image), interpolation="none")
    axes.set_axis_off()
    axes.set_title(f"{run.name}, {curves.model_title(run.config)}, step {step:,}")
    return figure
