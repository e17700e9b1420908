"""The checks of the fields that say how a run is watched, before anything is built."""

from ml_collections import ConfigDict

from dico_jax.config import config_errors
from dico_jax.training.logging import require_wandb
from dico_jax.training.nan_policy import check_on_nan
from dico_jax.training.profiling import check_profile
from dico_jax.training.stall import check_stall_seconds


def check_watch(config: ConfigDict) -> None:
    """Raises UsageError for a field that cannot work, naming it, its value and the fix."""
    with config_errors():
        check_on_nan(config.training.on_nan)
        check_stall_seconds(config.training.stall_warning_seconds)
        check_profile(config.profile)
        require_wandb(config.logging.wandb_project)
