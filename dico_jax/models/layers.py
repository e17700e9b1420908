"""Layers that DiCo and DiT share.

Submodules carry the names of the published PyTorch modules, positions inside its Sequentials
included ("mlp/0", "adaLN_modulation/1"), so that converting a parameter path is a join with dots.

Numerics: `dtype` is the dtype of activations and matrix products. Statistics, time features and
conditioning vectors are computed in float32 or better, whatever `dtype` is; parameters are float32.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.errors import UsageError
from dico_jax.models.block_stacks import STACK
from dico_jax.ops.conv import conv3x3, conv_gelu_mean
from dico_jax.ops.linear import gated_linear, linear, linear_gelu
from dico_jax.ops.pointwise import add_vector

xavier_uniform = nn.initializers.xavier_uniform()
normal_002 = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros_init()

NUM_TIME_FEATURES = 256

# Of each block the backward pass computes again: nothing, everything, or all but matrix products.
# Products of two activations (attention) are computed again too: their results are the largest.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def check_feed_forward(width: int, mlp_ratio: float) -> None:
    """Raises UsageError for a feed-forward of no channels."""
    if int(mlp_ratio * width) < 1:
        raise UsageError("model.mlp_ratio", mlp_ratio, "leaves the feed-forward no channels")


def linear_xavier_uniform(key, shape, dtype=jnp.float32):
    """Xavier-uniform of a kernel (..., out) with the fans of a linear layer from prod(...) to out.

    The reference initialises its input convolution and patch embedding so.
    """
    fan_in, fan_out = math.prod(shape[:-1]), shape[-1]
    bound = math.sqrt(6.0 / (fan_in + fan_out))
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

    `t` may be integer or fractional, in the units of the original process (0..999). The frequencies
    exp(-ln(10000) i / 128) are taken in float64 on the host: rounding them once, at the end, keeps
    the angle of t = 999 as exact as `dtype` (float32 or float64) allows.
    """
    half = NUM_TIME_FEATURES // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / half)
    angles = t[:, None].astype(dtype) * jnp.asarray(frequencies, dtype)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Dense(nn.Module):
    """A linear layer over channels, or a 1x1 convolution; kernel (C, features).

    As flax's, but for the gradients (`dico_jax.ops.linear`). Results go through the exact GELU if
    `with_gelu`; with a gate (N, features), they are multiplied by it.
    """

    features: int
    dtype: jnp.dtype
    kernel_init: Callable = xavier_uniform
    with_gelu: bool = False

    @nn.compact
    def __call__(self, x, gate=None):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if gate is not None:
            return gated_linear(x, kernel, bias, gate)
        return (linear_gelu if self.with_gelu else linear)(x, kernel, bias)


class Modulation(nn.Module):
    """Linear(SiLU(c)), zero at initialisation: c (N, W) to `num` vectors of (N, width)."""

    num: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, c):
        dense = Dense(self.num * self.width, self.dtype, kernel_init=zeros, name="1")
        return dense(jax.nn.silu(c))


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear of the time features."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features):
        h = Dense(self.width, self.dtype, kernel_init=normal_002, name="0")(features)
        return Dense(self.width, self.dtype, kernel_init=normal_002, name="2")(jax.nn.silu(h))


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) to vectors (N, width) of `dtype` (float32 or better)."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t):
        return TimestepMLP(self.width, self.dtype, name="mlp")(time_features(t, self.dtype))


class LabelEmbedder(nn.Module):
    """Labels (N,) to one vector (N, width) per table (name, width) of N(0, 0.02)."""

    num_rows: int
    tables: tuple[tuple[str, int], ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y):
        embed = functools.partial(
            nn.Embed, self.num_rows, embedding_init=normal_002, dtype=self.dtype
        )
        return [embed(width, name=name)(y) for name, width in self.tables]


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


class DepthwiseConvGelu(nn.Module):
    """GELU of a 3x3 depthwise convolution, and its mean over positions, as `conv_gelu_mean`.

    Its kernel is (3, 3, 1, C), with Xavier fans 9 and 9C.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        kernel = self.param("kernel", xavier_uniform, (3, 3, 1, width), jnp.float32)
        bias = self.param("bias", zeros, (width,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return conv_gelu_mean(x, kernel, bias)


class Stage(nn.Module):
    """`depth` equal blocks one after the other, named "0", "1", ..., made by `block(name=...)`.

    However the blocks run, their parameters lie apart ("0/conv1/kernel") and start as they do one
    by one. With `scan` they may also be given as `dico_jax.models.block_stacks` joins them, which
    saves stacking them here. What blocks compute inside can be captured only with `scan` off and
    `remat` "none".

    Attributes:
      depth: number of blocks.
      block: makes a block, which maps (x, c) to the next x and has nothing but parameters.
      dtype: the dtype in which the blocks use all their parameters.
      scan: whether one `jax.lax.scan` runs the blocks, so that the program is as large, and
        compiles as fast, as that of one block.
      remat: what the backward pass computes again, a key of `REMAT_POLICIES`.
    """

    depth: int
    block: Callable[..., nn.Module]
    dtype: jnp.dtype
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, x, c):
        if self.is_initializing() or not (self.scan or self.remat != "none"):
            for i in range(self.depth):
                x = self.block(name=str(i))(x, c)
            return x
        params, run = self.variables["params"], self._pure_block()
        if not self.scan:
            for i in range(self.depth):
                x = run(params[str(i)], x, c)
            return x
        stacked = self._stacked(params)
        return jax.lax.scan(lambda x, block_params: (run(block_params, x, c), None), x, stacked)[0]

    def _stacked(self, params):
        """The parameters of all blocks in one tree, in the dtype they are used in."""
        if STACK in params:
            return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params[STACK])
        return stack_trees([params[str(i)] for i in range(self.depth)], self.dtype)

    def _pure_block(self):
        """A block as a function (params, x, c) to the next x."""

        def run(params, x, c):
            return self.block(parent=None).apply({"params": params}, x, c)

        if self.remat == "none":
            return run
        # A scan keeps the two passes apart by itself: barriers against merging them only cost.
        policy = REMAT_POLICIES[self.remat]
        return jax.checkpoint(run, policy=policy, prevent_cse=not self.scan)


def stack_trees(trees, dtype):
    """Equal trees as one with a new first axis; cast first, so that what is copied is small.

    A new axis leaves every leaf's sharding as it is, which joining along an old one would not.
    """
    return jax.tree.map(lambda *leaves: jnp.stack([x.astype(dtype) for x in leaves]), *trees)
