"""Solvers, from noise to data, and the loop that runs them.

A new solver is a class with a method `step`, like those below, and a row in `SOLVERS`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.diffusion import multistep
from dico_jax.diffusion.gaussian import as_float, p_mean_variance, spread, table_at
from dico_jax.diffusion.objectives import Diffusion, Estimate, ModelFn, Objective
from dico_jax.diffusion.paths import Path, Solver, Trajectory, alpha_sigma, check_eta
from dico_jax.errors import UsageError


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


class Euler(Ddim):
    """Euler's method on the probability flow, dx = x_0 dalpha + noise dsigma: DDIM, no noise."""

    takes_eta = False


class Heun(Solver):
    """Heun's method on the probability flow (EDM, arXiv 2206.00364, algorithm 1): two evaluations.

    But for the step to clean data, which has one. It runs in x / alpha over sigma / alpha, as EDM
    does; on paths that start without signal, such as those of flow matching, in x / (alpha + sigma)
    over sigma / (alpha + sigma), which is the velocity over time.
    """

    def step(self, path: Path, carry: Any, i, noise) -> tuple[Any, Trajectory]:
        alpha, sigma = path.tables
        straight = alpha[-1] == 0
        scale = alpha + sigma if straight else alpha
        before, after = (table_at(scale, k, carry) for k in (i + 1, i))
        length = table_at(np.diff(sigma / scale), i, carry)

        def slope(e: Estimate):
            return e.noise - e.x0 if straight else e.noise

        def moved(slope):
            return after * (carry / before - length * slope)

        first = path.estimate(carry, i + 1)
        x = moved(slope(first))

        def corrected():
            return moved((slope(first) + slope(path.estimate(x, i))) / 2)

        # Only tests have paths that do not end in clean data, here and in `EulerMaruyama`.
        x = corrected() if sigma[0] > 0 else jax.lax.cond(i > 0, corrected, lambda: x)
        return _moved(carry, x, first.x0)


class EulerMaruyama(Solver):
    """The Euler-Maruyama method on the reverse SDE of the straightened path; the last has no noise.

    In y = x / (alpha + sigma) over t = sigma / (alpha + sigma), which flow matching has for x and
    its time: dy = (v - s t) dt + sqrt(2 t) dw with velocity v and score s, backwards (SiT, arXiv
    2401.08740, section 2.3; the noise is REPA's).
    """

    draws_noise = True

    def step(self, path: Path, carry: Any, i, noise) -> tuple[Any, Trajectory]:
        alpha, sigma = path.tables
        total = alpha + sigma
        x0, old = path.estimate(carry, i + 1)
        before, after = (table_at(total, k, carry) for k in (i + 1, i))
        times = sigma / total
        length = table_at(np.diff(times), i, carry)
        fresh = table_at(np.sqrt(2 * times[1:] * np.diff(times)), i, carry)
        mean = carry / before - length * (2 * old - x0)
        x = after * (mean + fresh * noise)
        return _moved(carry, x if sigma[0] > 0 else jnp.where(i > 0, x, x0), x0)


class Jump(Solver):
    """x_s = x_t - (t - s) u(x_t, s, t), u the mean velocity that a MeanFlow network predicts."""

    @classmethod
    def check(cls, objective: Objective) -> None:
        """See `Solver`."""
        if not objective.two_times:
            fix = (
                "has no path for this objective: use it with config.diffusion.objective='mean_flow'"
            )
            raise UsageError("sampling.sampler", "jump", fix)

    def step(self, path: Path, carry: Any, i, noise) -> tuple[Any, Trajectory]:
        mean = path.output(carry, i + 1, to=i)
        begin, end = (table_at(path.objective.times, k, carry) for k in (i + 1, i))
        return _moved(carry, carry - (begin - end) * mean, carry - begin * mean)


SOLVERS: dict[str, type[Solver]] = {
    "ddpm": Ddpm,
    "ddim": Ddim,
    "dpmpp": multistep.DpmSolver2M,
    "dpmpp_2m": multistep.DpmSolver2M,
    "dpmpp_3m": multistep.DpmSolver3M,
    "dpmpp_2m_sde": multistep.DpmSolver2MSde,
    "unipc_2": multistep.UniPC2,
    "unipc_3": multistep.UniPC3,
    "euler": Euler,
    "heun": Heun,
    "euler_maruyama": EulerMaruyama,
    "jump": Jump,
}


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
    time = jnp.asarray(objective.times)[jnp.asarray(i) + 1]
    x0, old_noise = objective.estimate(model_output, x, time, clip_denoised)
    alpha, sigma = (table[:-1] for table in alpha_sigma(objective))
    fresh = eta * np.sqrt(objective.posterior_variance())
    direction = np.sqrt(sigma**2 - fresh**2) if eta else sigma
    mean = table_at(alpha, i, x) * x0 + table_at(direction, i, x) * old_noise
    return (mean if eta == 0 else _add_noise(mean, table_at(fresh, i, x), i, noise)), x0


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
    scales=None,
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
      scales: guidance scales at all points of the path, (T + 1,), clean data first; model_fn then
        has that of the point, (), as a third argument.
      return_trajectory: return every step as well; takes T times the memory of x.

    Returns:
      The samples (N, ..., C), in float32 or better; with return_trajectory, samples and Trajectory.
    """
    scales = None if scales is None else jnp.asarray(scales)
    path = Path(objective, model_fn, clip_denoised, scales)
    loop = solver_loop(path, noise_fn, sampler, eta)

    def body(carry, i):
        carry, point = loop.step(carry, i)
        return carry, point if return_trajectory else None

    indices = jnp.arange(objective.num_steps, dtype=jnp.int32)
    carry, trajectory = jax.lax.scan(body, loop.begin(x_T), indices, reverse=True)
    samples = loop.end(carry)
    return (samples, jax.tree.map(lambda a: a[::-1], trajectory)) if return_trajectory else samples


class Loop(NamedTuple):
    """What `sample_loop` runs: a solver on a path, step by step."""

    begin: Callable[[Any], Any]  # of x_T, the carry
    step: Callable[[Any, Any], tuple[Any, Trajectory]]  # of the carry and i, from T - 1 to 0
    end: Callable[[Any], jax.Array]  # of the last carry, the samples


def solver_loop(
    path: Path, noise_fn: Callable[[jax.Array], jax.Array] | None, sampler: str, eta: float
) -> Loop:
    """The parts of `sample_loop`, which has the same arguments."""
    solver = find_solver(sampler)(eta)
    solver.check(path.objective)
    if solver.draws_noise and noise_fn is None:
        fix = "draws noise at every step: give a noise_fn, or use sampler='ddim' with eta=0"
        raise UsageError(f"sampler={sampler!r} with eta={eta} {fix}")
    draw = noise_fn if solver.draws_noise else None

    def begin(x_T):
        return solver.init(path, *as_float(x_T))

    def step(carry, i):
        return solver.step(path, carry, i, None if draw is None else draw(i))

    return Loop(begin, step, functools.partial(solver.end, path))


def find_solver(name: str, field: str = "sampler") -> type[Solver]:
    """The solver of a name; raises UsageError about `field` where there is none."""
    if name not in SOLVERS:
        raise UsageError(field, name, f"is unknown: use one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
