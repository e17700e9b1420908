"""Measures networks as `python -m dico_jax.benchmark` is asked to."""

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from dico_jax.benchmarking import Options
from dico_jax.benchmarking.programs import Program, make_program, memory_gb, xla_counts
from dico_jax.benchmarking.report import about
from dico_jax.config import DEFAULTS
from dico_jax.errors import UsageError
from dico_jax.experiment import experiment_from_config, sampling_from_config
from dico_jax.models import count_parameters, forward_macs
from dico_jax.parallel.mesh import check_batch_size, create_mesh, num_batch_shards
from dico_jax.training.speed import peak_flops, peak_memory_gb

_CEILING_SIZES = {"cpu": (1024, 2048, 4096), "gpu": (4096, 8192, 16384), "tpu": (4096, 8192)}


def measure(functions: Mapping, warmup=2, repeats=10, seconds=5.0, clock=time.perf_counter):
    """Times functions in rounds: each runs once in every round, one after the other.

    They wait for the device. After `warmup` rounds that do not count there are `repeats`, and more
    until so many seconds have passed. Returns the seconds of each run by the functions' names.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    start, rounds = clock(), 0
    while rounds < max(repeats, 1) or clock() - start < seconds:
        for name, function in functions.items():
            before = clock()
            function()
            times[name].append(clock() - before)
        rounds += 1
    return times


def summary(times: Sequence[float]) -> dict[str, Any]:
    percentiles = {"median": 50, "p10": 10, "p90": 90, "min": 0, "max": 100}
    found = {f"{k}_seconds": float(np.percentile(times, v)) for k, v in percentiles.items()}
    return found | {"times_seconds": list(times)}


def run_benchmark(options: Options, report: Callable[[str], Any] = str) -> dict[str, Any]:
    """The result that docs/benchmark.md describes; `report` is told what is being done.

    FloatingPointError for results that are not finite.
    """
    if options.ceiling_sizes and not options.ceiling:
        raise UsageError("--ceiling_sizes has no effect with --noceiling: leave one out")
    devices, names = jax.devices(), (options.model, *options.compare)
    if not 0 <= options.devices <= (count := len(devices)):
        raise UsageError(f"--devices={options.devices}: there are {count}, use 1 to {count}")
    if again := next((name for name in options.compare if names.count(name) > 1), None):
        raise UsageError(f"--compare={again} is measured already: name another model")
    mesh = create_mesh(devices[: options.devices or None])
    check_batch_size(options.batch_size, num_batch_shards(mesh), "--batch_size")
    configs = {name: make_config(options, name) for name in names}
    for name, config in configs.items():  # all of them before the first is compiled
        with _errors(options, name):
            experiment_from_config(config, sizes_alone=True)
            sampling_from_config(config)
    with jax.default_matmul_precision(options.matmul_precision):
        rows = _measured(options, configs, mesh, report)
        memory, ceiling = peak_memory_gb(mesh.devices.flat), None  # before the ceiling's matrices
        if options.ceiling:
            report("measuring the ceiling")
            ceiling = measure_ceiling(mesh, options.dtype, options.ceiling_sizes)
    peaks = {peak_flops(device.device_kind) for device in mesh.devices.flat}
    peak = peaks.pop() if len(peaks) == 1 else None
    for row in rows:
        of_one = row["flops_per_second"] / mesh.size
        row["mfu_of_ceiling"] = ceiling and of_one / ceiling["flops_per_second_per_device"]
        row["mfu_of_maker_peak"] = peak and of_one / peak
    device = mesh.devices.flat[0]
    ratios = [row["median_seconds"] / rows[0]["median_seconds"] for row in rows]
    idle = {"action", "devices", *(() if options.action == "sample" else ("steps", "cfg_scale"))}
    return {
        "action": options.action,
        "settings": {k: v for k, v in dataclasses.asdict(options).items() if k not in idle},
        "models": rows,
        "comparison": [
            {"model": options.model, "compared_with": name, "times_as_fast": ratio}
            for name, ratio in zip(options.compare, ratios[1:], strict=True)
        ],
        "ceiling": ceiling,
        "maker_peak_bfloat16_flops_per_second_per_device": peak,
        "peak_memory_gb_of_a_device": memory,
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": mesh.size},
        **about(),
    }


def make_config(options: Options, name: str) -> ConfigDict:
    """The config of a run that trains or samples network `name` as the options say."""
    config, fields = ConfigDict(DEFAULTS), ("dtype", "scan_blocks", "remat", "num_classes")
    config.model.update({field: getattr(options, field) for field in fields}, name=name)
    config.data.update(image_size=options.image_size, batch_size=options.batch_size)
    config.sampling.update(num_steps=options.steps, cfg_scale=options.cfg_scale)
    # Decides the shape of latents alone: nothing is encoded or decoded.
    config.autoencoder.update(name="latent_preview")
    return config


def _measured(options: Options, configs: Mapping[str, ConfigDict], mesh: Mesh, report: Callable):
    programs: dict[str, Program] = {}
    for name, config in configs.items():
        report(f"compiling {options.action} of {name}")
        with _errors(options, name):
            programs[name] = make_program(options.action, config, mesh)
            check_finite(programs[name].run(), name)
    report("measuring")
    runs = {name: program.run for name, program in programs.items()}
    times = measure(runs, options.warmup, options.repeats, options.seconds)
    return [_figures(name, configs[name], programs[name], times[name], mesh) for name in configs]


def _figures(name: str, config: ConfigDict, program: Program, times: Sequence[float], mesh: Mesh):
    experiment = experiment_from_config(config, sizes_alone=True)
    median = summary(times)["median_seconds"]
    size, counts = config.data.batch_size, xla_counts(program.compiled, mesh.size)
    flops = counts["flops_per_run_by_xla"]
    return {
        "model": name,
        "parameters": count_parameters(experiment.model),
        "multiply_adds_per_image": forward_macs(experiment.model, experiment.latent_shape),
        "flops_per_run": program.flops,
        "images_per_run": size,
        "images_per_second": size / median,
        "flops_per_second": program.flops / median,
        **summary(times),
        "trace_seconds": program.compiled.trace_seconds,
        "compile_seconds": program.compiled.compile_seconds,
        **counts,
        "flops_by_xla_over_flops": flops and flops / program.flops,
        "memory_gb_per_device": memory_gb(program.compiled),
    }


def check_finite(outputs: Any, name: str) -> None:
    """Raises FloatingPointError where a number of a tree of arrays is not finite."""
    if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(outputs)):
        raise FloatingPointError(f"{name}: the result has numbers that are not finite")


@contextlib.contextmanager
def _errors(options: Options, name: str) -> Iterator[None]:
    flags = {"name": "model" if name == options.model else "compare", "num_steps": "steps"}
    try:
        yield
    except UsageError as error:
        field = r"(?<![\w.])(?:config\.)?(?:model|data|sampling)\.(\w+)(?=\W)"
        text = re.sub(field, lambda found: f"--{flags.get(found[1], found[1])}", str(error))
        raise UsageError(text) from error


def measure_ceiling(mesh: Mesh, dtype: str, sizes=(), seconds: float = 1.0) -> dict[str, Any]:
    """What the devices can do at best: products of square matrices, by the best size's median."""
    platform = mesh.devices.flat[0].platform
    products = 1 if platform == "cpu" else 8  # per run, so that starting a run does not count
    rows = []
    for size in sizes or _CEILING_SIZES.get(platform, _CEILING_SIZES["gpu"]):
        run = {"": _product(mesh, dtype, size, products)}
        found = summary(measure(run, warmup=1, repeats=5, seconds=seconds)[""])
        flops = 2 * size**3 * products / found["median_seconds"]
        rows.append({"size": size, "flops_per_second_per_device": flops, **found})
    best = {"flops_per_second_per_device": max(row["flops_per_second_per_device"] for row in rows)}
    return best | {"dtype": dtype, "products_per_run": products, "sizes": rows}


def _product(mesh: Mesh, dtype: str, size: int, products: int) -> Callable[[], Any]:
    split = PartitionSpec(mesh.axis_names)

    def multiply(a, b):
        return functools.reduce(jnp.matmul, [b] * products, a)

    def draw(key):
        key = jax.random.fold_in(key, jax.lax.axis_index(mesh.axis_names))
        # b keeps the size of numbers: products of products neither overflow nor vanish.
        a, b = (jax.random.normal(k, (size, size)) for k in jax.random.split(key))
        return a.astype(dtype), (b / jnp.sqrt(size)).astype(dtype)

    shared = functools.partial(jax.shard_map, mesh=mesh, out_specs=split)
    a, b = jax.jit(shared(draw, in_specs=PartitionSpec()))(jax.random.key(0, impl="rbg"))
    product = jax.jit(shared(multiply, in_specs=split))
    return lambda: jax.block_until_ready(product(a, b))
