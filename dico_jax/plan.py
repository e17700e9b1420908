r"""Says before it is paid for whether a run fits a slice, how long it takes, and what it costs.

python -m dico_jax.plan --config=configs/xl256.py --topology=v5e:8x8 [--price=1.2]

Compiles the training step for that slice with libtpu's compiler, where it is installed (pip
install libtpu); no TPU is needed. docs/plan.md explains the figures.
"""

from absl import flags
from ml_collections import config_flags

from dico_jax import cli

cli.read_flagfiles()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, see configs/; --config.a.b=value changes a field.",
)  # fmt: skip
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chip and shape of the slice: v5e:8x8, v6e:4x4, v5p:2x2x4, h100:8.",
    required=True,
)  # fmt: skip
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "How the plan is printed.")
_OUT = flags.DEFINE_string("out", None, "New JSON file of the plan, which main --plan compares.")
_COMPILE = flags.DEFINE_bool("compile", True, "Compile for TPUs; takes minutes.")
_EFFORT = flags.DEFINE_float(
    "effort", -1.0, "Of the compiler: -1 for the fastest, 0 for what main compiles with.",
    lower_bound=-1.0, upper_bound=0.0,
)  # fmt: skip
_PROGRAMS = flags.DEFINE_multi_enum(
    "program", ["sample", "decode", "features"], ["sample", "decode", "features", "none"],
    "Compiled besides the training step: a guided sampler, the decoder, Inception.",
)  # fmt: skip
_SEARCH = flags.DEFINE_bool(
    "search", None, "Try other settings [where the config does not fit]; the best are compiled."
)
_CALIBRATE = flags.DEFINE_string(
    "calibrate", None, "Workdir of a run on the same slice, whose measured speed scales the times."
)
_PRICE = flags.DEFINE_float("price", None, "Of a chip for an hour.", lower_bound=0.0)
flags.adopt_module_key_flags(cli)  # so that --help shows it


def main() -> None:
    """Parses flags, plans, prints and writes."""
    cli.load_config(config := _CONFIG.value)
    import json  # late, as all that needs JAX: --help answers before
    import os
    import sys

    os.environ["JAX_PLATFORMS"] = "cpu"  # chips that are here are left alone
    import jax

    from dico_jax.files import result_path, write_json
    from dico_jax.planning.aot import has_libtpu
    from dico_jax.planning.chips import parse_topology
    from dico_jax.planning.planner import Options, make_plan
    from dico_jax.planning.report import plan_text
    from dico_jax.planning.runs import calibration
    from dico_jax.planning.search import search

    jax.config.update("jax_exec_time_optimization_effort", _EFFORT.value)
    file = None if _OUT.value is None else result_path(_OUT.value, ".json")
    where = parse_topology(_TOPOLOGY.value)
    programs = tuple(name for name in _PROGRAMS.value if name != "none")
    scale = calibration(_CALIBRATE.value, where) if _CALIBRATE.value else None
    options = Options(_COMPILE.value, programs, _PRICE.value, scale)

    def say(text: str) -> None:
        print(f"{text} ...", file=sys.stderr, flush=True)

    plan = make_plan(config, where, options, say)
    if _SEARCH.value or (_SEARCH.value is None and not plan["fits"]):
        compiled = 2 if _COMPILE.value and where.chip.platform == "tpu" and has_libtpu() else 0
        plan["search"] = search(config, where, compiled, say)
    print(json.dumps(plan, indent=1) if _FORMAT.value == "json" else plan_text(plan))
    if file is not None:
        write_json(file, plan)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
