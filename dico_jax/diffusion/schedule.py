"""Noise schedules, respacing, and every table that follows from them, in NumPy float64.

Tables stay on the host in float64 and are cast where they are used: computed in float32, variances
would be off by up to 2e-4.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence

import numpy as np

from dico_jax.errors import UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of one diffusion process of T steps; each is (T,), read-only, index 0 cleanest.

    Float64 except `timestep_map`. Symbols as in DDPM (arXiv 2006.11239), sections 2 and 3.2. Equal
    only to itself, so that it can be hashed (a `Diffusion` may be a static argument of `jax.jit`).

    Attributes:
      betas: beta_t, the variance that step t adds.
      alphas_cumprod: alpha-bar_t, the share of the signal's variance that is left after step t.
      alphas_cumprod_prev: alpha-bar_{t-1}; 1 at index 0.
      posterior_variance: beta-tilde_t, the variance of q(x_{t-1} | x_t, x_0), equation 7; 0 at
        index 0.
      posterior_log_variance_clipped: its logarithm, with entry 1 in place of log 0 at index 0.
      posterior_mean_coef1: factor of x_0 in the mean of q(x_{t-1} | x_t, x_0), equation 7.
      posterior_mean_coef2: factor of x_t in it.
      timestep_map: int64; the original timestep of each step, ascending, which the model is given.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray
    timestep_map: np.ndarray

    def __post_init__(self):
        for field in dataclasses.fields(self):
            getattr(self, field.name).flags.writeable = False

    def __repr__(self):
        kept = f" of timesteps 0 to {self.timestep_map[-1]}" if self.num_steps > 1 else ""
        return f"Schedule({self.num_steps} steps{kept}, beta to {self.betas[-1]:.4g})"

    @property
    def num_steps(self) -> int:
        """T, the number of steps of this (respaced) process."""
        return len(self.betas)


def make_schedule(
    noise_schedule: str = "linear",
    num_steps: int = 1000,
    respacing: str | int | Sequence[int] | None = "",
) -> Schedule:
    """The tables of `beta_schedule(noise_schedule, num_steps)` on the steps that respacing keeps.

    See `respaced_timesteps`.
    """
    betas = beta_schedule(noise_schedule, num_steps)
    return schedule_of(betas, respaced_timesteps(num_steps, respacing))


def schedule_of(betas: np.ndarray, kept: np.ndarray) -> Schedule:
    """The tables of a process of `betas` on the timesteps that are kept, ascending.

    The betas of the short process are recomputed from the kept alpha-bars (improved DDPM, arXiv
    2102.09672, equation 19): its marginals are the original ones.
    """
    alphas_cumprod = np.cumprod(1.0 - betas)[kept]
    betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas)
    prev = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1.0 - prev) / (1.0 - alphas_cumprod)
    return Schedule(
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=prev,
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=np.log(replace_first(posterior_variance, betas)),
        posterior_mean_coef1=betas * np.sqrt(prev) / (1.0 - alphas_cumprod),
        posterior_mean_coef2=(1.0 - prev) * np.sqrt(alphas) / (1.0 - alphas_cumprod),
        timestep_map=kept,
    )


def replace_first(variance: np.ndarray, single: np.ndarray) -> np.ndarray:
    """`variance` (T,) with entry 1 at index 0 too, where a step adds no noise.

    A process of one step has no entry 1 and takes `single` instead (nothing published does that).
    """
    return np.append(variance[1], variance[1:]) if len(variance) > 1 else np.array(single)


def beta_schedule(name: str, num_steps: int) -> np.ndarray:
    """The betas of an original process: (num_steps,) float64 in (0, 1).

    Args:
      name: "linear" (DDPM, arXiv 2006.11239, section 4: 1e-4 to 0.02 for 1000 steps, and with
        other numbers of steps as much noise in total) or "squaredcos_cap_v2" (improved DDPM, arXiv
        2102.09672, equation 17: the squared cosine, betas capped at 0.999).
      num_steps: the number of steps.

    Raises:
      UsageError: an unknown name, or a number of steps for which a beta would not be in (0, 1).
    """
    if num_steps < 1:
        raise UsageError("diffusion_steps", num_steps, "must be at least 1; the usual is 1000")
    if name == "linear":
        scale = 1000 / num_steps
        if scale * 0.02 >= 1:
            fix = "is too few for noise_schedule='linear', whose betas would reach 1: use at least"
            fix = f"{fix} 21, or 1000 with timestep_respacing='{num_steps}'"
            raise UsageError("diffusion_steps", num_steps, fix)
        return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)
    if name == "squaredcos_cap_v2":
        shares = (i / num_steps for i in range(num_steps + 1))
        signal = np.array([math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2 for s in shares])
        return np.minimum(1.0 - signal[1:] / signal[:-1], 0.999)
    raise UsageError("noise_schedule", name, "is unknown: use 'linear' or 'squaredcos_cap_v2'")


def with_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Betas whose last step leaves no signal (arXiv 2305.08891, algorithm 1): (T,), the last 1.

    The square roots of alpha-bar are shifted to end at 0, and scaled to begin where they did.
    """
    signal = np.sqrt(np.cumprod(1.0 - betas))
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    return 1.0 - (signal / np.append(1.0, signal[:-1])) ** 2


