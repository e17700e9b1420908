"""What a folder of images gets, keeps and makes again; the sampler is one of plain arithmetic."""

import errno
import types

import numpy as np
import pytest

from dico_jax.errors import UsageError
from dico_jax.models import create_model
from dico_jax.sampling import image_folder
from dico_jax.sampling.generate import NotFiniteError
from dico_jax.sampling.grids import load_png
from dico_jax.sampling.image_folder import save


class Sampler:
    """Images of which every pixel is the number of the image; latents that number plus one."""

    class_names = ()

    def __init__(self, with_latents=False, at_a_time=4, fails_at=None, bad=(), num_classes=10):
        model = create_model("DiCo", num_classes=num_classes)
        self.experiment = types.SimpleNamespace(model=model, latent_shape=(2, 2, 1))
        self.with_latents, self.made, self._n = with_latents, [], at_a_time
        self._fails_at, self._bad = fails_at, bad

    def about(self, **asked):
        return {"seed": 0, **asked}

    def default_number(self, **asked):
        return 6

    def conditions(self, num_images, classes="all"):
        return self.experiment.model.parse_conditions(classes, num_images, 0)

    def batches(self, conditions, indices, progress):
        for first in range(0, len(indices), self._n):
            part = np.array(indices[first : first + self._n])
            if self._fails_at in part:
                raise KeyboardInterrupt
            self.made += part.tolist()
            images = np.broadcast_to(
                part[:, None, None, None].astype(np.uint8), (len(part), 8, 8, 1)
            )
            latents = np.broadcast_to(part[:, None, None, None] + 1.0, (len(part), 2, 2, 1))
            progress(len(part))
            yield part, images, ~np.isin(part, self._bad), *([latents] * self.with_latents)


def images_in(folder):
    return {file.name: int(load_png(file).mean()) for file in sorted(folder.glob("0*.png"))}


def test_images_are_made_once(tmp_path):
    assert save(Sampler(), str(tmp_path)) == 6
    assert images_in(tmp_path) == {f"{i:06d}.png": i for i in range(6)}
    (tmp_path / "000002.png").unlink()
    again = Sampler()
    assert save(again, str(tmp_path), num_images=8) == 8
    assert again.made == [2, 6, 7]


def test_a_full_disk_in_a_thread_leaves_what_is_finished(tmp_path, monkeypatch):
    write = image_folder.save_png

    def full(stream, image):
        if image.mean() == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stream, image)

    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "save_png", full)
        with pytest.raises(UsageError, match=r"000005.png cannot be written: No space left"):
            save(Sampler(), str(tmp_path), num_images=100)
    assert {"000000.png", "000003.png"} <= set(images_in(tmp_path))
    assert not list(tmp_path.glob(".*"))
    again = Sampler()
    save(again, str(tmp_path), num_images=100)
    assert again.made[0] in (4, 5)  # a thread that had it may have written image 4
    assert len(images_in(tmp_path)) == 100


def test_an_interruption_leaves_what_is_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        save(Sampler(fails_at=9), str(tmp_path), num_images=20)
    assert len(images_in(tmp_path)) >= 4
    save(again := Sampler(), str(tmp_path), num_images=20)
    assert set(again.made) >= set(range(8, 20))


@pytest.mark.parametrize("bad", [[0], range(4), range(63), [5, 17]])
def test_bad_images_do_not_stop_the_others(tmp_path, bad):
    good = sorted(set(range(80)) - set(bad))
    for made in (range(80), bad):  # and again where all that lack are bad
        sampler = Sampler(at_a_time=1, bad=bad)
        with pytest.raises(NotFiniteError, match=f"^{len(bad)} of {len(made)} images are not fin"):
            save(sampler, str(tmp_path), num_images=80)
        assert sampler.made == [*made]
        assert [*images_in(tmp_path).values()] == good
    with pytest.raises(NotFiniteError, match="^3 of 3 images"):  # few are all tried
        save(Sampler(at_a_time=1, bad=range(3)), str(tmp_path / "few"), num_images=3)


