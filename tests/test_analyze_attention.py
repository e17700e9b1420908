"""`analyze attention`: distances and mass against plain NumPy, windows, the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.analysis import attention
from dico_jax.analysis.subjects import open_subjects
from dico_jax.errors import UsageError
from dico_jax.models import mixers
from tests.commands import assert_refused, call
from tests.test_analyze_channels import DICO, HOW, captured, opened
from tests.test_sampler import write_checkpoint

pytest.importorskip("matplotlib")

SIDE, TOKENS = 4, 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "dit"
    return write_checkpoint(path, hidden_size=8, depth=2, num_heads=2, patch_size=2)


@pytest.fixture(scope="module")
def subject(checkpoint):
    """With parameters large enough for attention that looks somewhere."""
    made = opened(checkpoint)
    attention.check([made])
    made.sampler.params = jax.tree.map(lambda leaf: 8 * leaf, made.sampler.params)
    return dataclasses.replace(made, latents=np.tanh(made.latents))


@pytest.fixture(scope="module")
def measured(subject):
    return attention.measure(subject)


def plain_distance(i, j):
    return np.hypot(i // SIDE - j // SIDE, i % SIDE - j % SIDE)


def plain_weights(qkv):
    """Attention (N, heads, T, T) of what the first layer gives, (N, T, 3 * 8), in float64."""
    q, k, _ = np.moveaxis(np.asarray(qkv, np.float64).reshape(*qkv.shape[:2], 3, 2, 4), 2, 0)
    logits = np.einsum("nqhd,nkhd->nhqk", q, k) / 2
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_attention_is_measured_as_numpy_measures_it(subject, measured):
    assert [*measured["layers"]] == ["blocks/0", "blocks/1"]
    assert (measured["times"], measured["latents_per_token"]) == ([0, 999], 2)
    far = np.array([[plain_distance(i, j) for j in range(TOKENS)] for i in range(TOKENS)])
    for point in (1, 2):
        seen = captured(subject, point)
        for layer, found in measured["layers"].items():
            weights = plain_weights(seen[f"{layer}/attn/qkv"])
            assert weights.std() > 0.01
            distance = (weights * far).sum(axis=-1).mean(axis=(0, 2))
            np.testing.assert_allclose(found["mean_distance"][point - 1], distance, rtol=1e-5)
            mass = [(weights * (far <= r)).sum(axis=-1).mean(axis=(0, 2)) for r in range(6)]
            np.testing.assert_allclose(found["mass"][point - 1], np.transpose(mass), rtol=1e-5)
            if point == 1:  # the middle of two
                anchors = weights.mean(axis=(0, 1))[[5, 10, 15]]
                np.testing.assert_allclose(found["anchors"], anchors, rtol=1e-5, atol=1e-7)
    assert [row[-1] for row in found["mass"][0]] == pytest.approx([1, 1])


def test_a_window_leaves_what_a_network_with_masked_attention_gives(subject, measured, monkeypatch):
    radii, errors = measured["window"]["radii"], measured["window"]["relative_error"]
    assert radii == [0, 1, 2, 4, 5]
    far = np.array([[plain_distance(i, j) for j in range(TOKENS)] for i in range(TOKENS)])
    whole = captured(subject, 2)["output"].astype(np.float64)
    original = mixers.attention
    for radius, error in zip(radii, errors[1], strict=True):
        near = jnp.asarray(far <= radius)

        def cut(q, k, v, implementation, near=near):
            return original(q, k, v, mask=near, implementation="xla")

        monkeypatch.setattr(mixers, "attention", cut)
        off = captured(subject, 2)["output"] - whole
        expected = np.linalg.norm(off) / np.linalg.norm(whole)
        assert error == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert errors[1][0] > 0.01
    assert errors[1][-1] == pytest.approx(0, abs=1e-6)


def test_planted_attention_has_its_distance_and_mass():
    own, uniform = np.eye(TOKENS), np.full((TOKENS, TOKENS), 1 / TOKENS)
    below = np.roll(np.eye(TOKENS), SIDE, axis=1)  # a row further down; from the last to the first
    weights = np.float32([[own, uniform, below], [own, uniform, below], [uniform] * 3])
    found = attention.measures(jnp.asarray(weights), jnp.float32([1, 1, 0]))
    far = np.array([[plain_distance(i, j) for j in range(TOKENS)] for i in range(TOKENS)])
    distances = [0, far.mean(), (3 * 1 + 3) / 4]
    np.testing.assert_allclose(found["mean_distance"], 2 * np.float32(distances), rtol=1e-6)
    mass = [[1] * 6, [(far <= r).mean() for r in range(6)], [0, 0.75, 0.75, 1, 1, 1]]
    np.testing.assert_allclose(found["mass"], 2 * np.float32(mass), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found["anchors"].sum(axis=1), 2, rtol=1e-6)
    turned = attention.measures(jnp.asarray(weights[::-1, ::-1]), jnp.float32([0, 1, 1]))
    np.testing.assert_allclose(turned["mean_distance"][::-1], found["mean_distance"], rtol=1e-6)


def test_the_command_writes_json_and_figures(checkpoint, tmp_path):
    args = [f"--ckpt={checkpoint}", f"--out={tmp_path}/out", "--num_images=2", "--num_times=1"]
    done = call("dico_jax.analyze", "attention", *args, "--layers=blocks/1")
    assert done.returncode == 0, done.stderr
    names = ["attention_anchors", "attention_locality"]
    names = [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["attention.json", *names]
    result = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert [*result["networks"]["dit"]["layers"]] == ["blocks/1"]
    assert len(result["networks"]["dit"]["network"]["weights_digest"]) == 64


def test_networks_without_attention_are_refused(checkpoint, tmp_path):
    dico = write_checkpoint(tmp_path / "dico", **DICO)
    args = [f"--ckpt={dico}", f"--out={tmp_path}/out", "--num_images=2"]
    done = call("dico_jax.analyze", "attention", *args)
    assert_refused(done, f"--ckpt={dico} is a DiCo, whose blocks have no attention: give a DiT")
    assert not (tmp_path / "out").exists()
    both = open_subjects([str(checkpoint), str(dico)], "samples", 1, [], HOW)
    with pytest.raises(UsageError, match=f"^--ckpt={dico} is one too many: attention looks at one"):
        attention.check(both)


@pytest.mark.parametrize("options", [{"mixer": "attention"}, {"mixer": "window_attention"}])
def test_attention_in_a_u_is_measured_at_each_resolution(tmp_path, options):
    window = {"window_size": 2} if options["mixer"] == "window_attention" else {}
    subject = opened(write_checkpoint(tmp_path / "net", **DICO, **options, **window), num_times=1)
    attention.check([subject])
    result = attention.measure(subject)
    assert [*result["layers"]] == [*subject.layers]
    for layer, found in result["layers"].items():
        assert np.array(found["mass"])[..., -1] == pytest.approx(1), layer
        tokens = len(found["anchors"][0])
        assert tokens == (4 if window or layer == "latent/0" else 64 if "_1/" in layer else 16)
    assert len([*attention.figures({"net": result})]) == 2
