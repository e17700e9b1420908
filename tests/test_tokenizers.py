"""CLIP's tokenizer from its files: the ids of transformers; cut texts; other models' refused."""

import json
import shutil

import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.text.encoders import load_encoder
from dico_jax.text.tokenizers import load_tokenizer
from tests.make_clip_numbers import FOLDER
from tests.test_clip import VOCABULARY, folder

RECORDED = json.loads((FOLDER / "ids.json").read_text())
END = len(VOCABULARY) - 1
FORMS = {"whole": ["tokenizer.json"], "parts": ["vocab.json", "merges.txt"]}
forms = pytest.mark.parametrize("form", FORMS)


def files(path, form, **changes):
    """A folder with the files of a tokenizer, and tokenizer_config.json where it has `changes`."""
    path.mkdir()
    for name in FORMS[form]:
        shutil.copy(FOLDER / name, path / name)
    if changes:
        (path / "tokenizer_config.json").write_text(json.dumps(changes))
    return path


@forms
@pytest.mark.parametrize("length", [77, 10])
def test_ids_are_those_of_transformers(tmp_path, form, length):
    tokenizer = load_tokenizer(files(tmp_path / "clip", form), length)
    texts, recorded = RECORDED["texts"], RECORDED["ids"]
    found, cut = tokenizer(texts), 0
    assert found.shape == (len(texts), length)
    assert found.dtype == np.int32
    for text, row, ids in zip(texts, found, recorded, strict=True):
        wanted = ids if len(ids) <= length else [*ids[: length - 1], END]
        cut += len(ids) > length
        assert row.tolist() == wanted + [END] * (length - len(wanted)), text
    assert tokenizer.cut == cut > 0


@forms
def test_a_text_of_two_thousand_words_is_cut_and_counted(tmp_path, form):
    tokenizer = load_tokenizer(files(tmp_path / "clip", form))
    ids = tokenizer(["a red bus", " ".join(["bus"] * 2000), "bus " * 75, "bus " * 76])
    bus = VOCABULARY["bus</w>"]
    assert ids[1].tolist() == ids[2].tolist() == [END - 1, *[bus] * 75, END]
    assert ids[3].tolist() == ids[1].tolist()
    assert tokenizer.cut == 2
    assert tokenizer.vocab_size == len(VOCABULARY)


@forms
@pytest.mark.parametrize("pad", ["!", {"content": "!"}])
def test_padding_is_that_of_the_options(tmp_path, form, pad):
    """Stable Diffusion 2's text encoder pads with "!", id 0."""
    ids = load_tokenizer(files(tmp_path / "clip", form, pad_token=pad), 5)(["bus"])
    assert ids.tolist() == [[END - 1, VOCABULARY["bus</w>"], END, 0, 0]]


def test_files_beside_a_file_are_found(tmp_path):
    path = files(tmp_path / "clip", "parts")
    given = load_tokenizer(path / "model.safetensors")
    assert np.array_equal(given(["a dog"]), load_tokenizer(str(path))(["a dog"]))


def refused(path):
    with pytest.raises(UsageError) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def bpe(vocab, **more):
    """The tokenizer.json of another model."""
    model = {"type": "BPE", "vocab": vocab, "merges": [], "dropout": None, "unk_token": None}
    return {"version": "1.0", "model": model, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None, **more}  # fmt: skip


def test_other_tokenizers_are_refused(tmp_path):
    path = files(tmp_path / "gpt", "whole")
    (path / "tokenizer.json").write_text(json.dumps(bpe({"a": 0, "b": 1, "<|endoftext|>": 2})))
    assert "it has no token <|startoftext|>: it is the tokenizer of another model" in refused(path)
    (path / "tokenizer.json").write_text("{}")
    assert "is no tokenizer: " in refused(path)
    (path / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes()[:500])
    assert "tokenizer.json" in (said := refused(path))
    assert "is no tokenizer: " in said


def test_missing_and_damaged_files_are_refused(tmp_path):
    path = files(tmp_path / "clip", "parts")
    (path / "merges.txt").write_text("#version: 0.2\nz q\nno-such pair</w>\n")
    assert "vocab.json, with" in (said := refused(path))
    assert "is no tokenizer" in said
    (path / "merges.txt").unlink()
    assert "has no tokenizer: put tokenizer.json, or vocab.json and merges.txt" in refused(path)
    path = files(tmp_path / "options", "parts", pad_token="<pad>")
    assert "it has no token <pad>" in refused(path)
    (path / "tokenizer_config.json").write_text("[")
    assert "tokenizer_config.json is not JSON" in refused(path)


# The encoder: both.


def test_an_encoder_gives_features_in_float16(tmp_path, capsys):
    encoder = load_encoder(folder(tmp_path / "clip"), "config.text.path")
    texts = ["a red bus", "", "a plate of food", *["a dog"] * 40]
    found = encoder(texts)
    assert found["tokens"].shape == (43, 77, 40) == (len(texts), encoder.length, encoder.width)
    assert found["pooled"].shape == (43, 40) == (len(texts), encoder.pooled_width)
    assert found["tokens"].dtype == found["pooled"].dtype == np.float16
    ends = [len(encoder.tokenizer([text])[0].tolist()) and
            encoder.tokenizer([text])[0].tolist().index(END) for text in texts]  # fmt: skip
    assert np.array_equal(found["tokens"][np.arange(43), ends], found["pooled"])
    null = encoder.null().arrays
    for name, array in null.items():  # of a batch of its own, so rounded in another way
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, found[name][1], atol=4e-3)
    assert capsys.readouterr().err == ""
    long = encoder(["bus " * 100, "bus " * 75, "bus " * 100])
    assert np.array_equal(long["tokens"][0], long["tokens"][1])
    encoder(["bus " * 100])
    said = capsys.readouterr().err  # once
    assert said == "warning: a text is longer than 77 tokens, and cut\n"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    path = folder(tmp_path / "clip")
    added = [
        {"id": END + 1, "content": "<|more|>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True},
    ]  # fmt: skip
    whole = json.loads((FOLDER / "tokenizer.json").read_text())
    whole["added_tokens"] += added
    (path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError) as error:
        load_encoder(path, "config.text.path")
    said = f"its tokenizer is of another model: {END + 2} tokens, the last of a text {END}, not"
    assert str(error.value).startswith(f"config.text.path={path}: {said}")
    (path / "tokenizer.json").unlink()
    vocab = {("<|more|>" if k == "<|endoftext|>" else k): v for k, v in VOCABULARY.items()}
    (path / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": END + 1}))
    with pytest.raises(UsageError, match="its tokenizer is of another model"):
        load_encoder(path, "config.text.path")


def test_an_encoder_names_its_field(tmp_path):
    with pytest.raises(UsageError, match=r"^config.text.path=\S*/none: "):
        load_encoder(tmp_path / "none", "config.text.path")
    path = folder(tmp_path / "clip", tokenizer=False)
    with pytest.raises(UsageError, match=r"^config.text.path=\S*/clip: .*has no tokenizer: put"):
        load_encoder(path, "config.text.path")
