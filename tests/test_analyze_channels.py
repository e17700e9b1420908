"""`analyze channels`: its measures against plain NumPy, planted channels, the command."""

import copy
import dataclasses
import functools
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dico_jax.analysis import channels
from dico_jax.analysis.measures import NOTHING, channel_measures, merged, moments, radial_power
from dico_jax.analysis.subjects import give_images, open_subjects
from dico_jax.errors import UsageError
from dico_jax.models import abstract_params
from dico_jax.parallel.mesh import create_mesh
from dico_jax.pytorch.conversion import from_pytorch
from tests import golden
from tests.commands import assert_refused, call
from tests.test_sampler import write_checkpoint

pytest.importorskip("matplotlib")

DICO = {"name": "DiCo", "hidden_size": 8, "depth": (1, 1, 1, 1, 2), "num_heads": None}
DICO |= {"patch_size": None, "mlp_ratio": 1.0}
HOW = {"step": None, "ema_width": None, "vae": None, "overrides": {"batch_size": 8}, "seed": 3}


@pytest.fixture(scope="module")
def dico(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("made") / "dico", **DICO)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("made") / "dit", depth=2, num_heads=2)


def opened(ckpt, layers=(), num_times=2, count=12, devices=1):
    how = HOW | {"mesh": create_mesh(jax.devices()[:devices])}
    (subject,) = open_subjects([str(ckpt)], "samples", num_times, layers, how)
    give_images(subject, "samples", count, {})
    return subject


@pytest.fixture(scope="module")
def subject(dico):
    return opened(dico, devices=8)


@pytest.fixture(scope="module")
def measured(subject):
    return channels.measure(subject)


def changed(subject, layers, **sampler):
    """The same images, other blocks and attributes of the sampler."""
    other = copy.copy(subject.sampler)
    vars(other).update(sampler)
    return dataclasses.replace(subject, layers=tuple(layers), sampler=other)


def plain(features):
    """The measures of features (N, ..., C), in NumPy as docs/analysis.md says them."""
    rows = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    covariance = np.cov(rows, rowvar=False, bias=True)
    deviations = rows.std(axis=0)
    alive = deviations > 0.01 * np.sqrt(np.mean(deviations**2))
    correlation = np.abs(np.corrcoef(rows[:, alive], rowvar=False))
    off = correlation[~np.eye(alive.sum(), dtype=bool)]
    share = np.linalg.eigvalsh(covariance)
    share = np.maximum(share, 0) / np.maximum(share, 0).sum()
    score = np.maximum(rows, 0).mean(axis=0)
    p = score / score.sum()
    return {
        "dead_share": np.mean(~alive),
        "mean_abs_correlation": off.mean(),
        "effective_rank": (rank := np.exp(-np.sum(share * np.log(share + 1e-300)))),
        "effective_rank_share": rank / features.shape[-1],
        "score_entropy": -np.sum(p * np.log(p + 1e-300)) / np.log(len(p)),
    }, score


def streamed(features, size=5):
    found = NOTHING
    for first in range(0, len(features), size):
        part = features[first : first + size]
        weights = np.ones(len(part), np.float32)
        found = merged(found, jax.tree.map(np.asarray, moments(part, weights)))
    return found


def test_measures_of_batches_are_those_of_all_rows():
    rng = np.random.default_rng(0)
    features = rng.normal(100, 1, (17, 3, 3, 6)) @ rng.normal(size=(6, 6))  # a large common offset
    features[..., 2] *= 1e-4
    features = features.astype(np.float32)
    expected, score = plain(features)
    found = streamed(features)
    assert channel_measures(found) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(found.score, score, rtol=1e-5)
    assert found.rows == 17 * 9
    assert channel_measures(streamed(features[::-1], 4)) == pytest.approx(expected, rel=1e-5)
    permuted = channel_measures(streamed(features[..., ::-1]))
    assert permuted == pytest.approx(expected, rel=1e-5)
    assert channel_measures(streamed(7 * features)) == pytest.approx(expected, rel=1e-5)


def test_images_of_no_weight_do_not_count():
    features = np.random.default_rng(0).normal(size=(6, 4, 5)).astype(np.float32)
    weights = np.float32([1, 1, 1, 1, 0, 0])
    found = merged(NOTHING, jax.tree.map(np.asarray, moments(features, weights)))
    assert channel_measures(found) == pytest.approx(plain(features[:4])[0], rel=1e-5)


