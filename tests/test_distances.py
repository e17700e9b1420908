"""Frechet distance, Inception Score and KID against the published code's numbers and each other."""

import json

import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    rank_warning,
    squared_discrepancy,
)
from dico_jax.evaluation.statistics import InceptionScore, Moments
from tests.golden import FOLDER, load, requires_golden


def numbers():
    return json.loads((FOLDER / "metrics.json").read_text())


def moments_of(features):
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments.mean, moments.covariance


def positive(width, seed, rank=None):
    """A covariance, of full rank unless `rank` is given."""
    root = np.random.default_rng(seed).standard_normal((width, rank or 2 * width))
    return root @ root.T / root.shape[1]


@requires_golden
@pytest.mark.parametrize(
    ("name", "reference", "sample", "bar"),
    [
        ("fid", "feat_ref", "feat_sample", 1e-8),
        ("sfid", "spatial_ref", "spatial_sample", 1e-8),
        ("fid_small", "small_ref", "small_sample", 1e-6),
        ("fid_mixed", "small_ref", "feat_sample", 1e-6),
    ],
)
def test_golden_frechet_distances(name, reference, sample, bar):
    golden, published = load("metrics.npz"), numbers()
    first, second = moments_of(golden[reference]), moments_of(golden[sample])
    for found in (frechet_distance(*first, *second), frechet_distance(*second, *first)):
        assert abs(found / published["adm"][f"{name}_f64"] - 1) < bar
        assert abs(found / published["exact"][name] - 1) < bar


@requires_golden
def test_a_set_is_at_no_distance_from_itself():
    for name in ("feat_ref", "small_ref"):
        features = load("metrics.npz")[name]
        found = frechet_distance(*moments_of(features), *moments_of(features))
        assert 0 <= found < 1e-6 * np.trace(np.cov(features, rowvar=False))


def test_known_frechet_distances():
    """Of diagonal covariances: the sum over axes of the squared differences of means and roots."""
    rng = np.random.default_rng(0)
    mean1, mean2 = rng.standard_normal((2, 8))
    root1, root2 = rng.uniform(0, 2, (2, 8))
    root1[2] = root2[3] = 0  # without full rank
    turn, _ = np.linalg.qr(rng.standard_normal((8, 8)))  # nor need they be diagonal
    found = frechet_distance(
        turn @ mean1, turn @ np.diag(root1**2) @ turn.T,
        turn @ mean2, turn @ np.diag(root2**2) @ turn.T,
    )  # fmt: skip
    expected = np.sum((mean1 - mean2) ** 2) + np.sum((root1 - root2) ** 2)
    assert abs(found / expected - 1) < 1e-6


def test_moments_in_half_precision_are_accepted():
    mean, covariance = np.zeros(40), positive(40, 1)
    exact = frechet_distance(mean, covariance, mean + 1, positive(40, 2))
    half = frechet_distance(
        mean.astype(np.float16), covariance.astype(np.float16), mean + 1, positive(40, 2)
    )
    assert half != exact
    assert abs(half / exact - 1) < 1e-3


GOOD = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.zeros(4), np.eye(4), "means of 3 and 4 numbers cannot be compared"),
        (np.zeros(4), np.eye(3), r"shape \(4,\) and a covariance of shape \(3, 3\) are not"),
        (np.zeros(3), np.ones((3, 4)), r"shape \(3, 4\) are not \(D,\) and \(D, D\)"),
        (np.zeros((3, 1)), np.eye(3), r"a mean of shape \(3, 1\)"),
        (np.zeros(3), np.triu(np.ones((3, 3))), r"not symmetric \(by up to 1\)"),
        (np.array([0, np.nan, 0]), np.eye(3), "1 of 3 numbers of the mean are NaN or infinite"),
        (np.zeros(3), np.diag([1, np.inf, 1]), "1 of 9 numbers of the covariance are NaN"),
        (np.zeros(3), np.diag([1, 1, -1]), "an eigenvalue is -1 "),
    ],
)
def test_what_is_no_mean_and_covariance(mean, covariance, message):
    with pytest.raises(UsageError, match=message):
        frechet_distance(*GOOD, mean, covariance)
    if "cannot be compared" not in message:
        with pytest.raises(UsageError, match=message):
            frechet_distance(mean, covariance, *GOOD)


def test_rank_warning():
    assert rank_warning(2049, 2048) is None
    assert rank_warning(2048, 2048).startswith("2048 samples are fewer than the 2049 that")


# --- Inception Score


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def score_of(rows, split_size=5000, batch=64, probabilities=False):
    score = InceptionScore(rows.shape[1], split_size)
    update = score.update_probabilities if probabilities else score.update
    for start in range(0, len(rows), batch):
        update(rows[start : start + batch])
    assert score.count == len(rows)
    return score.result()


@requires_golden
@pytest.mark.parametrize("split_size", [5000, 100, 250])
def test_golden_inception_scores(split_size):
    golden, published = load("metrics.npz"), numbers()
    mean, _ = score_of(golden["preds"], split_size, probabilities=True)
    assert abs(mean / published["adm"][f"is_{split_size}_f64"] - 1) < 1e-12
    # The recorded probabilities are float32, and the logits are what they were computed from.
    mean, _ = score_of(golden["logits"], split_size)
    assert abs(mean / published["adm"][f"is_{split_size}_f64"] - 1) < 1e-6


