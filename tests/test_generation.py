"""Images depend on (seed, index, label) and on nothing else; grids; the digits' judge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dico_jax.autoencoders import Autoencoder, create_autoencoder, to_uint8
from dico_jax.autoencoders.weights import Weights
from dico_jax.config import DEFAULTS
from dico_jax.diffusion import SOLVERS, SamplingOptions, create_diffusion
from dico_jax.diffusion.solvers import Ddim
from dico_jax.errors import UsageError
from dico_jax.evaluation.networks import class_agreement, mean_pairwise_distance
from dico_jax.models import create_model
from dico_jax.parallel.mesh import create_mesh
from dico_jax.parallel.sharding import state_sharding
from dico_jax.sampling.generate import NotFiniteError, generate_images, make_generate_fn
from dico_jax.sampling.grids import image_grid, load_png, save_png
from dico_jax.sampling.programs import make_latents_fn, steps_at_a_time
from tests import golden


def autoencoder(name):
    return create_autoencoder(ConfigDict(DEFAULTS["autoencoder"] | {"name": name}))


@functools.cache
def generator(mesh, width=8, **options):
    """A function that makes images, and parameters for it."""
    model = create_model("DiCo", hidden_size=width, depth=(1,) * 5, in_channels=1, num_classes=10)
    generate = make_generate_fn(
        model,
        create_diffusion("4"),
        autoencoder("identity"),
        (8, 8, 1),
        SamplingOptions(cfg_channels="all", **options),
        mesh,
    )
    params = golden.drawn_params(model, 3, "A")
    return generate, jax.device_put(params, state_sharding(params, mesh))


def make_images(num_devices, batch_size, num_images=10, seed=0, mesh=None, **options):
    mesh = create_mesh(jax.devices()[:num_devices]) if mesh is None else mesh
    generate, params = generator(mesh, seed=seed, **options)
    labels = np.arange(num_images) % 10
    batches = list(generate_images(generate, params, labels, batch_size, num_devices))
    assert max(map(len, batches)) <= -(-batch_size // num_devices) * num_devices
    return np.concatenate(batches)


def test_an_image_is_the_same_whatever_the_batch_and_the_devices():
    images = make_images(1, 10)
    assert images.shape == (10, 8, 8, 1)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    for num_devices, batch_size in [(1, 1), (1, 3), (8, 8), (4, 6)]:
        np.testing.assert_array_equal(make_images(num_devices, batch_size), images)
    np.testing.assert_array_equal(make_images(1, 10, num_images=10), images)
    assert (make_images(1, 10, seed=1) != images).mean() > 0.3


def test_how_far_a_batch_is_can_be_seen():
    """And what is told of all batches, the last of which is not full, are all images."""
    mesh = create_mesh(jax.devices()[:2])
    generate, params = generator(mesh, seed=0)
    told = []
    images = generate_images(generate, params, np.arange(10), 4, 2, progress=told.append)
    assert len(next(images)) == 4
    assert told in ([1.0] * 4, [1.0] * 8)  # of 4 images in 4 steps, or the next ones as well
    assert sum(map(len, images)) == 6
    assert told == [1.0] * 8 + [0.5] * 4


def test_steps_are_done_in_equal_parts():
    found = {count: steps_at_a_time(count) for count in (1, 4, 15, 24, 30, 50, 64, 97, 250)}
    assert found == {1: 1, 4: 1, 15: 1, 24: 2, 30: 2, 50: 5, 64: 4, 97: 97, 250: 25}


def test_parts_of_a_batch_are_shares_of_it():
    model = create_model("DiCo", hidden_size=8, depth=(1,) * 5, in_channels=1, num_classes=10)
    objective, options = create_diffusion("24"), SamplingOptions(cfg_channels="all")
    how = autoencoder("identity"), (8, 8, 1), options, create_mesh(jax.devices()[:1])
    generate, marks = make_generate_fn(model, objective, *how), []
    params, index = golden.drawn_params(model, 3, "A"), np.arange(20, dtype=np.int32)
    images, _ = generate(
        params, index, index % 10, mark=lambda *one: marks.append((*one, one[0].is_ready()))
    )
    assert [share for _, share, _ in marks] == [1 / 24] * 24  # of 16 images and the rest, 12 times
    # Programs of several devices that are sent ahead on a CPU can wait for each other for ever.
    assert all(ready for *_, ready in marks)
    sample = make_latents_fn(model, objective, (8, 8, 1), options)
    whole = to_uint8(jax.jit(sample)(params, index, index % 10))
    assert np.abs(images.astype(int) - np.asarray(whole, int)).max() <= 1


@dataclasses.dataclass(frozen=True)
class Counting(Ddim):
    """A solver whose carry also has what is no row of an image."""

    def init(self, path, x):
        return x, jnp.zeros((), jnp.int32)

    def step(self, path, carry, i, noise):
        x, point = super().step(path, carry[0], i, noise)
        return (x, carry[1] + 1), point

    def end(self, path, carry):
        return jnp.where(carry[1] == path.objective.num_steps, carry[0], jnp.nan)


def test_a_solver_has_a_carry_of_its_own(monkeypatch):
    monkeypatch.setitem(SOLVERS, "counting", Counting)
    for devices in (1, 2):
        images = make_images(devices, 10, sampler="counting")
        np.testing.assert_array_equal(images, make_images(devices, 10, sampler="ddim"))


@pytest.mark.parametrize("width", [64, 128])
def test_an_image_of_a_wide_network_is_the_same_whatever_the_batch_and_the_devices(width):
    """Sums of hundreds, which libraries cut into parts by the number of rows."""
    options = {"width": width, "num_images": 64, "sampler": "ddim"}
    images = make_images(1, 64, **options)
    for num_devices, batch_size in [(1, 7), (2, 64), (4, 64)]:
        again = make_images(num_devices, batch_size, **options)
        np.testing.assert_array_equal(again, images, f"{num_devices} devices, {batch_size}")


@pytest.mark.slow
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", sorted(set(SOLVERS) - {"jump"}))
def test_an_image_is_the_same_with_every_solver(sampler, cfg_scale, monkeypatch):
    # As users compile: with the tests' hurry one value in thousands is rounded otherwise.
    usual = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": False}
    monkeypatch.setattr("dico_jax.sampling.programs.compiler_options", lambda platform: usual)
    generator.cache_clear()
    options = {"sampler": sampler, "cfg_scale": cfg_scale, "num_images": 64, "width": 64}
    images = make_images(1, 64, **options)
    for num_devices in (1, 2, 4, 8):
        for batch_size, count in ((1, 9), (7, 21), (64, 64)):  # one by one they take long
            again = make_images(num_devices, batch_size, **options | {"num_images": count})
            said = f"{num_devices} devices, {batch_size}"
            np.testing.assert_array_equal(again, images[:count], said)


@pytest.mark.slow
@pytest.mark.parametrize(("fsdp", "tensor"), [(2, 2), (4, 2), (8, 1)])
def test_devices_that_share_the_weights_make_the_same_images(fsdp, tensor):
    images = make_images(1, 16, num_images=16)
    again = make_images(8, 16, num_images=16, mesh=create_mesh(fsdp=fsdp, tensor=tensor))
    assert np.abs(again.astype(int) - images).max() <= 1
    assert np.mean(again != images) < 0.01


def test_options_matter():
    images = make_images(1, 10)
    for options in ({"cfg_scale": 3.0}, {"sampler": "ddim"}, {"sampler": "ddim", "ddim_eta": 1.0}):
        assert (make_images(1, 10, **options) != images).any(), options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "plms"}, "sampling.sampler='plms' is unknown: use one of ddpm, ddim"),
        ({"cfg_channels": "two"}, "sampling.cfg_channels='two' is unknown: use 'first_three'"),
        ({"sampler": "ddim", "ddim_eta": 2.0}, r"sampling.ddim_eta=2.0 must be from 0 .* to 1"),
        ({"cfg_scale": float("nan")}, "sampling.cfg_scale=nan must be at least 0"),
        ({"cfg_scale": float("inf")}, "sampling.cfg_scale=inf must be at least 0 and finite"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        SamplingOptions(**options)


def without_class(params, label):
    """Parameters with NaN for one class."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[label].set(np.nan) if "y_embedder" in str(path) else x, params
    )


