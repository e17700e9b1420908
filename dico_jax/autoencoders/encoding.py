"""From a batch of examples to what the network is trained on, on the devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dico_jax.autoencoders.registry import Autoencoder, posterior_latents
from dico_jax.errors import UsageError
from dico_jax.parallel.mesh import BATCH_AXES, batch_sharding, replicated

LATENT_SAMPLING = ("sample", "mean", "fixed")

_STREAM = 0x1A7E475  # sets the draws here apart from a run's other keys
_ENCODED_AT_ONCE = 8  # pictures per device: the encoder's activations are large

LatentsFn = Callable[[dict[str, Any], Any], dict[str, jax.Array]]


def make_latents_fn(
    kind: str, autoencoder: Autoencoder, *, latent_sampling: str, seed: int, mesh: Mesh
) -> LatentsFn:
    """The jitted function (batch, step) -> {"x": float32 scaled latents, "condition"}.

    The batch has "image", by the kind of its source: "pictures", uint8 (N, H, W, C), which are
    encoded here; "moments", (N, h, w, 2C), as prepared ahead; or "latents", (N, h, w, C), scaled
    already. Its "condition" is passed on. For fixed draws it has "index" and "mirrored", both (N,).

    Args:
      kind: of the source.
      autoencoder: encodes pictures; without an encoder the latents are the pictures in [-1, 1].
      latent_sampling: what is taken of a posterior: "sample" draws by (seed, step), "fixed" by
        (seed, index, mirrored), "mean" does not draw.
      seed: decides the draws.
      mesh: batches are split over it.

    Raises:
      UsageError: an unknown latent_sampling.
    """
    if latent_sampling not in LATENT_SAMPLING:
        raise UsageError(
            f"data.latent_sampling={latent_sampling!r} is unknown: "
            f"use one of {', '.join(LATENT_SAMPLING)}"
        )
    split, whole = batch_sharding(mesh), replicated(mesh)
    encode = autoencoder.encode_moments

    def latents(params, batch, step):
        x = to_model_range(batch["image"])
        if kind == "pictures" and encode is not None:
            x = encode_in_parts(encode, mesh)(params, x)
        if kind == "moments" or (kind == "pictures" and encode is not None):
            noise = _noise(latent_sampling, seed, step, batch, x.shape)
            x = posterior_latents(x, noise, autoencoder.scaling_factor)
        return {"x": x, "condition": batch["condition"]}

    params = jax.device_put(autoencoder.params, whole) if kind == "pictures" else {}
    return functools.partial(
        jax.jit(latents, in_shardings=(whole, split, whole), out_shardings=split), params
    )


def to_model_range(example):
    """uint8 pixels to float32 in [-1, 1]; float latents to float32 as they are."""
    if example.dtype == jnp.uint8:
        return example.astype(jnp.float32) / 127.5 - 1
    return example.astype(jnp.float32)


def _noise(latent_sampling: str, seed: int, step, batch: dict, moments_shape: tuple[int, ...]):
    key = jax.random.fold_in(jax.random.key(seed), _STREAM)
    n, h, w, c = moments_shape
    if latent_sampling == "mean":
        return None
    if latent_sampling == "sample":
        return jax.random.normal(jax.random.fold_in(key, step), (n, h, w, c // 2))

    def draw(index, mirrored):
        example_key = jax.random.fold_in(jax.random.fold_in(key, index), mirrored)
        return jax.random.normal(example_key, (h, w, c // 2))

    return jax.vmap(draw)(batch["index"], batch["mirrored"].astype(jnp.int32))


def encode_in_parts(encode, mesh: Mesh):
    """`Autoencoder.encode_moments`, on every device for itself and a few pictures at a time.

    The pictures (N, H, W, 3) are split over the mesh.
    """
    spec = jax.sharding.PartitionSpec(BATCH_AXES)

    def part(params, pictures):
        return jax.lax.map(
            lambda picture: encode(params, picture[None])[0], pictures, batch_size=_ENCODED_AT_ONCE
        )

    return jax.shard_map(
        part, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), spec), out_specs=spec
    )
