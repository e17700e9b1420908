"""Files of Stable Diffusion's autoencoder: read in all their forms, converted, or refused."""

import hashlib
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dico_jax.autoencoders import create_autoencoder
from dico_jax.autoencoders.kl import KLConfig, abstract_params
from dico_jax.autoencoders.weights import convert_vae, open_kl
from dico_jax.config import DEFAULTS
from dico_jax.errors import UsageError
from dico_jax.models import abstract_params as abstract_model
from dico_jax.models import create_model
from dico_jax.pytorch.conversion import from_pytorch
from dico_jax.pytorch.key_maps import KEY_MAPS
from dico_jax.pytorch.tensors import DTYPES
from dico_jax.pytorch.torch_files import open_tensors, write_pt, write_safetensors
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.image_folder import save
from tests import golden
from tests.commands import call
from tests.golden import TINY
from tests.pytorch_files import assert_same
from tests.state_dicts import state_dict_shapes, to_state_dict
from tests.test_convert_refused import everything

KEY_MAP = KEY_MAPS["AutoencoderKL"]
# Three levels, the last two of one width; 5 latent channels.
SIZES = KLConfig((4, 8, 8), layers_per_block=1, latent_channels=5, norm_num_groups=4)
CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.30.0",
    "act_fn": "silu",
    "block_out_channels": [4, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "force_upcast": True,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 5,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.13025,
    "shift_factor": None,
    "use_quant_conv": True,
    "mid_block_add_attention": True,
}
SAFE = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def drawn(sizes=SIZES, seed=0):
    return golden.draw(state_dict_shapes(abstract_params(sizes), KEY_MAP), seed, "V")


WEIGHTS = drawn()


def folder(path, weights=WEIGHTS, name=SAFE, **changes):
    """A folder as diffusers saves it; a change to ... removes a field."""
    path.mkdir()
    write = write_safetensors if name.endswith("safetensors") else write_pt
    write(path / name, weights)
    config = {k: v for k, v in (CONFIG | changes).items() if v is not ...}
    (path / "config.json").write_text(json.dumps(config))
    return path


def create(path, **changes):
    return create_autoencoder(ConfigDict({**DEFAULTS["autoencoder"], "path": str(path), **changes}))


def assert_weights(vae, weights):
    found = to_state_dict(vae.params, KEY_MAP)
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert_same(found[key], value.astype(np.float32))


# Forms.


def old_names(weights, ones):
    """As files from before 2023: other names, some of them 1x1 convolutions."""
    found = {}
    for key, value in weights.items():
        for new, old in OLD_NAMES.items():
            if f".attentions.0.{new}." in key:
                key = key.replace(new, old)
                value = value.reshape(value.shape + (1, 1) * (value.ndim == 2 and ones))
        found[key] = value
    return found


