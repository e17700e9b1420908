"""The small classifier whose features stand in for Inception's."""

import json
from typing import ClassVar

import jax
import numpy as np
import pytest

from dico_jax.data.pictures import BadExample, PictureReader
from dico_jax.data.sources import DigitsSource
from dico_jax.errors import UsageError
from dico_jax.evaluation.networks import load_classifier, make_feature_fn, train_classifier
from dico_jax.evaluation.statistics import Moments
from dico_jax.parallel.mesh import create_mesh


class Plain:
    """Pictures of two classes that a few steps tell apart: bright and dark ones."""

    kind = "pictures"
    class_names = ("dark", "bright")
    skipped: ClassVar[dict[str, str]] = {}

    def __len__(self):
        return 60

    def __getitem__(self, index):
        noise = np.random.default_rng(index).integers(0, 60, (4, 4, 1))
        return {"image": (noise + 150 * (index % 2)).astype(np.uint8), "label": index % 2}

    def example_id(self, index):
        return str(index)

    def __repr__(self):
        return "Plain()"


@pytest.fixture(scope="module")
def classifier():
    return train_classifier(Plain(), PictureReader(4, 1), max_steps=20)


def test_it_learns(classifier):
    assert classifier.info["accuracy"] == 1.0
    assert classifier.info["num_steps"] == 20
    assert classifier.image_shape == (4, 4, 1)
    images = np.stack([Plain()[i]["image"] for i in range(10)])
    found = make_feature_fn(classifier, 16, create_mesh())(images)
    assert found.pool.shape == (10, 64)
    assert found.spatial is None
    np.testing.assert_array_equal(found.logits.argmax(1), np.arange(10) % 2)
    # However batches are made and split, an image has the same features.
    other = make_feature_fn(classifier, 3, create_mesh(jax.devices()[:1]))
    parts = np.concatenate([other(images[i : i + 3]).pool for i in range(0, 10, 3)])
    np.testing.assert_allclose(parts, found.pool, atol=1e-5)


def test_moments_are_the_same_on_any_number_of_devices(classifier):
    images = np.random.default_rng(0).integers(0, 256, (150, 4, 4, 1), np.uint8)
    found = []
    for count in (1, 2, 4, 8):
        features = make_feature_fn(classifier, 512, create_mesh(jax.devices()[:count]))
        moments = Moments(classifier.width)
        moments.update(features(images).pool)
        found.append((moments.mean, moments.covariance))
    for mean, covariance in found[1:]:
        np.testing.assert_allclose(mean, found[0][0], atol=1e-10 * found[0][0].max())
        np.testing.assert_allclose(covariance, found[0][1], atol=1e-10 * found[0][1].max())


def test_the_same_training_gives_the_same_weights(classifier):
    again = train_classifier(Plain(), PictureReader(4, 1), max_steps=20)
    assert again.digest == classifier.digest
    other = train_classifier(Plain(), PictureReader(4, 1), max_steps=20, seed=1)
    assert other.digest != classifier.digest


def test_a_file_of_it(classifier, tmp_path):
    path = tmp_path / "classifier.npz"
    classifier.save(path)
    found = load_classifier(path)
    assert found.digest == classifier.digest
    assert (found.info, found.class_names) == (classifier.info, ("dark", "bright"))
    assert [p.name for p in tmp_path.iterdir()] == ["classifier.npz"]
    with pytest.raises(UsageError, match=r"x has images of shape \(8, 8, 1\), but .*\(4, 4, 1\)"):
        found.check_images((8, 8, 1), "x")


def test_files_that_are_none(classifier, tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UsageError, match=r"a.npz is no classifier .prepare|No such file"):
        load_classifier(path)
    path.write_bytes(b"no zip")
    with pytest.raises(UsageError, match=r"a.npz is no classifier \(python -m dico_jax.prepare cl"):
        load_classifier(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(UsageError, match="a.npz is no classifier"):
        load_classifier(path)
    about = {"format": "x", "image_shape": [4, 4, 1], "class_names": ["a", "b"], "info": {}}
    for form, match in (("x", "of the format"), ("dico_jax classifier 1", "other layers")):
        text = json.dumps(about | {"format": form}).encode()
        np.savez(path, about=np.frombuffer(text, np.uint8), conv0=np.zeros(3))
        with pytest.raises(UsageError, match=match):
            load_classifier(path)


@pytest.mark.parametrize(
    "about",
    [
        [], {"image_shape": [-1, 4, 1]}, {"image_shape": ["a", "b", "c"]}, {"image_shape": 3},
        {"class_names": 2}, {"info": []}, {"image_shape": [10**12] * 3}, "deep",
    ],
)  # fmt: skip
def test_wrong_descriptions_are_refused_in_one_line(classifier, tmp_path, about):
    path = tmp_path / "a.npz"
    classifier.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    right = json.loads(arrays["about"].tobytes())
    text = json.dumps(right | about if isinstance(about, dict) else about)
    text = "[" * 10**6 if about == "deep" else text
    np.savez(path, **arrays | {"about": np.frombuffer(text.encode(), np.uint8)})
    with pytest.raises(UsageError, match=r"^\S*a.npz is no classifier.{0,200}$"):
        load_classifier(path)


def test_bad_pictures_are_left_out(monkeypatch):
    source, read = Plain(), PictureReader(4, 1)

    def reads(image, mirrored):
        if image is source[7]["image"] or np.array_equal(image, source[7]["image"]):
            raise BadExample("cut")
        return read(image, mirrored)

    count = sum(np.array_equal(source[i]["image"], source[7]["image"]) for i in range(len(source)))
    how = {"max_steps": 3, "max_bad_fraction": count / len(source) + 0.1}
    found = train_classifier(source, reads, **how)
    assert found.info["bad"]
    with pytest.raises(UsageError, match="max_bad_fraction"):
        train_classifier(source, reads, max_steps=3)


def test_sources_that_it_cannot_learn():
    source, read = Plain(), PictureReader(4, 1)
    source.class_names = ("all",)
    with pytest.raises(UsageError, match="has 60 pictures of 1 classes"):
        train_classifier(source, read)
    source.kind = "latents"
    with pytest.raises(UsageError, match="has 60 latents of 1 classes: a classifier needs"):
        train_classifier(source, read)


@pytest.mark.slow
def test_digits():
    found = train_classifier(DigitsSource(), PictureReader(8, 1))
    assert found.info["accuracy"] > 0.97
