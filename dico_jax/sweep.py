r"""Trains variants of an experiment with several seeds, and compares them.

python -m dico_jax.sweep --config=configs/ablation_digits.py --workdir=DIR [--config.a.b=value ...]

The config file has get_config() and get_sweep(), which names variants by the fields that they
change, and seeds; docs/ablations.md shows one. Every run is one of dico_jax.main in
DIR/VARIANT/SEED. The same command goes on where it was. In the end DIR has sweep.json, sweep.md and
figures.
"""

from absl import flags
from ml_collections import config_flags

from dico_jax import cli
from dico_jax.errors import TrainingStopped

cli.read_flagfiles()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file with get_sweep(); --config.a.b=value changes a field of all runs."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all runs and the table.", required=True)
_VARIANTS = flags.DEFINE_list("variants", None, "Only these variants, for now.")
flags.adopt_module_key_flags(cli)  # so that --help shows them


def main() -> None:
    """Trains what is missing, then writes the table."""
    cli.load_config(config := _CONFIG.value)
    from dico_jax.analysis import sweep  # late: --help answers before JAX is imported

    path = config_flags.get_config_filename(flags.FLAGS["config"])
    plan = sweep.make_plan(path, config, _VARIANTS.value)
    failed = sweep.run(plan, _WORKDIR.value)
    print(sweep.report(plan, _WORKDIR.value))
    if failed:
        said = f"{len(failed)} runs failed; the same command tries them again"
        raise TrainingStopped(f"{said}. The first: {failed[0]}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
