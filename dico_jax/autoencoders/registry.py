"""Autoencoders by name, and the one place where latents are scaled."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.autoencoders.kl import AutoencoderKL, KLConfig
from dico_jax.autoencoders.tiling import MIN_TILE, decode_in_tiles
from dico_jax.autoencoders.weights import RELEASED, Weights, naming, open_kl
from dico_jax.errors import UsageError
from dico_jax.pytorch.hub import is_remote

# A linear fit of RGB to the four scaled latents of Stable Diffusion's autoencoder, as several
# user interfaces preview them.
_PREVIEW = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
)
_DTYPES = ("float32", "bfloat16")
# How errors about files that are not on this machine end.
WAYS_OUT = (
    "; give a local file, or autoencoder.name='latent_preview' for small false-colour pictures"
)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """How pictures become latents and latents pictures.

    `encode` and `decode` both speak scaled latents, those of the diffusion model. Functions take
    the parameters as an argument, so that a jitted function can, too: closed over, they would
    become constants of the compiled program.

    Attributes:
      name: a key of `AUTOENCODERS`.
      downsampling: pixels per latent position, along each side.
      channels: latent channels, or None for any number.
      decode: (params, scaled latents (N, h, w, C)) to pictures (N, H, W, 1 or 3) in [-1, 1],
        float32 or better. Values outside of the range may occur.
      encode_moments: (params, pictures (N, H, W, 3) in [-1, 1]) to what is kept of a posterior,
        float32 (N, h, w, 2C): mean, then clamped log variance, unscaled, of which
        `posterior_latents` makes latents; None where there is no encoder.
      scaling_factor: latents are multiplied by it for the diffusion model.
      load: reads the weights; called once, when they are first asked for. It raises UsageError
        where that fails.
    """

    name: str
    downsampling: int
    channels: int | None
    decode: Callable[[Any, jax.Array], jax.Array]
    encode_moments: Callable[[Any, jax.Array], jax.Array] | None = None
    scaling_factor: float = 1.0
    load: Callable[[], Weights] = lambda: Weights({})

    def encode(self, params: Any, pictures: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Pictures (N, H, W, 3) in [-1, 1] to scaled latents, float32 (N, h, w, C).

        Args:
          params: the parameters.
          pictures: to encode.
          noise: (N, h, w, C), standard normal, to draw from the posterior; None for its mean.

        Raises:
          UsageError: there is no encoder.
        """
        if self.encode_moments is None:
            raise UsageError(f"the autoencoder {self.name!r} cannot encode pictures")
        return posterior_latents(self.encode_moments(params, pictures), noise, self.scaling_factor)

    @functools.cached_property
    def weights(self) -> Weights:
        """The weights, read when first asked for."""
        return self.load()

    @property
    def params(self) -> Any:
        """Pytree of NumPy arrays, {} where there are none."""
        return self.weights.params

    @property
    def encoder_digest(self) -> str | None:
        """Identifies what encodes, sha256 (hex); sd-vae-ft-ema and -mse share it."""
        return self.weights.encoder_digest

    @property
    def decoder_digest(self) -> str | None:
        """Identifies what decodes, sha256 (hex)."""
        return self.weights.decoder_digest


def _identity(config) -> Autoencoder:
    """For models of pixels: latents are the pictures themselves, in [-1, 1]."""
    return Autoencoder("identity", 1, None, decode=lambda params, x: x)


def _latent_preview(config) -> Autoencoder:
    """Latents as false-colour pictures of their own size, good enough to see a run learn."""

    def decode(params, latents):
        matrix = jnp.asarray(_PREVIEW, latents.dtype)
        return jnp.einsum("nhwc,cd->nhwd", latents, matrix, precision="highest")

    sizes = KLConfig()  # of the autoencoder whose latents they are
    return Autoencoder(
        "latent_preview",
        sizes.downsampling,
        sizes.latent_channels,
        decode=decode,
        scaling_factor=sizes.scaling_factor,
    )


