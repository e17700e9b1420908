"""Averages of any width, rebuilt from snapshots of a few that a run has kept.

Every power-function average is a sum over the same trajectory, so the weights of the snapshots are
those that bring the sum of their power functions closest to the wanted one (EDM2, appendix C).
WORKDIR/ema_snapshots has one folder per step with an item for each width ("width_0_05") and `meta`
(the widths). In float16 other widths would be 2e-4 to 3e-3 off, instead of 1e-5 to 5e-4.
"""

import contextlib
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from dico_jax.checkpoints import reader
from dico_jax.checkpoints import steps as stored
from dico_jax.checkpoints.state import MAX_WIDTH, width_to_gamma
from dico_jax.checkpoints.writer import StepWriter
from dico_jax.errors import UsageError
from dico_jax.files import as_path

FOLDER = "ema_snapshots"
# How far, of its own norm, the sum of power functions may be from the wanted one. What is rebuilt
# of a random walk is then off by less than 2%, mostly by less than 0.5%.
_MAX_MISFIT = 0.05
# Snapshots of smaller weights are not read; of 1,000 they would change nothing in float32.
_NEGLIGIBLE = 1e-10


class Snapshot(NamedTuple):
    step: int  # after which it was kept
    width: float  # the relative width of a power-function average
    read: Callable[[], Any]  # returns the tree of arrays


class EmaSnapshots(contextlib.ExitStack):
    """Keeps the averages of one run every so many steps, unless that is 0; a context manager."""

    def __init__(self, workdir: pathlib.Path, every_steps: int, last_step: int | None = None):
        super().__init__()
        self._every, self._last = every_steps, last_step
        if every_steps:
            self._writer = self.enter_context(StepWriter(workdir / FOLDER))

    def is_due(self, step: int) -> bool:
        return self._every > 0 and (step % self._every == 0 or step == self._last)

    def save(self, step: int, width_emas: Mapping[str, Any]) -> None:
        """Starts saving the averages after `step`, by `width_name`, if they are due."""
        if not self.is_due(step):
            return
        self._writer.wait()
        # The run may have returned to an earlier step, and need not go on as it did before.
        for later in [saved for saved in self._writer.steps() if saved >= step]:
            self._writer.remove(later)
        widths = {n: float(n.removeprefix("width_").replace("_", ".")) for n in width_emas}
        self._writer.write(step, width_emas, {"widths": widths})


def snapshot_steps(workdir: str) -> list[int]:
    return sorted(stored.saved_steps(workdir, FOLDER))


def list_snapshots(workdir: str, last_step: int) -> list[Snapshot]:
    """The snapshots of a workdir up to a step, unread, in the order of their steps."""
    folder = as_path(workdir).absolute() / FOLDER
    return [
        Snapshot(step, width, functools.partial(_read, folder / str(step), name))
        for step in snapshot_steps(workdir)
        if step <= last_step
        for name, width in stored.read_meta(folder / str(step), "widths")["widths"].items()
    ]


def rebuilt_ema(workdir: str, width: float, step: int | None = None) -> Any:
    """The averaged weights of any width, after a step that has snapshots (None: the newest).

    A parameter tree of float32 NumPy arrays; a width that was tracked comes back to the bit.
    """
    steps = snapshot_steps(workdir)
    if not steps:
        fix = f": {workdir} has no snapshots of averages (looked for {FOLDER}/STEP in it): train "
        fix += "with config.training.ema_widths and config.training.ema_snapshot_every_steps"
        raise UsageError("--ema_width", width, fix)
    step = steps[-1] if step is None else step
    if step not in steps:
        fix = f": {workdir} has snapshots of averages of steps {', '.join(map(str, steps))}"
        raise UsageError("--step", step, fix)
    return rebuild(list_snapshots(workdir, step), step, width)


