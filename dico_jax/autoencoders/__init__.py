"""Autoencoders by name, and the one place where latents are made and scaled."""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dico_jax.autoencoders.kl import (
    MIN_TILE,
    AutoencoderKL,
    KLConfig,
    abstract_params,
    decode_in_tiles,
)
from dico_jax.autoencoders.weights import RELEASED, KLFile, Weights, naming, open_kl
from dico_jax.errors import UsageError
from dico_jax.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from dico_jax.pytorch.hub import is_remote

# A linear fit of RGB to the scaled latents, as several user interfaces preview them.
_PREVIEW = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
)
# How errors about files that are not on this machine end.
WAYS_OUT = "; give a local file, or autoencoder.name='latent_preview' for false-colour pictures"
_STREAM = 0x1A7E475  # sets the draws of `make_latents_fn` apart from a run's other keys
_ENCODED_AT_ONCE = 8  # pictures per device: the encoder's activations are large


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """How pictures become scaled latents, those of the diffusion model, and these pictures.

    Functions take the parameters as an argument: closed over by a jitted function, they would
    become constants of the compiled program.
    """

    name: str
    downsampling: int  # pixels per latent position, along each side
    channels: int | None  # of latents; None for any number
    # (params, scaled latents (N, h, w, C)) to pictures (N, H, W, 1 or 3), float32 or better, of
    # which [-1, 1] is shown.
    decode: Callable[[Any, jax.Array], jax.Array]
    # (params, pictures (N, H, W, 3) in [-1, 1]) to float32 (N, h, w, 2C): the posterior's mean,
    # then its clamped log variance, unscaled; None where there is no encoder.
    encode_moments: Callable[[Any, jax.Array], jax.Array] | None = None
    scaling_factor: float = 1.0  # latents are multiplied by it for the diffusion model
    load: Callable[[], Weights] = lambda: Weights({})
    shapes: Callable[[], Any] = dict  # of the parameters, without reading them

    def encode(self, params: Any, pictures: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Pictures (N, H, W, 3) in [-1, 1] to scaled latents, float32, see `posterior_latents`."""
        if self.name == "identity":
            return pictures
        if self.encode_moments is None:
            raise UsageError(f"the autoencoder {self.name!r} cannot encode pictures")
        return posterior_latents(self.encode_moments(params, pictures), noise, self.scaling_factor)

    @functools.cached_property
    def weights(self) -> Weights:
        """The parameters, NumPy arrays, and digests of both halves."""
        return self.load()

    params = property(operator.attrgetter("weights.params"))
    encoder_digest = property(operator.attrgetter("weights.encoder_digest"))
    decoder_digest = property(operator.attrgetter("weights.decoder_digest"))


def _latent_preview(config) -> Autoencoder:
    """Latents as false-colour pictures of their own size, good enough to see a run learn."""

    def decode(params, latents):
        matrix = jnp.asarray(_PREVIEW, latents.dtype)
        return jnp.einsum("nhwc,cd->nhwd", latents, matrix, precision="highest")

    return Autoencoder(
        "latent_preview", 8, 4, decode, None, config.scaling_factor or KLConfig().scaling_factor
    )


def _sd_vae(config) -> Autoencoder:
    path, tile_size = config.path, config.tile_size
    if not path:
        fix = ": give the file of its weights, or autoencoder.name='latent_preview' to do without"
        raise UsageError("autoencoder.path", path, fix)
    sizes = KLConfig()
    if not RELEASED.match(path):
        with _open(path) as file:
            sizes = file.config
    model = AutoencoderKL(sizes, dtype=jnp.dtype(config.dtype))

    def decode(params, latents):
        plain = functools.partial(model.apply, {"params": params}, method="decode")
        latents = latents.astype(jnp.float32) / factor
        return decode_in_tiles(plain, latents, tile_size, sizes.downsampling)

    def encode_moments(params, pictures):
        return model.apply({"params": params}, pictures, method="encode")

    def load():
        with _open(path) as file:
            if file.config != sizes:
                raise UsageError(f"it has {file.config}, and {sizes} was expected")
            return file.read()

    shapes = functools.partial(abstract_params, sizes)
    factor = config.scaling_factor or sizes.scaling_factor
    side, channels = sizes.downsampling, sizes.latent_channels
    return Autoencoder("sd_vae", side, channels, decode, encode_moments, factor, load, shapes)


@contextlib.contextmanager
def _open(path: str) -> Iterator[KLFile]:
    """The file of config.path; errors name the field, and tell how to do without the network."""
    try:
        with naming("autoencoder.path", path), open_kl(path) as file:
            yield file
    except UsageError as error:
        if not is_remote(path):
            raise
        raise UsageError(f"{error}{WAYS_OUT}") from error


AUTOENCODERS: dict[str, Callable[[Any], Autoencoder]] = {
    "sd_vae": _sd_vae,
    # For models of pixels: latents are the pictures themselves, in [-1, 1].
    "identity": lambda config: Autoencoder("identity", 1, None, decode=lambda params, x: x),
    "latent_preview": _latent_preview,
    # Latents of VA-VAE (arXiv 2501.01423), of which three channels are shown.
    "vavae_preview": lambda config: Autoencoder(
        "vavae_preview", 16, 32, decode=lambda params, x: x[..., :3] / 3
    ),
}


def _check_choice(field: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise UsageError(field, value, f"is unknown: use one of {', '.join(choices)}")


def create_autoencoder(config) -> Autoencoder:
    """The autoencoder of `config.autoencoder` (name, path, dtype, tile_size), or a UsageError.

    Weights are read, those of the released autoencoders fetched, when they are first asked for.
    """
    _check_choice("autoencoder.name", config.name, *AUTOENCODERS)
    _check_choice("autoencoder.dtype", config.dtype, "float32", "bfloat16")
    if config.tile_size != 0 and config.tile_size < MIN_TILE:
        fix = f"must be at least {MIN_TILE}, or 0 for none"
        raise UsageError("autoencoder.tile_size", config.tile_size, fix)
    return AUTOENCODERS[config.name](config)


def to_uint8(images: jax.Array) -> jax.Array:
    """Pictures in [-1, 1] to uint8 as the released code does: 127.5 x + 128, clipped, cut."""
    return jnp.clip(127.5 * images.astype(jnp.float32) + 128.0, 0, 255).astype(jnp.uint8)


def to_model_range(image):
    """uint8 pixels to float32 in [-1, 1]; float latents to float32 as they are."""
    x = image.astype(jnp.float32)
    return x / 127.5 - 1 if image.dtype == jnp.uint8 else x


def posterior_latents(moments, noise, scaling_factor: float):
    """Scaled latents, float32: (mean + exp(log variance / 2) * noise) * scaling_factor.

    Moments are (N, h, w, 2C), NumPy or JAX; noise is (N, h, w, C), or None for the mean.
    """
    xp = np if isinstance(moments, np.ndarray) else jnp
    mean, log_variance = xp.split(moments.astype(xp.float32), 2, axis=-1)
    if noise is not None:
        mean = mean + xp.exp(log_variance / 2) * noise.astype(xp.float32)
    return mean * xp.float32(scaling_factor)


def make_latents_fn(
    kind: str, autoencoder: Autoencoder, *, latent_sampling: str, seed: int, mesh: Mesh
) -> Callable[[dict[str, Any], Any], dict[str, jax.Array]]:
    """The jitted function (batch, step) -> {"x": float32 scaled latents, "condition"}.

    A batch has "image", by the kind of its source "pictures", uint8 (N, H, W, C), which become the
    latents in [-1, 1] where there is no encoder; "moments", (N, h, w, 2C); or "latents", scaled.
    Of a posterior "sample" draws by (seed, step), "fixed" by (seed, the batch's "index" and
    "mirrored", both (N,)), "mean" does not draw.
    """
    _check_choice("data.latent_sampling", latent_sampling, "sample", "mean", "fixed")
    split, whole = batch_sharding(mesh), replicated(mesh)
    encode = autoencoder.encode_moments if kind == "pictures" else None

    def latents(params, batch, step):
        x = to_model_range(batch["image"])
        if encode is not None:
            x = encode_in_parts(encode, mesh)(params, x)
        if encode is not None or kind == "moments":
            noise = _noise(latent_sampling, seed, step, batch, x.shape)
            x = posterior_latents(x, noise, autoencoder.scaling_factor)
        return {"x": x, "condition": batch["condition"]}

    params = jax.device_put(autoencoder.params, whole) if kind == "pictures" else {}
    jitted = jax.jit(latents, in_shardings=(whole, split, whole), out_shardings=split)
    return functools.partial(jitted, params)


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
    """`encode_moments` of pictures split over the mesh, a few at a time on every device."""
    spec = PartitionSpec(BATCH_AXES)

    def part(params, pictures):
        def one(picture):
            return encode(params, picture[None])[0]

        return jax.lax.map(one, pictures, batch_size=_ENCODED_AT_ONCE)

    return jax.shard_map(part, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
