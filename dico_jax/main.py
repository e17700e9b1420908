"""Trains a model: python -m dico_jax.main --config=configs/digits.py --workdir=DIR"""

from absl import flags
from ml_collections import config_flags

from dico_jax import cli

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, see configs/; --config.a.b=value changes a field.",
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run that is in it already goes on.", required=True
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None,
    "Several processes as one run: HOST:PORT of process 0. On Cloud TPU, GKE with TPUs, Slurm and "
    "Open MPI the processes find each other; elsewhere give this and the next two to all of them.",
)  # fmt: skip
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_DISTRIBUTED_TIMEOUT = flags.DEFINE_integer(
    "distributed_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
)


def main() -> None:
    """Parses flags and trains."""
    config = cli.load_config(_CONFIG)
    # Late imports: --help answers before JAX is imported.
    from dico_jax import distributed

    distributed.initialize(
        _COORDINATOR_ADDRESS.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        _DISTRIBUTED_TIMEOUT.value,
    )
    from dico_jax.training.loop import train

    train(config, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
