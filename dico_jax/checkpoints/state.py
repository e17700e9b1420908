"""What a training run carries from step to step: parameters, averages, the optimizer's state.

One average has a constant decay. Those of EDM2 (arXiv 2312.02696, 3.1) weigh at step t each earlier
step s by s ** gamma: their standard deviation is the same fraction of t, their relative width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.errors import UsageError

# The relative width of a plain mean over all steps (gamma = 0), the widest.
MAX_WIDTH = 12**-0.5


class TrainState(flax.struct.PyTreeNode):
    step: jax.Array  # int32 scalar, the number of optimizer steps taken
    params: Any  # the parameter tree, float32
    ema_params: Any  # its average of constant decay: the weights that are sampled and evaluated
    opt_state: Any  # Optax's
    width_emas: dict[str, Any] = flax.struct.field(default_factory=dict)  # by `width_name`


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    return tuple(jax.random.split(jax.random.key(seed)))


def initializer(model, optimizer, input_shape, ema_widths=()) -> Callable[[jax.Array], TrainState]:
    """The function from a key to a fresh state, for inputs (H, W, C), to be run under jit."""

    def init(key):
        params = model.init(key, *model.example_inputs(side=input_shape[0]))["params"]
        step, opt_state = jnp.zeros((), jnp.int32), optimizer.init(params)
        # Copies: two names for one buffer could not both be donated.
        ema, *more = (jax.tree.map(jnp.copy, params) for _ in (0, *ema_widths))
        emas = dict(zip(map(width_name, ema_widths), more, strict=True))
        return TrainState(step, params, ema, opt_state, emas)

    return init


def create_state(init: Callable[[jax.Array], TrainState], seed: int, sharding: Any) -> TrainState:
    """A fresh state, made by the devices straight into `sharding` (one, or a tree of them)."""
    return jax.jit(init, out_shardings=sharding)(run_keys(seed)[0])


def update_ema(ema, params, decay):
    """Ema * decay + params * (1 - decay), leaf by leaf; runs start from the initial parameters."""
    return jax.tree.map(lambda e, p: e * decay + p * (1 - decay), ema, params)


def update_width_emas(emas: Mapping[str, Any], params, step, widths) -> dict[str, Any]:
    """The averages of relative widths after step `step`, counted from 1, that led to `params`."""

    def update(ema, width):
        gain = power_function_gain(step, width)
        # Not ema * decay + params * gain: with rounded factors, whose sum is not quite 1, late
        # averages would shrink or grow.
        return jax.tree.map(lambda e, p: e + (p - e) * gain, ema, params)

    return {width_name(width): update(emas[width_name(width)], width) for width in widths}


def power_function_gain(step, width: float) -> jax.Array:
    """How much of an average the newest parameters are: 1 - (1 - 1 / step) ** (gamma + 1)."""
    # With the relative precision that late steps need, in float32.
    newest = 1 / jnp.asarray(step, float)
    return -jnp.expm1((width_to_gamma(width) + 1) * jnp.log1p(-newest))


def width_to_gamma(width: float) -> float:
    """The exponent of the power function of a relative width in (0, MAX_WIDTH]."""
    # The density (gamma + 1) x ** gamma on [0, 1] has the variance (gamma + 1) / ((gamma + 2) ** 2
    # (gamma + 3)), which is a cubic equation for gamma; one of its roots is not negative.
    inverse = float(width) ** -2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def width_name(width: float) -> str:
    """The key of the average of a relative width: "width_0_05" for 0.05."""
    return f"width_{width}".replace(".", "_")


def parse_widths(widths: Sequence[float], snapshot_every_steps: int = 0) -> tuple[float, ...]:
    """The checked `config.training.ema_widths`; the other is `ema_snapshot_every_steps`."""
    widths, every = tuple(widths), snapshot_every_steps
    are_numbers = all(type(width) in (int, float) and 0 < width < MAX_WIDTH for width in widths)
    if not are_numbers or len(set(widths)) < len(widths):
        fix = f"must be different numbers above 0 and below {MAX_WIDTH:.4f}, such as 0.05, 0.1"
        raise UsageError("training.ema_widths", widths, fix)
    if every < 0 or (every and not widths):
        fix = "must be at least 0, and 0 without config.training.ema_widths"
        raise UsageError("training.ema_snapshot_every_steps", every, fix)
    return widths