def test_layers_without_signal_have_numbers_or_none():
    nothing = channel_measures(streamed(np.zeros((3, 4, 5), np.float32)))
    assert nothing["dead_share"] == 1
    assert nothing["mean_abs_correlation"] is None
    assert nothing["effective_rank"] == nothing["score_entropy"] == 0
    one = np.zeros((3, 4, 5), np.float32)
    one[..., 1] = np.arange(12).reshape(3, 4)
    found = channel_measures(streamed(one))
    assert found == {
        "dead_share": pytest.approx(0.8),
        "mean_abs_correlation": None,
        "effective_rank": pytest.approx(1),
        "effective_rank_share": pytest.approx(0.2),
        "score_entropy": pytest.approx(0),
    }


def test_the_spectrum_of_waves_and_of_white_noise():
    x = np.mgrid[:8, :8][1]
    wave = np.sqrt(2) * np.cos(2 * np.pi * 3 * x / 8)[None, :, :, None]
    power = radial_power(wave)
    rings = np.rint(np.hypot(*np.meshgrid(*[np.fft.fftfreq(8, 1 / 8)] * 2))).astype(int)
    expected = [64 / np.sum(rings == k) if k == 3 else 0 for k in range(5)]
    np.testing.assert_allclose(power, expected, atol=1e-12)
    noise = np.random.default_rng(0).normal(size=(200, 8, 8, 2))
    np.testing.assert_allclose(radial_power(noise), 1, atol=0.1)
    np.testing.assert_allclose(radial_power(2 * noise), 4 * radial_power(noise))
    assert radial_power(noise[:, :4]).shape == (3,)


def captured(subject, point):
    """What flax captures of modules, by path, and the outputs, of all images noised to a point."""
    model, params = subject.sampler.experiment.model, subject.sampler.params
    apply = jax.jit(functools.partial(model.apply, capture_intermediates=True))
    found = []
    for x, told, weights in subject.batches(point):
        t = np.full(len(x), subject.times[point - 1], np.float32)
        output, state = apply({"params": params}, x, t, told)
        both = {"output": output, **golden.flat_outputs(state["intermediates"])}
        kept = np.asarray(weights) > 0
        found.append(jax.tree.map(lambda leaf, kept=kept: np.asarray(leaf)[kept], both))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def test_a_network_is_measured_as_numpy_measures_what_flax_captures(subject, measured):
    result, sheet = measured, measured["maps"]
    assert [*result["layers"]] == [*subject.layers]
    assert result["times"] == subject.times.tolist() == [0, 999]
    for point in (1, 2):
        seen = captured(subject, point)
        for layer in subject.layers:
            stage, number = layer.split("/")
            before, gate = seen[f"{layer}/conv2"][0], seen[f"{layer}/ca"]
            after = before * gate[:, None, None, :]
            dense = subject.sampler.params[stage][number]["conv3"]
            output = after @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
            places = {"before_gate": before, "after_gate": after, "output": output}
            for place, features in places.items():
                found, (expected, score) = result["layers"][layer][place], plain(features)
                numbers = {name: found[name][point - 1] for name in expected}
                assert numbers == pytest.approx(expected, rel=1e-5, abs=1e-7), (layer, place)
                assert found["rows"] == 12 * features[0, ..., 0].size
        np.testing.assert_allclose(result["score"]["values"][point - 1], score, rtol=1e-5)
        assert result["score"]["layer"] == "decoder_level_1/1"
        channel = subject.latents.shape[-1]
        power = radial_power(seen["output"][..., :channel])
        np.testing.assert_allclose(result["noise_spectrum"][point - 1], power, rtol=1e-3)
    maps = captured(subject, 1)["encoder_level_1/0/conv2"][0][0]
    np.testing.assert_allclose(sheet["before_gate"], maps, rtol=1e-4, atol=1e-6)
    assert [*sheet] == ["output", "before_gate", "after_gate"]


