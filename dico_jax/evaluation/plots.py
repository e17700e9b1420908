"""Plots of results, by matplotlib."""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

from dico_jax.errors import UsageError

_METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score"}


def require_matplotlib(flag: str) -> None:
    """Raises UsageError, naming what needs it, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{flag} needs matplotlib for its plot: pip install 'dico_jax[plot]'")


def plot_sweep(file: pathlib.Path, results: Sequence[dict[str, Any]]) -> None:
    """Writes FID, sFID and Inception Score by guidance scale, as far as they are there.

    Args:
      file: .png, .pdf or .svg.
      results: of `dico_jax.evaluation.measure`, by rising guidance scale.
    """
    from matplotlib.figure import Figure

    scales = [result["samples"]["sampling"]["cfg_scale"] for result in results]
    names = [name for name in _METRICS if name in results[0]["metrics"]]
    figure = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        values = [result["metrics"][name] for result in results]
        axis.plot(scales, values, marker="o")
        axis.set(xlabel="guidance scale", ylabel=_METRICS[name])
        axis.grid(alpha=0.3)
    samples, features = results[0]["samples"], results[0]["features"]
    figure.suptitle(f"{samples['count']:,} samples, features: {features['name']}", fontsize=10)
    figure.savefig(file, dpi=120)
