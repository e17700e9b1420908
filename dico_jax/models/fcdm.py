"""FCDM, the fully convolutional diffusion model (arXiv 2603.09408): ConvNeXt's blocks in a U.

Of DiCo's U it has all but the width of the last stage, D, and a 3x3 convolution before the final
layer.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

from dico_jax.models import layers
from dico_jax.models.dico import LabelledTrunk
from dico_jax.models.layers import Conv3x3, Dense
from dico_jax.models.mixers import channel_attention, channel_attention_macs
from dico_jax.ops.plain import accumulation_dtype
from dico_jax.ops.pointwise import norm_modulate


class FCDMBlock(nn.Module):
    """Depthwise convolution, modulated norm, and two 1x1 convolutions, gated."""

    width: int
    mlp_ratio: float
    dtype: jnp.dtype
    channel_attention: str = "response_norm"
    kernel_size: int = 7
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x, c):  # x (N, H, W, width), c (N, width)
        shift, scale, gate = layers.modulation(self, 3, self.width, c)
        h = layers.DepthwiseConv(self.dtype, self.kernel_size, name="dwconv")(x)
        h = norm_modulate(h, shift, scale)
        hidden, activation = int(self.mlp_ratio * self.width), self.activation
        h = Dense(hidden, self.dtype, activation=activation, name="pwconv1")(h)
        mean = h.mean((1, 2), dtype=accumulation_dtype(h.dtype))
        name = "grn" if self.channel_attention == "response_norm" else "ca"
        h = channel_attention(self.channel_attention, self.dtype, h, mean, name)
        return x + Dense(self.width, self.dtype, name="pwconv2")(h, gate)


class FCDM(LabelledTrunk):
    """An FCDM network, called as every `Denoiser`. `create_model` makes the published sizes.

    Its `mlp_ratio` is the expansion of a block, which has no feed-forward besides.
    """

    depth: tuple[int, ...] = (2, 4, 8, 4, 2)
    mlp_ratio: float = 3.0
    channel_attention: str = "response_norm"
    kernel_size: int = 7

    multiples = (1, 2, 4, 2, 1)
    sums_per_block = 1
    has_conv_modules = False

    def block(self, width):
        options = self.channel_attention, self.kernel_size, self.activation
        return functools.partial(FCDMBlock, width, self.mlp_ratio, self.dtype, *options)

    def before_output(self, x):
        return Conv3x3(x.shape[-1], self.dtype, name="output_layer")(x)

    def block_macs(self, positions, width):
        hidden = int(self.mlp_ratio * width)
        attended = channel_attention_macs(self.channel_attention, positions, hidden)
        per_position = self.kernel_size**2 * width + 2 * width * hidden
        return 3 * width**2 + positions * per_position + attended

    def macs(self, positions):
        return super().macs(positions) + positions * 9 * self.stage_widths[-1] ** 2
