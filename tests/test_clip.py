"""CLIP's towers against transformers' numbers, and their files: read in all forms, or refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dico_jax.errors import UsageError
from dico_jax.pytorch.torch_files import write_pt, write_safetensors
from dico_jax.text.clip import (
    ImageConfig,
    ImageTower,
    TextConfig,
    TextTower,
    abstract_params,
    normalized,
)
from dico_jax.text.clip_weights import KEY_MAP, load_tower
from tests import golden
from tests.make_clip_numbers import FOLDER, IMAGE, TEXT, draw
from tests.state_dicts import from_state_dict, to_state_dict

NUMBERS = np.load(FOLDER / "numbers.npz")
SHAPES = json.loads(str(NUMBERS["shapes"]))
VOCABULARY = json.loads((FOLDER / "vocab.json").read_text())
TEXT_CONFIG = TextConfig(**TEXT, vocab_size=len(VOCABULARY), eos_token_id=len(VOCABULARY) - 1)
IMAGE_CONFIG = ImageConfig(**IMAGE)
WEIGHTS = {"text": draw(SHAPES["text"], 2), "image": draw(SHAPES["image"], 1)}


def both(text=WEIGHTS["text"], image=WEIGHTS["image"]):
    """All tensors of a checkpoint of CLIP, with those that are not used."""
    ids = np.arange(77)[None]
    more = {"logit_scale": np.float32(4.6).reshape(()), "text_model.embeddings.position_ids": ids}
    return {**text, **image, **more, "vision_model.embeddings.position_ids": np.arange(17)[None]}


def hf_config(**changes):
    """config.json of both towers, as transformers writes it."""
    text = {**TEXT, "vocab_size": len(VOCABULARY), "eos_token_id": len(VOCABULARY) - 1}
    parts = {"text_config": text, "vision_config": IMAGE}
    return {"model_type": "clip", "projection_dim": 24, **parts} | changes


def folder(path, tensors=None, name="model.safetensors", config=None, tokenizer=True):
    """A folder as transformers saves a model; its path."""
    path.mkdir(parents=True)
    tensors = both() if tensors is None else tensors
    (write_pt if name.endswith(".bin") else write_safetensors)(path / name, tensors)
    (path / "config.json").write_text(json.dumps(hf_config() if config is None else config))
    for file in ("vocab.json", "merges.txt") if tokenizer else ():
        shutil.copy(FOLDER / file, path / file)
    return path


def flat(params):
    return to_state_dict(params, KEY_MAP)


def assert_tower(tower, kind):
    found = flat(tower.params)
    assert found.keys() == WEIGHTS[kind].keys()
    for key, value in WEIGHTS[kind].items():
        assert np.array_equal(found[key], value), key


# Numbers.


@golden.requires_golden
@pytest.mark.parametrize(("dtype", "bar"), [("float32", 5e-6), ("float64", 1e-11)])
def test_text_tower_gives_the_golden_numbers(dtype, bar):
    with jax.enable_x64(dtype == "float64"):
        numbers = golden.load("clip_text.npz")
        manifest = json.loads((golden.FOLDER / "clip_manifest.json").read_text())
        known = {k: v for k, v in manifest["config"].items() if hasattr(TextConfig, k)}
        weights = load_file(golden.FOLDER / "clip_text.safetensors")
        assert golden.digest(weights) == manifest["sha256"] == golden.digest(draw(
            manifest["tensors"], manifest["seed"]))  # fmt: skip

        def apply(ids, mask=None, eos=999):
            config = TextConfig(**{**known, "eos_token_id": eos, "projection_dim": 0})
            params = from_state_dict(weights, abstract_params(config), KEY_MAP)
            params = jax.tree.map(lambda x: x.astype(dtype), params)
            tower = TextTower(config, np.dtype(dtype))
            return jax.jit(lambda p, i, m: tower.apply({"params": p}, i, m))(params, ids, mask)

        padded, zeros, mask = (numbers[k] for k in ("ids_eospad", "ids_zeropad", "mask"))
        found = {
            "eospad": apply(padded),
            "zeropad": apply(zeros),
            "zeropad_legacy": apply(zeros, eos=2),
            "masked": apply(padded, mask),
        }
        found["short"] = apply(padded[:1, : len(np.trim_zeros(zeros[0]))])
        for name, features in found.items():
            reference = numbers[f"{name}/pooler_output_f64"]
            assert features.pooled.dtype == dtype
            assert golden.distance(features.pooled, reference) <= bar, name
        tokens = numbers["eospad/last_hidden_state_f64"]
        assert golden.distance(found["eospad"].tokens, tokens) <= bar
        assert found["eospad"].embedding is None


def image_embeddings(pixels, dtype):
    params = from_state_dict(WEIGHTS["image"], abstract_params(IMAGE_CONFIG), KEY_MAP)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tower = ImageTower(IMAGE_CONFIG, np.dtype(dtype))
    return jax.jit(lambda p, x: tower.apply({"params": p}, x))(params, pixels)


def test_image_tower_gives_the_recorded_numbers():
    pixels = golden.nhwc(NUMBERS["pixels"])
    found = image_embeddings(pixels, "float32")
    assert golden.distance(found, NUMBERS["image_embeds"]) <= 1e-5
    with jax.enable_x64(True):
        found = image_embeddings(pixels.astype("float64"), "float64")
        assert golden.distance(found, NUMBERS["image_embeds_f64"]) <= 1e-11


def text_embeddings(ids):
    params = from_state_dict(WEIGHTS["text"], abstract_params(TEXT_CONFIG), KEY_MAP)
    return TextTower(TEXT_CONFIG).apply({"params": params}, ids).embedding


def padded_ids():
    end, ids = len(VOCABULARY) - 1, json.loads((FOLDER / "ids.json").read_text())["ids"]
    ids = [row[:76] + row[-1:] if len(row) > 77 else row for row in ids]
    return np.array([row + [end] * (77 - len(row)) for row in ids])


def test_text_embeddings_are_the_recorded_ones():
    found = text_embeddings(padded_ids())
    assert golden.distance(found, NUMBERS["text_embeds"]) <= 1e-5


def test_towers_give_what_transformers_gives_now():
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    pixels = np.random.default_rng(5).normal(size=(2, 3, 28, 28)).astype(np.float32)
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**IMAGE))
    state = {k: torch.from_numpy(v) for k, v in WEIGHTS["image"].items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(pixels)).image_embeds.numpy()
    assert golden.distance(image_embeddings(golden.nhwc(pixels), "float32"), theirs) <= 1e-5
    config = {**TEXT, "vocab_size": len(VOCABULARY), "eos_token_id": len(VOCABULARY) - 1}
    model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    model.load_state_dict({k: torch.from_numpy(v) for k, v in WEIGHTS["text"].items()})
    ids = padded_ids()[:4]
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(ids)).text_embeds.numpy()
    assert golden.distance(text_embeddings(ids), theirs) <= 1e-5


def test_pixels_are_normalized_as_clip_has_it():
    pixels = np.array([[[[0, 128, 255]]]], np.uint8)
    found = normalized(pixels)
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), [0.26862954, 0.26130258,
                                                                      0.27577711]  # fmt: skip
    np.testing.assert_allclose(found[0, 0, 0], (pixels[0, 0, 0] / 255 - mean) / deviation, 1e-5)


# Files.


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_both_towers_are_read_from_a_folder_or_file(tmp_path, name):
    path = folder(tmp_path / "clip", name=name)
    for source in (path, path / name):
        text, image = load_tower(source, TextConfig), load_tower(str(source), ImageConfig)
        assert (text.config, image.config) == (TEXT_CONFIG, IMAGE_CONFIG)
        assert_tower(text, "text")
        assert_tower(image, "image")
    assert text.digest != image.digest


def test_a_file_of_any_name_is_read(tmp_path):
    path = folder(tmp_path / "clip", name="other.safetensors") / "other.safetensors"
    assert_tower(load_tower(path, TextConfig), "text")
    with pytest.raises(UsageError, match=r"the folder has no model.safetensors or pytorch_model"):
        load_tower(path.parent, TextConfig)


def test_one_tower_alone_is_read(tmp_path):
    """CLIPTextModel has no projection; its config.json is the tower's own."""
    text = hf_config()["text_config"]
    one = {"model_type": "clip_text_model", **text}
    tensors = {k: v for k, v in WEIGHTS["text"].items() if "projection" not in k}
    tower = load_tower(folder(tmp_path / "a", tensors, config=one), TextConfig)
    assert tower.config.projection_dim == 0
    assert flat(tower.params).keys() == tensors.keys()
    one["projection_dim"] = 24
    assert_tower(load_tower(folder(tmp_path / "b", WEIGHTS["text"], config=one), TextConfig),
                 "text")  # fmt: skip
    vision = {"model_type": "clip_vision_model", **IMAGE}
    path = folder(tmp_path / "c", WEIGHTS["image"], config=vision)
    assert_tower(load_tower(path, ImageConfig), "image")
    with pytest.raises(UsageError, match=r"c: it has no tensors text_model\.\* of CLIP, but"):
        load_tower(path, TextConfig)


