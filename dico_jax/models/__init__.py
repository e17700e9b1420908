"""The networks: the DiCo family and, as its baseline, the DiT family."""

from dico_jax.models.registry import (
    MODELS,
    abstract_params,
    count_parameters,
    create_model,
    model_options,
)

__all__ = ["MODELS", "abstract_params", "count_parameters", "create_model", "model_options"]
