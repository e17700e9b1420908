"""Measures networks as `python -m dico_jax.benchmark` is asked to."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dico_jax.benchmarking.ceiling import Ceiling, measure_ceiling
from dico_jax.benchmarking.compiled import Compiled, memory_gb, xla_counts
from dico_jax.benchmarking.programs import ACTIONS, Program, Work, check_finite
from dico_jax.benchmarking.report import about
from dico_jax.benchmarking.timing import Times, measure
from dico_jax.config import DEFAULTS
from dico_jax.errors import UsageError
from dico_jax.experiment import experiment_from_config, sampling_from_config
from dico_jax.parallel.mesh import check_batch_size, create_mesh, num_batch_shards
from dico_jax.training.speed import peak_flops, peak_memory_gb

PRECISIONS = ("default", "high", "highest")
# Flags in place of the fields of a config that errors name.
_FLAGS = {
    "data.image_size": "--image_size",
    "data.batch_size": "--batch_size",
    "model.num_classes": "--num_classes",
    "model.remat": "--remat",
    "model.dtype": "--dtype",
    "sampling.num_steps": "--steps",
    "sampling.cfg_scale": "--cfg_scale",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and how.

    Attributes:
      action: a key of `ACTIONS`.
      model: name of a network, a key of `dico_jax.models.MODELS`.
      compare: names of further networks, measured in turn with the first.
      image_size: side of the images in pixels; latents are smaller by 8.
      batch_size: images per run over all devices.
      dtype: of activations, "float32" or "bfloat16".
      scan_blocks, remat, num_classes: see `config.model` in configs/default.py.
      steps, cfg_scale: of "sample", see `config.sampling`.
      warmup: runs that do not count.
      repeats: the least number of runs that count.
      seconds: runs go on for so long.
      num_devices: the first so many devices; all if None.
      ceiling_sizes: sides of the matrices that the ceiling is measured with; () for no ceiling,
        None for sizes that suit the platform.
      matmul_precision: of float32 products, one of `PRECISIONS`.
    """

    action: str
    model: str = "DiCo-S"
    compare: tuple[str, ...] = ()
    image_size: int = 256
    batch_size: int = 8
    dtype: str = "float32"
    scan_blocks: bool = False
    remat: str = "none"
    num_classes: int = 1000
    steps: int = 250
    cfg_scale: float = 1.4
    warmup: int = 2
    repeats: int = 10
    seconds: float = 5.0
    num_devices: int | None = None
    ceiling_sizes: tuple[int, ...] | None = None
    matmul_precision: str = "default"


