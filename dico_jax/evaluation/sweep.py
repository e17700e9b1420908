"""Numbers over the guidance scale, and their plot."""

import decimal
import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dico_jax.errors import UsageError
from dico_jax.evaluation.measure import CheckpointSamples, Options, partial_file
from dico_jax.files import write_json
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler

_PLOTTED = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score"}


def sweep_guidance(
    ckpt: str,
    reference: str,
    options: Options,
    out: str,
    *,
    scales: str,
    num_samples: int,
    classes: str = "all",
    **sampler_options,
) -> list[dict[str, Any]]:
    """Measures samples of a checkpoint at every guidance scale that `out` lacks, and plots all.

    Args:
      ckpt, reference, options, num_samples, classes, **sampler_options: see `evaluate_checkpoint`.
      out: a JSON file for {"sweep": [a result per scale]}, which may be there already; the plot
        lies beside it.
      scales: see `parse_sweep`.

    Raises:
      UsageError: something cannot be read or does not fit.
    """
    file, results = pathlib.Path(out), _read_results(pathlib.Path(out))
    chosen = parse_sweep(scales)
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--sweep_cfg needs matplotlib for its plot: pip install 'dico_jax[plot]'")
    samples = CheckpointSamples(CheckpointSampler(ckpt, **sampler_options), num_samples, classes)
    evaluator = options.evaluator(reference)
    for scale in chosen:
        samples.sampler.set_guidance(scale)
        about = evaluator.about(samples.about)
        if any(_but_scale(result) != _but_scale(about) for result in results):
            raise UsageError("--out", out, "is of another sweep: give another name")
        if scale not in map(_scale_of, results):
            part = file.with_name(f"{file.stem}-{scale}.json")
            results.append(evaluator.measure(samples, samples.about, partial_file(part)))
            if jax.process_index() == 0:
                write_json(file, {"sweep": results})
            partial_file(part).unlink(missing_ok=True)
        found = next(result for result in results if _scale_of(result) == scale)["metrics"]
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in found.items())
        print(f"guidance scale {scale}: {numbers}")
    plot_sweep(file.with_suffix(".png"), sorted(results, key=_scale_of))
    return results


def parse_sweep(text: str) -> tuple[float, ...]:
    """The numbers from A to B by steps of C, both ends included, of "A:B:C"; or UsageError."""
    try:
        first, last, step = (decimal.Decimal(part) for part in text.split(":"))
        if not (first >= 0 and step > 0 and last >= first):
            raise ValueError
    except (ValueError, ArithmeticError) as error:
        fix = ": write the first scale, the last and the step, such as 1.0:2.0:0.1"
        raise UsageError("--sweep_cfg", text, fix) from error
    return tuple(float(first + i * step) for i in range(int((last - first) / step) + 1))


def plot_sweep(file: pathlib.Path, results: Sequence[dict[str, Any]]) -> None:
    """Plots FID, sFID and Inception Score, as far as they are there, of results by rising scale."""
    from matplotlib.figure import Figure

    scales = [_scale_of(result) for result in results]
    names = [name for name in _PLOTTED if name in results[0]["metrics"]]
    figure = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        axis.plot(scales, [result["metrics"][name] for result in results], marker="o")
        axis.set(xlabel="guidance scale", ylabel=_PLOTTED[name])
        axis.grid(alpha=0.3)
    samples, features = results[0]["samples"], results[0]["features"]
    figure.suptitle(f"{samples['count']:,} samples, features: {features['name']}", fontsize=10)
    figure.savefig(file, dpi=120)


def _scale_of(result: dict[str, Any]) -> float:
    return result["samples"]["sampling"]["cfg_scale"]


def _but_scale(result: dict[str, Any]) -> dict[str, Any]:
    """All that must be equal in one sweep."""
    about = {key: result[key] for key in ("metric_names", "reference", "features")}
    sampling = {**result["samples"]["sampling"], "cfg_scale": None}
    return about | {"samples": {**result["samples"], "sampling": sampling}}


def _read_results(file: pathlib.Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text())["sweep"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError("--out", file, "is no result of a sweep: give another name") from error