def test_images_that_are_not_finite_are_counted_and_never_shown():
    generate, params = generator(create_mesh(jax.devices()[:1]), seed=0)
    params, labels, seen = without_class(params, 3), np.arange(10), []
    with pytest.raises(NotFiniteError, match=r"^1 of 2 images are not finite \(3\): "):
        seen.extend(generate_images(generate, params, labels, 2, 1))
    assert len(seen) == 1
    assert np.array_equal(seen[0], make_images(1, 2)[:2])


@pytest.mark.parametrize("labels", [[0, 10], [-1], [[1]], [1.5], []])
def test_labels_that_a_model_does_not_have_are_refused(labels):
    model = create_model("DiCo", num_classes=10, class_dropout_prob=0.0)
    with pytest.raises(UsageError, match=r"labels, .*: integers \(N,\) from 0 to 9 are expected"):
        model.as_condition(np.array(labels))
    assert model.as_condition([3, 9])["label"].tolist() == [3, 9]


def test_guidance_needs_a_null_class():
    model = create_model("DiCo", hidden_size=8, depth=(1,) * 5, class_dropout_prob=0.0)
    with pytest.raises(UsageError, match=r"sampling.cfg_scale=2.0 needs .* use sampling.cfg_scale"):
        make_generate_fn(
            model, create_diffusion("4"), autoencoder("identity"), (8, 8, 4),
            SamplingOptions(cfg_scale=2.0), create_mesh(),
        )  # fmt: skip


