"""The Gaussian process and what a model's output means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.diffusion import (
    Diffusion,
    create_diffusion,
    make_schedule,
    noise_from_x0,
    original_timesteps,
    p_mean_variance,
    q_mean_variance,
    q_posterior,
    q_sample,
    split_output,
    x0_from_noise,
)
from dico_jax.errors import UsageError
from tests import golden
from tests.golden import distance, nhwc

# Options of create_diffusion and of p_mean_variance for each MODEL of diffusion_formulas.npz.
MODELS = {
    "learned_range": ({}, {}),
    "learned_range_clip": ({}, {"clip_denoised": True}),
    "learned_range_fn": ({}, {"denoised_fn": lambda x0: 0.5 * x0 + 0.1}),
    "fixed_large": ({"learn_sigma": False}, {}),
    "fixed_small": ({"learn_sigma": False, "sigma_small": True}, {}),
    "predict_xstart": ({"predict_xstart": True}, {}),
}
# Where the published float32 code itself is further from float64 than 1e-6: noise from x_0 cancels
# at small t, and a clipped x_0 keeps the error of one that was 157 times as large.
FLOAT32_TOLERANCE = {"eps_from_xstart": 1e-5, "p_learned_range_clip_pred_xstart": 1e-4}


class Formulas:
    """The arrays of diffusion_formulas.npz for 1000 or 10 steps, NHWC, in one dtype."""

    def __init__(self, steps, dtype):
        self.g, self.steps, self.dtype = golden.load("diffusion_formulas.npz"), steps, dtype
        self.x0, self.noise, self.model_out = (
            jnp.asarray(nhwc(self.g[name]), dtype) for name in ("x0", "noise", "model_out")
        )
        self.t = self.g[f"t{steps}"]

    def diffusion(self, **options):
        return create_diffusion("10" if self.steps == 10 else "", **options)

    def check(self, name, value):
        reference = nhwc(self.g[f"{name}_{self.steps}_f64"])
        float32 = FLOAT32_TOLERANCE.get(name, 1e-6)
        assert value.dtype == self.dtype
        value = np.broadcast_to(value, reference.shape)
        assert distance(value, reference) < (1e-12 if self.dtype == "float64" else float32), name


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@golden.requires_golden
@pytest.mark.parametrize("steps", [1000, 10])
def test_process_formulas_are_the_published_ones(steps, dtype):
    f = Formulas(steps, dtype)
    d, t = f.diffusion(), f.t
    x_t = q_sample(d, f.x0, t, f.noise)
    f.check("q_sample", x_t)
    marginal, posterior = q_mean_variance(d, f.x0, t), q_posterior(d, f.x0, x_t, t)
    f.check("q_mean", marginal.mean)
    f.check("q_variance", marginal.variance)
    f.check("q_log_variance", marginal.log_variance)
    f.check("q_posterior_mean", posterior.mean)
    f.check("q_posterior_variance", posterior.variance)
    f.check("q_posterior_log_variance_clipped", posterior.log_variance)
    f.check("eps_from_xstart", noise_from_x0(d, x_t, t, f.x0))
    f.check("xstart_from_eps", x0_from_noise(d, x_t, t, f.model_out[..., :4]))


@golden.requires_golden
@pytest.mark.parametrize("steps", [1000, 10])
@pytest.mark.parametrize("name", MODELS)
def test_model_moments_are_the_published_ones(name, steps, dtype):
    f = Formulas(steps, dtype)
    options, arguments = MODELS[name]
    d = f.diffusion(**options)
    output = f.model_out if d.learns_variance else f.model_out[..., :4]
    p = p_mean_variance(d, output, q_sample(d, f.x0, f.t, f.noise), f.t, **arguments)
    assert all(moment.shape == f.x0.shape for moment in p)
    f.check(f"p_{name}_mean", p.mean)
    f.check(f"p_{name}_variance", p.variance)
    f.check(f"p_{name}_log_variance", p.log_variance)
    f.check(f"p_{name}_pred_xstart", p.pred_x0)


def test_options_of_the_published_code():
    default = create_diffusion()
    assert (default.prediction, default.variance, default.loss) == ("noise", "learned_range", "mse")
    assert default.num_steps == 1000
    assert default.learns_variance
    assert default.schedule.betas[-1] == pytest.approx(0.02)
    assert create_diffusion(predict_xstart=True).prediction == "x0"
    assert create_diffusion(learn_sigma=False).variance == "fixed_large"
    assert create_diffusion(learn_sigma=False, sigma_small=True).variance == "fixed_small"
    assert create_diffusion(use_kl=True).loss == "kl"
    assert create_diffusion(rescale_learned_sigmas=True).loss == "rescaled_mse"
    short = create_diffusion("25", noise_schedule="squaredcos_cap_v2", diffusion_steps=100)
    assert short.num_steps == 25
    assert short.schedule.timestep_map[-1] == 99
    assert short.schedule.betas[-1] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_small": True}, "sigma_small=True has no effect with learn_sigma=True"),
        ({"rescale_learned_sigmas": True, "use_kl": True}, "no effect with use_kl=True"),
        ({"rescale_learned_sigmas": True, "learn_sigma": False}, "no effect with learn_sigma=Fal"),
        ({"noise_schedule": "sqrt"}, "noise_schedule='sqrt' is unknown: use 'linear' or"),
        ({"timestep_respacing": "ddim300"}, "'ddim250' or 'ddim334'"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(UsageError, match=message):
        create_diffusion(**options)


@pytest.mark.parametrize(
    ("field", "choice"), [("prediction", "'x0'"), ("variance", "'fixed_small'"), ("loss", "'kl'")]
)
def test_unknown_kinds_are_refused(field, choice):
    with pytest.raises(UsageError, match=f"{field}='v' is unknown: use .*{choice}"):
        Diffusion(make_schedule(), **{field: "v"})


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 2, 2, 2, 4)])
def test_x0_and_noise_are_recovered_at_any_rank(shape):
    d, t = create_diffusion(), np.array([0, 400, 999])
    x0, noise = draw(*shape), draw(*shape, seed=1)
    x_t = q_sample(d, x0, t, noise)
    assert x_t.shape == shape
    # Float32 is 2**-24 of x_t, which the factors 1/sqrt(1 - alpha-bar), 100, and
    # 1/sqrt(alpha-bar), 157, enlarge.
    assert distance(noise_from_x0(d, x_t, t, x0), noise) < 3e-5
    assert distance(x0_from_noise(d, x_t, t, noise), x0) < 5e-5


def test_one_index_for_all_is_that_index_for_each():
    d = create_diffusion("10")
    x, output = draw(3, 2, 2, 4), draw(3, 2, 2, 8, seed=1)
    for one, each in zip(
        p_mean_variance(d, output, x, 7),
        p_mean_variance(d, output, x, np.full(3, 7)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, each)


def test_variance_channels_span_posterior_to_beta():
    d = create_diffusion()
    t, x = np.array([1, 500]), draw(2, 1, 1, 4)
    ends = {-1.0: d.schedule.posterior_variance[t], 1.0: d.schedule.betas[t]}
    for value, variance in ends.items():
        output = np.concatenate([x, np.full_like(x, value)], axis=-1)
        p = p_mean_variance(d, output, x, t)
        np.testing.assert_allclose(p.variance[:, 0, 0, 0], variance, rtol=2e-6)
        np.testing.assert_allclose(np.exp(p.log_variance), p.variance, rtol=1e-6)


def test_fixed_variances():
    s, x, t = create_diffusion().schedule, draw(3, 1, 1, 4), np.array([0, 1, 999])
    small = create_diffusion(learn_sigma=False, sigma_small=True)
    large = create_diffusion(learn_sigma=False)
    first = s.posterior_variance[1]  # instead of 0, whose logarithm no likelihood can use
    for d, variance, clipped in (
        (small, s.posterior_variance[t], [first, *s.posterior_variance[t[1:]]]),
        (large, [first, *s.betas[t[1:]]], [first, *s.betas[t[1:]]]),
    ):
        p = p_mean_variance(d, x, x, t)
        np.testing.assert_allclose(p.variance[:, 0, 0, 0], variance, rtol=1e-6)
        np.testing.assert_allclose(p.log_variance[:, 0, 0, 0], np.log(clipped), rtol=1e-6)


def test_denoised_fn_comes_before_clipping():
    d = create_diffusion(predict_xstart=True, learn_sigma=False)
    x = jnp.full((1, 4), 3.0)
    p = p_mean_variance(d, x, x, 5, clip_denoised=True, denoised_fn=lambda x0: x0 / 4)
    np.testing.assert_array_equal(p.pred_x0, np.full((1, 4), 0.75))
    p = p_mean_variance(d, x, x, 5, clip_denoised=True, denoised_fn=lambda x0: x0 * 4)
    np.testing.assert_array_equal(p.pred_x0, np.full((1, 4), 1.0))


def test_bfloat16_is_computed_in_float32():
    d, t = create_diffusion(), np.array([998, 999])
    x, noise, output = (jnp.asarray(draw(2, 2, 2, c, seed=c), jnp.bfloat16) for c in (4, 4, 8))
    x32, noise32, output32 = (a.astype(jnp.float32) for a in (x, noise, output))
    pairs = [
        (q_sample(d, x, t, noise), q_sample(d, x32, t, noise32)),
        (x0_from_noise(d, x, t, noise), x0_from_noise(d, x32, t, noise32)),
        (noise_from_x0(d, x, t, noise), noise_from_x0(d, x32, t, noise32)),
        (q_mean_variance(d, x, t), q_mean_variance(d, x32, t)),
        (q_posterior(d, x, noise, t), q_posterior(d, x32, noise32, t)),
        (p_mean_variance(d, output, x32, t), p_mean_variance(d, output32, x32, t)),
        (p_mean_variance(d, output, x, t), p_mean_variance(d, output32, x32, t)),
    ]
    for low, full in jax.tree.leaves(pairs, is_leaf=lambda p: type(p) is tuple):
        for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(full), strict=True):
            assert a.dtype == jnp.float32
            np.testing.assert_array_equal(a, b)


def test_timesteps_beyond_the_process_are_loud():
    d, x = create_diffusion("10"), draw(2, 2, 2, 4)
    x_t = np.asarray(q_sample(d, x, np.array([9, 10]), x))
    assert np.isfinite(x_t[0]).all()
    assert np.isnan(x_t[1]).all()


def test_the_model_is_given_original_timesteps():
    timesteps = original_timesteps(create_diffusion("5"), np.array([0, 1, 2, 3, 4]))
    assert timesteps.dtype == jnp.int32
    assert timesteps.tolist() == [0, 250, 500, 749, 999]


def test_output_channels_are_split_on_the_last_axis():
    output = draw(2, 3, 3, 8)
    prediction, variance = split_output(create_diffusion(), output, 4)
    np.testing.assert_array_equal(prediction, output[..., :4])
    np.testing.assert_array_equal(variance, output[..., 4:])
    assert split_output(create_diffusion(learn_sigma=False), output, 8)[1] is None


@pytest.mark.parametrize(("learn_sigma", "channels", "needed"), [(True, 4, 8), (False, 8, 4)])
def test_output_channels_that_do_not_fit(learn_sigma, channels, needed):
    d = create_diffusion(learn_sigma=learn_sigma)
    with pytest.raises(UsageError, match=f"returned {channels} channels .* needs {needed}.*sigma"):
        p_mean_variance(d, draw(2, 3, 3, channels), draw(2, 3, 3, 4), 0)


def test_a_diffusion_can_be_a_static_argument():
    d, x, t = create_diffusion("10"), draw(2, 4), np.array([3, 9])
    jitted = jax.jit(q_sample, static_argnums=0)
    np.testing.assert_allclose(jitted(d, x, t, x), q_sample(d, x, t, x), rtol=1e-6)
