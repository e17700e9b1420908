"""Moving averages of parameters: one of constant decay, and any number that widen with the run.

The latter are those of EDM2 (Karras et al. 2023, arXiv 2312.02696, section 3 and appendix C). At
step t they weigh the parameters of each earlier step s by s ** gamma, so that their width in steps,
as a standard deviation, is always the same fraction of t: their relative width. After training,
averages of other widths can be rebuilt from snapshots of a few of them, because every one is a sum
over the same trajectory: the weights of the snapshots are those that bring the sum of their power
functions closest to the wanted one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.checkpoints.state import width_name
from dico_jax.errors import UsageError

# The relative width of a plain mean over all steps (gamma = 0), the widest.
MAX_WIDTH = 12**-0.5

# How far, of its own norm, the sum of power functions may be from the wanted one. What is rebuilt
# of a random walk is then off by less than 2%, mostly by less than 0.5%.
_MAX_MISFIT = 0.05

# Snapshots of smaller weights are not read; of 1,000 they would change nothing in float32.
_NEGLIGIBLE = 1e-10


class Snapshot(NamedTuple):
    """A power-function average that was kept.

    Attributes:
      step: the number of steps that it was taken after.
      width: its relative width.
      read: returns its tree of arrays.
    """

    step: int
    width: float
    read: Callable[[], Any]


def update_ema(ema, params, decay):
    """Ema * decay + params * (1 - decay), leaf by leaf, in the leaves' own dtype (float32).

    The published code starts from the initial parameters and updates after each optimizer step.
    """
    return jax.tree.map(lambda e, p: e * decay + p * (1 - decay), ema, params)


def parse_widths(widths: Sequence[float], snapshot_every_steps: int = 0) -> tuple[float, ...]:
    """The relative widths of `config.training.ema_widths`.

    Args:
      widths: the field.
      snapshot_every_steps: `config.training.ema_snapshot_every_steps`.

    Raises:
      UsageError: a width out of range or given twice, or snapshots of no averages at all.
    """
    widths = tuple(widths)
    field, every = "training.ema_widths", "training.ema_snapshot_every_steps"
    for width in widths:
        is_number = isinstance(width, int | float) and not isinstance(width, bool)
        if not is_number or not 0 < width < MAX_WIDTH:
            needs = f"must be a number above 0 and below {MAX_WIDTH:.4f}, such as 0.05"
            raise UsageError(field, widths, f": {width!r} {needs}")
    if len(set(widths)) < len(widths):
        raise UsageError(field, widths, ": give each width once")
    if snapshot_every_steps < 0:
        raise UsageError(every, snapshot_every_steps, "must be at least 0")
    if snapshot_every_steps and not widths:
        fix = "has nothing to keep: set config.training.ema_widths, such as 0.05,0.1, or use 0"
        raise UsageError(every, snapshot_every_steps, fix)
    return widths


def width_to_gamma(width: float) -> float:
    """The exponent of the power function of a relative width in (0, MAX_WIDTH].

    The density (gamma + 1) * x ** gamma on [0, 1] has the variance (gamma + 1) / ((gamma + 2) ** 2
    * (gamma + 3)), which is a cubic equation for gamma; one of its roots is not negative.
    """
    inverse = float(width) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_function_gain(step, width: float) -> jax.Array:
    """How much of a power-function average the newest parameters are, float32 scalar.

    It is 1 - (1 - 1 / step) ** (gamma + 1), with a relative precision that late steps need.

    Args:
      step: the number of this step, from 1 on; int32 or float32 scalar, traced or not.
      width: the relative width of the average.
    """
    newest = 1 / jnp.asarray(step, float)
    return -jnp.expm1((width_to_gamma(width) + 1) * jnp.log1p(-newest))


def update_width_emas(
    emas: Mapping[str, Any], params, step, widths: Sequence[float]
) -> dict[str, Any]:
    """The power-function averages after `step`.

    Args:
      emas: by `width_name`, a tree like `params` for each width. What they are before step 1 is
        forgotten.
      params: the parameters after this step.
      step: the number of this step, from 1 on; may be traced.
      widths: the relative widths.
    """

    def update(ema, width):
        gain = power_function_gain(step, width)
        # Not ema * decay + params * gain: with rounded factors, whose sum is not quite 1, late
        # averages would shrink or grow.
        return jax.tree.map(lambda e, p: e + (p - e) * gain, ema, params)

    return {width_name(width): update(emas[width_name(width)], width) for width in widths}


def solve_weights(
    snapshot_steps: Sequence[int],
    snapshot_widths: Sequence[float],
    target_step: int,
    target_width: float,
) -> tuple[np.ndarray, float]:
    """The weights of snapshots whose sum is nearest to an average, and how far off it is.

    Least squares between power functions, with the sum held, so that parameters that do not change
    come back as they are.

    Args:
      snapshot_steps: the step of each snapshot, from 1 on.
      snapshot_widths: the relative width of each.
      target_step: of the average.
      target_width: of the average.

    Returns:
      Weights, float64 (N,), of sum 1; and the distance of the weighted power functions from the
      wanted one, relative to its norm.

    Raises:
      ValueError: no snapshot, or two of the same step and width.
    """
    pairs = list(zip(snapshot_steps, snapshot_widths, strict=True))
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError(f"snapshots must be there, and different: {pairs}")
    gram, products, scales = _inner_products(
        snapshot_steps, snapshot_widths, target_step, target_width
    )
    # The sum as a Lagrange multiplier; its row is scaled like the others.
    row = scales / np.linalg.norm(scales)
    system = np.block([[gram, row[:, None]], [row, np.zeros((1, 1))]])
    units = np.linalg.solve(system, np.append(products, 1 / np.linalg.norm(scales)))[:-1]
    return units * scales, math.sqrt(max(0.0, 1 - 2 * units @ products + units @ gram @ units))


def rebuild(snapshots: Sequence[Snapshot], target_step: int, target_width: float) -> Any:
    """An average of any width from snapshots of others, read one after the other.

    Args:
      snapshots: of one run. Those after `target_step` are not used.
      target_step: the step of the average: that of a snapshot.
      target_width: its relative width, in (0, MAX_WIDTH).

    Returns:
      A tree of float32 NumPy arrays; a width that was tracked comes back to the bit.

    Raises:
      UsageError: the width is out of range, or the snapshots are too few or too far apart for it.
    """
    if not 0 < target_width < MAX_WIDTH:
        raise UsageError(
            f"--ema_width={target_width} must be above 0 and below {MAX_WIDTH:.4f}, such as 0.05"
        )
    used = [snapshot for snapshot in snapshots if snapshot.step <= target_step]
    tracked = [s for s in used if (s.step, s.width) == (target_step, target_width)]
    if tracked:
        return jax.tree.map(lambda x: np.array(x, np.float32), tracked[0].read())
    steps, widths = [s.step for s in used], [s.width for s in used]
    if target_step not in steps:
        raise UsageError(f"--ema_width={target_width}: step {target_step} has no snapshot")
    weights, error = solve_weights(steps, widths, target_step, target_width)
    if not error <= _MAX_MISFIT:
        raise UsageError(
            f"--ema_width={target_width} cannot be rebuilt from the {len(used)} snapshots of "
            f"widths {', '.join(map(str, sorted(set(widths))))} up to step {target_step} (off by "
            f"{error:.0%}): use a width nearer to those, or a run with more snapshots (a smaller "
            "config.training.ema_snapshot_every_steps)"
        )
    kept = [(w, s) for w, s in zip(weights, used, strict=True) if abs(w) > _NEGLIGIBLE]
    total = None
    for weight, snapshot in kept:
        total = _add(total, snapshot.read(), np.float32(weight))
    return total


def _add(total: Any, tree: Any, weight: np.float32) -> Any:
    """Total + weight * tree in float32, where a total of None is 0; changes `total`."""
    if total is None:
        return jax.tree.map(lambda x: np.multiply(x, weight, dtype=np.float32), tree)
    return jax.tree.map(
        lambda a, x: np.add(a, np.multiply(x, weight, dtype=np.float32), out=a), total, tree
    )


def _inner_products(
    steps: Sequence[int], widths: Sequence[float], target_step: int, target_width: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner products of power functions of norm 1: among snapshots, with the target, and scales.

    The scales are the target's norm over that of each snapshot.
    """
    t = np.asarray(steps, np.float64)
    gamma = np.array([width_to_gamma(width) for width in widths])
    target = (np.float64(target_step), np.float64(width_to_gamma(target_width)))
    log_norm = _log_inner_product(t, gamma, t, gamma) / 2
    target_log_norm = _log_inner_product(*target, *target) / 2
    gram = _log_inner_product(t[:, None], gamma[:, None], t, gamma)
    products = _log_inner_product(t, gamma, *target)
    return (
        np.exp(gram - log_norm[:, None] - log_norm),
        np.exp(products - log_norm - target_log_norm),
        np.exp(target_log_norm - log_norm),
    )


def _log_inner_product(t1, gamma1, t2, gamma2):
    """The logarithm of the integral of two densities (gamma + 1) * x ** gamma / t ** (gamma + 1).

    Each is over [0, t], and 0 beyond: so the integral ends at the smaller t. A ratio of times is
    all that is raised to a power, and not above 1.
    """
    first, last = np.minimum(t1, t2), np.maximum(t1, t2)
    gamma_of_last = np.where(t1 <= t2, gamma2, gamma1)
    factors = np.log(gamma1 + 1) + np.log(gamma2 + 1) - np.log(gamma1 + gamma2 + 1) - np.log(last)
    return factors + gamma_of_last * (np.log(first) - np.log(last))
