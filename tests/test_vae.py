"""Stable Diffusion's autoencoder: recorded numbers, dtypes, tiles, names and fields."""

import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dico_jax.autoencoders import create_autoencoder, posterior_latents, to_uint8
from dico_jax.autoencoders.kl import (
    AutoencoderKL,
    KLConfig,
    abstract_params,
    cut,
    decode_in_tiles,
)
from dico_jax.config import DEFAULTS
from dico_jax.errors import UsageError
from dico_jax.experiment import experiment_from_config
from dico_jax.pytorch.key_maps import KEY_MAPS
from tests import golden
from tests.golden import distance, nhwc
from tests.state_dicts import from_state_dict, state_dict_shapes

KEY_MAP = KEY_MAPS["AutoencoderKL"]
SMALL = KLConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
CONFIGS = {"small": SMALL, "sd": KLConfig()}
SEEDS = {"small": 1001, "sd": 1002}
TOLERANCE = {"float32": 1e-5, "float64": 1e-10, "bfloat16": 2.5e-2}


@functools.cache
def drawn(name):
    """The recorded autoencoder's parameters, float32."""
    shapes = state_dict_shapes(abstract_params(CONFIGS[name]), KEY_MAP)
    weights = golden.draw(shapes, SEEDS[name], "V")
    if golden.FOLDER.is_dir():
        manifest = json.loads((golden.FOLDER / "vae_manifest.json").read_text())[name]
        assert {k: list(shape) for k, shape in shapes.items()} == manifest["tensors"]
        assert golden.digest(weights) == manifest["sha256"]
    return from_state_dict(weights, abstract_params(CONFIGS[name]), KEY_MAP)


@functools.cache
def jitted(name, dtype, method):
    model = AutoencoderKL(CONFIGS[name], dtype=jnp.dtype(dtype))
    return jax.jit(functools.partial(model.apply, method=method, capture_intermediates=True))


def call(name, dtype, method, x):
    """What a method makes of x, and every module's output by path."""
    wide = "float64" if dtype == "float64" else "float32"
    params = jax.tree.map(lambda p: jnp.asarray(p, wide), drawn(name))
    out, state = jitted(name, dtype, method)({"params": params}, jnp.asarray(x, wide))
    assert out.dtype == wide
    return out, golden.flat_outputs(state["intermediates"])


def case(name, size, dtype):
    # The widths of "sd" are in test_shapes_of_the_released_network too, and float64 is strict.
    slow = name == "sd" or (dtype == "float32" and size != "32x32")
    return pytest.param(name, size, dtype, marks=[pytest.mark.slow] * slow)


SIZES = {"small": ("32x32", "64x64", "24x40"), "sd": ("32x32", "64x64")}
CASES = [case(n, size, d) for n in SIZES for size in SIZES[n] for d in ("float32", "float64")]


@golden.requires_golden
@pytest.mark.parametrize(("name", "size", "dtype"), CASES)
def test_recorded_numbers(name, size, dtype):
    recorded = golden.load("vae.npz")
    prefix = f"{name}/{size}/"
    g = {k.removeprefix(prefix): recorded[k] for k in recorded.files if k.startswith(prefix)}
    bar, scaling = TOLERANCE[dtype], CONFIGS[name].scaling_factor
    with jax.enable_x64(dtype == "float64"):
        pictures = g["images"].astype(np.float32) / np.float32(127.5) - 1
        moments, inside = call(name, dtype, "encode", pictures)
        mean, log_variance = np.split(np.asarray(moments), 2, axis=-1)
        assert distance(mean, nhwc(g["mean_f64"])) < bar
        assert distance(log_variance, nhwc(g["logvar_f64"])) < bar
        assert distance(np.exp(log_variance / 2), nhwc(g["std_f64"])) < bar
        latents = posterior_latents(moments, nhwc(g["eps"]), scaling)
        assert latents.dtype == np.float32
        assert distance(latents, nhwc(g["latent_f64"])) < TOLERANCE["float32"]
        decoded, _ = call(name, dtype, "decode", mean)
        assert distance(decoded, nhwc(g["decode_mean_f64"])) < bar
        decoded, more = call(name, dtype, "decode", nhwc(g["z"]).astype(dtype) / scaling)
        assert distance(decoded, nhwc(g["decode_z_f64"])) < bar
        pixels = np.asarray(to_uint8(decoded)).astype(int)
        assert np.mean(pixels != g["decoded_uint8"]) < 1e-3  # where rounding decides
        assert np.abs(pixels - g["decoded_uint8"]).max() <= 1
        recorded_inside = [k for k in g if k.startswith("inside/")]
        assert len(recorded_inside) == (6 if (name, size) == ("small", "32x32") else 0)
        for key in recorded_inside:
            path = key.removeprefix("inside/").removesuffix("_f64").replace(".", "/")
            assert distance((inside | more)[path][:1], nhwc(g[key])) < bar, path


