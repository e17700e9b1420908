"""The networks against numbers recorded from the published PyTorch code."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.diffusion.guidance import classifier_free_guidance
from dico_jax.models import create_model
from dico_jax.ops.conv import depthwise_conv
from dico_jax.ops.pointwise import gelu, layer_norm
from tests import golden
from tests.golden import TINY, TINY_DRAWS, TOLERANCE, distance, nhwc

pytestmark = golden.requires_golden
DTYPES = ["float32", "float64"]
DIT = {"hidden_size": 64, "depth": 3, "num_heads": 4, "patch_size": 2, "num_classes": 10}
DIT_DRAWS = {
    "A": (501, "b9c15eaa07fb9b68271064a4dc91b2e88572d73011a1c2507ff44f99d7542b8f"),
    "B": (502, "8eb56c6edf1e6d7e6a3eb6a1036b6b58a4f817026c41c9508a7e26d32224ef91"),
}


def forward(model, params, x, t, y, dtype, **kwargs):
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    x = jnp.asarray(nhwc(x), dtype)
    return compiled(model, **kwargs)({"params": params}, x, jnp.asarray(t), jnp.asarray(y))


@functools.cache
def compiled(model, **kwargs):
    return jax.jit(functools.partial(model.apply, **kwargs))


def both_halves(model, params, x, t, y, dtype):
    """What the published guided forward guides: of the first half of x with t and y."""
    return forward(model, params, np.concatenate([x[: len(t) // 2]] * 2), t, y, dtype)


def guided_halves(model, out, scale):
    """Both halves of the published guided forward: noise guided in both, the rest as it was."""
    cond, uncond = np.split(out, 2)
    guided = classifier_free_guidance(
        cond, uncond, scale, num_channels=model.in_channels, cfg_channels="first_three"
    )
    return np.concatenate([guided, np.concatenate([guided[..., :3], uncond[..., 3:]], -1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", "AB")
def test_dico_forward_and_guidance(draw, dtype):
    g = golden.load("dico_tiny_forward.npz")
    with jax.enable_x64(dtype == "float64"):
        model = create_model("DiCo", dtype=dtype, **TINY)
        params = golden.drawn_params(model, TINY_DRAWS[draw][0], draw, TINY_DRAWS[draw][1])
        tolerance = TOLERANCE[draw, dtype]
        out = forward(model, params, g["x"], g["t"], g["y"], dtype)
        assert out.dtype == dtype
        assert distance(out, nhwc(g[f"{draw}_out_f64"])) < tolerance
        halves = both_halves(model, params, g["cfg_x"], g["cfg_t"], g["cfg_y"], dtype)
        for name in [k for k in g.files if k.startswith(f"{draw}_cfg") and k.endswith("f64")]:
            scale = float(name.split("cfg")[1].split("_")[0])
            out = guided_halves(model, halves, scale)
            assert distance(out, nhwc(g[name])) < tolerance * max(1, scale)


# Golden stage name to the module whose output it is.
_STAGES = """
    x_embedder encoder_level_1 down1_2 encoder_level_2 down2_3 latent up3_2 reduce_chan_level2
    decoder_level_2 up2_1 reduce_chan_level1 decoder_level_1 final_layer
