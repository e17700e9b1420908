"""What solvers are made of: the path from noise to data, and the steps along it."""

import abc
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.diffusion.objectives import Estimate, ModelFn, Objective
from dico_jax.errors import UsageError


class Trajectory(NamedTuple):
    """What a step leads to; stacked, every step of a loop, first step first: (T, N, ..., C) each.

    Attributes:
      x: x after the step.
      pred_x0: the x_0 that the step predicted.
    """

    x: jax.Array
    pred_x0: jax.Array


@dataclasses.dataclass(frozen=True)
class Path:
    """What a solver sees: the points of an objective's path, and the network at any of them.

    Points are numbered from 0, clean data, to T, noise: step i leads from point i + 1 to point i.

    Attributes:
      objective: what the network predicts, and the path.
      model_fn: model_fn(x, times) is the network's output; with `scales` a third argument is the
        point's.
      clip_denoised: clip the predicted x_0 to [-1, 1].
      scales: guidance scales at all points, (T + 1,), or None.
    """

    objective: Objective
    model_fn: ModelFn
    clip_denoised: bool = False
    scales: jax.Array | None = None

    def output(self, x, point, to=None) -> jax.Array:
        """What the network returns for x (N, ..., C) at a point (), for a step to point `to`."""
        until = None if to is None else self._time(to)
        times = self.objective.network_time(self._time(point), until)
        scale = () if self.scales is None else (self.scales[point],)
        return self.model_fn(x, jnp.broadcast_to(times, (x.shape[0], *times.shape)), *scale)

    def estimate(self, x, point) -> Estimate:
        """The x_0 and noise that the network sees in x at a point ()."""
        output, time = self.output(x, point), self._time(point)
        return self.objective.estimate(output, x, time, self.clip_denoised)

    def _time(self, point) -> jax.Array:
        return jnp.asarray(self.objective.times)[jnp.asarray(point)]

    @functools.cached_property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """The factors of x_0 and noise at all points, (T + 1,) float64 each."""
        return alpha_sigma(self.objective)


def alpha_sigma(objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """The factors of x_0 and noise at all points: (T + 1,) float64."""
    alpha, sigma = objective.alpha_sigma(objective.times)
    return np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)


@dataclasses.dataclass(frozen=True)
class Solver(abc.ABC):
    """A way from noise to data: `init`, then `step` T times, then `end`, over a carry of its own.

    `eta` is how much fresh noise a step adds, for solvers that have it (`takes_eta`).
    """

    takes_eta: ClassVar[bool] = False
    eta: float = 0.0

    def __post_init__(self):
        check_eta(self.eta, type(self))

    @property
    def draws_noise(self) -> bool:
        """Whether steps add fresh noise."""
        return False

    @classmethod
    def check(cls, objective: Objective) -> None:
        """Raises UsageError where there is no such way along the path of an objective."""
        return

    def init(self, path: Path, x: jax.Array) -> Any:
        """The carry at first, of x at point T: a tree of arrays; x alone by default."""
        return x

    @abc.abstractmethod
    def step(self, path: Path, carry: Any, i, noise) -> tuple[Any, Trajectory]:
        """Step i, traced int32 () from T - 1 to 0, of the carry of the step before.

        `path` calls the network, as often as one likes; noise is standard normal like x, or None
        unless `draws_noise`. Returns the next carry, with the dtypes of this one, and x at point i
        with the x_0 predicted.
        """

    def end(self, path: Path, carry: Any) -> jax.Array:
        """The samples."""
        return carry


def check_eta(eta: float, solver: type[Solver], field: str = "eta") -> None:
    """Raises UsageError unless eta is from 0 to 1, and 0 for solvers that take none."""
    if eta != 0 and not solver.takes_eta:
        raise UsageError(field, eta, f"has no effect with {solver.__name__}: use 0, or ddim")
    if not 0 <= eta <= 1:
        raise UsageError(field, eta, "must be from 0 (deterministic) to 1 (as noisy as 'ddpm')")