def run_benchmark(
    options: Options, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measures.

    Args:
      options: what, and how.
      report: is told what is being done.

    Returns:
      The result as docs/benchmark.md describes it, ready for JSON.

    Raises:
      UsageError: naming the flag, its value and the fix; also where memory does not suffice.
      FloatingPointError: a program computes numbers that are not finite.
    """
    mesh = create_mesh(_devices(options.num_devices))
    check_batch_size(options.batch_size, num_batch_shards(mesh), "--batch_size")
    configs = {name: make_config(options, name) for name in _names(options)}
    for config in configs.values():  # all of them before the first is compiled
        with _errors(config, options):
            experiment_from_config(config)
            sampling_from_config(config)
    with jax.default_matmul_precision(options.matmul_precision):
        measured = _measure(options, configs, mesh, report)
        memory = peak_memory_gb(mesh.devices.flat)  # without the ceiling's matrices
        ceiling = None
        if options.ceiling_sizes != ():
            report("measuring the ceiling")
            with _memory_errors("--ceiling_sizes: {} for these matrices; use smaller ones"):
                ceiling = measure_ceiling(mesh, options.dtype, options.ceiling_sizes)
    peaks = {peak_flops(device.device_kind) for device in mesh.devices.flat}
    peak = peaks.pop() if len(peaks) == 1 else None
    first = measured[options.model].times.median
    return {
        "action": options.action,
        "settings": _settings(options),
        "models": [
            {
                "model": name,
                **_speed(found, options.batch_size),
                **_utilisation(found, mesh.size, ceiling, peak),
                **_compilation(found, mesh.size),
            }
            for name, found in measured.items()
        ],
        "comparison": [
            {
                "model": options.model,
                "compared_with": name,
                "times_as_fast": measured[name].times.median / first,
            }
            for name in options.compare
        ],
        "ceiling": None if ceiling is None else ceiling.to_dict(),
        "maker_peak_bfloat16_flops_per_second_per_device": peak,
        "peak_memory_gb_of_a_device": memory,
        "devices": _about_devices(mesh),
        **about(),
    }


def make_config(options: Options, name: str) -> ConfigDict:
    """The config of a run that trains or samples network `name` as the options say."""
    config = ConfigDict(DEFAULTS)
    config.model.update(
        name=name,
        dtype=options.dtype,
        scan_blocks=options.scan_blocks,
        remat=options.remat,
        num_classes=options.num_classes,
    )
    config.data.update(image_size=options.image_size, batch_size=options.batch_size)
    config.sampling.update(num_steps=options.steps, cfg_scale=options.cfg_scale)
    # Decides the shape of latents alone: nothing is encoded or decoded.
    config.autoencoder.update(name="latent_preview")
    return config


def _names(options: Options) -> tuple[str, ...]:
    names = (options.model, *options.compare)
    for name in options.compare:
        if names.count(name) > 1:
            raise UsageError(f"--compare={name} is measured already: name another model")
    return names


def _devices(count: int | None) -> list[jax.Device]:
    devices = jax.devices()
    if count is not None and not 1 <= count <= len(devices):
        raise UsageError(f"--devices={count}: there are {len(devices)}, use 1 to {len(devices)}")
    return devices[:count]


class _Measured(NamedTuple):
    compiled: Compiled
    work: Work
    times: Times


def _measure(
    options: Options, configs: Mapping[str, ConfigDict], mesh: Mesh, report: Callable[[str], None]
) -> dict[str, _Measured]:
    """All programs in turn; nothing of them is left on the devices."""
    programs: dict[str, Program] = {}
    for name, config in configs.items():
        report(f"compiling {options.action} of {name}")
        with _errors(config, options):
            programs[name] = ACTIONS[options.action](config, mesh)
            check_finite(programs[name].run(), name)
    report("measuring")
    runs = {
        name: _with_errors(program.run, configs[name], options)
        for name, program in programs.items()
    }
    times = measure(runs, options.warmup, options.repeats, options.seconds)
    return {
        name: _Measured(program.compiled, program.work, times[name])
        for name, program in programs.items()
    }


@contextlib.contextmanager
def _errors(config: ConfigDict, options: Options) -> Iterator[None]:
    """Names flags instead of fields, and makes one line of a lack of memory."""
    name, size = config.model.name, options.batch_size
    smaller = f"--batch_size={size // 2}" if size > 1 else "a smaller --image_size"
    others = "--dtype=bfloat16, more devices" + ", --remat=blocks" * (options.action == "train")
    try:
        with _memory_errors(
            f"--batch_size={size}: {{}} for {name} in {options.dtype}; use {smaller}, or {others}"
        ):
            yield
    except UsageError as error:
        flag = "--model" if name == options.model else "--compare"
        raise UsageError(_with_flags(str(error), {**_FLAGS, "model.name": flag})) from error


@contextlib.contextmanager
def _memory_errors(message: str) -> Iterator[None]:
    """One line where memory does not suffice: `message`, with that in place of its braces."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        said = (str(error).strip().splitlines() or ["MemoryError"])[0]
        # XLA has a status of its own for it, but on CPUs only the words tell.
        short = re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE)
        if not short and not isinstance(error, MemoryError):
            raise
        text = message.format("the memory does not suffice")
        raise UsageError(f"{text} ({said})") from error


def _with_flags(message: str, names: Mapping[str, str]) -> str:
    pattern = "|".join(map(re.escape, names))
    return re.sub(
        rf"(?<![\w.])(?:config\.)?({pattern})(?=\W)", lambda match: names[match[1]], message
    )


def _with_errors(run: Callable[[], Any], config: ConfigDict, options: Options) -> Callable[[], Any]:
    def running():
        with _errors(config, options):
            return run()

    return running


def _settings(options: Options) -> dict[str, Any]:
    """The options that have an effect."""
    settings = dataclasses.asdict(options)
    del settings["action"], settings["num_devices"]
    if options.action != "sample":
        del settings["steps"], settings["cfg_scale"]
    return settings


def _speed(found: _Measured, batch_size: int) -> dict[str, Any]:
    return {
        "parameters": found.work.parameters,
        "multiply_adds_per_image": found.work.macs_per_image,
        "flops_per_run": found.work.flops,
        "images_per_run": batch_size,
        "images_per_second": batch_size / found.times.median,
        "flops_per_second": found.work.flops / found.times.median,
        **found.times.to_dict(),
    }


def _utilisation(
    found: _Measured, num_devices: int, ceiling: Ceiling | None, peak: float | None
) -> dict[str, float | None]:
    of_one = found.work.flops / found.times.median / num_devices
    return {
        "mfu_of_ceiling": None if ceiling is None else of_one / ceiling.flops_per_second,
        "mfu_of_maker_peak": None if peak is None else of_one / peak,
    }


def _compilation(found: _Measured, num_devices: int) -> dict[str, Any]:
    xla = xla_counts(found.compiled, num_devices)
    flops = xla["flops_per_run_by_xla"]
    return {
        "trace_seconds": found.compiled.trace_seconds,
        "compile_seconds": found.compiled.compile_seconds,
        **xla,
        "flops_by_xla_over_flops": None if flops is None else flops / found.work.flops,
        "memory_gb_per_device": memory_gb(found.compiled),
    }


def _about_devices(mesh: Mesh) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": mesh.size}
