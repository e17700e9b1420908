"""Solvers, from noise to data, and the loop that runs them.

A new solver is a class with a method `step`, like those below, and a row in `SOLVERS`.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.diffusion.gaussian import as_float, p_mean_variance, spread, table_at
from dico_jax.diffusion.guidance import check_cfg_channels
from dico_jax.diffusion.objectives import Diffusion, Estimate, ModelFn, Objective
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
      model_fn: model_fn(x, times) is the network's output.
      clip_denoised: clip the predicted x_0 to [-1, 1].
    """

    objective: Objective
    model_fn: ModelFn
    clip_denoised: bool = False

    def output(self, x, point) -> jax.Array:
        """What the network returns for x (N, ..., C) at a point ()."""
        times = self.objective.network_time(_time(self.objective, point))
        return self.model_fn(x, jnp.broadcast_to(times, x.shape[:1]))

    def estimate(self, x, point) -> Estimate:
        """The x_0 and noise that the network sees in x at a point ()."""
        output, time = self.output(x, point), _time(self.objective, point)
        return self.objective.estimate(output, x, time, self.clip_denoised)

    def alpha_sigma(self, x, point) -> tuple[jax.Array, jax.Array]:
        """The factors of x_0 and noise at a point, to multiply arrays like x with."""
        alpha, sigma = _alpha_sigma(self.objective)
        return table_at(alpha, point, x), table_at(sigma, point, x)


def _time(objective: Objective, point) -> jax.Array:
    return jnp.asarray(objective.times)[jnp.asarray(point)]


def _alpha_sigma(objective: Objective) -> tuple[np.ndarray, np.ndarray]:
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


class Ddpm(Solver):
    """Ancestral sampling, see `ddpm_step`."""

    draws_noise = True

    def step(self, path: Path, carry: Any, i, noise) -> tuple[Any, Trajectory]:
        given = path.objective, path.output(carry, i + 1), carry, i, noise
        return _moved(carry, *ddpm_step(*given, clip_denoised=path.clip_denoised))


class Ddim(Solver):
    """DDIM, see `ddim_step`."""

    takes_eta = True

    @property
    def draws_noise(self) -> bool:
        return self.eta != 0

    def step(self, path: Path, carry: Any, i, noise) -> tuple[Any, Trajectory]:
        given = path.objective, path.output(carry, i + 1), carry, i, noise
        return _moved(carry, *ddim_step(*given, eta=self.eta, clip_denoised=path.clip_denoised))


def _moved(carry: jax.Array, x: jax.Array, x0: jax.Array) -> tuple[jax.Array, Trajectory]:
    return (x := x.astype(carry.dtype)), Trajectory(x, x0)


SOLVERS: dict[str, type[Solver]] = {"ddpm": Ddpm, "ddim": Ddim}


def ddpm_step(
    objective: Objective, model_output, x, i, noise, *, clip_denoised: bool = False
) -> tuple[jax.Array, jax.Array]:
    """One ancestral step, DDPM (arXiv 2006.11239) algorithm 2.

    Its variance is the diffusion's; of other objectives the posterior's.

    Args:
      objective: the process and the meaning of the output.
      model_output: what the model returned for x at the time of point i + 1.
      x: x at that point, (N, ..., C).
      i: () or (N,), the step, an index into the (respaced) process.
      noise: standard normal of x's shape; without effect at index 0.
      clip_denoised: clip the predicted x_0 to [-1, 1].

    Returns x at point i and the predicted x_0, (N, ..., C), in float32 or better.
    """
    if not isinstance(objective, Diffusion):
        return ddim_step(objective, model_output, x, i, noise, eta=1.0, clip_denoised=clip_denoised)
    p = p_mean_variance(objective, model_output, x, i, clip_denoised)
    return _add_noise(p.mean, jnp.exp(0.5 * p.log_variance), i, noise), p.pred_x0


def ddim_step(
    objective: Objective, model_output, x, i, noise, *, eta: float = 0.0, clip_denoised=False
) -> tuple[jax.Array, jax.Array]:
    """One step of DDIM (arXiv 2010.02502), equations 12 and 16.

    The noise is derived anew from the predicted x_0, which counts where that was clipped. The
    model's variance is not used. Arguments and results are those of `ddpm_step`, but noise may be
    None with eta=0; eta is a Python number from 0 (deterministic) to 1 (the posterior's variance).
    """
    check_eta(eta, Ddim)
    x, model_output = as_float(x, model_output)
    time = _time(objective, jnp.asarray(i) + 1)
    x0, old_noise = objective.estimate(model_output, x, time, clip_denoised)
    alpha, sigma = (table[:-1] for table in _alpha_sigma(objective))
    fresh = eta * np.sqrt(objective.posterior_variance())
    direction = np.sqrt(sigma**2 - fresh**2) if eta else sigma
    mean = table_at(alpha, i, x) * x0 + table_at(direction, i, x) * old_noise
    return (mean if eta == 0 else _add_noise(mean, table_at(fresh, i, x), i, noise)), x0