def test_bfloat16_is_close_and_stays():
    """1.2e-2 (moments) and 1.6e-2 (pictures) of the peak, with all activations near unit size."""
    rng = np.random.default_rng(0)
    inputs = {
        "encode": rng.uniform(-1, 1, (2, 24, 40, 3)),
        "decode": rng.normal(size=(2, 12, 20, 4)),
    }
    for method, x in inputs.items():
        exact, _ = call("small", "float32", method, x)
        rough, inside = call("small", "bfloat16", method, x)
        assert 1e-3 < distance(rough, exact) < TOLERANCE["bfloat16"]
        assert len(inside) > 20
        assert {value.dtype for value in inside.values()} == {jnp.dtype(jnp.bfloat16)}


def test_moments_are_clamped_and_sizes_checked():
    params = jax.tree.map(np.array, drawn("small"))
    params["quant_conv"]["bias"][4:] = [-100, 100, 0, 0]
    model = AutoencoderKL(SMALL)
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))
    moments = np.asarray(encode(np.zeros((1, 8, 8, 3), np.float32)))
    assert set(np.unique(moments[..., 4:6])) == {-30, 20}
    with pytest.raises(UsageError, match="pictures of 7x8: both must be multiples of 2"):
        encode(np.zeros((1, 7, 8, 3), np.float32))


@pytest.mark.parametrize("shape", [(2, 64, 96, 3), (1, 8, 40, 3)])
def test_shapes_of_the_released_network(shape):
    model = AutoencoderKL()
    params = {"params": abstract_params(KLConfig())}
    pictures = jax.ShapeDtypeStruct(shape, jnp.float32)
    moments = jax.eval_shape(functools.partial(model.apply, method="encode"), params, pictures)
    n, height, width, _ = shape
    assert moments.shape == (n, height // 8, width // 8, 8)
    latents = jax.ShapeDtypeStruct((*moments.shape[:3], 4), jnp.float32)
    decoded = jax.eval_shape(functools.partial(model.apply, method="decode"), params, latents)
    assert decoded.shape == shape
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == 83_653_863


def test_posterior_latents():
    moments = np.float32([[1, -2, 0, 2 * math.log(3)]])[None, None]
    latents = posterior_latents(moments, np.float32([[2, -1]])[None, None], 0.5)
    np.testing.assert_allclose(latents, [[[[1.5, -2.5]]]], rtol=1e-6)
    np.testing.assert_array_equal(posterior_latents(moments, None, 0.5), [[[[0.5, -1]]]])
    stored = moments.astype(np.float16)
    assert isinstance(posterior_latents(stored, None, 0.5), np.ndarray)
    assert posterior_latents(jnp.asarray(stored), None, 0.5).dtype == jnp.float32


# Tiles.


def waves(height, width):
    """Waves of eight positions, of which every tile sees two: statistics are about the same."""
    y, x = np.mgrid[:height, :width]
    phases = [(y + 2 * x) / 8, y / 8 + 0.2, x / 8 + 0.4, (y - x) / 8 + 0.6]
    return np.sin(2 * np.pi * np.stack(phases, -1))[None].astype(np.float32)


def small_decode(z):
    """A decoder that is nearly local: drawn weights, residual parts weak."""

    def weaken(path, value):
        return value * (0.1 if {"conv2", "to_out"} & {p.key for p in path} else 1.0)

    params = jax.tree_util.tree_map_with_path(weaken, drawn("small"))
    return AutoencoderKL(SMALL).apply({"params": params}, z, method="decode")


def tiled(tile_size):
    return jax.jit(lambda z: decode_in_tiles(small_decode, z, tile_size, SMALL.downsampling))


@pytest.mark.parametrize("length", [8, 9, 16, 17, 21, 22, 28, 29, 64])
def test_tiles_cover_and_their_weights_add_up(length):
    starts, shares = cut(length, 16, 2)
    size = min(16, length)
    assert shares.shape == (len(starts), 2 * size)
    assert (starts[0], starts[-1]) == (0, length - size)
    assert (np.diff(starts) <= 12).all()  # an overlap of a quarter or more
    assert (np.diff(starts) > 0).all()
    total = np.zeros(2 * length)
    for start, weights in zip(starts, shares, strict=True):
        assert (weights > 0).all()
        assert np.abs(np.diff(weights)).max(initial=0) < 0.4  # no steps
        total[2 * start : 2 * (start + size)] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_one_tile_is_plain_decoding():
    z = waves(12, 16)
    np.testing.assert_array_equal(tiled(16)(z), jax.jit(small_decode)(z))


def test_an_exact_decoder_is_tiled_exactly():
    """Of a decoder that sees one position at a time, nothing shows."""

    def decode(z):
        return jnp.repeat(jnp.repeat(z[..., :3] ** 2, 2, axis=1), 2, axis=2)

    z = np.random.default_rng(0).normal(size=(2, 21, 50, 4)).astype(np.float32)
    found = jax.jit(lambda z: decode_in_tiles(decode, z, 16, 2))(z)
    np.testing.assert_allclose(found, decode(z), rtol=1e-5, atol=1e-6)


def test_tiles_are_close_and_have_no_seams():
    """A picture that is not square, in two by three tiles, and cut without overlap for contrast."""
    z, decode = waves(24, 40), jax.jit(small_decode)
    plain, found = np.asarray(decode(z)), np.asarray(tiled(16)(z))
    assert found.shape == plain.shape == (1, 48, 80, 3)
    rows = [[decode(part) for part in np.split(row, 4, axis=2)] for row in np.split(z, 2, axis=1)]
    cut_up = np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)

    def far(picture):
        return np.sqrt(np.mean((picture - plain) ** 2)) / plain.std()

    def seam(picture, axis):
        """The largest step that is not in the plain picture, over its largest own."""
        steps, own = (np.abs(np.diff(p, axis=axis)).max() for p in (picture - plain, plain))
        return steps / own

    assert far(found) < 0.1
    assert far(cut_up) > 0.3
    for axis in (1, 2):
        assert seam(found, axis) < 0.3
        assert seam(cut_up, axis) > 0.9


