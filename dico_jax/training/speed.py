"""How fast a run is: throughput, use of the devices, memory, profiles and kept programs."""

import contextlib
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from dico_jax.errors import UsageError, one_line
from dico_jax.experiment import model_from_config
from dico_jax.files import is_remote, upload
from dico_jax.models import count_parameters, training_flops
from dico_jax.ops.cpu import copies_fit
from dico_jax.parallel.mesh import AXES, mesh_fits
from dico_jax.training.step import mean_of_steps

_CACHE_DIR = "jax_compilation_cache_dir"

# Makers' FLOP/s of dense bfloat16 (V100: float16) of a device of JAX: half a chip of TPU v3 and 7x.
_PEAK_FLOPS = (
    (r"NVIDIA (H100 80GB HBM3|H200|GH200 \d+GB)", 989.4e12),
    (r"NVIDIA B200", 2250e12),
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
    (r"TPU7x", 1153.5e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a `jax.Device.device_kind`, or None where it is not known."""
    return next((peak for pattern, peak in _PEAK_FLOPS if re.fullmatch(pattern, device_kind)), None)


def peak_speed(model, latent_shape, devices: Iterable[jax.Device]) -> float | None:
    """Images per second if the network ran at the devices' bfloat16 peak; None if unknown."""
    peaks = [peak_flops(device.device_kind) for device in devices]
    return None if None in peaks else sum(filter(None, peaks)) / training_flops(model, latent_shape)


def peak_memory_gb(devices: Iterable[jax.Device] | None = None) -> float | None:
    """The most memory used on one of this process's devices so far, in GB (1e9); None: unknown."""
    stats = [d.memory_stats() or {} for d in (devices or jax.local_devices())]
    return max(s.get("peak_bytes_in_use", 0) for s in stats) / 1e9 or None


class Meter:
    """Means of step metrics, which stay on the devices until they are read, and throughput."""

    def __init__(self, batch_size: int, peak: float | None = None):
        self._batch_size, self._peak = batch_size, peak
        self.pending: list[dict] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        self._since, self._timed_steps, self._waited = time.monotonic(), 0, 0.0

    def add(self, metrics: dict, waited: float) -> None:
        self.pending.append(metrics)
        self._timed_steps, self._waited = self._timed_steps + 1, self._waited + waited

    def read(self) -> dict[str, float]:
        """Means since the last reading, throughput, and what else docs/training.md names."""
        means, self.pending = mean_of_steps(jax.device_get(self.pending)), []
        seconds = time.monotonic() - self._since
        speed = self._timed_steps * self._batch_size / seconds
        known: Any = {"images_per_second": speed, "data_wait": self._waited / seconds}
        known |= {"mfu": self._peak and speed / self._peak, "memory_gb": peak_memory_gb()}
        self.restart_clock()
        return means | {name: value for name, value in known.items() if value is not None}


class Profiler:
    """Traces `profile.num_steps` steps of the main process, from its `start_step`-th; 0: none."""

    def __init__(self, profile: ConfigDict, workdir: Any, say: Callable = print):
        self._first = profile.start_step if jax.process_index() == 0 else 0
        self._last = self._first + profile.num_steps - 1 if self._first else 0
        self._folder, self._say = workdir / "profile", say
        # JAX writes to disks alone.
        self._disk = tempfile.mkdtemp() if self._first and is_remote(workdir) else self._folder
        self._steps_done, self._metrics, self._step = 0, None, contextlib.ExitStack()

    def __enter__(self):
        if self._first == 1:
            self._start(1)
        return self

    def __exit__(self, exception_type, *_):
        if self._first <= self._steps_done + 1 <= self._last:
            self._stop(wait=exception_type is None)

    def step_done(self, step: int, metrics: Any) -> bool:
        """To be called when a step is dispatched; whether a trace was started or ended just now."""
        self._steps_done += 1
        if not self._first - 1 <= self._steps_done <= self._last:
            return False
        self._metrics = metrics
        self._step.close()
        self._stop(wait=True) if self._steps_done == self._last else self._start(step + 1)
        return self._steps_done in (self._first - 1, self._last)

    def _start(self, step: int) -> None:
        if self._steps_done == self._first - 1:
            if self._steps_done:  # those steps are not part of the profile
                jax.block_until_ready(self._metrics)
            self._try(jax.profiler.start_trace, self._disk)
        self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def _stop(self, wait: bool) -> None:
        if wait:  # or the devices' part of the last steps would be missing
            jax.block_until_ready(self._metrics)
        self._step.close()
        count, folder = self._steps_done - self._first + 1, self._folder
        if self._try(jax.profiler.stop_trace) and self._try(upload, self._disk, folder):
            self._say(f"profile of {count} steps in {folder}: xprof --logdir={folder}")

    def _try(self, action: Callable, *args) -> bool:
        try:
            action(*args)
        except Exception as error:  # a full or lost disk
            self._last = 0
            self._say(f"warning: no profile in {self._folder}, training goes on: {one_line(error)}")
        return self._last > 0


def run_fits(config: ConfigDict) -> Callable[[int], bool]:
    """Says of a number of CPU devices whether a run has the mesh, batches and memory for them."""
    mesh, size, parts = config.mesh, config.data.batch_size, config.training.accumulation_steps
    sizes, state = {axis: mesh[axis] for axis in AXES}, 0
    if jax.distributed.is_initialized():  # it keeps the devices that it has
        return lambda count: False
    with contextlib.suppress(UsageError):  # which the run says
        # Parameters, their average, gradients, two moments, and one copy in hand: float32.
        state = 6 * 4 * count_parameters(model_from_config(config))

    def fits(count: int) -> bool:
        divides = parts > 0 and size % parts == 0 and mesh_fits(count, size // parts, **sizes)
        return divides and copies_fit(state, count // (mesh.fsdp * mesh.tensor))

    return fits


def enable_compilation_cache(setting: str, min_compile_seconds: float = 1.0) -> str | None:
    """Makes JAX keep compiled programs in a folder; to be called before the first compilation.

    Returns the folder that `config.training.compilation_cache` names, or None; failure is told.
    """
    # Not on CPUs: programs of another model in one home are mistrusted (jax-ml/jax#38445).
    base = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/dico_jax/xla"
    preset = "" if jax.default_backend() == "cpu" else getattr(jax.config, _CACHE_DIR) or base
    if not (folder := preset if setting == "default" else setting):
        return None
    if "://" not in folder:
        folder = str(pathlib.Path(folder).expanduser().absolute())
        try:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            text = f"warning: config.training.compilation_cache={setting!r} cannot be written"
            print(f"{text} ({error}); programs are compiled anew in every run", file=sys.stderr)
            return None
    jax.config.update(_CACHE_DIR, folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", min_compile_seconds)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)  # JAX knows the filesystem
    compilation_cache.reset_cache()  # or a folder that was in use before would stay
    return folder
