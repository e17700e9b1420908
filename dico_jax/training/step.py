"""One training step, a pure function of (state, batch, attempt)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dico_jax.checkpoints.averages import update_ema, update_width_emas
from dico_jax.checkpoints.state import TrainState, run_keys
from dico_jax.diffusion import Objective
from dico_jax.models.block_stacks import whole_where_used
from dico_jax.parallel.mesh import batch_sharding, replicated
from dico_jax.training.nan_policy import attempt_key, is_finite, keep_if
from dico_jax.training.step_metrics import quarter_losses

StepFn = Callable[..., tuple[TrainState, dict]]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step is taken; see configs/default.py.

    Attributes:
      seed: decides, with the step, every draw.
      ema_decay: of the averaged weights.
      ema_widths: relative widths of the power-function averages.
      accumulation_steps: parts of a batch whose gradients are computed one after the other.
      skip_bad_steps: leave out the update of a step whose loss or gradients are not finite.
    """

    seed: int = 0
    ema_decay: float = 0.9999
    ema_widths: tuple[float, ...] = ()
    accumulation_steps: int = 1
    skip_bad_steps: bool = False


def loss_fn(params, model, diffusion: Objective, batch: dict, t, noise, sharding: Any = None):
    """The mean training loss of a batch and its terms.

    Args:
      params: the parameters.
      model, diffusion: the network and its objective.
      batch: {"x": (N, H, W, C) clean latents, "condition": a tree of arrays (N, ...)}.
      t: (N,) times.
      noise: like x.
      sharding: of the parameters, where devices share them.

    Returns:
      (scalar loss, the objective's terms: {"loss", ...}, (N,) for every example).
    """
    if sharding is not None:
        params = whole_where_used(params, model, sharding)

    def model_fn(x, timesteps):
        return model.apply({"params": params}, x, timesteps, batch["condition"])

    terms = diffusion.loss_terms(model_fn, batch["x"], t, noise)
    return terms["loss"].mean(), terms


def drop_conditions(key, conditions, probability: float, null):
    """Conditions (N, ...), each replaced by the null condition with `probability`.

    One draw for all arrays of an example. The published code draws it inside the network.

    Args:
      key: of the draw.
      conditions: a tree of arrays (N, ...).
      probability: of dropping an example's condition.
      null: the null condition, a tree like `conditions`.
    """
    count = len(jax.tree.leaves(conditions)[0])
    dropped = jax.random.bernoulli(key, probability, (count,))

    def drop(leaf, nothing):
        return jnp.where(dropped.reshape(count, *[1] * (leaf.ndim - 1)), nothing, leaf)

    return jax.tree.map(drop, conditions, null)


def gradients(
    params, model, diffusion: Objective, batch: dict, t, noise, parts: int = 1, sharding: Any = None
):
    """The gradients of `loss_fn` and its terms (N,), in `parts` one after the other.

    A part holds every `parts`-th example, so that it lies on the devices as the batch does.
    """
    grad = jax.grad(loss_fn, has_aux=True)
    if parts == 1:
        return grad(params, model, diffusion, batch, t, noise, sharding)

    def part(total, inputs):
        grads, terms = grad(params, model, diffusion, *inputs, sharding)
        return jax.tree.map(jnp.add, total, grads), terms

    inputs = jax.tree.map(
        lambda v: v.reshape(-1, parts, *v.shape[1:]).swapaxes(0, 1), (batch, t, noise)
    )
    total, terms = jax.lax.scan(part, jax.tree.map(jnp.zeros_like, params), inputs)
    grads = jax.tree.map(lambda g: g / parts, total)
    return grads, {name: value.T.reshape(-1) for name, value in terms.items()}


def apply_gradients(
    state: TrainState,
    grads,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, dict]:
    """The state after one optimizer step, but for its `width_emas`, and the norms of the step."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(params),
    }
    ema_params = update_ema(state.ema_params, params, ema_decay)
    return TrainState(state.step + 1, params, ema_params, opt_state, state.width_emas), norms


def make_train_step(
    model,
    diffusion: Objective,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    options: StepOptions,
    sharding: Any = None,
) -> StepFn:
    """The jitted step (state, batch, attempt=0) -> (state, metrics).

    Every draw follows from (options.seed, state.step, attempt), so a step's result depends on
    nothing else; the state is donated.

    Args:
      model, diffusion, optimizer: what is trained, and how.
      mesh: batches are split over it.
      options: how.
      sharding: of the state, see `dico_jax.parallel.sharding`; whole on every device if None.
    """
    sharding = replicated(mesh) if sharding is None else sharding
    params_sharding = sharding.params if isinstance(sharding, TrainState) else sharding

    def train_step(state: TrainState, batch: dict, attempt):
        key = jax.random.fold_in(run_keys(options.seed)[1], state.step)
        key = attempt_key(key, attempt)
        t, noise = diffusion.draw(key, batch["x"])
        drop_key = jax.random.split(key, 3)[2]
        null = model.null_condition(len(t))
        if null is not None and model.condition_dropout > 0:
            conditions = drop_conditions(
                drop_key, batch["condition"], model.condition_dropout, null
            )
            batch = batch | {"condition": conditions}
        given = state.params, model, diffusion, batch, t, noise
        grads, terms = gradients(*given, options.accumulation_steps, params_sharding)
        new_state, norms = apply_gradients(state, grads, optimizer, options.ema_decay)
        means = {name: value.mean() for name, value in terms.items()}
        finite = is_finite(means["loss"], norms["grad_norm"])
        if options.skip_bad_steps:
            new_state = keep_if(finite, new_state, state).replace(step=new_state.step)
        # Also after a step left out, because their decay follows from the number of steps.
        width_emas = update_width_emas(
            state.width_emas, new_state.params, new_state.step, options.ema_widths
        )
        new_state = new_state.replace(width_emas=width_emas)
        metrics = jax.tree.map(jnp.float32, means | norms)
        quartered = {name: terms[name] for name in diffusion.quartered}
        quarters = quarter_losses(quartered, diffusion.progress(t))
        return new_state, metrics | quarters | {"finite": finite}

    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(sharding, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(sharding, replicated(mesh)),
    )
    return lambda state, batch, attempt=0: compiled(state, batch, jnp.int32(attempt))
