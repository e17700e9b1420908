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
    SPACINGS,
    Estimate,
    SamplingOptions,
    continuous_times,
    create_diffusion,
    create_objective,
    guided_model_fn,
    make_schedule,
    multistep,
    sample_loop,
    spaced_timesteps,
)
from dico_jax.diffusion.paths import alpha_sigma
from dico_jax.diffusion.schedule import beta_schedule, with_zero_terminal_snr
from dico_jax.errors import UsageError
from tests.test_seams import LinearPath

MEANS, DEVIATIONS, WEIGHTS = np.array([-1.0, 0.3, 1.2]), np.array([0.3, 0.2, 0.5]), [0.3, 0.3, 0.4]
PROCESS = {"noise_schedule": "linear", "diffusion_steps": 1000}
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
    options = {"objective": "noise"} | PROCESS
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


# Solvers with noise: by how their variance on normal data converges.
STOCHASTIC = {"ddpm": 1, "dpmpp_2m_sde": 2, "euler_maruyama": 1}


def moments(sampler, objective, model_fn):
    """After every step, what x has of x_T, (T,), of the noise of steps, (T, T), and of x_0 (T,).

    Steps are linear in all three where the network is: examples are a 1 in one of them each.
    """
    count = objective.num_steps
    x0 = jnp.eye(count + 2)[-1]
    noise = jnp.eye(count + 2)[1:-1]
    _, trajectory = sample_loop(
        objective,
        lambda x, t: model_fn(x, t, x0),
        jnp.eye(count + 2)[0],
        lambda i: noise[i],
        sampler=sampler,
        return_trajectory=True,
    )
    x = np.asarray(trajectory.x)
    return x[:, 0], x[:, 1:-1], x[:, -1]


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m_sde"])
@pytest.mark.parametrize("path", ["linear", "round", "published"])
def test_exact_marginals_where_x0_is_known(sampler, path):
    with jax.enable_x64(True):
        o = Points(9, path == "round") if path != "published" else create_diffusion(
            "9", learn_sigma=False, sigma_small=True, predict_xstart=True
        )  # fmt: skip
        of_start, of_noise, of_x0 = moments(sampler, o, lambda x, t, x0: x0)
    alpha, sigma = (table[::-1] for table in alpha_sigma(o))
    mean = of_start * alpha[0] + of_x0
    deviation = np.sqrt((of_start * sigma[0]) ** 2 + (of_noise**2).sum(1))
    last = -1 if sampler == "ddpm" else None  # which adds no noise, as all paths end clean
    np.testing.assert_allclose(mean, alpha[1:], rtol=1e-12)
    np.testing.assert_allclose(deviation[:last], sigma[1:][:last], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sampler", STOCHASTIC)
@pytest.mark.parametrize("objective", ["noise", "flow"])
def test_noise_of_the_last_step_has_no_effect(sampler, objective):
    o = create_objective({"objective": objective} | PROCESS, learn_sigma=False, num_steps=4)
    x = jnp.linspace(-1, 1, 6).reshape(3, 2)

    def samples(last):
        def noise_fn(i):
            return jnp.where(i > 0, 0.5, last) + 0 * x

        return sample_loop(o, lambda x, t: 0.3 * x, x, noise_fn, sampler=sampler)

    np.testing.assert_array_equal(samples(jnp.nan), samples(0.0))
    assert np.isfinite(samples(jnp.nan)).all()


@pytest.mark.parametrize("round_path", [False, True])
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_order_of_the_variance(sampler, round_path):
    def error(num_steps):
        o = Points(num_steps, round_path)

        def model_fn(x, t, _):  # of data with a deviation of 1/2
            trig = jnp.cos(t[0] * jnp.pi / 2), jnp.sin(t[0] * jnp.pi / 2)
            alpha, sigma = trig if round_path else (1 - t[0], t[0])
            return x * alpha / 4 / (alpha**2 / 4 + sigma**2)

        of_start, of_noise, _ = (found[-1] for found in moments(sampler, o, model_fn))
        alpha, sigma = alpha_sigma(o)
        variances = alpha**2 / 4 + sigma**2
        return abs(of_start**2 * variances[-1] + (of_noise**2).sum() - variances[0])

    with jax.enable_x64(True):
        slope = np.log2(error(400) / error(800))
    print(f"{sampler}: the variance is of order {slope:.2f}")
    assert abs(slope - STOCHASTIC[sampler]) < 0.2


def test_every_solver_is_tested():
    assert set(SOLVERS) <= {*ORDERS, *STOCHASTIC, "jump"}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50, 999, 1000])
