"""CLIP in one file; networks that are told a text to PyTorch's files and back; warm starts."""

import argparse
import hashlib
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dico_jax.checkpoints.reader import SavedWeights, WarmStart
from dico_jax.checkpoints.state import TrainState
from dico_jax.errors import UsageError
from dico_jax.experiment import model_from_config
from dico_jax.models import abstract_params, create_model
from dico_jax.pytorch.conversion import from_pytorch, load_pytorch, to_pytorch
from dico_jax.pytorch.detection import detect_model, parameters
from dico_jax.pytorch.key_maps import KEY_MAPS, entries
from dico_jax.pytorch.optimizer_state import AdamWState, write_adamw
from dico_jax.pytorch.torch_files import open_tensors, select_weights, write_pt, write_safetensors
from dico_jax.text.clip import ImageConfig, TextConfig
from dico_jax.text.clip_weights import convert_clip, load_tower
from dico_jax.text.encoders import load_encoder
from dico_jax.text.tokenizers import load_tokenizer
from tests import golden
from tests.commands import call
from tests.make_clip_numbers import FOLDER, TEXTS
from tests.pytorch_files import assert_same, flat
from tests.test_clip import (
    IMAGE_CONFIG,
    TEXT_CONFIG,
    WEIGHTS,
    assert_tower,
    both,
    folder,
    hf_config,
    without,
)

SIZES = {"hidden_size": 8, "depth": (1, 2, 1, 1, 1), "text_width": 12, "pooled_width": 10}
WORDS = "a thick thin seven one , leaning left right"
OWN = {"vocab_size": 3 + len(WORDS.split()), "text_layers": 1, "pooled_width": 12, "text_length": 9}
KINDS = {
    "dwc": SIZES | {"text_fusion": "dwc"},
    "cross_attention": SIZES | {"text_fusion": "cross_attention"},
    "tokens alone": SIZES | {"pooled_width": 0},
    "own encoder": SIZES | OWN | {"text_fusion": "cross_attention"},
}
kinds = pytest.mark.parametrize("kind", KINDS)

