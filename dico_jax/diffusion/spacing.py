"""Where on its path an objective is sampled: spacings of the steps, by name.

"linear" is even in time, as the published samplers are; "quadratic" (DDIM, arXiv 2010.02502,
section D.2) has more steps near the data; "trailing" (arXiv 2305.08891, section 3.3) is even and
starts at the noisiest time however few the steps are; "log_snr" is even in log(alpha / sigma)
(DPM-Solver, arXiv 2206.00927); "karras" (EDM, arXiv 2206.00364, equation 5) in the 7th root of
sigma / alpha.
"""

import numpy as np

from dico_jax.diffusion.schedule import respaced_timesteps
from dico_jax.errors import UsageError

SPACINGS = ("linear", "quadratic", "trailing", "log_snr", "karras")

_RHO = 7.0
_NOISIEST, _CLEANEST = 80.0, 0.002  # sigma / alpha of EDM, for paths that have all of them
_HIGHEST = 160.0  # of a process, whose linear schedule ends there; others leave even less signal


def check_spacing(name: str, field: str = "spacing") -> None:
    """Raises UsageError for a name that is not in `SPACINGS`."""
    if name not in SPACINGS:
        raise UsageError(field, name, f"is unknown: use one of {', '.join(SPACINGS)}")


def spaced_timesteps(spacing: str, num_steps: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    """The timesteps of a process of whole ones that `num_steps` steps keep: int64, ascending.

    Points fall on the nearest timestep, and where several would be the same, on the next ones.
    "log_snr" and "karras" have sigma / alpha from 160 at most, in place of which is the last.

    Args:
      spacing: a name in `SPACINGS`.
      num_steps: how many are kept.
      alphas_cumprod: alpha-bar of all timesteps, (T,).

    Raises:
      UsageError: an unknown spacing, or more steps than timesteps.
    """
    check_spacing(spacing)
    total = len(alphas_cumprod)
    if spacing == "linear" or not 1 <= num_steps <= total:  # which says what is wrong
        return respaced_timesteps(total, num_steps)
    if spacing == "trailing":
        wanted = np.rint(total - np.arange(num_steps) * total / num_steps)[::-1] - 1
    elif spacing == "quadratic":
        wanted = np.linspace(np.sqrt(total - 1), 0, num_steps)[::-1] ** 2
    else:
        ratios = np.sqrt(1.0 / np.maximum(alphas_cumprod, 1e-20) - 1.0)  # sigma / alpha
        found = _ratios(spacing, num_steps, min(ratios[-1], _HIGHEST), ratios[0])
        wanted = np.interp(np.log(found), np.log(ratios), np.arange(total))
        wanted[-1] = total - 1
    each = np.arange(num_steps)
    apart = np.maximum.accumulate(np.rint(wanted).astype(np.int64) - each) + each
    return np.minimum(apart, total - num_steps + each)


def continuous_times(spacing: str, num_steps: int) -> np.ndarray:
    """The points of the linear path, x_t = (1 - t) x_0 + t noise: (num_steps + 1,), 0 to 1.

    "trailing" is "linear" here. "log_snr" and "karras" have sigma / alpha from 80, in place of
    which the first point has 1, to 0.002, and then 0.

    Raises:
      UsageError: an unknown spacing, or no step.
    """
    check_spacing(spacing)
    if num_steps < 1:
        raise UsageError("num_steps", num_steps, "must be at least 1")
    if spacing in ("linear", "trailing"):
        return np.linspace(0.0, 1.0, num_steps + 1)
    if spacing == "quadratic":
        return np.linspace(0.0, 1.0, num_steps + 1) ** 2
    ratios = _ratios(spacing, num_steps, _NOISIEST, _CLEANEST)
    times = ratios / (1.0 + ratios)
    times[-1] = 1.0
    return np.append(0.0, times)


def _ratios(spacing: str, count: int, noisiest: float, cleanest: float) -> np.ndarray:
    """`count` values of sigma / alpha, ascending to the noisiest."""
    if spacing == "log_snr":
        return np.exp(np.linspace(np.log(noisiest), np.log(cleanest), count))[::-1]
    ends = noisiest ** (1 / _RHO), cleanest ** (1 / _RHO)
    return (np.linspace(*ends, count) ** _RHO)[::-1]
