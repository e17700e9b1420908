"""`Sampler`: images from Python, of checkpoints, files and repositories."""

import json
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dico_jax import Sampler, diffusion
from dico_jax.checkpoints.reader import FOLDER
from dico_jax.checkpoints.writer import StepWriter
from dico_jax.config import DEFAULTS
from dico_jax.errors import UsageError
from dico_jax.experiment import model_from_config
from dico_jax.pytorch.conversion import from_pytorch, to_pytorch
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.image_folder import save
from dico_jax.sampling.pretrained import weights_size
from dico_jax.sampling.programs import Noise
from dico_jax.sampling.sampler import Images
from tests import golden

NAMES = [f"kind {i}" for i in range(10)]


def write_checkpoint(path, names=NAMES, words="", sections=None, **options):
    """A converted checkpoint of a small network with drawn weights, of grey pictures of 8 x 8."""
    config = ConfigDict(json.loads(json.dumps(DEFAULTS)))
    config.model.update(name="DiT", hidden_size=8, depth=1, num_heads=1, patch_size=4)
    with config.model.ignore_type():  # of depth
        config.model.update({"in_channels": 1, "num_classes": 10} | options)
    config.autoencoder.name, config.data.image_size = "identity", 8
    config.text.update({"encoder": "words", "words": words} if words else {})
    config.update(sections or {})
    config.sampling.update(num_steps=3, cfg_scale=2.0, cfg_channels="all")
    params = golden.drawn_params(model_from_config(config), 3, "A")
    path.mkdir()
    meta = {"config": json.loads(config.to_json_best_effort()), "class_names": list(names)}
    with StepWriter(path / FOLDER) as writer:
        writer.write(0, {"ema_params": params}, meta)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("made") / "ckpt")


@pytest.fixture(scope="module")
def sampler(checkpoint):
    return Sampler.from_pretrained(checkpoint)


