"""Results of benchmarks as text, and the table of all published networks."""

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dico_jax.errors import UsageError
from dico_jax.files import library_versions
from dico_jax.models import MODELS, count_parameters, create_model, forward_macs
from dico_jax.models.denoiser import Denoiser
from dico_jax.models.text_dico import FUSIONS, TextDiCo

_DOWNSAMPLING = 8  # of Stable Diffusion's autoencoder, whose latents the published networks see
SOURCES = {
    "DiCo": "DiCo, arXiv 2505.11196, and the README of its release",
    "DiT": "DiT, arXiv 2212.09748, table 1 (patches of 4), and the README of its release (XL/2)",
    "FCDM": "FCDM, arXiv 2603.09408",
}
# What papers say: parameters, and by the side of the images multiply-adds, which they call FLOPs.
PUBLISHED: dict[str, tuple[str | None, dict[int, str]]] = {
    "DiCo-S": ("33.1M", {256: "4.25G"}),
    "DiCo-B": ("130.0M", {256: "16.88G"}),
    "DiCo-L": ("463.9M", {256: "60.24G"}),
    "DiCo-XL": ("701.2M", {256: "87.30G"}),
    "DiCo-H": ("1B", {}),
    "DiT-S/4": (None, {256: "1.4G"}),
    "DiT-B/4": (None, {256: "5.6G"}),
    "DiT-L/4": (None, {256: "19.7G"}),
    "DiT-XL/4": (None, {256: "29.1G"}),
    "DiT-XL/2": (None, {256: "119G", 512: "525G"}),
    "FCDM-XL": (None, {256: "64.6G"}),
}


def about() -> dict[str, Any]:
    more = {"jaxlib": importlib.metadata.version("jaxlib"), "python": platform.python_version()}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": library_versions() | more, "date_utc": date}


def result_text(result: Mapping[str, Any]) -> str:
    """A result as lines of text: a column per model, then what holds for all."""
    settings, devices, models = result["settings"], result["devices"], result["models"]
    head = "{action}, {image_size}x{image_size} pixels, batch {batch_size}, {dtype} (matmul "
    head += "precision {matmul_precision})"
    head += ", {steps} steps, guidance scale {cfg_scale}" * ("steps" in settings)
    columns = [_column(model) for model in models]
    table = _padded([*zip(columns[0], *(column.values() for column in columns), strict=True)])
    lines = [(head + ", on {count} x {kind}").format(**result | settings | devices)]
    lines += [f"  {label}  {'   '.join(cells)}" for label, *cells in table]
    for model in models:
        if why := model["no_flops_by_xla_because"]:
            lines.append(f"{model['model']}: no FLOPs by XLA: {why}")
    ratio = "{model} is {times_as_fast:.2f} times as fast as {compared_with}"
    lines += [ratio.format(**row) for row in result["comparison"]]
    if ceiling := result["ceiling"]:
        best = f"ceiling: {_giga(ceiling['flops_per_second_per_device'])}FLOP/s per device"
        sizes = ", ".join(str(found["size"]) for found in ceiling["sizes"])
        lines.append(f"{best}, products of {ceiling['dtype']} matrices of {sizes}")
    if peak := result["maker_peak_bfloat16_flops_per_second_per_device"]:
        lines.append(f"maker's peak: {_giga(peak)}FLOP/s per device in bfloat16")
    if memory := result["peak_memory_gb_of_a_device"]:
        lines.append(f"peak memory of a device, all of the above: {memory:.2f} GB")
    return "\n".join(lines)


def _column(model: Mapping[str, Any]) -> dict[str, str]:
    names = ("median", "p10", "p90")
    median, p10, p90 = (f"{1e3 * model[f'{name}_seconds']:.4g} ms" for name in names)
    ratio = _optional(" (x {:.3f})", model["flops_by_xla_over_flops"], "")
    read = model["bytes_accessed_per_run_by_xla"]
    column = {
        "model": model["model"],
        "parameters": f"{model['parameters']:,}",
        "multiply-adds per image": _giga(model["multiply_adds_per_image"]),
        "trace, compile": f"{model['trace_seconds']:.1f} s, {model['compile_seconds']:.1f} s",
        "runs": str(len(model["times_seconds"])),
        "median time": median,
        "10% to 90%": f"{p10} to {p90}",
        "images per second": f"{model['images_per_second']:.4g}",
        "FLOPs per run": _giga(model["flops_per_run"]),
        "FLOPs per run by XLA": _giga(model["flops_per_run_by_xla"]) + ratio,
        "bytes accessed by XLA": _optional("{:.3g} GB", read and read / 1e9),
        "FLOP/s": _giga(model["flops_per_second"]),
        "MFU of the ceiling": _optional("{:.1%}", model["mfu_of_ceiling"]),
        "MFU of the maker's peak": _optional("{:.1%}", model["mfu_of_maker_peak"]),
    }
    memory = model["memory_gb_per_device"] or {}
    for name in ("arguments", "outputs_not_in_place", "temporaries"):
        column[f"{name.replace('_', ' ')} per device"] = _optional("{:.3f} GB", memory.get(name))
    return column


