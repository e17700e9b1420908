"""One training step, a pure function of (state, batch)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dico_jax.diffusion import Diffusion, training_losses
from dico_jax.mesh import batch_sharding, replicated
from dico_jax.training.ema import update_ema
from dico_jax.training.state import TrainState, run_keys

StepFn = Callable[[TrainState, dict], tuple[TrainState, dict]]


def loss_fn(params, model, diffusion: Diffusion, batch: dict, t, noise, label_key=None):
    """The mean training loss of a batch and its terms.

    Args:
      params: the parameters.
      model, diffusion: the network and its process.
      batch: {"x": (N, H, W, C) clean latents, "y": (N,) labels}.
      t: (N,) int timesteps.
      noise: like x.
      label_key: decides which labels are dropped; None drops none.

    Returns:
      (scalar loss, {"loss", "mse", ...}: scalar means over the batch).
    """

    def model_fn(x, timesteps):
        rngs = None if label_key is None else {"label_dropout": label_key}
        return model.apply(
            {"params": params}, x, timesteps, batch["y"], train=rngs is not None, rngs=rngs
        )

    terms = training_losses(diffusion, model_fn, batch["x"], t, noise)
    means = {name: value.mean() for name, value in terms.items()}
    return means["loss"], means


def draw_noise(key, x, num_timesteps: int):
    """The draws of a step: timesteps (N,), noise like x, and the key of the label drop."""
    t_key, noise_key, label_key = jax.random.split(key, 3)
    t = jax.random.randint(t_key, x.shape[:1], 0, num_timesteps)
    return t, jax.random.normal(noise_key, x.shape, x.dtype), label_key


def apply_gradients(
    state: TrainState, grads, optimizer: optax.GradientTransformation, ema_decay: float
) -> tuple[TrainState, dict]:
    """The state after one optimizer step and EMA update, and the norms of the step."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(params),
    }
    ema_params = update_ema(state.ema_params, params, ema_decay)
    return TrainState(state.step + 1, params, ema_params, opt_state), norms


def make_train_step(
    model,
    diffusion: Diffusion,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    seed: int,
    mesh: Mesh,
) -> StepFn:
    """The jitted step (state, batch) -> (state, metrics).

    Every draw follows from (seed, state.step), so a step's result depends on nothing else; the
    state is donated. Batches are split over the mesh, state and metrics are whole on every device.
    """

    def train_step(state: TrainState, batch: dict):
        key = jax.random.fold_in(run_keys(seed)[1], state.step)
        t, noise, label_key = draw_noise(key, batch["x"], diffusion.num_steps)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            state.params, model, diffusion, batch, t, noise, label_key
        )
        state, norms = apply_gradients(state, grads, optimizer, ema_decay)
        return state, jax.tree.map(jnp.float32, metrics | norms)

    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(replicated(mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
