"""The Pallas kernels of the depthwise convolution as one differentiable, partitionable function.

A kernel alone is neither: XLA cannot look into it, and would gather the arrays of all devices. Here
it is told how images and channels may be split, so that every device runs the kernel on its part.
XLA listens on GPU and CPU; on several TPUs it does not (jax-ml/jax#38196), and the split has to be
said where the function is called, by `conv_gelu_sum_on_mesh`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dico_jax.ops import depthwise_gpu, depthwise_tpu

Platform = Literal["gpu", "tpu"]
_KERNELS = {"gpu": depthwise_gpu, "tpu": depthwise_tpu}


def supported(shape: tuple[int, ...], dtype, platform: Platform) -> bool:
    """Whether the kernels of `platform` take images (N, H, W, C) of `dtype`."""
    if dtype not in (jnp.bfloat16, jnp.float32) or 0 in shape:
        return False
    return platform == "gpu" or depthwise_tpu.fits(shape, dtype)


def conv_gelu_sum(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, platform: Platform, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """GELU of the depthwise 3x3 convolution + bias, zero-padded, and its sum over positions.

    The gradient keeps x alone and computes the convolution again. On GPU, images may be split over
    some axes of a mesh and channels over others; parts are not gathered. Neither forward-mode
    derivatives nor vmap.

    Args:
      x: (N, H, W, C), `supported`.
      kernel: (3, 3, 1, C), dtype of x.
      bias: (C,), dtype of x.
      platform: whose kernels to use, "gpu" (Triton) or "tpu".
      interpret: run them by the Pallas interpreter, on any platform; slow.

    Returns:
      h: (N, H, W, C) of x's dtype, computed in float32 and rounded once.
      sums: (N, C) float32, of h before it is rounded.
    """
    return _differentiable(platform, interpret)(x, kernel, bias)


def conv_gelu_sum_on_mesh(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, mesh: jax.sharding.Mesh,
    images: tuple[str, ...], channels: tuple[str, ...], platform: Platform, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`conv_gelu_sum` with images split over some axes of `mesh` and channels over others.

    Their numbers must divide by the sizes of the axes.
    """
    specs = _specs(images, channels)
    return jax.shard_map(
        functools.partial(conv_gelu_sum, platform=platform, interpret=interpret),
        mesh=mesh,
        in_specs=tuple(specs[letter] for letter in "xkb"),
        out_specs=tuple(specs[letter] for letter in "xs"),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(x, kernel, bias)


def _specs(images, channels):
    """How images x, a kernel k, a bias b and sums s are split."""
    return {
        "x": P(images, None, None, channels),
        "k": P(None, None, None, channels),
        "b": P(channels),
        "s": P(images, channels),
    }


@functools.cache
def _differentiable(platform, interpret):
    kernels = _KERNELS[platform]
    forward = _partitioned(
        functools.partial(kernels.conv_gelu_sum, interpret=interpret),
        rule="n h w c, i j k c, c -> n h w c, n c",
        arguments="xkb",
        results="xs",
    )
    backward = _partitioned(
        functools.partial(kernels.conv_gelu_sum_grad, interpret=interpret),
        rule="n h w c, i j k c, c, n h w c, n c -> n h w c, i j k c, c",
        arguments="xkbxs",
        results="xkb",
    )

    @jax.custom_vjp
    def function(x, kernel, bias):
        return tuple(forward(x, kernel, bias))

    def function_fwd(x, kernel, bias):
        return function(x, kernel, bias), (x, kernel, bias)

    def function_bwd(residuals, cotangents):
        gradients = backward(*residuals, *cotangents)
        return tuple(g.astype(a.dtype) for g, a in zip(gradients, residuals, strict=True))

    function.defvjp(function_fwd, function_bwd)
    return function


def _partitioned(run, *, rule, arguments, results):
    """`run` with images and channels split as those of its first argument are.

    Arguments and results are named by the letters of `_specs`. Results without images (k and b) are
    summed over the devices that split the images.
    """
    call = custom_partitioning(lambda *args: run(*args))

    def partition(mesh, arg_shapes, result_shapes):
        del result_shapes
        images, _, _, channels = arg_shapes[0].sharding.spec
        specs = _specs(images, channels)

        def shardings(letters):
            return tuple(NamedSharding(mesh, specs[letter]) for letter in letters)

        def run_part(*args):
            return tuple(
                jax.lax.psum(part, images) if images and letter in "kb" else part
                for letter, part in zip(results, run(*args), strict=True)
            )

        return mesh, run_part, shardings(results), shardings(arguments)

    call.def_partition(
        partition, sharding_rule=rule, need_replication_factors=("h", "w", "i", "j", "k")
    )
    return call