def test_timesteps_are_whole_apart_and_start_with_noise(spacing, num_steps):
    schedule = make_schedule()
    kept = spaced_timesteps(spacing, num_steps, schedule.alphas_cumprod)
    assert kept.dtype == np.int64
    assert len(kept) == num_steps
    assert (np.diff(kept) > 0).all()
    assert kept[0] >= 0
    assert kept[-1] == (0 if spacing == "linear" and num_steps == 1 else 999)
    times = continuous_times(spacing, num_steps)
    assert (times[0], times[-1], len(times)) == (0, 1, num_steps + 1)
    assert (np.diff(times) > 0).all()


def test_spacings_are_even_in_what_they_say():
    alphas_cumprod = make_schedule().alphas_cumprod
    ratio = np.sqrt(1 / alphas_cumprod - 1)

    def points(spacing):
        return spaced_timesteps(spacing, 11, alphas_cumprod)

    assert points("linear").tolist() == [round(99.9 * k) for k in range(11)]
    assert points("trailing").tolist() == [round(1000 * k / 11) - 1 for k in range(1, 12)]
    np.testing.assert_allclose(np.diff(np.sqrt(points("quadratic"))), 999**0.5 / 10, atol=0.3)
    for spacing, even in (("log_snr", np.log), ("karras", lambda r: r ** (1 / 7))):
        steps = np.diff(even(ratio[points(spacing)]))[2:]  # cleanest timesteps are few
        np.testing.assert_allclose(steps, steps.mean(), rtol=0.1)
        times = continuous_times(spacing, 11)[1:-1]
        steps = np.diff(even(times / (1 - times)))
        np.testing.assert_allclose(steps, steps.mean())


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero", [False, True])
def test_spacings_where_the_last_timesteps_have_next_to_no_signal(spacing, schedule, zero):
    betas = beta_schedule(schedule, 1000)
    betas = with_zero_terminal_snr(betas) if zero else betas
    kept = spaced_timesteps(spacing, 20, np.cumprod(1 - betas))
    assert (kept[0], kept[-1]) == (0, 999)
    gaps = np.diff(kept)[5:]  # cleanest timesteps are few
    assert (gaps > 1).all()
    assert gaps.max() < 250


def test_unknown_spacings_and_too_many_steps_are_refused():
    options = {"objective": "noise", "noise_schedule": "linear", "diffusion_steps": 100}
    for spacing, steps, message in (
        ("even", 10, "spacing='even' is unknown: use one of linear, quadratic"),
        ("karras", 101, "cannot keep 101"),
        ("linear", 101, "cannot keep 101"),
    ):
        with pytest.raises(UsageError, match=message):
            create_objective(options, learn_sigma=True, num_steps=steps, spacing=spacing)
    with pytest.raises(UsageError, match="spacing='even' is unknown"):
        continuous_times("even", 10)


def scales_of(steps=10, **options):
    o = LinearPath(steps)  # sigma / alpha is t / (1 - t)
    return SamplingOptions(cfg_scale=3.0, **options).scales(o)


def test_scales_of_guidance():
    assert scales_of().tolist()[1:] == [3.0] * 10
    low, high = 0.3 / 0.7 * 1.0001, 0.7 / 0.3 * 1.0001
    inside = scales_of(cfg_interval=f"{low}:{high}")
    assert [k for k, scale in enumerate(inside) if scale != 1] == [4, 5, 6, 7]
    rising = scales_of(cfg_schedule="linear")
    np.testing.assert_allclose(rising[1:], np.linspace(3, 1, 10))
    middle = scales_of(11, cfg_schedule="cosine")
    np.testing.assert_allclose(middle[[1, 6, 11]], [3, 2, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_interval": "3"}, "cfg_interval='3' must be LOW:HIGH"),
        ({"cfg_interval": "5:1"}, "cfg_interval='5:1' must be LOW:HIGH"),
        ({"cfg_interval": "a:b"}, "must be LOW:HIGH"),
        ({"cfg_interval": "nan:1"}, "must be LOW:HIGH"),
        ({"cfg_schedule": "step"}, "cfg_schedule='step' is unknown: use one of constant"),
        ({"cfg_rescale": 1.5}, "cfg_rescale=1.5 must be from 0 to 1"),
        ({"cfg_interval": "0.01:0.02"}, "holds none of the 10 noise levels of the steps, 0.111 to"),
    ],
)
def test_wrong_guidance_is_refused(options, message):
    with pytest.raises(UsageError, match=f"^sampling.*{message}"):
        scales_of(**options)


