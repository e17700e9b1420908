"""The CLIP score: its pixels and numbers against transformers', and evaluate with --clip."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dico_jax.errors import UsageError
from dico_jax.evaluation.clip_score import ClipScorer, clip_numbers, prepared
from dico_jax.evaluation.measure import Options, evaluate_files
from dico_jax.text.clip import normalized
from dico_jax.text.tokenizers import load_tokenizer
from tests.commands import assert_refused, call
from tests.make_clip_numbers import TEXTS, smooth
from tests.test_clip import (
    NUMBERS,
    WEIGHTS,
    folder,
    hf_config,
    image_embeddings,
    padded_ids,
    text_embeddings,
    without,
)

COUNT = 7


@pytest.mark.parametrize("name", ["wide", "tall", "small"])
def test_pixels_are_those_of_transformers(name):
    """All but ties, of at most 2 % of the numbers, which are one grey level off."""
    image = NUMBERS[f"image/{name}"]
    found = np.asarray(jax.jit(lambda x: normalized(prepared(x, 28)))(image[None]))[0]
    wanted = NUMBERS[f"pixels/{name}"]
    level = 1 / (255 * 0.26)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1.05 * level
    assert np.abs(found - wanted).mean() <= 0.02 * level


def test_grey_images_count_as_rgb():
    grey = NUMBERS["image/tall"][None, ..., :1]
    assert np.array_equal(prepared(grey, 28), prepared(np.repeat(grey, 3, -1), 28))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of CLIP, and one of samples with their prompts."""
    path = tmp_path_factory.mktemp("clip_score")
    folder(path / "clip")
    (path / "samples").mkdir()
    rng = np.random.default_rng(3)
    images = np.stack([smooth(rng, (28, 28, 3)) for _ in range(COUNT)])
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / "samples" / f"{i:06d}.png")
    Image.fromarray(images[0]).save(path / "samples" / "grid.png")
    np.savez(path / "samples.npz", arr_0=images)
    prompts = ["a red bus", "", "a dog", "a red bus", TEXTS[8], "a cat", "a plate of food"]
    (path / "samples" / "prompts.txt").write_text("".join(f"{text}\n" for text in prompts))
    return path


def options(files, **changes):
    return Options(**{"clip": str(files / "clip"), "batch_size": 3, **changes})


def stated(files):
    """The scores, from the definition."""
    images = np.load(files / "samples.npz")["arr_0"]
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), [0.26862954, 0.26130258,
                                                                      0.27577711]  # fmt: skip
    image = image_embeddings(((images / 255 - mean) / deviation).astype("float32"), "float32")
    which = [0, 2, None, 0, 8, None, None]
    own = {2: "a dog", 5: "a cat", 6: "a plate of food"}
    tokenizer = load_tokenizer(files / "clip")
    ids = np.stack([padded_ids()[k] if k is not None else tokenizer([own[i]])[0]
                    for i, k in enumerate(which)])  # fmt: skip
    text = np.asarray(text_embeddings(ids))
    norms = np.linalg.norm(image, axis=1) * np.linalg.norm(text, axis=1)
    return 100 * np.sum(np.asarray(image) * text, axis=1) / norms


def test_the_score_is_the_mean_cosine(files):
    result = evaluate_files(str(files / "samples"), None, options(files))
    scores = stated(files)
    metrics = result["metrics"]
    assert list(metrics) == ["clip_score", "clip_score_interval"]
    assert metrics["clip_score"] == pytest.approx(max(scores.mean(), 0), abs=2e-4)
    error = scores.std(ddof=1) / np.sqrt(COUNT)
    assert metrics["clip_score_interval"] == pytest.approx(1.96 * error, rel=1e-3)
    assert result["metric_names"] == ["clip_score"]
    assert result["reference"] is None
    assert result["samples"]["count"] == COUNT
    about = result["clip"]
    assert about["path"] == str(files / "clip")
    assert len({about[f"{k}_sha256"] for k in ("image", "text", "texts")}) == 3
    assert about["texts_cut"] == 0


def test_numbers_of_scores():
    assert clip_numbers(np.array([-3.0, -1.0]))["clip_score"] == 0
    found = clip_numbers(np.array([20.0, 30.0, 40.0]))
    assert found == {"clip_score": 30, "clip_score_interval": pytest.approx(11.316, rel=1e-3)}
    assert clip_numbers(np.array([5.0]))["clip_score_interval"] == 0


def test_texts_stay_with_their_images(files, tmp_path):
    """A part of the images is scored by their own texts, and another order of texts differs."""
    scores = stated(files)
    part = evaluate_files(str(files / "samples"), None, options(files), num_samples=3)
    kept = np.sort(np.random.RandomState(2020).permutation(COUNT)[:3])
    assert part["metrics"]["clip_score"] == pytest.approx(max(scores[kept].mean(), 0), abs=2e-4)
    lines = (files / "samples" / "prompts.txt").read_text().splitlines()
    (tmp_path / "turned.txt").write_text("\r\n".join([*lines[1:], lines[0]]))  # no last newline
    turned = options(files, prompts=str(tmp_path / "turned.txt"))
    other = evaluate_files(str(files / "samples.npz"), None, turned)
    whole = evaluate_files(str(files / "samples"), None, options(files))
    assert other["pictures_digest"] == whole["pictures_digest"]
    assert other["metrics"] != whole["metrics"]
    assert other["clip"]["texts_sha256"] != whole["clip"]["texts_sha256"]


def test_long_texts_are_counted(files, tmp_path):
    (tmp_path / "long.txt").write_text("bus " * 2000 + "\n" + "\n" * (COUNT - 1))
    given = options(files, prompts=str(tmp_path / "long.txt"))
    assert evaluate_files(str(files / "samples"), None, given)["clip"]["texts_cut"] == 1