# CLIP.


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of CLIP and the file made of it."""
    path = tmp_path_factory.mktemp("convert_clip")
    folder(path / "clip", name="pytorch_model.bin")
    said = convert_clip(path / "clip", path / "clip.safetensors")
    text, image = (sum(v.size for v in WEIGHTS[k].values()) for k in ("text", "image"))
    assert said == (
        f"CLIP: a text tower of 2 layers of 40, {text:,} parameters, an image tower of 2 layers of "
        f"32, {image:,} parameters, its tokenizer\n{path / 'clip.safetensors'} is written"
    )
    return path


def test_a_converted_clip_is_the_same(clip):
    for kind, config, name in (
        (TextConfig, TEXT_CONFIG, "text"),
        (ImageConfig, IMAGE_CONFIG, "image"),
    ):
        first = load_tower(clip / "clip", kind)
        again = load_tower(clip / "clip.safetensors", kind)
        assert again.config == config
        assert_tower(again, name)
        assert again.digest == first.digest
    first, again = (load_encoder(clip / n, "--clip") for n in ("clip", "clip.safetensors"))
    assert np.array_equal(first.tokenizer(TEXTS), again.tokenizer(TEXTS))
    assert first.digest == again.digest
    features = [encoder(TEXTS[:3])["tokens"] for encoder in (first, again)]
    assert np.array_equal(*features)


def test_the_file_says_what_it_is(clip):
    with open_tensors(clip / "clip.safetensors") as file:
        about, names = file.metadata, set(file.tensors)
    assert about["format"] == "dico_jax.CLIP"
    assert about["source_name"] == "clip"
    source = (clip / "clip" / "pytorch_model.bin").read_bytes()
    assert about["source_sha256"] == hashlib.sha256(source).hexdigest()
    assert about["text_config_sha256"] == load_tower(clip / "clip", TextConfig).digest
    assert json.loads(about["config"])["vision_config"]["patch_size"] == 7
    assert "text_model/encoder/layers/0/self_attn/q_proj/kernel" in names
    assert not any("position_ids" in name or "logit_scale" in name for name in names)


def test_its_own_tokenizer_comes_before_files_beside_it(clip, tmp_path):
    shutil.copy(clip / "clip.safetensors", tmp_path / "clip.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    ids = load_tokenizer(tmp_path / "clip.safetensors")(TEXTS)
    assert np.array_equal(ids, load_tokenizer(clip / "clip")(TEXTS))


def test_the_padding_token_is_kept(tmp_path):
    path = folder(tmp_path / "clip", WEIGHTS["text"])
    (path / "tokenizer_config.json").write_text('{"pad_token": {"content": "!"}}')
    shutil.copy(FOLDER / "tokenizer.json", path / "tokenizer.json")
    said = convert_clip(path / "model.safetensors", tmp_path / "a.safetensors")
    assert "text tower" in said
    assert "image" not in said
    assert load_tokenizer(tmp_path / "a.safetensors", 9)(["a"])[0, -1] == 0
    with pytest.raises(UsageError, match=r"it has no vision_config: it was converted from a file"):
        load_tower(tmp_path / "a.safetensors", ImageConfig)


def test_towers_alone_and_without_a_tokenizer(tmp_path):
    vision = {"model_type": "clip_vision_model", **hf_config()["vision_config"]}
    path = folder(tmp_path / "image", WEIGHTS["image"], config=vision, tokenizer=False)
    assert "tokenizer" not in convert_clip(path, tmp_path / "image.safetensors")
    assert_tower(load_tower(tmp_path / "image.safetensors", ImageConfig), "image")
    text = without(WEIGHTS["text"], "text_projection.weight")
    path = folder(tmp_path / "text", text, tokenizer=False)
    convert_clip(path, tmp_path / "text.safetensors")
    tower = load_tower(tmp_path / "text.safetensors", TextConfig)
    assert tower.config.projection_dim == 0
    with pytest.raises(UsageError, match="has no tokenizer: put tokenizer.json"):
        load_encoder(tmp_path / "text.safetensors", "text.path")
    shutil.copy(FOLDER / "tokenizer.json", tmp_path / "tokenizer.json")
    assert load_encoder(tmp_path / "text.safetensors", "text.path")(["a"])["tokens"].shape[0] == 1


def test_wrong_files_are_refused_and_nothing_is_left(clip, tmp_path):
    out = tmp_path / "out.safetensors"
    missing = folder(tmp_path / "missing", without(both(), "text_model.final_layer_norm.bias"))
    other = folder(tmp_path / "other", {"conv.weight": np.zeros((2, 2), np.float32)})
    for source, said in (
        (missing, "the weights do not fit the model: missing text_model.final_layer_norm.bias"),
        (other, r"it has no tensors text_model\.\* of CLIP, but 'conv.weight'"),
        (clip / "clip.safetensors", "it is converted already"),
        (tmp_path / "none", "cannot be opened"),
    ):
        with pytest.raises(UsageError, match=rf"^--input={source}: {said}"):
            convert_clip(source, out)
    with pytest.raises(UsageError, match=r"--out=\S*\.bin: name a .safetensors file"):
        convert_clip(clip / "clip", tmp_path / "out.bin")
    assert not out.exists()


def test_a_converted_file_that_was_changed_is_refused(clip, tmp_path):
    with open_tensors(clip / "clip.safetensors") as file:
        about = dict(file.metadata)
        tensors = {name: ref.read() for name, ref in file.tensors.items()}

    def refused(tensors, **changes):
        path = tmp_path / "changed.safetensors"
        write_safetensors(path, tensors, about | changes)
        with pytest.raises(UsageError) as error:
            load_tower(path, TextConfig)
        return str(error.value)

    name = "text_model/final_layer_norm/bias"
    again = "it is damaged, was changed, or is of another version: convert it again"
    assert again in refused({**tensors, name: tensors[name] + 1})
    assert again in refused(without(tensors, name))
    assert again in refused(tensors, format="dico_jax.CLIP.2")
    assert "its metadata 'config' is not a JSON object" in refused(tensors, config="[")


def test_the_command_converts_clip(clip, tmp_path):
    out = tmp_path / "out.safetensors"
    done = call("dico_jax.convert", "clip", f"--input={clip / 'clip'}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{out} is written\n")
    assert out.read_bytes() == (clip / "clip.safetensors").read_bytes()


# Networks.


def drawn(kind, seed=7):
    """A network that is told a text, and weights by PyTorch's names."""
    model = create_model("TextDiCo", **KINDS[kind])
    shapes = {e.key: e.torch_shape for e in parameters(model)}
    weights = golden.draw(shapes, seed, "B")
    return model, {key: weights[key] for key in shapes}


def model_of(config):
    return model_from_config(ConfigDict(config))


def assert_weights(path, weights):
    with open_tensors(path) as file:
        found = {k: t.read() for k, t in select_weights(file).tensors.items()}
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert_same(found[key], value)


@kinds
def test_parameters_are_all_there_once(kind):
    model, _ = drawn(kind)
    named = {e.key: e.path for e in parameters(model)}
    assert named == {e.key: e.path for e in entries(abstract_params(model), KEY_MAPS["TextDiCo"])}


