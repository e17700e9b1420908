"""Flow matching and MeanFlow against their formulas."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.config import DEFAULTS
from dico_jax.configs import digits, digits_flow, digits_mean_flow, xl256_flow
from dico_jax.diffusion import create_objective, sample_loop
from dico_jax.errors import UsageError
from dico_jax.experiment import experiment_from_config
from dico_jax.models import create_model
from dico_jax.pytorch.conversion import to_pytorch
from dico_jax.training.loop import train


def objective(name="flow", num_steps=None, **options):
    options = DEFAULTS["diffusion"] | {"objective": name} | options
    return create_objective(options, learn_sigma=False, num_steps=num_steps)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


X0, NOISE, OUTPUT = (draw(seed, 4, 2, 2, 3) for seed in range(3))
T = np.array([0.0, 0.25, 0.9, 1.0])
S = T[:, None, None, None]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_the_loss_of_a_velocity(float64):
    seen = []

    def model_fn(x, t):
        seen.extend((x, t))
        return OUTPUT

    terms = objective(time_scale=1000.0).loss_terms(model_fn, X0, T, NOISE)
    np.testing.assert_allclose(seen[0], (1 - S) * X0 + S * NOISE, rtol=1e-12)
    np.testing.assert_allclose(seen[1], 1000 * T)
    expected = ((OUTPUT - (NOISE - X0)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(terms["loss"], expected, rtol=1e-12)
    np.testing.assert_allclose(terms["mse"], expected, rtol=1e-12)


def test_estimates_are_what_x_is_made_of(float64):
    o, x = objective(), (1 - S) * X0 + S * NOISE
    x0, noise = o.estimate(NOISE - X0, x, T)
    np.testing.assert_allclose(x0, X0, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(noise, NOISE, rtol=1e-12, atol=1e-12)
    found = o.estimate(OUTPUT, x, T)
    np.testing.assert_allclose(found.noise - found.x0, OUTPUT, rtol=1e-9)
    clipped = o.estimate(OUTPUT, x, T, clip_denoised=True)
    np.testing.assert_allclose(clipped.x0, np.clip(x - S * OUTPUT, -1, 1), rtol=1e-12)
    again = (1 - S) * clipped.x0 + S * clipped.noise
    np.testing.assert_allclose(again[1:], x[1:], rtol=1e-12)
    assert np.isfinite(clipped.noise).all()


def test_the_path_at_its_ends():
    o = objective(num_steps=4)
    np.testing.assert_allclose(o.times, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(o.alpha_sigma(o.times), [1 - o.times, o.times])
    # q(x_s | x_t, x_0) of x_t = (1 - t) x_0 + t noise: s^2 (1 - (s (1 - t) / t / (1 - s))^2)
    t, s = o.times[1:], o.times[:-1]
    expected = s**2 * (1 - (s * (1 - t) / (t * (1 - s))) ** 2)
    np.testing.assert_allclose(o.posterior_variance(), expected, rtol=1e-12)
    assert o.posterior_variance()[-1] == s[-1] ** 2  # noise alone says nothing of x_s


def test_times_that_are_drawn():
    key, x0 = jax.random.key(0), jnp.zeros((4000, 1))
    uniform, _ = objective().draw(key, x0)
    np.testing.assert_allclose(
        np.quantile(uniform, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03
    )
    normal, noise = objective(time_sampling="logit_normal", logit_mean=-0.4).draw(key, x0)
    logits = np.log(normal / (1 - normal))
    np.testing.assert_allclose([logits.mean(), logits.std()], [-0.4, 1], atol=0.05)
    assert abs(np.corrcoef(normal, noise[:, 0])[0, 1]) < 0.05
    times, _ = objective("mean_flow", jump_share=0.25).draw(key, x0)
    begin, end = np.asarray(times).T
    assert (begin >= end).all()
    assert abs((begin > end).mean() - 0.25) < 0.03
    assert begin[begin > end].mean() > 0.6  # the later of two
    assert abs(begin[begin == end].mean() - 2 / 3) < 0.03


def shake(params, seed):
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * draw(seed + k, *leaf.shape) for k, leaf in enumerate(leaves)]
    )


SIZES = {
    "DiCo": {"hidden_size": 4, "depth": (1, 1, 1, 1, 1)},
    "DiT": {"hidden_size": 8, "depth": 1, "num_heads": 2},
}


@pytest.mark.parametrize("name", [pytest.param("DiCo", marks=pytest.mark.slow), "DiT"])
def test_the_target_of_mean_flow_by_finite_differences(float64, name):
    """u - (v - (t - r) du/dt) with du/dt between two points of the path, by a real network."""
    options = {"in_channels": 1, "num_classes": 3, "learn_sigma": False, "dtype": "float64"}
    model = create_model(name, **SIZES[name], **options, two_times=True, plain_ops=True)
    inputs = model.example_inputs(4, 4)
    params = shake(model.init(jax.random.key(0), *inputs)["params"], 0)
    x0, noise = draw(1, 4, 4, 4, 1), draw(2, 4, 4, 4, 1)
    begin, end = np.array([0.3, 0.5, 0.8, 1.0]), np.array([0.3, 0.1, 0.7, 0.0])
    o = objective("mean_flow", time_scale=1.0, loss_power=0.75)

    def model_fn(x, times):
        return model.apply({"params": params}, x, times, inputs[2])

    def u(t):
        s = t[:, None, None, None]
        return np.asarray(model_fn((1 - s) * x0 + s * noise, np.stack([t, end], axis=-1)))

    small = 1e-5
    slope = (u(begin + small) - u(begin - small)) / (2 * small)
    error = u(begin) - (noise - x0 - (begin - end)[:, None, None, None] * slope)
    terms = jax.jit(lambda: o.loss_terms(model_fn, x0, np.stack([begin, end], -1), noise))()
    squares = (error**2).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(terms["mse"], squares / 16, rtol=1e-7)
    np.testing.assert_allclose(terms["loss"], squares / (squares + 1e-3) ** 0.75, rtol=1e-7)
    plain = ((u(begin) - (noise - x0)) ** 2).mean(axis=(1, 2, 3))
    assert terms["mse"][0] == pytest.approx(plain[0])
    assert abs(terms["mse"][1:] / plain[1:] - 1).min() > 1e-3


def test_what_is_held_in_mean_flow(float64):
    """The gradient is that of the prediction alone: neither the target's nor the weight's."""
    o, times = objective("mean_flow"), np.stack([T, T / 2], -1)

    def total(a):
        terms = o.loss_terms(
            lambda x, t: a * x * (1 + t[:, :1, None, None] / 1000), X0, times, NOISE
        )
        return terms["loss"].sum()

    a, x = 0.7, (1 - S) * X0 + S * NOISE
    v, u = NOISE - X0, a * x * (1 + S)
    error = u - (v - S / 2 * (a * v * (1 + S) + a * x))
    weights = 1 / ((error**2).sum(axis=(1, 2, 3), keepdims=True) + 1e-3)
    expected = (weights * 2 * error * x * (1 + S)).sum()
    np.testing.assert_allclose(jax.grad(total)(a), expected, rtol=1e-9)


@pytest.mark.parametrize(("sampler", "num_steps"), [("jump", 1), ("jump", 4), ("ddim", 200)])
def test_an_exact_mean_velocity_is_sampled_exactly(float64, sampler, num_steps):
    """Data are normal with deviation 0.5: x moves along the flow with its marginal deviation."""
    o = objective("mean_flow", num_steps, time_scale=1.0)

    def model_fn(x, times):
        t, s = (times[:, k, None, None, None] for k in (0, 1))

        def deviation(t):
            return jnp.sqrt((1 - t) ** 2 * 0.25 + t**2)

        def velocity(t):  # of x in units of the deviation
            return (t - (1 - t) * 0.25) / deviation(t) ** 2

        same = t == s
        jump = (1 - deviation(s) / deviation(t)) / jnp.where(same, 1, t - s)
        return x * jnp.where(same, velocity(t), jump)

    x = jnp.asarray(draw(0, 5, 2, 2, 1))
    samples, path = sample_loop(o, model_fn, x, None, sampler=sampler, return_trajectory=True)
    np.testing.assert_allclose(samples, 0.5 * x, rtol=1e-9 if sampler == "jump" else 0.02)
    if sampler == "jump":
        np.testing.assert_allclose(path.x[-1], samples)


def test_only_mean_flow_can_jump():
    with pytest.raises(UsageError, match=r"sampler='jump' has no path .*objective='mean_flow'"):
        sample_loop(
            objective("flow", 2), lambda x, t: x, jnp.zeros((1, 2, 2, 1)), None, sampler="jump"
        )


@pytest.mark.parametrize(
    ("config", "field", "value", "said"),
    [
        (digits, "model.two_times", True, "does not fit this .*objective: set it to False"),
        (digits_flow, "model.learn_sigma", True, "velocities: set it to False"),
        (digits_flow, "diffusion.min_snr_gamma", 5.0, "has no effect with objective='flow'"),
        (digits_flow, "diffusion.zero_terminal_snr", True, "has no effect with objective='flow'"),
        (digits_flow, "diffusion.noise_schedule", "cos", "with objective='flow': .* to 'linear'"),
        (digits_flow, "diffusion.diffusion_steps", 50, "with objective='flow': set it to 1000"),
        (digits_flow, "diffusion.jump_share", 0.5, "with objective='flow': set it to 0.25"),
        (digits_flow, "diffusion.loss_power", 0.5, "has no effect with objective='flow'"),
        (digits, "diffusion.time_sampling", "logit_normal", "with objective='noise'"),
        (digits, "diffusion.logit_mean", -0.4, "has no effect with objective='noise'"),
        (digits, "diffusion.time_scale", 1.0, "has no effect with objective='noise'"),
        (digits, "diffusion.jump_share", 0.5, "has no effect with objective='noise'"),
        (xl256_flow, "diffusion.logit_mean", -0.4, "with time_sampling='uniform': set it to 0"),
        (digits_mean_flow, "model.plain_ops", False, "differentiated forwards, .*: set it to True"),
        (digits_mean_flow, "model.two_times", False, "does not fit .*: set it to True"),
        (digits_mean_flow, "model.learn_sigma", True, "velocities: set it to False"),
    ],
)
def test_what_an_objective_cannot_train(config, field, value, said):
    wrong = config.get_config()
    section, name = field.split(".")
    wrong[section][name] = value
    with pytest.raises(UsageError, match=rf"^config\.{field}={value!r} .*{said}"):
        experiment_from_config(wrong)


@pytest.mark.slow
def test_a_run_of_mean_flow_goes_on_as_if_never_stopped(tmp_path):
    """With a small DiT; its samples are jumps."""
    config = digits_mean_flow.get_config()
    config.model.update(name="DiT", num_heads=1, patch_size=4, hidden_size=8, depth=1)
    config.data.batch_size = 16
    config.training.update(num_steps=4, checkpoint_every_steps=2, log_every_steps=1)
    config.sampling.update(batch_size=16, grid_every_steps=4, grid_columns=2)
    config.eval.class_agreement_samples = 0
    train(config, str(tmp_path / "whole"))
    config.training.num_steps = 2
    train(config, str(tmp_path / "parts"))
    config.training.num_steps = 4
    train(config, str(tmp_path / "parts"))
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    found = [[row["mse"] for row in some if "mse" in row] for some in rows]
    assert found[0] == found[1]
    assert len(found[0]) == 4
    assert any(name.startswith("mse_t75_100") for row in rows[0] for name in row)
    grids = [
        (tmp_path / name / "samples/step_0000004.png").read_bytes() for name in ("whole", "parts")
    ]
    assert grids[0] == grids[1]
    with pytest.raises(UsageError, match=r"config.model.two_times=True cannot be converted"):
        to_pytorch(tmp_path / "whole", tmp_path / "out.pt")
