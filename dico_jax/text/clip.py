"""CLIP's two towers (arXiv 2103.00020), which put texts and images into one space.

Modules carry the names of transformers' modules, positions in lists included, so that a parameter
path joined with dots is a state dict's key (see `dico_jax.pytorch.key_maps`).
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
from dico_jax.ops.attention import attention
from dico_jax.ops.plain import check_float64

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's
    "gelu": functools.partial(jax.nn.gelu, approximate=False),  # OpenCLIP's
}


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of a tower, named and with defaults as in transformers: those of ViT-B/32."""

    hidden_size: int
    intermediate_size: int  # of the feed-forward
    num_attention_heads: int
    num_hidden_layers: int = 12
    hidden_act: str = "quick_gelu"  # a name of `ACTIVATIONS`
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512  # of the space of both towers; 0 for a tower without projection

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            fix = f"is unknown: use one of {', '.join(ACTIVATIONS)}"
            raise UsageError("hidden_act", self.hidden_act, fix)
        if self.hidden_size % self.num_attention_heads:
            fix = f"does not divide hidden_size={self.hidden_size}"
            raise UsageError("num_attention_heads", self.num_attention_heads, fix)


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
    """Sizes of a text tower."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407  # 2, as OpenAI's configs have it, stands for the largest of a text


@dataclasses.dataclass(frozen=True)
class ImageConfig(TowerConfig):
    """Sizes of an image tower."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224  # side in pixels
    patch_size: int = 32


@dataclasses.dataclass(frozen=True)
class TextFeatures:
    """What the text tower makes of N texts of T tokens.

    Attributes:
      tokens: (N, T, hidden_size), one of each token, after the last norm.
      pooled: (N, hidden_size), that of the end of the text.
      embedding: (N, projection_dim), the pooled ones in the space of images; None without one.
    """

    tokens: jax.Array
    pooled: jax.Array
    embedding: jax.Array | None = None


jax.tree_util.register_dataclass(TextFeatures)


class SelfAttention(nn.Module):
    """Attention of every token to all, or to those before it; x (N, T, C) to (N, T, C)."""

    config: TowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        n, tokens, width = x.shape
        heads = self.config.num_attention_heads

        def project(name):
            dense = nn.Dense(width, dtype=self.dtype, name=f"{name}_proj")
            return dense(x).reshape(n, tokens, heads, width // heads)

        h = attention(project("q"), project("k"), project("v"), mask=mask, implementation="xla")
        return nn.Dense(width, dtype=self.dtype, name="out_proj")(h.reshape(x.shape))


class FeedForward(nn.Module):
    """Linear, activation, linear; x (N, T, C) to (N, T, C)."""

    config: TowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        h = ACTIVATIONS[self.config.hidden_act](h)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


def _norm(config, dtype, name):
    epsilon = config.layer_norm_eps
    return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Layer(nn.Module):
    """Attention, then feed-forward, each of what is normed and added to what comes in."""

    config: TowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        args = self.config, self.dtype
        x = x + SelfAttention(*args, name="self_attn")(_norm(*args, "layer_norm1")(x), mask)
        return x + FeedForward(*args, name="mlp")(_norm(*args, "layer_norm2")(x))


class Layers(nn.Module):
    """The layers, named "0", "1", ..., one after the other."""

    config: TowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.dtype, name=str(i))(x, mask)
        return x


class Encoder(nn.Module):
    """What lies around `Layers` in the names of parameters."""

    config: TowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask=None):
        return Layers(self.config, self.dtype, name="layers")(x, mask)


class TextEmbeddings(nn.Module):
    """Token ids (N, T) to the sums of a token's and a position's vectors, (N, T, C)."""

    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids):
        c = self.config
        embed = functools.partial(nn.Embed, features=c.hidden_size, dtype=self.dtype)
        positions = embed(c.max_position_embeddings, name="position_embedding")
        tokens = embed(c.vocab_size, name="token_embedding")
        return tokens(ids) + positions(jnp.arange(ids.shape[1]))


