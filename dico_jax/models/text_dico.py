"""DiCo that is told a text (arXiv 2505.11196, section 3.3 and algorithm 1).

After the conv module of every block a fusion with the text follows: a depthwise convolution whose
kernel the text gives ("dwc"), or cross-attention to its tokens. What the fusions are given depends
on the text alone, so that sampling computes it once per prompt: `encode_condition`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from dico_jax.models.dico import Trunk
from dico_jax.models.layers import Dense, zeros
from dico_jax.models.mixers import split_heads
from dico_jax.models.text_conditional import TextConditional
from dico_jax.ops.attention import Implementation, attention
from dico_jax.ops.dynamic_conv import add_dynamic_conv

SIDE = 9  # of the kernels; 77 tokens, the last of them repeated, give its 81 entries


class TextKernel(nn.Module):
    """An MLP of the tokens (N, L, E), whose rows are a kernel's entries: (N, 9, 9, width)."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        h = Dense(self.width, self.dtype, activation="gelu", name="0")(tokens)
        h = Dense(self.width, self.dtype, kernel_init=zeros, name="2")(h)
        missing = SIDE**2 - h.shape[1]
        h = jnp.pad(h, ((0, 0), (0, missing), (0, 0)), mode="edge")
        return h.reshape(-1, SIDE, SIDE, self.width)


class TextConvolution(nn.Module):
    """X (N, H, W, C) and its convolution by the kernel that the text gives."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, kernel):
        return add_dynamic_conv(x, kernel.astype(x.dtype))


class KeysAndValues(nn.Module):
    """Keys and values (N, L, heads, head) of the tokens (N, L, E)."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        both = Dense(2 * self.width, self.dtype, name="kv")(tokens)
        return tuple(split_heads(part) for part in jnp.split(both, 2, axis=-1))


class CrossAttention(nn.Module):
    """X (N, H, W, C) and what its positions, as queries, find in the text (arXiv 2310.00426)."""

    dtype: jnp.dtype
    attention: Implementation = "auto"

    @nn.compact
    def __call__(self, x, keys_and_values):
        n, height, width, channels = x.shape
        dense = functools.partial(Dense, channels, self.dtype)
        q = split_heads(dense(name="q")(x.reshape(n, height * width, channels)))
        keys_and_values = (part.astype(q.dtype) for part in keys_and_values)
        found = attention(q, *keys_and_values, implementation=self.attention)
        return x + dense(kernel_init=zeros, name="proj")(found.reshape(x.shape))


# By the name of a fusion: what a block is given of the tokens, and what it does with that.
FUSIONS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "dwc": (TextKernel, TextConvolution),
    "cross_attention": (KeysAndValues, CrossAttention),
}


class OfBlocks(nn.Module):
    """Modules "0", "1", ..., one of each block of a stage, all of the same tokens."""

    depth: int
    module: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, tokens):
        return tuple(self.module(name=str(i))(tokens) for i in range(self.depth))


class OfStages(nn.Module):
    """By stage what the fusion of each of its blocks is given of the tokens (N, L, E)."""

    stages: tuple[tuple[str, int, int], ...]  # name, number of blocks, width
    text_fusion: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        module = FUSIONS[self.text_fusion][0]
        return {
            name: OfBlocks(depth, functools.partial(module, width, self.dtype), name=name)(tokens)
            for name, depth, width in self.stages
        }


class TextDiCo(Trunk, TextConditional):
    """A DiCo network that is told a text, called as every `Denoiser`.

    All of its parameters outside `text_embedder`, `text_fusion` and the "text" of blocks are those
    of `DiCo`, and until these are trained it is a DiCo whose label tables are zero.

    Attributes:
      text_fusion: a key of `FUSIONS`.
      attention: that of cross-attention, see `dico_jax.ops.attention`.
    """

    text_fusion: str = "dwc"
    attention: Implementation = "auto"

    condition_parts = ("text_encoder", "text_embedder", "text_fusion", "text")

    def checks(self):
        yield from super().checks()
        long = self.text_fusion == "dwc" and self.text_length > SIDE**2
        yield "text_length", not long, f"must be at most {SIDE**2}, the entries of a kernel"

    def _fusions(self, **named):
        stages = tuple(zip(self.stages, self.depth, self.stage_widths, strict=True))
        return OfStages(stages, self.text_fusion, self.dtype, **named)

    def embed_condition(self, condition, widths):
        features, given = self.text_features(condition), condition.get("of_blocks")
        if given is None:
            given = self._fusions(name="text_fusion")(features["tokens"])
        if not self.pooled_width:
            return [jnp.zeros((), self.wide_dtype)] * len(widths), given
        return self.embed_pooled(features, widths), given

    def fusion(self, width):
        module = FUSIONS[self.text_fusion][1]
        options = {"attention": self.attention} if module is CrossAttention else {}
        return functools.partial(module, self.dtype, **options)

    def encode_condition(self, params, condition):
        """See `Denoiser`: the tokens become what the fusions are given of them."""
        features = self.encode_ids(params, condition)
        variables = {"params": params["text_fusion"]}
        given = self._fusions(parent=None).apply(variables, features["tokens"])
        return {k: v for k, v in features.items() if k != "tokens"} | {"of_blocks": given}

    def macs(self, positions):
        pooled = self.pooled_width * 7 * self.hidden_size
        return super().macs(positions) + sum(self.fusion_macs(positions)) + pooled

    def fusion_macs(self, positions: int) -> tuple[int, int]:
        """Multiply-adds of the fusions: of the text, once per prompt; of x, at every step."""
        text, of_x = 0, 0
        sizes = (positions, positions // 4, positions // 16, positions // 4, positions)
        for depth, size, width in zip(self.depth, sizes, self.stage_widths, strict=True):
            if self.text_fusion == "dwc":
                text += depth * self.text_length * (self.text_width * width + width**2)
                of_x += depth * size * SIDE**2 * width
            else:
                text += depth * self.text_length * self.text_width * 2 * width
                of_x += depth * size * (2 * width**2 + 2 * self.text_length * width)
        return text, of_x
