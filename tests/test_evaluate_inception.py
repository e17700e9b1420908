"""FID and its family in Inception's features, from files as others write them."""

import json

import jax
import numpy as np
import pytest

from dico_jax.evaluation.evaluator import create_evaluator
from dico_jax.evaluation.inception_weights import load_inception
from dico_jax.evaluation.networks import make_feature_fn
from dico_jax.parallel.mesh import create_mesh
from tests import golden
from tests.commands import call
from tests.test_inception import weights_file  # noqa: F401 - a fixture

RNG = np.random.default_rng(0)
REFERENCE, SAMPLES = RNG.integers(0, 256, (2, 12, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def network(weights_file):  # noqa: F811
    return load_inception(str(weights_file))


@pytest.fixture(scope="module")
def features(network):
    """Of the reference and of the samples, float64."""
    features = make_feature_fn(network, 16, create_mesh())
    return [jax.tree.map(np.float64, features(images)) for images in (REFERENCE, SAMPLES)]


def write_as_adm(path, features, **more):
    """A file of reference statistics in the layout of ADM's."""
    pool, spatial, _ = features
    np.savez(
        path, mu=pool.mean(0), sigma=np.cov(pool, rowvar=False),
        mu_s=spatial.mean(0), sigma_s=np.cov(spatial, rowvar=False), **more,
    )  # fmt: skip


@golden.requires_golden
@pytest.mark.slow
def test_from_a_file_of_adm(weights_file, features, tmp_path):  # noqa: F811
    """Statistics of ADM with images."""
    paths = {name: tmp_path / f"{name}.npz" for name in ("adm", "samples")}
    write_as_adm(paths["adm"], features[0], arr_0=REFERENCE)
    np.savez(paths["samples"], arr_0=SAMPLES)
    done = call(
        "dico_jax.evaluate", f"--samples={paths['samples']}", f"--reference={paths['adm']}",
        f"--inception={weights_file}", f"--out={tmp_path / 'a.json'}", "--batch_size=12",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    found = result["metrics"]
    assert set(found) == {
        "fid", "sfid", "inception_score", "inception_score_std", "precision", "recall",
        "precision_adm_float16", "recall_adm_float16", "kid", "kid_std",
    }  # fmt: skip
    assert result["features"]["name"] == "inception"
    assert any(text.startswith("12 ") for text in result["warnings"])
    expected = distances(features)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert any("not the published weights" in text for text in result["warnings"])


@golden.requires_golden
@pytest.mark.parametrize("numbers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_from_a_file_of_pytorch_fid(network, features, tmp_path, numbers):
    """Its statistics are those of the file; the numbers need roots that take seconds."""
    pool, path = features[0].pool, tmp_path / "pytorch_fid.npz"
    np.savez(path, mu=pool.mean(0), sigma=np.cov(pool, rowvar=False))
    evaluator = create_evaluator(network, str(path), None, batch_size=16, mesh=create_mesh())
    assert evaluator.metrics == ("fid", "inception_score")
    np.testing.assert_array_equal(evaluator.reference.mean, pool.mean(0))
    np.testing.assert_array_equal(evaluator.reference.covariance, np.cov(pool, rowvar=False))
    if numbers:
        found = evaluator.measure(lambda start: [SAMPLES], {"count": 12})["metrics"]
        assert set(found) == {"fid", "inception_score", "inception_score_std"}
        assert found["fid"] == pytest.approx(distances(features)["fid"], rel=1e-6)


def distances(features):
    """FID, sFID and Inception Score by their textbook formulas."""
    (pool, spatial, _), (other_pool, other_spatial, logits) = features
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()
    return {
        "fid": frechet(pool, other_pool),
        "sfid": frechet(spatial, other_spatial),
        "inception_score": np.exp(divergence),
    }


def frechet(x, y):
    """The trace of the root from singular values of the two centred sets' product: no roots."""
    x_centred, y_centred = (v - v.mean(0) for v in (x, y))
    trace = sum((v**2).sum() / (len(v) - 1) for v in (x_centred, y_centred))
    roots = np.linalg.svd(x_centred @ y_centred.T, compute_uv=False).sum()
    roots /= np.sqrt((len(x) - 1) * (len(y) - 1))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + trace - 2 * roots
