"""Stable Diffusion's autoencoder, which diffusers calls AutoencoderKL.

Modules carry the names of diffusers' modules, positions in lists included, so that a parameter path
joined with dots is a state dict's key (see `dico_jax.pytorch.key_maps`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.errors import UsageError
from dico_jax.models.layers import Conv3x3
from dico_jax.ops.plain import accumulation_dtype, check_float64


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Sizes of an autoencoder; the defaults are those of Stable Diffusion 1 and 2."""

    # Width of every level, from full size on; each is half the one before.
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # residual blocks per level; the decoder has one more
    latent_channels: int = 4
    norm_num_groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # latents are multiplied by it for the diffusion model
    in_channels: int = 3
    out_channels: int = 3

    def __post_init__(self):
        groups = self.norm_num_groups
        for width in self.block_out_channels:
            if groups < 1 or width % groups:
                fix = f"does not divide the {width} channels of a level"
                raise UsageError("norm_num_groups", groups, fix)
        if not 0 < self.scaling_factor < float("inf"):
            raise UsageError("scaling_factor", self.scaling_factor, "must be above 0")

    @property
    def downsampling(self) -> int:  # pixels per latent position, along each side
        return 2 ** (len(self.block_out_channels) - 1)


class ModuleList(nn.Module):
    """Modules under the names "0", "1", ..., as in PyTorch's class of that name."""

    @nn.compact
    def __call__(self, i, x, kind, *args, **kwargs):
        return kind(*args, **kwargs, name=str(i))(x)


class Part(nn.Module):
    """What the parts share: GroupNorm's statistics are float32 or better, of centred values."""

    config: KLConfig
    dtype: jnp.dtype

    def norm(self, name: str) -> nn.GroupNorm:
        groups, dtype = self.config.norm_num_groups, self.dtype
        return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


class ResnetBlock(Part):
    """Two times GroupNorm, SiLU, 3x3 convolution, added to the (widened) input."""

    width: int

    @nn.compact
    def __call__(self, x):
        h = x
        for i in ("1", "2"):
            h = nn.silu(self.norm(f"norm{i}")(h))
            h = Conv3x3(self.width, self.dtype, name=f"conv{i}")(h)
        if x.shape[-1] != self.width:
            x = nn.Dense(self.width, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Attention(Part):
    """Self-attention over all positions with one head, added to the input."""

    @nn.compact
    def __call__(self, x):
        n, height, width, c = x.shape
        h = self.norm("group_norm")(x).reshape(n, height * width, c)
        q, k, v = (nn.Dense(c, dtype=self.dtype, name=f"to_{i}")(h) for i in "qkv")
        wide = accumulation_dtype(self.dtype)
        scores = jnp.einsum("nqc,nkc->nqk", q, k, preferred_element_type=wide)
        weights = nn.softmax(scores / c**0.5).astype(self.dtype)
        h = jnp.einsum("nqk,nkc->nqc", weights, v)
        h = ModuleList(name="to_out")(0, h, nn.Dense, c, dtype=self.dtype)
        return x + h.reshape(x.shape)


class Resample(Part):
    """Changes the size: half of it, with zeros at the bottom and right only, or twice as large."""

    down: bool

    @nn.compact
    def __call__(self, x):
        n, height, width, c = x.shape
        if self.down:
            padding = ((0, 1), (0, 1))
            return nn.Conv(c, (3, 3), 2, padding, dtype=self.dtype, name="conv")(x)
        x = jnp.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, c))
        x = x.reshape(n, 2 * height, 2 * width, c)
        return Conv3x3(c, self.dtype, name="conv")(x)


class Level(Part):
    """Residual blocks of one width at one size; in the middle attention after the first of them."""

    width: int
    depth: int
    resample: str | None = None  # the change of size at the end: "downsamplers" or "upsamplers"
    attention: bool = False

    @nn.compact
    def __call__(self, x):
        shared, resnets = (self.config, self.dtype), ModuleList(name="resnets")
        for i in range(self.depth):
            x = resnets(i, x, ResnetBlock, *shared, self.width)
            if self.attention and i == 0:
                x = ModuleList(name="attentions")(0, x, Attention, *shared)
        if self.resample:
            down = self.resample == "downsamplers"
            x = ModuleList(name=self.resample)(0, x, Resample, *shared, down)
        return x


