"""Stable Diffusion's autoencoder, which diffusers calls AutoencoderKL.

A picture becomes the means and log variances of a Gaussian per latent position; a latent becomes a
picture. Modules carry the names of diffusers' modules, positions in lists included, so that a
parameter path joined with dots is a state dict's key (see `dico_jax.pytorch.key_maps`).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dico_jax.errors import UsageError
from dico_jax.models.layers import Conv3x3
from dico_jax.ops.plain import accumulation_dtype

# What the log variance is clamped to.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Sizes of an autoencoder; the defaults are those of Stable Diffusion 1 and 2.

    Attributes:
      block_out_channels: width of every level, from full size on; each is half the one before.
      layers_per_block: residual blocks per level of the encoder; the decoder has one more.
      latent_channels: channels of a latent.
      norm_num_groups: groups of every GroupNorm.
      scaling_factor: latents are multiplied by it for the diffusion model.
      in_channels: of a picture.
      out_channels: of a picture that was decoded.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    in_channels: int = 3
    out_channels: int = 3

    def __post_init__(self):
        groups = self.norm_num_groups
        wrong = [width for width in self.block_out_channels if groups < 1 or width % groups]
        if wrong:
            raise UsageError(
                f"norm_num_groups={groups} does not divide the {wrong[0]} channels of a level"
            )
        if not 0 < self.scaling_factor < float("inf"):
            raise UsageError(f"scaling_factor={self.scaling_factor} must be above 0")

    @property
    def downsampling(self) -> int:
        """Pixels per latent position, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