@pytest.fixture
def compilations():
    """The number of compilations so far."""
    seen = []

    def note(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield lambda: len(seen)
    jax.monitoring.unregister_event_duration_listener(note)


def test_images_are_those_of_the_command(checkpoint, sampler):
    images = sampler(classes=["kind 3", 7], seed=5, num_images=4)
    assert (images.shape, images.dtype) == ((4, 8, 8, 1), np.uint8)
    of_command = CheckpointSampler(checkpoint, seed=5)
    wanted = np.concatenate([*of_command.images(of_command.conditions(4, classes="3,7"))])
    np.testing.assert_array_equal(images, wanted)
    assert (sampler([3, 7, 3, 7], seed=6) != images).any()
    pictures = images.pil()
    assert [picture.size for picture in pictures] == [(8, 8)] * 4
    np.testing.assert_array_equal(np.asarray(pictures[1]), images[1, ..., 0])
    assert len(images[2].pil()) == 1


def test_calls_of_one_shape_compile_once(checkpoint, compilations):
    sampler = Sampler.from_pretrained(checkpoint)
    first = sampler(classes=[1, 2])
    before = compilations()
    assert (sampler(classes=["kind 4", 2], cfg_scale=3.5, seed=1) != first).any()
    np.testing.assert_array_equal(sampler(classes=[1, 2]), first)
    sampler("random", num_images=2, cfg_scale=5, batch_size=2)
    assert compilations() == before
    sampler(classes=[1, 2], steps=2)
    assert compilations() > before  # so it would be seen


@pytest.mark.parametrize("options", [{"cfg_scale": 3.0}, {"solver": "dpmpp_2m"}])
def test_images_while_they_are_made(sampler, compilations, options):
    asked = {"classes": [1, 2], "num_images": 3, "steps": 5, "seed": 3} | options
    images = sampler(**asked)
    parts = list(sampler.stream(**asked, every=2))
    assert [step for step, _ in parts] == [2, 4, 5]
    assert all(isinstance(x, Images) and x.shape == images.shape for _, x in parts)
    apart = [np.abs(x.astype(int) - images).max() for _, x in parts]
    assert apart[-1] <= 1
    assert apart[0] > 1 or options == {"solver": "dpmpp_2m"}  # whose predictions are all clipped
    before = compilations()
    *_, (_, again) = sampler.stream(**asked | {"seed": 4, "classes": [0, 1]}, every=2)
    assert compilations() == before
    assert (again != images).any()
    with pytest.raises(UsageError, match=r"^every=0 must be"):
        next(sampler.stream(**asked, every=0))


@pytest.mark.parametrize("seeds", [(4, 4), (4, 9)])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_a_walk_goes_from_one_image_to_another(sampler, compilations, seeds, cfg_scale):
    how = {"cfg_scale": cfg_scale, "steps": 4}
    parts = list(sampler.walk(2, "kind 5", seeds=seeds, num_images=5, every=2, **how))
    assert [(step, images.shape) for step, images in parts] == [
        (2, (5, 8, 8, 1)),
        (4, (5, 8, 8, 1)),
    ]
    walked = parts[-1][1].astype(int)
    for place, of, seed in ((0, 2, seeds[0]), (-1, 5, seeds[1])):
        assert np.abs(walked[place] - sampler([of], seed=seed, **how)[0]).max() <= 1
    if seeds[0] != seeds[1]:  # each step of the way is shorter than all of it
        apart = np.abs(np.diff(walked, axis=0)).mean(axis=(1, 2, 3))
        assert (apart > 0).all()
        assert apart.max() < np.abs(walked[-1] - walked[0]).mean()
    before = compilations()
    list(sampler.walk(3, 7, seeds=[seed + 1 for seed in seeds], num_images=5, every=2, **how))
    assert compilations() == before


def test_a_mixture_of_classes_is_one_of_their_embeddings(sampler):
    model, params = sampler.pretrained.experiment.model, sampler.pretrained.params
    x, t, _ = model.example_inputs(3, side=8)
    x = x + np.float32(0.5)

    @jax.jit
    def of_mixture(shares):
        ends = ({"label": jnp.full(n, of)} for n, of in ((3, 2), (1, 5)))
        return model.apply({"params": params}, x, t, model.mixed_conditions(*ends, shares))

    def of_row(row):
        table = params["y_embedder"]["embedding_table"]["embedding"].at[0].set(row)
        changed = {**params, "y_embedder": {"embedding_table": {"embedding": table}}}
        return model.apply({"params": changed}, x[:1], t[:1], np.zeros(1, np.int32))[0]

    table = params["y_embedder"]["embedding_table"]["embedding"]
    wanted = [of_row(table[2]), of_row(0.75 * table[2] + 0.25 * table[5]), of_row(table[5])]
    found = of_mixture(np.float32([0, 0.25, 1]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-4


def test_noise_on_the_way_is_as_normal_as_its_ends():
    noise = Noise(np.uint32(1), np.arange(64), np.uint32(2), np.linspace(0, np.pi / 2, 64))
    shape = (16, 16, 4)
    drawn = np.asarray(noise.draw(lambda keys: diffusion.initial_noise(keys, shape)))
    assert drawn.std(axis=(1, 2, 3)) == pytest.approx(1, abs=0.1)
    for place, seed in ((0, 1), (-1, 2)):
        keys = diffusion.image_keys(np.uint32(seed), np.arange(64))
        of_end = np.asarray(diffusion.initial_noise(keys, shape))[place]
        np.testing.assert_allclose(drawn[place], of_end, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_images": 1}, "^num_images=1 must be at least 2"),
        ({"seeds": (0, -1)}, "^seed=-1 must be"),
        ({"end": "kind 99"}, "the model has no class kind 99"),
        ({"every": 0}, "^every=0"),
        ({"steps": 0}, "^steps=0"),
        ({"colour": 1}, "^colour=1 is no option of a sampler"),
    ],
)
def test_wrong_walks_are_refused(sampler, wrong, said):
    with pytest.raises(UsageError, match=said):
        next(sampler.walk(**{"start": 1, "end": 2} | wrong))


def test_programs_of_the_settings_used_last_are_kept(checkpoint, monkeypatch):
    monkeypatch.setattr("dico_jax.sampling.sampler._MOST_PROGRAMS", 2)
    sampler = Sampler.from_pretrained(checkpoint)
    for steps in (1, 2, 1, 3):
        list(sampler.stream([3], steps=steps))
    assert [json.loads(key.split("} ")[0] + "}")["num_steps"] for key in sampler._programs] == [
        1,
        3,
    ]


@pytest.mark.parametrize(("classes", "asked"), [(["kind 3", 7], "3,7"), ("all", "all")])
def test_so_many_of_each_class_are_those_of_the_command(
    sampler, checkpoint, tmp_path, classes, asked
):
    images = sampler(classes, seed=5, per_class=2)
    count = save(CheckpointSampler(checkpoint, seed=5), tmp_path, per_class=2, classes=asked)
    assert count == len(images) == (4 if asked == "3,7" else 20)
    files = sorted(tmp_path.glob("0*.png"))
    np.testing.assert_array_equal(images[..., 0], [np.asarray(Image.open(file)) for file in files])


def test_numbers_are_no_names(tmp_path):
    """Also where names are numbers; text that may be either is refused."""
    sampler = Sampler.from_pretrained(write_checkpoint(tmp_path / "c", ["10", "2", "1"]))
    wanted = sampler(["#2", "#1"])
    for classes in ([2, 1], (np.int64(2), 1), np.array([2, 1]), jnp.array([2, 1])):
        np.testing.assert_array_equal(sampler(classes), wanted)
    for classes in (2, np.int64(2), np.array(2), jnp.int32(2)):
        np.testing.assert_array_equal(sampler(classes), sampler("#2"))
    with pytest.raises(UsageError, match=r"2 may be each of classes \[1, 2\]"):
        sampler("2")


def test_numbers_of_numpy(sampler):
    asked = {"steps": 2, "seed": 3, "num_images": 2, "ddim_eta": 0.5, "solver": "ddim"}
    kinds = {int: np.int64, float: np.float32, str: str}
    numpys = {name: kinds[type(value)](value) for name, value in asked.items()}
    np.testing.assert_array_equal(sampler(**numpys), sampler(**asked))


def test_counts(sampler):
    assert sampler().shape[0] == 1
    assert sampler("kind 2").shape[0] == 1
    assert sampler("all", num_images=3, batch_size=2, solver="ddim", steps=2).shape[0] == 3
    assert sampler.classes[2] == "2 kind 2"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"classes": ["kind 11"]}, r"^classes=\['kind 11'\]: .*no class kind 11.*did you mean"),
        ({"classes": 10}, "^classes=10: .* no class 10"),
        ({"classes": []}, r"^classes=\[\] is empty"),
        ({"prompts": ["a cat"]}, r"^prompts=\['a cat'\]: DiT is told classes: give these"),
        ({"cfg_scale": -1}, "^cfg_scale=-1.* must be at least 0"),
        ({"cfg_scale": "x"}, "^cfg_scale='x' must be a number"),
        ({"solver": "dpm3"}, "^solver='dpm3' is unknown: use one of ddpm"),
        ({"steps": 2000}, "^steps=2000"),
        ({"steps": 0}, "^steps=0 must be at least 1"),
        ({"seed": -1}, "^seed=-1 must be at least 0"),
        ({"batch_size": 0}, "^batch_size=0 must be at least 1"),
        ({"num_images": 0}, "^num_images=0 must be at least 1"),
        ({"seed": 1.5}, "^seed=1.5 must be a whole number"),
        ({"seed": "1"}, "^seed='1' must be a whole number"),
        ({"seed": None}, "^seed=None must be a whole number"),
        ({"num_images": 2.0}, "^num_images=2.0 must be a whole number"),
        ({"num_images": True}, "^num_images=True must be a whole number"),
        ({"classes": 1, "per_class": 1.5}, "^per_class=1.5 must be a whole number"),
        ({"classes": "all", "per_class": 0}, "^per_class=0 must be at least 1"),
        ({"classes": "all", "per_class": 10**6}, "^per_class=1000000 must be at most 100000"),
        ({"classes": "random", "per_class": 2}, "^per_class=2 is for classes that are named, or"),
        ({"classes": 1, "per_class": 1, "num_images": 1}, "^per_class=1: num_images is given, too"),
        ({"classes": True}, "^classes=True: .* no class True"),
        ({"classes": 1.5}, "^classes=1.5: .* no class 1.5"),
        ({"classes": [-1]}, r"^classes=\[-1\]: .* no class -1"),
        ({"eta": 1}, "^eta=1 is no option of a sampler: it has .*ddim_eta"),
        ({"eta": None}, "^eta=None is no option of a sampler"),
        ({"steps": 2, "num_steps": 3}, "^num_steps=3 is no option of a sampler: it has .*steps"),
    ],
)
def test_what_is_refused(sampler, asked, message):
    with pytest.raises(UsageError, match=message) as raised:
        sampler(**asked)
    assert "\n" not in str(raised.value)


