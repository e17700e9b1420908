"""DiT, the Diffusion Transformer (arXiv 2212.09748), which the DiCo paper compares itself with."""

import functools
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.errors import UsageError
from dico_jax.models.class_conditional import ClassConditional
from dico_jax.models.layers import (
    Dense,
    LabelEmbedder,
    Modulation,
    Stage,
    TimestepEmbedder,
    check_feed_forward,
    linear_xavier_uniform,
    zeros,
)
from dico_jax.ops.attention import Implementation, self_attention
from dico_jax.ops.pointwise import add_vector, multiply_vector, norm_modulate


def position_embedding(height: int, width: int, channels: int) -> np.ndarray:
    """The fixed sine-cosine table, (height * width, channels) float64, rows before columns.

    The first half of the channels encodes the column, the second the row; each sines, then cosines.
    """
    quarter = channels // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)

    def encode(positions):  # (T,) to (T, channels / 2)
        angles = positions[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.divmod(np.arange(height * width, dtype=np.float64), width)
    return np.concatenate([encode(columns), encode(rows)], axis=1)


class PatchConv(nn.Module):
    """A linear layer of patches: (N, H, W, C) to (N, H/p, W/p, width); kernel (p, p, C, width)."""

    width: int
    patch_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        p = self.patch_size
        shape = (p, p, x.shape[-1], self.width)
        kernel = self.param("kernel", linear_xavier_uniform, shape, jnp.float32)
        bias = self.param("bias", zeros, (self.width,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jax.lax.conv_general_dilated(
            x, kernel, (p, p), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return add_vector(y, bias)


class PatchEmbed(nn.Module):
    """(N, H, W, C) to tokens (N, T, width), T running over rows, then columns."""

    patch_size: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        p = self.patch_size
        x = PatchConv(self.width, p, self.dtype, name="proj")(x)
        return x.reshape(x.shape[0], -1, self.width)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, C)."""

    num_heads: int
    dtype: jnp.dtype
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(self, x):
        n, tokens, width = x.shape
        head = width // self.num_heads
        dense = functools.partial(Dense, dtype=self.dtype)
        qkv = dense(3 * width, name="qkv")(x).reshape(n, tokens, 3, self.num_heads, head)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        out = self_attention(q, k, v, implementation=self.implementation)
        return dense(width, name="proj")(out.reshape(n, tokens, width))


class Mlp(nn.Module):
    """Linear, tanh GELU, Linear."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = Dense(self.hidden, self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], self.dtype, name="fc2")(jax.nn.gelu(h, approximate=True))


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (section 3.2)."""

    width: int
    num_heads: int
    mlp_ratio: float
    dtype: jnp.dtype
    attention: Implementation = "auto"

    @nn.compact
    def __call__(self, x, c):  # x (N, T, width), c (N, width)
        modulation = Modulation(6, self.width, self.dtype, name="adaLN_modulation")(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        h = norm_modulate(x, shift1, scale1)
        attention = Attention(self.num_heads, self.dtype, self.attention, name="attn")
        x = x + multiply_vector(attention(h), gate1)
        h = norm_modulate(x, shift2, scale2)
        mlp = Mlp(int(self.mlp_ratio * self.width), self.dtype, name="mlp")
        return x + multiply_vector(mlp(h), gate2)


class FinalLayer(nn.Module):
    """LayerNorm, modulation and a linear layer to the pixels of each patch; zero at first."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, c):
        modulation = Modulation(2, x.shape[-1], self.dtype, name="adaLN_modulation")(c)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        h = norm_modulate(x, shift, scale)
        return Dense(self.features, self.dtype, kernel_init=zeros, name="linear")(h)


class DiT(ClassConditional):
    """A DiT network, called as every `Denoiser`. `create_model` makes the published sizes.

    Attributes:
      hidden_size: width of the tokens, divisible by num_heads and by 4.
      depth: number of blocks.
      num_heads: number of attention heads.
      patch_size: side of a patch.
      mlp_ratio: feed-forward width over hidden_size.
      attention: implementation of self-attention, see `dico_jax.ops.attention`.
    """

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 2
    mlp_ratio: float = 4.0
    attention: Implementation = "auto"

    def __post_init__(self):
        self.check_positive("hidden_size", "num_heads", "depth", "patch_size")
        check_feed_forward(self.hidden_size, self.mlp_ratio)
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            fix = f"must divide by model.num_heads={self.num_heads} and by 4"
            raise UsageError("model.hidden_size", self.hidden_size, fix)
        if self.attention not in get_args(Implementation):
            fix = f"is unknown: use one of {', '.join(get_args(Implementation))}"
            raise UsageError("model.attention", self.attention, fix)
        super().__post_init__()

    stages = ("blocks",)

    @property
    def size_divisor(self) -> int:  # type: ignore[override]
        """What height and width of the input must divide by."""
        return self.patch_size

    @nn.compact
    def forward(self, x, t, condition):
        """Patches to tokens, blocks, tokens to pixels."""
        n, height, width, _ = x.shape
        rows, columns, p = height // self.patch_size, width // self.patch_size, self.patch_size
        d, dtype, wide = self.hidden_size, self.dtype, self.wide_dtype

        tables = (("embedding_table", d),)
        embed = LabelEmbedder(self.num_label_rows, tables, wide, name="y_embedder")
        c = TimestepEmbedder(d, wide, name="t_embedder")(t) + embed(condition["label"])[0]

        x = PatchEmbed(p, d, dtype, name="x_embedder")(x)  # (N, T, D)
        # The reference stores the table in float32, whatever it computes in.
        table = position_embedding(rows, columns, d).astype(np.float32)
        x = x + jnp.asarray(table, x.dtype)
        options = d, self.num_heads, self.mlp_ratio, dtype, self.attention
        block = functools.partial(DiTBlock, *options)
        x = Stage(self.depth, block, dtype, self.scan_blocks, self.remat, name="blocks")(x, c)
        x = FinalLayer(p * p * self.out_channels, dtype, name="final_layer")(x, c)

        x = x.reshape(n, rows, columns, p, p, self.out_channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, -1).astype(wide)
