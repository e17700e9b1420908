"""Precision and recall by tiles, against published numbers and against all distances at once."""

import json

import jax
import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.evaluation import distances as module
from dico_jax.evaluation.distances import (
    DISTANCES,
    manifold_members,
    manifold_radii,
    precision_recall,
)
from tests.golden import FOLDER, load, requires_golden


def numbers():
    return json.loads((FOLDER / "metrics.json").read_text())["adm"]


def squared_distances(x, y):
    return np.array(
        [((y.astype(np.float64) - row) ** 2).sum(axis=1) for row in x.astype(np.float64)]
    )


def radii_of(x, k):
    distances = squared_distances(x, x)
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, k - 1]


def members_of(x, y, k):
    """`manifold_members` from all distances in float64, by differences."""
    distances = squared_distances(x, y)
    return (
        (distances <= radii_of(y, k)).any(axis=1),
        (distances <= radii_of(x, k)[:, None]).any(axis=0),
    )


def check_exact(x, y, k=3):
    assert np.allclose(manifold_radii(x, k), radii_of(x, k), rtol=1e-14, atol=0)
    for found, expected in zip(manifold_members(x, y, k), members_of(x, y, k), strict=True):
        assert np.array_equal(found, expected)


@requires_golden
@pytest.mark.parametrize("k", [1, 3, 5])
def test_golden_precision_and_recall(k):
    golden = load("metrics.npz")
    found = precision_recall(golden["feat_sample"], golden["feat_ref"], k)
    published = numbers()["pr_f64block" if k == 3 else f"pr_k{k}_f64block"]
    assert found == tuple(published)


