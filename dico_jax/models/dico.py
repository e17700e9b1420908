"""DiCo, the Diffusion ConvNet (arXiv 2505.11196, section 3): a U of five stages of conv blocks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dico_jax.models import layers
from dico_jax.models.block_stacks import Stage
from dico_jax.models.denoiser import ClassConditional, Denoiser
from dico_jax.models.layers import Conv3x3, Dense
from dico_jax.ops.pointwise import multiply_vector, norm_modulate


class ChannelAttention(nn.Module):
    """Compact channel attention: means over positions (N, C) to gates sigmoid(Linear(mean))."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, mean):
        return jax.nn.sigmoid(Dense(mean.shape[-1], self.dtype, name="1")(mean))


class DiCoBlock(nn.Module):
    """Conv module and feed-forward, each modulated and gated by the conditioning (figure 4)."""

    width: int
    mlp_ratio: float
    dtype: jnp.dtype
    fusion: Callable[..., nn.Module] | None = None  # of x with what the block is `given`

    @nn.compact
    def __call__(self, x, c, given=None):  # x (N, H, W, width), c (N, width)
        def conv1x1(features, name, **options):
            return Dense(features, self.dtype, name=name, **options)

        shift1, scale1, gate1, shift2, scale2, gate2 = layers.modulation(self, 6, self.width, c)

        h = norm_modulate(x, shift1, scale1)
        h = conv1x1(self.width, "conv1")(h)
        h, mean = layers.DepthwiseConvGelu(self.dtype, name="conv2")(h)
        h = multiply_vector(h, ChannelAttention(self.dtype, name="ca")(mean))
        x = x + conv1x1(self.width, "conv3")(h, gate1)
        if self.fusion is not None:
            x = self.fusion(name="text")(x, given)

        h = norm_modulate(x, shift2, scale2)
        h = conv1x1(int(self.mlp_ratio * self.width), "conv4", with_gelu=True)(h)
        return x + conv1x1(self.width, "conv5")(h, gate2)


class Resample(nn.Module):
    """A 3x3 convolution without bias to `features`, with half or twice the positions after it."""

    features: int
    dtype: jnp.dtype
    shuffle: Callable

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(Conv3x3, self.features, self.dtype, use_bias=False)
        return self.shuffle(layers.Named("0", conv, name="body")(x))


class Trunk(Denoiser):
    """What DiCo networks share, whatever they are told.

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

    def checks(self):
        yield from super().checks()
        yield "hidden_size", self.hidden_size % 2 == 0, "must be even"
        yield "mlp_ratio", int(self.mlp_ratio * self.hidden_size) > 0, "leaves no feed-forward"
        five = "must give the blocks of five stages, each at least 1, such as (5, 4, 4, 4, 4)"
        good = isinstance(self.depth, tuple) and len(self.depth) == 5 and min(self.depth) > 0
        yield "depth", good, five

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """The width of every one of `stages`."""
        return tuple(k * self.hidden_size for k in (1, 2, 4, 2, 2))

    def embed_condition(self, condition, widths: tuple[int, ...]) -> tuple[Any, Mapping]:
        """A vector (N, width) for every width, which those of the time are added to.

        Then, by stage, what the `fusion` of each of its blocks is given besides x.
        """
        raise NotImplementedError

    def fusion(self, width: int) -> Callable[..., nn.Module] | None:
        """What makes the module after the conv module of every block of a width, if any."""
        return None

    @nn.compact
    def forward(self, x, t, condition):
        d, dtype, wide = self.hidden_size, self.dtype, self.wide_dtype
        widths = (d, 2 * d, 4 * d)
        vectors, given = self.embed_condition(condition, widths)
        c1, c2, c3 = (
            layers.embed_times(t, width, wide, f"t_embedder_{k}") + vector
            for k, (width, vector) in enumerate(zip(widths, vectors, strict=True), start=1)
        )

        def stage(i, width):
            block = functools.partial(DiCoBlock, width, self.mlp_ratio, dtype, self.fusion(width))
            name, options = self.stages[i], (dtype, self.scan_blocks, self.remat)
            blocks = Stage(self.depth[i], block, *options, name=name)
            return functools.partial(blocks, own=given.get(name))

        def down(width, name):  # (N, H, W, width) to (N, H/2, W/2, 2 width)
            return Resample(width // 2, dtype, layers.pixel_unshuffle, name=name)

        def up(width, name):  # (N, H, W, width) to (N, 2H, 2W, width / 2)
            return Resample(2 * width, dtype, layers.pixel_shuffle, name=name)

        def fuse(x, skip, name):  # the upsampled part first, then the skip connection
            return Dense(2 * d, dtype, name=name)(jnp.concatenate([x, skip], axis=-1))

        proj = functools.partial(Conv3x3, d, dtype, kernel_init=layers.linear_xavier_uniform)
        x = layers.Named("proj", proj, name="x_embedder")(x)
        skip1 = stage(0, d)(x, c1)  # (N, H, W, D)
        x = down(d, "down1_2")(skip1)
        skip2 = stage(1, 2 * d)(x, c2)  # (N, H/2, W/2, 2D)
        x = down(2 * d, "down2_3")(skip2)
        x = stage(2, 4 * d)(x, c3)  # (N, H/4, W/4, 4D)
        x = fuse(up(4 * d, "up3_2")(x), skip2, "reduce_chan_level2")
        x = stage(3, 2 * d)(x, c2)  # (N, H/2, W/2, 2D)
        x = fuse(up(2 * d, "up2_1")(x), skip1, "reduce_chan_level1")
        x = stage(4, 2 * d)(x, c2)  # (N, H, W, 2D): 2D wide, unlike encoder 1
        proj = functools.partial(Conv3x3, self.out_channels, dtype)
        final = layers.FinalLayer("out_proj", proj, dtype, store_input=True, name="final_layer")
        return final(x, c2).astype(wide)

    def macs(self, positions):
        d = self.hidden_size
        full, half, quarter = positions, positions // 4, positions // 16  # of three resolutions
        vectors = sum(self.time_macs(width) for width in (d, 2 * d, 4 * d))
        vectors += 2 * d * (2 * 2 * d)  # the final layer's modulation
        ends = full * 9 * (self.in_channels * d + 2 * d * self.out_channels)
        down = full * 9 * d * (d // 2) + half * 9 * (2 * d) * d
        up = quarter * 9 * (4 * d) * (8 * d) + half * 9 * (2 * d) * (4 * d)
        fuse = half * (4 * d) * (2 * d) + full * (2 * d) * (2 * d)

        def block(size, width):  # modulation and attention are of vectors, once per image
            feed_forward = 2 * width * int(self.mlp_ratio * width)
            return 7 * width**2 + size * (2 * width**2 + 9 * width + feed_forward)

        sizes, widths = (full, half, quarter, half, full), (d, 2 * d, 4 * d, 2 * d, 2 * d)
        blocks = sum(n * block(*at) for n, *at in zip(self.depth, sizes, widths, strict=True))
        return vectors + ends + down + up + fuse + blocks


class DiCo(Trunk, ClassConditional):
    """A DiCo network, called as every `Denoiser`. `create_model` makes the published sizes."""

    def embed_condition(self, condition, widths):
        tables = tuple((f"embedding_table_{k}", width) for k, width in enumerate(widths))
        return self.embed_labels(condition, tables), {}
