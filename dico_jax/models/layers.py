"""Layers that DiCo and DiT share.

Submodules carry the names of the published PyTorch modules. `dtype` is the dtype of activations and
products; statistics, time features, conditioning vectors and parameters are float32 or better.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.ops.conv import conv3x3, conv_gelu_mean, depthwise_conv
from dico_jax.ops.cpu import stored
from dico_jax.ops.linear import gated_linear, linear, linear_gelu
from dico_jax.ops.pointwise import add_vector, gelu, norm_modulate

xavier_uniform = nn.initializers.xavier_uniform()
normal_002 = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()

NUM_TIME_FEATURES = 256

# The GELU is the exact one.
ACTIVATIONS: dict[str, Callable] = {"gelu": gelu, "relu": jax.nn.relu}


def linear_xavier_uniform(key, shape, dtype=jnp.float32):
    """Xavier-uniform of a kernel (..., out), as of a linear layer from prod(...) to out."""
    bound = math.sqrt(6.0 / (math.prod(shape[:-1]) + shape[-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def pixel_unshuffle(x):
    """(N, H, W, C) to (N, H/2, W/2, 4C); channel c at sub-position (i, j) goes to 4c + 2i + j."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // 2, 2, w // 2, 2, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(n, h // 2, w // 2, 4 * c)


def pixel_shuffle(x):
    """(N, H, W, 4C) to (N, 2H, 2W, C), the inverse of `pixel_unshuffle`."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w, c // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, 2 * h, 2 * w, c // 4)


def time_features(t, dtype=jnp.float32):
    """Sinusoidal features of timesteps: (N,) to (N, 256), 128 cosines, then 128 sines.

    `t` may be integer or fractional, in the units of the original process (0..999). Frequencies are
    taken in float64: rounding them once keeps the angle of t = 999 as exact as `dtype` allows.
    """
    half = NUM_TIME_FEATURES // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / half)
    angles = t[:, None].astype(dtype) * jnp.asarray(frequencies, dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def weighted(module, x, kernel_shape, kernel_init=xavier_uniform):
    """X, the module's kernel and its bias (kernel_shape[-1],), in the module's dtype."""
    kernel = module.param("kernel", kernel_init, kernel_shape, jnp.float32)
    bias = module.param("bias", zeros, kernel_shape[-1:], jnp.float32)
    return nn.dtypes.promote_dtype(x, kernel, bias, dtype=module.dtype)


class Dense(nn.Module):
    """A linear layer over channels; then one of `ACTIVATIONS`, or times a gate (N, features)."""

    features: int
    dtype: jnp.dtype
    kernel_init: Callable = xavier_uniform
    activation: str = ""

    @nn.compact
    def __call__(self, x, gate=None):
        args = weighted(self, x, (x.shape[-1], self.features), self.kernel_init)
        if gate is not None:
            return gated_linear(*args, gate)
        if self.activation == "gelu":
            return linear_gelu(*args)
        return ACTIVATIONS.get(self.activation, lambda y: y)(linear(*args))


def modulation(module, num, width, c):
    """Linear(SiLU(c)), zero at initialisation: c (N, W) to `num` vectors (N, width)."""
    dense = functools.partial(Dense, num * width, module.dtype, kernel_init=zeros)
    return jnp.split(Named("1", dense, name="adaLN_modulation")(jax.nn.silu(c)), num, axis=-1)


class FinalLayer(nn.Module):
    """LayerNorm, modulation and `layer`, made by `layer(kernel_init=zeros, name=inner)`."""

    inner: str
    layer: Callable[..., nn.Module]
    dtype: jnp.dtype
    store_input: bool = False  # else XLA for CPU computes DiCo's last feed-forward twice

    @nn.compact
    def __call__(self, x, c):
        shift, scale = modulation(self, 2, x.shape[-1], c)
        h = norm_modulate(stored(x) if self.store_input else x, shift, scale)
        return self.layer(kernel_init=zeros, name=self.inner)(h)


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear of the time features (N, 256)."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features):
        h = Dense(self.width, self.dtype, kernel_init=normal_002, name="0")(features)
        return Dense(self.width, self.dtype, kernel_init=normal_002, name="2")(jax.nn.silu(h))


def embed_times(t, width, dtype, name):
    """Timesteps (N,) to vectors (N, width) of `dtype` (float32 or better).

    Of (N, 2), from where to where a step leads, the length has an embedder of its own.
    """
    mlp = functools.partial(TimestepMLP, width, dtype)
    if t.ndim == 1:
        return Named("mlp", mlp, name=name)(time_features(t, dtype))
    length = time_features(t[:, 0] - t[:, 1], dtype)
    return embed_times(t[:, 0], width, dtype, name) + Named("mlp", mlp, name=f"{name}_length")(
        length
    )


class LabelEmbedder(nn.Module):
    """Labels (N,) to one vector (N, width) per table (name, width) of N(0, 0.02).

    In place of labels there may be weights of the tables' rows, float (N, rows).
    """

    num_rows: int
    tables: tuple[tuple[str, int], ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y):
        embed = functools.partial(nn.Embed, self.num_rows, dtype=self.dtype)
        tables = [embed(width, embedding_init=normal_002, name=n) for n, width in self.tables]
        if y.ndim == 1:
            return [table(y) for table in tables]
        y = y.astype(self.dtype)
        return [jnp.matmul(y, table.embedding, precision="highest") for table in tables]


class TextEmbedder(nn.Module):
    """Linear layers "0", "1", ... of features (N, P) to vectors (N, width), zero at first."""

    widths: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pooled):
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=zeros)
        return [dense(width, name=str(k))(pooled) for k, width in enumerate(self.widths)]


class Conv3x3(nn.Module):
    """3x3 convolution with padding 1; kernel (3, 3, C, width)."""

    width: int
    dtype: jnp.dtype
    use_bias: bool = True
    kernel_init: Callable = xavier_uniform

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, x.shape[-1], self.width)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        y = conv3x3(x, kernel)
        if not self.use_bias:
            return y
        bias = self.param("bias", zeros, (self.width,), jnp.float32)
        return add_vector(y, bias.astype(self.dtype))


class DepthwiseConv(nn.Module):
    """A depthwise convolution, with as many zeros around; kernel (K, K, 1, C), K odd.

    With one of `ACTIVATIONS` it gives the result of that, and its mean over positions.
    """

    dtype: jnp.dtype
    kernel_size: int = 3
    activation: str = ""

    @nn.compact
    def __call__(self, x):
        args = weighted(self, x, (self.kernel_size, self.kernel_size, 1, x.shape[-1]))
        if not self.activation:
            return depthwise_conv(*args)
        return conv_gelu_mean(*args, activation=ACTIVATIONS[self.activation])


class Named(nn.Module):
    """A layer, made by `layer(name=inner)`, one level deeper in the parameters."""

    inner: str
    layer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.layer(name=self.inner)(x)
