"""Metrics of a step, and their means over steps."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

NUM_QUARTERS = 4


def quarter_losses(terms: Mapping[str, jax.Array], progress) -> dict[str, Average]:
    """Loss terms by how noisy the examples are, in quarters of the way to noise.

    Sums run over the whole batch, however it is split over devices. An example that is not finite
    spoils its own quarter alone. An Average has two parts, the sum and the number of values, so
    that the mean over several steps is that over all their examples.

    Args:
      terms: (N,) per example, by name.
      progress: (N,) in [0, 1), see `Objective.progress`.

    Returns:
      By name, such as "mse_t0_25" (least noise), "mse_t25_50", "mse_t50_75", "mse_t75_100".
    """
    quarter = jnp.floor(progress * NUM_QUARTERS)
    return {
        f"{name}_t{25 * i}_{25 * (i + 1)}": Average.from_model_output(values, mask=quarter == i)
        for name, values in terms.items()
        for i in range(NUM_QUARTERS)
    }


def mean_of_steps(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps whose flag "finite" is true (over all, if none is), in float64.

    Args:
      steps: the metrics of each step, read from the devices; numbers count once per step, an
        Average by the number of its values.

    Returns:
      Means by name, without "finite", and without an Average of no values at all.
    """
    kept = [step for step in steps if step["finite"]] or steps
    means = {}
    for name in kept[0]:
        mean = functools.reduce(Average.merge, (_average(step[name]) for step in kept))
        if name != "finite" and mean.count > 0:
            means[name] = float(mean.compute())
    return means


def _average(value: Any) -> Average:
    average = value if isinstance(value, Average) else Average(total=value, count=1)
    return jax.tree.map(np.float64, average)
