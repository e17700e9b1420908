"""The convolution by a kernel of every example, against its definition and XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dico_jax.ops import dynamic_conv
from dico_jax.ops.dynamic_conv import add_dynamic_conv
from dico_jax.ops.plain import plain_ops


def operands(shape, side, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=shape), rng.normal(size=shape)
    kernel = rng.normal(size=(shape[0], side, side, shape[-1]))
    return tuple(jnp.asarray(a, dtype) for a in (x, kernel, dy))


def defined(x, kernel):
    """The definition, position by position, in float64: what is added to x, and x."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    _, height, width, _ = x.shape
    side = kernel.shape[1]
    by = side // 2
    y = x.copy()
    for h in range(height):
        for w in range(width):
            for i in range(side):
                for j in range(side):
                    a, b = h + i - by, w + j - by
                    if 0 <= a < height and 0 <= b < width:
                        y[:, h, w] += x[:, a, b] * kernel[:, i, j]
    return y


def grouped(x, kernel):
    """X and XLA's convolution of N * C groups."""
    n, height, width, channels = x.shape
    side = kernel.shape[1]
    groups, by = n * channels, side // 2
    y = lax.conv_general_dilated(
        x.transpose(1, 2, 0, 3).reshape(1, height, width, groups),
        kernel.transpose(1, 2, 0, 3).reshape(side, side, 1, groups),
        (1, 1), ((by, by), (by, by)), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip
    return x + y.reshape(height, width, n, channels).transpose(2, 0, 1, 3)


SHAPES = [((2, 12, 10, 3), 9), ((1, 4, 4, 5), 9), ((3, 1, 2, 4), 5), ((2, 16, 16, 8), 3)]


@pytest.mark.parametrize(("dtype", "bar"), [(np.float32, 1e-6), (np.float64, 1e-13)])
@pytest.mark.parametrize(("shape", "side"), SHAPES)
def test_it_is_its_definition(shape, side, dtype, bar):
    with jax.enable_x64(dtype == np.float64):
        x, kernel, _ = operands(shape, side, dtype)
        expected = defined(x, kernel)
        for found in (jax.jit(add_dynamic_conv)(x, kernel), grouped(x, kernel)):
            assert found.dtype == dtype
            assert np.abs(found - expected).max() < bar * np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "bar"), [(np.float32, 2e-6), (np.float64, 1e-13)])
@pytest.mark.parametrize(("shape", "side"), [*SHAPES, ((2, 32, 32, 64), 9)])
def test_gradients_are_those_of_the_plain_form_and_of_xla(shape, side, dtype, bar):
    with jax.enable_x64(dtype == np.float64):
        x, kernel, dy = operands(shape, side, dtype)

        def gradients(function):
            return jax.jit(lambda *args: jax.vjp(function, *args)[1](dy))(x, kernel)

        def plainly(x, kernel):
            with plain_ops():
                return add_dynamic_conv(x, kernel)

        own = gradients(add_dynamic_conv)
        others = [gradients(plainly), gradients(grouped)] if x.size < 5000 else [gradients(plainly)]
        for other in others:
            for a, b in zip(own, other, strict=True):
                assert a.dtype == b.dtype == dtype
                assert np.abs(a - b).max() < bar * np.abs(b).max()


def test_both_ways_to_the_gradient_of_kernels_are_one():
    x, kernel, dy = operands((2, 9, 11, 6), 9)
    padded = dynamic_conv._padded(x, kernel)
    rows, taps = (
        jax.jit(way)(padded, dy)
        for way in (dynamic_conv._kernel_gradient_by_rows, dynamic_conv._kernel_gradient)
    )
    np.testing.assert_allclose(rows, taps, atol=1e-5 * np.abs(taps).max())


def test_sums_of_bfloat16_are_wide():
    x, kernel, dy = operands((1, 16, 16, 4), 9, jnp.bfloat16)
    y, vjp = jax.vjp(add_dynamic_conv, x, kernel)
    expected = defined(x, kernel)
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.asarray(y, np.float64) - expected).max() < 2**-8 * np.abs(expected).max()
    for gradient in vjp(dy):
        assert gradient.dtype == jnp.bfloat16
