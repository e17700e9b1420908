"""From batches to latents on the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dico_jax.autoencoders import Autoencoder, make_latents_fn, to_model_range
from dico_jax.autoencoders.weights import Weights
from dico_jax.errors import UsageError
from dico_jax.parallel.mesh import batch_sharding, create_mesh, to_global

N, SCALE = 16, 0.25


def encode(params, pictures):
    """2x2 means of grey as the mean, twice that (clamped) as the log variance."""
    n, h, w, _ = pictures.shape
    mean = pictures.reshape(n, h // 2, 2, w // 2, 2, 3).mean((2, 4)) * params["gain"]
    return jnp.concatenate([mean, -jnp.abs(mean)], axis=-1)


AUTOENCODER = Autoencoder(
    name="sd_vae",
    downsampling=2,
    channels=3,
    encode_moments=encode,
    decode=lambda params, latents: latents,
    scaling_factor=SCALE,
    load=lambda: Weights({"gain": np.float32(2)}),
)
PICTURES = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)
LABELS = np.arange(N, dtype=np.int32)


@functools.cache
def latents_fn(kind, latent_sampling, seed, mesh):
    return make_latents_fn(kind, AUTOENCODER, latent_sampling=latent_sampling, seed=seed, mesh=mesh)


def latents(example, kind, latent_sampling="sample", step=0, seed=0, devices=1, mirrored=False):
    mesh = create_mesh(jax.devices()[:devices])
    fn = latents_fn(kind, latent_sampling, seed, mesh)
    batch = {
        "image": example,
        "condition": {"label": LABELS},
        "index": LABELS + 100,
        "mirrored": np.full(N, mirrored),
    }
    out = fn(to_global(batch, batch_sharding(mesh)), np.int32(step))
    np.testing.assert_array_equal(out["condition"]["label"], LABELS)
    assert out["x"].dtype == np.float32
    return np.asarray(out["x"])


def test_pictures_and_their_prepared_moments_give_the_same_latents():
    moments = np.asarray(encode(AUTOENCODER.params, to_model_range(PICTURES)))
    for sampling in ("sample", "mean", "fixed"):
        live = latents(PICTURES, "pictures", sampling, step=3)
        np.testing.assert_allclose(live, latents(moments, "moments", sampling, step=3), atol=1e-6)
        half = latents(moments.astype(np.float16), "moments", sampling, step=3)
        np.testing.assert_allclose(live, half, atol=2e-3)
    mean, log_variance = np.split(moments, 2, axis=-1)
    np.testing.assert_allclose(latents(moments, "moments", "mean"), mean * SCALE, atol=1e-7)
    many = np.stack([latents(moments, "moments", step=step) for step in range(100)])
    np.testing.assert_allclose(many.mean(0), mean * SCALE, atol=0.12)
    ratio = many.std(0) / (np.exp(log_variance / 2) * SCALE)
    assert abs(ratio.mean() - 1) < 0.02


def test_encode_gives_what_decode_takes():
    """Scaled latents on both sides; drawn where noise is given."""
    x = to_model_range(PICTURES)
    mean, log_variance = np.split(np.asarray(encode(AUTOENCODER.params, x)), 2, axis=-1)
    latents = AUTOENCODER.encode(AUTOENCODER.params, x)
    np.testing.assert_allclose(latents, mean * SCALE, rtol=1e-6)
    drawn = AUTOENCODER.encode(AUTOENCODER.params, x, np.ones(mean.shape, np.float32))
    np.testing.assert_allclose(drawn, (mean + np.exp(log_variance / 2)) * SCALE, rtol=1e-5)
    with pytest.raises(UsageError, match="'latent_preview' cannot encode"):
        Autoencoder("latent_preview", 8, 4, decode=abs).encode({}, x)
    assert Autoencoder("identity", 1, None, decode=abs).encode({}, x) is x


def test_draws_follow_from_seed_and_step_or_seed_and_example():
    moments = np.asarray(encode(AUTOENCODER.params, to_model_range(PICTURES)))

    def draw(**kwargs):
        return latents(moments, "moments", **kwargs)

    np.testing.assert_array_equal(draw(step=1), draw(step=1))
    assert (draw(step=1) != draw(step=2)).mean() > 0.99
    assert (draw(seed=1) != draw(seed=2)).mean() > 0.99
    fixed = draw(latent_sampling="fixed")
    np.testing.assert_array_equal(fixed, draw(latent_sampling="fixed", step=9))
    assert (fixed != draw(latent_sampling="fixed", mirrored=True)).mean() > 0.99
    assert (fixed != draw(latent_sampling="fixed", seed=1)).mean() > 0.99
    # Every example has its own noise.
    noise = (draw() / SCALE - np.split(moments, 2, -1)[0]).reshape(N, -1)
    assert np.abs(np.corrcoef(noise) - np.eye(N)).max() < 0.7


@pytest.mark.parametrize("sampling", ["sample", "fixed"])
def test_latents_are_the_same_on_any_number_of_devices(sampling):
    whole = latents(PICTURES, "pictures", sampling, devices=1)
    for count in (2, 8):
        found = latents(PICTURES, "pictures", sampling, devices=count)
        np.testing.assert_allclose(found, whole, atol=1e-6)


def test_latents_and_pixels_pass_through():
    ready = np.random.default_rng(1).normal(size=(N, 4, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(latents(ready, "latents"), ready)
    pixels = Autoencoder("identity", 1, None, decode=lambda params, latents: latents)
    mesh = create_mesh(jax.devices()[:1])
    fn = make_latents_fn("pictures", pixels, latent_sampling="sample", seed=0, mesh=mesh)
    batch = {"image": PICTURES, "condition": LABELS, "index": LABELS, "mirrored": LABELS > 3}
    np.testing.assert_allclose(fn(batch, 0)["x"], PICTURES / 127.5 - 1, atol=1e-6)


def test_unknown_sampling():
    with pytest.raises(UsageError, match="data.latent_sampling='mode' is unknown: use one of samp"):
        latents(PICTURES, "pictures", "mode")
