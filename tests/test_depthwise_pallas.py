"""The Pallas kernels of the depthwise convolution: interpreted on CPU, and lowered for CUDA."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dico_jax.ops import depthwise_gpu, depthwise_pallas, depthwise_tpu
from dico_jax.ops.depthwise import depthwise_conv3x3
from dico_jax.ops.gelu import gelu
from dico_jax.parallel.mesh import BATCH_AXES, create_mesh

PLATFORMS = ("gpu", "tpu")
NAMES = ("h", "sums", "dx", "dkernel", "dbias")


def abstract_operands(shape, dtype=jnp.float32):
    """x, kernel, bias, dh, dsums."""
    n, _, _, channels = shape
    shapes = shape, (3, 3, 1, channels), (channels,), shape
    images = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
    return [*images, jax.ShapeDtypeStruct((n, channels), jnp.float32)]


def operands(shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in abstract_operands(shape, dtype)]


def with_gradient(function):
    def run(x, kernel, bias, dh, dsums):
        out, vjp = jax.vjp(function, x, kernel, bias)
        return *out, *vjp((dh, dsums))

    return run


def plain(x, kernel, bias):
    h = gelu(depthwise_conv3x3(x, kernel, bias, implementation="lax"))
    return h, h.sum((1, 2))


def pallas(platform):
    return functools.partial(depthwise_pallas.conv_gelu_sum, platform=platform, interpret=True)


def assert_close(results, expected, tolerances):
    for name, ours, reference, tolerance in zip(NAMES, results, expected, tolerances, strict=True):
        ours, reference = np.asarray(ours, np.float32), np.asarray(reference)
        off = np.abs(ours - reference).max() / np.abs(reference).max()
        assert off < tolerance, (name, off)


# Several blocks of channels, tiles and programs of the GPU kernels, the last ones not full; sizes
# below any block; several images in a program of the TPU kernels, and a prime number of them.
SHAPES = [(4, 2, 2, 6), (2, 6, 11, 130), (1, 17, 24, 3), (3, 1, 1, 2)]


@pytest.mark.parametrize(
    ("platform", "shape"),
    [("tpu", shape) for shape in SHAPES]
    + [("gpu", SHAPES[0])]
    + [pytest.param("gpu", shape, marks=pytest.mark.slow) for shape in SHAPES[1:]],  # 10 s each
)
def test_kernels_are_gelu_of_the_convolution_and_its_gradient(platform, shape):
    args = operands(shape)
    results = jax.jit(with_gradient(pallas(platform)))(*args)
    expected = jax.jit(with_gradient(plain))(*args)
    assert [r.shape for r in results] == [e.shape for e in expected]
    assert_close(results, expected, [1e-5] * 5)


@pytest.mark.parametrize("platform", ["tpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_bfloat16_is_rounded_where_arrays_are_written(platform):
    args = operands((2, 8, 8, 20), jnp.bfloat16)
    results = jax.jit(with_gradient(pallas(platform)))(*args)
    assert [r.dtype for r in results] == [jnp.bfloat16, jnp.float32] + [jnp.bfloat16] * 3
    exact = jax.jit(with_gradient(plain))(*(a.astype(jnp.float32) for a in args))
    # Half a unit in the last of 8 bits of each array written; the GPU also writes dy.
    unit = 2**-8
    assert_close(results, exact, [unit, 1e-5, 2 * unit if platform == "gpu" else unit, unit, unit])


def test_the_plain_convolution_on_gpu():
    x, kernel, bias, *_ = operands((2, 6, 11, 70))
    ours = jax.jit(lambda *args: depthwise_gpu.conv(*args, interpret=True))(x, kernel, bias)
    np.testing.assert_allclose(ours, depthwise_conv3x3(x, kernel, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_devices_run_the_kernels_on_their_parts(platform):
    args = operands((4, 3, 3, 6))
    mesh = create_mesh(data=2, fsdp=2, tensor=2)
    images = P(BATCH_AXES, None, None, "tensor")
    specs = images, P(None, None, None, "tensor"), P("tensor"), images, P(BATCH_AXES, "tensor")
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    on_mesh = functools.partial(
        depthwise_pallas.conv_gelu_sum_on_mesh,
        mesh=mesh, images=BATCH_AXES, channels=("tensor",), platform=platform, interpret=True,
    )  # fmt: skip
    expected = jax.jit(with_gradient(plain))(*args)
    for function in (pallas(platform), on_mesh):
        compiled = jax.jit(with_gradient(function)).lower(*placed).compile()
        # Gradients of the kernel and the bias are summed; nothing else is exchanged.
        text = compiled.as_text()
        assert "all-reduce" in text
        for exchange in ("all-gather", "all-to-all", "collective-permute"):
            assert exchange not in text
        results = compiled(*placed)
        assert results[0].sharding.is_equivalent_to(placed[0].sharding, 4)
        assert_close(results, expected, [1e-5] * 5)


def test_which_arrays_are_supported():
    shape = (2, 32, 32, 416)
    assert depthwise_pallas.supported(shape, jnp.bfloat16, "tpu")
    assert depthwise_pallas.supported((2, 64, 64, 416), jnp.bfloat16, "tpu")
    assert depthwise_pallas.supported((2, 256, 256, 416), jnp.float32, "gpu")
    assert not depthwise_pallas.supported((2, 256, 256, 416), jnp.float32, "tpu")  # VMEM
    assert not depthwise_pallas.supported((0, 32, 32, 416), jnp.float32, "gpu")
    for dtype in (jnp.float64, jnp.float16):
        assert not depthwise_pallas.supported(shape, dtype, "gpu")


def test_blocks_of_images_divide_the_batch():
    counts = [
        depthwise_tpu._Call(jnp.zeros((n, 1, width, 1)), True).block_shape[0]
        for n, width in ((256, 32), (256, 8), (6, 16), (7, 8), (3, 100), (1, 1))
    ]
    assert counts == [2, 8, 3, 7, 1, 1]


def some_gpu():
    """A GPU to lower for: JAX 0.12 asks for one, older versions assume one."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("shape", [(256, 32, 32, 416), (3, 5, 7, 13)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_lower_for_cuda(dtype, shape):
    function = with_gradient(functools.partial(depthwise_pallas.conv_gelu_sum, platform="gpu"))
    with some_gpu():
        traced = jax.jit(function).trace(*abstract_operands(shape, dtype))
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("triton") >= 3