class Half(Part):
    """The encoder, which quant_conv follows, or the decoder, which post_quant_conv precedes."""

    decodes: bool

    @nn.compact
    def __call__(self, x):
        config, shared = self.config, (self.config, self.dtype)
        widths, depth = config.block_out_channels, config.layers_per_block
        channels, names = 2 * config.latent_channels, ("down_blocks", "downsamplers")
        middle = Level(*shared, widths[-1], 2, attention=True, name="mid_block")
        if self.decodes:
            widths, depth = widths[::-1], depth + 1
            channels, names = config.out_channels, ("up_blocks", "upsamplers")
        x = Conv3x3(widths[0], self.dtype, name="conv_in")(x)
        x = middle(x) if self.decodes else x
        levels = ModuleList(name=names[0])
        for i, width in enumerate(widths):
            resample = names[1] if i + 1 < len(widths) else None
            x = levels(i, x, Level, *shared, width, depth, resample)
        x = x if self.decodes else middle(x)
        x = nn.silu(self.norm("conv_norm_out")(x))
        return Conv3x3(channels, self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The autoencoder, called as `model.apply({"params": params}, x, method="encode")`.

    `encode` and `decode` need the parameters of their half alone. Latents are unscaled here.
    Parameters are float32; statistics, softmax and what is returned are float32 or better.
    """

    config: KLConfig = KLConfig()
    dtype: jnp.dtype = jnp.dtype("float32")  # of activations, or bfloat16, or float64

    def setup(self):
        check_float64("dtype", self.dtype)
        latents = self.config.latent_channels
        self.encoder = Half(self.config, self.dtype, decodes=False)
        self.decoder = Half(self.config, self.dtype, decodes=True)
        self.quant_conv = nn.Dense(2 * latents, dtype=self.dtype)
        self.post_quant_conv = nn.Dense(latents, dtype=self.dtype)

    def encode(self, pictures):
        """Pictures (N, H, W, 3) in [-1, 1] to moments (N, h, w, 2C): mean, clamped log variance."""
        height, width = pictures.shape[1:3]
        step = self.config.downsampling
        if height % step or width % step or not height * width:
            fix = f"both must be multiples of {step}, which the autoencoder shrinks them by"
            raise UsageError(f"pictures of {height}x{width}: {fix}")
        moments = self.quant_conv(self.encoder(pictures.astype(self.dtype)))
        mean, log_variance = jnp.split(moments.astype(accumulation_dtype(self.dtype)), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_variance, -30.0, 20.0)], axis=-1)

    def decode(self, latents):
        """Latents (N, h, w, C) to pictures (N, H, W, 3), of which [-1, 1] is shown."""
        pictures = self.decoder(self.post_quant_conv(latents.astype(self.dtype)))
        return pictures.astype(accumulation_dtype(self.dtype))

    def __call__(self, pictures):
        return self.decode(jnp.split(self.encode(pictures), 2, axis=-1)[0])


@functools.cache
def abstract_params(config: KLConfig) -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without computing anything."""
    side = config.downsampling
    pictures = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    return jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), pictures)["params"]


# Of tiles, for pictures whose activations do not fit in memory: latent positions a side.
MIN_TILE = 8  # statistics over fewer change the colours too much


def cut(length: int, tile_size: int, downsampling: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a side's tiles start (K,), and their pixels' weights (K, P), which add up to 1."""
    size = min(tile_size, length)
    overlap = size // 4  # at least: the last tile is at the edge
    inner = np.arange(0, length - size, size - overlap)
    starts = np.append(inner, length - size).astype(np.int32)
    ramp = (np.arange(size * downsampling) + 0.5) / (overlap * downsampling or 1)
    rising = np.minimum(1, ramp)
    weights = np.ones((len(starts), size * downsampling))
    weights[1:] *= rising  # the picture's own edges have no transition
    weights[:-1] *= rising[::-1]
    pixels = downsampling * starts[:, None] + np.arange(size * downsampling)
    total = np.bincount(pixels.ravel(), weights.ravel())
    return starts, (weights / total[pixels]).astype(np.float32)


def decode_in_tiles(
    decode: Callable[[jax.Array], Any], latents: jax.Array, tile_size: int, downsampling: int
) -> jax.Array:
    """`decode(latents)` by tiles; colours differ a little, as norms and attention see one tile."""
    n, height, width, channels = latents.shape
    if not tile_size or max(height, width) <= tile_size:
        return decode(latents)
    tops, rows = cut(height, tile_size, downsampling)
    lefts, columns = cut(width, tile_size, downsampling)
    tile_shape = (n, min(tile_size, height), min(tile_size, width), channels)
    tile = jax.eval_shape(decode, jax.ShapeDtypeStruct(tile_shape, latents.dtype))
    i, j = (index.ravel() for index in np.indices((len(tops), len(lefts))))

    def step(pictures, item):
        top, left, row_weights, column_weights = item
        part = jax.lax.dynamic_slice(latents, (0, top, left, 0), tile_shape)
        weights = (row_weights[:, None] * column_weights)[..., None]
        part = decode(part) * weights.astype(tile.dtype)
        at = (0, top * downsampling, left * downsampling, 0)
        part += jax.lax.dynamic_slice(pictures, at, part.shape)
        return jax.lax.dynamic_update_slice(pictures, part, at), None

    shape = (n, height * downsampling, width * downsampling, tile.shape[-1])
    tiles = (tops[i], lefts[j], rows[i], columns[j])
    return jax.lax.scan(step, jnp.zeros(shape, tile.dtype), tiles)[0]
