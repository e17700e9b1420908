"""The tuned operations against plain ones, computed together and apart (`dico_jax.ops.cpu`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.ops import cpu
from dico_jax.ops.attention import attention
from dico_jax.ops.conv import conv3x3, conv_gelu_mean, depthwise_conv
from dico_jax.ops.cpu import apart, stored, winograd_conv3x3, winograd_pays, with_sums
from dico_jax.ops.linear import gated_linear, linear, linear_gelu
from dico_jax.ops.plain import Operation, plain_ops
from dico_jax.ops.pointwise import add_vector, gelu, layer_norm, multiply_vector, norm_modulate


@pytest.fixture(autouse=True, params=[2**18, 0], ids=["together", "apart"])
def _large(request, monkeypatch):
    """Every test meets both ways, that of small arrays and that of large ones on CPU."""
    monkeypatch.setattr(cpu, "LARGE", request.param)
    jax.clear_caches()


def operands(shape, dtype, seed=0, side=3):
    rng = np.random.default_rng(seed)
    width = shape[-1]
    kernel = rng.normal(size=(side, side, 1, width))
    arrays = rng.normal(size=shape), kernel, rng.normal(size=width)
    return [jnp.asarray(a, dtype) for a in arrays]


def value_and_gradients(function, args, weights):
    """The results, and the gradients of their weighted sum."""
    y, pull = jax.vjp(function, *args)
    return y, *pull(weights)


def assert_same(operation, formula, args, weights, **tolerances):
    """Results and gradients are those of the formula."""
    ours, reference = (value_and_gradients(f, args, weights) for f in (operation, formula))
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, **tolerances)


def convolution(x, kernel, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


SHAPES = [(2, 8, 8, 6), (1, 4, 12, 3), (3, 1, 1, 2), (2, 2, 5, 4), (2, 4, 16, 32)]


@pytest.mark.parametrize(
    ("shape", "side"), [*((shape, 3) for shape in SHAPES), (SHAPES[0], 5), (SHAPES[3], 7)]
)
def test_depthwise_conv_and_its_gradient_are_those_of_the_grouped_convolution(shape, side):
    with jax.enable_x64(True):
        args = operands(shape, jnp.float64, side=side)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=shape))

        def grouped(x, kernel, bias):
            return convolution(x, kernel, groups=shape[-1]) + bias

        assert_same(depthwise_conv, grouped, args, weights, rtol=1e-12, atol=1e-12)


def test_depthwise_sums_in_float32_when_activations_are_bfloat16():
    shape = (4, 32, 32, 8)
    exact = operands(shape, jnp.float32)
    rounded = [a.astype(jnp.bfloat16) for a in exact]
    out = depthwise_conv(*rounded)
    reference = depthwise_conv(*[a.astype(jnp.float32) for a in rounded])
    assert out.dtype == jnp.bfloat16
    # One rounding at the end: half a unit in the last of 8 bits.
    np.testing.assert_allclose(out.astype(jnp.float32), reference, rtol=2**-8, atol=1e-30)

    def bias_gradient(x, kernel, bias):
        return jax.grad(lambda b: depthwise_conv(x, kernel, b).astype(jnp.float32).sum())(bias)

    # 4096 ones: a sum in bfloat16 would stop at 256.
    np.testing.assert_array_equal(bias_gradient(*rounded).astype(jnp.float32), 4096.0)


@pytest.mark.parametrize("channels", [(3, 5), (2, 20), (40, 4)])  # plain, few in, few out
@pytest.mark.parametrize("size", [(8, 8), (2, 2), (1, 1), (2, 6), (5, 3)])
def test_conv3x3_is_a_zero_padded_cross_correlation(size, channels):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, channels[0])).astype(np.float32)
    kernel = rng.normal(size=(3, 3, *channels)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(
        np.einsum("nhwc,cd->nhwd", padded[:, i : i + size[0], j : j + size[1]], kernel[i, j])
        for i in range(3)
        for j in range(3)
    )
    np.testing.assert_allclose(conv3x3(x, kernel), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("channels", [(3, 5), (8, 20), (10, 40), (2, 20), (40, 4)])
def test_conv3x3_has_the_gradient_of_a_convolution(channels):
    """For (10, 40) there are fewer positions than channels, which has a formula of its own."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 5, 3, channels[0])))
        kernel = jnp.asarray(rng.normal(size=(3, 3, *channels)))
        weights = jnp.asarray(rng.normal(size=(2, 5, 3, channels[1])))
        assert_same(conv3x3, convolution, (x, kernel), weights, atol=1e-12)


