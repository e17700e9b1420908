"""What a training run carries from step to step."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from dico_jax.errors import UsageError


class TrainState(flax.struct.PyTreeNode):
    """The state of a run after `step` steps.

    Attributes:
      step: int32 scalar, the number of optimizer steps taken.
      params: the parameter tree, float32.
      ema_params: its exponential moving average, the weights that are sampled and evaluated.
      opt_state: Optax's state.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of initialisation and of the training steps of a run."""
    init, steps = jax.random.split(jax.random.key(seed))
    return init, steps


def create_optimizer(config) -> optax.GradientTransformation:
    """AdamW as in `config.optimizer`; the published recipe is its default.

    Raises:
      UsageError: a value out of range.
    """
    for field, low in (("learning_rate", 0.0), ("eps", 0.0), ("weight_decay", 0.0)):
        if not config[field] >= low:
            raise UsageError(f"optimizer.{field}={config[field]} must be at least {low}")
    for field in ("b1", "b2"):
        if not 0 <= config[field] < 1:
            raise UsageError(f"optimizer.{field}={config[field]} must be in [0, 1)")
    return optax.adamw(
        config.learning_rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def create_state(
    model, optimizer: optax.GradientTransformation, input_shape, seed: int, sharding: NamedSharding
) -> TrainState:
    """A fresh state, initialised under jit straight into `sharding`.

    Args:
      model: the network.
      optimizer: see `create_optimizer`.
      input_shape: (H, W, C) of the network's input.
      seed: decides the initial parameters.
      sharding: where every leaf lies.
    """

    def init(key):
        x, t = jnp.zeros((1, *input_shape)), jnp.zeros((1,), jnp.int32)
        params = model.init(key, x, t, t)["params"]
        # The EMA starts as a copy: two names for one buffer could not both be donated.
        ema_params = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))

    return jax.jit(init, out_shardings=sharding)(run_keys(seed)[0])