def check_eta(eta: float, solver: type[Solver], field: str = "eta") -> None:
    """Raises UsageError unless eta is from 0 to 1, and 0 for solvers that take none."""
    if eta != 0 and not solver.takes_eta:
        takers = ", ".join(name for name, other in SOLVERS.items() if other.takes_eta)
        raise UsageError(field, eta, f"has no effect with {solver.__name__}: use 0, or {takers}")
    if not 0 <= eta <= 1:
        raise UsageError(field, eta, "must be from 0 (deterministic) to 1 (as noisy as 'ddpm')")


def _add_noise(mean: jax.Array, sigma: jax.Array, i, noise) -> jax.Array:
    # Selected rather than multiplied by 0, so that not even a NaN in unused noise has an effect.
    mean, noise = as_float(mean, noise)
    return jnp.where(spread(jnp.asarray(i), mean) > 0, mean + sigma * noise, mean)


def sample_loop(
    objective: Objective,
    model_fn: ModelFn,
    x_T,
    noise_fn: Callable[[jax.Array], jax.Array] | None,
    *,
    sampler: str = "ddpm",
    eta: float = 0.0,
    clip_denoised: bool = False,
    return_trajectory: bool = False,
):
    """Samples by running every step of a solver in one compiled loop.

    Args:
      objective: the process and the meaning of the output.
      model_fn: model_fn(x, times) is the model's output; times (N,) are those that the objective
        gives the network, of the published one int32 timesteps. See `guided_model_fn`.
      x_T: standard normal (N, ..., C), see `initial_noise`.
      noise_fn: noise_fn(i), with a traced int32 index () from T - 1 to 0, is standard normal of
        x_T's shape, see `step_noise`. What it gives for index 0 has no effect. May be None for a
        solver that draws none, such as "ddim" with eta=0.
      sampler: a key of `SOLVERS`.
      eta: for "ddim", a Python number from 0 (deterministic) to 1.
      clip_denoised: clip the predicted x_0 to [-1, 1] (for pixels, not for latents).
      return_trajectory: return every step as well; takes T times the memory of x.

    Returns:
      The samples (N, ..., C), in float32 or better; with return_trajectory, samples and Trajectory.
    """
    solver = find_solver(sampler)(eta)
    if solver.draws_noise and noise_fn is None:
        fix = "draws noise at every step: give a noise_fn, or use sampler='ddim' with eta=0"
        raise UsageError(f"sampler={sampler!r} with eta={eta} {fix}")
    draw = noise_fn if solver.draws_noise else None
    path = Path(objective, model_fn, clip_denoised)

    def body(carry, i):
        carry, point = solver.step(path, carry, i, None if draw is None else draw(i))
        return carry, point if return_trajectory else None

    indices = jnp.arange(objective.num_steps, dtype=jnp.int32)
    carry, trajectory = jax.lax.scan(body, solver.init(path, *as_float(x_T)), indices, reverse=True)
    samples = solver.end(path, carry)
    return (samples, jax.tree.map(lambda a: a[::-1], trajectory)) if return_trajectory else samples


def find_solver(name: str, field: str = "sampler") -> type[Solver]:
    """The solver of a name; raises UsageError about `field` where there is none."""
    if name not in SOLVERS:
        raise UsageError(field, name, f"is unknown: use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to sample: the seed, and fields of `config.sampling`; see configs/default.py."""

    seed: int = 0
    sampler: str = "ddpm"
    ddim_eta: float = 0.0
    cfg_scale: float = 1.0
    cfg_channels: str = "first_three"

    def __post_init__(self):
        solver = find_solver(self.sampler, "sampling.sampler")
        check_cfg_channels(self.cfg_channels, "sampling.cfg_channels")
        check_eta(self.ddim_eta, solver, "sampling.ddim_eta")
        if not 0 <= self.cfg_scale < np.inf:
            raise UsageError("sampling.cfg_scale", self.cfg_scale, "must be at least 0 and finite")
