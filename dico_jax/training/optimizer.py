"""The optimizer of a run and its learning rate, from `config.optimizer`."""

import math
from typing import Any

import jax
import optax

from dico_jax.errors import UsageError

_CHOICES = {
    "name": ("adamw", "lion"),
    "schedule": ("constant", "cosine"),
    "weight_decay_mask": ("all", "kernels"),
}


def create_optimizer(config, num_steps: int) -> optax.GradientTransformation:
    """The optimizer that `config.optimizer` describes; the published recipe is its default.

    With the defaults it is `optax.adamw` of plain numbers, whose state converted checkpoints have.
    The schedule ends at `num_steps`. UsageError: a value out of range, or an unknown name.
    """
    schedule = learning_rate_schedule(config, num_steps)
    is_fixed = config.schedule == "constant" and not config.warmup_steps
    options: dict[str, Any] = {
        "learning_rate": config.learning_rate if is_fixed else schedule,
        "b1": config.b1,
        "b2": config.b2,
        "weight_decay": config.weight_decay,
        "mask": is_kernel if config.weight_decay_mask == "kernels" else None,
    }
    is_adamw = config.name == "adamw"
    optimizer = optax.adamw(eps=config.eps, **options) if is_adamw else optax.lion(**options)
    clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, optimizer) if config.clip_norm else optimizer


def learning_rate_schedule(config, num_steps: int) -> optax.Schedule:
    """The learning rate by the number of steps taken: `schedule(n)` is that of step n + 1.

    It rises in a line to `learning_rate` at step `warmup_steps`; then it stays, or follows half a
    cosine wave down to its minimum at step `num_steps`. UsageError: see `create_optimizer`.
    """
    _check(config, num_steps)
    rate, warmup = config.learning_rate, config.warmup_steps
    then = optax.constant_schedule(rate)
    if config.schedule == "cosine":
        then = optax.cosine_decay_schedule(rate, num_steps - warmup, config.min_learning_rate_ratio)
    if warmup:
        then = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), then], [warmup])
    return lambda taken: then(taken + 1)  # Optax counts from 0: the first step would do nothing


def is_kernel(params: Any) -> Any:
    """A tree of bools: true for kernels of linear layers and convolutions alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: path[-1].key == "kernel" and leaf.ndim >= 2, params
    )


def _check(config, num_steps: int) -> None:
    def check(field: str, right: bool, fix: str) -> None:
        if not right:
            raise UsageError(f"optimizer.{field}", config[field], fix)

    for field, choices in _CHOICES.items():
        check(field, config[field] in choices, f": use {' or '.join(map(repr, choices))}")
    for field in ("learning_rate", "eps", "weight_decay", "warmup_steps", "clip_norm"):
        check(field, 0 <= config[field] < math.inf, "must be finite and at least 0")
    for field in ("b1", "b2"):
        check(field, 0 <= config[field] < 1, "must be in [0, 1)")
    check("min_learning_rate_ratio", 0 <= config.min_learning_rate_ratio <= 1, "must be in [0, 1]")
    ends = f"must be less than config.training.num_steps={num_steps}, where the cosine ends"
    check("warmup_steps", config.schedule != "cosine" or config.warmup_steps < num_steps, ends)