ORIGINAL = {  # of the names of diffusers
    r"encoder\.down_blocks\.": "encoder.down.",
    r"decoder\.up_blocks\.(\d)": lambda m: f"decoder.up.{2 - int(m[1])}",
    r"((down|up)\.\d)\.resnets\.": r"\1.block.",
    r"\.(down|up)samplers\.0\.": r".\1sample.",
    r"mid_block\.resnets\.(\d)": lambda m: f"mid.block_{int(m[1]) + 1}",
    r"mid_block\.attentions\.0\.(to_)?": "mid.attn_1.",
    r"attn_1\.group_norm": "attn_1.norm",
    r"attn_1\.out\.0": "attn_1.proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}


def original_names(weights):
    """As the original latent-diffusion code has them, with attention as 1x1 convolutions."""
    found = {}
    for key, value in weights.items():
        for pattern, name in ORIGINAL.items():
            key = re.sub(pattern, name, key)
        found[key] = value[..., None, None] if "attn_1" in key and value.ndim == 2 else value
    return found


FORMS = (
    "folder file bin pt old old-4-D wrapped original pipeline diffusion fp16.safetensors fp16.bin"
)


@pytest.mark.parametrize("form", FORMS.split())
def test_forms_of_the_same_weights(form, tmp_path):
    weights = old_names(WEIGHTS, "4-D" in form) if "old" in form else WEIGHTS
    names = {"bin": "diffusion_pytorch_model.bin", "pt": "a.pt", "wrapped": "a.ckpt"}
    if form == "wrapped":
        weights = {"state_dict": {f"module.{k}": v for k, v in weights.items()}}
    elif form == "original":
        weights = original_names(WEIGHTS) | {"loss.discriminator.main.0.weight": np.ones(3)}
    elif form == "pipeline":
        weights = {f"vae.{k}": v for k, v in WEIGHTS.items()} | {"unet.conv_in.weight": np.ones(3)}
    elif form == "diffusion":
        weights = {f"first_stage_model.{k}": v for k, v in original_names(WEIGHTS).items()}
        weights |= {"model.diffusion_model.out.0.weight": np.ones(3)}
        weights |= {
            "model_ema.diffusion_modelout0weight": np.ones(3),
            "model_ema.decay": np.ones(1),
        }
        weights |= {"cond_stage_model.transformer.text_model.encoder.layers.0.w": np.ones(3)}
    elif form.startswith("fp16"):
        names[form] = f"diffusion_pytorch_model.{form}"
    path = folder(tmp_path / "vae", weights, names.get(form, SAFE))
    vae = create(
        path if form in ("folder", "bin") or "fp16" in form else path / names.get(form, SAFE)
    )
    assert (vae.name, vae.downsampling, vae.channels) == ("sd_vae", 4, 5)
    assert vae.scaling_factor == 0.13025
    assert_weights(vae, WEIGHTS)
    for prefixes, found in (
        (("encoder.", "quant_conv."), vae.encoder_digest),
        (("decoder.", "post_quant_conv."), vae.decoder_digest),
    ):
        part = {k: v for k, v in WEIGHTS.items() if k.startswith(prefixes)}
        assert found == golden.digest(part)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(dtype, tmp_path, capsys):
    weights = {k: v.astype(DTYPES[dtype]) for k, v in WEIGHTS.items()}
    assert_weights(create(folder(tmp_path / "vae", weights)), weights)
    assert ("rounded to float32" in capsys.readouterr().err) == (dtype == "float64")


def test_the_released_sizes_are_found(tmp_path):
    """Without a config.json, as the released file lies in a cache; tensors of one number each."""
    shapes = state_dict_shapes(abstract_params(KLConfig()), KEY_MAP)
    write_safetensors(
        tmp_path / "a.safetensors", {k: np.zeros(s, np.float16) for k, s in shapes.items()}
    )
    with open_kl(tmp_path / "a.safetensors") as file:
        assert file.config == KLConfig()


@golden.requires_golden
def test_the_recorded_file_without_its_config(tmp_path):
    path = golden.FOLDER / "vae_small.safetensors"
    with pytest.raises(UsageError, match="norm_num_groups=32 does not divide the 16 .*--norm_num"):
        create(path)
    convert_vae(path, tmp_path / "a.safetensors", norm_num_groups=8)
    manifest = json.loads((golden.FOLDER / "vae_manifest.json").read_text())["small"]
    vae = create(tmp_path / "a.safetensors")
    assert golden.digest(to_state_dict(vae.params, KEY_MAP)) == manifest["sha256"]


def test_autoencoders_that_differ_in_the_decoder_share_the_encoders_digest(tmp_path):
    other = drawn(seed=1)
    mixed = {k: other[k] if "decoder" in k else v for k, v in WEIGHTS.items()}
    first = create(folder(tmp_path / "ema"))
    second = create(folder(tmp_path / "mse", mixed))
    assert first.encoder_digest == second.encoder_digest
    assert first.decoder_digest != second.decoder_digest
    assert create(folder(tmp_path / "c", other)).encoder_digest != first.encoder_digest


def test_encode_and_decode_with_the_scaling_of_the_file(tmp_path):
    """Encoding does not scale, decoding does; tiles and bfloat16 by the config's fields."""
    path = folder(tmp_path / "vae")
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (1, 48, 64, 3)).astype(np.float32)
    z = rng.normal(size=(1, 12, 16, 5)).astype(np.float32)
    vae = create(path)
    moments = jax.jit(vae.encode_moments)(vae.params, pictures)
    assert (moments.shape, moments.dtype) == ((1, 12, 16, 10), np.float32)
    plain = jax.jit(vae.decode)(vae.params, z)
    assert (plain.shape, plain.dtype) == ((1, 48, 64, 3), np.float32)
    other = create(folder(tmp_path / "other", scaling_factor=...))
    assert other.scaling_factor == 0.18215
    scaled = jax.jit(other.decode)(other.params, z / np.float32(0.13025) * np.float32(0.18215))
    np.testing.assert_allclose(scaled, plain, atol=1e-4)
    for changes in ({"tile_size": 8}, {"dtype": "bfloat16"}):
        vae = create(path, **changes)
        found = jax.jit(vae.decode)(vae.params, z)
        assert (found.shape, found.dtype) == (plain.shape, np.float32)
        assert np.abs(found - plain).max() > 1e-3


