"""The Inception network against numbers recorded from the published one."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.evaluation.inception import (
    NUM_FEATURES,
    NUM_LOGITS,
    abstract_params,
    features_of,
    features_of_resized,
    resize_tables,
    resized,
)
from dico_jax.evaluation.inception_weights import load_inception, state_shapes
from dico_jax.pytorch.torch_files import write_pt
from tests import golden
from tests.golden import distance

SIZES = ("32x32", "64x64", "256x256", "299x299", "512x512", "40x56")
ROWS = [0, 1, 2, 149, 150, 297, 298]
TOLERANCE = {"float32": 5e-6, "float64": 1e-9}
SPATIAL_TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
# Name of a tap to the recorded array.
RECORDED = {"pool": "2048", "logits": "logits_unbiased", "spatial": "spatial"}


@functools.cache
def load():
    return dict(golden.load("inception.npz"))


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file with the recorded network's weights, as PyTorch writes it."""
    manifest = json.loads((golden.FOLDER / "inception_manifest.json").read_text())
    seed, digest = golden.INCEPTION_DRAW
    weights = golden.draw(manifest["tensors"], seed, "I")
    assert golden.digest(weights) == digest
    path = tmp_path_factory.mktemp("inception") / "drawn.pth"
    write_pt(path, weights)
    return path


def assert_recorded(found, g, size, dtype):
    for tap, value in found.items():
        tolerance = (SPATIAL_TOLERANCE if tap == "spatial" else TOLERANCE)[dtype]
        assert value.dtype == dtype
        assert distance(value, g[f"{size}/{RECORDED[tap]}_f64"]) < tolerance, (size, tap)


@golden.requires_golden
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_sizes(dtype, weights_file):
    """One run of the network for the pictures of all sizes, which are resized one by one."""
    g = load()
    counts = [len(g[f"{size}/images"]) for size in SIZES]
    with jax.enable_x64(dtype == "float64"):
        params = jax.device_put(load_inception(weights_file, dtype=dtype).params)
        resize = jax.jit(lambda images: resized(images, jnp.dtype(dtype)))
        x = jnp.concatenate([resize(g[f"{size}/images"]) for size in SIZES])
        found = jax.jit(features_of_resized)(params, x)
        found = {tap: np.split(value, np.cumsum(counts)[:-1]) for tap, value in found.items()}
        assert found.keys() == RECORDED.keys()
        for i, size in enumerate(SIZES):
            taps = {tap: values[i] for tap, values in found.items()}
            assert_recorded(taps, g, size, dtype)


@golden.requires_golden
def test_from_pictures(weights_file):
    """The usual call: uint8 in, three taps out."""
    g = load()
    params = load_inception(weights_file).params
    images = g["40x56/images"]
    found = jax.jit(features_of)(params, images)
    assert found.keys() == RECORDED.keys()
    assert_recorded(found, g, "40x56", "float32")
    n = len(images)
    assert found["pool"].shape == (n, NUM_FEATURES)
    assert found["spatial"].shape == (n, 17 * 17 * 7)
    assert found["logits"].shape == (n, NUM_LOGITS)


@golden.requires_golden
@pytest.mark.parametrize("size", SIZES)
def test_resizing_of_tensorflow_1(size):
    """Equal to the bit, but for one that a compiler changes who joins a product and a sum."""
    g = load()
    recorded = g[f"{size}/resized_rows_f32"]
    one_by_one = np.asarray(resized(g[f"{size}/images"]))
    assert one_by_one.shape[1:] == (299, 299, 3)
    np.testing.assert_array_equal(one_by_one[:, ROWS], recorded)
    compiled = np.asarray(jax.jit(resized)(g[f"{size}/images"]))
    assert np.abs(compiled[:, ROWS] - recorded).max() <= 2.0**-23


def test_resize_tables():
    """Every second position from 598; the last one has no neighbour above."""
    lower, upper, weight = resize_tables(598, np.float32)
    np.testing.assert_array_equal(lower, 2 * np.arange(299))
    np.testing.assert_array_equal(upper, lower + 1)
    np.testing.assert_array_equal(weight, np.zeros(299))
    lower, upper, weight = resize_tables(1, np.float64)
    assert not lower.any()
    assert not upper.any()
    assert weight.dtype == np.float64


def test_parameters_are_those_of_the_published_file():
    """23,885,392 numbers, without those of batch norm half of what is apart."""
    shapes = state_shapes()
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 23_885_392
    assert len(shapes) == 472
    params = abstract_params()
    assert params["Mixed_7c"]["branch3x3dbl_3b"]["kernel"].shape == (3, 1, 384, 384)
    assert params["fc"]["kernel"].shape == (2048, 1008)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 32, 32, 1), np.uint8, r"uint8\[2, 32, 32, 1\], not uint8 \(N, H, W, 3\)"),
        ((2, 32, 32, 3), np.float32, "float32"),
        ((32, 32, 3), np.uint8, "not uint8"),
    ],
)
def test_wrong_calls(shape, dtype, message):
    images = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(features_of, abstract_params(), images)