def test_prompts_are_texts_whatever_they_say(tmp_path):
    sizes = {"depth": (1, 1, 1, 1, 1), "text_length": 5, "text_width": 8, "pooled_width": 8,
             "text_layers": 1}  # fmt: skip
    sizes |= dict.fromkeys(("num_classes", "num_heads", "patch_size"))  # which it has none of
    path = write_checkpoint(tmp_path / "c", words="all random a one", name="TextDiCo", **sizes)
    sampler, how = Sampler.from_pretrained(path), {"steps": 1, "cfg_scale": 1, "batch_size": 2}
    wanted = sampler(prompts=["all", "random"], **how)
    for number, prompt in enumerate(("all", "random")):
        image = sampler(prompts=prompt, num_images=2, **how)[number]  # which is of its number, too
        np.testing.assert_array_equal(image, wanted[number])
    both = sampler(prompts=["all", "random"], per_class=2, **how)
    assert len(both) == 4
    for prompts, message in (
        (None, "^TextDiCo is told a text: give prompts"),
        ([3], r"^prompts=\[3\] must be texts"),
        ([("a", "one")], "^prompts=.* must be texts"),
        ([], r"^prompts=\[\] is empty"),
    ):
        with pytest.raises(UsageError, match=message):
            sampler(prompts=prompts, **how)
    with pytest.raises(UsageError, match="^classes=3: TextDiCo is told prompts"):
        sampler(3, **how)


