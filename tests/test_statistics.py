"""Files of statistics and images: what is read, and what is refused with a line that says why."""

import contextlib
import hashlib
import os
import pickle
import zipfile

import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.evaluation import statistics
from dico_jax.evaluation.statistics import (
    NpzImages,
    Statistics,
    open_reference,
    save_statistics,
)

WIDTH, SPATIAL = 6, 4


def moments(width, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((30, width))
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def pictures(count=10, shape=(8, 12, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def adm_arrays(dtype=np.float64):
    mu, sigma = moments(WIDTH)
    mu_s, sigma_s = moments(SPATIAL, 1)
    arrays = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def write(path, save=np.savez, **arrays):
    save(path, **arrays)
    return path


def refused(path, message, read=open_reference):
    with pytest.raises(UsageError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_adm_files_with_statistics_and_images(tmp_path, save):
    arrays, images = adm_arrays(), pictures()
    path = write(tmp_path / "adm.npz", save, **arrays, arr_0=images)
    found = open_reference(path)
    assert isinstance(found, Statistics)
    assert found.features == "inception"
    for field, name in (("mean", "mu"), ("covariance", "sigma"), ("spatial_mean", "mu_s"),
                        ("spatial_covariance", "sigma_s")):  # fmt: skip
        assert np.array_equal(getattr(found, field), arrays[name])
    assert (found.count, found.pool_features, found.info) == (None, None, {})
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.images.shape == (8, 12, 3)
    assert len(found.images) == 10
    batches = list(found.images.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert np.array_equal(np.concatenate(batches), images)
    assert np.array_equal(np.concatenate(list(found.images.batches(3, 2, 9))), images[2:9])
    assert list(found.images.batches(3, 10)) == []
    found.images.take(4)
    drawn = np.sort(np.random.RandomState(2020).permutation(len(images))[:4])
    assert np.array_equal(np.concatenate(list(found.images.batches(3))), images[drawn])


def test_files_of_images_alone(tmp_path):
    images = pictures(shape=(5, 5, 1))
    path = write(tmp_path / "images.npz", arr_0=images, arr_1=np.arange(10))
    found = open_reference(path)
    assert isinstance(found, NpzImages)
    assert (found.name, found.shape, len(found)) == (str(path), (5, 5, 1), 10)
    assert np.array_equal(next(found.batches(10)), images)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_pytorch_fid_files_of_any_precision(tmp_path, dtype):
    arrays = adm_arrays(dtype)
    path = write(tmp_path / "fid.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    found = open_reference(path, features="other")
    assert (found.features, found.spatial_mean, found.images) == ("other", None, None)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    assert np.array_equal(found.mean, arrays["mu"])


def test_a_matrix_in_fortran_order_is_read(tmp_path):
    rows = np.asfortranarray(np.random.default_rng(0).standard_normal((3, WIDTH)))
    path = write(tmp_path / "a.npz", **adm_arrays(), pool_features=rows)
    assert np.array_equal(open_reference(path).pool_features, rows)


def our_statistics(**changes):
    fields = dict(zip(("mean", "covariance"), moments(WIDTH), strict=True))
    fields |= dict(zip(("spatial_mean", "spatial_covariance"), moments(SPATIAL), strict=True))
    rows = np.random.default_rng(0).standard_normal((7, WIDTH)).astype(np.float32)
    info = {"images": "some folder", "size": [256, 256], "µ": 1.5}
    fields |= {"features": "digits", "pool_features": rows, "count": 7, "info": info}
    return Statistics(**(fields | changes))


def test_our_own_files_come_back(tmp_path):
    path, statistics = tmp_path / "ours.npz", our_statistics()
    digest = save_statistics(path, statistics)
    assert os.listdir(tmp_path) == ["ours.npz"]
    found = open_reference(path)
    assert found.digest == digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for field in ("features", "count", "info"):
        assert getattr(found, field) == getattr(statistics, field)
    for field in ("mean", "covariance", "spatial_mean", "spatial_covariance", "pool_features"):
        assert np.array_equal(getattr(found, field), getattr(statistics, field))
    assert found.pool_features.dtype == np.float32
    with np.load(path) as others:  # and the published code finds what it looks for
        assert np.array_equal(others["mu"], statistics.mean)
        assert np.array_equal(others["sigma_s"], statistics.spatial_covariance)


def test_statistics_without_the_optional_parts_come_back(tmp_path):
    bare = our_statistics(
        spatial_mean=None, spatial_covariance=None, pool_features=None, count=None, info={}
    )
    save_statistics(tmp_path / "bare.npz", bare)
    found = open_reference(tmp_path / "bare.npz")
    assert (found.spatial_mean, found.spatial_covariance, found.pool_features) == (None,) * 3
    assert (found.count, found.info) == (None, {})


def test_saving_never_replaces_or_leaves_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "ours.npz"
    path.write_text("precious")
    with pytest.raises(UsageError, match=r"ours\.npz exists: give another name"):
        save_statistics(path, our_statistics())
    assert path.read_text() == "precious"
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        save_statistics(tmp_path / "nowhere" / "ours.npz", our_statistics())

    def fail(stream, **arrays):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        save_statistics(tmp_path / "new.npz", our_statistics())
    assert os.listdir(tmp_path) == ["ours.npz"]


def test_images_are_never_read_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "images.npz", arr_0=pictures(20))
    images, sizes = NpzImages(path), []
    read = zipfile.ZipExtFile.read

    def watched(stream, nbytes=-1):
        sizes.append(nbytes)
        return read(stream, nbytes)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", watched)
    assert sum(len(batch) for batch in images.batches(2, start=4)) == 16
    assert [size for size in sizes if size > 128] == [2 * 8 * 12 * 3] * 8
    assert -1 not in sizes


# --- what is refused


def test_files_that_are_no_npz(tmp_path):
    refused(tmp_path / "absent.npz", "is no npz file.*: No such file")
    refused(tmp_path, "is no npz file.*: Is a directory")
    text = tmp_path / "text.npz"
    text.write_text("hello")
    refused(text, "is no npz file")
    np.save(tmp_path / "one.npy", np.zeros(3))
    refused(tmp_path / "one.npy", "is no npz file")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "other.npz", "holds readme.txt, and no mu: a reference has mu and sigma")
    refused(
        write(tmp_path / "others.npz", x=np.zeros(3)),
        "holds x, and no mu: a reference",
    )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_cut_short_and_damaged(tmp_path, save):
    path = write(tmp_path / "a.npz", save, arr_0=pictures())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, "damaged or cut short")
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    refused(path, "damaged or cut short", read_all)


def read_all(path):
    found = open_reference(path)
    images = found if isinstance(found, NpzImages) else found.images
    return images and list(images.batches(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whatever_bytes_change_the_file_is_read_or_refused(tmp_path, save):
    rng, path = np.random.default_rng(0), tmp_path / "a.npz"
    data = write(path, save, **adm_arrays(), arr_0=pictures(2, (2, 2, 3))).read_bytes()
    refusals = 0
    for _ in range(300):
        changed = bytearray(data)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        with contextlib.suppress(UsageError):
            read_all(path)
            continue
        refused(path, "", read_all)
        refusals += 1
    assert refusals > 200


def test_an_array_shorter_than_its_header_says(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as entry:
        header = {"descr": "|u1", "fortran_order": False, "shape": (5, 4, 4, 3)}
        np.lib.format.write_array_header_1_0(entry, header)
        entry.write(bytes(100))
    refused(path, r"arr_0 is uint8\[5, 4, 4, 3\] of 100 bytes")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", b"no array")
        archive.writestr("sigma.npy", b"")
    refused(path, "mu is no array")


def test_small_files_of_much_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_UNPACKED", 1 << 20)
    many = {"pool_features": np.zeros((60_000, WIDTH))}
    path = write(tmp_path / "a.npz", np.savez_compressed, **adm_arrays(), **many)
    refused(path, r"it would unpack to 0.0 GB")
    write(path, np.savez, **adm_arrays(), **many)
    assert open_reference(path).pool_features.shape == (60_000, WIDTH)
    text = np.array("[" * 10**6)
    refused(write(path, **adm_arrays(), dico_jax=text), "a.npz")


class Trap:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = np.array([Trap()], dtype=object)
    for name in ("mu", "arr_0", "pool_features", "dico_jax"):
        arrays = (adm_arrays() if name != "arr_0" else {}) | {name: trap}
        path = write(tmp_path / f"{name}.npz", **arrays)
        refused(path, r"Object arrays cannot be loaded|is object\[1\]|no description")
    path = tmp_path / "pickle.npz"
    path.write_bytes(pickle.dumps(Trap()))
    refused(path, "is no npz file")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures() / np.float32(255), r"float32\[10, 8, 12, 3\]"),
        (pictures().astype(np.int64), "int64"),
        (pictures() > 3, "bool"),
        (pictures(shape=(3, 8, 8)), r"uint8\[10, 3, 8, 8\]"),
        (pictures(shape=(8, 8, 4)), r"uint8\[10, 8, 8, 4\]"),
        (pictures(shape=(8, 8)), r"uint8\[10, 8, 8\]"),
        (pictures(0), r"uint8\[0, 8, 12, 3\]"),
        (np.asfortranarray(pictures()), r"uint8\[10, 8, 12, 3\] in Fortran order"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, images, message):
    path = write(tmp_path / "a.npz", arr_0=images)
    refused(path, f"arr_0 is {message}.*: uint8 images from 0 to 255 .N, H, W, 1 or 3. are exp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sigma": np.eye(WIDTH + 1)},
            r"mu and sigma: .* a covariance of shape \(7, 7\) are not",
        ),
        ({"sigma": np.ones((WIDTH, 2))}, r"shape \(6, 2\) are not \(D,\) and \(D, D\)"),
        ({"sigma": np.triu(np.ones((WIDTH, WIDTH)))}, "mu and sigma: the covariance is not symm"),
        ({"mu": np.full(WIDTH, np.nan)}, "6 of 6 numbers of the mean are NaN or infinite"),
        ({"mu": np.zeros(WIDTH, int)}, "mu is no array of floating-point numbers"),
        ({"mu": np.zeros((1, WIDTH))}, r"a mean of shape \(1, 6\)"),
        ({"sigma_s": np.eye(WIDTH)}, "mu_s and sigma_s: a mean of shape"),
        ({"mu": None}, "holds sigma, mu_s, sigma_s, and no mu: "),
        ({"sigma_s": None}, "holds mu, sigma, mu_s, and no sigma_s"),
        (
            {"pool_features": np.zeros((5, 3))},
            r"pool_features are float64\[5, 3\]: .*\(N, 6\)",
        ),
        ({"pool_features": np.full((5, WIDTH), np.inf)}, "5 of 5 rows of .*pool_features are NaN"),
        ({"dico_jax": np.array("{}")}, "dico_jax is no description of statistics that this"),
        ({"dico_jax": np.array('{"version": 2}')}, "is no description of statistics that this"),
        ({"dico_jax": np.zeros(3)}, "is no description of statistics that this version knows"),
    ],
)
def test_arrays_that_are_no_statistics(tmp_path, changes, message):
    arrays = {k: v for k, v in (adm_arrays() | changes).items() if v is not None}
    refused(write(tmp_path / "a.npz", **arrays), message)
