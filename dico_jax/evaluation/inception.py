"""The Inception network whose features Frechet distances are taken of.

It is TensorFlow's network of 2015-12-05 with 1008 logits, as the public PyTorch files have it, and
not torchvision's: average pools leave the padding out of the count, the last block pools with a
maximum, and pictures are resized in the manner of TensorFlow 1. `NETWORK` describes it as data.
Parameters carry the published names; batch norm is folded into kernels and biases when weights are
loaded (`dico_jax.evaluation.inception_weights`).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIDE = 299  # pixels, what pictures are resized to
NUM_FEATURES = 2048
NUM_LOGITS = 1008
SPATIAL_CHANNELS = 7


class Conv(NamedTuple):
    """A convolution of `width` output channels, without gaps; batch norm and ReLU.

    `padded`: zeros around the input keep its size (at stride 1).
    """

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True


class Pool(NamedTuple):
    """A 3x3 "max" or "mean": of stride 1 with padding that counts for nothing, of 2 without."""

    name: str
    kind: str
    stride: int = 1


class Fork(NamedTuple):
    """Layers side by side on one input, their outputs joined along the channels."""

    layers: tuple[Conv, ...]


class Block(NamedTuple):
    """Branches side by side on one input, each a sequence of layers, joined along the channels."""

    name: str
    branches: tuple[tuple[Conv | Pool | Fork, ...], ...]


def _branch(prefix: str, *sizes: tuple[int, int, int], stride: int = 1) -> tuple[Conv, ...]:
    """Convolutions PREFIX_1, PREFIX_2, ... of (channels, *kernel); the stride is the last one's."""
    convs = [Conv(f"{prefix}_{i}", c, (h, w)) for i, (c, h, w) in enumerate(sizes, 1)]
    if stride > 1:
        convs[-1] = convs[-1]._replace(stride=stride, padded=False)
    return tuple(convs)


def _pooled(kind: str, width: int) -> tuple[Pool, Conv]:
    return Pool("pool", kind), Conv("branch_pool", width)


