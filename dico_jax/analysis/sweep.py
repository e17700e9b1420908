"""Variants of an experiment, trained with several seeds by `dico_jax.main` and compared."""

import dataclasses
import hashlib
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy import stats

from dico_jax.analysis.channels import MEASURES
from dico_jax.benchmarking.report import about, markdown
from dico_jax.config import check_fields, check_name, config_to_dict
from dico_jax.errors import TrainingStopped, UsageError, within
from dico_jax.experiment import experiment_from_config
from dico_jax.files import as_path, new_file, write_json
from dico_jax.models import count_parameters, forward_macs
from dico_jax.reporting.figures import HEIGHT, WIDTH, save_figures
from dico_jax.reporting.runs import read_runs
from dico_jax.terminal import Bar

RESULT = "result.json"  # of a run in its folder
_INSIDE = "channels/"  # of metrics that `analyze channels` measures of the trained network
_CONFIDENCE = 0.95
_LAST = 0.1  # of the steps, whose mean a metric of training is
_NAME = re.compile(r"[\w.+-]+")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network and its training, but for the seed."""

    name: str
    fields: dict[str, Any]  # that it changes
    config: ConfigDict
    parameters: int
    multiply_adds: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep trains: the first variant is what the others are compared with."""

    file: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]  # in the order of the table; () for all

    def runs(self) -> Iterator[tuple[Variant, int, str]]:
        """Every run and its folder in that of the sweep: all variants of a seed, then the next."""
        for seed in self.seeds:
            for variant in self.variants:
                yield variant, seed, f"{variant.name}/{seed}"


def make_plan(path: str, config: ConfigDict, only: Sequence[str] | None = None) -> Plan:
    """The plan of a config file, whose every variant is checked; UsageError for what is wrong.

    Args:
      path: of the config file.
      config: what its get_config() gives, with what the command line changes.
      only: names of variants to take; all if None.
    """
    given = runpy.run_path(path).get("get_sweep")
    if given is None:
        raise UsageError("--config", path, "has no get_sweep(): see configs/ablation_digits.py")
    found = {"variants": {}, "seeds": (0,), "metrics": (), **given()}
    if unknown := found.keys() - {"variants", "seeds", "metrics"}:
        said = f"get_sweep() gives {min(unknown)}: use variants, seeds, metrics"
        raise UsageError("--config", path, said)
    variants, seeds = found["variants"], tuple(found["seeds"])
    if not variants or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError("--config", path, ": get_sweep() needs variants and seeds, each once")
    for name in only or ():
        if name not in variants:
            raise UsageError("--variants", name, f"is unknown: use some of {','.join(variants)}")
    made = [_variant(name, fields, config) for name, fields in variants.items()
            if only is None or name in only]  # fmt: skip
    return Plan(path, tuple(made), seeds, tuple(found["metrics"]))


def _variant(name: str, fields: Mapping[str, Any], config: ConfigDict) -> Variant:
    with within(f"variant {name}: "):
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no name of a folder: use letters, digits, . + and -")
        config = config.copy_and_resolve_references()
        for field in fields:
            check_name(field)
        with config.ignore_type():  # which is checked below
            config.update_from_flattened_dict(dict(fields))
        check_fields(config)
        experiment = experiment_from_config(config)
    macs = forward_macs(experiment.model, experiment.latent_shape)
    return Variant(name, dict(fields), config, count_parameters(experiment.model), macs)


def run(plan: Plan, workdir: str) -> list[str]:
    """Trains what has no result yet; a line for every run that failed.

    TrainingStopped where a run was told to stop, as by ^C: so is the sweep. UsageError where no
    run has a metric of the plan.
    """
    folder, failed = as_path(workdir), []
    todo = [one for one in plan.runs() if result_of(folder / one[2], one[0], one[1]) is None]
    with Bar(total=len(todo), desc="runs") as bar:
        for variant, seed, name in todo:
            bar.set_postfix_str(name)
            if said := _train(plan, variant, seed, folder / name):
                failed.append(f"{folder / name}: {said}")
            summary(plan, workdir)  # which refuses a metric that no run has
            bar.update()
    return failed