@pytest.mark.parametrize("positions", [(), (7,), (5, 3), (2, 1), (4, 8)])
@pytest.mark.parametrize("layer", [linear, gated_linear, linear_gelu])
def test_linear_layers_and_their_gradients_are_those_of_the_formula(positions, layer):
    """With (5, 3) an example is larger than the kernel, with (2, 1) it is smaller."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        shapes = [(2, *positions, 6), (6, 4), (4,), (2, 4)]
        x, kernel, bias, gate = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
        weights = jnp.asarray(rng.normal(size=(2, *positions, 4)))

        def formula(x, kernel, bias, gate=None):
            y = jnp.einsum("...c,cd->...d", x, kernel) + bias
            if layer is linear_gelu:
                return jax.nn.gelu(y, approximate=False)
            return y if gate is None else y * gate.reshape(2, *[1] * len(positions), 4)

        args = (x, kernel, bias, gate) if layer is gated_linear else (x, kernel, bias)
        assert_same(layer, formula, args, weights, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(layer(*args), formula(*args), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_linear_layers_are_summed_in_float32(gated):
    x, kernel = jnp.ones((2, 32, 32, 4), jnp.bfloat16), jnp.ones((4, 4), jnp.bfloat16)
    vectors = {"bias": jnp.ones(4, jnp.bfloat16)} | (
        {"gate": jnp.ones((2, 4), jnp.bfloat16)} if gated else {}
    )

    def total(vectors):
        y = (gated_linear if gated else linear)(x, kernel, **vectors)
        return y.astype(jnp.float32).sum()

    gradients = jax.grad(total)(vectors)
    # 2048 ones, and 1024 fives: a sum in bfloat16 would stop far below.
    np.testing.assert_array_equal(gradients["bias"].astype(jnp.float32), 2048.0)
    if gated:
        np.testing.assert_array_equal(gradients["gate"].astype(jnp.float32), 5120.0)


def test_conv3x3_with_few_outputs_sums_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 64)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 64, 4)), jnp.bfloat16)
    out = conv3x3(x, kernel)
    assert out.dtype == jnp.bfloat16
    exact = conv3x3(x.astype(jnp.float32), kernel.astype(jnp.float32))
    # One rounding at the end; what the products' order of summation does is far below it.
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-4)


def test_gelu_is_the_exact_one():
    from scipy import special

    with jax.enable_x64(True):
        x = np.linspace(-8, 8, 1001)
        exact = x * special.ndtr(x)
        np.testing.assert_allclose(gelu(jnp.asarray(x)), exact, atol=1e-15)
        np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), exact, atol=1e-6)
        assert np.abs(jax.nn.gelu(x, approximate=True) - exact).max() > 1e-4


def test_conv_gelu_mean_is_its_parts():
    args = operands((2, 6, 5, 3), jnp.bfloat16)
    h, mean = conv_gelu_mean(*args)
    np.testing.assert_array_equal(h, gelu(depthwise_conv(*args)))
    assert (h.dtype, mean.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(mean, h.astype(jnp.float32).mean((1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (3, 7, 8), (2, 4, 8, 48)])
def test_norm_modulate_and_its_gradient_are_those_of_the_formula(shape):
    def formula(x, shift, scale):
        shift, scale = (jnp.expand_dims(v, tuple(range(1, x.ndim - 1))) for v in (shift, scale))
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
        return normed * (1 + scale) + shift

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        vector = (shape[0], shape[-1])
        args = [jnp.asarray(rng.normal(size=s)) for s in (shape, vector, vector)]
        weights = jnp.asarray(rng.normal(size=shape))
        assert_same(norm_modulate, formula, args, weights, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(norm_modulate(*args), formula(*args), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            layer_norm(args[0]), formula(args[0], *np.zeros((2, *vector))), rtol=1e-12, atol=1e-12
        )


def test_norm_modulate_of_bfloat16_is_computed_in_float32():
    x, _, _ = operands((2, 4, 4, 64), jnp.bfloat16)
    shift, scale = jnp.ones((2, 64), jnp.bfloat16), jnp.ones((2, 64), jnp.bfloat16)
    y, pull = jax.vjp(norm_modulate, x, shift, scale)
    wide = [v.astype(jnp.float32) for v in (x, shift, scale)]
    # With a gradient, sums are taken in another order.
    np.testing.assert_allclose(y, norm_modulate(*wide), rtol=1e-5, atol=2e-6)
    assert [g.dtype for g in pull(y)] == [jnp.bfloat16] * 3


def test_gelu_has_the_gradient_of_its_formula():
    with jax.enable_x64(True):
        x = jnp.linspace(-9, 9, 301)
        reference = jax.grad(lambda x: jnp.sum(jax.nn.gelu(x, approximate=False)))(x)
        ours = jax.grad(lambda x: jnp.sum(gelu(x)))(x)
        np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-15)


def test_gelu_at_the_ends_of_its_dtypes_has_a_finite_gradient():
    """Where x is 0, and where its GELU or their quotient is no normal number."""
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray([0.0, -0.0, 1e-38, -1e-38, 1e-45, -13.0, -14.5, -1e4, 1e4], dtype)
        gradient = jax.grad(lambda x: gelu(x).astype(jnp.float32).sum())(x)
        expected = jnp.asarray([0.5] * 5 + [0.0] * 3 + [1.0], jnp.float32)
        np.testing.assert_allclose(gradient.astype(jnp.float32), expected, atol=1e-6)


def test_linear_gelu_of_bfloat16_has_the_gradient_of_its_parts():
    rng = np.random.default_rng(0)
    shapes = [(2, 8, 8, 16), (16, 32), (32,)]
    x, kernel, bias = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    def gradient(f):
        return jax.grad(lambda *args: f(*args).astype(jnp.float32).sum(), (0, 1, 2))(
            x, kernel, bias
        )

    parts = gradient(lambda *args: gelu(linear(*args)))
    for ours, theirs in zip(gradient(linear_gelu), parts, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            ours.astype("float32"), theirs.astype("float32"), rtol=2**-7, atol=0.05
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_stored_changes_nothing(dtype):
    x = jnp.asarray([0.0, -1.1, 3e-30, 65504.0, jnp.inf, jnp.nan], dtype)
    np.testing.assert_array_equal(jax.jit(stored)(x).astype("float32"), x.astype("float32"))
    np.testing.assert_array_equal(jax.grad(lambda x: stored(x).sum())(x[:4]), 1.0)


@pytest.mark.parametrize("operation", [add_vector, multiply_vector])
@pytest.mark.parametrize("rows", [(), (2,)])
def test_vectors_over_positions_and_their_gradients(operation, rows):
    plain = {add_vector: jnp.add, multiply_vector: jnp.multiply}[operation]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, weights = (jnp.asarray(rng.normal(size=(2, 3, 5, 4))) for _ in range(2))
        vector = jnp.asarray(rng.normal(size=(*rows, 4)))

        def formula(x, vector):
            return plain(x, vector[:, None, None] if rows else vector)

        assert_same(operation, formula, (x, vector), weights, rtol=1e-12)


@pytest.mark.parametrize("operation", [add_vector, multiply_vector])
@pytest.mark.parametrize("rows", [(), (2,)])
def test_gradients_of_vectors_are_summed_in_float32(operation, rows):
    x, vector = jnp.ones((2, 32, 32, 4), jnp.bfloat16), jnp.ones((*rows, 4), jnp.bfloat16)
    gradient = jax.grad(lambda v: operation(x, v).astype(jnp.float32).sum())(vector)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), 1024.0 if rows else 2048.0)


# Of the gradients: few tiles or many, for the kernel by fewer multiplications or by a convolution.
@pytest.mark.parametrize(
    ("shape", "features"),
    [((2, 4, 6, 20), 16), ((2, 16, 16, 128), 130), ((3, 16, 16, 128), 128), ((4, 8, 16, 16), 8)],
)
@pytest.mark.parametrize(("dtype", "bar"), [("float32", 2e-6), ("float64", 1e-14)])
def test_winograd_and_its_gradients_are_those_of_the_convolution(shape, features, dtype, bar):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=shape), dtype)
        kernel = jnp.asarray(rng.normal(size=(3, 3, shape[-1], features)), dtype)
        dy = jnp.asarray(rng.normal(size=(*shape[:-1], features)), dtype)

        ours = jax.jit(functools.partial(value_and_gradients, winograd_conv3x3))((x, kernel), dy)
        wide = [a.astype("float64") for a in (x, kernel, dy)]
        reference = value_and_gradients(convolution, wide[:2], wide[2])
        for a, b in zip(ours, reference, strict=True):
            assert a.dtype == dtype
            assert np.abs(a - b).max() < bar * np.abs(b).max()


def test_conv3x3_takes_winograd_where_it_loses_nothing():
    """On CPU, for large float32 arrays; sums of bfloat16 are those of the convolution."""
    x, kernel = jnp.ones((4, 16, 16, 64)), jnp.ones((3, 3, 64, 64))

    def products(x, kernel):
        return jax.jit(conv3x3).lower(x, kernel).compile().as_text().count(" dot(")

    assert winograd_pays(x, kernel)
    assert products(x, kernel) == 16
    np.testing.assert_allclose(conv3x3(x, kernel), convolution(x, kernel), rtol=1e-5)
    few = jnp.ones((200, 6, 6, 64))  # positions of an example
    for small in (x[:3], few, x[:, :15], x[..., :32], x.astype(jnp.bfloat16)):
        taken = kernel[:, :, : small.shape[-1]].astype(small.dtype)
        assert not winograd_pays(small, taken)
        assert products(small, taken) == 0


def test_what_is_computed_apart_is_a_call_that_nothing_is_fused_across():
    x = jnp.ones((8, 16, 32))

    def program(x):
        y = apart(jnp.sin, x)
        return y + 1, with_sums(lambda sums, y: sums.over_positions(jnp.square, y), y)

    text = jax.jit(program).lower(x).compile().as_text()
    calls = [line for line in text.splitlines() if 'inlineable="false"' in line]
    assert len(calls) == (2 if cpu.LARGE == 0 else 0)
    assert all(" call(" in line for line in calls)


@jax.enable_x64(True)
def test_devices_that_split_the_batch_wait_for_each_other_once():
    """No sum over the batch is taken in what is computed apart: all are one reduction."""
    rng = np.random.default_rng(0)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), "data")
    split, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("data",), ())
    )
    shapes = {"taps": (3, 3, 1, 16), "bias": (16,), "kernel": (16, 16)}
    params = {k: jnp.asarray(rng.normal(size=shape)) for k, shape in shapes.items()}
    x, shift = jnp.asarray(rng.normal(size=(4, 8, 8, 16))), jnp.asarray(rng.normal(size=(4, 16)))

    def loss(params, x, shift):
        h, _ = conv_gelu_mean(x, params["taps"], params["bias"])
        h = linear_gelu(norm_modulate(h, shift, shift), params["kernel"], params["bias"])
        return jnp.square(gated_linear(h, params["kernel"], params["bias"], shift)).sum()

    reference = jax.grad(loss)(params, x, shift)
    gradient = jax.jit(jax.grad(loss), out_shardings=whole)
    args = jax.device_put(params, whole), *jax.device_put((x, shift), split)
    text = gradient.lower(*args).compile().as_text()
    assert text.count(" all-reduce(") == 1
    for a, b in zip(jax.tree.leaves(gradient(*args)), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


# Operations with a gradient of their own, and shapes of their operands.
LAYER = [(2, 4, 8, 16), (16, 32), (32,), (2, 32)]
OPERATIONS = {
    "gelu": (gelu, [(2, 4, 8, 16)]),
    "linear": (linear, LAYER[:3]),
    "gated_linear": (gated_linear, LAYER),
    "linear_gelu": (linear_gelu, LAYER[:3]),
    "norm_modulate": (norm_modulate, [(2, 4, 8, 16), (2, 16), (2, 16)]),
    "add_vector": (add_vector, [(2, 4, 8, 16), (2, 16)]),
    "multiply_vector": (multiply_vector, [(2, 4, 8, 16), (16,)]),
    "depthwise": (depthwise_conv, [(2, 4, 8, 16), (3, 3, 1, 16), (16,)]),
    "winograd": (winograd_conv3x3, [(2, 4, 8, 16), (3, 3, 16, 20)]),
    "conv3x3": (conv3x3, [(2, 4, 8, 16), (3, 3, 16, 20)]),
    "conv3x3 to few channels": (conv3x3, [(2, 4, 8, 40), (3, 3, 40, 4)]),
    "conv3x3 with winograd": (conv3x3, [(4, 16, 16, 64), (3, 3, 64, 64)]),
}


@jax.enable_x64(True)
@pytest.mark.parametrize("name", OPERATIONS)
def test_plain_forms_agree_and_can_be_differentiated_forwards(name):
    operation, shapes = OPERATIONS[name]
    rng = np.random.default_rng(0)
    args, tangents = ([jnp.asarray(rng.normal(size=shape)) for shape in shapes] for _ in range(2))
    special = jax.jit(operation)  # traced before and again inside the context
    y = special(*args)
    weights = jnp.asarray(rng.normal(size=y.shape))
    found = value_and_gradients(special, args, weights)
    with plain_ops():
        plain = value_and_gradients(special, args, weights)
        _, along = jax.jvp(special, args, tangents)
        twice = jax.jvp(lambda *a: value_and_gradients(special, a, weights), args, tangents)[1]
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * np.abs(b).max())
    # The derivative along the tangents by both modes.
    expected = sum((g * t).sum() for g, t in zip(found[1:], tangents, strict=True))
    np.testing.assert_allclose((weights * along).sum(), expected, rtol=1e-9)
    assert all(np.isfinite(leaf).all() for leaf in twice)
    if isinstance(operation, Operation):
        with plain_ops(enabled=False), pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(operation, args, tangents)


def test_attention_in_the_context_is_two_products(monkeypatch):
    args = [jnp.ones((2, 6, 3, 8), jnp.bfloat16)] * 3
    monkeypatch.setattr("dico_jax.ops.attention._cudnn_lacks", lambda *_: "")
    with plain_ops():
        attention(*args)  # cuDNN's runs nowhere here