def test_classes():
    def labels(text, num_images, seed=0, num_classes=10):
        model = create_model("DiCo", num_classes=num_classes)
        return model.parse_conditions(text, num_images, seed)["label"]

    np.testing.assert_array_equal(labels("all", 5, num_classes=3), [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(labels("7,2", 3), [7, 2, 7])
    drawn = labels("random", 1000)
    assert set(drawn) == set(range(10))
    np.testing.assert_array_equal(labels("random", 500), drawn[:500])
    assert (labels("random", 1000, seed=1) != drawn).any()


def test_a_number_that_is_the_name_of_another_class_is_refused():
    model = create_model("DiCo", num_classes=4)

    def labels(text, names):
        return model.parse_conditions(text, 1, 0, names)["label"].tolist()

    assert labels("2", ["0", "1", "2", "3"]) == [2]
    old = ["0", "1", "10", "2"]  # as runs of before order the names of classes
    assert (labels("1", old), labels("10", old), labels("#2", old)) == ([1], [2], [2])
    with pytest.raises(UsageError, match=r"--classes=2: 2 may be .* \[2, 3\]: write #2,"):
        labels("2", old)
    assert labels("cat", ["dog", "cat"]) == [1]
    assert labels("3", ["dog", "cat"]) == [3]  # of no name
    assert labels("a, b", ["a", "a, b", "b"]) == [1]  # the longest name counts
    assert model.parse_conditions("b , a", 2, 0, ["a", "a, b", "b"])["label"].tolist() == [2, 0]
    with pytest.raises(UsageError, match=r"--classes=crane: .* \[0, 2\]: write #0,"):
        labels("crane", ["crane", "x", "crane"])  # ImageNet has such


def test_to_uint8_cuts_as_the_released_code_does():
    values = np.float32([-2, -1, -0.9999, 0, 0.999, 1, 2])
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 0, 128, 255, 255, 255])
    assert int(to_uint8(np.float32([0.5 / 127.5]))[0]) == 128


