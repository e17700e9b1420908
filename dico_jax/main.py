"""Trains a model: python -m dico_jax.main --config=configs/digits.py --workdir=DIR"""

from absl import flags
from ml_collections import config_flags

from dico_jax import cli
from dico_jax.configs.default import CAREFUL_FIELDS

cli.read_flagfiles()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, see configs/; --config.a.b=value changes a field.",
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run that is in it already goes on.", required=True
)
_ALLOW = flags.DEFINE_multi_enum(
    "allow_config_change", [], CAREFUL_FIELDS, "Field that may change from this checkpoint on."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Check everything, say what the run would do and how fast, and write nothing."
)
_PLAN = flags.DEFINE_string(
    "plan", None, "File of dico_jax.plan --out: say where this run is not as it was planned."
)
_USE_ALL_CORES = cli.define_cpu_tuning()
_JOIN = cli.define_distributed_flags()
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Parses flags and trains."""
    cli.load_config(config := _CONFIG.value)
    # Late imports: --help answers before JAX is imported.
    from dico_jax.reporting import page_at_end
    from dico_jax.training.loop import train
    from dico_jax.training.speed import run_fits

    _JOIN()
    _USE_ALL_CORES(run_fits(config))
    if _PLAN.value:
        from dico_jax.planning.runs import compare

        compare(_PLAN.value, config)
    if _DRY_RUN.value:
        from dico_jax.planning.runs import dry_run

        return dry_run(config, _WORKDIR.value, _ALLOW.value)
    train(config, _WORKDIR.value, _ALLOW.value, page_at_end)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
