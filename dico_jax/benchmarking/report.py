"""Results of benchmarks as text and as JSON."""

import datetime
import functools
import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dico_jax.files import library_versions


def about() -> dict[str, Any]:
    """How a result was made: versions and the date."""
    versions = library_versions() | {
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
    }
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": versions, "date_utc": date}


def result_text(result: Mapping[str, Any]) -> str:
    """A result as lines of text: a column per model, then what holds for all."""
    settings, devices = result["settings"], result["devices"]
    head = (
        f"{result['action']}, {settings['image_size']}x{settings['image_size']} pixels, batch "
        f"{settings['batch_size']}, {settings['dtype']} (matmul precision "
        f"{settings['matmul_precision']})"
    )
    if result["action"] == "sample":
        head += f", {settings['steps']} steps, guidance scale {settings['cfg_scale']}"
    head += f", on {devices['count']} x {devices['kind']}"
    columns = [_column(model) for model in result["models"]]
    lines = [head, *_aligned(columns)]
    for model in result["models"]:
        if model["no_flops_by_xla_because"]:
            lines.append(f"{model['model']}: no FLOPs by XLA: {model['no_flops_by_xla_because']}")
    lines += [
        f"{row['model']} is {row['times_as_fast']:.2f} times as fast as {row['compared_with']}"
        for row in result["comparison"]
    ]
    ceiling, peak = result["ceiling"], result["maker_peak_bfloat16_flops_per_second_per_device"]
    if ceiling is not None:
        best = ceiling["flops_per_second_per_device"]
        sizes = ", ".join(str(found["size"]) for found in ceiling["sizes"])
        lines.append(
            f"ceiling: {_giga(best)}FLOP/s per device, products of {ceiling['dtype']} matrices of "
            f"{sizes}"
        )
    if peak is not None:
        lines.append(f"maker's peak: {_giga(peak)}FLOP/s per device in bfloat16")
    memory = result["peak_memory_gb_of_a_device"]
    if memory is not None:
        lines.append(f"peak memory of a device, all of the above: {memory:.2f} GB")
    return "\n".join(lines)


def _column(model: Mapping[str, Any]) -> dict[str, str]:
    def optional(value, text):
        return "-" if value is None else text(value)

    percent = functools.partial(optional, text=lambda value: f"{value:.1%}")
    column = {
        "model": model["model"],
        "parameters": f"{model['parameters']:,}",
        "multiply-adds per image": optional(model["multiply_adds_per_image"], _giga),
        "trace, compile": f"{model['trace_seconds']:.1f} s, {model['compile_seconds']:.1f} s",
        "runs": str(len(model["times_seconds"])),
        "median time": _milliseconds(model["median_seconds"]),
        "10% to 90%": f"{_milliseconds(model['p10_seconds'])} to "
        f"{_milliseconds(model['p90_seconds'])}",
        "images per second": f"{model['images_per_second']:.4g}",
        "FLOPs per run": _giga(model["flops_per_run"]),
        "FLOPs per run by XLA": optional(
            model["flops_per_run_by_xla"],
            lambda value: f"{_giga(value)} (x {model['flops_by_xla_over_flops']:.3f})",
        ),
        "bytes accessed by XLA": optional(
            model["bytes_accessed_per_run_by_xla"], lambda value: f"{value / 1e9:.3g} GB"
        ),
        "FLOP/s": _giga(model["flops_per_second"]),
        "MFU of the ceiling": percent(model["mfu_of_ceiling"]),
        "MFU of the maker's peak": percent(model["mfu_of_maker_peak"]),
    }
    memory = model["memory_gb_per_device"]
    for name in ("arguments", "outputs_not_in_place", "temporaries"):
        label = f"{name.replace('_', ' ')} per device"
        column[label] = optional(memory, lambda m, n=name: f"{m[n]:.3f} GB")
    return column


def _giga(number: float) -> str:
    return f"{number / 1e12:.4g} T" if number >= 1e12 else f"{number / 1e9:.4g} G"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def _aligned(columns: Iterable[Mapping[str, str]]) -> Iterator[str]:
    columns = list(columns)
    labels = list(columns[0])
    width = max(map(len, labels))
    widths = [max(map(len, column.values())) for column in columns]
    for label in labels:
        cells = [column[label].rjust(w) for column, w in zip(columns, widths, strict=True)]
        yield f"  {label:<{width}}  {'   '.join(cells)}"
