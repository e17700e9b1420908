"""What must hold of the networks without any recorded numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.autoencoders.kl import AutoencoderKL
from dico_jax.errors import UsageError
from dico_jax.evaluation.inception import resized
from dico_jax.models import (
    MODELS,
    abstract_params,
    count_parameters,
    create_model,
    forward_macs,
    model_options,
)
from dico_jax.models.dit import DiT
from dico_jax.models.layers import pixel_shuffle, pixel_unshuffle, time_features
from dico_jax.pytorch.key_maps import KEY_MAPS
from tests import golden
from tests.golden import TINY
from tests.state_dicts import from_state_dict, state_dict_shapes, to_state_dict

DIT = {"hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 2, "num_classes": 10}
ISO = {"hidden_size": 16, "depth": 2, "patch_size": 2, "mlp_ratio": 3.0, "num_classes": 10}
SMALL = {"DiCo": {"hidden_size": 8, "depth": (1, 1, 1, 1, 1), "num_classes": 10}, "DiT": DIT}
SMALL |= {"IsoDiCo": ISO}
FAMILIES = list(SMALL)


def inputs(n=4, side=8, channels=4, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(n, side, side, channels)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, 1000, n)), jnp.asarray(rng.integers(0, 11, n))


def drawn_params(model, seed, kind):
    """Recipe weights, or, for a network that no PyTorch code has, some of the same kind."""
    if type(model).__name__ in KEY_MAPS:
        return golden.drawn_params(model, seed, kind)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(np.float32),
        abstract_params(model),
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("DiCo-S", 33_137_672),
        ("DiCo-B", 129_992_712),
        ("DiCo-L", 463_897_992),
        ("DiCo-XL", 701_151_368),
        ("DiCo-H", 1_037_408_328),
        ("DiT-S/2", 32_963_360),
        ("DiT-B/2", 130_512_416),
        ("DiT-L/2", 458_102_816),
        ("DiT-XL/2", 675_129_632),
    ],
)
def test_published_parameter_counts(name, parameters):
    model = create_model(name)
    # The published DiT counts include the fixed position table of 16 x 16 patches.
    table = 256 * model.hidden_size if name.startswith("DiT") else 0
    assert count_parameters(model) + table == parameters


def test_isotropic_sizes_are_near_the_papers():
    """679M and 118.3G with LightningDiT's latents; 33.7M and 5.67G (table 4) with DiT-S's."""
    for options, shape, parameters, macs in (
        ({"in_channels": 32, "learn_sigma": False}, (16, 16, 32), 679e6, 118.3e9),
        ({"hidden_size": 384, "depth": 10, "patch_size": 2}, (32, 32, 4), 33.7e6, 5.67e9),
    ):
        model = create_model("IsoDiCo", **options)
        np.testing.assert_allclose(count_parameters(model), parameters, rtol=0.01)
        np.testing.assert_allclose(forward_macs(model, shape), macs, rtol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_times_have_an_embedder_of_their_difference(family):
    """Of two times that are equal too, and nothing else is added."""
    one, two = (create_model(family, **SMALL[family], two_times=both) for both in (False, True))
    params = drawn_params(two, 1, "B")
    of_one = {k: v for k, v in params.items() if not k.endswith("_length")}
    assert jax.tree.structure(of_one) == jax.tree.structure(abstract_params(one))
    added = count_parameters(two) - count_parameters(one)
    assert added == count_parameters(two, [k for k in params if k.endswith("_length")])
    assert forward_macs(two, (8, 8, 4)) - forward_macs(one, (8, 8, 4)) == pytest.approx(added, 0.02)
    x, t, y = inputs()
    times = np.stack([t, t - np.array([0, 1, 2, 3])], axis=-1)
    outputs = [
        two.apply({"params": params}, x, given, y) for given in (times, np.stack([t, t], axis=-1))
    ]
    same = [np.allclose(a, b, atol=1e-5) for a, b in zip(outputs[0], outputs[1], strict=True)]
    assert same == [True, False, False, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_zero_and_blocks_are_identities_at_first(family):
    model = create_model(family, **SMALL[family])
    x, t, y = inputs()
    params = jax.jit(model.init)(jax.random.key(0), x, t, y)["params"]
    apply = jax.jit(functools.partial(model.apply, capture_intermediates=True))
    out, state = apply({"params": params}, x, t, y)
    assert out.shape == (4, 8, 8, 8)
    assert not np.any(out)
    outputs = golden.flat_outputs(state["intermediates"])
    first, before = {
        "DiCo": ("encoder_level_1/0", "x_embedder"),
        "DiT": ("blocks/1", "blocks/0"),
        "IsoDiCo": ("blocks/1", "blocks/0"),
    }[family]
    assert np.any(outputs[before])
    np.testing.assert_array_equal(outputs[first], outputs[before])


def test_initialisation_has_the_published_distributions():
    """Bound and deviation by kind of tensor (DiCo-S is checked with the golden set)."""
    model = create_model("DiCo", hidden_size=32, depth=(1, 1, 1, 1, 1))
    params = jax.jit(model.init)(jax.random.key(0), *inputs(1, 4))["params"]

    def check(value, bound):
        value = np.asarray(value)
        assert 0.97 * bound < np.abs(value).max() <= bound
        np.testing.assert_allclose(value.std(), bound / np.sqrt(3), rtol=0.06)

    check(params["x_embedder"]["proj"]["kernel"], np.sqrt(6 / (36 + 32)))  # a linear layer's fans
    block = params["latent"]["0"]
    check(block["conv1"]["kernel"], np.sqrt(6 / (128 + 128)))
    check(block["conv2"]["kernel"], np.sqrt(6 / (9 + 9 * 128)))
    check(block["conv4"]["kernel"], np.sqrt(6 / (128 + 256)))
    check(params["down1_2"]["body"]["0"]["kernel"], np.sqrt(6 / (9 * 32 + 9 * 16)))
    for table in ("embedding_table_0", "embedding_table_2"):
        np.testing.assert_allclose(params["y_embedder"][table]["embedding"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(params["t_embedder_1"]["mlp"]["0"]["kernel"].std(), 0.02, rtol=0.05)
    assert not np.any(block["adaLN_modulation"]["1"]["kernel"])
    assert not np.any(params["final_layer"]["out_proj"]["kernel"])


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_do_not_see_each_other(family):
    model = create_model(family, **SMALL[family])
    params = drawn_params(model, 1, "B")
    x, t, y = inputs()
    order = np.array([2, 0, 3, 1])
    run = jax.jit(lambda *a: model.apply({"params": params}, *a))
    np.testing.assert_allclose(run(x[order], t[order], y[order]), run(x, t, y)[order], atol=1e-5)


def test_time_features_tell_all_timesteps_apart_whatever_the_dtype_of_activations():
    features = time_features(jnp.arange(1000))
    assert features.shape == (1000, 256)
    assert len(np.unique(np.asarray(features), axis=0)) == 1000
    np.testing.assert_allclose(features[7, [0, 128]], [np.cos(7), np.sin(7)], rtol=1e-5)


def test_pixel_shuffle_order():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    packed = pixel_unshuffle(x)
    assert packed.shape == (2, 2, 3, 12)
    for c, i, j in [(0, 0, 0), (1, 0, 1), (2, 1, 0)]:
        np.testing.assert_array_equal(packed[..., 4 * c + 2 * i + j], x[:, i::2, j::2, c])
    np.testing.assert_array_equal(pixel_shuffle(packed), x)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"learn_sigma": False}, (1, 8, 8, 4)),
        ({"in_channels": 3}, (1, 8, 8, 6)),
        ({"num_classes": 3}, (1, 8, 8, 8)),
        ({"mlp_ratio": 2.7}, (1, 8, 8, 8)),
        ({"class_dropout_prob": 0.0}, (1, 8, 8, 8)),
        ({"dtype": "bfloat16"}, (1, 8, 8, 8)),
        ({"scan_blocks": True}, (1, 8, 8, 8)),
        ({"remat": "blocks"}, (1, 8, 8, 8)),
        ({"remat": "dots"}, (1, 8, 8, 8)),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_option_changes_the_network(family, options, shape):
    text, out = traced(create_model(family, **{**SMALL[family], **options}))
    assert text != traced(create_model(family, **SMALL[family]))[0]
    assert out.shape == shape


@functools.cache
def traced(model):
    """The program of a network as text, and its output's shape and dtype."""
    x = jax.ShapeDtypeStruct((1, 8, 8, model.in_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    program, out = jax.make_jaxpr(
        lambda p, *args: model.apply({"params": p}, *args), return_shape=True
    )(abstract_params(model), x, t, t)
    return str(program), out


def test_null_class():
    assert create_model("DiCo", **TINY).null_class == 10
    assert create_model("DiCo", **TINY, class_dropout_prob=0.0).null_class is None
    assert create_model("DiT-S/2").null_class == 1000


@pytest.mark.parametrize("family", ["DiCo", "DiT"])
def test_key_map_round_trip_and_mismatches(family):
    model = create_model(family, **SMALL[family])
    key_map, abstract = KEY_MAPS[family], abstract_params(model)
    params = drawn_params(model, 1, "B")
    state_dict = to_state_dict(params, key_map)
    assert {k: v.shape for k, v in state_dict.items()} == state_dict_shapes(abstract, key_map)
    again = from_state_dict(state_dict, abstract, key_map)
    jax.tree.map(np.testing.assert_array_equal, again, params)

    removed = state_dict.pop("t_embedder.mlp.0.bias" if family == "DiT" else "latent.0.ca.1.bias")
    state_dict["extra"] = removed
    state_dict["final_layer.adaLN_modulation.1.bias"] = removed[:-1]
    with pytest.raises(UsageError) as error:
        from_state_dict(state_dict, abstract, key_map)
    for part in ("missing", "unexpected extra", "final_layer.adaLN_modulation.1.bias is"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DiCo-M", {}, "model.name='DiCo-M' is unknown: use 'DiCo-"),
        ("DiCo-S", {"num_clases": 5}, "model.num_clases=5.*did you mean 'num_classes'"),
        ("DiCo-S", {"num_heads": 5}, "model.num_heads=5: model 'DiCo-S' has no such option"),
        ("DiCo-S", {"hidden_size": 64}, "model.hidden_size=64 contradicts model.name='DiCo-S'"),
        ("DiCo", {"hidden_size": 7}, "model.hidden_size=7 must be even"),
        ("DiCo", {"depth": (1, 2)}, r"model.depth=\(1, 2\) must give .* five stages"),
        ("DiCo", {"depth": (1, 0, 1, 1, 1)}, "each at least 1"),
        ("DiCo", {"num_classes": 0}, "model.num_classes=0 must be at least 1"),
        ("DiCo", {"class_dropout_prob": 1.0}, r"model.class_dropout_prob=1.0 must be in \[0, 1\)"),
        ("DiCo", {"mlp_ratio": 0.0}, "model.mlp_ratio=0.0 leaves"),
        ("DiCo", {"dtype": "float16"}, "model.dtype='float16' is unknown: use one of float32"),
        ("DiCo", {"dtype": "half"}, "model.dtype='half' is unknown"),
        ("DiT", {"hidden_size": 30, "num_heads": 4}, "model.hidden_size=30 must divide by"),
        ("DiT", {"depth": 0}, "model.depth=0.* at least 1"),
        ("DiT", {"remat": "all"}, "model.remat='all' is unknown: use one of none, blocks, dots"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize(("family", "side"), [("DiCo", 6), ("DiCo", 2), ("DiT", 5)])
def test_wrong_input_size(family, side):
    model = create_model(family, **SMALL[family])
    with pytest.raises(UsageError, match=f"input of {side}x{side} positions: both must be multipl"):
        jax.eval_shape(model.init, jax.random.key(0), *inputs(1, side))


def test_model_options_list_everything():
    assert set(model_options("DiCo-XL")) == {
        "hidden_size", "depth", "mlp_ratio", "in_channels", "num_classes", "class_dropout_prob",
        "learn_sigma", "dtype", "scan_blocks", "remat", "plain_ops", "two_times", "layout", "mixer",
        "window_size", "attention", "channel_attention", "kernel_size", "activation",
    }  # fmt: skip
    assert len(MODELS) == 2 * 5 + 4 * 3 + 4 + 5


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_operations_can_be_differentiated_forwards_and_twice(family):
    with jax.enable_x64(True):
        loops = {"dtype": "float64", "scan_blocks": True, "remat": "dots"}
        network = create_model(family, **SMALL[family], dtype="float64")
        plain = create_model(family, **SMALL[family], **loops, plain_ops=True)
        params = drawn_params(network, 7, "B")
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        x, t, y = (jnp.asarray(a, jnp.float64) if a.ndim > 1 else a for a in inputs(2))
        direction = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

        def of(model):
            return lambda x: model.apply({"params": params}, x, t, y)

        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(of(network), (x,), (direction,))
        forwards = jax.jit(lambda x, direction: jax.jvp(of(plain), (x,), (direction,)))
        value, tangent = forwards(x, direction)

        @jax.jit
        def backwards(x, cotangent):
            value, pull = jax.vjp(of(network), x)
            return value, pull(cotangent)[0]

        expected, slope = backwards(x, value)
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(jnp.vdot(value, tangent), jnp.vdot(slope, direction), rtol=1e-9)

        def energy(model, s):
            return jnp.sum(of(model)(x + s * direction) ** 2)

        second = jax.jit(jax.hessian(lambda s: energy(plain, s)))(0.0)
        slope_at = jax.jit(jax.grad(lambda s: energy(network, s)))
        slopes = [slope_at(s) for s in (-1e-4, 1e-4)]
        np.testing.assert_allclose(second, (slopes[1] - slopes[0]) / 2e-4, rtol=1e-5)


def test_float64_needs_the_switch():
    key, pixels = jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    for ask in (
        lambda: create_model("DiT", **DIT, dtype="float64"),
        lambda: jax.eval_shape(DiT(**DIT, dtype=jnp.float64).init, key, *inputs(2)),
        lambda: jax.eval_shape(AutoencoderKL(dtype=jnp.float64).init, key, pixels),
        lambda: resized(pixels.astype(jnp.uint8), jnp.float64),
    ):
        with pytest.raises(UsageError, match="dtype='float64' needs JAX's own switch"):
            ask()