def test_more_bad_images_than_one_call_would_try_do_not_stop_the_others_either(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        save(Sampler(bad=range(8, 100), fails_at=100), str(tmp_path), num_images=120)
    with pytest.raises(NotFiniteError, match="^92 of 112 images"):
        save(Sampler(bad=range(8, 100)), str(tmp_path), num_images=120)
    assert [*images_in(tmp_path).values()] == [*range(8), *range(100, 120)]


def test_where_none_of_many_is_finite_the_rest_is_not_tried(tmp_path):
    sampler = Sampler(at_a_time=5, bad=range(1000))
    with pytest.raises(NotFiniteError, match="^65 of 65 images are not finite"):
        save(sampler, str(tmp_path), num_images=1000)
    assert sampler.made == [*range(65)]


def test_latents_beside_images(tmp_path):
    save(Sampler(with_latents=True), str(tmp_path), num_images=5)
    latents = np.load(tmp_path / "latents.npy")
    assert (latents.dtype, latents.shape) == (np.float32, (5, 2, 2, 1))
    assert latents[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    # They go on with the images; a row that a power cut has left empty is made again.
    rows = np.load(tmp_path / "latents.npy", mmap_mode="r+")
    rows[3] = 0
    rows.flush()
    save(again := Sampler(with_latents=True), str(tmp_path), num_images=100)
    assert again.made == [3, *range(5, 100)]
    assert np.load(tmp_path / "latents.npy")[:, 1, 1, 0].tolist() == list(range(1, 101))
    save(fewer := Sampler(with_latents=True), str(tmp_path), num_images=2)
    assert (len(np.load(tmp_path / "latents.npy")), fewer.made) == (100, [])
    # Of images without latents they are made with the images.
    (tmp_path / "latents.npy").write_bytes(b"damaged")
    save(again := Sampler(with_latents=True), str(tmp_path), num_images=2)
    assert again.made == [0, 1]


@pytest.mark.parametrize(
    ("number", "asked", "shown", "title"),
    [
        (100, {}, [10] * 10, ""),
        (7, {"classes": "3"}, [7], ""),
        (400, {"classes": "1,2"}, [200, 200], ""),
        (401, {"classes": "1,2"}, [200, 200], "400 of 401 images"),
        (1001, {"classes": "5,#6,7"}, [133] * 3, "399 of 1,001 images"),
        (1300, {"classes": ",".join(map(str, range(1000)))}, [1] * 1000, "1,000 of 1,300 images"),
        (1300, {"classes": ",".join(map(str, range(1300)))}, [1] * 1024, "1,024 of 1,300 images"),
    ],
)
def test_what_is_in_the_grid(tmp_path, monkeypatch, number, asked, shown, title):
    seen = []
    monkeypatch.setattr(image_folder, "load_png", lambda file: np.full((8, 8, 1), 3, np.uint8))
    grid = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(image_folder, "image_grid", lambda *args: seen.append(args) or grid)
    sampler = Sampler(at_a_time=500, num_classes=2000 if number == 1300 else 10)
    save(sampler, str(tmp_path), num_images=number, **asked)
    ((groups, names, said),) = seen
    assert ([*map(len, groups)], said) == (shown, title)
    wanted = asked.get("classes", "0,1,2,3,4,5,6,7,8,9").replace("#", "").split(",")
    assert names == wanted[: len(shown)]


def test_folders_of_versions_with_fewer_fields_go_on():
    was = {"sampling": {"sampler": "ddpm", "cfg_scale": 1.4}, "seed": 0}
    now = {"sampling": {"sampler": "ddpm", "cfg_scale": 1.4, "spacing": "linear"}, "seed": 0}
    assert not image_folder.differences(was, now)
    now["sampling"]["spacing"] = "karras"
    assert image_folder.differences(was, now) == "sampling.spacing was linear, is karras"
