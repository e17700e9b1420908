"""Features of captions, prepared with the latents of the pictures."""

import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from dico_jax.data import latent_preparation
from dico_jax.data.bad_examples import GoodExamples
from dico_jax.data.latent_preparation import prepare_latents
from dico_jax.data.latents import PreparedLatents, verify
from dico_jax.data.pictures import BadExample
from dico_jax.data.pipeline import one_caption
from dico_jax.errors import UsageError
from dico_jax.experiment import _check_encoder
from dico_jax.parallel.mesh import batch_sharding, create_mesh
from dico_jax.pytorch.key_maps import entries
from dico_jax.text.clip import TextConfig, abstract_params
from dico_jax.text.clip_weights import KEY_MAP
from dico_jax.text.encoders import load_encoder
from tests.commands import assert_refused, call
from tests.golden import FOLDER, requires_golden
from tests.test_captions import TEXTS, encoded, write
from tests.test_prepared_latents import Noise, autoencoder, contents, options

WORDS = [f"word{i}" for i in range(20)] + ["<|startoftext|>", "<|endoftext|>"]
WIDTH, LENGTH = 16, 12


def write_clip(folder, seed=0, length=LENGTH, words=WORDS):
    """A tiny CLIP with random weights, as transformers writes one, which knows a few words."""
    folder.mkdir()
    config = TextConfig(
        hidden_size=WIDTH, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1,
        projection_dim=0, vocab_size=len(words), max_position_embeddings=length,
        eos_token_id=len(words) - 1,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    shapes = {e.key: e.torch_shape for e in entries(abstract_params(config), KEY_MAP)}
    tensors = {key: rng.normal(0, 0.3, s).astype(np.float32) for key, s in shapes.items()}
    safetensors.save_file(tensors, folder / "model.safetensors")
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    names += ("vocab_size", "max_position_embeddings", "eos_token_id")
    options = {name: getattr(config, name) for name in names}
    (folder / "config.json").write_text(json.dumps({"text_config": options, "model_type": "clip"}))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "word0"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Captioned(Noise):
    """Pictures of one to three captions; the last of the sixth is too long."""

    class_names = ()

    def __getitem__(self, i):
        captions = [f"word{i} word{j}" for j in range(int(i) % 3 + 1)]
        if i == 5:
            captions[-1] = "word1 " * 2000
        return {"image": super().__getitem__(i)["image"], "captions": captions}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def encoder(clip):
    return load_encoder(clip, "--text")


@pytest.fixture(scope="module")
def prepared(encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "out"
    prepare_latents(Captioned(), autoencoder(), str(out), options(), encoder)
    return out


def test_features_of_all_captions_and_of_none(prepared, encoder):
    manifest, source = verify(str(prepared)), PreparedLatents(str(prepared))
    assert manifest.fields == {"captions", "tokens", "pooled"}
    assert (source.text_digest, source.text_length) == (encoder.digest, LENGTH)
    for i in range(11):
        example, said = source[i], Captioned()[i]["captions"]
        assert example["captions"] == said
        assert example["tokens"].dtype == example["pooled"].dtype == np.float16
        for name, array in encoder(said).items():
            # Another place in the batch may round otherwise.
            np.testing.assert_allclose(example[name], array, atol=4e-3)
            assert len(array) == i % 3 + 1
    assert np.abs(source[4]["tokens"][0] - source[4]["tokens"][1]).max() > 0.1
    assert source.null_text == encoder.null()
    assert np.abs(source[4]["pooled"][0] - encoder.null().arrays["pooled"]).max() > 0.1


def test_what_is_cut_is_counted(prepared):
    shards = PreparedLatents(str(prepared)).manifest.shards
    assert [shard.cut for shard in shards] == [0, 1, 0]
    assert [shard.captions for shard in shards] == [7, 8, 6]


def test_a_killed_call_goes_on(prepared, encoder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    calls, record = [], latent_preparation._record

    def dying(*args):
        calls.append(args)
        if len(calls) == 7:
            raise Killed
        return record(*args)

    monkeypatch.setattr(latent_preparation, "_record", dying)
    with pytest.raises(Killed):
        prepare_latents(Captioned(), autoencoder(), str(tmp_path), options(), encoder)
    monkeypatch.setattr(latent_preparation, "_record", record)
    assert len(list(tmp_path.glob("*.array_record"))) == 1
    (tmp_path / "null_text.npz").unlink()
    prepare_latents(Captioned(), autoencoder(), str(tmp_path), options(), encoder)
    assert contents(tmp_path) == contents(prepared)


def test_another_encoder_is_refused_and_nothing_is_changed(prepared, encoder, tmp_path):
    before, out = contents(prepared), str(prepared)
    other = load_encoder(write_clip(tmp_path / "seed", seed=1), "--text")
    with pytest.raises(UsageError) as caught:
        prepare_latents(Captioned(), autoencoder(), out, options(), other)
    for part in ("text_digest was", encoder.digest[:50], "is", other.digest[:50]):
        assert part in str(caught.value)
    shorter = load_encoder(write_clip(tmp_path / "short", length=9), "--text")
    with pytest.raises(UsageError, match="text_length was 12, is 9"):
        prepare_latents(Captioned(), autoencoder(), out, options(), shorter)
    with pytest.raises(UsageError, match=r'text_digest was ".*, is "".*text_length was 12, is 0'):
        prepare_latents(Captioned(), autoencoder(), out, options())
    with pytest.raises(UsageError, match=r"^--text: Noise\(\) has no captions to encode"):
        prepare_latents(Noise(), autoencoder(), str(tmp_path / "x"), options(), encoder)
    assert not (tmp_path / "x").exists()
    assert contents(prepared) == before


def test_training_with_another_encoder_at_hand_is_refused(prepared, clip, tmp_path):
    source = PreparedLatents(str(prepared))
    _check_encoder(str(clip), source)
    other = write_clip(tmp_path / "seed", seed=1)
    with pytest.raises(UsageError, match=r"text.path=.*seed' is not the text encoder of Prepared"):
        _check_encoder(str(other), source)
    # Of the same weights, but with another padding, it is another one too.
    padded = shutil.copytree(clip, tmp_path / "padded")
    (padded / "tokenizer_config.json").write_text('{"pad_token": "word3"}')
    with pytest.raises(UsageError, match="is not the text encoder"):
        _check_encoder(str(padded), source)


def test_features_are_split_as_ids_are(encoder):
    ids = encoder.tokenize([f"word{i} word1" for i in range(8)])
    split = batch_sharding(create_mesh())
    found, whole = encoder.encode(jax.device_put(ids, split)), encoder.encode(ids)
    for name, features in found.items():
        assert features.sharding.is_equivalent_to(split, features.ndim)
        np.testing.assert_allclose(features, whole[name], atol=1e-2)


def test_a_process_that_reads_data_gets_no_weights(encoder):
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy == encoder
    np.testing.assert_array_equal(copy.tokenize(["word1"]), encoder.tokenize(["word1"]))
    assert len(pickle.dumps(encoder)) < 20_000


def test_only_texts_are_drawn_from():
    for captions in ({"text": ["a", "b"]}, np.arange(3), "a text", None, [], 5):
        example = {"image": 1, "captions": captions}
        assert one_caption(example, np.random.default_rng(0)) is example
    drawn = one_caption({"captions": ["a", "b"], "tokens": np.arange(2)}, np.random.default_rng(0))
    assert drawn["captions"] == ["ab"[drawn["tokens"][0]]]


def test_what_looks_at_a_source_sees_good_examples():
    class Bad(Captioned):
        def __getitem__(self, i):
            if i % 2 == 0:
                raise BadExample("it is cut")
            return super().__getitem__(i)

    good = GoodExamples(Bad())
    assert len(good) == len(Bad())
    assert good.class_names == ()
    assert good[0]["captions"] == good[1]["captions"] == Bad()[1]["captions"]


def test_examples_without_captions_are_bad_ones(encoder, tmp_path):
    class Bare(Captioned):
        def __getitem__(self, i):
            return super().__getitem__(i) | ({"captions": []} if i == 2 else {})

    given = Bare(bad=(7,)), autoencoder(), str(tmp_path), options(max_bad_fraction=0.2)
    manifest = prepare_latents(*given, encoder)
    assert manifest.bad["c/2.png"] == "it has no caption"
    assert len(PreparedLatents(str(tmp_path))) == 9
    verify(str(tmp_path))


def damage(file, **changes):
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "null_text.npz cannot be read .*run the same"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "cannot be read .*: delete it"),
        (
            lambda file: damage(file, digest="0" * 64),
            "is of the text encoder 000000000000, the cap",
        ),
    ],
)
def test_features_of_no_text_that_are_not_right(prepared, tmp_path, change, message):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    change(copy / "null_text.npz")
    for check in (verify, lambda path: PreparedLatents(path).null_text):
        with pytest.raises(UsageError, match=message) as caught:
            check(str(copy))
        assert "\n" not in str(caught.value)


