"""Flow matching on the linear path (arXiv 2209.03003, 2210.02747), as SiT and REPA train."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.diffusion.gaussian import as_float, mean_flat, spread
from dico_jax.diffusion.objectives import Estimate, ModelFn, Objective
from dico_jax.diffusion.spacing import continuous_times
from dico_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Flow(Objective):
    """x_t = (1 - t) x_0 + t noise with t in [0, 1]; the network predicts noise - x_0.

    Attributes:
      steps: of sampling.
      spacing: of these, one of `SPACINGS`.
      time_sampling: "uniform", or "logit_normal": a sigmoid of a normal of mean `logit_mean` and
        deviation 1 (arXiv 2403.03206, section 3.1).
      logit_mean: below 0 for more times near the data.
      time_scale: what times are multiplied by for the network.
    """

    steps: int = 1
    spacing: str = "linear"
    time_sampling: str = "uniform"
    logit_mean: float = 0.0
    time_scale: float = 1000.0

    fields: ClassVar[tuple[str, ...]] = ("time_sampling", "logit_mean", "time_scale")
    quartered = ("mse",)

    def __post_init__(self):
        if self.logit_mean and self.time_sampling == "uniform":
            fix = "has no effect with time_sampling='uniform': set it to 0, or use 'logit_normal'"
            raise UsageError("logit_mean", self.logit_mean, fix)

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, Any],
        *,
        learn_sigma: bool,
        num_steps: int | None = None,
        spacing: str = "linear",
    ) -> Self:
        chosen = {name: options[name] for name in cls.fields if name in options}
        return cls(num_steps or 1, spacing, **chosen)

    def check_model(self, model: Any) -> None:
        """See `Objective`: the path has no variance to learn."""
        super().check_model(model)
        if model.learn_sigma:
            fix = "is not for an objective that predicts velocities: set it to False"
            raise UsageError("model.learn_sigma", True, fix)

    def draw(self, key: jax.Array, x0) -> tuple[jax.Array, jax.Array]:
        """Times (N,) and noise like x0."""
        t_key, noise_key, _ = jax.random.split(key, 3)
        times = self.draw_times(t_key, x0.shape[:1])
        return times, jax.random.normal(noise_key, x0.shape, x0.dtype)

    def draw_times(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Times of a shape, in [0, 1)."""
        if self.time_sampling == "uniform":
            return jax.random.uniform(key, shape)
        return jax.nn.sigmoid(jax.random.normal(key, shape) + self.logit_mean)

    def loss_terms(self, model_fn: ModelFn, x0, t, noise) -> dict[str, jax.Array]:
        """The mean squared error of the velocity, which is both "loss" and "mse"."""
        x0, noise = as_float(x0, noise)
        output = model_fn(interpolated(x0, noise, t), self.network_time(t))
        mse = mean_flat(jnp.square(output - (noise - x0)))
        return {"loss": mse, "mse": mse}

    def progress(self, t) -> jax.Array:
        """The times themselves."""
        return t

    @property
    def times(self) -> np.ndarray:
        """See `Objective`, (T + 1,) float64."""
        return continuous_times(self.spacing, self.steps)

    def alpha_sigma(self, t) -> tuple[Any, Any]:
        """1 - t and t."""
        return 1 - t, t

    def estimate(self, output, x, t, clip_denoised: bool = False) -> Estimate:
        """See `Objective`; at t = 1, too, where x says nothing of x_0."""
        x, output = as_float(x, output)
        t = spread(jnp.asarray(t, x.dtype), x)
        x0 = x - t * output
        if not clip_denoised:
            return Estimate(x0, x + (1 - t) * output)
        x0 = jnp.clip(x0, -1.0, 1.0)
        return Estimate(x0, x0 + (x - x0) / jnp.where(t > 0, t, 1))

    def network_time(self, t, until=None) -> jax.Array:
        """Times in the network's units."""
        return jnp.asarray(t) * self.time_scale


def interpolated(x0: jax.Array, noise: jax.Array, t) -> jax.Array:
    """x_t (N, ..., C) at times t (N,)."""
    t = spread(jnp.asarray(t, x0.dtype), x0)
    return (1 - t) * x0 + t * noise
