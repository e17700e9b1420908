"""Noise schedules, respacing and the tables that follow from them."""

import dataclasses
import json
import math

import numpy as np
import pytest

from dico_jax.diffusion import (
    Schedule,
    beta_schedule,
    create_diffusion,
    make_schedule,
    respaced_timesteps,
)
from dico_jax.errors import UsageError
from tests import golden

CONFIGS = [
    "linear_1000",
    "linear_250",
    "linear_ddim50",
    "linear_25",
    "linear_10",
    "linear_10_15_20",
    "cosine_1000",
    "cosine_50",
]


@golden.requires_golden
@pytest.mark.parametrize("name", CONFIGS)
def test_tables_are_the_published_ones(name):
    g = golden.load("diffusion_tables.npz")
    configs = json.loads(str(g["configs"]))
    assert sorted(configs) == sorted(CONFIGS)
    schedule = create_diffusion(**configs[name]).schedule
    for field in dataclasses.fields(Schedule):
        ours, published = getattr(schedule, field.name), g[f"{name}/{field.name}"]
        assert ours.dtype == published.dtype
        np.testing.assert_allclose(ours, published, rtol=1e-12, atol=0, err_msg=field.name)


@golden.requires_golden
def test_respacing_is_the_published_one():
    g = golden.load("diffusion_tables.npz")
    strings = [key.removeprefix("map/") for key in g.files if key.startswith("map/")]
    assert len(strings) == 21
    for string in strings:
        np.testing.assert_array_equal(respaced_timesteps(1000, string), g[f"map/{string}"])


@golden.requires_golden
def test_respacing_refuses_what_the_published_code_refuses():
    strings = golden.load("diffusion_tables.npz")["bad"]
    assert len(strings) == 6
    for string in strings:
        with pytest.raises(UsageError, match="timestep_respacing="):
            respaced_timesteps(1000, str(string))


def test_linear_schedule_numbers():
    betas = beta_schedule("linear", 1000)
    assert betas.shape == (1000,)
    assert betas.dtype == np.float64
    assert betas[0] == 1e-4
    assert betas[-1] == 0.02
    np.testing.assert_allclose(np.diff(betas), 0.0199 / 999, rtol=1e-10)
    # alpha-bar of the last step, summed exactly in the logarithm.
    last = math.exp(math.fsum(math.log1p(-(1e-4 + i * 0.0199 / 999)) for i in range(1000)))
    assert last == pytest.approx(4.0358e-5, rel=1e-5)
    assert make_schedule().alphas_cumprod[-1] == pytest.approx(last, rel=1e-12)
    # As much noise with another number of steps: a fifth as many, each with five times the beta.
    np.testing.assert_allclose(beta_schedule("linear", 200)[[0, -1]], [5e-4, 0.1], rtol=1e-12)


def test_cosine_schedule_numbers():
    schedule = make_schedule("squaredcos_cap_v2", 100)

    def signal(i):
        return math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [signal(i + 1) / signal(0) for i in range(99)]
    np.testing.assert_allclose(schedule.alphas_cumprod[:99], expected, rtol=1e-12)
    assert schedule.betas[-1] == pytest.approx(0.999, rel=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "respacing", "kept"),
    [
        (4, "", [0, 1, 2, 3]),
        (4, None, [0, 1, 2, 3]),
        (1000, "5", [0, 250, 500, 749, 999]),  # 249.75 * k
        (1000, 3, [0, 500, 999]),  # 499.5 is halved to even
        (1000, "1", [0]),
        (10, "2,3,1", [0, 3, 4, 5, 6, 7]),  # sections of 4, 3, 3
        (10, (2, 3, 1), [0, 3, 4, 5, 6, 7]),
        (10, np.array([2, 3, 1]), [0, 3, 4, 5, 6, 7]),
        (10, "0,2", [5, 9]),
        (10, "ddim5", [0, 2, 4, 6, 8]),
        (10, " ddim4 ", [0, 3, 6, 9]),
        (10, "ddim10", list(range(10))),
    ],
)
def test_respacing_lists(num_steps, respacing, kept):
    timesteps = respaced_timesteps(num_steps, respacing)
    assert timesteps.dtype == np.int64
    assert timesteps.tolist() == kept