def test_attention_is_measured_as_it_leaves_the_block(dit):
    subject = opened(dit, num_times=1)
    sheet = (result := channels.measure(subject))["maps"]
    seen = captured(subject, 1)
    for layer in ("blocks/0", "blocks/1"):
        expected, score = plain(seen[f"{layer}/attn"])
        assert [*result["layers"][layer]] == ["output"]
        found = {name: result["layers"][layer]["output"][name][0] for name in expected}
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(result["score"]["values"][0], score, rtol=1e-5)
    assert sheet["output"].shape == (4, 8)


def test_blocks_in_a_loop_and_other_batches_change_nothing(subject, measured):
    experiment, config = (
        subject.sampler.experiment,
        subject.sampler.config.copy_and_resolve_references(),
    )
    model = experiment.model.clone(scan_blocks=True, remat="blocks")
    config.sampling.batch_size = 16
    looped = {"experiment": dataclasses.replace(experiment, model=model), "config": config}
    result = channels.measure(changed(subject, ["latent/0", "decoder_level_1/1"], **looped))
    assert [*result["layers"]] == ["latent/0", "decoder_level_1/1"]
    for layer, found in result["layers"].items():
        for place, numbers in found.items():
            for name, value in numbers.items():
                expected = measured["layers"][layer][place][name]
                assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)
    expected = np.array(measured["noise_spectrum"])
    np.testing.assert_allclose(result["noise_spectrum"], expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "gated"),
    [
        ({"name": "FCDM", "mlp_ratio": 2.0}, True),
        ({"channel_attention": "none"}, False),
        ({"name": "IsoDiCo", "layout": "isotropic_skip", "depth": 2, "patch_size": 2}, True),
    ],
)
def test_other_blocks_are_looked_at_in_the_same_places(tmp_path, monkeypatch, options, gated):
    def draw(model, *_):  # also for networks that no PyTorch code has
        rng = np.random.default_rng(0)
        like = abstract_params(model)
        return jax.tree.map(lambda x: rng.normal(scale=0.05, size=x.shape).astype("f4"), like)

    monkeypatch.setattr(golden, "drawn_params", draw)
    subject = opened(write_checkpoint(tmp_path / "net", **DICO | options), num_times=1)
    result = channels.measure(subject)
    assert [*result["layers"]] == [*subject.layers]
    places = [*channels.PLACES] if gated else ["output"]
    for found in result["layers"].values():
        assert [*found] == places
        inner = found[places[-1]]["width"] / found["output"]["width"]
        assert inner == (2 if options.get("name") == "FCDM" else 1)


def test_planted_channels_are_found(subject):
    """Of 16 channels 4 are dead, 5 uncorrelated, 4 copies of the first, and 3 its opposites."""
    seen = captured(subject, 1)
    layer = "decoder_level_1/1"
    after = seen[f"{layer}/conv2"][0] * seen[f"{layer}/ca"][:, None, None, :]
    rows = after.reshape(-1, 16).astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False, bias=True))
    whitened = (vectors / np.sqrt(values))[:, -5:]  # of variance 1, and uncorrelated
    first = whitened[:, :1]
    kernel = np.concatenate([np.zeros((16, 4)), whitened, *[first] * 4, *[-first] * 3], axis=1)
    params = jax.tree.map(lambda leaf: leaf, subject.sampler.params)
    dense = params["decoder_level_1"]["1"]["conv3"]
    dense["kernel"], dense["bias"] = kernel.astype(np.float32), np.zeros(16, np.float32)
    found = channels.measure(changed(subject, [layer], params=params))["layers"][layer]["output"]
    assert found["dead_share"][0] == 4 / 16
    pairs = 8 * 7  # of the first with its copies and opposites, both ways
    assert found["mean_abs_correlation"][0] == pytest.approx(pairs / (12 * 11), rel=1e-3)
    share = np.array([8, 1, 1, 1, 1]) / 12  # of the variance, by direction
    rank = np.exp(-np.sum(share * np.log(share)))
    assert found["effective_rank"][0] == pytest.approx(rank, rel=1e-3)


def test_looking_changes_no_output(subject):
    seen = captured(subject, 2)["output"]
    program = subject.program(channels.watch, lambda noise, output, seen, weights: output)
    outputs = [
        np.asarray(program(subject.sampler.params, x, told, weights, 2))
        for x, told, weights in subject.batches(2)
    ]
    np.testing.assert_allclose(np.concatenate(outputs)[:12], seen, rtol=1e-5, atol=1e-6)