def rebuild(snapshots: Sequence[Snapshot], target_step: int, target_width: float) -> Any:
    """An average of any width from snapshots of one run, read one after the other."""
    if not 0 < target_width < MAX_WIDTH:
        fix = f"must be above 0 and below {MAX_WIDTH:.4f}, such as 0.05"
        raise UsageError("--ema_width", target_width, fix)
    used = [snapshot for snapshot in snapshots if snapshot.step <= target_step]
    for snapshot in used:
        if (snapshot.step, snapshot.width) == (target_step, target_width):
            return jax.tree.map(lambda x: np.array(x, np.float32), snapshot.read())
    steps, widths = [s.step for s in used], [s.width for s in used]
    weights, error = solve_weights(steps, widths, target_step, target_width)
    if not error <= _MAX_MISFIT:
        there = f"widths {', '.join(map(str, sorted(set(widths))))} up to step {target_step}"
        fix = f"cannot be rebuilt from the {len(used)} snapshots of {there} (off by {error:.0%}): "
        fix += "use a width nearer to those, or a run with more snapshots"
        raise UsageError("--ema_width", target_width, fix)
    totals: tuple[Any, ...] = ()
    for weight, snapshot in zip(weights, used, strict=True):
        if abs(weight) > _NEGLIGIBLE:
            add = functools.partial(_add, np.float32(weight))
            totals = (jax.tree.map(add, snapshot.read(), *totals),)
    return totals[0]


def solve_weights(steps, widths, target_step, target_width) -> tuple[np.ndarray, float]:
    """The weights of snapshots whose sum is nearest to an average, float64 (N,), and how far off.

    Least squares between power functions, relative to the norm of the wanted one. The weights have
    the sum 1, so that parameters that do not change come back as they are.
    """
    t = np.asarray(steps, np.float64)
    gamma = np.array([width_to_gamma(width) for width in widths])
    target = np.float64(target_step), np.float64(width_to_gamma(target_width))
    # Inner products of functions of norm 1; the scales are the target's norm over each one's.
    log_norm = _log_inner_product(t, gamma, t, gamma) / 2
    target_log_norm = _log_inner_product(*target, *target) / 2
    gram = _log_inner_product(t[:, None], gamma[:, None], t, gamma)
    gram = np.exp(gram - log_norm[:, None] - log_norm)
    products = np.exp(_log_inner_product(t, gamma, *target) - log_norm - target_log_norm)
    scales = np.exp(target_log_norm - log_norm)
    # The sum as a Lagrange multiplier; its row is scaled like the others.
    row = scales / np.linalg.norm(scales)
    system = np.block([[gram, row[:, None]], [row, np.zeros((1, 1))]])
    units = np.linalg.solve(system, np.append(products, 1 / np.linalg.norm(scales)))[:-1]
    return units * scales, math.sqrt(max(0.0, 1 - 2 * units @ products + units @ gram @ units))


def weights_digest(folder: str, step: int, weights: str = "ema", rebuilt: bool = False) -> str:
    """sha256 (hex) of the weights of a step of a run or conversion, by their files' checksums.

    `rebuilt`: of all that `rebuilt_ema` makes averages of after that step, whatever their width.
    """
    name, item = (FOLDER, "") if rebuilt else (stored.FOLDER, stored.ITEMS[weights])
    sums = []
    for kept in [s for s in snapshot_steps(folder) if s <= step] if rebuilt else [step]:
        path = as_path(folder) / name / str(kept)
        recorded = stored.recorded_checksums(path, item)
        sums.append(recorded or stored.checksums(path, stored.files_of(path, item)))
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _log_inner_product(t1, gamma1, t2, gamma2):
    """The log of the integral of two densities (gamma + 1) * x ** gamma / t ** (gamma + 1)."""
    # Each is over [0, t], and 0 beyond: so the integral ends at the smaller t. A ratio of times is
    # all that is raised to a power, and not above 1.
    first, last = np.minimum(t1, t2), np.maximum(t1, t2)
    gamma_of_last = np.where(t1 <= t2, gamma2, gamma1)
    factors = np.log(gamma1 + 1) + np.log(gamma2 + 1) - np.log(gamma1 + gamma2 + 1) - np.log(last)
    return factors + gamma_of_last * (np.log(first) - np.log(last))


def _add(weight: np.float32, leaf: np.ndarray, total: np.ndarray | None = None) -> np.ndarray:
    part = np.multiply(leaf, weight, dtype=np.float32)
    return part if total is None else np.add(total, part, out=total)


def _read(folder: pathlib.Path, name: str) -> Any:
    item = stored.verified(folder, name)
    try:
        leaves = {path: leaf.read() for path, leaf in reader.stored_leaves(item).items()}
    except (OSError, ValueError, KeyError) as error:
        raise stored.DamagedCheckpointError(item, error, stored.ADVICE) from error
    return flax.traverse_util.unflatten_dict(leaves)
