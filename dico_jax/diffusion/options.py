"""How to sample: the fields of `config.sampling`, and the guidance scales that follow from them."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from dico_jax.diffusion.guidance import check_cfg_channels
from dico_jax.diffusion.objectives import Objective
from dico_jax.diffusion.paths import alpha_sigma, check_eta
from dico_jax.diffusion.solvers import find_solver
from dico_jax.errors import UsageError

# How much of the guidance there is, by the share of the steps that are done, from 0 to 1.
CFG_SCHEDULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant": np.ones_like,
    "linear": lambda done: done,
    "cosine": lambda done: (1 - np.cos(np.pi * done)) / 2,
}


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to sample: the seed, and fields of `config.sampling`; see configs/default.py."""

    seed: int = 0
    sampler: str = "ddpm"
    ddim_eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: str = "first_three"
    cfg_interval: str = ""
    cfg_schedule: str = "constant"
    cfg_rescale: float = 0.0

    def __post_init__(self):
        solver = find_solver(self.sampler, "sampling.sampler")
        check_cfg_channels(self.cfg_channels, "sampling.cfg_channels")
        check_eta(self.ddim_eta, solver, "sampling.ddim_eta")
        if not 0 <= self.cfg_scale < np.inf:
            raise UsageError("sampling.cfg_scale", self.cfg_scale, "must be at least 0 and finite")
        if self.cfg_schedule not in CFG_SCHEDULES:
            fix = f"is unknown: use one of {', '.join(CFG_SCHEDULES)}"
            raise UsageError("sampling.cfg_schedule", self.cfg_schedule, fix)
        if not 0 <= self.cfg_rescale <= 1:
            raise UsageError("sampling.cfg_rescale", self.cfg_rescale, "must be from 0 to 1")
        self.interval()

    def interval(self) -> tuple[float, float]:
        """The noise levels, sigma / alpha, between which there is guidance; or UsageError."""
        if not self.cfg_interval:
            return 0.0, math.inf
        try:
            low, high = (float(part) for part in self.cfg_interval.split(":"))
        except ValueError:
            low, high = math.nan, math.nan
        if not 0 <= low < high:
            fix = "must be LOW:HIGH, noise levels sigma / alpha from 0 on, such as 0.3:5"
            raise UsageError("sampling.cfg_interval", self.cfg_interval, fix)
        return low, high

    def scales(self, objective: Objective) -> np.ndarray:
        """The guidance scale at every point of an objective's path, (T + 1,) float64; 1 for none.

        Raises:
          UsageError: no point of the path lies in `cfg_interval`.
        """
        alpha, sigma = alpha_sigma(objective)
        with np.errstate(divide="ignore"):
            level = sigma / alpha
        low, high = self.interval()
        inside = (low < level) & (level <= high)  # arXiv 2404.07724
        if not inside[1:].any():
            ends = f"{level[1]:.3g} to {level[-1]:.3g}"
            fix = f"holds none of the {objective.num_steps} noise levels of the steps, {ends}"
            raise UsageError("sampling.cfg_interval", self.cfg_interval, fix)
        done = np.append(1.0, np.linspace(1.0, 0.0, objective.num_steps))  # by point, clean first
        share = np.where(inside, CFG_SCHEDULES[self.cfg_schedule](done), 0.0)
        # No sum where it is the whole scale, which no rounding is to change.
        return np.where(share == 1, self.cfg_scale, 1.0 + (self.cfg_scale - 1.0) * share)
