"""How long a step takes at least: per fused stage the slower of its arithmetic and its bytes.

A fused stage reads each of its inputs once and writes its output once; that is what XLA makes of a
DiCo for TPU, within 16% (docs/performance.md). It imports no JAX.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

PARAMETER, WIDE = 4, 4  # bytes: stored float32, float32 of ends and sums
# The slow end of a range. Bytes of a gradient that XLA counts over three ideal forward passes, in
# docs/performance.md; shares of the peaks that programs reach are a guess, to be calibrated.
EXCESS, FLOPS_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 1.63, 0.4, 0.6, 0.5


@dataclasses.dataclass(frozen=True)
class FusedStage:
    """One fused stage, `count` of them: activations per image, and parameters per batch."""

    name: str
    count: int
    read: int  # bytes
    written: int
    parameters: int
    macs: int = 0  # multiply-adds per image

    def bytes(self, batch: float) -> float:
        """Bytes per image, all `count` of them."""
        return self.count * (self.read + self.written + self.parameters / batch)


def block_stages(name: str, depth: int, width: int, hidden: int, positions: int, itemsize: int):
    """The stages of `depth` DiCo blocks."""
    x, h, vector = positions * width * itemsize, positions * hidden * itemsize, width * WIDE

    def stage(what, read, written, weights, macs):
        return FusedStage(f"{name}: {what}", depth, read, written, weights * PARAMETER, macs)

    square = width * width
    dense = square + width
    up = positions * width * hidden
    return [
        stage("modulation", vector, 6 * vector, 6 * dense, 6 * square),
        stage("norm, modulate, 1x1", x + 2 * vector, x, dense, positions * square),
        stage("depthwise, gelu, sum", x, x + vector, 10 * width, 9 * positions * width),
        stage("attention, 1x1, gate, residual", 2 * x + 2 * vector, x, 2 * dense,
              (positions + 1) * square),
        stage("norm, modulate, 1x1, gelu", x + 2 * vector, h, (width + 1) * hidden, up),
        stage("1x1, gate, residual", h + x + vector, x, (hidden + 1) * width, up),
    ]  # fmt: skip


def ideal_stages(
    *, hidden_size: int, depth: tuple[int, ...], mlp_ratio: float, side: int, itemsize: int = 2,
    in_channels: int = 4, out_channels: int = 8, num_rows: int = 1001, time_features: int = 256,
) -> list[FusedStage]:  # fmt: skip
    """All fused stages of a DiCo at latents of side x side; labels are gathered row by row.

    Activations have so many bytes as `itemsize` says, 2 for bfloat16.
    """
    d = hidden_size
    full, half, quarter = side**2, side**2 // 4, side**2 // 16

    def conv(name, positions, inputs, outputs, taps, in_bytes=itemsize):
        """A convolution; what reshuffles or joins its operands moves nothing of its own."""
        read, written = positions * inputs * in_bytes, positions * outputs * itemsize
        weights = taps * inputs * outputs
        return FusedStage(name, 1, read, written, weights * PARAMETER, positions * weights)

    def blocks(i, width, positions):
        hidden = int(mlp_ratio * width)
        return block_stages(f"stage {i + 1}", depth[i], width, hidden, positions, itemsize)

    embed = [
        FusedStage(
            f"embedding {width}", 1, width * PARAMETER, width * WIDE,
            (time_features + 1 + width + 1) * width * PARAMETER, (time_features + width) * width,
        )
        for width in (d, 2 * d, 4 * d)
    ]  # fmt: skip
    weights = 9 * 2 * d * out_channels
    final = FusedStage(
        "final: norm, modulate, 3x3", 1, full * 2 * d * itemsize + 4 * d * WIDE,
        full * out_channels * WIDE, (weights + out_channels) * PARAMETER, full * weights,
    )  # fmt: skip
    final_modulation = FusedStage(
        "final: modulation", 1, 2 * d * WIDE, 4 * d * WIDE, (2 * d + 1) * 4 * d * PARAMETER,
        2 * d * 4 * d,
    )  # fmt: skip
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


def stages_of(model: Any, side: int, macs: int, kept: float) -> list[FusedStage]:
    """The fused stages of a network; one without a formula of them is a single one.

    That one has so many multiply-adds, and reads and writes once the bytes that are kept of it.
    """
    if not getattr(model, "has_conv_modules", False):
        parameters = 0
        return [FusedStage("network", 1, int(kept), int(kept), parameters, macs)]
    fields = ("hidden_size", "depth", "mlp_ratio", "in_channels", "out_channels")
    sizes = {name: getattr(model, name) for name in fields}
    return ideal_stages(side=side, itemsize=model.dtype.itemsize, **sizes)


def seconds(
    stages: Iterable[FusedStage], images: float, shards: int, flops: float, bandwidth: float
) -> tuple[float, float]:
    """The least and the most that a forward pass of so many images takes on each device.

    `shards` is over how many devices the channels are split.
    """
    least = most = 0.0
    for stage in stages:
        work = 2 * stage.macs * stage.count * images / shards / flops
        moved = stage.bytes(images) * images / shards / bandwidth
        least += max(work, moved)
        most += work / FLOPS_SHARE + EXCESS * moved / BANDWIDTH_SHARE
    return least, most