@requires_golden
def test_golden_deviation_over_splits():
    expected = numbers()["torch_fidelity"]["is_splits10"]
    assert np.allclose(score_of(load("metrics.npz")["logits"], 60), expected, rtol=1e-9, atol=0)


def test_batches_do_not_change_the_score():
    logits = 3 * np.random.default_rng(0).standard_normal((530, 12)).astype(np.float32)
    expected = score_of(logits, 100, batch=530)
    for batch in (1, 99, 100, 101, 250):
        assert score_of(logits, 100, batch) == expected
    shuffled = np.random.default_rng(1).permutation(logits)
    assert score_of(shuffled, 100)[0] != expected[0]
    chunks = [score_of(logits[start : start + 100])[0] for start in range(0, 530, 100)]
    assert np.allclose(expected, [np.mean(chunks), np.std(chunks)], rtol=1e-12, atol=0)


def test_a_saved_score_goes_on_exactly(tmp_path):
    logits = np.random.default_rng(0).standard_normal((530, 12))
    score = InceptionScore(12, 100)
    score.update(logits[:250])
    np.savez(tmp_path / "state.npz", **score.to_arrays())
    with np.load(tmp_path / "state.npz") as arrays:
        resumed = InceptionScore(12, 100)
        resumed.restore(arrays)
    resumed.update(logits[250:])
    assert resumed.result() == score_of(logits, 100)


def test_zero_probabilities_are_no_nan():
    """Ten classes, each predicted with certainty: the score is ten."""
    certain = np.tile(np.eye(10), (3, 1))
    assert np.allclose(score_of(certain, 10, probabilities=True), [10, 0])
    assert np.allclose(score_of(2000 * certain, 10), [10, 0])  # their exponentials are zeros
    assert np.allclose(score_of(np.zeros((7, 10)), 4), [1, 0])


def test_the_score_does_not_depend_on_the_order_of_classes():
    """Ten classes, 50 samples of each, in chunks of 100: two classes are in a chunk by order."""
    certain = 2000 * np.eye(10)[np.arange(500) % 10]
    by_class = certain[np.argsort(np.arange(500) % 10, kind="stable")]
    assert score_of(by_class, 100)[0] == pytest.approx(2)

    def dealt(rows, batch):
        score = InceptionScore(10, 100, total=len(rows))
        for start in range(0, len(rows), batch):
            score.update(rows[start : start + batch])
        return score.result()

    assert dealt(by_class, 500)[0] == pytest.approx(9.6, abs=0.15)
    assert dealt(certain, 500)[0] == pytest.approx(9.6, abs=0.15)
    assert dealt(by_class, 7) == dealt(by_class, 500)


def test_one_chunk_has_no_deviation():
    assert score_of(np.zeros((7, 10)))[1] is None


def test_samples_that_cannot_be_scored():
    score = InceptionScore(10)
    with pytest.raises(UsageError, match="no samples"):
        score.result()
    score.update(np.zeros((6, 10)))
    with pytest.raises(UsageError, match=r"logits are float64\[5, 9\]: .*\(N, 10\)"):
        score.update(np.zeros((5, 9)))
    bad = np.zeros((5, 10))
    bad[3, 2] = np.nan
    with pytest.raises(UsageError, match="1 of 5 rows of logits are NaN or infinite, row 9 first"):
        score.update(bad)
    assert score.count == 6


# --- Kernel distance


@requires_golden
def test_golden_kernel_distances():
    golden, published = load("metrics.npz"), numbers()["torch_fidelity"]
    samples, reference = golden["feat_sample"], golden["feat_ref"]
    subsets = zip(golden["kid_idx_sample"], golden["kid_idx_ref"], strict=True)
    each = [squared_discrepancy(samples[ours], reference[theirs]) for ours, theirs in subsets]
    assert np.allclose(each, golden["kid_each_f64"], rtol=1e-9, atol=0)
    found = kernel_distance(samples, reference, num_subsets=20, subset_size=100)
    assert np.allclose(found, published["kid_f64"], rtol=1e-9, atol=0)


def test_the_estimate_is_unbiased():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 30, 5))
    kernel = (np.concatenate([x, y]) @ np.concatenate([x, y]).T / 5 + 1) ** 3
    within = [k[~np.eye(30, dtype=bool)].mean() for k in (kernel[:30, :30], kernel[30:, 30:])]
    expected = sum(within) - 2 * kernel[:30, 30:].mean()
    assert np.isclose(squared_discrepancy(x, y), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset_size": 51}, "subset_size=51 does not fit: it must be in 2 to 50"),
        ({"subset_size": 1}, "subset_size=1 does not fit"),
        ({"num_subsets": 0}, "num_subsets=0 must be at least 1"),
    ],
)
def test_subsets_that_do_not_fit(options, message):
    rng = np.random.default_rng(0)
    samples, reference = rng.standard_normal((60, 4)), rng.standard_normal((50, 4))
    with pytest.raises(UsageError, match=message):
        kernel_distance(samples, reference, **options)


def test_features_that_have_no_kernel_distance():
    features = np.zeros((5, 4))
    with pytest.raises(UsageError, match=r"reference features are float64\[5, 3\]: .*\(N, 4\)"):
        kernel_distance(features, features[:, :3], subset_size=2)
    with pytest.raises(UsageError, match="5 of 5 rows of reference features are NaN"):
        kernel_distance(features, features * np.nan, subset_size=2)
