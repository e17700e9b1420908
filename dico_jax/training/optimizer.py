"""The optimizer of a run and its learning rate, from `config.optimizer`."""

from typing import Any

import jax
import optax

from dico_jax.errors import UsageError


def create_optimizer(config, num_steps: int) -> optax.GradientTransformation:
    """The optimizer that `config.optimizer` describes; the published recipe is its default.

    With the defaults it is `optax.adamw` of plain numbers, whose state converted checkpoints have.
    The schedule ends at `num_steps`. UsageError: a warm-up beyond that.
    """
    schedule = learning_rate_schedule(config, num_steps)
    is_fixed = config.schedule == "constant" and not config.warmup_steps
    options: dict[str, Any] = {name: config[name] for name in ("b1", "b2", "weight_decay")}
    options["learning_rate"] = config.learning_rate if is_fixed else schedule
    options["mask"] = is_kernel if config.weight_decay_mask == "kernels" else None
    is_adamw = config.name == "adamw"
    optimizer = optax.adamw(eps=config.eps, **options) if is_adamw else optax.lion(**options)
    clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, optimizer) if config.clip_norm else optimizer


def learning_rate_schedule(config, num_steps: int) -> optax.Schedule:
    """The learning rate by the number of steps taken: `schedule(n)` is that of step n + 1.

    It rises in a line to `learning_rate` at step `warmup_steps`; then it stays, or follows half a
    cosine wave down to its minimum at step `num_steps`. UsageError: see `create_optimizer`.
    """
    rate, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine" and warmup >= num_steps:
        fix = f"must be less than config.training.num_steps={num_steps}, where the cosine ends"
        raise UsageError("optimizer.warmup_steps", warmup, fix)
    then = optax.constant_schedule(rate)
    if config.schedule == "cosine":
        then = optax.cosine_decay_schedule(rate, num_steps - warmup, config.min_learning_rate_ratio)
    if warmup:
        then = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), then], [warmup])
    return lambda taken: then(taken + 1)  # Optax counts from 0: the first step would do nothing


def is_kernel(params: Any) -> Any:
    """A tree of bools: true for kernels of linear layers and convolutions alone."""
    tree_map = jax.tree_util.tree_map_with_path
    return tree_map(lambda path, leaf: path[-1].key == "kernel" and leaf.ndim >= 2, params)
