"""Transforms and the order of examples."""

import numpy as np
import pytest

from dico_jax.data.pipeline import prepare_example, to_model_range, training_batches
from dico_jax.data.sources import DigitsSource


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
