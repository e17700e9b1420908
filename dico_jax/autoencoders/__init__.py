"""Between pictures and what the network sees. Latents are scaled here and nowhere else."""

from dico_jax.autoencoders.registry import (
    AUTOENCODERS,
    Autoencoder,
    create_autoencoder,
    posterior_latents,
    to_uint8,
)

__all__ = ["AUTOENCODERS", "Autoencoder", "create_autoencoder", "posterior_latents", "to_uint8"]
