"""One training step, a pure function of (state, batch, attempt), and its metrics."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu.metrics import Average
from jax.sharding import Mesh

from dico_jax.checkpoints.state import TrainState, run_keys, update_ema, update_width_emas
from dico_jax.diffusion import Objective
from dico_jax.models.block_stacks import whole_where_used
from dico_jax.parallel.mesh import batch_sharding, replicated


def loss_fn(params, model, diffusion: Objective, batch: dict, t, noise, sharding: Any = None):
    """(The mean training loss of a batch, the objective's terms {"loss", ...}: (N,)).

    The batch is {"x": (N, H, W, C) clean latents, "condition": a tree of arrays (N, ...)}, t are
    times (N,), the noise is like x, and the sharding that of parameters that devices share.
    """
    if sharding is not None:
        params = whole_where_used(params, model, sharding)

    def model_fn(x, timesteps):
        return model.apply({"params": params}, x, timesteps, batch["condition"])

    terms = diffusion.loss_terms(model_fn, batch["x"], t, noise)
    return terms["loss"].mean(), terms


def drop_conditions(key, conditions, probability: float, null):
    """A tree of conditions (N, ...), those of an example `null`'s, all, with `probability`."""
    dropped = jax.random.bernoulli(key, probability, (len(jax.tree.leaves(conditions)[0]),))

    def drop(leaf, nothing):
        return jnp.where(dropped.reshape(-1, *[1] * (leaf.ndim - 1)), nothing, leaf)

    return jax.tree.map(drop, conditions, null)


def gradients(params, model, diffusion, batch: dict, t, noise, parts: int = 1, sharding=None):
    """The gradients of `loss_fn` and its terms (N,), in `parts` one after the other.

    A part holds every `parts`-th example, so that it lies on the devices as the batch does.
    """
    grad = jax.grad(loss_fn, has_aux=True)
    if parts == 1:
        return grad(params, model, diffusion, batch, t, noise, sharding)

    def part(total, inputs):
        grads, terms = grad(params, model, diffusion, *inputs, sharding)
        return jax.tree.map(jnp.add, total, grads), terms

    inputs, nothing = (batch, t, noise), jax.tree.map(jnp.zeros_like, params)
    inputs = jax.tree.map(lambda v: v.reshape(-1, parts, *v.shape[1:]).swapaxes(0, 1), inputs)
    total, terms = jax.lax.scan(part, nothing, inputs)
    grads = jax.tree.map(lambda g: g / parts, total)
    return grads, {name: value.T.reshape(-1) for name, value in terms.items()}


def apply_gradients(state: TrainState, grads, optimizer, ema_decay) -> tuple[TrainState, dict]:
    """The state after one optimizer step, but for its `width_emas`, and the norms of the step."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    trees = {"grad_norm": grads, "update_norm": updates, "param_norm": params}
    norms = {name: optax.tree.norm(tree) for name, tree in trees.items()}
    ema_params = update_ema(state.ema_params, params, ema_decay)
    return TrainState(state.step + 1, params, ema_params, opt_state, state.width_emas), norms


def attempt_key(key: jax.Array, attempt: jax.Array) -> jax.Array:
    """`key` itself in attempt 0 (see `NanWatch`), and a key of its own in each later one."""
    return jnp.where(attempt == 0, key, jax.random.fold_in(key, attempt))


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A jitted training step, called with (state, batch, attempt=0), and traced with shapes."""

    jitted: jax.stages.Wrapped

    def __call__(self, state: TrainState, batch: dict, attempt: int = 0) -> tuple[TrainState, dict]:
        return self.jitted(state, batch, jnp.int32(attempt))

    def trace(self, state: TrainState, batch: dict) -> jax.stages.Traced:
        return self.jitted.trace(state, batch, jax.ShapeDtypeStruct((), jnp.int32))


def make_train_step(
    model,
    diffusion: Objective,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    seed: int = 0,
    ema_decay: float = 0.9999,
    ema_widths: tuple[float, ...] = (),
    accumulation_steps: int = 1,
    skip_bad_steps: bool = False,
    sharding: Any = None,
) -> TrainStep:
    """The jitted step (state, batch, attempt=0) -> (state, metrics).

    Every draw follows from (seed, state.step, attempt), so a step's result depends on nothing else;
    the state is donated. Batches are split over the mesh, the state by `sharding`; whole if None.
    `skip_bad_steps` leaves out the update of a step whose loss or gradients are not finite.
    """
    sharding = replicated(mesh) if sharding is None else sharding
    params_sharding = sharding.params if isinstance(sharding, TrainState) else sharding

    def train_step(state: TrainState, batch: dict, attempt):
        key = attempt_key(jax.random.fold_in(run_keys(seed)[1], state.step), attempt)
        t, noise = diffusion.draw(key, batch["x"])
        drop_key, null = jax.random.split(key, 3)[2], model.null_condition(len(t))
        if null is not None and (dropout := model.condition_dropout) > 0:
            conditions = drop_conditions(drop_key, batch["condition"], dropout, null)
            batch = batch | {"condition": conditions}
        given = state.params, model, diffusion, batch, t, noise
        grads, terms = gradients(*given, accumulation_steps, params_sharding)
        new, norms = apply_gradients(state, grads, optimizer, ema_decay)
        means = {name: value.mean() for name, value in terms.items()}
        # Gradients too large for their norm are not finite either.
        finite = jnp.isfinite(means["loss"]) & jnp.isfinite(norms["grad_norm"])
        if skip_bad_steps:
            kept = jax.tree.map(functools.partial(jnp.where, finite), new, state)
            new = kept.replace(step=new.step)
        # Also after a step left out, because their decay follows from the number of steps.
        width_emas = update_width_emas(state.width_emas, new.params, new.step, ema_widths)
        metrics = jax.tree.map(jnp.float32, means | norms)
        quartered = {name: terms[name] for name in diffusion.quartered}
        metrics |= quarter_losses(quartered, diffusion.progress(t)) | {"finite": finite}
        return new.replace(width_emas=width_emas), metrics

    whole = replicated(mesh)
    given, made = (sharding, batch_sharding(mesh), whole), (sharding, whole)
    how: Any = {"in_shardings": given, "out_shardings": made}
    return TrainStep(jax.jit(train_step, donate_argnums=0, **how))


def quarter_losses(terms: Mapping[str, jax.Array], progress) -> dict[str, Average]:
    """Loss terms (N,) by how noisy the examples are: "mse_t0_25" (least noise) to "mse_t75_100".

    Sums run over the whole batch, however it is split over devices. An example that is not finite
    spoils its own quarter alone. The progress (N,) is in [0, 1), see `Objective.progress`.
    """
    quarter = jnp.floor(progress * 4)
    return {
        f"{name}_t{25 * i}_{25 * (i + 1)}": Average.from_model_output(values, mask=quarter == i)
        for name, values in terms.items()
        for i in range(4)
    }


def mean_of_steps(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps whose flag "finite" is true (over all, if none is), in float64.

    Numbers count once per step, an Average by its number of values; one of no values is left out.
    """
    kept, means = [step for step in steps if step["finite"]] or steps, {}
    for name in kept[0]:
        values = (step[name] for step in kept)
        averages = (v if isinstance(v, Average) else Average(total=v, count=1) for v in values)
        mean = functools.reduce(Average.merge, (jax.tree.map(np.float64, a) for a in averages))
        if name != "finite" and mean.count > 0:
            means[name] = float(mean.compute())
    return means