# The hub.


class EntryNotFoundError(OSError):
    """Named as huggingface_hub's."""


class LocalEntryNotFoundError(EntryNotFoundError):
    """Named as huggingface_hub's: not in the cache, and no network."""


@pytest.mark.parametrize("missing", [None, EntryNotFoundError, LocalEntryNotFoundError])
def test_addresses_of_the_hub(missing, tmp_path, monkeypatch):
    path, asked = folder(tmp_path / "vae"), []

    class Hub:
        @staticmethod
        def hf_hub_download(repo, name):
            asked.append((repo, name))
            if name.endswith(".json") and missing:
                raise missing("none there")
            return str(path / name.removeprefix("vae/"))

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    address = f"hf://owner/repo/vae/{SAFE}"
    if missing is None:
        assert create(address).scaling_factor == 0.13025
        assert asked == [("owner/repo", f"vae/{SAFE}"), ("owner/repo", "vae/config.json")]
    else:
        message = {
            EntryNotFoundError: "norm_num_groups=32 does not divide",
            LocalEntryNotFoundError: "vae/config.json of owner/repo cannot be downloaded: none the",
        }[missing]
        with pytest.raises(UsageError, match=f"^autoencoder.path={address}: .*{message}"):
            create(address)


# Converting.


def test_convert(tmp_path):
    path = folder(tmp_path / "vae", {k: v.astype(np.float16) for k, v in WEIGHTS.items()})
    out = tmp_path / "a.safetensors"
    done = convert_vae(path, out)
    assert "3 levels" in done
    assert "5 latent channels, shrinks by 4, norm_num_groups=4, scaling_factor=0.13025" in done
    direct, converted = create(path), create(out)
    jax.tree.map(assert_same, converted.params, direct.params)
    assert converted.encoder_digest == direct.encoder_digest
    assert converted.scaling_factor == direct.scaling_factor
    with open_tensors(out) as file:
        assert all(ref.dtype == np.float32 for ref in file.tensors.values())
        found = file.tensors["encoder/down_blocks/0/downsamplers/0/conv/kernel"]
        assert found.shape == (3, 3, 4, 4)
        metadata = file.metadata
    assert metadata["format"] == "dico_jax.AutoencoderKL"
    assert json.loads(metadata["config"])["block_out_channels"] == [4, 8, 8]
    assert metadata["encoder_sha256"] == direct.encoder_digest
    assert metadata["source_name"] == "vae"
    digest = hashlib.sha256((path / SAFE).read_bytes()).hexdigest()
    assert metadata["source_sha256"] == digest
    # A config.json that lies beside it by chance does not matter, and it can be converted again.
    (tmp_path / "config.json").write_text("{}")
    jax.tree.map(assert_same, create(out).params, direct.params)
    convert_vae(out, tmp_path / "b.safetensors", scaling_factor=0.5)
    again = create(tmp_path / "b.safetensors")
    assert again.scaling_factor == 0.5
    jax.tree.map(assert_same, again.params, direct.params)