def test_latents_without_features(tmp_path):
    prepare_latents(Captioned(), autoencoder(), str(tmp_path), options())
    source = PreparedLatents(str(tmp_path))
    assert (source.text_digest, source.text_length) == (None, None)
    assert source[1].keys() == {"image", "captions"}
    assert not (tmp_path / "null_text.npz").exists()
    assert source.null_text is None
    for file in [tmp_path / "manifest.json", *tmp_path.glob("latents-*.json")]:  # as of before
        values = json.loads(file.read_text())
        for name in ("text_digest", "text_length"):
            values.get("plan", {}).pop(name, None)
        for shard in values.get("shards", [values]):
            assert (shard.pop("captions"), shard.pop("cut")) == (0, 0)
        file.write_text(json.dumps(values))
    verify(str(tmp_path))


def test_features_that_are_not_finite_or_too_few_are_found(encoder, tmp_path, monkeypatch):
    for number, change in enumerate((lambda a: a * np.inf, lambda a: a[:, :-1])):

        def wrong(self, texts, change=change):
            found = encoder(texts)
            return found | {"tokens": change(found["tokens"])}

        class Wrong(type(encoder)):
            __call__ = wrong
            __init__ = object.__init__

        other = Wrong()
        other.__dict__.update(encoder.__dict__)
        out = str(tmp_path / str(number))
        prepare_latents(Captioned(), autoencoder(), out, options(), other)
        with pytest.raises(UsageError, match="record 0 cannot be read, lacks a field"):
            verify(out)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of the command, for a folder with a text beside each picture but one."""
    tmp_path = tmp_path_factory.mktemp("command")
    texts = {f"{name.rpartition('.')[0]}.txt": "\n".join(said) for name, said in TEXTS.items()}
    texts["a.txt"] += "\n" + "word3 " * 2000
    files = {name: encoded(i) for i, name in enumerate(TEXTS)} | texts
    write(tmp_path / "in", files | {"bare.png": encoded(7)})
    vae = tmp_path / "vae.safetensors"
    done = call(
        "dico_jax.convert", "vae", f"--input={FOLDER / 'vae_small.safetensors'}",
        f"--out={vae}", "--norm_num_groups=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    flags = ["latents", "--source=captions", f"--path={tmp_path / 'in'}", "--image_size=16"]
    return [*flags, f"--vae={vae}", f"--out={tmp_path / 'out'}", "--max_bad_fraction=0.3"]


@requires_golden
def test_the_command(flags, clip, tmp_path):
    done = call("dico_jax.prepare", *flags, f"--text={clip}", "--verify")
    assert done.returncode == 0, done.stderr
    said = "3 examples with 5 captions (1 of them cut, as they are longer than 12 tokens) in 1"
    assert done.stdout.count(said) == 2
    assert "1 bad ones skipped" in done.stdout
    other = write_clip(tmp_path / "other", seed=3)
    assert_refused(call("dico_jax.prepare", *flags, f"--text={other}"), "text_digest was", "--out=")


@requires_golden
def test_wrong_calls(flags, clip, tmp_path):
    (clip_copy := tmp_path / "copy").mkdir()
    shutil.copy(clip / "model.safetensors", clip_copy)
    done = call("dico_jax.prepare", *flags, f"--text={clip_copy}")
    assert_refused(done, f"--text={clip_copy}: ", "config.json")
    for wrong, said in {
        ("--source=digits", f"--text={clip}"): "--text: DigitsSource() has no captions",
        ("--path=/none",): "--path=/none: FileNotFoundError",
        ("--captions=/none.json",): "--captions='/none.json' cannot be read",
    }.items():
        assert_refused(call("dico_jax.prepare", *flags, f"--out={tmp_path}", *wrong), said)
