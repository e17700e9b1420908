"""The order of examples, batches on the devices, and what happens to bad examples."""

import itertools
import json
import pickle
import threading

import numpy as np
import pytest

from dico_jax.data.bad_examples import BadExampleLog
from dico_jax.data.class_files import FolderSource
from dico_jax.data.pictures import BadExample, PictureReader
from dico_jax.data.pipeline import DeviceBatches, read_label, read_orientation, training_batches
from dico_jax.errors import UsageError
from tests.real_data import IMAGENET, requires_data


class Numbers:
    """Example i is i, in every place, so that a batch tells which examples it holds."""

    kind = "latents"
    image_shape = (2, 2, 1)

    def __init__(self, n=20, skipped=()):
        self.class_names = [str(i) for i in range(n)]
        self.skipped = dict.fromkeys(skipped, "not a picture")

    def __len__(self):
        return len(self.class_names)

    def __getitem__(self, i):
        return {"image": np.full((2, 2, 1), i, np.float32), "label": i}

    def example_id(self, i):
        return f"number/{i}"


class SomeBad:
    """A reader to whom some numbers are bad."""

    def __init__(self, bad):
        self.bad = bad

    def __call__(self, image, mirrored):
        if image[0, 0, 0] in self.bad:
            raise BadExample(f"{image[0, 0, 0]:g} is bad")
        return image


def batches(source=None, read=read_orientation, **kwargs):
    kwargs = {"batch_size": 8, "seed": 0, **kwargs}
    return iter(training_batches(source or Numbers(), read, read_label, **kwargs))


def labels_of(num_batches, *args, **kwargs):
    iterator = batches(*args, **kwargs)
    return np.stack([next(iterator)["condition"]["label"] for _ in range(num_batches)])


def test_every_epoch_has_every_example_once_in_a_new_order():
    stream = labels_of(10).ravel()[:60].reshape(3, 20)
    for epoch in stream:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert len({tuple(epoch) for epoch in stream}) == 3


def test_order_depends_on_the_seed_alone():
    np.testing.assert_array_equal(labels_of(5), labels_of(5))
    assert (labels_of(5) != labels_of(5, seed=1)).any()


@requires_data
def test_ids_of_three_epochs_for_any_number_of_processes_and_from_any_batch():
    """60 pictures of ImageNet, 23 batches of 8: a batch across the end of each epoch."""
    source, read = FolderSource(str(IMAGENET)), PictureReader(8, 3)
    assert len(source) == 60

    def ids(count, index, start_step=0):
        part = {"start_step": start_step, "process_index": index, "process_count": count}
        iterator = batches(source, read, horizontal_flip=True, **part)
        found = [next(iterator) for _ in range(start_step, 23)]
        return [[source.example_id(i) for i in batch["index"]] for batch in found], found

    whole, arrays = ids(1, 0)
    flat = [*itertools.chain(*whole)]
    for epoch in range(3):
        assert len(set(flat[60 * epoch : 60 * epoch + 60])) == 60
    for count in (2, 4, 8):
        parts = [ids(count, index)[0] for index in range(count)]
        for step, together in enumerate(zip(*parts, strict=True)):
            assert [*itertools.chain(*together)] == whole[step]  # in the same order, too
    for start in (1, 7, 8, 22):
        rest, rest_arrays = ids(1, 0, start)
        assert rest == whole[start:]
        for a, b in zip(rest_arrays, arrays[start:], strict=True):  # the same flips, too
            np.testing.assert_array_equal(a["image"], b["image"])


@pytest.mark.parametrize("start", [0, 3])
def test_workers_change_nothing(start):
    """From any position, and whatever their number."""
    plain = labels_of(6, start_step=start)
    for workers in (1, 3):
        iterator = batches(start_step=start, num_workers=workers)
        found = [next(iterator)["condition"]["label"] for _ in range(6)]
        iterator.close()
        np.testing.assert_array_equal(found, plain)


def test_a_batch():
    batch = next(batches(horizontal_flip=True, batch_size=64, seed=3))
    assert batch["image"].shape == (64, 2, 2, 1)
    assert batch["image"].dtype == np.float32
    integers = batch["condition"]["label"], batch["index"], batch["skipped"]
    assert {array.dtype for array in integers} == {np.dtype(np.int32)}
    assert 16 < batch["mirrored"].sum() < 48
    assert not batch["skipped"].any()
    np.testing.assert_array_equal(batch["condition"]["label"], batch["index"])