def rewritten(out, tensors=(), **metadata):
    """A converted file with other tensors or metadata."""
    with open_tensors(out) as file:
        found = {name: ref.read() for name, ref in file.tensors.items()} | dict(tensors)
        metadata = file.metadata | metadata
    write_safetensors(out, {k: v for k, v in found.items() if v is not None}, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "dico_jax.AutoencoderKL.2"}, "its format dico_jax.AutoencoderKL.2 is not dico"),
        ({"config": "[]"}, "its metadata 'config' is not a JSON object"),
        ({"config": '{"layers_per_block": 2}'}, "the config says layers_per_block=2, the weights"),
        ({"tensors": {"encoder/conv_in/bias": np.ones(4, "f4")}}, "is damaged, or was changed aft"),
        ({"tensors": {"encoder/conv_in/bias": None}}, "missing encoder.conv_in.bias"),
        ({"tensors": {"what": np.ones(4, "f4")}}, "its tensors are not those that convert vae wr"),
        ({"tensors": {"encoder/conv_in/bias/b": np.ones(4, "f4")}}, "its tensors are not those"),
    ],
)
def test_converted_files_that_were_changed(changes, message, tmp_path):
    out = tmp_path / "a.safetensors"
    convert_vae(folder(tmp_path / "vae"), out)
    rewritten(out, **changes)
    with pytest.raises(UsageError, match=f"autoencoder.path={out}: .*{message}"):
        _ = create(out).params


# What is refused.


def command(*args, module="dico_jax.convert"):
    args = args if module == "dico_jax.sample" else ("vae", *args)
    return call(module, *args)


def test_the_command(tmp_path):
    path, out = folder(tmp_path / "vae"), tmp_path / "a.safetensors"
    done = command(f"--input={path}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "a.safetensors is written" in done.stdout
    before = everything(tmp_path)
    for args, message in [
        ((f"--input={path}", f"--out={out}"), f"--out={out} exists: give another name"),
        ((f"--input={path}",), "vae needs --out"),
        ((f"--input={path}", "--out=x.safetensors", "--step=3"), "--step is for to_pytorch"),
        ((f"--input={path / 'no'}", "--out=x.safetensors"), f"--input={path / 'no'}: cannot be op"),
    ]:
        done = command(*args)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert everything(tmp_path) == before


def refused(tmp_path, source, message, out="out.safetensors", **options):
    """The conversion refuses `source` in one line and leaves nothing; so does `create`."""
    before = everything(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        convert_vae(tmp_path / source, tmp_path / out, **options)
    assert "\n" not in str(caught.value)
    assert everything(tmp_path) == before
    if not options and out == "out.safetensors":
        assert str(caught.value).startswith(f"--input={tmp_path / source}: ")
        with pytest.raises(UsageError, match=message) as caught:
            _ = create(tmp_path / source).params
        assert str(caught.value).startswith(f"autoencoder.path={tmp_path / source}: ")
        assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shift_factor", 0.1159, "shift_factor=0.1159 is not supported, only None"),
        ("use_quant_conv", False, "use_quant_conv=False is not supported, only True"),
        ("use_post_quant_conv", False, "use_post_quant_conv=False is not supported"),
        ("mid_block_add_attention", False, "mid_block_add_attention=False is not supported"),
        ("act_fn", "gelu", "act_fn='gelu' is not supported, only 'silu'"),
        ("latents_mean", [0.0], r"latents_mean=\[0.0\] is not supported"),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], "Attn.* not suppor"),
        ("up_block_types", [["UpDecoderBlock2D"]], "up_block_types=.* is not supported, only Up"),
        ("in_channels", 4, "in_channels=4 is not supported, only 3"),
        ("norm_type", "rms", "norm_type='rms' is not known here"),
        ("norm_num_groups", 3, "norm_num_groups=3 does not divide the 4 channels"),
        ("norm_num_groups", "4", "norm_num_groups='4' must be a whole number"),
        ("scaling_factor", 0, "scaling_factor=0 must be a number above 0"),
        ("scaling_factor", None, "scaling_factor=None must be a number above 0"),
        ("layers_per_block", 2, "the config says layers_per_block=2, the weights 1"),
        ("block_out_channels", [4, 8], r"block_out_channels=\(4, 8\), the weights \(4, 8, 8\)"),
        ("block_out_channels", 4, "block_out_channels=4 is not known here"),
        ("latent_channels", 4, "the config says latent_channels=4, the weights 5"),
        ("_class_name", "VQModel", "config of another network .'VQModel'.*, not of an Autoencode"),
    ],
)
def test_configs_of_other_networks(field, value, message, tmp_path):
    folder(tmp_path / "vae", **{field: value})
    refused(tmp_path, "vae", message)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_configs_that_are_none(text, tmp_path):
    folder(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_bytes(text.encode("latin-1"))
    refused(
        tmp_path, "vae", "config.json (is not JSON|is not a JSON object|cannot be read|is empty)"
    )


def without(*prefixes):
    return {k: v for k, v in WEIGHTS.items() if not k.startswith(prefixes)}


def dico():
    shapes = state_dict_shapes(abstract_model(create_model("DiCo", **TINY)), KEY_MAPS["DiCo"])
    return {k: np.zeros(s, np.float32) for k, s in shapes.items()}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (dico, r"it is no autoencoder \(AutoencoderKL\): 127 tensors such as 'x_embedder.proj"),
        (lambda: {"model": dico(), "ema": dico()}, "it is no autoencoder"),
        (lambda: {"a": np.zeros(3)}, "it is no autoencoder"),
        (lambda: {"epoch": 3}, "no tensors by name"),
        (lambda: {"first_stage_model.encoder.down.0.block.0.norm1.weight": np.zeros(3)}, "is no a"),
        (lambda: without("quant_conv", "post_quant_conv"), "has no quant_conv"),
        (lambda: without("encoder.down_blocks.1"), "it is no autoencoder"),
        (
            lambda: WEIGHTS | {"encoder.down_blocks.9999.resnets.0.conv1.bias": np.zeros(4)},
            "it is no autoencoder",
        ),
        (
            lambda: {
                k: np.zeros((1 << 20, 1) if "resnets" in k else 0, np.float16)
                for k in ("encoder.down_blocks.0.resnets.0.conv1.bias", "quant_conv.bias")
            },
            "make no sense",
        ),
    ],
)
def test_files_of_something_else(weights, message, tmp_path):
    write_pt(tmp_path / "a.pt", weights())
    refused(tmp_path, "a.pt", message)


