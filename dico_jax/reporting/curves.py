"""Curves made small enough to draw, and beside them what was published of the same networks."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

BAND = 0.02  # of a landmark's loss, that a run should stay within
_PUBLISHED = json.loads((pathlib.Path(__file__).parent / "published.json").read_text())
METRICS = _PUBLISHED["numbers"]["columns"][2:]
_RECIPE = {  # without which losses do not compare
    "diffusion.objective": "noise", "diffusion.diffusion_steps": 1000,
    "diffusion.noise_schedule": "linear", "diffusion.min_snr_gamma": 0,
    "diffusion.zero_terminal_snr": False, "model.learn_sigma": True, "model.in_channels": 4,
    "data.image_size": 256,
}  # fmt: skip
_USUAL = {"data.batch_size": 256, "optimizer.learning_rate": 1e-4, "training.ema_decay": 0.9999}


@dataclasses.dataclass(frozen=True)
class Published:
    """What is known of a network that was published: losses by step, rows of numbers."""

    name: str
    losses: dict[int, float]
    rows: list[list[Any]]  # step, guidance ("": none), METRICS
    caveats: list[str]  # in what a run differs from the published recipe

    def loss_at(self, steps: np.ndarray) -> np.ndarray:
        """Between landmarks straight in log(step), (n,)."""
        return np.interp(np.log(steps), np.log([*self.losses]), [*self.losses.values()])

    def numbers(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric without guidance."""
        at = 2 + METRICS.index(metric) if metric in METRICS else 0
        rows = [(r[0], r[at]) for r in self.rows if at and not r[1] and r[at] is not None]
        return tuple(np.array(rows, float).reshape(-1, 2).T)  # type: ignore[return-value]


def published_of(config: Mapping[str, Any]) -> Published | None:
    """What was published of the network of a flat config, where it learns the same."""
    name, size = str(config.get("model.name")), config.get("data.image_size")
    rows = _PUBLISHED["numbers"].get(f"{name} at {size}", [])
    same = all(config.get(field) == value for field, value in _RECIPE.items())
    losses = _PUBLISHED["losses"].get(name, []) if same else []
    if not rows and not losses:
        return None
    found = [f"{k.split('.')[1]} {config.get(k)} (published {v})" for k, v in _USUAL.items()
             if config.get(k) != v and name != "DiCo-H"]  # fmt: skip
    return Published(
        name, dict(zip(_PUBLISHED["losses"]["steps"], losses, strict=False)), rows, found
    )


def compared(published: Published, steps: np.ndarray, loss: np.ndarray) -> list[str]:
    """A sentence per landmark that a run has reached: how far its loss is from the released one."""
    said = []
    for step, theirs in published.losses.items():
        near = (steps > step - max(100, 0.02 * step)) & (steps <= step) & np.isfinite(loss)
        if not near.any():
            continue
        # The released logs average 100 steps; where fewer lines are there, one is what there is.
        last = near & (steps > step - 100)
        ours = loss[last if last.any() else near].mean()
        off = ours / theirs - 1
        where = "above" if off > 0 else "below"
        inside = "within" if abs(off) <= BAND else "outside"
        said.append(
            f"loss at {short(step)} is {ours:.4f}, {abs(off):.1%} {where} the released run "
            f"({theirs:.4f}): {inside} the band of {BAND:.0%}"
        )
    return said


def bucketed(
    steps: np.ndarray, columns: Mapping[str, np.ndarray], most: int
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """At most `most` points of curves (n,): the last step of each, means, and (least, greatest).

    What is not finite is left out; a point of nothing else is NaN.
    """
    count = len(steps)
    if not count:
        return steps, dict(columns), {k: (v, v) for k, v in columns.items()}
    starts = np.unique(np.linspace(0, count, min(most, count), endpoint=False).astype(int))
    means, ranges = {}, {}
    for name, values in columns.items():
        good = np.isfinite(values)
        number = np.add.reduceat(good, starts, dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            means[name] = np.add.reduceat(np.where(good, values, 0), starts) / number
        none = number == 0
        least = np.minimum.reduceat(np.where(good, values, np.inf), starts)
        greatest = np.maximum.reduceat(np.where(good, values, -np.inf), starts)
        ranges[name] = np.where(none, np.nan, least), np.where(none, np.nan, greatest)
    return steps[np.append(starts[1:], count) - 1], means, ranges


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """An exponential mean without bias of (n,), which keeps `weight` of what was; NaN is passed."""
    found, mean, total = np.full(len(values), np.nan), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
        found[i] = mean / total if total else np.nan
    return found


def model_key(config: Mapping[str, Any]) -> str:
    """Runs of the same key have losses that compare."""
    ways = ("dtype", "scan_blocks", "remat", "plain_ops", "class_dropout_prob", "text_dropout_prob")
    parts = [f"{k}={v}" for k, v in sorted(config.items()) if k.startswith("model.") and v
             is not None and k.split(".")[1] not in ways]  # fmt: skip
    terms = ("objective", "min_snr_gamma", "noise_schedule", "diffusion_steps")
    parts += [f"diffusion.{k}={config.get(f'diffusion.{k}')}" for k in terms]
    return "; ".join([*parts, f"data.image_size={config.get('data.image_size')}"])


def model_title(config: Mapping[str, Any]) -> str:
    name, size = config.get("model.name", "unknown model"), config.get("data.image_size")
    width = config.get("model.hidden_size")
    of = (
        f" of width {width}"
        if width and name in ("DiCo", "DiT", "TextDiCo", "IsoDiCo", "FCDM")
        else ""
    )
    at = f" at {size}x{size}" if size else ""
    return f"{name}{of}{at}, {config.get('diffusion.objective', 'unknown objective')}"


def short(number: float) -> str:
    """A count with K and M."""
    for size, letter in ((1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"