@pytest.mark.parametrize("load", [True, False])
def test_the_autoencoders_weights_are_an_argument(load):
    """And are on the devices once; without `load` they are read for the first images."""
    loaded, decoded = [], []

    def weights():
        loaded.append(True)
        return Weights({"gain": np.float32([0.5])})

    def decode(params, latents):
        decoded.append(params["gain"])
        return latents * params["gain"]

    generate = make_generate_fn(
        create_model("DiCo", hidden_size=8, depth=(1,) * 5, in_channels=1, num_classes=10),
        create_diffusion("2"),
        Autoencoder("half", 1, 1, decode=decode, load=weights),
        (8, 8, 1),
        SamplingOptions(cfg_channels="all"),
        create_mesh(jax.devices()[:2]),
        load=load,
    )
    assert len(loaded) == load
    model = create_model("DiCo", hidden_size=8, depth=(1,) * 5, in_channels=1, num_classes=10)
    params, indices = golden.drawn_params(model, 3, "A"), np.arange(2, dtype=np.int32)
    for _ in range(2):
        images, finite = generate(params, indices, indices)
    assert images.shape == (2, 8, 8, 1)
    assert finite.all()
    assert len(loaded) == len(decoded) == 1
    assert isinstance(decoded[0], jax.core.Tracer)


def test_grids_and_png_files(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8) for n in (3, 2)]
    grid = image_grid(rows, ["0", "a long name"])
    assert grid.shape[0] > 2 * (64 + 12)
    assert grid.shape[1] == 3 * (64 + 2) + 2
    # The last image of the first row is at the right edge, each pixel enlarged to 8 x 8.
    cell = grid[2 : 2 + 64, -66:-2, 0]
    np.testing.assert_array_equal(cell[::8, ::8], rows[0][2, ..., 0])
    for shape in ((8, 8, 1), (8, 8, 3)):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        save_png(tmp_path / "x.png", image)
        np.testing.assert_array_equal(load_png(tmp_path / "x.png"), image)


@pytest.mark.parametrize(
    ("groups", "each", "columns", "rows"),
    [(100, 1, 10, 10), (10, 10, 10, 10), (7, 3, 6, 4), (2, 50, 10, 10), (400, 1, 20, 20)],
)
def test_grids_show_every_image_in_about_as_many_rows_as_columns(groups, each, columns, rows):
    images = np.full((each, 64, 64, 3), 9, np.uint8)
    grid = image_grid([images] * groups, ["crane"] * groups, "a title")
    side = 128 if each == 1 else 64
    shown = (grid == 9).all(-1).astype(int)
    assert shown.sum() >= groups * each * side**2
    assert (np.diff(shown, axis=1, prepend=0) == 1).sum(axis=1).max() == columns
    assert (np.diff(shown, axis=0, prepend=0) == 1).sum(axis=0).max() == rows


def test_large_pictures_are_shrunk_in_a_grid():
    grid = image_grid([np.zeros((20, 600, 300, 1), np.uint8)] * 20, [""] * 20)
    assert grid.shape[1] == 20 * (128 + 2) + 2


def test_the_judge_knows_real_from_shuffled_and_spread_from_collapse():
    from dico_jax.data.pictures import PictureReader
    from dico_jax.data.sources import create_source

    source = create_source(ConfigDict(DEFAULTS["data"] | {"source": "digits"}))
    digits, read = list(source), PictureReader(8, 1)
    real = np.stack([example["image"] for example in digits])
    real_labels = np.array([example["label"] for example in digits])
    images, labels = real[:500], real_labels[:500]
    good = class_agreement(images, labels, source, read)
    assert good.classifier_accuracy >= 0.97
    assert good.agreement > 0.98
    assert 0.9 < good.spread < 1.1
    wrong = class_agreement(images, np.roll(labels, 1), source, read)
    assert wrong.agreement < 0.3
    means = np.stack([real[real_labels == c].mean(0) for c in range(10)])
    noise = np.random.default_rng(0).integers(0, 30, images.shape)
    collapsed = np.clip(means[labels] + noise, 0, 255).astype(np.uint8)
    assert class_agreement(collapsed, labels, source, read).spread < 0.5


def test_mean_pairwise_distance():
    x = np.array([[0.0, 0], [3, 4], [0, 0]])
    np.testing.assert_allclose(mean_pairwise_distance(x), (5 + 0 + 5) / 3)