@requires_golden
@pytest.mark.parametrize("tile", [64, 2000])
def test_golden_members_and_radii(tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE", tile)
    golden = load("metrics.npz")
    reference, samples = golden["feat_ref"], golden["feat_sample"]
    of_samples, of_reference = manifold_members(samples, reference)
    assert np.array_equal(of_reference, golden["in_sample_manifold"])
    assert np.array_equal(of_samples, golden["in_ref_manifold"])
    for name, features in (("ref", reference), ("sample", samples)):
        expected = golden[f"radii_{name}_f64"]
        assert np.allclose(manifold_radii(features), expected, rtol=1e-12, atol=0)


def clusters(rng, count, size, spread):
    """Rows around a few places, which have distances and an offset of about `size`."""
    places = size * (2 + np.random.default_rng(0).standard_normal((5, 24)))
    return places[rng.integers(5, size=count)] + spread * rng.standard_normal((count, 24))


def some_rows(kind, rng, count):
    """Rows whose distances are hard to tell apart in float32."""
    if kind == "ties":  # integers: equal distances everywhere
        return rng.integers(0, 3, (count, 4)).astype(np.float32)
    if kind == "copies":  # some rows more than k times, so that their radius is 0
        return rng.standard_normal((count // 5, 16)).astype(np.float32)[
            rng.integers(count // 5, size=count)
        ]
    if kind == "offset":
        return (1e3 + rng.standard_normal((count, 16))).astype(np.float32)
    if kind == "one place":
        return np.full((count, 16), 7.3, np.float32)
    if kind == "outlier":  # one row a million times as far away
        rows = rng.standard_normal((count, 16))
        rows[3] *= 1e6
        return rows.astype(np.float32)
    if kind == "float64":  # all equal in float32
        return 1 + 1e-9 * rng.standard_normal((count, 16))
    # Float32 cannot tell the rows of a cluster apart; nor can products in float64.
    return clusters(rng, count, *{"clusters": (10, 1e-3), "far clusters": (1e5, 1e-4)}[kind])


@pytest.mark.parametrize(
    "kind",
    ["ties", "copies", "offset", "one place", "outlier", "float64", "clusters", "far clusters"],
)
def test_near_decisions_are_the_exact_ones(kind, monkeypatch):
    monkeypatch.setattr(module, "_TILE", 64)
    monkeypatch.setattr(module, "_HOST_ROWS", 50)
    rng = np.random.default_rng(0)
    x, y = some_rows(kind, rng, 150), some_rows(kind, rng, 170)
    y[:20] = x[:20]
    check_exact(x, y)
    check_exact(x, x)


def test_the_edge_is_inside():
    """Distances of exactly the radius, and of a little more than float32 can tell from it."""
    reference = np.array([[0.0, 0.0], [3.0, 4.0]]) + 4096
    edge = np.array([[4091.0, 4096.0], [4091.0, 4096.0]])
    further = np.nextafter(edge, [-np.inf, 4096])
    assert manifold_radii(reference, k=1).tolist() == [25, 25]
    assert manifold_members(edge, reference, k=1)[0].all()
    assert not manifold_members(further, reference, k=1)[0].any()


@pytest.mark.parametrize("distances", DISTANCES)
def test_every_size_of_set_and_tile(distances, monkeypatch):
    """Fewer rows than candidates, tiles that do not divide, one tile: all the same."""
    rng = np.random.default_rng(0)
    for rows, others in ((2, 3), (33, 5)):
        x, y = rng.standard_normal((rows, 6)), rng.standard_normal((others, 6))
        found = []
        for tile in (2000, 16):
            monkeypatch.setattr(module, "_TILE", tile)
            found.append(manifold_members(x, y, 1, distances))
        assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
        if distances == "exact":
            check_exact(x, y, 1)


# --- the published evaluator's arithmetic


@requires_golden
@pytest.mark.parametrize("tile", [50, 2000])
def test_golden_float16_figures(tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE", tile)
    golden, published = load("metrics.npz"), numbers()
    reference, samples = golden["feat_ref"], golden["feat_sample"]
    radii = manifold_radii(reference, 3, "adm_float16")
    assert radii.sum() == published["pr_fp16_radii_ref_sum"]
    found = precision_recall(samples, reference, 3, "adm_float16")
    assert found == tuple(published["pr_fp16"])


@requires_golden
def test_golden_float32_figures(monkeypatch):
    """What the published evaluator does when a float16 distance is not finite."""
    monkeypatch.setattr(module, "_HALF_MAX", 0.0)
    golden, published = load("metrics.npz"), numbers()
    reference, samples = golden["feat_ref"], golden["feat_sample"]
    radii = manifold_radii(reference, 3, "adm_float16")
    assert abs(radii.sum() / published["pr_fp32_radii_ref_sum"] - 1) < 1e-6
    found = precision_recall(samples, reference, 3, "adm_float16")
    assert found == tuple(published["pr_fp32"])


def test_every_result_is_rounded_to_float16():
    rng = np.random.default_rng(0)
    # 32nds: float32 adds their products up without an error, in whatever order.
    x, y = (rng.integers(0, 33, (2, 300, 200)) / 32).astype(np.float16)
    y[:100] *= np.float16(0.125)
    norms = [module._half_sums(rows * rows) for rows in (x, y)]
    products = (x.astype(np.float64) @ y.astype(np.float64).T).astype(np.float16)
    once_less = norms[0][:, None].astype(np.float64) - 2 * products.astype(np.float64) + norms[1]
    expected = norms[0][:, None] - np.float16(2) * products + norms[1]
    assert (expected != once_less.astype(np.float16)).any()
    rows, others = (rows.astype(np.float32) for rows in (x, y))
    squares = [values.astype(np.float32) for values in norms]
    found = jax.jit(module._half_distances)(rows @ others.T, *squares)
    assert np.array_equal(found, expected)


def test_float32_where_float16_would_overflow():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 8)).astype(np.float32)
    assert not np.allclose(manifold_radii(x, 3, "adm_float16"), radii_of(x, 3), rtol=1e-4)
    x[5] *= 200 / np.linalg.norm(x[5])
    x[25] = -x[5]  # each of their squared norms is below 65504, their distance is not
    assert np.allclose(manifold_radii(x, 3, "adm_float16"), radii_of(x, 3), rtol=1e-4)


def test_what_cannot_be_compared():
    features = np.random.default_rng(0).standard_normal((4, 3))
    with pytest.raises(UsageError, match="k=3 must be at least 1, and less than the 3 rows"):
        precision_recall(features[:3], features)
    with pytest.raises(UsageError, match="k=0 must be at least 1"):
        precision_recall(features, features, k=0)
    with pytest.raises(UsageError, match="distances='fast' must be one of exact, adm_float16"):
        precision_recall(features, features, distances="fast")
    with pytest.raises(UsageError, match=r"reference features are float64\[4, 3\]: .*\(N, 2\)"):
        precision_recall(features[:, :2], features)
    bad = features.copy()
    bad[2] = np.nan
    with pytest.raises(UsageError, match="1 of 4 rows of sample features are NaN .* row 2 first"):
        precision_recall(bad, features)
