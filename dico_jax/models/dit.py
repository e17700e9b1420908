"""DiT, the Diffusion Transformer (arXiv 2212.09748), which the DiCo paper compares itself with."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.models import layers
from dico_jax.models.block_stacks import Stage
from dico_jax.models.denoiser import ClassConditional
from dico_jax.models.layers import Dense
from dico_jax.models.mixers import Attention, attend, attention_macs, long_skips, num_skips
from dico_jax.ops.attention import Implementation
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


class Mlp(nn.Module):
    """Linear, tanh GELU (or ReLU), Linear."""

    hidden: int
    dtype: jnp.dtype
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x):
        h = Dense(self.hidden, self.dtype, name="fc1")(x)
        h = jax.nn.relu(h) if self.activation == "relu" else jax.nn.gelu(h, approximate=True)
        return Dense(x.shape[-1], self.dtype, name="fc2")(h)


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (section 3.2)."""

    width: int
    num_heads: int
    mlp_ratio: float
    dtype: jnp.dtype
    attention: Implementation = "auto"
    activation: str = "gelu"
    windows: tuple[int, int, int] | None = None  # rows, columns, side of a window

    @nn.compact
    def __call__(self, x, c):  # x (N, T, width), c (N, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = layers.modulation(self, 6, self.width, c)
        h = norm_modulate(x, shift1, scale1)
        attention = Attention(self.num_heads, self.dtype, self.attention, name="attn")
        if self.windows is None:
            h = attention(h)
        else:
            rows, columns, side = self.windows
            h = attend(attention, h.reshape(-1, rows, columns, self.width), side).reshape(h.shape)
        x = x + multiply_vector(h, gate1)
        h = norm_modulate(x, shift2, scale2)
        mlp = Mlp(int(self.mlp_ratio * self.width), self.dtype, self.activation, name="mlp")
        return x + multiply_vector(mlp(h), gate2)


class Isotropic(ClassConditional):
    """Base of networks of one resolution.

    Attributes:
      layout: "isotropic", or "isotropic_skip" with long skips, see `dico_jax.models.mixers`.
    """

    layout: str = "isotropic"

    def checks(self):
        yield from super().checks()
        fix = "is DiCo's: use model.name='DiCo', with model.mixer='attention' for DiT's"
        yield "layout", self.layout != "u", fix
        fix = "is for equal blocks, not those of model.layout='isotropic_skip'"
        yield "scan_blocks", bool(self.stages) or not self.scan_blocks, fix

    @property
    def stages(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.layout == "isotropic_skip" else ("blocks",)

    def pass_blocks(self, block, x, c):
        """What x is after `depth` blocks, called as block()(x, c); inside `forward`."""
        stage = Stage(self.depth, block, self.dtype, self.scan_blocks, self.remat, name="blocks")
        long = not self.stages
        skips = {"enter": long_skips(self.depth, self.hidden_size, self.dtype)} if long else {}
        return stage(x, c, **skips)


class DiT(Isotropic):
    """A DiT network, called as every `Denoiser`. `create_model` makes the published sizes.

    Attributes:
      hidden_size: width of the tokens, divisible by num_heads and by 4.
      depth, num_heads, patch_size: blocks, attention heads, side of a patch.
      mlp_ratio: feed-forward width over hidden_size.
      attention: see `dico_jax.ops.attention`.
      mixer: "attention" of all patches, or "window_attention" inside windows.
      window_size: side of a window, in patches.
      activation: "gelu" (of tanh) or "relu".
    """

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 2
    mlp_ratio: float = 4.0
    attention: Implementation = "auto"
    mixer: str = "attention"
    window_size: int = 8
    activation: str = "gelu"

    variants = ("layout", "mixer", "activation")

    def checks(self):
        yield from super().checks()
        yield "mlp_ratio", int(self.mlp_ratio * self.hidden_size) > 0, "leaves no feed-forward"
        divides = self.hidden_size % self.num_heads == self.hidden_size % 4 == 0
        yield "hidden_size", divides, f"must divide by model.num_heads={self.num_heads} and by 4"
        yield "mixer", self.mixer != "conv", "is DiCo's: use model.name='IsoDiCo'"
        yield from self.without_effect({"window_size": not self.windows}, "mixer")

    @property
    def windows(self) -> int:  # type: ignore[override]
        return self.window_size if self.mixer == "window_attention" else 0

    @property
    def size_divisor(self) -> int:  # type: ignore[override]
        return self.patch_size * (self.windows or 1)

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
        windows = (rows, columns, self.windows) if self.windows else None
        options = d, self.num_heads, self.mlp_ratio, dtype, self.attention, self.activation, windows
        block = functools.partial(DiTBlock, *options)
        x = self.pass_blocks(block, x, c)
        linear = functools.partial(Dense, p * p * self.out_channels, dtype)
        x = layers.FinalLayer("linear", linear, dtype, name="final_layer")(x, c)

        x = x.reshape(n, rows, columns, p, p, self.out_channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height, width, -1).astype(wide)

    def macs(self, positions):
        d, patch = self.hidden_size, self.patch_size**2
        tokens = positions // patch
        vectors = self.time_macs(d) + 2 * d**2  # the last modulation
        ends = tokens * patch * d * (self.in_channels + self.out_channels)
        mlp = tokens * 2 * d * int(self.mlp_ratio * d)
        block = 6 * d**2 + mlp + attention_macs(tokens, d, self.windows)
        skips = 0 if self.stages else num_skips(self.depth) * tokens * 2 * d**2
        return vectors + ends + self.depth * block + skips