"""
_BLOCK_PARTS = "adaLN_modulation conv1 conv3 conv4 conv5"
STAGES = {
    **{f"B_stage_{name}_f64": name for name in _STAGES.split()},
    **{f"B_latent0_{name}_f64": f"latent/0/{name}" for name in _BLOCK_PARTS.split()},
    "B_latent0_output_f64": "latent/0",
}
# Modules whose output is gated here, not after them, to the gate's place in the modulation.
GATES = {"latent/0/conv3": 2, "latent/0/conv5": 5}


def fused_parts(outputs, params):
    """The steps of the first example in latent/0 that are no modules, from what comes before."""
    x, block = (
        outputs["down2_3"][:1],
        {k: v for k, v in outputs.items() if k.startswith("latent/0")},
    )
    conv2 = params["latent"]["0"]["conv2"]
    features = depthwise_conv(block["latent/0/conv1"][:1], conv2["kernel"], conv2["bias"])
    h, mean = (value[:1] for value in block["latent/0/conv2"])
    assert distance(h, gelu(features)) < 1e-6
    assert distance(mean, h.mean((1, 2))) < 1e-6
    middle = x + block["latent/0/conv3"][:1]
    attention = block["latent/0/ca"][:1, None, None]
    return {
        "norm1": layer_norm(x), "conv2": features, "ca": attention, "norm2": layer_norm(middle)
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_stage_of_dico(dtype):
    g = golden.load("dico_tiny_forward.npz")
    recorded = {k for k in g.files if k.startswith(("B_stage", "B_latent0"))}
    fused = {f"B_latent0_{name}_f64" for name in ("norm1", "conv2", "ca", "norm2")}
    assert recorded == set(STAGES) | fused
    with jax.enable_x64(dtype == "float64"):
        model = create_model("DiCo", dtype=dtype, **TINY)
        params = golden.drawn_params(model, *TINY_DRAWS["B"][:1], "B")
        _, state = forward(model, params, g["x"], g["t"], g["y"], dtype, capture_intermediates=True)
        outputs = golden.flat_outputs(state["intermediates"])
        for name, module in STAGES.items():
            value = np.asarray(outputs[module])[:1]
            reference = nhwc(g[name]) if g[name].ndim == 4 else g[name]
            if module == "latent/0/conv4":  # GELU is in it
                reference = gelu(jnp.asarray(reference, dtype))
            if module in GATES:
                gates = np.split(g["B_latent0_adaLN_modulation_f64"], 6, axis=-1)
                reference = reference * gates[GATES[module]][:, None, None]
            assert distance(value, reference) < TOLERANCE["B", dtype], name
        for part, value in fused_parts(outputs, params).items():
            reference = nhwc(g[f"B_latent0_{part}_f64"])
            assert distance(value, reference) < TOLERANCE["B", dtype], part
        for k in (1, 2, 3):
            t_embed, y_embed = (
                outputs[f"t_embedder_{k}"],
                outputs[f"y_embedder/embedding_table_{k - 1}"],
            )
            # The time features carry most of the float32 floor (8e-6 in the published code).
            bar = 1e-11 if dtype == "float64" else 1.6e-5
            assert distance(t_embed, g[f"B_t_embed_{k}_f64"]) < bar
            assert distance(y_embed, g[f"B_y_embed_{k}_f64"]) < 1e-7


def variant_names():
    return [k[: -len("_config")] for k in golden.load("dico_variants.npz").files if "_config" in k]


# float64 is the strict one; float32 is checked by the tests above, of one network.
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
@pytest.mark.parametrize("name", variant_names() if golden.FOLDER.is_dir() else [])
def test_dico_variants(name, dtype):
    g = golden.load("dico_variants.npz")
    config = json.loads(str(g[f"{name}_config"]))
    x, t, y = (g[f"{name}_{k}"] for k in "xty")
    with jax.enable_x64(dtype == "float64"):
        model = create_model("DiCo", dtype=dtype, **config["model"])
        params = golden.drawn_params(model, config["seed"], config["recipe"], config["sha256"])
        if config["cfg"]:
            halves = both_halves(model, params, x, t, y, dtype)
            out = guided_halves(model, halves, config["cfg"])
        else:
            out = forward(model, params, x, t, y, dtype)
        tolerance = TOLERANCE[config["recipe"], dtype] * (config["cfg"] or 1)
        assert distance(out, nhwc(g[f"{name}_out_f64"])) < tolerance


def test_one_drop_decision_feeds_the_three_tables():
    g = golden.load("dico_variants.npz")
    model = create_model("DiCo", hidden_size=8, depth=(1, 2, 1, 2, 1), num_classes=10)
    params = golden.drawn_params(model, 120, "B")
    dropped = np.where(g["drop_ids"] == 1, model.null_class, g["drop_y"])
    for k in range(3):
        rows = params["y_embedder"][f"embedding_table_{k}"]["embedding"][dropped]
        np.testing.assert_array_equal(rows, g[f"drop_embed_{k}"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draw", "AB")
def test_dit_forward_guidance_and_stages(draw, dtype):
    g = golden.load("dit_tiny.npz")
    with jax.enable_x64(dtype == "float64"):
        model = create_model("DiT", dtype=dtype, **DIT)
        params = golden.drawn_params(model, DIT_DRAWS[draw][0], draw, DIT_DRAWS[draw][1])
        tolerance = TOLERANCE[draw, dtype]
        out, state = forward(
            model, params, g["x"], g["t"], g["y"], dtype, capture_intermediates=True
        )
        assert distance(out, nhwc(g[f"{draw}_out_f64"])) < tolerance
        halves = both_halves(model, params, g["cfg_x"], g["cfg_t"], g["cfg_y"], dtype)
        out = guided_halves(model, halves, 1.5)
        assert distance(out, nhwc(g[f"{draw}_cfg1.5_f64"])) < tolerance * 1.5
        outputs = golden.flat_outputs(state["intermediates"])
        modules = {
            "block_0_attn": "blocks/0/attn",
            "block_0_mlp": "blocks/0/mlp",
            "block_0": "blocks/0",
            "block_1": "blocks/1",
            "block_2": "blocks/2",
            "final_layer": "final_layer",
            "patches": "x_embedder",
        }
        stages = {k for k in g.files if k.startswith("B_") and "out" not in k and "cfg" not in k}
        assert stages == {f"B_{k}_f64" for k in modules}
        for name, module in modules.items() if draw == "B" else ():
            value, reference = np.asarray(outputs[module])[:1], g[f"B_{name}_f64"]
            assert distance(value, reference) < tolerance, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_dit_with_patches_of_four(dtype):
    g = golden.load("dit_tiny.npz")
    with jax.enable_x64(dtype == "float64"):
        model = create_model(
            "DiT", dtype=dtype, hidden_size=48, depth=2, num_heads=3, patch_size=4, num_classes=10
        )
        sha = "322d7123b1d50507602419226e86b496793410564ef089a62066431b2d2d709c"
        params = golden.drawn_params(model, 502, "B", sha)
        out = forward(model, params, g["second_x"], g["t"], g["y"], dtype)
        assert distance(out, nhwc(g["second_out_f64"])) < TOLERANCE["B", dtype]


def test_position_embedding():
    from dico_jax.models.dit import position_embedding

    g = golden.load("dit_tiny.npz")
    np.testing.assert_allclose(position_embedding(8, 8, 64), g["pos_embed"][0], atol=1e-7)
    np.testing.assert_allclose(position_embedding(4, 4, 48), g["second_pos_embed"][0], atol=1e-7)


LEVELS = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")


def has_block(depth, key):
    """Whether a network of this depth has the block of a PyTorch key, if it is in a block."""
    level, _, rest = key.partition(".")
    return level not in LEVELS or int(rest.partition(".")[0]) < depth[LEVELS.index(level)]


# One block of a level starts as the others: the whole network is for the slow tests.
@pytest.mark.parametrize(
    "depth", [(1, 1, 1, 1, 1), pytest.param((5, 4, 4, 4, 4), marks=pytest.mark.slow)]
)
def test_initialisation_of_dico_s(depth):
    """Every tensor has the published distribution: bound and deviation, or zero."""
    import flax

    from dico_jax.pytorch.key_maps import torch_key

    recorded = json.loads((golden.FOLDER / "init_dico_s.json").read_text())
    model = create_model("DiCo", hidden_size=128, depth=depth, mlp_ratio=2.0)
    assert depth == (1,) * 5 or model == create_model("DiCo-S")
    x, t = jnp.zeros((1, 4, 4, 4)), jnp.zeros((1,), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), x, t, t)["params"]
    flat = {torch_key(p): v for p, v in flax.traverse_util.flatten_dict(params).items()}
    assert set(flat) == {key for key in recorded if has_block(depth, key)}
    for key in flat:
        value, spec = np.asarray(flat[key], np.float64), recorded[key]
        if spec["kind"] == "zeros":
            assert not value.any(), key
            continue
        if spec["kind"] == "xavier_uniform":
            bound = np.sqrt(6 / (spec["fan_in"] + spec["fan_out"]))
            deviation = bound / np.sqrt(3)
            assert np.abs(value).max() <= bound * (1 + 1e-6), key
            assert np.abs(value).max() > bound * 0.97, key
        else:
            deviation = spec["std"]
        # Four standard errors of a sample's deviation, or of its mean.
        error = 4 / np.sqrt(value.size)
        assert abs(value.std() / deviation - 1) < error, key
        assert abs(value.mean()) < error * deviation, key
