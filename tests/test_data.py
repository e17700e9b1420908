"""Sources, transforms and the order of examples."""

import numpy as np
import pytest

from configs import default
from dico_jax.data.pipeline import prepare_example, to_model_range, training_batches
from dico_jax.data.sources import ArraySource, DigitsSource, create_source
from dico_jax.errors import UsageError


class Numbers:
    """Example i is i, in every place, so that a batch tells which examples it holds."""

    image_shape = (2, 2, 1)

    def __init__(self, n=20):
        self.class_names = [str(i) for i in range(n)]

    def __len__(self):
        return len(self.class_names)

    def __getitem__(self, i):
        return {"image": np.full((2, 2, 1), i, np.float32), "label": i}


def labels_of(num_batches, start_step=0, **kwargs):
    kwargs = {"batch_size": 8, "seed": 0, **kwargs}
    batches = training_batches(Numbers(), start_step=start_step, **kwargs)
    return np.stack([next(batches)["y"] for _ in range(num_batches)])


def test_every_epoch_has_every_example_once_in_a_new_order():
    stream = labels_of(10).ravel()[:60].reshape(3, 20)
    for epoch in stream:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert len({tuple(epoch) for epoch in stream}) == 3


def test_order_depends_on_the_seed_alone():
    np.testing.assert_array_equal(labels_of(5), labels_of(5))
    assert (labels_of(5) != labels_of(5, seed=1)).any()


@pytest.mark.parametrize("start", [1, 3, 7])
def test_a_position_is_reached_at_once(start):
    np.testing.assert_array_equal(labels_of(10)[start:], labels_of(10 - start, start_step=start))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_every_batch_without_loss_or_repetition(count):
    parts = [labels_of(10, process_index=i, process_count=count) for i in range(count)]
    together = np.concatenate(parts, axis=1)
    np.testing.assert_array_equal(np.sort(together, 1), np.sort(labels_of(10), 1))


def test_batches_are_in_the_models_range():
    batch = next(training_batches(DigitsSource(), batch_size=16, seed=0))
    assert batch["x"].shape == (16, 8, 8, 1)
    assert batch["x"].dtype == np.float32
    assert batch["y"].dtype == np.int32
    assert batch["x"].min() == -1
    assert batch["x"].max() == 1
    np.testing.assert_allclose(
        to_model_range(np.array([0, 127, 255], np.uint8)), [-1, 127 / 127.5 - 1, 1], atol=1e-7
    )


def test_mirroring_is_random_per_visit_and_uses_the_stored_orientation():
    image = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    rng = np.random.default_rng(0)
    plain = {"image": image, "label": 1}
    pair = {"image": np.stack([image, image + 10]), "label": 1}
    first = [prepare_example(plain, rng, True)["x"][0, 0, 0] for _ in range(200)]
    assert set(first) == {0, 3}
    assert 60 < first.count(3) < 140
    assert {prepare_example(plain, rng, False)["x"][0, 0, 0] for _ in range(20)} == {0}
    assert {prepare_example(pair, rng, True)["x"][0, 0, 0] for _ in range(50)} == {0, 10}
    assert {prepare_example(pair, rng, False)["x"][0, 0, 0] for _ in range(20)} == {0}


def test_digits():
    source = DigitsSource()
    assert len(source) == 1797
    example = source[0]
    assert example["image"].dtype == np.uint8
    assert max(source[i]["image"].max() for i in range(9)) == 255
    assert example["label"] == 0


def write_arrays(folder, examples, labels):
    np.save(folder / "examples.npy", examples)
    np.save(folder / "labels.npy", labels)
    return str(folder)


def test_arrays(tmp_path):
    latents = np.random.default_rng(0).normal(size=(6, 2, 4, 4, 4)).astype(np.float16)
    source = ArraySource(write_arrays(tmp_path, latents, np.array([0, 1, 2, 0, 1, 2])))
    assert len(source) == 6
    assert source.image_shape == (4, 4, 4)
    assert source.class_names == ["0", "1", "2"]
    np.testing.assert_array_equal(source[4]["image"], latents[4])
    batch = next(training_batches(source, batch_size=2, seed=0, horizontal_flip=True))
    assert batch["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("examples", "labels", "message"),
    [
        (np.zeros((4, 4, 4)), np.zeros(4, int), r"examples.npy is \(4, 4, 4\), but must be"),
        (np.zeros((4, 3, 8, 8, 4)), np.zeros(4, int), r"\(4, 3, 8, 8, 4\), but must be"),
        (np.zeros((4, 8, 8, 4)), np.zeros(3, int), r"labels.npy is int64 \(3,\), but must be"),
        (np.zeros((4, 8, 8, 4)), np.zeros(4), r"labels.npy is float64"),
        (np.zeros((0, 8, 8, 4)), np.zeros(0, int), "at least one"),
    ],
)
def test_wrong_arrays(tmp_path, examples, labels, message):
    with pytest.raises(UsageError, match=message):
        ArraySource(write_arrays(tmp_path, examples, labels))


def test_missing_and_unknown_sources(tmp_path):
    config = default.get_config().data
    with pytest.raises(UsageError, match="data.path is not set"):
        create_source(config)
    config.path = str(tmp_path)
    with pytest.raises(UsageError, match="data.path: cannot read .*examples.npy"):
        create_source(config)
    config.source = "digit"
    with pytest.raises(UsageError, match="data.source='digit' is unknown: use one of arrays, di"):
        create_source(config)