def test_missing_extra_and_misshapen_tensors_are_all_listed(tmp_path):
    weights = dict(WEIGHTS)
    weights["decoder.conv_out.weights"] = weights.pop("decoder.conv_out.weight")
    weights["encoder.conv_in.weight"] = np.zeros((4, 1, 3, 3), np.float32)
    del weights["decoder.mid_block.attentions.0.to_k.bias"]
    folder(tmp_path / "vae", weights)
    message = refused(tmp_path, "vae", "do not fit the model")
    for part in (
        "missing decoder.conv_out.weight (closest: decoder.conv_out.weights)",
        "missing decoder.mid_block.attentions.0.to_k.bias",
        "encoder.conv_in.weight is (4, 1, 3, 3) instead of (4, 3, 3, 3)",
        "unexpected decoder.conv_out.weights",
    ):
        assert part in message
    assert message.count(";") == 3
    shutil.rmtree(tmp_path / "vae")
    folder(tmp_path / "vae", WEIGHTS | {"quant_conv.bias": np.zeros(10, np.int32)})
    refused(tmp_path, "vae", "must be floating-point numbers: quant_conv.bias is int32")


def test_places(tmp_path):
    path = folder(tmp_path / "vae")
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    refused(tmp_path, "pipeline", "has no diffusion_pytorch_model.safetensors or .*: give .*vae")
    refused(tmp_path, "vae/config.json", "this holds no weights: give the file")
    refused(tmp_path, "nowhere", "cannot be opened: No such file")
    refused(tmp_path, "vae", "--out=.*a.txt: name a .safetensors file", out="a.txt")
    refused(tmp_path, "vae", "there is no folder .*no", out="no/a.safetensors")
    refused(tmp_path, "vae", "--out=.* exists: give another name", out=f"vae/{SAFE}")
    refused(tmp_path, "vae", "norm_num_groups=3 does not divide", norm_num_groups=3)
    refused(tmp_path, "vae", "scaling_factor=-1.0 must be above 0", scaling_factor=-1.0)
    data = (path / SAFE).read_bytes()
    (path / SAFE).write_bytes(data[: len(data) // 2])
    refused(tmp_path, "vae", "is damaged or cut short: .*; download or save it again")
    (path / SAFE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path, "vae", "Git LFS pointer")


def test_nan_weights_are_told_of(tmp_path, capsys):
    weights = {k: v.copy() for k, v in WEIGHTS.items()}
    weights["encoder.conv_in.bias"][:2] = np.nan
    vae = create(folder(tmp_path / "vae", weights))
    assert capsys.readouterr().err == ""
    assert np.isnan(vae.params["encoder"]["conv_in"]["bias"]).sum() == 2
    assert "2 weights are NaN or infinite, in 1 tensors: encoder.conv_in.bias (2)" in (
        capsys.readouterr().err
    )


# Sampling.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A converted checkpoint of 64x64 images, and an autoencoder that shrinks by 8."""
    path = tmp_path_factory.mktemp("sampling")
    write_pt(path / "a.pt", dico())
    from_pytorch(path / "a.pt", path / "ckpt", image_size=64)
    sizes = KLConfig((4, 4, 4, 4), layers_per_block=1, norm_num_groups=4)
    changes = {"block_out_channels": [4] * 4, "latent_channels": 4}
    types = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    folder(path / "vae", drawn(sizes), **changes, **types)
    folder(path / "other", drawn(sizes, seed=1), **changes, **types)
    return path


def sampler(checkpoint, vae, **options):
    overrides = {"num_steps": 1, "cfg_scale": 1.0, **options}
    return CheckpointSampler(str(checkpoint / "ckpt"), overrides=overrides, vae=vae)


def test_sampling_with_an_autoencoder(checkpoint, tmp_path):
    path = checkpoint / "vae"
    save(sampler(checkpoint, str(path)), str(tmp_path / "out"), num_images=1)
    (image,) = (tmp_path / "out").glob("[0-9]*.png")
    from PIL import Image

    pixels = np.asarray(Image.open(image))
    assert pixels.shape == (64, 64, 3)
    assert pixels.std() > 1
    settings = json.loads((tmp_path / "out" / "sampling.json").read_text())["settings"]
    vae = create(path)
    assert settings["autoencoder"] == {
        "name": "sd_vae",
        "path": str(path),
        "dtype": "float32",
        "tile_size": 0,
        "scaling_factor": 0.13025,
        "decoder_digest": vae.decoder_digest,
    }
    # The same autoencoder from another place goes on; another one is refused.
    convert_vae(path, tmp_path / "a.safetensors")
    before = image.stat().st_mtime_ns
    save(sampler(checkpoint, str(tmp_path / "a.safetensors")), str(tmp_path / "out"), num_images=1)
    assert image.stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"made with other settings \(autoencoder\."):
        save(sampler(checkpoint, str(checkpoint / "other")), str(tmp_path / "out"), num_images=1)
    preview = sampler(checkpoint, "preview")
    assert preview.settings["autoencoder"]["path"] is None
    with pytest.raises(UsageError, match=r"made with other settings \(autoencoder\."):
        save(preview, str(tmp_path / "out"), num_images=1)


def test_sampling_needs_an_autoencoder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    ways_out = "; give --vae=FILE, or --vae=preview for small false-colour pictures$"
    for vae, message in [
        (None, "^config.autoencoder.path=hf://stabilityai/sd-vae-ft-ema/.*: needs huggingface_hub"),
        ("hf://a/b/c.pt", "^--vae=hf://a/b/c.pt: needs huggingface_hub"),
        ("/no/such.pt", "^--vae=/no/such.pt: cannot be opened: No such file"),
    ]:
        with pytest.raises(UsageError, match=f"{message}.*{ways_out}"):
            sampler(checkpoint, vae)
    args = (f"--ckpt={checkpoint / 'ckpt'}", f"--out={tmp_path / 'out'}", "--vae=/no/such.pt")
    done = command(*args, module="dico_jax.sample")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --vae=/no/such.pt: cannot be opened")
    assert not (tmp_path / "out").exists()
    folder(tmp_path / "vae")
    with pytest.raises(UsageError, match="config.model.in_channels=4 does not fit .* use 5"):
        sampler(checkpoint, str(tmp_path / "vae"))


def test_a_model_of_pixels_takes_no_autoencoder(tmp_path):
    model = create_model("DiCo", **TINY | {"in_channels": 1})
    shapes = state_dict_shapes(abstract_model(model), KEY_MAPS["DiCo"])
    write_pt(tmp_path / "a.pt", {k: np.zeros(s, np.float32) for k, s in shapes.items()})
    from_pytorch(tmp_path / "a.pt", tmp_path / "ckpt", image_size=8)
    with pytest.raises(UsageError, match="--vae=preview: this checkpoint is a model of pixels"):
        sampler(tmp_path, "preview")
