"""Solvers: orders of convergence, exact marginals, diffusers' schedulers, spacings, guidance."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from dico_jax.diffusion import (
    SOLVERS,
    Estimate,
    create_objective,
    multistep,
    sample_loop,
)
from dico_jax.diffusion.paths import alpha_sigma
from tests.test_seams import LinearPath

MEANS, DEVIATIONS, WEIGHTS = np.array([-1.0, 0.3, 1.2]), np.array([0.3, 0.2, 0.5]), [0.3, 0.3, 0.4]
RECORDED = pathlib.Path(__file__).parent / "data" / "diffusers_solvers.npz"


@dataclasses.dataclass(frozen=True)
class Points(LinearPath):
    """Points even in log(alpha / sigma), of which none is clean and none without signal.

    The network predicts x_0. With `round`, alpha and sigma are a cosine and a sine.
    """

    round: bool = False

    @property
    def times(self):
        return 1 / (1 + np.exp(np.linspace(3.0, -4.5, self.steps + 1)))

    def alpha_sigma(self, t):
        return (np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)) if self.round else (1 - t, t)

    def estimate(self, output, x, t, clip_denoised=False):
        trig = (jnp.cos(t * jnp.pi / 2), jnp.sin(t * jnp.pi / 2)) if self.round else (1 - t, t)
        return Estimate(output, (x - trig[0] * output) / trig[1])


def mixture_x0(x, alpha, sigma):
    """The mean of x_0 given x = alpha x_0 + sigma noise, of a mixture of normal distributions."""
    variance = (alpha * DEVIATIONS) ** 2 + sigma**2
    distance = x[..., None] - alpha * MEANS
    logits = -0.5 * distance**2 / variance - 0.5 * jnp.log(variance) + jnp.log(np.array(WEIGHTS))
    means = MEANS + alpha * DEVIATIONS**2 / variance * distance
    return (jax.nn.softmax(logits, axis=-1) * means).sum(-1)


def exact_flow(x, start, end):
    """Where the probability flow takes x (N,): in one dimension it keeps the quantile."""

    def cdf(y, alpha, sigma):
        deviations = np.sqrt((alpha * DEVIATIONS) ** 2 + sigma**2)
        return np.dot(WEIGHTS, norm.cdf((y - alpha * MEANS) / deviations))

    def found(value):
        return brentq(lambda y: cdf(y, *end) - cdf(value, *start), -9, 9, xtol=1e-15, rtol=1e-14)

    return np.array([found(value) for value in x])


def error_of(sampler, num_steps, round_path):
    """The largest error of a solver on the mixture, in float64."""
    o = Points(num_steps, round_path)
    alpha, sigma = alpha_sigma(o)

    def model_fn(x, t):
        at = o.alpha_sigma(t[0]) if not round_path else (jnp.cos(t[0] * jnp.pi / 2),
                                                         jnp.sin(t[0] * jnp.pi / 2))  # fmt: skip
        return mixture_x0(x, *at)

    x = np.linspace(-1.5, 1.5, 9) * np.hypot(alpha[-1], sigma[-1])
    with jax.enable_x64(True):
        given = jnp.asarray(x)[:, None]
        found = jax.jit(lambda x: sample_loop(o, model_fn, x, None, sampler=sampler))(given)
    exact = exact_flow(x, (alpha[-1], sigma[-1]), (alpha[0], sigma[0]))
    return np.abs(np.asarray(found)[:, 0] - exact).max()


class Exact3M(multistep.DpmSolver3M):
    """3M with the second derivative whole: of order 3, which shows what halves that of the rest."""

    def coefficients(self, span):
        row = super().coefficients(span)
        if len(span.r) < 2:
            return row
        bend = span.alpha * (0.5 - (span.decay - 1 + span.h) / span.h**2)
        return row + np.append(0.0, multistep._of_slopes([0.0, 0.0, bend], span.r))


ORDERS = {
    "ddim": (1, 64, 256),
    "euler": (1, 64, 256),
    "heun": (2, 32, 128),
    "dpmpp": (2, 32, 128),
    "dpmpp_2m": (2, 32, 128),
    "dpmpp_3m": (2, 64, 256),
    "exact_3m": (3, 64, 256),
    "unipc_2": (3, 32, 128),
    "unipc_3": (4, 128, 512),
}


@pytest.mark.parametrize("round_path", [False, True])
@pytest.mark.parametrize("sampler", ORDERS)
def test_order_of_convergence(sampler, round_path, monkeypatch):
    monkeypatch.setitem(SOLVERS, "exact_3m", Exact3M)
    order, coarse, fine = ORDERS[sampler]
    errors = [error_of(sampler, n, round_path) for n in (coarse, fine)]
    slope = np.log(errors[0] / errors[1]) / np.log(fine / coarse)
    print(f"{sampler}: order {slope:.2f}, errors {errors[0]:.1e}, {errors[1]:.1e}")
    assert abs(slope - order) < 0.2


def recorded_model(x, t):
    """The stand-in of make_diffusers_numbers.py: (N, 1, C), and the share of the way to noise."""
    w = jnp.array([[0.6, -0.3, 0.2], [0.1, 0.5, -0.4], [-0.2, 0.3, 0.7]])
    return jnp.tanh(x @ w + jnp.cos(3 * t)[:, None, None]) + 0.3 * x


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize(
    "sampler", ["dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc_2", "unipc_3", "heun"]
)
def test_steps_are_those_of_diffusers(sampler, steps):
    recorded = np.load(RECORDED)
    states, timesteps = (recorded[f"{sampler}/{steps}/{name}"] for name in ("x", "timesteps"))
    noise = recorded["noise"]
    options = {"objective": "noise", "noise_schedule": "linear", "diffusion_steps": 1000}
    with jax.enable_x64(True):
        o = create_objective(options, learn_sigma=False, num_steps=steps, spacing="trailing")
        start = jnp.asarray(recorded["start"])[:, None]
        alpha, sigma = alpha_sigma(o)
        if sampler == "heun":  # its states are x / alpha, every other one within a step
            states, timesteps = np.append(states[1::2], states[-1:], axis=0), timesteps[::2]
            start, states = start * sigma[-1], states * alpha[-2::-1, None, None]
        _, trajectory = sample_loop(
            o,
            lambda x, t: recorded_model(x, t / 1000.0),
            start,
            lambda i: jnp.asarray(noise)[steps - 1 - i][:, None],
            sampler=sampler,
            return_trajectory=True,
        )
    assert timesteps.tolist() == o.schedule.timestep_map[::-1].tolist()
    difference = np.abs(np.asarray(trajectory.x)[:, :, 0] - states).max(axis=(1, 2))
    print(f"{sampler}, {steps} steps: at most {difference.max():.1e} off diffusers")
    assert difference.max() < 1e-5


@dataclasses.dataclass(frozen=True)
class RecordedPath(LinearPath):
    """The linear path at the sigmas of a record."""

    @property
    def times(self):
        return np.unique(np.load(RECORDED)["heun_flow/10/sigmas"])


def test_heun_on_the_linear_path_is_that_of_diffusers():
    recorded = np.load(RECORDED)
    states = recorded["heun_flow/10/x"]
    with jax.enable_x64(True):
        _, trajectory = sample_loop(
            RecordedPath(10), recorded_model, jnp.asarray(recorded["start"])[:, None], None,
            sampler="heun", return_trajectory=True,
        )  # fmt: skip
    states = np.append(states[1::2], states[-1:], axis=0)
    assert np.abs(np.asarray(trajectory.x)[:, :, 0] - states).max() < 1e-5
