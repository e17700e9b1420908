"""Streaming moments against one-shot ones, however the rows are split."""

import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.evaluation.statistics import Moments
from tests.golden import distance, load, requires_golden

WIDTH = 37


def correlated(count, offset, seed=0):
    """Rows of unit size with correlations, around `offset`."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH))
    return rows / np.sqrt(WIDTH) + offset


def streamed(rows, sizes=(100,)):
    moments, start, number = Moments(rows.shape[1]), 0, 0
    while start < len(rows):
        size = sizes[number % len(sizes)]
        moments.update(rows[start : start + size])
        start, number = start + size, number + 1
    return moments


def check(moments, rows, bar):
    rows = np.asarray(rows, np.float64)
    assert moments.count == len(rows)
    assert distance(moments.mean, rows.mean(axis=0)) < bar
    assert distance(moments.covariance, np.cov(rows, rowvar=False)) < bar


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_streaming_equals_one_shot(offset):
    rows = correlated(3000, offset)
    moments = streamed(rows, sizes=(1, 700, 33, 1500))
    check(moments, rows, 1e-10)
    assert np.array_equal(moments.covariance, moments.covariance.T)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_any_split_and_order_of_merging_are_equal(offset, parts):
    rng = np.random.default_rng(parts)
    rows = correlated(4000, offset)
    whole = streamed(rows)
    for _ in range(3):
        cuts = np.sort(rng.integers(0, len(rows), parts - 1))  # parts may be empty
        waiting = [streamed(part) for part in np.split(rows, cuts)]
        while len(waiting) > 1:
            first = waiting.pop(rng.integers(len(waiting)))
            second = waiting[rng.integers(len(waiting))]
            before = second.count, first.count
            second.merge(first)
            assert (second.count, first.count) == (sum(before), before[1])
        assert waiting[0].count == len(rows)
        assert distance(waiting[0].mean, whole.mean) < 1e-10
        assert distance(waiting[0].covariance, whole.covariance) < 1e-10


def test_batch_sizes_change_not_even_the_rounding():
    rows = correlated(2500, 10.0)
    one, other = streamed(rows, sizes=(2500,)), streamed(rows, sizes=(7, 64))
    assert np.array_equal(one.mean, other.mean)
    assert np.array_equal(one.covariance, other.covariance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_floating_dtype_is_summed_in_float64(dtype):
    rows = jnp.asarray(correlated(1500, 3.0), jnp.float32)
    rows = np.asarray(rows, np.float64) if dtype == "float64" else rows.astype(dtype)
    check(streamed(rows), np.asarray(rows, np.float64), 1e-10)


def test_a_saved_state_goes_on_exactly(tmp_path):
    rows = correlated(3000, 5.0)
    moments = streamed(rows[:1700])
    np.savez(tmp_path / "state.npz", **moments.to_arrays())
    with np.load(tmp_path / "state.npz") as arrays:
        resumed = Moments(WIDTH)
        resumed.restore(arrays)
    assert resumed.count == 1700
    resumed.update(rows[1700:])
    whole = streamed(rows)
    assert np.array_equal(resumed.mean, whole.mean)
    assert np.array_equal(resumed.covariance, whole.covariance)


def test_reading_changes_nothing():
    rows = correlated(1500, 5.0)
    moments = streamed(rows[:300])
    moments.covariance[:] = 0
    moments.mean[:] = 0
    moments.update(rows[300:])
    assert np.array_equal(moments.covariance, streamed(rows).covariance)


@requires_golden
@pytest.mark.parametrize("name", ["feat_ref", "feat_sample", "spatial_ref", "spatial_sample"])
def test_golden_statistics(name):
    golden = load("metrics.npz")
    moments = streamed(golden[name])
    assert distance(moments.mean, golden[f"mu_{name}_f64"]) < 1e-12
    assert distance(moments.covariance, golden[f"sigma_{name}_f64"]) < 1e-12


def test_rows_that_are_not_finite_are_named_and_nothing_is_added():
    rows = correlated(50, 0.0)
    moments = streamed(rows)
    bad = rows.copy()
    bad[7, 3], bad[9, 0], bad[9, 1] = np.nan, np.inf, -np.inf
    with pytest.raises(UsageError, match=r"^2 of 50 rows of features are NaN .* row 57 first"):
        moments.update(bad)
    check(moments, rows, 1e-10)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((4, WIDTH + 1)), r"features are float64\[4, 38\]: .*\(N, 37\) are expected"),
        (np.zeros(WIDTH), r"features are float64\[37\]: "),
        (np.zeros((4, WIDTH), int), "features are int64.*: floating-point numbers"),
    ],
)
def test_rows_that_do_not_fit(rows, message):
    with pytest.raises(UsageError, match=message):
        Moments(WIDTH).update(rows)


def test_too_few_rows_and_other_widths():
    moments = Moments(WIDTH)
    with pytest.raises(UsageError, match="0 rows of features are too few"):
        _ = moments.mean
    moments.update(np.ones((1, WIDTH)))
    assert np.array_equal(moments.mean, np.ones(WIDTH))
    with pytest.raises(UsageError, match="1 rows of features are too few"):
        _ = moments.covariance
    with pytest.raises(UsageError, match=r"\[1, 5\]: .*\(N, 37\) are expected"):
        moments.merge(Moments(5))