def _train(plan: Plan, variant: Variant, seed: int, folder: Any) -> str:
    """Runs `dico_jax.main`, which goes on where it was; "" or how it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    config, log = (folder.parent / f"{seed}.{end}" for end in ("json", "log"))
    out = folder / "channels"
    write_json(config, _config_of(variant, seed))
    commands = [["main", f"--config={config}", f"--workdir={folder}"]]
    looks = any(name.startswith(_INSIDE) for name in plan.metrics)
    if looks and not out.exists():
        commands.append(["analyze", "channels", f"--ckpt={folder}", f"--out={out}"])
    stopping = variant.config.training.preemption_exit_status
    for command, *args in commands:
        with log.open("ab") as stream:
            whole = [sys.executable, "-m", f"dico_jax.{command}", *args]
            status = _ended(subprocess.Popen(whole, stdout=stream, stderr=stream))
        if status in (130, stopping, -signal.SIGINT, -signal.SIGTERM):
            raise TrainingStopped(f"{folder} was told to stop: the same command goes on with it")
        if status:
            if status < 0:  # what a crash says last tells nothing
                return f"{command} was ended by signal {-status}: {log} may say why"
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            return f"{command} ended with status {status} ({''.join(last)})"
    metrics = _metrics(folder) | (_inside(out) if looks else {})
    write_json(folder / RESULT, {"config": _digest(variant, seed), "metrics": metrics})
    return ""


class _LeftToRun:
    """Leaves signals to a run, which saves and ends: a kill is passed on, ^C reaches it anyway.

    `told` is whether there was one: the sweep ends as well, also where the run was just done.
    """

    at_once: ClassVar[dict[int, int]] = {}  # see `dico_jax.cli`

    def __init__(self, process: subprocess.Popen):
        self._process, self.told = process, False

    def __call__(self, number: int, _frame: Any) -> None:
        self.told = True
        if number == signal.SIGTERM:
            self._process.terminate()


def _ended(process: subprocess.Popen) -> int:
    """The exit status of a run, once it has ended; 130 where it was told to."""
    left = _LeftToRun(process)
    before = {n: signal.signal(n, left) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
        return 130 if left.told else status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _inside(folder: Any) -> dict[str, float]:
    """The means over blocks and times of what `analyze channels` has measured of their outputs."""
    (network,) = json.loads((folder / "channels.json").read_text())["networks"].values()
    outputs = [layer["output"] for layer in network["layers"].values()]
    found = {}
    for name in MEASURES:
        values = [value for output in outputs for value in output[name] if value is not None]
        found[f"{_INSIDE}{name}"] = float(np.mean(values)) if values else math.nan
    return found


def _config_of(variant: Variant, seed: int) -> dict[str, Any]:
    return config_to_dict(variant.config) | {"seed": seed}


def _digest(variant: Variant, seed: int) -> str:
    config = json.dumps(_config_of(variant, seed), sort_keys=True)
    return hashlib.sha256(config.encode()).hexdigest()


def result_of(folder: Any, variant: Variant, seed: int) -> dict[str, Any] | None:
    """The result of a run of exactly this; None where there is none."""
    try:
        found = json.loads((folder / RESULT).read_text())
        return found if found["config"] == _digest(variant, seed) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _metrics(folder: Any) -> dict[str, float]:
    """Of a run its last evaluations, and the means of what was logged in its last steps."""
    (run_,), _ = read_runs([folder])
    found = {name: float(values[-1]) for name, (_, values) in run_.evaluations.items()}
    late = run_.steps > (1 - _LAST) * run_.last
    for name, values in run_.values.items():
        if np.isfinite(values[late]).any():
            found[name] = float(np.nanmean(values[late]))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of the width of its 95% interval (Student's t); NaN of one value."""
    n, mean = len(values), float(np.mean(values)) if len(values) else math.nan
    if n < 2:
        return mean, math.nan
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean, float(stats.t.ppf((1 + _CONFIDENCE) / 2, n - 1)) * spread