def test_guidance_without_a_null_class(tmp_path):
    sampler = Sampler.from_pretrained(write_checkpoint(tmp_path / "c", class_dropout_prob=0.0))
    assert sampler(1, cfg_scale=1.0).shape[0] == 1
    with pytest.raises(UsageError, match="^cfg_scale=2.0 needs a model that was trained to do"):
        sampler(1)


def test_a_file_is_read_as_if_it_were_converted(checkpoint, tmp_path):
    file = tmp_path / "net.safetensors"
    to_pytorch(checkpoint, file)
    from_pytorch(file, tmp_path / "converted")
    for name in ("net.safetensors", "net.pt"):
        to_pytorch(checkpoint, tmp_path / name) if name != "net.safetensors" else None
        images, wanted = (
            Sampler.from_pretrained(tmp_path / path)(classes=[1, 2], steps=2)
            for path in (name, "converted")
        )
        np.testing.assert_array_equal(images, wanted)
    settings = CheckpointSampler(file).about()
    assert settings["ckpt"] == str(file)
    assert len(settings["weights_digest"]) == 64
    with pytest.raises(UsageError, match=r"^step=3: .*net.pt is a file, which has no steps"):
        Sampler.from_pretrained(tmp_path / "net.pt", step=3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes.txt"):
        Sampler.from_pretrained(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="^source=.*/none': no such folder"):
        Sampler.from_pretrained(tmp_path / "none")


def test_repositories(checkpoint, tmp_path, monkeypatch):
    repositories = {}
    asked = []

    class Hub:
        @staticmethod
        def list_repo_files(repo, revision=None):
            asked.append((repo, revision))
            folder = repositories[repo]
            return [
                os.path.relpath(os.path.join(at, name), folder)
                for at, _, names in os.walk(folder) for name in names
            ]  # fmt: skip

        @staticmethod
        def snapshot_download(repo, revision=None, allow_patterns=(), ignore_patterns=()):
            assert allow_patterns == ["config.json", "checkpoints/0/*"]
            return str(repositories[repo])

        @staticmethod
        def hf_hub_download(repo, name, revision=None):
            asked.append((repo, name, revision))
            return str(repositories[repo] / name)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    (tmp_path / "one").mkdir()
    to_pytorch(checkpoint, tmp_path / "one" / "net.safetensors")
    shutil.copy(tmp_path / "one" / "net.safetensors", tmp_path / "one" / "net.pt")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.copy(tmp_path / "one" / "net.safetensors", tmp_path / "two" / "other.safetensors")
    (tmp_path / "empty").mkdir()
    repositories |= {f"me/{name}": tmp_path / name for name in ("one", "two", "empty")}
    repositories["me/run"] = checkpoint
    wanted = Sampler.from_pretrained(tmp_path / "one" / "net.safetensors")([1, 2], steps=2)
    for address in ("hf://me/one", "hf://me/one@v1", "hf://me/two@v2/other.safetensors"):
        images = Sampler.from_pretrained(address)([1, 2], steps=2)
        np.testing.assert_array_equal(images, wanted)
    assert asked[-1] == ("me/two", "other.safetensors", "v2")
    assert ("me/one", "v1") in asked
    assert ("me/one", "net.safetensors", "v1") in asked
    sampler = Sampler.from_pretrained("hf://me/run/")
    assert sampler.pretrained.class_names == NAMES
    assert sampler.pretrained.settings["ckpt"] == "hf://me/run/"
    for address, message in (
        ("hf://me/two", "several files of weights: net.safetensors, other.safetensors; name one"),
        ("hf://me/empty", "neither files of weights nor checkpoints/STEP"),
        ("hf://me/no", "hf://me/no: it cannot be downloaded: 'me/no'"),
        ("hf://me", "write hf://OWNER/REPO"),
    ):
        with pytest.raises(UsageError, match=message):
            Sampler.from_pretrained(address)


def test_the_size_of_weights_is_that_of_what_is_read(checkpoint, tmp_path):
    files = {"a-00001-of-00002.safetensors": 3000, "a-00002-of-00002.safetensors": 5000}
    for name, size in files.items():
        (tmp_path / name).write_bytes(b"x" * size)
    index = tmp_path / "a.safetensors.index.json"
    first, second = files
    index.write_text(json.dumps({"weight_map": {"p": first, "q": second, "r": first}}))
    assert weights_size(index) == 8000 + index.stat().st_size
    assert weights_size(tmp_path / first) == 3000
    assert weights_size(None) == weights_size(tmp_path / "nothing") == 0
    written = checkpoint / FOLDER / "0" / "ema_params"
    stored = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
    assert weights_size(checkpoint) == stored


def test_a_guide_is_a_weaker_network_of_the_same_latents(checkpoint, sampler, tmp_path):
    narrow = write_checkpoint(tmp_path / "narrow", hidden_size=4)
    guided = Sampler.from_pretrained(checkpoint, guide=narrow)
    itself = Sampler.from_pretrained(checkpoint, guide=checkpoint)
    asked = {"classes": [1, 2], "seed": 3}
    plain = sampler(**asked, cfg_scale=1.0)
    assert ((images := guided(**asked, cfg_scale=3.0)) != plain).any()
    *_, (_, streamed) = guided.stream(**asked, cfg_scale=3.0)
    assert np.abs(np.int32(streamed) - np.int32(images)).max() <= 1
    np.testing.assert_array_equal(guided(**asked, cfg_scale=1.0), plain)
    # Away from itself leads nowhere else.
    assert np.abs(np.int32(itself(**asked, cfg_scale=3.0)) - np.int32(plain)).max() <= 1
    assert guided.pretrained.settings["guide"] != itself.pretrained.settings["guide"]
    # A guide needs no null class.
    without = write_checkpoint(tmp_path / "without", class_dropout_prob=0.0)
    Sampler.from_pretrained(without, guide=narrow)(**asked, cfg_scale=3.0)
    # How it was trained, and how its images would be decoded, is its own affair.
    weak, trained = tmp_path / "weak", {"min_snr_gamma": 5.0}
    write_checkpoint(weak, sections={"diffusion": trained, "autoencoder": {"tile_size": 16}})
    Sampler.from_pretrained(checkpoint, guide=weak)
    other = write_checkpoint(tmp_path / "other", in_channels=3)
    cosine = {"diffusion": {"noise_schedule": "squaredcos_cap_v2"}}
    cosine = write_checkpoint(tmp_path / "cosine", sections=cosine)
    for wrong, message in (
        ({"guide": other}, r"^guide=.*has latents \(8, 8, 3\), and --ckpt \(8, 8, 1\)"),
        ({"guide": cosine}, r"has diffusion.noise_schedule squaredcos_cap_v2, and --ckpt linear"),
        ({"guide": tmp_path / "no"}, "^guide='.*/no': no such folder"),
        ({"guide": narrow, "guide_step": 9}, "^guide_step=9: .* has steps 0"),
        ({"guide_step": 2}, "^guide_step=2 is that of --guide"),
    ):
        with pytest.raises(UsageError, match=message):
            Sampler.from_pretrained(checkpoint, **wrong)