def test_names_of_the_class_conditional_network_are_kept():
    names = [e.key for e in parameters(create_model("DiCo", hidden_size=8, depth=(1, 2, 1, 1, 1)))]
    for kind in ("dwc", "cross_attention"):
        ours = [e.key for e in parameters(drawn(kind)[0])]
        assert [key for key in ours if "text" not in key] == [
            key for key in names if not key.startswith("y_embedder")
        ]
    assert "text_fusion.latent.0.kv.weight" in ours
    assert "latent.0.text.proj.bias" in ours
    assert "text_embedder.2.weight" in ours


class EntryNotFoundError(OSError):
    """Named as huggingface_hub's."""


def test_addresses_of_the_hub(clip, tmp_path, monkeypatch):
    repositories = {"owner/clip": clip / "clip", "owner/net": tmp_path}
    asked = []

    class Hub:
        @staticmethod
        def hf_hub_download(repo, name):
            asked.append(f"{repo}/{name}")
            if not (file := repositories[repo] / name).exists():
                raise EntryNotFoundError(f"there is no {name}")
            return str(file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    address = "hf://owner/clip/pytorch_model.bin"
    encoder = load_encoder(address, "text.path")
    assert encoder.digest == load_encoder(clip / "clip", "text.path").digest
    files = {f"owner/clip/{name}" for name in ("config.json", "vocab.json", "merges.txt")}
    assert files <= set(asked)
    convert_clip(address, tmp_path / "clip.safetensors")
    assert load_encoder(tmp_path / "clip.safetensors", "text.path").digest == encoder.digest
    with pytest.raises(UsageError, match="text.path=hf://owner/clip/m.bin.*there is no m.bin"):
        load_encoder("hf://owner/clip/m.bin", "text.path")
    weights = drawn("dwc")[1]
    write_safetensors(tmp_path / "net.safetensors", weights, {"format": "pt"})
    from_pytorch("hf://owner/net/net.safetensors", tmp_path / "ckpt")
    to_pytorch(tmp_path / "ckpt", tmp_path / "again.safetensors", model_of=model_of)
    assert_weights(tmp_path / "again.safetensors", weights)


@kinds
def test_a_text_network_goes_over_and_back(tmp_path, kind):
    model, weights = drawn(kind)
    told = {"text_length": str(model.text_length), "text_dropout_prob": "0.2"}
    told |= {"text_words": WORDS} if model.vocab_size else {"text_path": "hf://a/b/model.bin"}
    write_safetensors(tmp_path / "a.safetensors", weights, {"format": "pt", **told})
    said = from_pytorch(tmp_path / "a.safetensors", tmp_path / "ckpt")
    words = "of 12 words, " if model.vocab_size else ""
    assert f"told a text {words}by {model.text_fusion} (width 12)" in said
    config = SavedWeights(str(tmp_path / "ckpt")).config
    found = model_of(config)
    for name in ("text_fusion", "text_length", "text_width", "pooled_width", "vocab_size", "depth"):
        assert getattr(found, name) == getattr(model, name), name
    assert found.text_dropout_prob == 0.2
    assert config["text"]["encoder"] == ("words" if model.vocab_size else "clip")
    assert config["text"]["path" if not model.vocab_size else "words"] in told.values()
    for name in ("b.safetensors", "b.pt"):
        to_pytorch(tmp_path / "ckpt", tmp_path / name, model_of=model_of)
        assert_weights(tmp_path / name, weights)
        # What does not show in weights lies beside them.
        from_pytorch(tmp_path / name, tmp_path / f"{name}.ckpt")
        again = SavedWeights(str(tmp_path / f"{name}.ckpt")).config
        assert (again["model"], again["text"]) == (config["model"], config["text"])
    params = flatten_dict(load_pytorch(tmp_path / "b.pt", model))
    for entry in parameters(model):
        assert_same(entry.to_torch(params[entry.path]), weights[entry.key])


def test_a_run_in_its_middle_goes_over_and_back(tmp_path):
    model, weights = drawn("cross_attention")
    ema, mu, nu = (drawn("cross_attention", seed)[1] for seed in (11, 12, 13))
    options = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.9, "eps": 1e-8, "weight_decay": 0.03}
    opt = write_adamw(AdamWState(5, mu, nu, options), list(weights))
    arguments = argparse.Namespace(text_length=model.text_length, text_dropout_prob=0.0)
    tree = {"model": weights, "ema": ema, "opt": opt, "args": arguments}
    write_pt(tmp_path / "a.pt", tree)
    from_pytorch(tmp_path / "a.pt", tmp_path / "ckpt", training=True)
    config = SavedWeights(str(tmp_path / "ckpt")).config
    assert config["model"]["text_dropout_prob"] == 0
    assert config["sampling"]["cfg_scale"] == 1
    to_pytorch(tmp_path / "ckpt", tmp_path / "b.pt", training=True)
    with open_tensors(tmp_path / "b.pt") as file:
        found = flat(file.tree)
    for name, value in flat(tree).items():
        if not name.startswith("/args"):
            assert_same(found[name], value)
    assert found["/args/text_length"] == model.text_length