def _group_norm(groups: int, dtype, name: str) -> nn.GroupNorm:
    """GroupNorm whose statistics are float32 or better, from centred values."""
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
    """Two times GroupNorm, SiLU, 3x3 convolution, added to the (widened) input."""

    width: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = x
        for i in ("1", "2"):
            h = nn.silu(_group_norm(self.groups, self.dtype, f"norm{i}")(h))
            h = Conv3x3(self.width, self.dtype, name=f"conv{i}")(h)
        if x.shape[-1] != self.width:
            x = nn.Dense(self.width, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class ModuleList(nn.Module):
    """Modules under the names "0", "1", ..., as in PyTorch's class of that name."""

    @nn.compact
    def __call__(self, i, make, x):
        """What number `i`, made by `make(name=...)`, makes of x."""
        return make(name=str(i))(x)


class Attention(nn.Module):
    """Self-attention over all positions with one head, added to the input."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        n, height, width, c = x.shape
        h = _group_norm(self.groups, self.dtype, "group_norm")(x).reshape(n, height * width, c)
        q, k, v = (nn.Dense(c, dtype=self.dtype, name=f"to_{i}")(h) for i in "qkv")
        wide = accumulation_dtype(self.dtype)
        scores = jnp.einsum("nqc,nkc->nqk", q, k, preferred_element_type=wide)
        weights = nn.softmax(scores / c**0.5).astype(self.dtype)
        h = jnp.einsum("nqk,nkc->nqc", weights, v)
        h = ModuleList(name="to_out")(0, functools.partial(nn.Dense, c, dtype=self.dtype), h)
        return x + h.reshape(x.shape)


class Downsample(nn.Module):
    """(N, H, W, C) to (N, H/2, W/2, C); the zero padding is at the bottom and right only."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        padding = ((0, 1), (0, 1))
        conv = nn.Conv(x.shape[-1], (3, 3), 2, padding, dtype=self.dtype, name="conv")
        return conv(x)


class Upsample(nn.Module):
    """(N, H, W, C) to (N, 2H, 2W, C): every position four times, then a convolution."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        n, height, width, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, c))
        x = x.reshape(n, 2 * height, 2 * width, c)
        return Conv3x3(c, self.dtype, name="conv")(x)


class Level(nn.Module):
    """Residual blocks of one width at one size, then a change of size where there is one."""

    width: int
    depth: int
    groups: int
    dtype: jnp.dtype
    resample: str | None = None  # "downsamplers" or "upsamplers"

    @nn.compact
    def __call__(self, x):
        resnets = ModuleList(name="resnets")
        for i in range(self.depth):
            block = functools.partial(ResnetBlock, self.width, self.groups, self.dtype)
            x = resnets(i, block, x)
        if self.resample is None:
            return x
        module = {"downsamplers": Downsample, "upsamplers": Upsample}[self.resample]
        return ModuleList(name=self.resample)(0, functools.partial(module, self.dtype), x)


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        resnets, attentions = ModuleList(name="resnets"), ModuleList(name="attentions")
        block = functools.partial(ResnetBlock, x.shape[-1], self.groups, self.dtype)
        x = resnets(0, block, x)
        x = attentions(0, functools.partial(Attention, self.groups, self.dtype), x)
        return resnets(1, block, x)


class Encoder(nn.Module):
    """Pictures (N, H, W, 3) to (N, h, w, 2C), which quant_conv makes moments of."""

    config: KLConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        config, dtype = self.config, self.dtype
        groups, last = config.norm_num_groups, len(config.block_out_channels) - 1
        x = Conv3x3(config.block_out_channels[0], dtype, name="conv_in")(x)
        down_blocks = ModuleList(name="down_blocks")
        for i, width in enumerate(config.block_out_channels):
            resample = "downsamplers" if i < last else None
            depth = config.layers_per_block
            level = functools.partial(Level, width, depth, groups, dtype, resample)
            x = down_blocks(i, level, x)
        x = MiddleBlock(groups, dtype, name="mid_block")(x)
        x = nn.silu(_group_norm(groups, dtype, "conv_norm_out")(x))
        return Conv3x3(2 * config.latent_channels, dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents (N, h, w, C), after post_quant_conv, to pictures (N, H, W, 3)."""

    config: KLConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        config, dtype = self.config, self.dtype
        groups, last = config.norm_num_groups, len(config.block_out_channels) - 1
        widths = config.block_out_channels[::-1]
        x = Conv3x3(widths[0], dtype, name="conv_in")(x)
        x = MiddleBlock(groups, dtype, name="mid_block")(x)
        up_blocks = ModuleList(name="up_blocks")
        for i, width in enumerate(widths):
            resample = "upsamplers" if i < last else None
            depth = config.layers_per_block + 1
            level = functools.partial(Level, width, depth, groups, dtype, resample)
            x = up_blocks(i, level, x)
        x = nn.silu(_group_norm(groups, dtype, "conv_norm_out")(x))
        return Conv3x3(config.out_channels, dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The autoencoder, called as `model.apply({"params": params}, x, method="encode")`.

    `decode` needs the parameters of the decoder alone, `encode` those of the encoder. Latents are
    unscaled here (see `dico_jax.autoencoders.registry`).

    Attributes:
      config: the sizes.
      dtype: dtype of activations: float32, bfloat16, or float64 (which needs jax_enable_x64).
        Parameters are float32; statistics, the attention's softmax and what is returned are
        float32 or better.
    """

    config: KLConfig = KLConfig()
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self):
        latents = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = nn.Dense(2 * latents, dtype=self.dtype)
        self.post_quant_conv = nn.Dense(latents, dtype=self.dtype)

    def encode(self, pictures):
        """Pictures (N, H, W, 3) in [-1, 1] to moments (N, h, w, 2C).

        Moments are the posterior's mean, then its log variance, clamped to [-30, 20].

        Raises:
          UsageError: height or width do not divide by `config.downsampling`.
        """
        height, width = pictures.shape[1:3]
        step = self.config.downsampling
        if height % step or width % step or not height * width:
            raise UsageError(
                f"pictures of {height}x{width}: both must be multiples of {step}, which the "
                "autoencoder shrinks them by"
            )
        moments = self.quant_conv(self.encoder(pictures.astype(self.dtype)))
        mean, log_variance = jnp.split(moments.astype(accumulation_dtype(self.dtype)), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)], axis=-1)

    def decode(self, latents):
        """Latents (N, h, w, C) to pictures (N, H, W, 3), of which [-1, 1] is shown."""
        pictures = self.decoder(self.post_quant_conv(latents.astype(self.dtype)))
        return pictures.astype(accumulation_dtype(self.dtype))

    def __call__(self, pictures):
        """Pictures through both halves, by way of the posterior's mean."""
        mean, _ = jnp.split(self.encode(pictures), 2, axis=-1)
        return self.decode(mean)


@functools.cache
def abstract_params(config: KLConfig) -> Any:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without computing anything."""
    side = config.downsampling
    pictures = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    return jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), pictures)["params"]