def test_even_spacing_adds_the_stride_up():
    # 999 / 20 = 49.95 is not a float: its multiples and its running sum part at the halves.
    position, kept = 0.0, []
    for _ in range(21):
        kept.append(round(position))
        position += 999 / 20
    assert respaced_timesteps(1000, "21").tolist() == kept
    assert kept != [round(i * (999 / 20)) for i in range(21)]


@pytest.mark.parametrize("respacing", ["250", "10,15,20", "ddim50"])
@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_a_short_process_has_the_marginals_of_the_long_one(name, respacing):
    full, short = make_schedule(name), make_schedule(name, 1000, respacing)
    assert short.num_steps == len(short.timestep_map) < full.num_steps == 1000
    kept = full.alphas_cumprod[short.timestep_map]
    np.testing.assert_allclose(short.alphas_cumprod, kept, rtol=1e-11)
    np.testing.assert_array_equal(short.alphas_cumprod_prev[1:], short.alphas_cumprod[:-1])


@pytest.mark.parametrize("respacing", ["", "25"])
def test_posterior_tables(respacing):
    s = make_schedule("linear", 1000, respacing)
    # Without noise x_t = sqrt(alpha-bar_t) x_0; the posterior's mean is sqrt(alpha-bar_{t-1}) x_0.
    mean = s.posterior_mean_coef1 + s.posterior_mean_coef2 * np.sqrt(s.alphas_cumprod)
    np.testing.assert_allclose(mean, np.sqrt(s.alphas_cumprod_prev), rtol=1e-10)
    # By Bayes, precisions add: 1 / posterior = alpha / beta + 1 / (1 - alpha-bar_{t-1}).
    precision = (1 - s.betas[1:]) / s.betas[1:] + 1 / (1 - s.alphas_cumprod_prev[1:])
    np.testing.assert_allclose(1 / s.posterior_variance[1:], precision, rtol=1e-10)
    assert s.posterior_variance[0] == 0
    log_variance = np.log(s.posterior_variance[1:])
    np.testing.assert_array_equal(s.posterior_log_variance_clipped[1:], log_variance)
    assert s.posterior_log_variance_clipped[0] == log_variance[0]


def test_a_process_of_one_step_is_finite():
    s = make_schedule("linear", 1000, "1")
    assert s.num_steps == 1
    assert s.posterior_log_variance_clipped == pytest.approx(np.log(1e-4))
    assert all(np.isfinite(getattr(s, field.name)).all() for field in dataclasses.fields(s))


def test_schedules_are_constants():
    schedule = make_schedule()
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 1.0
    assert hash(schedule) == hash(schedule)
    assert schedule == schedule
    assert schedule != make_schedule()


@pytest.mark.parametrize(
    ("respacing", "parts"),
    [
        ("1001", ["section 1 of 1 has 1000", "cannot keep 1001", "at most 1000"]),
        ("10,995", ["'10,995'", "section 2 of 2 has 500", "cannot keep 995", "at most 500"]),
        ("333,333,334", ["section 3 of 3 has 333", "cannot keep 334"]),
        ("ddim300", ["'ddim300'", "1000 timesteps", "'ddim250' or 'ddim334'"]),
        ("ddim1", ["exactly 1 of", "'ddim2'"]),
        ("ddim5000", ["'ddim1000'"]),
        ("ddim", ["is not understood", "'ddim50'"]),
        ("ten", ["is not understood"]),
        ("10,,5", ["is not understood"]),
        ((10, 2.5), ["is not understood"]),
        (2.5, ["is not understood"]),
        ("0", ["at least 1"]),
        ("20,-5", ["below 0"]),
        ([], ["at least 1"]),
    ],
)
def test_respacing_errors_give_numbers_and_the_fix(respacing, parts):
    with pytest.raises(UsageError) as error:
        respaced_timesteps(1000, respacing)
    assert "\n" not in str(error.value)
    for part in ["timestep_respacing=", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "num_steps", "message"),
    [
        ("cosine", 1000, "'cosine' is unknown: use 'linear' or 'squaredcos_cap_v2'"),
        ("linear", 0, "diffusion_steps=0 must be at least 1"),
        ("linear", 20, "diffusion_steps=20 is too few for noise_schedule='linear'"),
    ],
)
def test_schedule_errors(name, num_steps, message):
    with pytest.raises(UsageError, match=message):
        beta_schedule(name, num_steps)


def test_a_process_is_shown_in_one_line():
    shown = repr(create_diffusion("250"))
    assert "Schedule(250 steps of timesteps 0 to 999, beta to" in shown
    assert len(shown) < 160
