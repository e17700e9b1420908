r"""Bytes that a TPU moves for one image, beside the fewest that fused stages could move.

    pip install "jax[tpu]"  # for libtpu; no TPU is needed
    python benchmarks/tpu_bytes.py [--model=DiCo-XL --batch=256 --topology=v5e:2x2]

Compiles the forward pass (bfloat16, float32 parameters as arguments) for one chip of a TPU topology
and compares XLA's count of bytes accessed with `ideal_stages`: every fused stage reads each of its
inputs once and writes its output once. Nothing is run. Bar: at most 1.5 times the ideal. XLA's
count includes what it keeps in, or copies ahead to, the memory on the chip. With --train the
gradient of a loss is compiled; the ideal beside it is still that of the forward pass. With
--text_fusion=dwc (or cross_attention) the network is told a text, and the ideal is that without it.
"""

import argparse
import dataclasses
import os
import sys
import time

MAX_RATIO = 1.5
ACTIVATION, PARAMETER, WIDE = 2, 4, 4  # bytes: bfloat16, stored float32, float32 of ends and sums


@dataclasses.dataclass(frozen=True)
class FusedStage:
    """One fused stage: bytes of activations per image, and bytes of parameters per batch."""

    name: str
    count: int
    read: int
    written: int
    parameters: int

    def bytes(self, batch: int) -> float:
        """Bytes per image, all `count` of them."""
        return self.count * (self.read + self.written + self.parameters / batch)


def block_stages(name: str, depth: int, width: int, hidden: int, positions: int):
    """The stages of `depth` DiCo blocks."""
    x, h, vector = positions * width * ACTIVATION, positions * hidden * ACTIVATION, width * WIDE

    def stage(what, read, written, weights):
        return FusedStage(f"{name}: {what}", depth, read, written, weights * PARAMETER)

    dense = width * width + width
    return [
        stage("modulation", vector, 6 * vector, 6 * dense),
        stage("norm, modulate, 1x1", x + 2 * vector, x, dense),
        stage("depthwise, gelu, sum", x, x + vector, 10 * width),
        stage("attention, 1x1, gate, residual", 2 * x + 2 * vector, x, 2 * dense),
        stage("norm, modulate, 1x1, gelu", x + 2 * vector, h, (width + 1) * hidden),
        stage("1x1, gate, residual", h + x + vector, x, (hidden + 1) * width),
    ]


def ideal_stages(
    *, hidden_size: int, depth: tuple[int, ...], mlp_ratio: float, side: int,
    in_channels: int = 4, out_channels: int = 8, num_rows: int = 1001, time_features: int = 256,
) -> list[FusedStage]:  # fmt: skip
    """All fused stages of a DiCo at latents of side x side; labels are gathered row by row."""
    d = hidden_size
    full, half, quarter = side**2, side**2 // 4, side**2 // 16

    def conv(name, positions, inputs, outputs, taps, in_bytes=ACTIVATION, out_bytes=ACTIVATION):
        """A convolution; what reshuffles or joins its operands moves nothing of its own."""
        read, written = positions * inputs * in_bytes, positions * outputs * out_bytes
        return FusedStage(name, 1, read, written, taps * inputs * outputs * PARAMETER)

    def blocks(i, width, positions):
        hidden = int(mlp_ratio * width)
        return block_stages(f"stage {i + 1}", depth[i], width, hidden, positions)

    embed = [
        FusedStage(
            f"embedding {width}", 1, width * PARAMETER, width * WIDE,
            (time_features + 1 + width + 1) * width * PARAMETER,
        )
        for width in (d, 2 * d, 4 * d)
    ]  # fmt: skip
    final = FusedStage(
        "final: norm, modulate, 3x3", 1, full * 2 * d * ACTIVATION + 4 * d * WIDE,
        full * out_channels * WIDE, (9 * 2 * d * out_channels + out_channels) * PARAMETER,
    )  # fmt: skip
    final_modulation = FusedStage(
        "final: modulation", 1, 2 * d * WIDE, 4 * d * WIDE, (2 * d + 1) * 4 * d * PARAMETER
    )
    return [
        *embed,
        conv("input 3x3", full, in_channels, d, 9, in_bytes=WIDE),
        *blocks(0, d, full),
        conv("down 1-2", full, d, d // 2, 9),
        *blocks(1, 2 * d, half),
        conv("down 2-3", half, 2 * d, d, 9),
        *blocks(2, 4 * d, quarter),
        conv("up 3-2", quarter, 4 * d, 8 * d, 9),
        conv("join level 2", half, 4 * d, 2 * d, 1),
        *blocks(3, 2 * d, half),
        conv("up 2-1", half, 2 * d, 4 * d, 9),
        conv("join level 1", full, 2 * d, 2 * d, 1),
        *blocks(4, 2 * d, full),
        final_modulation,
        final,
    ]


def compile_forward(options: dict, batch: int, side: int, topology: str, train: bool = False):
    """The forward pass of a DiCo (or the gradient of a loss), compiled for one chip."""
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("JAX_PLATFORMS", "cpu"),
    ):
        os.environ.setdefault(name, value)
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from dico_jax.benchmarking import Options
    from dico_jax.benchmarking.programs import plan_forward
    from dico_jax.benchmarking.runner import make_config
    from dico_jax.parallel.mesh import create_mesh

    name = "TextDiCo" if "text_fusion" in options else "DiCo"
    config = make_config(Options("forward", image_size=8 * side, batch_size=batch), name)
    config.model.update(options, dtype="bfloat16")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    function, *args, _ = plan_forward(config, create_mesh(devices[:1]))

    def gradient(params, arrays):
        return jax.grad(lambda p: jnp.square(function(p, arrays)).mean())(params)

    return (jax.jit(gradient) if train else function).lower(*args).compile()


def main() -> None:
    """Parses arguments, compiles, prints; exits 1 when the bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiCo-XL")
    parser.add_argument("--depth", type=int, nargs=5, help="instead of the model's")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--side", type=int, default=32, help="of the latents")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--text_fusion", choices=("dwc", "cross_attention"))
    parser.add_argument("--hlo", help="write the optimised program to this file")
    args = parser.parse_args()
    from dico_jax.models import model_options

    known = model_options(args.model)
    options = {name: known[name] for name in ("hidden_size", "depth", "mlp_ratio")}
    if args.depth:
        options["depth"] = tuple(args.depth)
    stages = ideal_stages(side=args.side, **options)
    ideal = sum(stage.bytes(args.batch) for stage in stages)
    if args.text_fusion:
        options["text_fusion"] = args.text_fusion
    for stage in stages:
        print(f"{stage.bytes(args.batch) / 1e6:10.2f} MB  {stage.count:3d} x {stage.name}")
    print(f"{ideal / 1e6:10.2f} MB  ideal per image")
    start = time.monotonic()
    compiled = compile_forward(options, args.batch, args.side, args.topology, args.train)
    print(f"compiled in {time.monotonic() - start:.0f} s")
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(compiled.as_text())
    counted = compiled.cost_analysis()["bytes accessed"] / args.batch
    print(f"{counted / 1e6:10.2f} MB  compiled per image: {counted / ideal:.3f} times the ideal")
    sys.exit(0 if counted <= MAX_RATIO * ideal else 1)


if __name__ == "__main__":
    main()
