"""MeanFlow (arXiv 2505.13447): the mean velocity between two times, for samples in few steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dico_jax.diffusion.flow import Flow, interpolated
from dico_jax.diffusion.gaussian import as_float, mean_flat, spread
from dico_jax.diffusion.objectives import ModelFn
from dico_jax.errors import UsageError

_LEAST = 1e-3  # added to squared errors, so that none of them weighs without bound


@dataclasses.dataclass(frozen=True)
class MeanFlow(Flow):
    """The path of `Flow`; the network is told two times and predicts the mean velocity between.

    Drawn times are (N, 2), where a step begins and where it ends, nearer to the data.

    Attributes:
      jump_share: of the examples whose two times differ; the others learn the velocity.
      loss_power: of its own squared error that an example's loss is divided by, 0 for none.
    """

    jump_share: float = 0.25
    loss_power: float = 1.0

    fields = (*Flow.fields, "jump_share", "loss_power")
    two_times = True

    def check_model(self, model: Any) -> None:
        """See `Objective`: the network is differentiated by its times."""
        super().check_model(model)
        if not model.plain_ops:
            fix = "cannot be differentiated forwards, as this objective does: set it to True"
            raise UsageError("model.plain_ops", False, fix)

    def draw(self, key: jax.Array, x0) -> tuple[jax.Array, jax.Array]:
        """Two times (N, 2) and noise like x0."""
        t_key, noise_key, _ = jax.random.split(key, 3)
        t_key, share_key = jax.random.split(t_key)
        times = jnp.sort(self.draw_times(t_key, (len(x0), 2)), axis=1, descending=True)
        jumps = jax.random.bernoulli(share_key, self.jump_share, (len(x0), 1))
        times = jnp.where(jumps, times, times[:, :1])
        return times, jax.random.normal(noise_key, x0.shape, x0.dtype)

    def loss_terms(self, model_fn: ModelFn, x0, t, noise) -> dict[str, jax.Array]:
        """The squared error of u = v - (t - r) du/dt along the path, whose right side is held.

        "mse" is its mean, "loss" its sum over a power of itself (section 4.3).
        """
        x0, noise = as_float(x0, noise)
        begin, end = t[:, 0], t[:, 1]
        velocity = noise - x0

        def mean_velocity(x, begin):
            return model_fn(x, self.network_time(begin, end))

        along = velocity, jnp.ones_like(begin)
        output, slope = jax.jvp(mean_velocity, (interpolated(x0, noise, begin), begin), along)
        target = jax.lax.stop_gradient(velocity - spread(begin - end, x0) * slope)
        mse = mean_flat(jnp.square(output - target))
        squares = mse * x0[0].size
        weights = jax.lax.stop_gradient(squares + _LEAST) ** -self.loss_power
        return {"loss": weights * squares, "mse": mse}

    def progress(self, t) -> jax.Array:
        """The times where steps begin."""
        return t[:, 0]

    def network_time(self, t, until=None) -> jax.Array:
        """Both times in the network's units, (..., 2)."""
        t = jnp.asarray(t)
        return jnp.stack([t, t if until is None else until], axis=-1) * self.time_scale