def test_tiles_need_less_memory():
    z = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    used = [
        jax.jit(f).lower(z).compile().memory_analysis().temp_size_in_bytes
        for f in (tiled(16), small_decode)
    ]
    assert used[0] < used[1] / 4, used


# Names and fields.


def fields(**changes):
    return ConfigDict({**DEFAULTS["autoencoder"], **changes})


def test_what_needs_no_weights():
    identity = create_autoencoder(fields(name="identity"))
    assert (identity.downsampling, identity.channels, identity.encode_moments) == (1, None, None)
    assert (identity.params, identity.encoder_digest, identity.scaling_factor) == ({}, None, 1.0)
    x = np.zeros((1, 2, 2, 7))
    assert identity.decode({}, x) is x
    preview = create_autoencoder(fields(name="latent_preview"))
    assert (preview.downsampling, preview.channels, preview.encode_moments) == (8, 4, None)
    assert preview.scaling_factor == 0.18215  # of latents from Stable Diffusion's autoencoder
    assert preview.decode({}, np.zeros((2, 4, 6, 4), np.float32)).shape == (2, 4, 6, 3)


def test_the_released_autoencoder_is_fetched_late(monkeypatch):
    """A config can be built, and weights converted, without the network."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    vae = create_autoencoder(fields())
    assert (vae.name, vae.downsampling, vae.channels) == ("sd_vae", 8, 4)
    assert vae.scaling_factor == 0.18215
    message = (
        "autoencoder.path=hf://stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors: "
        r"needs huggingface_hub: pip install huggingface_hub, or .*; give a local file, or "
        "autoencoder.name='latent_preview'"
    )
    for attribute in ("params", "encoder_digest"):
        with pytest.raises(UsageError, match=message):
            getattr(vae, attribute)
    with pytest.raises(UsageError, match="autoencoder.path=hf://a/b/c.bin: needs huggingface_hub"):
        create_autoencoder(fields(path="hf://a/b/c.bin"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sd"}, "autoencoder.name='sd' is unknown: use one of sd_vae, identity, latent_"),
        ({"path": ""}, "autoencoder.path='': give the file"),
        ({"path": "/no/such.bin"}, "autoencoder.path=/no/such.bin: cannot be opened: No such file"),
        ({"path": "hf://a/b"}, "autoencoder.path=hf://a/b: write hf://OWNER/REPO/FILE; give a lo"),
        ({"dtype": "float16"}, "autoencoder.dtype='float16' is unknown: use one of float32, bfloa"),
        ({"tile_size": -1}, "autoencoder.tile_size=-1 must be at least 8, or 0 for none"),
        ({"tile_size": 7}, "autoencoder.tile_size=7 must be at least 8, or 0 for none"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        create_autoencoder(fields(**changes))
    config = ConfigDict(DEFAULTS)
    config.autoencoder.update(changes)
    with pytest.raises(UsageError, match=f"^config.{message}"):
        experiment_from_config(config)
