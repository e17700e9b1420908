"""The Inception network whose features Frechet distances are taken of: TensorFlow's of 2015-12-05.

Unlike torchvision's it has 1008 logits, average pools leave the padding out of the count, the last
block pools with a maximum, and pictures are resized in the manner of TensorFlow 1.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import lax

from dico_jax.ops.plain import check_float64

SIDE = 299  # pixels, what pictures are resized to
NUM_FEATURES, NUM_LOGITS, SPATIAL_CHANNELS = 2048, 1008, 7
# ADM's evaluator reads "mixed_6/conv:0": the first branch of this block, after its ReLU.
_SPATIAL_BLOCK = "Mixed_6d"


class Conv(NamedTuple):
    """A convolution of `width` channels, batch norm and ReLU; `padded` keeps the size."""

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
    """Layers side by side on one input, joined along the channels."""

    layers: tuple[Conv, ...]


class Block(NamedTuple):
    """Branches side by side, each a sequence of layers, joined along the channels."""

    name: str
    branches: tuple[tuple[Any, ...], ...]


def _branch(prefix: str, *sizes: tuple[int, int, int], stride: int = 1) -> tuple[Any, ...]:
    """Convolutions PREFIX_1, PREFIX_2, ... of (channels, *kernel); the stride is the last one's."""
    convs = [Conv(f"{prefix}_{i}", c, (h, w)) for i, (c, h, w) in enumerate(sizes, 1)]
    if stride > 1:
        convs[-1] = convs[-1]._replace(stride=stride, padded=False)
    return tuple(convs)


def _block(name: str, width: int, *branches: tuple[Any, ...], pool: tuple[str, int]) -> Block:
    """A 1x1 convolution, other branches, and a pool of (kind, channels)."""
    pooled = Pool("pool", pool[0]), Conv("branch_pool", pool[1])
    return Block(name, ((Conv("branch1x1", width),), *branches, pooled))


