"""How well a run uses its devices: model FLOP/s utilisation and memory."""

import re
from collections.abc import Callable, Iterable

import jax
from ml_collections import ConfigDict

from dico_jax.errors import UsageError
from dico_jax.experiment import model_from_config
from dico_jax.models import count_parameters, training_flops
from dico_jax.models.denoiser import Denoiser
from dico_jax.ops.cpu import copies_fit
from dico_jax.parallel.mesh import mesh_fits

# Copies of the parameters in a step: they, their average, gradients, two moments, and one in hand.
_COPIES_IN_A_STEP = 6

# Makers' figures per device for dense bfloat16 products (V100, which has none: float16), in FLOP/s,
# by what JAX calls the device. A JAX device of TPU v3 is half a chip. Names match as a whole, so
# that a slice of a GPU, or an L40, is not taken for the GPU, or an L4.
_PEAK_FLOPS = (
    (r"NVIDIA (H100 80GB HBM3|H200|GH200 \d+GB)", 989.4e12),
    (r"NVIDIA (H100|H200) NVL", 835.5e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA A100(-SXM4-\d+GB|-PCIE-\d+GB| \d+GB PCIe)", 312e12),
    (r"NVIDIA L4", 121e12),
    (r"Tesla V100-SXM\d-\d+GB(-LS)?", 125e12),
    (r"Tesla V100-PCIE-\d+GB", 112e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v4", 275e12),
    (r"TPU (v5e|v5 lite)", 197e12),
    (r"TPU (v5p|v5)", 459e12),
    (r"TPU (v6e|v6 lite)", 918e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a `jax.Device.device_kind`, or None where it is not known."""
    return next((peak for pattern, peak in _PEAK_FLOPS if re.fullmatch(pattern, device_kind)), None)


def peak_memory_gb(devices: Iterable[jax.Device] | None = None) -> float | None:
    """The most memory used on one of this process's devices so far, in GB (1e9 bytes).

    None where devices do not tell, such as CPUs.
    """
    stats = [d.memory_stats() or {} for d in (devices or jax.local_devices())]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) / 1e9 if peaks else None


class SpeedMetrics:
    """Utilisation and memory of a training run."""

    def __init__(
        self, model: Denoiser, latent_shape: tuple[int, int, int], devices: Iterable[jax.Device]
    ):
        """Counts.

        Args:
          model: the network.
          latent_shape: (H, W, C) of its input.
          devices: all devices that the run uses.
        """
        peaks = [peak_flops(device.device_kind) for device in devices]
        self._peak_flops = None if None in peaks else sum(filter(None, peaks))
        if self._peak_flops is not None:
            self._flops_per_image = training_flops(model, latent_shape)

    def metrics(self, images_per_second: float) -> dict[str, float]:
        """The metrics for a throughput over all devices.

        Returns:
          "mfu", the share in 0..1 of the devices' bfloat16 peak that the network's own arithmetic
          takes (see `training_flops`), whatever dtype it runs in; left out for devices whose peak
          is not known. "memory_gb", see `peak_memory_gb`; left out where devices do not tell.
        """
        values = {}
        if self._peak_flops is not None:
            values["mfu"] = images_per_second * self._flops_per_image / self._peak_flops
        memory = peak_memory_gb()
        if memory is not None:
            values["memory_gb"] = memory
        return values


def run_fits(config: ConfigDict) -> Callable[[int], bool]:
    """Says of a number of CPU devices whether a run has the mesh, batches and memory for them.

    So that what runs on one device does so on all that it is given; it starts no device itself.
    """
    mesh, parts = config.mesh, max(config.training.accumulation_steps, 1)
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    size, rest = config.data.batch_size, config.data.batch_size % parts
    try:
        state = _COPIES_IN_A_STEP * 4 * count_parameters(model_from_config(config))
    except UsageError:  # which the run says
        state = 0

    def fits(count: int) -> bool:
        divides = not rest and mesh_fits(count, size // parts, **sizes)
        # One of several processes keeps the devices that it has.
        alone = not jax.distributed.is_initialized()
        return divides and alone and copies_fit(state, count // (mesh.fsdp * mesh.tensor))

    return fits