def summary(plan: Plan, workdir: str) -> dict[str, Any]:
    """Of every variant its cost, and of every metric the values by seed and their mean.

    Also the mean difference from the first variant, seed by seed; both with half of the width of
    their intervals.
    """
    folder, rows = as_path(workdir), []
    results = {
        (variant.name, seed): result["metrics"]
        for variant, seed, name in plan.runs()
        if (result := result_of(folder / name, variant, seed))
    }
    measured = {name for result in results.values() for name in result}
    for name in plan.metrics if results else ():
        if name not in measured:
            fix = f"is not measured: use some of {', '.join(sorted(measured))}"
            raise UsageError(f"{plan.file}: a metric of get_sweep()", name, fix)
    metrics = plan.metrics or sorted(measured)
    first = plan.variants[0].name
    for variant in plan.variants:
        row: dict[str, Any] = {"variant": variant.name, "fields": variant.fields}
        row |= {"parameters": variant.parameters, "multiply_adds": variant.multiply_adds}
        row["metrics"] = {}
        for metric in metrics:
            values = {s: results[variant.name, s][metric] for s in plan.seeds
                      if metric in results.get((variant.name, s), {})}  # fmt: skip
            apart = [value - results[first, s][metric] for s, value in values.items()
                     if metric in results.get((first, s), {})]  # fmt: skip
            mean, half = interval([*values.values()])
            row["metrics"][metric] = {"values": values, "mean": mean, "half_width": half}
            if variant.name != first:
                mean, half = interval(apart)
                row["metrics"][metric]["difference"] = {"mean": mean, "half_width": half}
        rows.append(row)
    return {"confidence": _CONFIDENCE, "seeds": plan.seeds, "metrics": metrics, "variants": rows}


def table(found: dict[str, Any]) -> str:
    """The summary in Markdown: mean +- half of the interval; * where the difference is not 0."""
    head = ["variant", "parameters", "multiply-adds", *found["metrics"]]
    lines = [head]
    for row in found["variants"]:
        macs = row["multiply_adds"]
        cells = [row["variant"], f"{row['parameters']:,}", "" if macs is None else f"{macs:,}"]
        for value in row["metrics"].values():
            apart = value.get("difference", {"mean": 0.0, "half_width": math.nan})
            star = "*" * (abs(apart["mean"]) > apart["half_width"])
            cells.append(f"{value['mean']:.4g} +- {value['half_width']:.2g}{star}")
        lines.append(cells)
    return markdown(lines)


def report(plan: Plan, workdir: str) -> str:
    """Writes sweep.json, sweep.md and figures into the workdir; the table."""
    folder, found = as_path(workdir), summary(plan, workdir)
    how = {
        "argv": ["dico_jax.sweep", *sys.argv[1:]],
        "config": os.path.basename(plan.file),
        **about(),
    }
    write_json(folder / "sweep.json", {"sweep_of_variants": found, **how})
    text = table(found)
    with new_file(folder / "sweep.md") as stream:
        stream.write(f"{text}\n".encode())
    save_figures([("sweep", figure(found))], folder)
    return text


def figure(found: dict[str, Any]) -> Figure:
    """A panel per metric: seeds as dots, means with their intervals, a line per variant."""
    metrics, rows = found["metrics"], found["variants"]
    columns = min(3, max(1, len(metrics)))
    lines = math.ceil(len(metrics) / columns) or 1
    height = max(HEIGHT, 0.4 + 0.25 * len(rows))
    made = Figure(figsize=(WIDTH * columns, height * lines))
    panels = made.subplots(lines, columns, squeeze=False, sharey=True).flat
    for metric, axes in zip(metrics, panels, strict=False):
        for place, row in enumerate(rows):
            of = row["metrics"][metric]
            seeds = [*of["values"].values()]
            axes.plot(seeds, [place] * len(seeds), ".", color="0.6", ms=4)
            half = np.nan_to_num(of["half_width"])
            axes.errorbar(of["mean"], place, xerr=half, fmt="o", ms=4, color="C0", capsize=3)
        axes.set_title(metric, fontsize="small")
        axes.set(yticks=range(len(rows)), yticklabels=[r["variant"] for r in rows])
        axes.invert_yaxis() if metric == metrics[0] else None
    for axes in [*panels]:  # that are left
        axes.set_visible(False)
    return made