def respaced_timesteps(
    num_steps: int, respacing: str | int | Sequence[int] | None = ""
) -> np.ndarray:
    """The timesteps, of 0..num_steps-1, that a shorter process keeps: int64, ascending.

    Args:
      num_steps: steps of the original process.
      respacing: "" or None keeps all. "250" or 250 keeps that many, evenly spaced, first and last
        included. "10,15,20" or (10, 15, 20) cuts the process into sections as equal as possible
        (remainders go to the first ones) and keeps that many of each, first and last of a section
        included. "ddim50" keeps every k-th from timestep 0, with the smallest whole k that gives
        exactly 50 (DDIM, arXiv 2010.02502).

    Raises:
      UsageError: a respacing that is not one of these, or that asks for more than there is.
    """
    if respacing is None or (isinstance(respacing, str) and not respacing.strip()):
        return np.arange(num_steps, dtype=np.int64)
    shown = f"timestep_respacing={respacing!r}"
    strided = isinstance(respacing, str) and respacing.strip().startswith("ddim")
    try:
        if isinstance(respacing, str):
            counts = [int(n) for n in respacing.strip().removeprefix("ddim").split(",")]
        else:
            counts = [operator.index(n) for n in np.atleast_1d(np.asarray(respacing))]
    except (TypeError, ValueError) as error:
        fix = "use '' (all steps), a number such as '250', '10,15,20' (per section), or 'ddim50'"
        raise UsageError(f"{shown} is not understood: {fix}") from error
    return (_strided if strided else _sections)(num_steps, counts, shown)


def _strided(num_steps: int, counts: list[int], shown: str) -> np.ndarray:
    # The largest stride tried is num_steps - 1, as in the published code: "ddim1" does not exist.
    lengths = {len(range(0, num_steps, k)): k for k in range(num_steps - 1, 0, -1)}
    count = counts[0]
    if len(counts) > 1 or count not in lengths:
        near = sorted(lengths, key=lambda n: abs(n - count))[:2]
        fix = f"use {' or '.join(repr(f'ddim{n}') for n in sorted(near)) or repr('')}"
        what = f"no whole stride over {num_steps} timesteps keeps exactly {count} of them"
        raise UsageError(f"{shown}: {what}; {fix}")
    return np.arange(0, num_steps, lengths[count], dtype=np.int64)


def _sections(num_steps: int, counts: list[int], shown: str) -> np.ndarray:
    if min(counts, default=0) < 0 or sum(counts) < 1:
        fix = "must keep at least 1 timestep, and none of its numbers be below 0"
        raise UsageError(f"{shown} {fix}")
    size, remainder = divmod(num_steps, len(counts))
    kept, start = [], 0
    for index, count in enumerate(counts):
        length = size + (index < remainder)
        if count > length:
            what = f"section {index + 1} of {len(counts)} has {length} timesteps (of {num_steps})"
            raise UsageError(f"{shown}: {what} and cannot keep {count}; use at most {length} there")
        kept.append(start + _spread(length, count))
        start += length
    return np.concatenate(kept)


def _spread(length: int, count: int) -> np.ndarray:
    """`count` of 0..length-1, evenly: 0, then one stride more each time, halves to even."""
    # A running float64 sum on purpose: multiples of the stride land on the other side of a half
    # for a quarter of all counts (of 1000: 21, 249, 999, ...), and the published samplers sum.
    steps = np.full(count, (length - 1) / max(count - 1, 1))
    steps[:1] = 0.0
    return np.rint(np.cumsum(steps)).astype(np.int64)
