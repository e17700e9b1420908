"""Compiled ahead of time for TPU, without one: the kernels, and the bytes of DiCo-XL."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dico_jax.ops import depthwise_pallas
from dico_jax.parallel.mesh import BATCH_AXES, create_mesh
from tests.test_depthwise_pallas import abstract_operands, with_gradient

pytest.importorskip("libtpu", reason="compiling for TPU needs the package libtpu")

ROOT = pathlib.Path(__file__).resolve().parents[1]


def devices(topology):
    # So that libtpu does not ask a metadata server which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compiled(function, args, shardings):
    args = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
        for a, s in zip(args, shardings, strict=True)
    ]
    return jax.jit(with_gradient(function)).lower(*args).compile()


TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
DICO_XL = [(256, 32, 32, 416), (256, 16, 16, 832), (256, 32, 32, 832), (256, 8, 8, 1664)]
DICO_S = [(32, 32, 32, 128), (32, 16, 16, 256), (32, 8, 8, 512)]
ODD = [(8, 64, 64, 416), (8, 300, 8, 128), (3, 5, 7, 130), (8, 2, 2, 20), (1, 1, 1, 3)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", DICO_XL + DICO_S + ODD)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_compile(topology, shape, dtype):
    assert depthwise_pallas.supported(shape, dtype, "tpu")
    sharding = SingleDeviceSharding(devices(topology)[0])
    function = functools.partial(depthwise_pallas.conv_gelu_sum, platform="tpu")
    program = compiled(function, abstract_operands(shape, dtype), [sharding] * 5)
    assert program.as_text().count("tpu_custom_call") == 2


def test_devices_run_the_kernels_on_their_parts():
    mesh = create_mesh(devices("v5e:2x4"), fsdp=2, tensor=2)
    images = P(BATCH_AXES, None, None, "tensor")
    specs = images, P(None, None, None, "tensor"), P("tensor"), images, P(BATCH_AXES, "tensor")
    function = functools.partial(
        depthwise_pallas.conv_gelu_sum_on_mesh,
        mesh=mesh, images=BATCH_AXES, channels=("tensor",), platform="tpu",
    )  # fmt: skip
    args = abstract_operands((64, 32, 32, 832), jnp.bfloat16)
    text = compiled(function, args, [NamedSharding(mesh, spec) for spec in specs]).as_text()
    assert text.count("tpu_custom_call") == 2
    assert "all-reduce" in text
    for exchange in ("all-gather", "all-to-all", "collective-permute"):
        assert exchange not in text


@pytest.mark.slow
def test_bytes_of_dico_xl_are_within_the_bar():
    program = ROOT / "benchmarks" / "tpu_bytes.py"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times the ideal" in done.stdout