def test_the_digest_is_of_the_numbers(tmp_path):
    first = load_tower(folder(tmp_path / "a"), TextConfig)
    again = load_tower(folder(tmp_path / "b", name="pytorch_model.bin"), TextConfig)
    changed = {**WEIGHTS["text"]}
    changed["text_projection.weight"] = changed["text_projection.weight"] + 1
    other = load_tower(folder(tmp_path / "c", both(text=changed)), TextConfig)
    assert first.digest == again.digest != other.digest


def one_line(path, kind=TextConfig):
    with pytest.raises(UsageError) as error:
        load_tower(path, kind)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


def without(tensors, *keys):
    return {k: v for k, v in tensors.items() if k not in keys}


def changed(section, **changes):
    config = hf_config()
    return config | {section: config[section] | changes}


ENDS = "text_model.final_layer_norm.weight"
WRONG = {
    "other model": ({"encoder.conv_in.weight": np.zeros((2, 2), np.float32)}, None,
                    "it has no tensors text_model.* of CLIP, but 'encoder.conv_in.weight'"),
    "bert": (None, hf_config(model_type="bert"), "config.json says that it is a 'bert', not CLIP"),
    "missing": (without(both(), ENDS), None, f"missing {ENDS}"),
    "more": ({**both(), "text_model.more": np.zeros(3, np.float32)}, None,
             "unexpected text_model.more"),
    "wider": (None, changed("text_config", hidden_size=80), "(561, 40) instead of (561, 80)"),
    "deeper": (None, changed("text_config", num_hidden_layers=3), "missing text_model.encoder"),
    "integers": ({**both(), ENDS: np.zeros(40, np.int32)}, None, "must be floating-point numbers"),
    "huge": (None, changed("text_config", hidden_size=1 << 40), f"hidden_size={1 << 40} cannot be"),
    "layers": (None, changed("text_config", num_hidden_layers=9999),
               "num_hidden_layers=9999 cannot be"),
    "negative": (None, changed("text_config", vocab_size=-1), "vocab_size=-1 cannot be"),
    "kind": (None, changed("text_config", num_attention_heads="5"),
             "num_attention_heads='5' cannot be"),
    "heads": (None, changed("text_config", num_attention_heads=7), "num_attention_heads=7"),
    "activation": (None, changed("text_config", hidden_act="relu"), "hidden_act='relu' cannot be"),
    "section": (None, hf_config(text_config=[1]), "text_config is [[1], {}], not an object"),
    "list": (None, [1], "config.json is not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_such_tower_is_refused_in_one_line(tmp_path, case):
    tensors, config, said = WRONG[case]
    assert said in one_line(folder(tmp_path / "clip", tensors, config=config))


def test_an_image_tower_of_other_sizes_is_refused(tmp_path):
    path = folder(tmp_path / "clip", config=changed("vision_config", patch_size=14))
    assert "(32, 3, 7, 7) instead of (32, 3, 14, 14)" in one_line(path, ImageConfig)


def test_a_file_without_config_is_refused(tmp_path):
    path = folder(tmp_path / "clip")
    (path / "config.json").unlink()
    assert "beside it is no config.json" in one_line(path / "model.safetensors")
    assert "beside it is no config.json" in one_line(path)
    assert "cannot be opened" in one_line(tmp_path / "nothing.safetensors")
    (path / "config.json").write_text('{"model_type": "clip", ')
    assert "is not JSON" in one_line(path)
    assert "the folder has no model.safetensors" in one_line(pathlib.Path(tmp_path))


def test_towers_say_which_inputs_they_take():
    with pytest.raises(UsageError, match=r"token ids are \(1, 78\): \(N, 1 to 77\) are expected"):
        text_embeddings(np.zeros((1, 78), np.int32))
    with pytest.raises(UsageError, match=r"\(N, 28, 28, 3\) are expected"):
        image_embeddings(np.zeros((1, 14, 28, 3), np.float32), "float32")
