"""What a training run carries from step to step."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax


class TrainState(flax.struct.PyTreeNode):
    """The state of a run after `step` steps.

    Attributes:
      step: int32 scalar, the number of optimizer steps taken.
      params: the parameter tree, float32.
      ema_params: its exponential moving average, the weights that are sampled and evaluated.
      opt_state: Optax's state.
      width_emas: further averages by `width_name`, see `averages`; {} for none.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    width_emas: dict[str, Any] = flax.struct.field(default_factory=dict)


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of initialisation and of the training steps of a run."""
    init, steps = jax.random.split(jax.random.key(seed))
    return init, steps


def width_name(width: float) -> str:
    """The key of the average of a relative width: "width_0_05" for 0.05."""
    return f"width_{width}".replace(".", "_")


def initializer(
    model,
    optimizer: optax.GradientTransformation,
    input_shape: tuple[int, int, int],
    ema_widths: tuple[float, ...] = (),
) -> Callable[[jax.Array], TrainState]:
    """The function from a key to a fresh state, to be run under jit.

    Args:
      model: the network.
      optimizer: see `dico_jax.training.optimizer`.
      input_shape: (H, W, C) of the network's input.
      ema_widths: relative widths of the further averages.
    """

    def init(key):
        params = model.init(key, *model.example_inputs(side=input_shape[0]))["params"]

        def copy():  # two names for one buffer could not both be donated
            return jax.tree.map(jnp.copy, params)

        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema_params=copy(),
            opt_state=optimizer.init(params),
            width_emas={width_name(width): copy() for width in ema_widths},
        )

    return init


def abstract_state(init: Callable[[jax.Array], TrainState]) -> TrainState:
    """The shapes and dtypes of a state, without making it."""
    return jax.eval_shape(init, jax.random.key(0))


def create_state(init: Callable[[jax.Array], TrainState], seed: int, sharding: Any) -> TrainState:
    """A fresh state, made by the devices straight into `sharding`: no whole copy anywhere.

    Args:
      init: see `initializer`.
      seed: decides the initial parameters.
      sharding: one, or a tree of them, see `dico_jax.parallel.sharding`.
    """
    return jax.jit(init, out_shardings=sharding)(run_keys(seed)[0])