def test_noise_is_not_that_of_the_sampler(subject):
    """A sample begins with noise of its seed and number: with that it would be noised again."""
    subject = dataclasses.replace(subject, latents=np.zeros_like(subject.latents))
    (x, *_), *_ = subject.batches(2)
    keys = jax.random.key(3, impl="threefry2x32")
    began = jax.random.normal(jax.random.fold_in(jax.random.fold_in(keys, 0), 0), x.shape[1:])
    assert abs(np.corrcoef(np.ravel(x[0]), np.ravel(began))[0, 1]) < 0.5
    (again, *_), *_ = subject.batches(2)
    np.testing.assert_array_equal(x, again)


def test_too_few_images_are_warned_of_with_the_number(capsys):
    layers = {"a/0": {"output": {"rows": 64, "width": 32}}}
    channels.warn_of_rank("net", layers)
    assert capsys.readouterr().err == ""
    channels.warn_of_rank("net", layers | {"b/0": {"output": {"rows": 8, "width": 32}}})
    said = capsys.readouterr().err
    assert said.startswith(
        "warning: net: too few images, of b/0 8 rows (images x positions) for 32"
    )
    assert said.endswith("a rank of at most 7: give more --num_images\n")


def repository(monkeypatch, folder):
    class Hub:
        @staticmethod
        def list_repo_files(repo, revision=None):
            return [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()]

        @staticmethod
        def snapshot_download(repo, **_):
            return str(folder)

        @staticmethod
        def hf_hub_download(repo, name, revision=None):
            return str(folder / name)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)


@golden.requires_golden
def test_converted_golden_checkpoints_from_a_repository(tmp_path, monkeypatch):
    from_pytorch(str(golden.FOLDER / "dico_tiny.safetensors"), tmp_path / "dico")
    repository(monkeypatch, tmp_path / "dico")
    how = HOW | {"overrides": {"batch_size": 2, "num_steps": 2, "cfg_scale": 1.0}}
    how["mesh"] = create_mesh(jax.devices()[:1])
    (subject,) = open_subjects(["hf://me/dico"], "samples", 1, ["latent/0"], how)
    give_images(subject, "samples", 2, {"classes": "1,2"})
    result = channels.measure(subject)
    assert result["layers"]["latent/0"]["output"]["width"] == 128
    about = subject.about("samples")
    assert about["ckpt"] == "hf://me/dico"
    assert len(about["weights_digest"]) == 64
    assert (about["num_images"], about["seed"], about["sampling"]["num_steps"]) == (2, 3, 2)


def test_figures_show_the_gate_where_there_is_one(measured):
    found = dict(channels.figures({"net": measured, "other": measured}))
    names = ["channel_score", "channel_measures", "feature_maps_1", "feature_maps_2"]
    assert [*found] == [*names, "noise_spectrum"]
    (legend,) = found["channel_measures"].legends
    places = [
        f"{n}, {p}" for p in ("output", "after gate", "before gate") for n in ("net", "other")
    ]
    assert [text.get_text() for text in legend.get_texts()] == places


def test_the_command_compares_networks(dit, tmp_path):
    twins = [shutil.copytree(of, tmp_path / name / "ckpt") for name, of in
             (("one", dit), ("two", dit))]  # fmt: skip
    args = [f"--ckpt={twin}" for twin in twins] + ["--num_images=2", "--num_times=1"]
    args += ["--steps=1", "--cfg_scale=1"]
    done = call("dico_jax.analyze", "channels", *args, f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "warning: " in done.stderr
    assert "8 rows (images x positions) for 8 channels" in done.stderr
    names = ["channel_measures", "channel_score", "feature_maps_1", "feature_maps_2"]
    names = sorted(
        f"{name}.{kind}" for name in [*names, "noise_spectrum"] for kind in ("pdf", "png")
    )
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted([*names, "channels.json"])
    result = json.loads((tmp_path / "out" / "channels.json").read_text())
    assert [*result["networks"]] == [str(twin) for twin in twins]  # as both are called ckpt
    network = result["networks"][str(twins[1])]["network"]
    assert (network["images"], network["num_images"], network["classes"]) == ("samples", 2, "all")
    assert {"weights_digest", "seed", "sampling", "model"} <= network.keys()
    assert {"argv", "versions"} <= result.keys()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(10):
        (folder / f"kind {k}").mkdir()
        picture = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"kind {k}" / "a.png")
    return folder


