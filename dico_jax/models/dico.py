"""DiCo, the Diffusion ConvNet (arXiv 2505.11196, section 3): a U of five stages of conv blocks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dico_jax.errors import UsageError
from dico_jax.models.class_conditional import ClassConditional
from dico_jax.models.layers import (
    Conv3x3,
    Dense,
    DepthwiseConvGelu,
    LabelEmbedder,
    Modulation,
    Stage,
    TimestepEmbedder,
    check_feed_forward,
    linear_xavier_uniform,
    pixel_shuffle,
    pixel_unshuffle,
    zeros,
)
from dico_jax.ops.cpu import stored
from dico_jax.ops.pointwise import multiply_vector, norm_modulate


class ChannelAttention(nn.Module):
    """Compact channel attention: means over positions (N, C) to gates sigmoid(Linear(mean))."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, mean):
        width = mean.shape[-1]
        dense = Dense(width, self.dtype, name="1")
        return jax.nn.sigmoid(dense(mean))


class DiCoBlock(nn.Module):
    """Conv module and feed-forward, each modulated and gated by the conditioning (figure 4)."""

    width: int
    mlp_ratio: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, c):  # x (N, H, W, width), c (N, width)
        def conv1x1(features, name, **options):
            return Dense(features, self.dtype, name=name, **options)

        modulation = Modulation(6, self.width, self.dtype, name="adaLN_modulation")(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)

        h = norm_modulate(x, shift1, scale1)
        h = conv1x1(self.width, "conv1")(h)
        h, mean = DepthwiseConvGelu(self.dtype, name="conv2")(h)
        h = multiply_vector(h, ChannelAttention(self.dtype, name="ca")(mean))
        x = x + conv1x1(self.width, "conv3")(h, gate1)

        h = norm_modulate(x, shift2, scale2)
        h = conv1x1(int(self.mlp_ratio * self.width), "conv4", with_gelu=True)(h)
        return x + conv1x1(self.width, "conv5")(h, gate2)


class InputConv(nn.Module):
    """(N, H, W, in_channels) to (N, H, W, width), initialised as a linear layer of its patches."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return Conv3x3(self.width, self.dtype, kernel_init=linear_xavier_uniform, name="proj")(x)


class BiaslessConv(nn.Module):
    """A 3x3 convolution without bias."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return Conv3x3(self.width, self.dtype, use_bias=False, name="0")(x)


class Downsample(nn.Module):
    """(N, H, W, C) to (N, H/2, W/2, 2C)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return pixel_unshuffle(BiaslessConv(x.shape[-1] // 2, self.dtype, name="body")(x))


class Upsample(nn.Module):
    """(N, H, W, C) to (N, 2H, 2W, C/2)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return pixel_shuffle(BiaslessConv(2 * x.shape[-1], self.dtype, name="body")(x))


class FinalLayer(nn.Module):
    """LayerNorm, modulation and a 3x3 convolution to the output channels; zero at first."""

    out_channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, c):
        modulation = Modulation(2, x.shape[-1], self.dtype, name="adaLN_modulation")(c)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        h = norm_modulate(stored(x), shift, scale)
        return Conv3x3(self.out_channels, self.dtype, kernel_init=zeros, name="out_proj")(h)


class DiCo(ClassConditional):
    """A DiCo network, called as every `Denoiser`. `create_model` makes the published sizes.

    Attributes:
      hidden_size: width D of the first stage, even; the stages are D, 2D, 4D, 2D, 2D wide.
      depth: number of blocks of the five stages: encoder 1 and 2, latent, decoder 2 and 1.
      mlp_ratio: feed-forward width over block width (the product is cut to an integer).
    """

    hidden_size: int = 128
    depth: tuple[int, ...] = (5, 4, 4, 4, 4)
    mlp_ratio: float = 2.0

    size_divisor = 4  # the network halves height and width twice
    stages = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")

    def __post_init__(self):
        self.check_positive("hidden_size")
        check_feed_forward(self.hidden_size, self.mlp_ratio)
        if self.hidden_size % 2:
            raise UsageError("model.hidden_size", self.hidden_size, "must be even")
        if len(self.depth) != 5 or min(self.depth) < 1:
            fix = "must give the blocks of five stages, each at least 1, such as (5, 4, 4, 4, 4)"
            raise UsageError("model.depth", tuple(self.depth), fix)
        super().__post_init__()

    @nn.compact
    def forward(self, x, t, condition):
        """The U, by stages."""
        d, dtype, wide = self.hidden_size, self.dtype, self.wide_dtype
        widths = (d, 2 * d, 4 * d)
        tables = tuple((f"embedding_table_{k}", width) for k, width in enumerate(widths))
        embed = LabelEmbedder(self.num_label_rows, tables, wide, name="y_embedder")
        labels = embed(condition["label"])
        c1, c2, c3 = (
            TimestepEmbedder(width, wide, name=f"t_embedder_{k}")(t) + label
            for k, (width, label) in enumerate(zip(widths, labels, strict=True), start=1)
        )

        def stage(i, width):
            block = functools.partial(DiCoBlock, width, self.mlp_ratio, dtype)
            return Stage(
                self.depth[i], block, dtype, self.scan_blocks, self.remat, name=self.stages[i]
            )

        def fuse(x, skip, name):  # the upsampled part first, then the skip connection
            x = jnp.concatenate([x, skip], axis=-1)
            return Dense(2 * d, dtype, name=name)(x)

        x = InputConv(d, dtype, name="x_embedder")(x)
        skip1 = stage(0, d)(x, c1)  # (N, H, W, D)
        x = Downsample(dtype, name="down1_2")(skip1)
        skip2 = stage(1, 2 * d)(x, c2)  # (N, H/2, W/2, 2D)
        x = Downsample(dtype, name="down2_3")(skip2)
        x = stage(2, 4 * d)(x, c3)  # (N, H/4, W/4, 4D)
        x = Upsample(dtype, name="up3_2")(x)
        x = fuse(x, skip2, "reduce_chan_level2")
        x = stage(3, 2 * d)(x, c2)  # (N, H/2, W/2, 2D)
        x = Upsample(dtype, name="up2_1")(x)
        x = fuse(x, skip1, "reduce_chan_level1")
        x = stage(4, 2 * d)(x, c2)  # (N, H, W, 2D): 2D wide, unlike encoder 1
        return FinalLayer(self.out_channels, dtype, name="final_layer")(x, c2).astype(wide)