class TextModel(nn.Module):
    """Token ids (N, T) to features (N, T, C) and those of the end of each text (N, C)."""

    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids, mask=None):
        tokens = ids.shape[1]
        x = TextEmbeddings(self.config, self.dtype, name="embeddings")(ids)
        seen = jnp.tril(jnp.ones((1, 1, tokens, tokens), bool))  # (N, heads, queries, keys)
        if mask is not None:
            seen = seen & (mask[:, None, None] != 0)
        x = Encoder(self.config, self.dtype, name="encoder")(x, seen)
        x = _norm(self.config, self.dtype, "final_layer_norm")(x)
        eos = self.config.eos_token_id
        at = jnp.argmax(ids if eos == 2 else ids == eos, axis=1)
        return x, jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]


class TextTower(nn.Module):
    """CLIP's text tower: token ids, integers (N, T), to `TextFeatures` in `dtype`.

    T is at most max_position_embeddings, or UsageError. A `mask` (N, T) has 0 where attention is
    not to look; CLIP itself is used without one, and looks at the padding after a text.
    """

    config: TextConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, ids, mask=None) -> TextFeatures:
        check_float64("dtype", self.dtype)
        if ids.ndim != 2 or not 0 < ids.shape[1] <= (most := self.config.max_position_embeddings):
            raise UsageError(f"token ids are {ids.shape}: (N, 1 to {most}) are expected")
        tokens, pooled = TextModel(self.config, self.dtype, name="text_model")(ids, mask)
        embedding = None
        if self.config.projection_dim:
            embedding = _projection(self, "text_projection")(pooled)
        return TextFeatures(tokens, pooled, embedding)


def _projection(tower, name):
    size = tower.config.projection_dim
    return nn.Dense(size, use_bias=False, dtype=tower.dtype, name=name)


class ImageEmbeddings(nn.Module):
    """Images (N, H, W, 3) to vectors of a class token and of the patches, (N, 1 + P, C)."""

    config: ImageConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images):
        c, side = self.config, self.config.patch_size
        conv = nn.Conv(
            c.hidden_size, (side, side), side, padding="VALID", use_bias=False, dtype=self.dtype,
            name="patch_embedding",
        )  # fmt: skip
        patches = conv(images).reshape(len(images), -1, c.hidden_size)
        first = self.param("class_embedding", nn.initializers.normal(), (c.hidden_size,))
        first = jnp.broadcast_to(first.astype(patches.dtype), (len(images), 1, c.hidden_size))
        x = jnp.concatenate([first, patches], axis=1)
        embed = nn.Embed(x.shape[1], c.hidden_size, dtype=self.dtype, name="position_embedding")
        return x + embed(jnp.arange(x.shape[1]))


class ImageModel(nn.Module):
    """Images (N, H, W, 3) to the features of the class token, (N, C)."""

    config: ImageConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images):
        args = self.config, self.dtype
        x = _norm(*args, "pre_layrnorm")(ImageEmbeddings(*args, name="embeddings")(images))
        x = Encoder(*args, name="encoder")(x)
        return _norm(*args, "post_layernorm")(x[:, 0])


class ImageTower(nn.Module):
    """CLIP's image tower: images (N, S, S, 3) as `normalized` to embeddings (N, projection_dim)."""

    config: ImageConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    @nn.compact
    def __call__(self, images):
        check_float64("dtype", self.dtype)
        side = self.config.image_size
        if images.shape[1:] != (side, side, 3):
            raise UsageError(f"images are {images.shape}: (N, {side}, {side}, 3) are expected")
        pooled = ImageModel(self.config, self.dtype, name="vision_model")(images)
        return _projection(self, "visual_projection")(pooled)


_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
_STD = np.array([0.26862954, 0.26130258, 0.27577711])


def normalized(images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Pixels, uint8 (N, H, W, 3), as the image tower takes them: (x / 255 - mean) / deviation."""
    scale, shift = (jnp.asarray(v, dtype) for v in (1 / (255 * _STD), -_MEAN / _STD))
    return images.astype(dtype) * scale + shift


def abstract_params(config: TextConfig | ImageConfig) -> Any:
    """The parameter tree of a tower as `jax.ShapeDtypeStruct`s, without computing anything."""
    tower: nn.Module
    if isinstance(config, TextConfig):
        tower, inputs = TextTower(config), np.zeros((1, 1), np.int32)
    else:
        shape = (1, config.image_size, config.image_size, 3)
        tower, inputs = ImageTower(config), np.zeros(shape, np.float32)
    return jax.eval_shape(lambda: tower.init(jax.random.key(0), inputs))["params"]