def test_a_published_size_is_found():
    model = create_model("TextDiCo-S", text_fusion="cross_attention", text_width=512)
    shapes = {e.key: e.torch_shape for e in parameters(model)}
    found = detect_model(shapes)
    assert found["name"] == "TextDiCo-S"
    assert (found["text_width"], found["pooled_width"], found["text_length"]) == (512, 768, 77)
    assert found["hidden_size"] is None
    assert "num_classes" not in found
    with pytest.raises(UsageError, match="--model=DiCo-S: these are the weights of a TextDiCo"):
        detect_model(shapes, "DiCo-S")
    with pytest.raises(UsageError, match="--num_classes=10 is for networks that are told a class"):
        detect_model(shapes, num_classes=10)


def test_an_encoder_whose_words_are_not_there_is_refused(tmp_path):
    weights = drawn("own encoder")[1]
    for told in ({}, {"text_words": "one two"}, {"text_words": " ".join(["one"] * 9)}):
        write_safetensors(tmp_path / "a.safetensors", weights, told)
        with pytest.raises(UsageError, match="has an encoder of 12 words and marks, and these"):
            from_pytorch(tmp_path / "a.safetensors", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_missing_and_misshapen_tensors_are_listed(tmp_path):
    weights = drawn("dwc")[1]
    del weights["text_fusion.latent.0.2.bias"]
    weights["text_embedder.1.bias"] = np.zeros(3, np.float32)
    write_pt(tmp_path / "a.pt", weights)
    with pytest.raises(UsageError) as error:
        from_pytorch(tmp_path / "a.pt", tmp_path / "ckpt")
    assert "missing text_fusion.latent.0.2.bias" in str(error.value)
    assert "text_embedder.1.bias is (3,) instead of (16,)" in str(error.value)


# Warm starts.


@pytest.fixture(scope="module")
def class_weights(tmp_path_factory):
    """A converted checkpoint of a network that is told classes, and its weights."""
    path = tmp_path_factory.mktemp("classes")
    model = create_model("DiCo", hidden_size=8, depth=(1, 2, 1, 1, 1), num_classes=5)
    weights = golden.draw({e.key: e.torch_shape for e in parameters(model)}, 3, "B")
    write_pt(path / "a.pt", weights)
    from_pytorch(path / "a.pt", path / "ckpt")
    return str(path / "ckpt"), weights


@pytest.mark.parametrize("kind", ["dwc", "own encoder"])
def test_a_text_network_starts_from_class_conditional_weights(class_weights, kind):
    folder, weights = class_weights
    model = create_model("TextDiCo", **KINDS[kind])
    start, said = WarmStart(folder, model), str(WarmStart(folder, model))
    tables = ", ".join(f"y_embedder.embedding_table_{i}" for i in range(3))
    assert f"; not taken: {tables}; not there, so fresh: " in said
    new = said.split("so fresh: ")[1].split(", ")
    own = {path for path in flatten_dict(abstract_params(model)) if any("text" in p for p in path)}
    for path in own:  # each is named
        name = ".".join("*" if part.isdecimal() else part for part in path)
        assert any(name.startswith(part) for part in new), name
    params = jax.tree.map(lambda x: jax.numpy.full(x.shape, 9.0), abstract_params(model))
    state = start.apply(TrainState(step=0, params=params, ema_params=params, opt_state=()))
    for found in (state.params, state.ema_params):
        leaves = flatten_dict(found)
        for entry in parameters(model):
            if entry.path in own:
                assert np.all(leaves[entry.path] == 9), entry.key
            else:
                assert_same(entry.to_torch(np.asarray(leaves[entry.path])), weights[entry.key])


def test_another_network_is_no_warm_start(class_weights):
    folder, _ = class_weights
    model = create_model("TextDiCo", **KINDS["dwc"] | {"depth": (1, 1, 1, 1, 2)})
    with pytest.raises(UsageError, match=r"has another network \(DiCo\): decoder_level_1.1"):
        WarmStart(folder, model)


def test_another_text_network_is_no_warm_start(tmp_path):
    """Among networks that are told a text, every part has to fit."""
    write_pt(tmp_path / "a.pt", drawn("dwc")[1])
    from_pytorch(tmp_path / "a.pt", tmp_path / "ckpt")
    same = WarmStart(str(tmp_path / "ckpt"), drawn("dwc")[0])
    assert "fresh" not in str(same)
    with pytest.raises(UsageError, match=r"has another network \(TextDiCo\): .*\.text\.proj"):
        WarmStart(str(tmp_path / "ckpt"), drawn("cross_attention")[0])
