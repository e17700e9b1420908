"""Pictures to be measured: folders and sources."""

import numpy as np
import pytest
from PIL import Image

from dico_jax.data.image_sets import FolderImages, SourceImages
from dico_jax.data.pictures import PictureReader
from dico_jax.data.sources import ArraySource, DigitsSource
from dico_jax.errors import UsageError

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (7, 6, 5, 3), np.uint8)


def write(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


@pytest.fixture
def folder(tmp_path):
    """Seven pictures, beside what `dico_jax.sample` leaves."""
    for i, picture in enumerate(PICTURES):
        write(tmp_path / f"{i:06d}.png", picture)
    write(tmp_path / "grid.png", PICTURES[0, :3])
    (tmp_path / "sampling.json").write_text("{}")
    return tmp_path


def all_of(images, *args):
    batches = list(images.batches(*args))
    return [len(batch) for batch in batches], np.concatenate(batches)


def test_a_folder_in_its_order(folder):
    images = FolderImages(str(folder), "--samples")
    assert (len(images), images.shape, images.name) == (7, (6, 5, 3), f"--samples={folder}")
    sizes, found = all_of(images, 3)
    assert sizes == [3, 3, 1]
    np.testing.assert_array_equal(found, PICTURES)
    sizes, found = all_of(images, 3, 2, 6)
    assert sizes == [3, 1]
    np.testing.assert_array_equal(found, PICTURES[2:6])
    assert list(images.batches(3, 7)) == []
    images.take(4)
    drawn = np.sort(np.random.RandomState(2020).permutation(7)[:4])
    np.testing.assert_array_equal(all_of(images, 3)[1], PICTURES[drawn])


def test_a_folder_of_classes_and_grey_pictures(tmp_path):
    for i, picture in enumerate(PICTURES):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", picture[..., 0])
    images = FolderImages(str(tmp_path), "--reference")
    assert images.shape == (6, 5, 1)
    order = [0, 2, 4, 6, 1, 3, 5]
    np.testing.assert_array_equal(all_of(images, 4)[1], PICTURES[order][..., :1])


def test_folders_that_are_refused(folder, tmp_path):
    def refused(match):
        with pytest.raises(UsageError, match=match):
            all_of(FolderImages(str(folder), "--samples"), 3)

    (folder / "notes.txt").write_text("x")
    (folder / "more").mkdir()
    refused(
        r"--samples=.* holds more than the pictures to be measured \(2, such as more/, notes.txt\)"
    )
    (folder / "notes.txt").unlink()
    (folder / "more").rmdir()
    write(folder / "000004.png", PICTURES[4, :4])
    refused(
        r"=0.0: 1 of 7 .*000004.png: it is \(4, 5, 3\) pixels, the first picture \(6, 5, 3\): all"
    )
    write(folder / "000004.png", PICTURES[4, :, :, 0])
    refused(r"000004.png: it is \(6, 5, 1\) pixels, the first picture \(6, 5, 3\)")
    (folder / "000004.png").write_bytes(b"no picture")
    refused("--samples=.*: .*000004.png: no picture in a format that Pillow reads")
    images = FolderImages(str(folder), "--samples", 0.001)
    sizes, found = all_of(images, 2)
    assert sizes == [2, 2, 1, 1]
    np.testing.assert_array_equal(found, np.delete(PICTURES, 4, axis=0))
    assert list(images.bad) == ["000004.png"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match=f"--samples={empty}: it has no folders of pic"):
        FolderImages(str(empty), "--samples")
    with pytest.raises(UsageError, match=r"--samples=/no/such.*"):
        FolderImages("/no/such", "--samples")
    write(empty / "a" / "0.png", PICTURES[0])
    (empty / "a" / "readme.md").write_text("x")
    with pytest.raises(UsageError, match=r"holds more than the pictures .*a/readme.md"):
        FolderImages(str(empty), "--samples")


def test_examples_of_a_source():
    source, read = DigitsSource(), PictureReader(8, 1)
    images = SourceImages(source, read, 5)
    assert (len(images), images.shape) == (5, (8, 8, 1))
    wanted = [source[i]["image"] for i in (0, 449, 898, 1347, 1796)]
    np.testing.assert_array_equal(all_of(images, 2)[1], wanted)
    assert len(SourceImages(source, read, None)) == len(source)


def test_latents_are_no_pictures(tmp_path):
    np.save(tmp_path / "examples.npy", np.zeros((4, 8, 8, 4), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(4, np.int64))
    source = ArraySource(str(tmp_path))
    with pytest.raises(UsageError, match="has latents: pictures are needed"):
        SourceImages(source, PictureReader(8, 3), None)
