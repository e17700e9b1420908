"""Objectives by name."""

from collections.abc import Mapping
from typing import Any

from dico_jax.config import DEFAULTS
from dico_jax.diffusion.flow import Flow
from dico_jax.diffusion.mean_flow import MeanFlow
from dico_jax.diffusion.objectives import Diffusion, Objective
from dico_jax.errors import UsageError

OBJECTIVES: dict[str, type[Objective]] = {
    "noise": Diffusion,
    "x0": Diffusion,
    "velocity": Diffusion,
    "flow": Flow,
    "mean_flow": MeanFlow,
}


def create_objective(
    options: Mapping[str, Any],
    *,
    learn_sigma: bool,
    num_steps: int | None = None,
    spacing: str = "linear",
) -> Objective:
    """The objective that `config.diffusion` names, see `Objective.from_options`.

    Raises:
      UsageError: a name that is unknown, or a field of another objective that is set.
    """
    name = options["objective"]
    if name not in OBJECTIVES:
        raise UsageError("objective", name, f"is unknown: use one of {', '.join(OBJECTIVES)}")
    for field, preset in DEFAULTS["diffusion"].items():
        unused = field not in ("objective", *OBJECTIVES[name].fields)
        if unused and options.get(field, preset) != preset:
            fix = f"has no effect with objective={name!r}: set it to {preset!r}"
            raise UsageError(field, options[field], fix)
    how: dict[str, Any] = {"num_steps": num_steps, "spacing": spacing}
    return OBJECTIVES[name].from_options(options, learn_sigma=learn_sigma, **how)