def test_pictures_of_a_folder_come_with_their_classes(dit, pictures):
    (subject,) = open_subjects([str(dit)], str(pictures), 1, [], HOW)
    give_images(subject, str(pictures), 4, {})
    assert subject.latents.shape == (4, 8, 8, 1)
    assert -1 <= subject.latents.min() < subject.latents.max() <= 1
    drawn = subject.condition["label"].tolist()
    assert len({*drawn}) == 4
    pixels = [np.asarray(Image.open(pictures / f"kind {k}" / "a.png").convert("L")) for k in drawn]
    np.testing.assert_allclose(
        [p.mean() for p in pixels], 127.5 * (subject.latents.mean((1, 2, 3)) + 1), atol=12
    )
    assert subject.about(str(pictures))["images"] == str(pictures)
    with pytest.raises(UsageError, match="^--num_images=11: FolderSource.* has 10"):
        give_images(subject, str(pictures), 11, {})
    (pictures / "kind 0").rename(pictures / "cat")
    with pytest.raises(UsageError, match="^--images=.*has other classes than the checkpoint"):
        give_images(subject, str(pictures), 4, {})
    with pytest.raises(UsageError, match="^--images=/no/such"):
        give_images(subject, "/no/such", 4, {})


def test_the_data_of_the_config_are_read(tmp_path):
    pytest.importorskip("sklearn")
    digits = write_checkpoint(tmp_path / "digits", [str(k) for k in range(10)],
                              sections={"data": {"source": "digits"}})  # fmt: skip
    (subject,) = open_subjects([str(digits)], "data", 1, [], HOW)
    give_images(subject, "data", 3, {})
    assert subject.latents.shape == (3, 8, 8, 1)
    assert len(subject.condition["label"]) == 3


def test_networks_and_layers_that_do_not_fit(dico, dit, tmp_path):
    large = write_checkpoint(tmp_path / "large", sections={"data": {"image_size": 16}})
    for ckpts, layers, message in (
        ([dit, large], [], f"^--ckpt={large} has images of 16 pixels .*{dit} of 8 .*of one size"),
        ([dico], ["latent/1"], "^--layers=latent/1 is no block of .*: use latent/0 or "),
        ([dico, dit], ["latent/0"], f"^--layers=latent/0 is no block of {dit}: use blocks/"),
    ):
        with pytest.raises(UsageError, match=message):
            open_subjects([str(ckpt) for ckpt in ckpts], "samples", 1, layers, HOW)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--out=OUT"], ["channels needs --ckpt"]),
        (["--ckpt=CKPT"], ["channels needs --out"]),
        (["--ckpt=CKPT", "--ckpt=", "--out=OUT"], ["--ckpt= is empty"]),
        (["--ckpt=CKPT", "--ckpt=/no/such", "--out=OUT"], ["--ckpt=/no/such"]),
        (["--ckpt=CKPT", "--out=tests"], ["--out=tests exists"]),
        (["--ckpt=CKPT", "--out=OUT", "--layers="], ["--layers= is empty"]),
        (["--ckpt=CKPT", "--out=OUT", "--images="], ["--images= is empty"]),
        (["--ckpt=CKPT", "--out=OUT", "--num_images=0"], ["num_images"]),
        (["--ckpt=CKPT", "--out=OUT", "--models=DiCo-S"], ["--models is for cost"]),
        (
            ["--ckpt=CKPT", "--out=OUT", "--images=data", "--steps=3"],
            ["--steps is for --images=sa"],
        ),
        (["--ckpt=CKPT", "--out=OUT", "--images=tests", "--classes=3"], ["--classes is for"]),
    ],
)
def test_what_is_wrong_is_one_line(dit, tmp_path, args, parts):
    args = [arg.replace("OUT", str(tmp_path / "out")).replace("CKPT", str(dit)) for arg in args]
    assert_refused(call("dico_jax.analyze", "channels", *args), *parts)
    assert not [*tmp_path.iterdir()]
