"""DiT, the Diffusion Transformer (arXiv 2212.09748), which the DiCo paper compares itself with."""

import functools
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.models import layers
from dico_jax.models.block_stacks import Stage
from dico_jax.models.denoiser import ClassConditional
from dico_jax.models.layers import Dense
from dico_jax.ops.attention import Implementation, attention
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
    """A linear layer of patches: (N, H, W, C) to tokens (N, T, width), rows before columns."""

    width: int
    patch_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        p, init = self.patch_size, layers.linear_xavier_uniform
        x, kernel, bias = layers.weighted(self, x, (p, p, x.shape[-1], self.width), init)
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (p, p), "VALID", dimension_numbers=layout)
        return add_vector(y, bias).reshape(x.shape[0], -1, self.width)


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
        out = attention(q, k, v, implementation=self.implementation)
        return dense(width, name="proj")(out.reshape(n, tokens, width))


class Mlp(nn.Module):
    """Linear, tanh GELU, Linear."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = jax.nn.gelu(Dense(self.hidden, self.dtype, name="fc1")(x), approximate=True)
        return Dense(x.shape[-1], self.dtype, name="fc2")(h)


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (section 3.2)."""

    width: int
    num_heads: int
    mlp_ratio: float
    dtype: jnp.dtype
    attention: Implementation = "auto"

    @nn.compact
    def __call__(self, x, c):  # x (N, T, width), c (N, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = layers.modulation(self, 6, self.width, c)
        h = norm_modulate(x, shift1, scale1)
        attention = Attention(self.num_heads, self.dtype, self.attention, name="attn")
        x = x + multiply_vector(attention(h), gate1)
        h = norm_modulate(x, shift2, scale2)
        mlp = Mlp(int(self.mlp_ratio * self.width), self.dtype, name="mlp")
        return x + multiply_vector(mlp(h), gate2)


class DiT(ClassConditional):
    """A DiT network, called as every `Denoiser`. `create_model` makes the published sizes.

    Attributes:
      hidden_size: width of the tokens, divisible by num_heads and by 4.
      depth, num_heads, patch_size: blocks, attention heads, side of a patch.
      mlp_ratio: feed-forward width over hidden_size.
      attention: see `dico_jax.ops.attention`.
    """

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 2
    mlp_ratio: float = 4.0
    attention: Implementation = "auto"

    stages = ("blocks",)

    def checks(self):
        yield from super().checks()
        yield "mlp_ratio", int(self.mlp_ratio * self.hidden_size) > 0, "leaves no feed-forward"
        divides = self.hidden_size % self.num_heads == self.hidden_size % 4 == 0
        yield "hidden_size", divides, f"must divide by model.num_heads={self.num_heads} and by 4"
        known = get_args(Implementation)
        yield "attention", self.attention in known, f"is unknown: use one of {', '.join(known)}"

    @property
    def size_divisor(self) -> int:  # type: ignore[override]
        return self.patch_size

    @nn.compact
    def forward(self, x, t, condition):
        n, height, width, _ = x.shape
        rows, columns, p = height // self.patch_size, width // self.patch_size, self.patch_size
        d, dtype, wide = self.hidden_size, self.dtype, self.wide_dtype

        c = layers.embed_times(t, d, wide, "t_embedder")
        c += self.embed_labels(condition, (("embedding_table", d),))[0]

        proj = functools.partial(PatchConv, d, p, dtype)
        x = layers.Named("proj", proj, name="x_embedder")(x)  # (N, T, D)
        # The reference stores the table in float32, whatever it computes in.
        x += jnp.asarray(position_embedding(rows, columns, d).astype(np.float32), x.dtype)
        options = d, self.num_heads, self.mlp_ratio, dtype, self.attention
        block = functools.partial(DiTBlock, *options)
        x = Stage(self.depth, block, dtype, self.scan_blocks, self.remat, name="blocks")(x, c)
        linear = functools.partial(Dense, p * p * self.out_channels, dtype)
        x = layers.FinalLayer("linear", linear, dtype, name="final_layer")(x, c)

        x = x.reshape(n, rows, columns, p, p, self.out_channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, -1).astype(wide)

    def macs(self, positions):
        d, patch = self.hidden_size, self.patch_size**2
        tokens = positions // patch
        vectors = self.time_macs(d) + 2 * d**2  # the last modulation
        ends = tokens * patch * d * (self.in_channels + self.out_channels)
        per_token = 4 * d**2 + 2 * d * int(self.mlp_ratio * d)  # query, key, value, output; MLP
        attention = 2 * tokens**2 * d  # query with key, weights with value
        block = 6 * d**2 + tokens * per_token + attention
        return vectors + ends + self.depth * block