def _optional(text: str, value: float | None, without: str = "-") -> str:
    return without if value is None else text.format(value)


def _giga(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number / 1e12:.4g} T" if number >= 1e12 else f"{number / 1e9:.4g} G"


def _padded(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]


def model_table(image_size: int) -> list[dict[str, Any]]:
    """A row per published network, from sizes alone, as docs/benchmark.md describes them."""
    published = {n: c for n, (c, sizes) in MODELS.items() if sizes and c is not TextDiCo}
    models = {name: create_model(name) for name in published}
    side = _latent_side(image_size, models.values())
    return [
        {
            "model": name,
            "parameters": count_parameters(model),
            "multiply_adds_per_image": forward_macs(model, (side, side, model.in_channels)),
            "published_parameters": PUBLISHED.get(name, (None, {}))[0],
            "published_multiply_adds_per_image": PUBLISHED.get(name, (None, {}))[1].get(image_size),
            "source": SOURCES[type(model).__name__] if name in PUBLISHED else None,
        }
        for name, model in models.items()
    ]


def text_table(image_size: int) -> list[dict[str, Any]]:
    """A row per network that is told a text and fusion, beside the class-conditional network."""
    rows = []
    for name in (name for name, (cls, sizes) in MODELS.items() if sizes and cls is TextDiCo):
        alone = create_model(name.removeprefix("Text"))
        side = _latent_side(image_size, [alone])
        for fusion in FUSIONS:
            model = create_model(name, text_fusion=fusion)
            once, every_step = model.fusion_macs(side**2)
            rows.append(
                {
                    "model": name,
                    "text_fusion": fusion,
                    "parameters": count_parameters(model),
                    "parameters_of_fusion": count_parameters(model, ("text_fusion", "text")),
                    "parameters_without_text": count_parameters(alone),
                    "multiply_adds_without_text": forward_macs(alone, (side, side, 4)),
                    "multiply_adds_of_fusion_per_step": every_step,
                    "multiply_adds_of_fusion_per_prompt": once,
                }
            )
    return rows


def _latent_side(image_size: int, models: Iterable[Denoiser]) -> int:
    step = _DOWNSAMPLING * max(model.size_divisor for model in models)
    if image_size < step or image_size % step:
        below = image_size // step * step
        choices = " or ".join(str(size) for size in (below, below + step) if size > 0)
        raise UsageError(f"--image_size={image_size} must be a multiple of {step}: use {choices}")
    return image_size // _DOWNSAMPLING


def text_table_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `text_table` as a table of Markdown, columns under each other."""
    cells = [("model", "fusion", "parameters", "of fusion", "multiply-adds", "fusion, a step",
              "a prompt")]  # fmt: skip
    for row in rows:
        which = "without_text", "of_fusion_per_step", "of_fusion_per_prompt"
        macs = (f"{row[f'multiply_adds_{of}'] / 1e9:.2f}G" for of in which)
        counts = (f"{row[of]:,}" for of in ("parameters", "parameters_of_fusion"))
        cells.append((row["model"], row["text_fusion"], *counts, *macs))
    return markdown(cells)


def table_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `model_table` as a table of Markdown, columns under each other."""
    cells = [("model", "parameters", "published", "multiply-adds", "published")]
    for row in rows:
        published = row["published_parameters"], row["published_multiply_adds_per_image"]
        parameters, macs = (text or "" for text in published)
        counted = f"{row['parameters']:,}", f"{row['multiply_adds_per_image'] / 1e9:.2f}G"
        cells.append((row["model"], counted[0], parameters, counted[1], macs))
    return markdown(cells)


def markdown(cells: Sequence[Sequence[str]]) -> str:
    head, *lines = _padded(cells)
    rule = ["-" * len(head[0]), *("-" * (len(cell) - 1) + ":" for cell in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))
