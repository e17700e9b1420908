"""Autoencoders by name."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dico_jax.errors import UsageError

# A linear fit of RGB to the four scaled latents of Stable Diffusion's autoencoder, as several
# user interfaces preview them.
_PREVIEW = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """How pictures become latents and latents pictures.

    Attributes:
      downsampling: pixels per latent position, along each side.
      channels: latent channels, or None for any number.
      decode: scaled latents (N, H, W, C) to pictures (N, H', W', 1 or 3) in [-1, 1].
    """

    downsampling: int
    channels: int | None
    decode: Callable[[jax.Array], jax.Array]


def _decode_preview(latents):
    matrix = jnp.asarray(_PREVIEW, latents.dtype)
    return jnp.einsum("nhwc,cd->nhwd", latents, matrix, precision="highest")


AUTOENCODERS = {
    # Models of pixels: latents are the pictures themselves, in [-1, 1].
    "identity": Autoencoder(downsampling=1, channels=None, decode=lambda x: x),
    # Stable Diffusion latents encoded elsewhere (scaled by 0.18215): decoding gives a small
    # false-colour picture of the latents' own size, good enough to see a run learn.
    "latent_preview": Autoencoder(downsampling=8, channels=4, decode=_decode_preview),
}


def create_autoencoder(name: str) -> Autoencoder:
    """The autoencoder called `name`.

    Raises:
      UsageError: none has that name.
    """
    if name not in AUTOENCODERS:
        raise UsageError(
            f"autoencoder.name={name!r} is unknown: use one of {', '.join(AUTOENCODERS)}"
        )
    return AUTOENCODERS[name]


def to_uint8(images: jax.Array) -> jax.Array:
    """Pictures in [-1, 1] to uint8 as the released code does: 127.5 x + 128, clipped, cut."""
    return jnp.clip(127.5 * images.astype(jnp.float32) + 128.0, 0, 255).astype(jnp.uint8)
