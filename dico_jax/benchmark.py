r"""Measures how fast the networks are, and what they need.

python -m dico_jax.benchmark forward|train|sample --model=DiCo-S [--compare=DiT-S/2 ...]
    A forward pass, a training step or the sampler, with random weights, on all devices.
python -m dico_jax.benchmark table [--image_size=256]
    Parameters and multiply-adds of all published models, beside the papers' figures.

With --out the result is written as JSON; docs/benchmark.md explains the numbers.
"""

import dataclasses
import re
import sys
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.benchmarking import Options
from dico_jax.errors import UsageError

_KINDS = {bool: "bool", int: "integer", float: "float", str: "string", tuple: "list"}


def _define(field: dataclasses.Field[Any]) -> flags.FlagHolder:
    default: Any = field.default
    if values := field.metadata.get("values"):
        return flags.DEFINE_enum(field.name, default, values, field.metadata["help"])
    define = getattr(flags, f"DEFINE_{_KINDS[type(default)]}")
    return define(field.name, default, field.metadata["help"])


_OPTIONS = {field.name: _define(field) for field in dataclasses.fields(Options)[1:]}
_OUT = flags.DEFINE_string("out", None, "New JSON file for the result and how it was made.")
_USE_ALL_CORES = cli.define_cpu_tuning()
flags.adopt_module_key_flags(cli)  # so that --help shows it

_MEASURED = " ".join(_OPTIONS.keys() - {"remat", "steps", "cfg_scale"} | {"out"})
_ACTIONS = {
    "forward": ("", _MEASURED),
    "train": ("", f"{_MEASURED} remat"),
    "sample": ("", f"{_MEASURED} steps cfg_scale"),
    "table": ("", "image_size out"),
}


def main(action: str) -> None:
    """Parses flags, measures, prints and writes."""
    from dico_jax.files import result_path, write_json

    options: dict[str, Any] = {name: flag.value for name, flag in _OPTIONS.items()}
    sizes = options["ceiling_sizes"]
    if not all(re.fullmatch(r"[1-9]\d*", size) for size in sizes):
        text = ",".join(sizes)
        raise UsageError(f"--ceiling_sizes={text}: give numbers from 1 on, such as 2048,4096")
    options |= {"compare": tuple(options["compare"]), "ceiling_sizes": tuple(map(int, sizes))}
    file = None if _OUT.value is None else result_path(_OUT.value, ".json")
    result = _table() if action == "table" else _measure(Options(action, **options))
    if file is not None:
        write_json(file, result | {"argv": ["dico_jax.benchmark", action, *sys.argv[1:]]})


def _measure(options: Options) -> dict[str, Any]:
    import jax  # late, as all that needs it: --help answers before

    from dico_jax.parallel.mesh import mesh_fits

    _USE_ALL_CORES(lambda count: mesh_fits(count, options.batch_size))
    from dico_jax.benchmarking.report import result_text
    from dico_jax.benchmarking.runner import run_benchmark

    jax.config.update("jax_enable_compilation_cache", False)  # what is measured is compilation
    result = run_benchmark(options, report=lambda text: print(f"{text} ...", flush=True))
    print(result_text(result))
    return result


def _table() -> dict[str, Any]:
    from dico_jax.benchmarking import report

    image_size = _OPTIONS["image_size"].value
    rows, told = report.model_table(image_size), report.text_table(image_size)
    print(report.table_text(rows))
    print("published:", "; ".join(report.SOURCES.values()))
    print(report.text_table_text(told))
    settings = {"image_size": image_size}
    found = {"models": rows, "text_models": told}
    return {"action": "table", "settings": settings, **found, **report.about()}


if __name__ == "__main__":
    cli.run(main, _ACTIONS)
