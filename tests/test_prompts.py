"""What --prompts asks for, and pictures above their captions."""

import json

import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.sampling.grids import image_grid
from dico_jax.sampling.prompts import PROTOCOLS, number_of_images, read_prompts


def coco(path, pictures, captions=3):
    images = [{"id": i, "file_name": f"{i:05d}.jpg"} for i in range(pictures)]
    said = [{"id": i * captions + k, "image_id": i, "caption": f"picture {i} caption {k}"}
            for i in range(pictures) for k in range(captions)]  # fmt: skip
    path.write_text(json.dumps({"images": images, "annotations": said}))
    return path


def test_texts_and_files_of_them(tmp_path):
    assert read_prompts("a red bus;  a plate\tof food ; ", 0) == ["a red bus", "a plate of food"]
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa dog; asleep\r\n\nदो कुत्ते, 猫 🙂\n", encoding="utf-8")
    assert read_prompts(str(file), 0) == ["a dog; asleep", "दो कुत्ते, 猫 🙂"]
    assert read_prompts("cats/dogs playing", 0) == ["cats/dogs playing"]


def test_one_caption_of_every_picture_in_the_order_of_a_draw(tmp_path):
    file = str(coco(tmp_path / "captions_val2014.json", 50))
    first, again, other = (read_prompts(file, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    for found in (first, other):
        numbers = [int(text.split()[1]) for text in found]
        assert sorted(numbers) == list(range(50))
        assert numbers != sorted(numbers)
        assert {text.split()[-1] for text in found} == {"0", "1", "2"}


def test_protocols_by_name(tmp_path, monkeypatch):
    assert number_of_images("coco_uvit:x.json") == 30_000
    assert number_of_images("coco_repa:x.json") == 40_192
    assert number_of_images("a red bus") is None
    file = coco(tmp_path / "captions_val2014.json", 50)
    with pytest.raises(UsageError, match="captions of 50 pictures, and 30,000 are asked for"):
        read_prompts(f"coco_uvit:{file}", 0)
    monkeypatch.setitem(PROTOCOLS, "coco_uvit", 40)
    assert read_prompts(f"coco_uvit:{file}", 0) == read_prompts(str(file), 0)[:40]


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (" ; ;", "has no prompt"),
        ("missing.txt", "no such file"),
        ("missing.json", "cannot be read"),
        ("cut.json", "is damaged or cut short"),
        ("wide.txt", "is no file of texts in UTF-8"),
        ("", "has no prompt"),
        (".", "is no file of texts"),
    ],
)
def test_what_is_no_prompt(prompts, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.json").write_text('{"images": [')
    (tmp_path / "wide.txt").write_bytes("a dog".encode("utf-16"))
    with pytest.raises(UsageError, match=said) as error:
        read_prompts(prompts, 0)
    assert str(error.value).startswith("--prompts")


def test_pictures_above_their_captions():
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 256, (1, 40, 40, 3), dtype=np.uint8) for _ in range(5)]
    captions = ["a dog", "a very long caption " * 20, "猫 🙂", "", "a bus"]
    grid = image_grid(groups, captions)
    assert grid.shape[1] == 3 * (160 + 4)  # three side by side, each pixel four by four
    np.testing.assert_array_equal(grid[2:162:4, 2:162:4], groups[0][0])
    np.testing.assert_array_equal(grid[2:162:4, 166:326:4], groups[1][0])
    below = grid[164:, :]  # dark letters, under the long caption more than under the short one
    dark = [(below[:80, k * 164 : (k + 1) * 164] < 128).sum() for k in range(3)]
    assert 0 < dark[0] < dark[1]
    assert (grid[164:244, 326:330] == 255).all()  # which keeps to its own column
    # Of draws of classes some have several, most one: still about as many columns as rows.
    sizes = rng.permuted([1] * 270 + [2] * 50 + [3] * 8 + [4])
    drawn = image_grid([np.zeros((n, 64, 64, 3), np.uint8) for n in sizes], ["a"] * len(sizes))
    assert 0.7 < drawn.shape[0] / drawn.shape[1] < 1.5
    many = image_grid([rng.integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)] * 3, ["a"] * 3)
    assert many.shape[1] == 10 * 66 + 2  # ten pictures fill a line