def test_an_interrupted_evaluation_goes_on(files, tmp_path, monkeypatch):
    from dico_jax.evaluation import evaluator

    monkeypatch.setattr(evaluator, "_SAVE_EVERY", 3)
    whole = evaluate_files(str(files / "samples"), None, options(files))
    seen = []

    def fails(self, embeddings, start):
        seen.append(start)
        if start == 6:
            raise KeyboardInterrupt
        return original(self, embeddings, start)

    original = ClipScorer.scores
    out = tmp_path / "out.json"
    with monkeypatch.context() as patch:
        patch.setattr(ClipScorer, "scores", fails)
        with pytest.raises(KeyboardInterrupt):
            evaluate_files(str(files / "samples"), None, options(files), out)
    assert seen == [0, 3, 6]
    again = evaluate_files(str(files / "samples"), None, options(files), out)
    assert again["metrics"] == whole["metrics"]
    assert json.loads(out.read_text())["metrics"] == whole["metrics"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.slow
def test_beside_the_distances_and_by_the_command(files, tmp_path):
    from dico_jax.data.pictures import PictureReader
    from dico_jax.data.sources import DigitsSource
    from dico_jax.evaluation.networks import train_classifier

    file = tmp_path / "classifier.npz"
    classifier = train_classifier(DigitsSource(), PictureReader(28, 3), max_steps=5)
    classifier.save(file)
    args = [f"--samples={files / 'samples'}", f"--clip={files / 'clip'}"]
    done = call("dico_jax.evaluate", *args, f"--out={tmp_path / 'a.json'}")
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "a.json").read_text())["metrics"]
    reference = [f"--reference={files / 'samples.npz'}", f"--features={file}"]
    how = ["--metrics=fid,clip_score", f"--out={tmp_path / 'b.json'}"]
    done = call("dico_jax.evaluate", *args, *reference, *how)
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "b.json").read_text())
    assert list(both["metrics"]) == ["fid", "clip_score", "clip_score_interval"]
    assert both["metrics"]["clip_score"] == pytest.approx(alone["clip_score"], abs=1e-6)
    assert both["metrics"]["fid"] == pytest.approx(0, abs=1e-6)
    assert re.search(r"clip_score +\d", done.stdout)


# Refusals, before any weights are read.


def refused(files, said, reference=None, samples="samples", **changes):
    with pytest.raises(UsageError) as error:
        evaluate_files(str(files / samples), reference, options(files, **changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_together_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(ClipScorer, "__init__", None)
    score = ("clip_score",)
    refused(files, "--metrics: clip_score needs --clip: a folder", clip=None, metrics=score)
    refused(files, "--reference is needed: fid", metrics=("fid", "clip_score"))
    refused(files, "--reference is needed: what is compared with", clip=None)
    refused(files, "--clip: leave it out, or name clip_score", "ref.npz", metrics=("fid",))
    refused(files, "is not for clip_score: leave it out", "ref.npz", metrics=score)
    refused(files, "--prompts=a.txt is for --clip", "ref.npz", clip=None, prompts="a.txt")
    refused(files, "'clip' is unknown: use some of fid, sfid", metrics=("clip",))
    refused(files, "--reference=none.npz: no such folder", "none.npz")


def test_texts_that_are_not_of_the_images_are_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(ClipScorer, "__init__", None)
    file = tmp_path / "prompts.txt"
    refused(files, f"--prompts={file}: no such file: give the texts", prompts=str(file))
    file.write_text("one\ntwo\n")
    said = f"--prompts={file} has 2 lines, and --samples={files / 'samples'} {COUNT} images"
    refused(files, said, prompts=str(file))
    file.write_bytes(b"\xff\xfe\n" * COUNT)
    refused(files, f"--prompts={file} is no text in UTF-8", prompts=str(file))
    refused(files, "--prompts is needed: a file of the texts", samples="samples.npz")
    bare = tmp_path / "bare"
    shutil.copytree(files / "samples", bare)
    (bare / "prompts.txt").unlink()
    with pytest.raises(UsageError, match=r"--prompts=\S*/bare/prompts.txt: no such file"):
        evaluate_files(str(bare), None, options(files))


def test_a_picture_that_cannot_be_read_is_refused(files, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(files / "samples", bad)
    (bad / "000004.png").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"^--prompts: 000004.png cannot be read, so the texts"):
        evaluate_files(str(bad), None, options(files, max_bad_fraction=0.5))


def test_another_clip_is_refused(files, tmp_path):
    text = folder(tmp_path / "text", WEIGHTS["text"])
    refused(files, f"--clip={text}: it has no tensors vision_model.*", clip=str(text))
    both = {**WEIGHTS["text"], **WEIGHTS["image"]}
    bare = folder(tmp_path / "bare", without(both, "text_projection.weight"))
    refused(files, "its towers have no projections into one space", clip=str(bare))
    config = hf_config(projection_dim=32)
    refused(files, "(24, 32) instead of (32, 32)",
            clip=str(folder(tmp_path / "wide", both, config=config)))  # fmt: skip
    other = folder(tmp_path / "other", tokenizer=False)
    refused(files, "has no tokenizer: put tokenizer.json", clip=str(other))


def test_the_command_needs_prompts_for_checkpoints(tmp_path):
    args = [f"--ckpt={tmp_path}", f"--clip={tmp_path}", "--metrics=clip_score"]
    assert_refused(call("dico_jax.evaluate", *args), "--clip", "needs --prompts")
    assert_refused(call("dico_jax.evaluate", f"--samples={tmp_path}"), "--reference is needed")