def test_readers():
    image = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    pair = np.stack([image, image + 10])
    assert read_orientation(image, False)[0, 0, 0] == 0
    assert read_orientation(image, True)[0, 0, 0] == 3
    assert read_orientation(pair, False)[0, 0, 0] == 0
    assert read_orientation(pair, True)[0, 0, 0] == 10  # the stored one, not a mirrored latent
    read = PictureReader(2, 1)
    pixels = np.array([[[1], [2]], [[3], [4]]], np.uint8)
    np.testing.assert_array_equal(read(pixels, True), pixels[:, ::-1])
    assert pickle.loads(pickle.dumps(read)) == read


def test_the_next_good_example_takes_the_place_of_a_bad_one(tmp_path):
    bad, file = {3, 4, 19}, tmp_path / "bad_examples.jsonl"
    source, read = Numbers(skipped=["notes.txt"]), SomeBad({3, 4, 19})
    log = BadExampleLog(source, read, 0.2, file, start_step=70)
    plain = labels_of(5)
    expected = plain.copy()
    for instead, of in ((5, 3), (5, 4), (0, 19)):
        expected[plain == of] = instead
    kwargs = {"batch_size": 8, "seed": 0, "max_bad_fraction": 0.2}
    stream = training_batches(source, read, read_label, **kwargs)
    with DeviceBatches(stream, lambda batch: batch, log) as iterator:
        found = [next(iterator)["condition"]["label"] for _ in range(5)]
    np.testing.assert_array_equal(found, expected)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["id"] for line in lines} == {"notes.txt"} | {f"number/{i}" for i in bad}
    assert {line["reason"] for line in lines if line["id"] == "number/3"} == {"3 is bad"}
    first = {k: 71 + int(np.flatnonzero((plain == k).any(axis=1))[0]) for k in bad}
    steps = {"notes.txt": 70} | {f"number/{k}": step for k, step in first.items()}
    assert {line["id"]: line["step"] for line in lines} == steps
    # A run that goes on knows them, and writes nothing twice.
    again = BadExampleLog(source, read, 0.2, file)
    assert again.bad.keys() == log.bad.keys()
    again.add_skipped(np.array([5]), np.array([2]))
    assert len(file.read_text().splitlines()) == 4


def test_too_many_bad_examples_stop_with_their_list(tmp_path):
    source, read = Numbers(), SomeBad({3, 9, 15})
    log = BadExampleLog(source, read, 0.1, tmp_path / "bad.jsonl")
    stream = training_batches(source, read, read_label, batch_size=8, seed=0, max_bad_fraction=0.1)
    with (
        DeviceBatches(stream, lambda batch: batch, log) as iterator,
        pytest.raises(UsageError) as error,
    ):
        next(itertools.islice(iterator, 20, None))
    for part in ("config.data.max_bad_fraction=0.1: 3 of 20", "number/9: 9 is bad", "number/15"):
        assert part in str(error.value)
    with pytest.raises(UsageError, match="5 of 25 examples cannot be read .*a: not a picture"):
        BadExampleLog(Numbers(skipped="abcde"), read, 0.1)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_examples_is_an_error_and_no_endless_search(workers):
    read = SomeBad(set(range(20)))
    iterator = batches(read=read, max_bad_fraction=0.3, num_workers=workers)
    with pytest.raises(UsageError, match="7 of 20 examples cannot be read"):
        next(iterator)


def test_batches_are_put_on_the_devices_before_they_are_asked_for():
    source, read = Numbers(), read_orientation
    put, enough = [], threading.Event()

    def put_one(batch):
        put.append(batch)
        if len(put) == 3:
            enough.set()
        return batch

    stream = training_batches(source, read, read_label, batch_size=8, seed=0)
    with DeviceBatches(stream, put_one, BadExampleLog(source, read, 0.0)) as iterator:
        first = next(iterator)
        assert enough.wait(60)  # two more, though only one was asked for
        assert first is put[0]
        assert next(iterator) is put[1]
        assert iterator.waited >= 0
