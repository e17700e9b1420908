"""Classifier-free guidance."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dico_jax.diffusion import CFG_CHANNELS, classifier_free_guidance, guided_model_fn
from dico_jax.errors import UsageError
from tests.test_diffusion_gaussian import draw

COND = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]], np.float32)
UNCOND = np.array([[0.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]], np.float32)


@pytest.mark.parametrize(
    ("cfg_channels", "expected"),
    [
        ("first_three", [1.5, 2.5, 4.0, 4.0, 5.0, 6.0, 7.0, 8.0]),
        ("all", [1.5, 2.5, 4.0, 5.5, 5.0, 6.0, 7.0, 8.0]),
    ],
)
def test_guidance_by_hand(cfg_channels, expected):
    assert cfg_channels in CFG_CHANNELS
    both = classifier_free_guidance(COND, UNCOND, 1.5, 4, cfg_channels)
    np.testing.assert_array_equal(both, [expected])
    noise = classifier_free_guidance(COND[:, :4], UNCOND[:, :4], 1.5, 4, cfg_channels)
    np.testing.assert_array_equal(noise, [expected[:4]])


def test_the_released_form_is_the_default_and_counts_to_three():
    np.testing.assert_array_equal(
        classifier_free_guidance(COND, UNCOND, 1.5, 4),
        classifier_free_guidance(COND, UNCOND, 1.5, 4, "first_three"),
    )
    one = classifier_free_guidance(COND[:, :2], UNCOND[:, :2], 3.0, 1)
    np.testing.assert_array_equal(one, [[3.0, 2.0]])
    for channels, guided in ((1, 1), (3, 3), (4, 3), (16, 3)):
        assert CFG_CHANNELS["first_three"](channels) == guided
        assert CFG_CHANNELS["all"](channels) == channels


def test_scales_zero_and_one():
    np.testing.assert_array_equal(
        classifier_free_guidance(COND, UNCOND, 0.0, 4, "all"),
        np.concatenate([UNCOND[:, :4], COND[:, 4:]], axis=-1),
    )
    np.testing.assert_array_equal(classifier_free_guidance(COND, UNCOND, 1.0, 4, "all"), COND)


def test_bfloat16_outputs_are_mixed_in_float32():
    cond, uncond = (jnp.asarray(draw(2, 3, 3, 8, seed=s), jnp.bfloat16) for s in (0, 1))
    guided = classifier_free_guidance(cond, uncond, 1.3, 4)
    assert guided.dtype == jnp.float32
    full = classifier_free_guidance(cond.astype(jnp.float32), uncond.astype(jnp.float32), 1.3, 4)
    np.testing.assert_array_equal(guided, full)


def test_a_float64_scale_does_not_change_the_dtype():
    with jax.enable_x64(True):
        for scale in (np.float64(1.5), jnp.asarray(1.5, jnp.float64)):
            assert classifier_free_guidance(COND, UNCOND, scale, 4).dtype == jnp.float32


class Labelled:
    """A model of (x, t, y) that tells classes apart; remembers what it was called with."""

    def __init__(self, num_channels=4, num_classes=10):
        self.weights = draw(num_channels, 2 * num_channels, seed=5)
        self.table = draw(num_classes + 1, 2 * num_channels, seed=6)

    def __call__(self, x, t, y):
        self.x, self.t, self.y = x, t, y
        condition = jnp.asarray(self.table)[y] + t[:, None] / 1000
        return jnp.tanh(x @ self.weights + condition[:, None, None])


X, T, Y = draw(3, 2, 2, 4), jnp.array([5, 5, 700]), jnp.array([3, 0, 9])


@pytest.mark.parametrize("cfg_channels", ["first_three", "all"])
@pytest.mark.parametrize("scale", [1.5, 4, jnp.float32(2.5), 0.0])
def test_guided_model_is_guidance_of_two_separate_passes(scale, cfg_channels):
    model = Labelled()
    guided = guided_model_fn(model, Y, 10, scale, 4, cfg_channels)(X, T)
    assert model.x.shape == (6, 2, 2, 4)
    assert sorted(model.y.tolist()) == [0, 3, 9, 10, 10, 10]
    cond, uncond = model(X, T, Y), model(X, T, jnp.full(3, 10))
    expected = classifier_free_guidance(cond, uncond, scale, 4, cfg_channels)
    np.testing.assert_allclose(guided, expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 1.0, np.float64(1.0)])
def test_scale_one_runs_the_model_unguided(scale):
    model = Labelled()
    out = guided_model_fn(model, Y, 10, scale, 4)(X, T)
    assert model.x.shape == (3, 2, 2, 4)
    assert model.y is Y
    np.testing.assert_array_equal(out, model(X, T, Y))


def test_an_array_scale_is_always_guided():
    model = Labelled()
    jitted = jax.jit(lambda scale: guided_model_fn(model, Y, 10, scale, 4)(X, T))
    out = jitted(1.0)
    assert model.x.shape == (6, 2, 2, 4)
    np.testing.assert_allclose(out, model(X, T, Y), atol=1e-6)
    expected = guided_model_fn(model, Y, 10, 1.5, 4)(X, T)
    np.testing.assert_allclose(jitted(1.5), expected, atol=1e-6)


def test_conditions_may_be_trees():
    y = {"text": draw(3, 5, 4, seed=7), "size": np.array([1, 2, 3])}
    null = {"text": draw(5, 4, seed=8), "size": 0}

    def model(x, t, y):
        features = jnp.mean(y["text"], axis=1) * (1 + y["size"][:, None])
        return x + features[:, None, None]

    guided = guided_model_fn(model, y, null, 3.0, 4, "all")(X, T)
    nulls = {"text": np.stack([null["text"]] * 3), "size": np.zeros(3, int)}
    expected = classifier_free_guidance(model(X, T, y), model(X, T, nulls), 3.0, 4, "all")
    np.testing.assert_allclose(guided, expected, atol=1e-5)


def test_guidance_keeps_examples_on_their_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    n = 2 * mesh.size
    kernel = draw(3, 3, 4, 8, seed=9)

    def model(x, t, y):
        dims = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        return out + (t + y)[:, None, None, None]

    def guided(x, t, y):
        return guided_model_fn(model, y, 10, 1.5, 4)(x, t)

    arguments = draw(n, 4, 4, 4), np.arange(n), np.arange(n) % 10
    step = jax.jit(guided, in_shardings=rows, out_shardings=rows)
    np.testing.assert_allclose(step(*arguments), guided(*arguments), atol=1e-5)
    collectives = re.findall(
        r"(?:all-\w+|collective-\w+)\(", step.lower(*arguments).compile().as_text()
    )
    assert mesh.size == 8
    assert collectives == []


def test_errors():
    unknown = "cfg_channels='three' is unknown: use 'first_three' or 'all'"
    with pytest.raises(UsageError, match=unknown):
        classifier_free_guidance(COND, UNCOND, 1.5, 4, "three")
    for scale in (1.0, 1.5):
        with pytest.raises(UsageError, match=unknown):
            guided_model_fn(Labelled(), Y, 10, scale, 4, "three")
    with pytest.raises(UsageError, match="num_channels=3: both must have 3 or 6 channels"):
        classifier_free_guidance(COND, UNCOND, 1.5, 3)
    with pytest.raises(UsageError, match="one shape"):
        classifier_free_guidance(COND, UNCOND[:, :4], 1.5, 4)
