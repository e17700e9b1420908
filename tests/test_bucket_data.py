"""Prepared latents in a bucket: written there, and read there record by record."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
from array_record.python import array_record_data_source, array_record_module

from dico_jax.data.latent_preparation import prepare_latents
from dico_jax.data.latents import PreparedLatents, verify
from dico_jax.data.pipeline import read_label, read_orientation, training_batches
from dico_jax.data.ranges import RangedRecords
from dico_jax.errors import UsageError
from tests.test_prepared_latents import Noise, autoencoder, options


def prepared(out, count=11, **how):
    prepare_latents(Noise(count=count), autoencoder(), str(out), options(**how))
    return str(out)


def examples(source):
    return [(source.example_id(i), source[i]["label"], source[i]["image"]) for i in range(11)]


def assert_equal(some, others):
    for (name, label, image), (other_name, other_label, other_image) in zip(
        some, others, strict=True
    ):
        assert (name, label) == (other_name, other_label)
        np.testing.assert_array_equal(image, other_image)


def test_records_of_all_sizes_are_those_of_the_library(bucket, root, tmp_path):
    """Also where a block of 64 KiB ends within a record's head, its data, or the index."""
    rng, files = np.random.default_rng(0), []
    for k, count in enumerate((1, 7000, 300)):
        file = tmp_path / f"{k}.array_record"
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1,uncompressed")
        for size in rng.integers(1, 150_000 if k == 2 else 60, count):
            writer.write(rng.bytes(int(size)))
        writer.close()
        bucket.write(f"{root.removeprefix('gs://bkt/')}/{file.name}", file.read_bytes())
        files.append((file.name, os.path.getsize(file)))
    library = array_record_data_source.ArrayRecordDataSource([str(tmp_path / n) for n, _ in files])
    bucket.requests.clear()
    records = RangedRecords(root, files, str(tmp_path), cached={"1.array_record"})
    assert bucket.requests == {"GET media": 4}  # an end and an index of each
    assert len(records) == len(library) == 7301
    some = [0, *range(1, 7001, 37), *range(7001, 7301)]
    assert [records[i] for i in some] == [library[i] for i in some]
    assert bucket.requests == {"GET media": 4 + 301}
    assert pickle.loads(pickle.dumps(records))[-1] == library[7300]


def test_latents_are_written_and_read_in_a_bucket(bucket, root, tmp_path):
    here, there = prepared(tmp_path / "out"), prepared(root)
    names = [name.removeprefix("test_latents_are_written_and_read_in_a_bucket/") for name in
             bucket.names(root.removeprefix("gs://bkt/"))]  # fmt: skip
    assert names == sorted(os.listdir(here))
    source = pickle.loads(pickle.dumps(PreparedLatents(there)))
    assert_equal(examples(source), examples(PreparedLatents(here)))
    bucket.requests.clear()
    _ = [source[i] for i in range(11)]
    assert bucket.requests == {"GET media": 11}
    bucket.requests.clear()
    source.check_checksums()  # which the bucket knows
    assert not bucket.requests
    first, *rest = source.manifest.shards
    partly = [dataclasses.replace(first, crc32c=""), *rest]
    source.manifest = source.manifest._replace(shards=partly)
    source.check_checksums()  # which reads all, as the bucket does not know of one
    assert bucket.requests["GET media"] >= 3
    assert len(verify(there).shards) == 3
    bucket.requests.clear()
    prepared(root)  # all is there
    assert not bucket.requests["PUT"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_and_each_process_reads_its_part(bucket, root, tmp_path, workers):
    sources = PreparedLatents(prepared(tmp_path / "out")), PreparedLatents(prepared(root))
    for index in (0, 1)[bool(workers) :]:  # these take long to start
        how = {"batch_size": 4, "seed": 0, "horizontal_flip": True, "num_workers": workers}
        how |= {"process_index": index, "process_count": 2}
        both = [iter(training_batches(s, read_orientation, read_label, **how)) for s in sources]
        for _ in range(6):
            here, there = map(next, both)
            for name in ("image", "index", "mirrored"):
                np.testing.assert_array_equal(here[name], there[name])


def test_a_cache_takes_what_fits(bucket, root, tmp_path):
    here, there, cache = prepared(tmp_path / "out"), prepared(root), tmp_path / "cache"
    shard = PreparedLatents(here).manifest.shards[0]
    source = PreparedLatents(there, cache_dir=str(cache), cache_gb=1.5 * shard.bytes / 1e9)
    (folder,) = cache.iterdir()
    assert os.listdir(folder) == [shard.file]
    assert_equal(examples(source), examples(PreparedLatents(here)))
    bucket.requests.clear()
    _ = [source[i] for i in range(11)]
    assert bucket.requests == {"GET media": 7}
    (folder / shard.file).write_bytes(b"half")
    source = PreparedLatents(there, cache_dir=str(cache))
    assert len(os.listdir(folder)) == 3
    bucket.requests.clear()
    assert_equal(examples(source), examples(PreparedLatents(here)))
    assert not bucket.requests


def test_a_cache_of_two_folders(bucket, root, tmp_path):
    """Whose shards have the same names and sizes."""
    for dtype in ("float16", "bfloat16"):
        here, there = (prepared(f"{at}/{dtype}", dtype=dtype) for at in (tmp_path, root))
        source = PreparedLatents(there, cache_dir=str(tmp_path / "cache"))
        assert_equal(examples(source), examples(PreparedLatents(here)))


def test_objects_that_are_gone_or_damaged(bucket, root):
    there = prepared(root)
    source = PreparedLatents(there)
    name = f"{there.removeprefix('gs://bkt/')}/{source.manifest.shards[1].file}"
    whole = bucket.read(name)
    bucket.remove(name)
    with pytest.raises(UsageError, match=r"00001-of-00003.array_record cannot be read .it is gone"):
        source[5]
    with pytest.raises(UsageError, match="00001-of-00003.array_record has not the .* bytes"):
        PreparedLatents(there)
    bucket.write(name, whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="00001-of-00003.array_record has not the .* bytes"):
        PreparedLatents(there)
    for at in (0, 70, len(whole) - (1 << 16) + 30, len(whole) - (1 << 16) + 80):
        bucket.write(name, whole[:at] + bytes(8) + whole[at + 8 :])
        with pytest.raises(UsageError, match="dico_jax.prepare|checksum|record"):
            verify(there)


def test_answers_that_fail_are_asked_for_again(bucket, root):
    source, rng = PreparedLatents(prepared(root)), np.random.default_rng(0)
    wrong = [429, 503, "cut"]
    bucket.fault = lambda method, path: wrong[rng.integers(3)] if rng.random() < 0.05 else None
    for i in range(120):
        assert source.example_id(i % 11)
    assert bucket.requests["GET media"] > 120