def test_guidance_where_the_scale_is_one_runs_on_half():
    rows = []

    def model_fn(x, t, y):
        jax.debug.callback(lambda: rows.append(len(x)))
        return jnp.concatenate([jnp.sin(x) * y[:, None], x], axis=-1)

    x, y, null = jnp.linspace(-1, 1, 8).reshape(4, 2), jnp.arange(1.0, 5.0), jnp.zeros(1)
    t = jnp.ones(4)
    fn = guided_model_fn(model_fn, y, null, jnp.array(2.0), 2, "all", always=False)
    always = guided_model_fn(model_fn, y, null, 2.0, 2, "all")
    found = [jax.jit(fn)(x, t, scale) for scale in (jnp.array(1.0), jnp.array(2.0))]
    jax.effects_barrier()
    assert rows == [4, 8]
    np.testing.assert_array_equal(found[0], model_fn(x, t, y))
    np.testing.assert_allclose(found[1], always(x, t), rtol=1e-6)


@pytest.mark.parametrize(("channels", "guided"), [("first_three", 3), ("all", 4)])
def test_rescaling_leaves_channels_without_guidance(channels, guided):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 4)), jnp.bfloat16)
    spread = jnp.array([1, 2, 3, 50, 1, 1, 1, 1], jnp.bfloat16)  # the fourth would drown the others

    def model_fn(x, t, y):
        return jnp.concatenate([x, x], axis=-1) * spread * y[:, None, None, None]

    given = x, jnp.ones(3)
    y = jnp.arange(1.0, 4.0).astype(jnp.bfloat16)
    found = guided_model_fn(model_fn, y, jnp.zeros(1), 4.0, 4, channels, rescale=1.0)(*given)
    cond = model_fn(*given, y).astype(jnp.float32)
    np.testing.assert_array_equal(found[..., guided:], cond[..., guided:])
    np.testing.assert_allclose(found, cond, rtol=1e-5)  # guidance is a factor here, taken back


def test_rescaling_of_a_fresh_network_is_none():
    found = guided_model_fn(
        lambda x, t, y: jnp.zeros_like(x), jnp.ones(2), jnp.zeros(1), 4.0, 4, "all", rescale=0.7
    )(jnp.ones((2, 4, 4, 4)), jnp.ones(2))
    np.testing.assert_array_equal(found, np.zeros((2, 4, 4, 4)))


def test_rescaled_guidance_and_autoguidance():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 2)))
    t, y, null = jnp.ones(3), jnp.arange(1.0, 4.0), jnp.zeros(1)

    def model_fn(x, t, y):
        return jnp.concatenate([x * y[:, None, None, None] + 1, x], axis=-1)

    given = model_fn, y, null, 4.0, 2, "all"
    plain, full = (guided_model_fn(*given, rescale=r)(x, t) for r in (0.0, 1.0))
    cond = model_fn(x, t, y)
    axes = (1, 2, 3)
    np.testing.assert_allclose(full[..., :2].std(axes), cond[..., :2].std(axes), rtol=1e-5)
    assert (plain[..., :2].std(axes) > 2 * full[..., :2].std(axes)).all()
    np.testing.assert_array_equal(full[..., 2:], cond[..., 2:])
    weak = guided_model_fn(*given, weak_fn=lambda x, t: 0.5 * x)(x, t)
    expected = 0.5 * x + 4 * (cond[..., :2] - 0.5 * x)
    np.testing.assert_allclose(weak[..., :2], expected, rtol=1e-5)
    np.testing.assert_array_equal(weak[..., 2:], cond[..., 2:])
