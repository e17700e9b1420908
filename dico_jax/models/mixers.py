"""What mixes channels or positions inside a block, by the names of `config.model`."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dico_jax.models.layers import Dense, zeros
from dico_jax.ops.attention import Implementation, attention
from dico_jax.ops.plain import widened
from dico_jax.ops.pointwise import add_vector, multiply_vector

_HEAD = 32  # channels of an attention head, which divide every published width
_SQUEEZE = 16  # how many times fewer channels are between the layers of squeeze-excite
_NORM_EPSILON, _RESPONSE_EPSILON = 1e-12, 1e-6  # PyTorch's normalize; ConvNeXt V2


def split_heads(x):
    """Channels (N, T, C) by head, (N, T, heads, head)."""
    return x.reshape(*x.shape[:-1], -1, head_width(x.shape[-1]))


def head_width(width: int) -> int:
    """The channels of a head where nobody says their number: 32, or fewer that divide."""
    return math.gcd(_HEAD, width)


class CompactAttention(nn.Module):
    """Compact channel attention: means over positions (N, C) to gates sigmoid(Linear(mean))."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, mean):
        return jax.nn.sigmoid(Dense(mean.shape[-1], self.dtype, name="1")(mean))


class SqueezeExcite(nn.Module):
    """Means (N, C) to gates by two linear layers, of C / 16 channels between (arXiv 1709.01507)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, mean):
        few = Dense(squeezed(mean.shape[-1]), self.dtype, activation="relu", name="1")(mean)
        return jax.nn.sigmoid(Dense(mean.shape[-1], self.dtype, name="3")(few))


def squeezed(width: int) -> int:
    return max(1, width // _SQUEEZE)


class ChannelSelfAttention(nn.Module):
    """Self-attention of the channels of x (N, H, W, C) to those of their head (arXiv 2111.09881).

    Queries and keys are of norm 1 over the positions; every head has a temperature. Of Restormer's
    module this is the attention alone: a depthwise convolution before it and a projection after it
    are in DiCo's conv module already.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        n, height, width, channels = x.shape
        qkv = Dense(3 * channels, self.dtype, name="qkv")(x).reshape(n, height * width, -1)
        q, k, v = (split_heads(part) for part in jnp.split(qkv, 3, axis=-1))
        temperature = self.param("temperature", nn.initializers.ones, q.shape[2:3], jnp.float32)
        logits = jnp.einsum("nthc,nthd->nhcd", _normalized(q), _normalized(k))
        weights = jax.nn.softmax(logits * temperature[:, None, None].astype(logits.dtype))
        return jnp.einsum("nhcd,nthd->nthc", weights.astype(v.dtype), v).reshape(x.shape)


def _normalized(x):
    x = widened(x)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(1, keepdims=True), _NORM_EPSILON**2))


class ResponseNorm(nn.Module):
    """Global response normalisation of x (N, H, W, C) (arXiv 2301.00808), the identity at first."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        gamma, beta = (self.param(k, zeros, x.shape[-1:], jnp.float32) for k in ("gamma", "beta"))
        square = jnp.square(widened(x)).sum((1, 2))
        dead = square == 0  # where the root has no derivative
        norm = jnp.where(dead, 0, jnp.sqrt(jnp.where(dead, 1, square)))
        share = norm / (norm.mean(-1, keepdims=True) + _RESPONSE_EPSILON)
        scaled = multiply_vector(x, (1 + gamma * share).astype(x.dtype))
        return add_vector(scaled, beta.astype(x.dtype))


# Of a mean over positions they make gates; the others take all of x.
_GATES = {"compact": CompactAttention, "squeeze_excite": SqueezeExcite}
_WHOLE = {"self_attention": ChannelSelfAttention, "response_norm": ResponseNorm}


def channel_attention(kind: str, dtype, x: jax.Array, mean: jax.Array, name="ca") -> jax.Array:
    """X (N, H, W, C), whose mean is (N, C), after channel attention of a kind; inside a module."""
    if kind in _GATES:
        return multiply_vector(x, _GATES[kind](dtype, name=name)(mean))
    return _WHOLE[kind](dtype, name=name)(x) if kind in _WHOLE else x


def channel_attention_macs(kind: str, positions: int, width: int) -> int:
    """Its multiply-adds of one example."""
    if kind == "self_attention":
        return positions * (3 * width**2 + 2 * width * head_width(width))
    return {"compact": width**2, "squeeze_excite": 2 * width * squeezed(width)}.get(kind, 0)


class Attention(nn.Module):
    """Multi-head self-attention over (N, T, C); without a number of heads, of `head_width`."""

    num_heads: int
    dtype: jnp.dtype
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(self, x):
        n, tokens, width = x.shape
        heads = self.num_heads or width // head_width(width)
        dense = functools.partial(Dense, dtype=self.dtype)
        qkv = dense(3 * width, name="qkv")(x).reshape(n, tokens, 3, heads, width // heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        out = attention(q, k, v, implementation=self.implementation)
        return dense(width, name="proj")(out.reshape(n, tokens, width))


def attend(module: Callable, x: jax.Array, window: int = 0) -> jax.Array:
    """`Attention` of all positions of x (N, H, W, C), or inside each window of so many a side."""
    n, height, width, channels = x.shape
    if not window:
        return module(x.reshape(n, height * width, channels)).reshape(x.shape)
    rows, columns = height // window, width // window
    x = x.reshape(n, rows, window, columns, window, channels).transpose(0, 1, 3, 2, 4, 5)
    x = module(x.reshape(n * rows * columns, window**2, channels))
    x = x.reshape(n, rows, columns, window, window, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height, width, channels)


def attention_macs(positions: int, width: int, window: int = 0) -> int:
    """Multiply-adds of query, key, value and output, and of the two products of attention."""
    return positions * (4 * width**2 + 2 * (window**2 or positions) * width)


def long_skips(depth: int, width: int, dtype) -> Callable[[jax.Array], jax.Array]:
    """What x passes before each of `depth` blocks, called once for each; inside a module.

    Before the last of them a linear layer joins x with what the block gave that is as far from the
    first as this one is from the last (arXiv 2209.12152).
    """
    joins = [Dense(width, dtype, name=f"skip_linear_{i}") for i in range(num_skips(depth))]
    seen: list[jax.Array] = []

    def enter(x):
        seen.append(x)
        partner = depth - len(seen)
        if partner >= len(joins):
            return x
        return joins[partner](jnp.concatenate([x, seen[partner + 1]], axis=-1))

    return enter


def num_skips(depth: int) -> int:
    return (depth - 1) // 2
