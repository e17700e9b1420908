"""What the package offers to Python besides `Sampler`: `fid` and `train`."""

import signal
import threading

import numpy as np
import pytest
from PIL import Image

from dico_jax import Sampler, fid, train
from dico_jax.configs import digits
from dico_jax.data.pictures import PictureReader
from dico_jax.errors import UsageError
from dico_jax.evaluation.evaluator import measure_images
from dico_jax.evaluation.fid import _ArrayImages
from dico_jax.evaluation.networks import make_feature_fn, train_classifier
from dico_jax.evaluation.statistics import save_statistics
from dico_jax.parallel.mesh import create_mesh
from dico_jax.training import loop
from tests.test_classifier import Plain


def quick_config():
    """The digits in seconds."""
    config = digits.get_config()
    config.model.update(name="DiT", hidden_size=8, depth=1, num_heads=1, patch_size=4)
    config.data.batch_size, config.training.num_steps, config.sampling.num_steps = 16, 2, 2
    config.sampling.grid_every_steps = config.eval.class_agreement_samples = 0
    return config


def test_fid_of_arrays_folders_and_files(tmp_path):
    network = train_classifier(Plain(), PictureReader(4, 1), max_steps=20)
    network.save(features := tmp_path / "classifier.npz")
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, high, (30, 4, 4, 1), dtype=np.uint8) for high in (256, 200))
    found = fid(one, other, features=str(features))
    assert found > 0
    assert abs(fid(one, one, features=str(features))) < 1e-6
    (tmp_path / "other").mkdir()
    for i, image in enumerate(other):
        Image.fromarray(image[..., 0]).save(tmp_path / "other" / f"{i:03d}.png")
    np.savez(tmp_path / "other.npz", arr_0=other)
    features_of = make_feature_fn(network, 64, create_mesh())
    statistics = measure_images(_ArrayImages(other, "x"), network, features_of, 64)
    save_statistics(tmp_path / "statistics.npz", statistics)
    for name in ("other", "other.npz", "statistics.npz"):
        there = fid(one, tmp_path / name, features=str(features), batch_size=7)
        assert there == pytest.approx(found, rel=1e-6), name
    for wrong, message in (
        (other / 255, r"^reference is float64\[30, 4, 4, 1\]: uint8 images"),
        (other[0], r"^reference is uint8\[4, 4, 1\]"),
        (other[:1], "^reference has 1 images: at least 2"),
        (tmp_path / "none", "^reference=.*none: no such folder or file"),
        (np.zeros((9, 8, 8, 1), np.uint8), r"^reference has images of shape \(8, 8, 1\)"),
    ):
        with pytest.raises(UsageError, match=message):
            fid(one, wrong, features=str(features))


def test_train_in_any_thread_and_sample(tmp_path):
    config, raised = quick_config(), []

    def run():
        try:
            assert train(config, tmp_path / "run") is None
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not raised
    images = Sampler.from_pretrained(tmp_path / "run")("all", num_images=2)
    assert images.shape == (2, 8, 8, 1)
    config.data.max_bad_fraction = 2.0
    with pytest.raises(UsageError, match="^config.data.max_bad_fraction=2.0"):
        train(config, tmp_path / "other")


def test_a_notebook_has_its_signals_back(tmp_path, monkeypatch):
    def interrupted(config, workdir):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise SystemExit(130)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(loop, "train", interrupted)
    with pytest.raises(SystemExit):
        train(quick_config(), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
