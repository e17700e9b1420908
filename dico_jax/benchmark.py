r"""Measures how fast the networks are, and what they need.

python -m dico_jax.benchmark forward|train|sample --model=DiCo-S [--compare=DiT-S/2 ...]
    A forward pass, a training step or the sampler, with random weights, on all devices: times,
    images per second, FLOPs, utilisation, memory, seconds of compilation.

python -m dico_jax.benchmark table [--image_size=256]
    Parameters and multiply-adds of all published models, beside the papers' figures.

With --out the result is written as JSON, with the times of all runs and how it was made.
docs/benchmark.md explains the numbers.
"""

import os
import pathlib
import sys

from absl import flags

from dico_jax import cli
from dico_jax.errors import UsageError
from dico_jax.files import result_path, write_json

_MODEL = flags.DEFINE_string("model", "DiCo-S", "Name of the model, such as DiCo-XL or DiT-XL/2.")
_COMPARE = flags.DEFINE_list(
    "compare", [], "Further models with commas between, measured in turn with the first."
)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images in pixels.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images per run, over all devices.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Classes of the model.", lower_bound=1)
_SCAN_BLOCKS = flags.DEFINE_bool("scan_blocks", False, "Run equal blocks as one loop.")
_REMAT = flags.DEFINE_string("remat", "none", "train: what is computed again: none, blocks, dots.")
_STEPS = flags.DEFINE_integer("steps", 250, "sample: sampling steps.", lower_bound=1)
_CFG_SCALE = flags.DEFINE_float("cfg_scale", 1.4, "sample: guidance scale, 1 for none.")
_WARMUP = flags.DEFINE_integer("warmup", 2, "Runs that do not count.", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 10, "Runs that count, at least.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Runs go on for so long.", lower_bound=0)
_DEVICES = flags.DEFINE_integer("devices", None, "Use the first so many devices [all].")
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0,
    "Where there is no accelerator: devices that the cores are made into; 0 for one per core, at "
    "most 8.",
    lower_bound=0,
)  # fmt: skip
_PRECISION = flags.DEFINE_enum(
    "matmul_precision", "default", ["default", "high", "highest"],
    "Of float32 products; default is TF32 on recent NVIDIA GPUs and bfloat16 on TPUs.",
)  # fmt: skip
_CEILING = flags.DEFINE_bool("ceiling", True, "Measure matrix products, for the utilisation.")
_CEILING_SIZES = flags.DEFINE_list(
    "ceiling_sizes", None, "Sides of their matrices, with commas between [by the platform]."
)
_OUT = flags.DEFINE_string("out", None, "New JSON file for the result and how it was made.")

_MEASURED = (
    "model compare batch_size dtype num_classes scan_blocks warmup repeats seconds devices "
    "cpu_devices matmul_precision ceiling ceiling_sizes image_size out"
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
    if action != "table":
        _make_cpu_devices()
    file = _out()
    if action == "table":
        _table(file)
    else:
        _measure(action, sizes, file)


# Late imports: --help answers before JAX is imported.


def _measure(action: str, sizes: tuple[int, ...] | None, file: pathlib.Path | None) -> None:
    import jax

    from dico_jax.benchmarking.report import result_text
    from dico_jax.benchmarking.runner import Options, run_benchmark

    if flags.FLAGS["cpu_devices"].present and jax.default_backend() != "cpu":
        raise UsageError(
            f"--cpu_devices={_CPU_DEVICES.value} has no effect beside accelerators: use --devices"
        )
    jax.config.update("jax_enable_compilation_cache", False)  # what is measured is compilation
    options = Options(
        action=action,
        model=_MODEL.value,
        compare=tuple(_COMPARE.value),
        image_size=_IMAGE_SIZE.value,
        batch_size=_BATCH_SIZE.value,
        dtype=_DTYPE.value,
        scan_blocks=_SCAN_BLOCKS.value,
        remat=_REMAT.value,
        num_classes=_NUM_CLASSES.value,
        steps=_STEPS.value,
        cfg_scale=_CFG_SCALE.value,
        warmup=_WARMUP.value,
        repeats=_REPEATS.value,
        seconds=_SECONDS.value,
        num_devices=_DEVICES.value,
        ceiling_sizes=sizes,
        matmul_precision=_PRECISION.value,
    )
    result = run_benchmark(options, report=lambda text: print(f"{text} ...", flush=True))
    print(result_text(result))
    if file is not None:
        write_json(file, result | {"argv": _argv(action)})


def _table(file: pathlib.Path | None) -> None:
    from dico_jax.benchmarking.model_table import SOURCES, model_table, table_text

    rows = model_table(_IMAGE_SIZE.value)
    print(table_text(rows))
    print("published:", "; ".join(SOURCES.values()))
    if file is not None:
        from dico_jax.benchmarking.report import about

        settings = {"image_size": _IMAGE_SIZE.value}
        result = {"action": "table", "settings": settings, "models": rows, **about()}
        write_json(file, result | {"argv": _argv("table")})


def _argv(action: str) -> list[str]:
    """The command as it was given, see `cli.take_action`."""
    return ["dico_jax.benchmark", action, *sys.argv[1:]]


def _out() -> pathlib.Path | None:
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


def _make_cpu_devices() -> None:
    """Before JAX is used; a number of devices that XLA_FLAGS names stays."""
    if not _CPU_DEVICES.value:
        from dico_jax.ops.cpu import use_all_cores

        use_all_cores(keep_memory=True)
        return
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        raise UsageError(
            f"--cpu_devices={_CPU_DEVICES.value}: XLA_FLAGS names a number of devices; leave one "
            "out"
        )
    import jax

    jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)


if __name__ == "__main__":
    _action = cli.take_action(sys.argv, _ACTIONS)
    cli.run(lambda: main(_action))