def _block_35(name: str, pool_width: int) -> Block:
    five = _branch("branch5x5", (48, 1, 1), (64, 5, 5))
    double = _branch("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
    return _block(name, 64, five, double, pool=("mean", pool_width))


def _block_17(name: str, width: int) -> Block:
    first, row, column = (width, 1, 1), (width, 1, 7), (width, 7, 1)
    single = _branch("branch7x7", first, row, (192, 7, 1))
    double = _branch("branch7x7dbl", first, column, row, column, (192, 1, 7))
    return _block(name, 192, single, double, pool=("mean", 192))


def _block_8(name: str, pool: str) -> Block:
    def forked(prefix: str) -> Fork:
        return Fork((Conv(f"{prefix}a", 384, (1, 3)), Conv(f"{prefix}b", 384, (3, 1))))

    single = (*_branch("branch3x3", (384, 1, 1)), forked("branch3x3_2"))
    double = (*_branch("branch3x3dbl", (448, 1, 1), (384, 3, 3)), forked("branch3x3dbl_3"))
    return _block(name, 320, single, double, pool=(pool, 192))


def _smaller(name: str, *branches: tuple[Any, ...]) -> Block:
    return Block(name, (*branches, (Pool("pool", "max", stride=2),)))


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
    _smaller(
        "Mixed_6a",
        (Conv("branch3x3", 384, (3, 3), stride=2, padded=False),),
        _branch("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), stride=2),
    ),
    _block_17("Mixed_6b", 128),
    _block_17("Mixed_6c", 160),
    _block_17("Mixed_6d", 160),
    _block_17("Mixed_6e", 192),
    _smaller(
        "Mixed_7a",
        _branch("branch3x3", (192, 1, 1), (320, 3, 3), stride=2),
        _branch("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), stride=2),
    ),
    _block_8("Mixed_7b", "mean"),
    _block_8("Mixed_7c", "max"),
)


def resize_tables(size: int, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper positions that make each of the 299, int32, and the weights of the upper."""
    # Rounded to float32, as TensorFlow has it, whatever the weights' dtype.
    factor = np.float32(size) / np.float32(SIDE)
    source = np.arange(SIDE, dtype=dtype) * factor.astype(dtype)
    lower = np.floor(source).astype(np.int32)
    return lower, np.minimum(lower + 1, size - 1), source - lower.astype(dtype)


def resized(images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """uint8 (N, H, W, 3) as the network sees it, as TensorFlow 1 resizes: (N, 299, 299, 3)."""
    check_float64("dtype", dtype)
    x = images
    for axis in (2, 1):  # TensorFlow's order
        if x.shape[axis] != SIDE:
            lower, upper, weight = resize_tables(x.shape[axis], dtype)
            low, high = (jnp.take(x, rows, axis=axis).astype(dtype) for rows in (lower, upper))
            x = low + (high - low) * weight.reshape((-1,) + (1,) * (3 - axis))
    return (x.astype(dtype) - 128) / 128


def _convolved(x: jax.Array, kernel: jax.Array, conv: Conv) -> jax.Array:
    """XLA's, without a bias, but for three cases where it is slow on CPUs."""
    if conv.kernel == (1, 1):
        return jnp.dot(x, kernel[0, 0], precision=lax.Precision.HIGHEST)
    if x.shape[-1] == 3:  # which take twice the time of four
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1)))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 0)))
    # Without any padding it takes 2 to 7 times as long: zeros at the end are cut off again.
    strides, axes = (conv.stride, conv.stride), ("NHWC", "HWIO", "NHWC")
    padding = [((k - 1) // 2,) * 2 if conv.padded else (0, 1) for k in conv.kernel]
    how: Any = {"dimension_numbers": axes, "precision": lax.Precision.HIGHEST}
    y = lax.conv_general_dilated(x, kernel, strides, padding, **how)
    if conv.padded:
        return y
    height, width = ((x.shape[i + 1] - conv.kernel[i]) // conv.stride + 1 for i in range(2))
    return y[:, :height, :width]


def _pool(x: jax.Array, pool: Pool) -> jax.Array:
    """Of shifted slices along one axis after the other: 10 times as fast as XLA's on CPUs."""
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


def features_of(params: Any, images: jax.Array, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """What metrics read of uint8 images (N, H, W, 3), of any size; the same whatever the batch.

    These are "pool" (N, 2048), "spatial" (N, 17 * 17 * 7) and "logits" (N, 1008), without the bias.
    `params` are those of `inception_weights.load_inception`. A float64 `dtype` needs x64 mode.
    """
    shape = images.shape
    if len(shape) != 4 or shape[-1] != 3 or images.dtype != jnp.uint8:
        raise ValueError(f"images are {images.dtype}{list(shape)}, not uint8 (N, H, W, 3)")
    return features_of_resized(params, resized(images, dtype))


def features_of_resized(params: Any, x: jax.Array) -> dict[str, jax.Array]:
    """The same of what `resized` makes, (N, 299, 299, 3)."""
    found = {}
    for layer in NETWORK:
        if isinstance(layer, Block):
            parts = [_run(branch, params[layer.name], x) for branch in layer.branches]
            if layer.name == _SPATIAL_BLOCK:
                found["spatial"] = parts[0][..., :SPATIAL_CHANNELS].reshape(len(x), -1)
            x = jnp.concatenate(parts, axis=-1)
        else:
            x = _run((layer,), params, x)
    pool, kernel = x.mean((1, 2)), params["fc"]["kernel"].astype(x.dtype)
    logits = jnp.dot(pool, kernel, precision=lax.Precision.HIGHEST)
    return found | {"pool": pool, "logits": logits}


def _run(layers: Iterable[Any], params: Any, x: jax.Array) -> jax.Array:
    mean = None
    for layer in layers:
        if isinstance(layer, Fork):
            x = jnp.concatenate([_run((c,), params, x) for c in layer.layers], axis=-1)
        elif isinstance(layer, Conv):
            kernel, bias = (params[layer.name][name].astype(x.dtype) for name in ("kernel", "bias"))
            x = _convolved(x, kernel, layer)
            x, mean = jax.nn.relu((_pool(x, mean) if mean else x) + bias), None
        elif layer.kind == "mean":
            mean = layer  # it and a 1x1 convolution commute, and after that there is less
        else:
            x = _pool(x, layer)
    return x


@functools.cache
def abstract_params() -> Any:
    """The tree of parameters with folded batch norm, as float32 ShapeDtypeStructs."""
    shapes = {"fc/kernel": (NUM_FEATURES, NUM_LOGITS), "fc/bias": (NUM_LOGITS,)}

    def width_after(layers: Iterable[Any], width: int, prefix: str = "") -> int:
        for layer in layers:
            if isinstance(layer, Conv):
                shapes[f"{prefix}{layer.name}/kernel"] = (*layer.kernel, width, layer.width)
                shapes[f"{prefix}{layer.name}/bias"] = (layer.width,)
                width = layer.width
            elif isinstance(layer, Fork):
                width = sum(width_after((conv,), width, prefix) for conv in layer.layers)
            elif isinstance(layer, Block):
                inner = f"{layer.name}/"
                width = sum(width_after(branch, width, inner) for branch in layer.branches)
        return width

    width_after(NETWORK, 3)
    leaves = {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in shapes.items()}
    return unflatten_dict(leaves, sep="/")
