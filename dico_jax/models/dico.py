"""DiCo, the Diffusion ConvNet (arXiv 2505.11196, section 3): a U of five stages of conv blocks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from dico_jax.models import layers
from dico_jax.models.block_stacks import Stage
from dico_jax.models.denoiser import ClassConditional, Denoiser
from dico_jax.models.layers import Conv3x3, Dense
from dico_jax.models.mixers import (
    Attention,
    attend,
    attention_macs,
    channel_attention,
    channel_attention_macs,
)
from dico_jax.ops.attention import Implementation
from dico_jax.ops.pointwise import multiply_vector, norm_modulate


class ConvModule(NamedTuple):
    """1x1 convolution, depthwise convolution, activation, channel attention, 1x1 convolution."""

    channel_attention: str = "compact"
    kernel_size: int = 3
    activation: str = "gelu"

    def add(self, x, h, gate, dtype):  # inside a block, whose modules these are
        h = Dense(x.shape[-1], dtype, name="conv1")(h)
        conv = layers.DepthwiseConv(dtype, self.kernel_size, self.activation, name="conv2")
        h = channel_attention(self.channel_attention, dtype, *conv(h))
        return x + Dense(x.shape[-1], dtype, name="conv3")(h, gate)

    def macs(self, positions: int, width: int) -> int:
        attended = channel_attention_macs(self.channel_attention, positions, width)
        return positions * (2 * width**2 + self.kernel_size**2 * width) + attended


class AttentionModule(NamedTuple):
    """Self-attention of the positions, in windows if their side is not 0."""

    activation: str = "gelu"
    window: int = 0
    attention: Implementation = "auto"

    def add(self, x, h, gate, dtype):
        module = Attention(0, dtype, self.attention, name="attn")
        return x + multiply_vector(attend(module, h, self.window), gate)

    def macs(self, positions: int, width: int) -> int:
        return attention_macs(positions, width, self.window)


class DiCoBlock(nn.Module):
    """Conv module and feed-forward, each modulated and gated by the conditioning (figure 4)."""

    width: int
    mlp_ratio: float
    dtype: jnp.dtype
    fusion: Callable[..., nn.Module] | None = None  # of x with what the block is `given`
    mixer: ConvModule | AttentionModule = ConvModule()

    @nn.compact
    def __call__(self, x, c, given=None):  # x (N, H, W, width), c (N, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = layers.modulation(self, 6, self.width, c)

        h = norm_modulate(x, shift1, scale1)
        x = self.mixer.add(x, h, gate1, self.dtype)
        if self.fusion is not None:
            x = self.fusion(name="text")(x, given)

        h = norm_modulate(x, shift2, scale2)
        hidden, activation = int(self.mlp_ratio * self.width), self.mixer.activation
        h = Dense(hidden, self.dtype, activation=activation, name="conv4")(h)
        return x + Dense(self.width, self.dtype, name="conv5")(h, gate2)


class ConvBlocks(Denoiser):
    """What networks of conv blocks share.

    Attributes:
      mlp_ratio: feed-forward width over block width (the product is cut to an integer).
      channel_attention: "compact" (CCA), "squeeze_excite", "self_attention" (of channels to each
        other), "response_norm" (FCDM's) or "none".
      kernel_size: side of the depthwise convolution's kernel, 3, 5 or 7.
      activation: "gelu" or "relu", everywhere inside the blocks.
    """

    mlp_ratio: float = 2.0
    channel_attention: str = "compact"
    kernel_size: int = 3
    activation: str = "gelu"

    variants: ClassVar[tuple[str, ...]] = ("channel_attention", "kernel_size", "activation")

    def checks(self):
        yield from super().checks()
        width = getattr(self, "hidden_size", 0)
        yield "mlp_ratio", int(self.mlp_ratio * width) > 0, "leaves no feed-forward"

    @property
    def mixer_module(self) -> ConvModule | AttentionModule:
        """What mixes positions in the blocks."""
        return ConvModule(self.channel_attention, self.kernel_size, self.activation)

    def block_macs(self, positions: int, width: int) -> int:
        """Multiply-adds of a block of so many positions."""
        feed_forward = 2 * width * int(self.mlp_ratio * width)
        mixed = self.mixer_module.macs(positions, width)
        return 6 * width**2 + positions * feed_forward + mixed  # the modulation is once per image


class Resample(nn.Module):
    """A 3x3 convolution without bias to `features`, with half or twice the positions after it."""

    features: int
    dtype: jnp.dtype
    shuffle: Callable

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(Conv3x3, self.features, self.dtype, use_bias=False)
        return self.shuffle(layers.Named("0", conv, name="body")(x))


class Trunk(ConvBlocks):
    """What DiCo networks share, whatever they are told.

    Attributes:
      hidden_size: width D of the first stage, even; the stages are D, 2D, 4D, 2D, 2D wide.
      depth: number of blocks of the five stages: encoder 1 and 2, latent, decoder 2 and 1.
    """

    hidden_size: int = 128
    depth: tuple[int, ...] = (5, 4, 4, 4, 4)

    size_divisor = 4  # the network halves height and width twice
    multiples: ClassVar[tuple[int, ...]] = (1, 2, 4, 2, 2)  # widths of the stages over hidden_size
    sums_per_block = 2  # pairs of matrix products in a row

    @property
    def has_conv_modules(self) -> bool:
        """Whether its blocks are the published ones."""
        return not self.variant

    stages = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")

    def checks(self):
        yield from super().checks()
        yield "hidden_size", self.hidden_size % 2 == 0, "must be even"
        five = "must give the blocks of five stages, each at least 1, such as (5, 4, 4, 4, 4)"
        good = isinstance(self.depth, tuple) and len(self.depth) == 5 and min(self.depth) > 0
        yield "depth", good, five

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """The width of every one of `stages`."""
        return tuple(k * self.hidden_size for k in self.multiples)

    def embed_condition(self, condition, widths: tuple[int, ...]) -> tuple[Any, Mapping]:
        """A vector (N, width) for every width, which those of the time are added to.

        Then, by stage, what the `fusion` of each of its blocks is given besides x.
        """
        raise NotImplementedError

    def fusion(self, width: int) -> Callable[..., nn.Module] | None:
        """What makes the module after the conv module of every block of a width, if any."""
        return None

    def block(self, width: int) -> Callable[..., nn.Module]:
        """What makes a block of a width."""
        options = self.mlp_ratio, self.dtype, self.fusion(width), self.mixer_module
        return functools.partial(DiCoBlock, width, *options)

    def before_output(self, x):
        """What x (N, H, W, width of the last stage) passes before the final layer."""
        return x

    @nn.compact
    def forward(self, x, t, condition):
        d, dtype, wide = self.hidden_size, self.dtype, self.wide_dtype
        widths, last = (d, 2 * d, 4 * d), self.stage_widths[-1]
        vectors, given = self.embed_condition(condition, widths)
        c = {
            width: layers.embed_times(t, width, wide, f"t_embedder_{k}") + vector
            for k, (width, vector) in enumerate(zip(widths, vectors, strict=True), start=1)
        }

        def stage(i, x):
            name, width = self.stages[i], self.stage_widths[i]
            options = self.block(width), dtype, self.scan_blocks, self.remat
            return Stage(self.depth[i], *options, name=name)(x, c[width], own=given.get(name))

        def down(width, name):  # (N, H, W, width) to (N, H/2, W/2, 2 width)
            return Resample(width // 2, dtype, layers.pixel_unshuffle, name=name)

        def up(width, name):  # (N, H, W, width) to (N, 2H, 2W, width / 2)
            return Resample(2 * width, dtype, layers.pixel_shuffle, name=name)

        def fuse(x, skip, width, name):  # the upsampled part first, then the skip connection
            return Dense(width, dtype, name=name)(jnp.concatenate([x, skip], axis=-1))

        proj = functools.partial(Conv3x3, d, dtype, kernel_init=layers.linear_xavier_uniform)
        x = layers.Named("proj", proj, name="x_embedder")(x)
        skip1 = stage(0, x)  # (N, H, W, D)
        x = down(d, "down1_2")(skip1)
        skip2 = stage(1, x)  # (N, H/2, W/2, 2D)
        x = down(2 * d, "down2_3")(skip2)
        x = stage(2, x)  # (N, H/4, W/4, 4D)
        x = fuse(up(4 * d, "up3_2")(x), skip2, 2 * d, "reduce_chan_level2")
        x = stage(3, x)  # (N, H/2, W/2, 2D)
        x = fuse(up(2 * d, "up2_1")(x), skip1, last, "reduce_chan_level1")
        x = self.before_output(stage(4, x))  # (N, H, W, 2D): 2D wide, unlike encoder 1
        proj = functools.partial(Conv3x3, self.out_channels, dtype)
        final = layers.FinalLayer("out_proj", proj, dtype, store_input=True, name="final_layer")
        return final(x, c[last]).astype(wide)

    def macs(self, positions):
        d, last = self.hidden_size, self.stage_widths[-1]
        full, half, quarter = positions, positions // 4, positions // 16  # of three resolutions
        vectors = sum(self.time_macs(width) for width in (d, 2 * d, 4 * d))
        vectors += last * 2 * last  # the final layer's modulation
        ends = full * 9 * (self.in_channels * d + last * self.out_channels)
        down = full * 9 * d * (d // 2) + half * 9 * (2 * d) * d
        up = quarter * 9 * (4 * d) * (8 * d) + half * 9 * (2 * d) * (4 * d)
        fuse = half * (4 * d) * (2 * d) + full * (2 * d) * last

        stages = zip(self.depth, (full, half, quarter, half, full), self.stage_widths, strict=True)
        blocks = sum(depth * self.block_macs(*at) for depth, *at in stages)
        return vectors + ends + down + up + fuse + blocks


class LabelledTrunk(Trunk, ClassConditional):
    """A trunk that is told a class, by a table for every width."""

    def embed_condition(self, condition, widths):
        tables = tuple((f"embedding_table_{k}", width) for k, width in enumerate(widths))
        return self.embed_labels(condition, tables), {}


class DiCo(LabelledTrunk):
    """A DiCo network, called as every `Denoiser`. `create_model` makes the published sizes.

    Attributes:
      layout: "u"; `create_model` makes an `IsoDiCo` of the others.
      mixer: what mixes positions: "conv", the conv module, or multi-head self-attention in its
        place, "attention" of all positions or "window_attention" inside windows.
      window_size: side of a window, in positions of every stage.
      attention: see `dico_jax.ops.attention`.
    """

    layout: str = "u"
    mixer: str = "conv"
    window_size: int = 8
    attention: Implementation = "auto"

    variants = (*ConvBlocks.variants, "mixer")

    def checks(self):
        yield from super().checks()
        yield "layout", self.layout == "u", "is IsoDiCo's: create_model makes that"
        conv, windows = self.mixer == "conv", self.mixer == "window_attention"
        idle = dict.fromkeys(("channel_attention", "kernel_size"), not conv)
        idle |= {"window_size": not windows, "attention": conv}
        yield from self.without_effect(idle, "mixer")

    @property
    def windows(self) -> int:  # type: ignore[override]
        return self.window_size if self.mixer == "window_attention" else 0

    @property
    def size_divisor(self) -> int:  # type: ignore[override]
        return 4 * (self.windows or 1)

    @property
    def mixer_module(self):
        if self.mixer == "conv":
            return super().mixer_module
        return AttentionModule(self.activation, self.windows, self.attention)
