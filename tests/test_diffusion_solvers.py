"""Samplers, the sampling loop and randomness per image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dico_jax.diffusion import (
    SamplingOptions,
    create_diffusion,
    ddim_step,
    ddpm_step,
    guided_model_fn,
    image_keys,
    initial_noise,
    q_sample,
    sample_loop,
    step_noise,
)
from dico_jax.errors import UsageError
from tests.golden import distance
from tests.test_diffusion_gaussian import draw

WEIGHTS, TABLE = 0.6 * draw(4, 8, seed=5), draw(11, 8, seed=6)
SHAPE = (3, 2, 4)
STEPS = {"ddpm": lambda *args, eta, **options: ddpm_step(*args, **options), "ddim": ddim_step}


def model(x, t, y):
    """A small stand-in: every output depends on x, t and y, and stays in [-1, 1]."""
    condition = jnp.asarray(TABLE, x.dtype)[y] + jnp.cos(t.astype(x.dtype) / 300)[:, None]
    return jnp.tanh(x @ jnp.asarray(WEIGHTS, x.dtype) + condition[:, None, None])


def with_labels(x, t):
    return model(x, t, jnp.arange(x.shape[0]))


def python_loop(diffusion, model_fn, x, noise_fn, sampler, **options):
    """The steps one by one, not compiled."""
    xs, x0s = [], []
    for i in reversed(range(diffusion.num_steps)):
        timesteps = np.full(x.shape[0], diffusion.schedule.timestep_map[i])
        output = model_fn(x, jnp.asarray(timesteps))
        step = STEPS[sampler]
        x, x0 = step(diffusion, output, x, i, noise_fn(i), **options)
        xs.append(x)
        x0s.append(x0)
    return np.stack(xs), np.stack(x0s)


@pytest.mark.parametrize(("scale", "clip_denoised"), [(1.0, True), (1.5, False)])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_compiled_loop_equals_a_python_loop(sampler, eta, scale, clip_denoised):
    d = create_diffusion("7")
    options = {"sampler": sampler, "eta": eta, "clip_denoised": clip_denoised}
    with jax.enable_x64(True):
        x_T = jnp.asarray(draw(2, *SHAPE), jnp.float64)
        noise = jnp.asarray(draw(7, 2, *SHAPE, seed=1), jnp.float64)
        model_fn = guided_model_fn(model, jnp.array([3, 8]), 10, scale, 4)
        loop = jax.jit(
            lambda x: sample_loop(
                d, model_fn, x, lambda i: noise[i], return_trajectory=True, **options
            )
        )
        samples, trajectory = loop(x_T)
        xs, x0s = python_loop(d, model_fn, x_T, lambda i: noise[i], **options)
    assert samples.dtype == jnp.float64
    np.testing.assert_array_equal(samples, trajectory.x[-1])
    assert trajectory.x.shape == trajectory.pred_x0.shape == (7, 2, *SHAPE)
    assert distance(trajectory.x, xs) < 1e-12
    assert distance(trajectory.pred_x0, x0s) < 1e-12
    assert (np.abs(x0s).max() <= 1) == clip_denoised


def test_samplers_differ():
    d, x = create_diffusion("7"), draw(2, *SHAPE)
    noise = draw(7, 2, *SHAPE, seed=1)
    runs = [
        sample_loop(d, with_labels, x, lambda i: jnp.asarray(noise)[i], **options)
        for options in ({}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5})
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert distance(runs[a], runs[b]) > 1e-2


def test_model_gets_the_original_timesteps_from_last_to_first():
    d, seen = create_diffusion("5"), []

    def spy(x, timesteps):
        assert timesteps.dtype == jnp.int32
        jax.debug.callback(lambda t: seen.append(t.tolist()), timesteps, ordered=True)
        return with_labels(x, timesteps)

    sample_loop(d, spy, draw(2, *SHAPE), None, sampler="ddim").block_until_ready()
    jax.effects_barrier()
    assert seen == [[t, t] for t in (999, 749, 500, 250, 0)]


def point_model(diffusion, x0, learn_sigma=True):
    """The exact model of data that are all x0, asked for original timesteps."""
    alphas_cumprod = create_diffusion().schedule.alphas_cumprod

    def model_fn(x, timesteps):
        a = jnp.asarray(alphas_cumprod)[timesteps][:, None, None, None]
        noise = (x - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        return jnp.concatenate([noise, jnp.zeros_like(x)], -1) if learn_sigma else noise

    return model_fn


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_exact_model_of_one_point_leads_to_it(sampler, eta):
    d = create_diffusion("20")
    with jax.enable_x64(True):
        x0, noise = (jnp.asarray(draw(2, *SHAPE, seed=s), jnp.float64) for s in (3, 4))
        fresh = jnp.asarray(draw(20, 2, *SHAPE, seed=5), jnp.float64)
        samples, trajectory = sample_loop(
            d,
            point_model(d, x0),
            q_sample(d, x0, 19, noise),
            lambda i: fresh[i],
            sampler=sampler,
            eta=eta,
            return_trajectory=True,
        )
        assert distance(samples, x0) < 1e-12
        np.testing.assert_allclose(trajectory.pred_x0, jnp.stack([x0] * 20), atol=1e-10)
        if sampler == "ddim" and eta == 0:  # stays on the line from x_0 to the noise
            path = [q_sample(d, x0, i, noise) for i in reversed(range(19))]
            np.testing.assert_allclose(trajectory.x[:-1], path, atol=1e-10)


@pytest.mark.parametrize("i", [0, 1, 5, 9])
def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance(i):
    d = create_diffusion("10", learn_sigma=False, sigma_small=True)
    with jax.enable_x64(True):
        x, output, noise = (jnp.asarray(draw(2, *SHAPE, seed=s), jnp.float64) for s in range(3))
        for clip in (False, True):
            ddim, x0 = ddim_step(d, output, x, i, noise, eta=1.0, clip_denoised=clip)
            ddpm, same = ddpm_step(d, output, x, i, noise, clip_denoised=clip)
            assert distance(ddim, ddpm) < 1e-12
            np.testing.assert_array_equal(x0, same)


def test_ddpm_step_by_hand():
    d = create_diffusion("10")
    s, i = d.schedule, 4
    x, noise = np.float64(0.8), np.float64(-1.3)
    eps, v = 0.4, 0.25
    x0 = (x - np.sqrt(1 - s.alphas_cumprod[i]) * eps) / np.sqrt(s.alphas_cumprod[i])
    mean = s.posterior_mean_coef1[i] * x0 + s.posterior_mean_coef2[i] * x
    # 0.25 of [-1, 1] is 5/8 of the way from the posterior's variance to beta, in the logarithm.
    variance = s.betas[i] ** 0.625 * s.posterior_variance[i] ** 0.375
    with jax.enable_x64(True):
        x_prev, pred_x0 = ddpm_step(d, jnp.array([[eps, v]]), x[None, None], i, noise[None, None])
    assert float(x_prev[0, 0]) == pytest.approx(mean + np.sqrt(variance) * noise, rel=1e-12)
    assert float(pred_x0[0, 0]) == pytest.approx(x0, rel=1e-12)


def test_clipping_changes_the_direction_of_ddim():
    d = create_diffusion("10", learn_sigma=False)
    s, i = d.schedule, 6
    x, eps = jnp.full((1, 1), 2.0), jnp.full((1, 1), -0.5)  # predicts x_0 = 24
    x_prev, x0 = ddim_step(d, eps, x, i, None, clip_denoised=True)
    noise = (2.0 - np.sqrt(s.alphas_cumprod[i])) / np.sqrt(1 - s.alphas_cumprod[i])
    prev = s.alphas_cumprod_prev[i]
    assert float(x0[0, 0]) == 1.0
    assert float(x_prev[0, 0]) == pytest.approx(np.sqrt(prev) + np.sqrt(1 - prev) * noise, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim", "eta": 1.0}])
def test_noise_at_index_zero_has_no_effect(options):
    d, noise = create_diffusion("4"), jnp.asarray(draw(4, 2, *SHAPE, seed=1))

    def run(noise):
        return sample_loop(d, with_labels, draw(2, *SHAPE), lambda i: noise[i], **options)

    samples = run(noise)
    np.testing.assert_array_equal(run(noise.at[0].set(jnp.nan)), samples)
    assert distance(run(noise.at[1].multiply(1.5)), samples) > 1e-5


@pytest.mark.parametrize("step", [ddpm_step, ddim_step])
def test_steps_take_an_index_per_example(step):
    d, output = create_diffusion("10"), draw(3, *SHAPE[:2], 8, seed=1)
    x, noise = draw(3, *SHAPE), draw(3, *SHAPE, seed=2)
    options = {} if step is ddpm_step else {"eta": 0.5}
    both = step(d, output, x, np.array([0, 4, 9]), noise, **options)
    for n, i in enumerate([0, 4, 9]):
        one = step(d, output[n : n + 1], x[n : n + 1], i, noise[n : n + 1], **options)
        for a, b in zip(both, one, strict=True):
            np.testing.assert_allclose(a[n : n + 1], b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}])
def test_bfloat16_is_computed_in_float32(options):
    d, noise = create_diffusion("4"), jnp.asarray(draw(4, 2, *SHAPE, seed=1))
    x = jnp.asarray(draw(2, *SHAPE), jnp.bfloat16)

    def low(x, t):
        assert x.dtype == jnp.float32
        return with_labels(x, t).astype(jnp.bfloat16)

    def rounded(x, t):
        return low(x, t).astype(jnp.float32)

    samples = sample_loop(d, low, x, lambda i: noise[i].astype(jnp.bfloat16), **options)
    assert samples.dtype == jnp.float32
    full = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, noise)]
    expected = sample_loop(d, rounded, full[0], lambda i: full[1][i], **options)
    np.testing.assert_allclose(samples, expected, rtol=1e-6, atol=1e-6)


def test_a_float64_model_does_not_break_a_float32_loop():
    with jax.enable_x64(True):
        x = jnp.asarray(draw(2, *SHAPE), jnp.float32)
        double = lambda x, t: with_labels(x.astype(jnp.float64), t)  # noqa: E731
        samples = sample_loop(create_diffusion("3"), double, x, None, sampler="ddim")
    assert samples.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "plms"}, "sampler='plms' is unknown: use one of ddpm, ddim"),
        ({"eta": 0.5}, "eta=0.5 has no effect with Ddpm: use 0, or ddim"),
        ({"sampler": "ddim", "eta": 1.5}, "eta=1.5 must be from 0 .* to 1"),
        ({"sampler": "ddim", "eta": -1}, "eta=-1 must be from 0"),
    ],
)
def test_option_errors(options, message):
    if "eta" in options:  # found before anything is traced
        given = {"sampler": options.get("sampler", "ddpm"), "ddim_eta": options["eta"]}
        with pytest.raises(UsageError, match=f"sampling.ddim_{message}"):
            SamplingOptions(**given)
    noise = draw(2, *SHAPE)
    with pytest.raises(UsageError, match=message):
        sample_loop(create_diffusion("3"), with_labels, noise, lambda i: noise, **options)


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim", "eta": 0.5}])
def test_missing_noise(options):
    with pytest.raises(UsageError, match="draws noise at every step: give a noise_fn, or use"):
        sample_loop(create_diffusion("3"), with_labels, draw(2, *SHAPE), None, **options)


def test_output_channels_that_do_not_fit():
    d = create_diffusion("3", learn_sigma=False)
    with pytest.raises(UsageError, match="returned 8 channels for data of 4"):
        sample_loop(d, with_labels, draw(2, *SHAPE), None, sampler="ddim")


def test_noise_belongs_to_the_image():
    some = np.array([9, 2])
    everyone, part = image_keys(7, np.arange(12)), image_keys(7, some)
    noise = initial_noise(everyone, SHAPE)
    assert noise.shape == (12, *SHAPE)
    assert noise.dtype == jnp.float32
    np.testing.assert_array_equal(initial_noise(part, SHAPE), noise[some])
    np.testing.assert_array_equal(step_noise(part, 4, SHAPE), step_noise(everyone, 4, SHAPE)[some])
    with jax.default_prng_impl("rbg"):  # whose draws depend on the batch
        np.testing.assert_array_equal(initial_noise(image_keys(7, some), SHAPE), noise[some])
    with jax.enable_x64(True):
        double = initial_noise(image_keys(7, some), SHAPE)
    assert double.dtype == jnp.float32
    np.testing.assert_array_equal(double, np.asarray(noise)[some])


def test_no_two_draws_are_the_same():
    keys = image_keys(7, np.arange(3))
    draws = [initial_noise(keys, SHAPE), initial_noise(image_keys(8, np.arange(3)), SHAPE)]
    draws += [step_noise(keys, i, SHAPE) for i in range(4)]
    flat = np.concatenate([np.reshape(a, (3, -1)) for a in draws])
    assert len(np.unique(flat, axis=0)) == len(flat) == 18
    assert abs(np.corrcoef(flat) - np.eye(18)).max() < 0.8
    assert abs(flat.mean()) < 0.15
    assert abs(flat.std() - 1) < 0.15


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_not_cut_to_32_bits(seed):
    with pytest.raises(UsageError, match=f"seed={seed} must be from 0 to 4294967295"):
        image_keys(seed, [0])


def test_step_noise_is_the_same_for_a_traced_index():
    keys = image_keys(7, np.arange(2))
    jitted = jax.jit(lambda i: step_noise(keys, i, SHAPE))
    np.testing.assert_array_equal(jitted(jnp.int32(5)), step_noise(keys, 5, SHAPE))


def test_samples_do_not_depend_on_the_devices():
    d, n = create_diffusion("5"), 16

    def run(keys, labels):
        model_fn = guided_model_fn(model, labels, 10, 1.5, 4)
        return sample_loop(
            d, model_fn, initial_noise(keys, SHAPE), lambda i: step_noise(keys, i, SHAPE)
        )

    jitted = jax.jit(run)

    def samples(indices, sharding=None):
        arguments = image_keys(0, indices), np.asarray(indices) % 10
        return jitted(*jax.device_put(arguments, sharding))

    whole = samples(np.arange(n))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = samples(np.arange(n), NamedSharding(mesh, PartitionSpec("data")))
    assert len(spread.sharding.device_set) == 8
    assert distance(spread, whole) < 1e-5


def test_float64_noise_needs_the_switch():
    with pytest.raises(UsageError, match="dtype='float64' needs JAX's own switch"):
        initial_noise(image_keys(0, [0]), SHAPE, jnp.float64)