def _sd_vae(config) -> Autoencoder:
    """Stable Diffusion's, with the weights of config.path."""
    path = config.path
    if not path:
        raise UsageError(
            "autoencoder.path",
            path,
            ": give the file with the weights of the autoencoder, or "
            "autoencoder.name='latent_preview' to do without",
        )
    tile_size, sizes = config.tile_size, _read_sizes(path)
    model = AutoencoderKL(sizes, dtype=jnp.dtype(config.dtype))

    def decode(params, latents):
        def plain(z):
            return model.apply({"params": params}, z, method="decode")

        latents = latents.astype(jnp.float32) / sizes.scaling_factor
        if not tile_size:
            return plain(latents)
        return decode_in_tiles(plain, latents, tile_size, sizes.downsampling)

    def encode_moments(params, pictures):
        return model.apply({"params": params}, pictures, method="encode")

    return Autoencoder(
        "sd_vae",
        sizes.downsampling,
        sizes.latent_channels,
        decode=decode,
        encode_moments=encode_moments,
        scaling_factor=sizes.scaling_factor,
        load=functools.partial(_load, path, sizes),
    )


def _read_sizes(path: str) -> KLConfig:
    """The sizes of the autoencoder at `path`, all its names and shapes checked."""
    if RELEASED.match(path):
        return KLConfig()
    with _about(path), open_kl(path) as file:
        return file.config


def _load(path: str, sizes: KLConfig) -> Weights:
    with _about(path), open_kl(path) as file:
        if file.config != sizes:
            raise UsageError(f"it has {file.config}, and {sizes} was expected")
        return file.read()


@contextlib.contextmanager
def _about(path: str) -> Iterator[None]:
    """Starts a UsageError's message with the field; says how to do without the network."""
    try:
        with naming("autoencoder.path", path):
            yield
    except UsageError as error:
        if not is_remote(path):
            raise
        raise UsageError(f"{error}{WAYS_OUT}") from error


AUTOENCODERS: dict[str, Callable[[Any], Autoencoder]] = {
    "sd_vae": _sd_vae,
    "identity": _identity,
    "latent_preview": _latent_preview,
}


def create_autoencoder(config) -> Autoencoder:
    """The autoencoder that `config.autoencoder` describes.

    Names and shapes in its file are checked here; weights are read when they are first asked for,
    and those of the released autoencoders are fetched then.

    Args:
      config: anything with the fields name, path, dtype and tile_size, see configs/default.py.

    Raises:
      UsageError: a wrong field, or a file that is none or not readable; the message starts with
        the name of the field, such as "autoencoder.path".
    """
    for field, known in {"name": AUTOENCODERS, "dtype": _DTYPES}.items():
        if (value := getattr(config, field)) not in known:
            fix = f"is unknown: use one of {', '.join(known)}"
            raise UsageError(f"autoencoder.{field}", value, fix)
    if config.tile_size != 0 and config.tile_size < MIN_TILE:
        fix = f"must be at least {MIN_TILE}, or 0 for none"
        raise UsageError("autoencoder.tile_size", config.tile_size, fix)
    return AUTOENCODERS[config.name](config)


def posterior_latents(moments, noise, scaling_factor: float):
    """Scaled latents, as the diffusion model sees them, from an encoder's moments.

    Args:
      moments: (N, h, w, 2C), mean and log variance, see `Autoencoder.encode_moments`; NumPy or JAX.
      noise: (N, h, w, C), standard normal; None for the posterior's mean.
      scaling_factor: see `Autoencoder`.

    Returns:
      float32 (N, h, w, C): (mean + exp(log variance / 2) * noise) * scaling_factor.
    """
    xp = np if isinstance(moments, np.ndarray) else jnp
    mean, log_variance = xp.split(moments.astype(xp.float32), 2, axis=-1)
    if noise is not None:
        mean = mean + xp.exp(log_variance / 2) * noise.astype(xp.float32)
    return mean * xp.float32(scaling_factor)


def to_uint8(images: jax.Array) -> jax.Array:
    """Pictures in [-1, 1] to uint8 as the released code does: 127.5 x + 128, clipped, cut."""
    return jnp.clip(127.5 * images.astype(jnp.float32) + 128.0, 0, 255).astype(jnp.uint8)
