"""Other predictions of the published process: velocity, zero terminal SNR, min-SNR weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.diffusion import SOLVERS, create_objective, ddpm_step, sample_loop
from dico_jax.diffusion.schedule import beta_schedule
from dico_jax.errors import UsageError


def objective(name, *, learn_sigma=False, num_steps=None, **options):
    known = {"objective": name, "noise_schedule": "linear", "diffusion_steps": 1000}
    return create_objective(known | options, learn_sigma=learn_sigma, num_steps=num_steps)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


T = np.array([0, 1, 500, 999])
X0, NOISE, WRONG = (draw(seed, 4, 2, 2, 3) for seed in range(3))


def alpha_sigma(o):
    a = o.schedule.alphas_cumprod[T][:, None, None, None]
    return np.sqrt(a), np.sqrt(1 - a)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_velocity_says_what_the_noise_says(learn_sigma):
    """A noise network's prediction as a velocity: the same estimates, steps and bound."""
    noise, v = (objective(name, learn_sigma=learn_sigma) for name in ("noise", "velocity"))
    alpha, sigma = alpha_sigma(noise)
    x = alpha * X0 + sigma * NOISE
    as_v = (NOISE + WRONG - sigma * x) / alpha  # of noise + error, by x = alpha x_0 + sigma noise
    rest = [draw(7, 4, 2, 2, 3)] * learn_sigma
    outputs = [np.concatenate([o, *rest], axis=-1) for o in (NOISE + WRONG, as_v)]
    both = list(zip((noise, v), outputs, strict=True))
    for said in (
        lambda o, y: o.estimate(y, x, T),
        lambda o, y: o.estimate(y, x, T, True),
        lambda o, y: ddpm_step(o, y, x, T, WRONG),
    ):
        np.testing.assert_allclose(said(*both[0]), said(*both[1]), rtol=1e-9, atol=1e-9)
    terms = [o.loss_terms(lambda x, t, y=y: y, X0, T, NOISE) for o, y in both]
    if learn_sigma:
        np.testing.assert_allclose(terms[0]["vb"], terms[1]["vb"], rtol=1e-9)
    target = alpha * NOISE - sigma * X0
    expected = ((as_v - target) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(terms[1]["mse"], expected, rtol=1e-12)
    np.testing.assert_allclose(expected, terms[0]["mse"] / alpha.ravel() ** 2, rtol=1e-9)
    exact = v.estimate(np.concatenate([target, *rest], axis=-1), x, T)
    np.testing.assert_allclose(exact.x0, X0, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(exact.noise, NOISE, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_the_last_step_has_no_signal(schedule):
    """Algorithm 1 of arXiv 2305.08891, one step after the other."""
    o = objective("velocity", zero_terminal_snr=True, noise_schedule=schedule)
    kept, roots = 1.0, []
    for beta in beta_schedule(schedule, 1000):
        kept *= 1.0 - beta
        roots.append(kept**0.5)
    first, last = roots[0], roots[-1]
    roots = [(root - last) * first / (first - last) for root in roots]
    np.testing.assert_allclose(o.schedule.alphas_cumprod, np.square(roots), rtol=1e-9)
    assert o.schedule.alphas_cumprod[-1] == 0
    assert o.schedule.betas[-1] == 1
    for table in vars(o.schedule).values():
        assert np.isfinite(table).all()


@pytest.mark.parametrize(
    ("sampler", "learn_sigma"),
    [("ddpm", True), *((name, False) for name in SOLVERS if name != "jump")],
)
def test_nothing_is_infinite_without_signal(learn_sigma, sampler):
    """The exact network of normal data of deviation 0.5 is sampled from noise alone."""
    options = {"zero_terminal_snr": True, "learn_sigma": learn_sigma}
    o, full = objective("velocity", num_steps=200, **options), objective("velocity", **options)
    rest = [WRONG] * learn_sigma

    def model_fn(x, t):
        alpha, sigma = (
            jnp.asarray(k)[t + 1, None, None, None] for k in full.alpha_sigma(full.times)
        )
        v = x * alpha * sigma * 0.75 / (alpha**2 * 0.25 + sigma**2)
        return jnp.concatenate([v, jnp.zeros_like(v)] if learn_sigma else [v], axis=-1)

    steps = jnp.asarray(draw(1, 200, 1000, 1, 1, 1))
    x = draw(0, 1000, 1, 1, 1)
    samples = jax.jit(lambda x: sample_loop(o, model_fn, x, lambda i: steps[i], sampler=sampler))(x)
    assert abs(samples.std() - 0.5) < 0.05

    def loss(wrong):
        output = np.concatenate([NOISE, *rest], axis=-1)
        terms = full.loss_terms(lambda x, t: output + wrong, X0, T, NOISE)
        return terms["loss"].sum(), terms

    slope, terms = jax.grad(loss, has_aux=True)(1.0)
    assert np.isfinite([slope, *np.concatenate([*terms.values()])]).all()
    np.testing.assert_allclose(full.alpha_sigma(999), [0, 1])
    for clip in (False, True):
        at_end = full.estimate(np.concatenate([WRONG, *rest], axis=-1), X0, 999, clip)
        np.testing.assert_allclose(at_end.x0, np.clip(-WRONG, *((-1, 1) if clip else (None, None))))
        np.testing.assert_allclose(at_end.noise, X0)


def test_min_snr_weighs_errors_of_x0_alike():
    """Whatever is predicted, an error of x_0 weighs min(SNR, 5), in the paper's own words."""
    plain = objective("x0")
    alpha, sigma = alpha_sigma(plain)
    snr, error = (alpha / sigma) ** 2, WRONG
    weighted = (np.minimum(snr, 5) * error**2).mean(axis=(1, 2, 3))
    exact = {"noise": NOISE, "x0": X0, "velocity": alpha * NOISE - sigma * X0}
    factors = {"noise": alpha / sigma, "x0": 1, "velocity": 1 / sigma}  # that x_0's error has there
    for name in exact:
        o = objective(name, min_snr_gamma=5.0)
        terms = o.loss_terms(lambda x, t: exact[name] + factors[name] * error, X0, T, NOISE)  # noqa: B023
        np.testing.assert_allclose(terms["loss"], weighted, rtol=1e-9)
        np.testing.assert_allclose(
            terms["mse"], (factors[name] ** 2 * error**2 * np.ones_like(error)).mean((1, 2, 3))
        )
    learned = objective("noise", learn_sigma=True, min_snr_gamma=5.0)
    output = np.concatenate([NOISE + error, error], axis=-1)
    terms = learned.loss_terms(lambda x, t: output, X0, T, NOISE)
    weights = (np.minimum(snr, 5) / snr).ravel()
    np.testing.assert_allclose(terms["loss"], weights * terms["mse"] + terms["vb"], rtol=1e-9)


def test_options_that_do_not_go_together():
    with pytest.raises(
        UsageError, match=r"^zero_terminal_snr=True leaves no signal .* objective='velocity'$"
    ):
        objective("noise", zero_terminal_snr=True)
    with pytest.raises(UsageError, match=r"^min_snr_gamma=5 gives no weight to the last step"):
        objective("velocity", zero_terminal_snr=True, min_snr_gamma=5)
