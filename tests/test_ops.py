"""The tuned operations against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.ops.conv import conv3x3
from dico_jax.ops.depthwise import depthwise_conv3x3
from dico_jax.ops.gelu import gelu


def operands(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    width = shape[-1]
    arrays = rng.normal(size=shape), rng.normal(size=(3, 3, 1, width)), rng.normal(size=width)
    return [jnp.asarray(a, dtype) for a in arrays]


SHAPES = [(2, 8, 8, 6), (1, 4, 12, 3), (3, 1, 1, 2), (2, 2, 5, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_depthwise_implementations_and_gradients_agree(shape):
    with jax.enable_x64(True):
        args = operands(shape, jnp.float64)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=shape))

        def run(implementation):
            def total(*args):
                return jnp.sum(weights * depthwise_conv3x3(*args, implementation=implementation))

            return depthwise_conv3x3(*args, implementation=implementation), *jax.grad(
                total, argnums=(0, 1, 2)
            )(*args)

        for ours, reference in zip(run("shifted"), run("lax"), strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-12)


def test_depthwise_sums_in_float32_when_activations_are_bfloat16():
    shape = (4, 32, 32, 8)
    exact = operands(shape, jnp.float32)
    rounded = [a.astype(jnp.bfloat16) for a in exact]
    out = depthwise_conv3x3(*rounded)
    reference = depthwise_conv3x3(*[a.astype(jnp.float32) for a in rounded])
    assert out.dtype == jnp.bfloat16
    # One rounding at the end: half a unit in the last of 8 bits.
    np.testing.assert_allclose(out.astype(jnp.float32), reference, rtol=2**-8, atol=1e-30)

    def bias_gradient(x, kernel, bias):
        return jax.grad(lambda b: depthwise_conv3x3(x, kernel, b).astype(jnp.float32).sum())(bias)

    # 4096 ones: a sum in bfloat16 would stop at 256.
    np.testing.assert_array_equal(bias_gradient(*rounded).astype(jnp.float32), 4096.0)


def test_depthwise_refuses_an_unknown_implementation():
    with pytest.raises(UsageError, match="implementation='fft'.*auto, shifted, lax"):
        depthwise_conv3x3(*operands((1, 4, 4, 2), jnp.float32), implementation="fft")


@pytest.mark.parametrize("size", [(8, 8), (2, 2), (1, 1), (2, 6)])
def test_conv3x3_is_a_zero_padded_cross_correlation(size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 5)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(
        np.einsum("nhwc,cd->nhwd", padded[:, i : i + size[0], j : j + size[1]], kernel[i, j])
        for i in range(3)
        for j in range(3)
    )
    np.testing.assert_allclose(conv3x3(x, kernel), expected, rtol=1e-5, atol=1e-5)


def test_gelu_is_the_exact_one():
    from scipy import special

    with jax.enable_x64(True):
        x = np.linspace(-8, 8, 1001)
        exact = x * special.ndtr(x)
        np.testing.assert_allclose(gelu(jnp.asarray(x)), exact, atol=1e-15)
        np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), exact, atol=1e-6)
        assert np.abs(jax.nn.gelu(x, approximate=True) - exact).max() > 1e-4
