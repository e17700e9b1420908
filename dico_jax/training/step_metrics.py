"""Metrics of a step, and their means over steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUM_QUARTERS = 4


class PartialMean(NamedTuple):
    """A mean in two parts, so that the mean over several steps is that over all their examples.

    Attributes:
      total: sum of the values, float32 scalar.
      weight: how many there were, float32 scalar.
    """

    total: jax.Array
    weight: jax.Array


def quarter_losses(terms: Mapping[str, jax.Array], progress) -> dict[str, PartialMean]:
    """Loss terms by how noisy the examples are, in quarters of the way to noise.

    Sums run over the whole batch, however it is split over devices. An example that is not finite
    spoils its own quarter alone.

    Args:
      terms: (N,) per example, by name.
      progress: (N,) in [0, 1), see `Objective.progress`.

    Returns:
      By name, such as "mse_t0_25" (least noise), "mse_t25_50", "mse_t50_75", "mse_t75_100".
    """
    quarter = jnp.floor(progress * NUM_QUARTERS)
    member = quarter[:, None] == jnp.arange(NUM_QUARTERS)  # (N, 4)
    weights = member.sum(0, dtype=jnp.float32)
    means = {}
    for name, values in terms.items():
        totals = jnp.where(member, values[:, None], 0).sum(0, dtype=jnp.float32)
        for i in range(NUM_QUARTERS):
            means[f"{name}_t{25 * i}_{25 * (i + 1)}"] = PartialMean(totals[i], weights[i])
    return means


def mean_of_steps(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps whose flag "finite" is true (over all, if none is).

    Args:
      steps: the metrics of each step, read from the devices; numbers count once per step, a
        `PartialMean` by its weight.

    Returns:
      Means by name, without "finite", and without a PartialMean of no examples at all.
    """
    kept = [step for step in steps if step["finite"]] or steps
    means = {}
    for name, value in kept[0].items():
        values = [step[name] for step in kept]
        if isinstance(value, PartialMean):
            weight = np.sum([v.weight for v in values], dtype=np.float64)
            if weight > 0:
                means[name] = float(np.sum([v.total for v in values], dtype=np.float64) / weight)
        elif name != "finite":
            means[name] = float(np.mean(values, dtype=np.float64))
    return means
