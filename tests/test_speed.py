"""Counted arithmetic, the peaks of devices, utilisation and memory."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from dico_jax.errors import UsageError
from dico_jax.models import (
    abstract_params,
    create_model,
    forward_flops,
    forward_macs,
    training_flops,
)
from dico_jax.models.dico import DiCo
from dico_jax.training import speed

# Multiply-adds of the published networks at 256x256 and 512x512, counted in PyTorch by hooks.
PUBLISHED = {
    "DiCo-S": (4_236_476_416, 16_903_536_640),
    "DiCo-B": (16_855_793_664, 67_255_074_816),
    "DiCo-L": (60_168_773_632, 240_004_120_576),
    "DiCo-XL": (87_220_969_472, 347_859_918_848),
    "DiCo-H": (194_029_362_176, 774_915_415_040),
    "DiT-S/2": (6_055_673_856, 31_436_980_224),
    "DiT-XL/2": (118_621_421_568, 524_538_298_368),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_of_published_networks(name):
    model = create_model(name)
    assert tuple(forward_macs(model, (side, side, 4)) for side in (32, 64)) == PUBLISHED[name]
    assert training_flops(model, (32, 32, 4)) == 6 * PUBLISHED[name][0]


def count_products(jaxpr) -> int:
    """Multiply-adds of the matrix products and dense convolutions that a program really has."""
    total = 0
    for equation in jaxpr.eqns:
        subs = list(core.jaxprs_in_params(equation.params))
        if equation.primitive.name == "cond":  # by platform, of which the last is any other
            subs = subs[-1:]
        total += sum(map(count_products, subs))
        shapes = [v.aval.shape for v in equation.invars[:2]]
        size = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += size * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            total += size * math.prod(shapes[1][:-1])  # kernels are HWIO
    return total


@pytest.mark.parametrize(
    ("name", "options", "shape", "depthwise"),
    [
        (
            "DiCo",
            {"hidden_size": 6, "depth": (1, 2, 3, 2, 1), "mlp_ratio": 2.6, "in_channels": 3},
            (12, 20, 3),
            9 * (240 * (6 + 12) + 60 * 2 * (12 + 12) + 15 * 3 * 24),
        ),
        ("DiCo", {"hidden_size": 4, "depth": (1,) * 5, "learn_sigma": False}, (4, 4, 4), 9 * 272),
        (
            "DiT",
            {"hidden_size": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "mlp_ratio": 1.3},
            (8, 12, 4),
            0,
        ),
        (
            "DiCo",
            {
                "hidden_size": 32,
                "depth": (1,) * 5,
                "channel_attention": "squeeze_excite",
                "kernel_size": 5,
            },
            (8, 8, 4),
            25 * 32 * (64 + 2 * 16 + 4 * 4 + 2 * 16 + 2 * 64),
        ),
        (
            "DiCo",
            {
                "hidden_size": 24,
                "depth": 3,
                "patch_size": 2,
                "mlp_ratio": 1.5,
                "layout": "isotropic_skip",
                "channel_attention": "self_attention",
                "kernel_size": 7,
            },
            (8, 8, 4),
            3 * 49 * 16 * 24,
        ),
        ("DiCo", {"hidden_size": 8, "depth": (1,) * 5, "mixer": "attention"}, (8, 8, 4), 0),
        (
            "DiT",
            {
                "hidden_size": 24,
                "depth": 3,
                "num_heads": 3,
                "patch_size": 2,
                "window_size": 2,
                "mixer": "window_attention",
                "layout": "isotropic_skip",
            },
            (8, 8, 4),
            0,
        ),
        (
            "FCDM",
            {"hidden_size": 8, "depth": (1,) * 5},
            (8, 8, 4),
            49 * 8 * (64 + 32 + 16 + 32 + 64),
        ),
    ],
)
def test_multiply_adds_are_those_of_the_program(name, options, shape, depthwise):
    model = create_model(name, num_classes=5, **options)
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    program = jax.make_jaxpr(lambda p, x, t: model.apply({"params": p}, x, t, t))(
        abstract_params(model), x, t
    )
    # Depthwise convolutions are shifted products, no convolutions, in the program.
    assert forward_macs(model, shape) == count_products(program.jaxpr) + depthwise


def test_shapes_that_do_not_divide():
    with pytest.raises(UsageError, match="30x32 positions: both must be multiples of 4"):
        forward_macs(create_model("DiCo-S"), (30, 32, 4))


class Other(DiCo):
    """A network without a formula."""

    def macs(self, positions):
        return None


@pytest.mark.parametrize("compiles", [False, True])
def test_networks_without_a_formula_are_counted_by_xla(compiles, monkeypatch):
    """XLA leaves out products with zeros around, and counts operations element by element."""
    if compiles:  # as on GPU and TPU, where XLA counts compiled programs alone
        monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    sizes = {"hidden_size": 64, "depth": (1, 2, 1, 1, 1), "num_classes": 10}
    shape, known, other = (32, 32, 4), DiCo(**sizes), Other(**sizes, scan_blocks=True, remat="dots")
    assert forward_macs(other, shape) is None
    assert forward_flops(other, shape) == pytest.approx(forward_flops(known, shape), rel=0.05)
    assert training_flops(other, shape) == pytest.approx(training_flops(known, shape), rel=0.05)


PEAKS = {
    989.4: ("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
    756: ("NVIDIA H100 PCIe",),
    312: ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe"),
    121: ("NVIDIA L4",),
    125: ("Tesla V100-SXM2-16GB",),
    61.5: ("TPU v3",),
    275: ("TPU v4",),
    197: ("TPU v5 lite",),
    459: ("TPU v5", "TPU v5p"),
    918: ("TPU v6 lite",),
}
UNKNOWN = (
    "cpu",
    "NVIDIA L40",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA RTX A1000",
    "TPU v4 lite",
)


def test_peaks():
    for teraflops, kinds in PEAKS.items():
        assert {speed.peak_flops(kind) for kind in kinds} == {teraflops * 1e12}, kinds
    assert {speed.peak_flops(kind) for kind in UNKNOWN} == {None}


def device(kind, stats=None):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


def test_utilisation_and_memory(monkeypatch):
    model, shape = create_model("DiCo-XL"), (32, 32, 4)
    gpus = [device("NVIDIA H100 80GB HBM3", {"peak_bytes_in_use": n}) for n in (2 * 10**9, 10**9)]
    monkeypatch.setattr(speed.jax, "local_devices", lambda: gpus)
    meter = speed.Meter(8, speed.peak_speed(model, shape, gpus))
    meter.add({"finite": True, "loss": np.float32(2)}, waited=0.0)
    values = meter.read()
    mfu = values["mfu"] / values["images_per_second"] * 1000
    # 1000 images of 6 * 87.22 GFLOP on two devices of 989.4 TFLOP/s.
    assert mfu == pytest.approx(0.264464, rel=1e-5)
    assert (values["memory_gb"], values["loss"]) == (2, 2)
    mixed = [*gpus, device("a new one")]
    assert speed.peak_speed(model, shape, mixed) is None


def test_cpus_tell_neither():
    model = create_model("DiCo-S")
    meter = speed.Meter(8, speed.peak_speed(model, (32, 32, 4), jax.devices()))
    meter.add({"finite": True}, waited=0.0)
    assert meter.read().keys() == {"images_per_second", "data_wait"}
    assert speed.peak_memory_gb([device("x", {"bytes_in_use": 3})]) is None
