r"""Measures how fast the networks are, and what they need.

python -m dico_jax.benchmark forward|train|sample --model=DiCo-S [--compare=DiT-S/2 ...]
    A forward pass, a training step or the sampler, with random weights, on all devices: times,
    images per second, FLOPs, utilisation, memory, seconds of compilation.

python -m dico_jax.benchmark table [--image_size=256]
    Parameters and multiply-adds of all published models, beside the papers' figures.

With --out the result is written as JSON, with the times of all runs and how it was made.
docs/benchmark.md explains the numbers.
"""

import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError

flags.DEFINE_string("model", "DiCo-S", "Name of the model, such as DiCo-XL or DiT-XL/2.")
flags.DEFINE_list(
    "compare", [], "Further models with commas between, measured in turn with the first."
)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images in pixels.")
flags.DEFINE_integer("batch_size", 8, "Images per run, over all devices.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations.")
flags.DEFINE_integer("num_classes", 1000, "Classes of the model.", lower_bound=1)
flags.DEFINE_bool("scan_blocks", False, "Run equal blocks as one loop.")
flags.DEFINE_string("remat", "none", "train: what is computed again: none, blocks, dots.")
flags.DEFINE_integer("steps", 250, "sample: sampling steps.", lower_bound=1)
flags.DEFINE_float("cfg_scale", 1.4, "sample: guidance scale, 1 for none.")
flags.DEFINE_integer("warmup", 2, "Runs that do not count.", lower_bound=0)
flags.DEFINE_integer("repeats", 10, "Runs that count, at least.", lower_bound=1)
flags.DEFINE_float("seconds", 5.0, "Runs go on for so long.", lower_bound=0)
flags.DEFINE_integer("devices", None, "Use the first so many devices [all].")
flags.DEFINE_enum(
    "matmul_precision", "default", ["default", "high", "highest"],
    "Of float32 products; default is TF32 on recent NVIDIA GPUs and bfloat16 on TPUs.",
)  # fmt: skip
_CEILING = flags.DEFINE_bool("ceiling", True, "Measure matrix products, for the utilisation.")
_CEILING_SIZES = flags.DEFINE_list(
    "ceiling_sizes", None, "Sides of their matrices, with commas between [by the platform]."
)
_OUT = flags.DEFINE_string("out", None, "New JSON file for the result and how it was made.")
_CPU_TUNING = cli.define_cpu_tuning()
flags.adopt_module_key_flags(cli)  # so that --help shows it

_MEASURED = (
    "model compare batch_size dtype num_classes scan_blocks warmup repeats seconds devices "
    "matmul_precision ceiling ceiling_sizes image_size out"
)
# Per action, the flags that it needs, and those that it may have.
_ACTIONS = {
    "forward": ("", _MEASURED),
    "train": ("", f"{_MEASURED} remat"),
    "sample": ("", f"{_MEASURED} steps cfg_scale"),
    "table": ("", "image_size out"),
}


def main(action: str | None) -> None:
    """Parses flags, measures, prints and writes."""
    cli.check_action("benchmark", action, _ACTIONS)
    assert action is not None
    cli.check_flags(action, _ACTIONS)
    sizes = _ceiling_sizes()
    file = _out()
    if action == "table":
        _table(file)
    else:
        _measure(action, sizes, file)


# Late imports: --help answers before JAX is imported.


def _measure(action: str, sizes: tuple[int, ...] | None, file: pathlib.Path | None) -> None:
    import jax

    from dico_jax.ops.cpu import use_all_cores
    from dico_jax.parallel.mesh import mesh_fits

    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in flags.FLAGS}
    if _CPU_TUNING.value:
        use_all_cores(keep_memory=True, fits=lambda count: mesh_fits(count, values["batch_size"]))
    from dico_jax.benchmarking.report import result_text
    from dico_jax.benchmarking.runner import Options, run_benchmark

    jax.config.update("jax_enable_compilation_cache", False)  # what is measured is compilation
    values |= {"action": action, "num_devices": values["devices"], "ceiling_sizes": sizes}
    values["compare"] = tuple(values["compare"])
    options = Options(**{field.name: values[field.name] for field in dataclasses.fields(Options)})
    result = run_benchmark(options, report=lambda text: print(f"{text} ...", flush=True))
    print(result_text(result))
    if file is not None:
        _write(file, result, action)


def _table(file: pathlib.Path | None) -> None:
    from dico_jax.benchmarking.model_table import SOURCES, model_table, table_text

    rows = model_table(_IMAGE_SIZE.value)
    print(table_text(rows))
    print("published:", "; ".join(SOURCES.values()))
    if file is not None:
        from dico_jax.benchmarking.report import about

        result = {"action": "table", "settings": {"image_size": _IMAGE_SIZE.value}, "models": rows}
        _write(file, result | about(), "table")


def _write(file: pathlib.Path, result: dict, action: str) -> None:
    from dico_jax.files import write_json

    # `cli.take_action` has taken the action out.
    write_json(file, result | {"argv": ["dico_jax.benchmark", action, *sys.argv[1:]]})


def _out() -> pathlib.Path | None:
    from dico_jax.files import result_path

    return None if _OUT.value is None else result_path(_OUT.value, ".json")


def _ceiling_sizes() -> tuple[int, ...] | None:
    if not _CEILING.value:
        if _CEILING_SIZES.value:
            raise UsageError("--ceiling_sizes has no effect with --noceiling: leave one out")
        return ()
    if not _CEILING_SIZES.value:
        return None
    try:
        sizes = tuple(map(int, _CEILING_SIZES.value))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        text = ",".join(_CEILING_SIZES.value)
        raise UsageError(f"--ceiling_sizes={text}: give numbers from 1 on, such as 2048,4096")
    return sizes


if __name__ == "__main__":
    _action = cli.take_action(sys.argv, _ACTIONS)
    cli.run(lambda: main(_action))
