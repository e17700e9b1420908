"""Metrics of a step, and their means over steps."""

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


def quarter_losses(mse: jax.Array, t: jax.Array, num_timesteps: int) -> dict[str, PartialMean]:
    """The error by how noisy the examples are, in quarters of the timesteps.

    Sums run over the whole batch, however it is split over devices. An example that is not finite
    spoils its own quarter alone.

    Args:
      mse: (N,) mean squared error per example.
      t: (N,) int timesteps, 0..num_timesteps - 1.
      num_timesteps: of the process.

    Returns:
      "mse_t0_25" (least noise), "mse_t25_50", "mse_t50_75", "mse_t75_100".
    """
    quarter = t * NUM_QUARTERS // num_timesteps
    member = quarter[:, None] == jnp.arange(NUM_QUARTERS)  # (N, 4)
    totals = jnp.where(member, mse[:, None], 0).sum(0, dtype=jnp.float32)
    weights = member.sum(0, dtype=jnp.float32)
    return {
        f"mse_t{25 * i}_{25 * (i + 1)}": PartialMean(totals[i], weights[i])
        for i in range(NUM_QUARTERS)
    }


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