def _block_35(name: str, pool_width: int) -> Block:
    double = _branch("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
    five = _branch("branch5x5", (48, 1, 1), (64, 5, 5))
    return Block(name, ((Conv("branch1x1", 64),), five, double, _pooled("mean", pool_width)))


def _block_17(name: str, width: int) -> Block:
    first, row, column = (width, 1, 1), (width, 1, 7), (width, 7, 1)
    single = _branch("branch7x7", first, row, (192, 7, 1))
    double = _branch("branch7x7dbl", first, column, row, column, (192, 1, 7))
    return Block(name, ((Conv("branch1x1", 192),), single, double, _pooled("mean", 192)))


def _block_8(name: str, pool: str) -> Block:
    def forked(prefix: str) -> Fork:
        return Fork((Conv(f"{prefix}a", 384, (1, 3)), Conv(f"{prefix}b", 384, (3, 1))))

    single: tuple[Conv | Fork, ...]
    double: tuple[Conv | Fork, ...]
    single = (*_branch("branch3x3", (384, 1, 1)), forked("branch3x3_2"))
    double = (*_branch("branch3x3dbl", (448, 1, 1), (384, 3, 3)), forked("branch3x3dbl_3"))
    return Block(name, ((Conv("branch1x1", 320),), single, double, _pooled(pool, 192)))


NETWORK: tuple[Conv | Pool | Block, ...] = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), stride=2, padded=False),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    Pool("pool_1", "max", stride=2),
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padded=False),
    Pool("pool_2", "max", stride=2),
    _block_35("Mixed_5b", 32),
    _block_35("Mixed_5c", 64),
    _block_35("Mixed_5d", 64),
    Block(
        "Mixed_6a",
        (
            (Conv("branch3x3", 384, (3, 3), stride=2, padded=False),),
            _branch("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), stride=2),
            (Pool("pool", "max", stride=2),),
        ),
    ),
    _block_17("Mixed_6b", 128),
    _block_17("Mixed_6c", 160),
    _block_17("Mixed_6d", 160),
    _block_17("Mixed_6e", 192),
    Block(
        "Mixed_7a",
        (
            _branch("branch3x3", (192, 1, 1), (320, 3, 3), stride=2),
            _branch("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), stride=2),
            (Pool("pool", "max", stride=2),),
        ),
    ),
    _block_8("Mixed_7b", "mean"),
    _block_8("Mixed_7c", "max"),
)

# ADM's evaluator reads "mixed_6/conv:0": the first branch of this block, after its ReLU.
_SPATIAL_BLOCK = "Mixed_6d"


# The input.


def resize_tables(size: int, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper positions that make each of the 299, int32 (299,), and the uppers' weights.

    The factor is rounded to float32, as TensorFlow has it, whatever the weights' `dtype`.
    """
    factor = np.float32(size) / np.float32(SIDE)
    source = np.arange(SIDE, dtype=dtype) * factor.astype(dtype)
    lower = np.floor(source).astype(np.int32)
    return lower, np.minimum(lower + 1, size - 1), source - lower.astype(dtype)


def resized(images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """uint8 (N, H, W, 3) as the network sees it: (N, 299, 299, 3) of `dtype`, (x - 128) / 128.

    Bilinear, as TensorFlow 1 does it: no half-pixel centres, no antialiasing; the identity at 299.
    """
    x = images
    for axis in (2, 1):  # TensorFlow's order
        size = x.shape[axis]
        if size == SIDE:
            continue
        lower, upper, weight = resize_tables(size, dtype)
        low = jnp.take(x, lower, axis=axis).astype(dtype)
        high = jnp.take(x, upper, axis=axis).astype(dtype)
        x = low + (high - low) * weight.reshape((-1,) + (1,) * (3 - axis))
    return (x.astype(dtype) - 128) / 128


# Layers.


def _convolved(x: jax.Array, kernel: jax.Array, conv: Conv) -> jax.Array:
    """A convolution without its bias.

    XLA's convolution is as fast on CPUs as it can be, but in three cases. 1x1 is faster as a matrix
    product. Three channels take twice the time of four. Without any padding it goes a way that is 2
    to 7 times slower: a row and a column of zeros at the end avoid it, what they add is cut off.
    """
    if conv.kernel == (1, 1):
        return jnp.dot(x, kernel[0, 0], precision=lax.Precision.HIGHEST)
    if x.shape[-1] == 3:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1)))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 0)))
    y = lax.conv_general_dilated(
        x,
        kernel,
        (conv.stride, conv.stride),
        [((k - 1) // 2,) * 2 if conv.padded else (0, 1) for k in conv.kernel],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    if conv.padded:
        return y
    height, width = ((x.shape[i + 1] - conv.kernel[i]) // conv.stride + 1 for i in range(2))
    return y[:, :height, :width]


def _pool(x: jax.Array, pool: Pool) -> jax.Array:
    """A pool along one axis after the other, of shifted slices.

    XLA makes one loop of them; its own operation for windows is 10 times slower on CPUs.
    """
    largest = pool.kind == "max"
    if pool.stride == 1:
        outside = -jnp.inf if largest else 0
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=outside)
    for axis in (1, 2):
        size = (x.shape[axis] - 3) // pool.stride + 1
        reach = (size - 1) * pool.stride + 1
        slices = [lax.slice_in_dim(x, i, i + reach, pool.stride, axis) for i in range(3)]
        x = functools.reduce(jnp.maximum if largest else jnp.add, slices)
        if not largest:
            counts = np.convolve(np.ones(size), np.ones(3), "same")  # without the padding
            x = x / counts.astype(x.dtype).reshape((-1,) + (1,) * (3 - axis))
    return x


class _Layer(nn.Module):
    """A convolution, its bias and ReLU."""

    conv: Conv
    dtype: Any

    @nn.compact
    def __call__(self, x, pool=None):
        shape = (*self.conv.kernel, x.shape[-1], self.conv.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[-1:])
        y = _convolved(x, kernel.astype(self.dtype), self.conv)
        if pool is not None:
            y = _pool(y, pool)
        return nn.relu(y + bias.astype(self.dtype))


class _Block(nn.Module):
    """The branches of a block; each is a tuple of layers."""

    block: Block
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return [self._branch(branch, x) for branch in self.block.branches]

    def _branch(self, branch, x):
        pool = None
        for layer in branch:
            if isinstance(layer, Fork):
                x = jnp.concatenate([self._branch((c,), x) for c in layer.layers], axis=-1)
            elif isinstance(layer, Conv):
                x = _Layer(layer, self.dtype, name=layer.name)(x, pool)
                pool = None
            elif layer.kind == "mean":
                pool = layer  # a mean and a 1x1 convolution commute, and after it there is less
            else:
                x = _pool(x, layer)
        return x


class _Logits(nn.Module):
    """The last matrix product: (N, 2048) to (N, 1008). Its bias, which no metric reads, is kept."""

    dtype: Any

    @nn.compact
    def __call__(self, features):
        shape = (features.shape[-1], NUM_LOGITS)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        self.param("bias", nn.initializers.zeros_init(), shape[-1:])
        return jnp.dot(features, kernel.astype(self.dtype), precision=lax.Precision.HIGHEST)


class Inception(nn.Module):
    """The network. Its parameters are those of `inception_weights.load_inception`.

    Attributes:
      dtype: of activations and products: float32, or float64 (which needs x64 mode).
    """

    dtype: Any = jnp.float32

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """What metrics read of the network; the same for an image whatever its batch.

        Args:
          images: uint8 (N, H, W, 3) of any size; grey ones have to be repeated by the caller.

        Returns:
          By name, of `dtype`: "pool" (N, 2048), the features of Frechet distances; "spatial"
          (N, 2023), those of the spatial one (17 rows, 17 columns, 7 channels); "logits" (N, 1008)
          without the bias, for Inception Scores.

        Raises:
          ValueError: the images are not uint8 (N, H, W, 3).
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}, not uint8 (N, H, W, 3)"
            )
        return self.from_resized(resized(images, self.dtype))

    @nn.compact
    def from_resized(self, x: jax.Array) -> dict[str, jax.Array]:
        """The same of what `resized` makes, (N, 299, 299, 3)."""
        found = {}
        for layer in NETWORK:
            if isinstance(layer, Block):
                parts = _Block(layer, self.dtype, name=layer.name)(x)
                if layer.name == _SPATIAL_BLOCK:
                    found["spatial"] = parts[0][..., :SPATIAL_CHANNELS].reshape(len(x), -1)
                x = jnp.concatenate(parts, axis=-1)
            elif isinstance(layer, Conv):
                x = _Layer(layer, self.dtype, name=layer.name)(x)
            else:
                x = _pool(x, layer)
        pool = x.mean((1, 2))
        return found | {"pool": pool, "logits": _Logits(self.dtype, name="fc")(pool)}


@functools.cache
def abstract_params() -> Any:
    """The tree of parameters with folded batch norm, as float32 ShapeDtypeStructs."""
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.uint8)
    return jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]
