"""What a network learns, and how samples see it: one small interface, and the published objective.

A new objective is a class with the methods of `Objective` and a row in `registry.OBJECTIVES`.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.diffusion import gaussian
from dico_jax.diffusion.schedule import (
    Schedule,
    beta_schedule,
    make_schedule,
    schedule_of,
    with_zero_terminal_snr,
)
from dico_jax.diffusion.spacing import spaced_timesteps
from dico_jax.errors import UsageError

PREDICTIONS = ("noise", "x0", "velocity")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
LOSSES = ("mse", "rescaled_mse", "kl")

ModelFn = Callable[[jax.Array, jax.Array], jax.Array]


class Estimate(NamedTuple):
    """What a network's output says x is made of: alpha x_0 + sigma noise, (N, ..., C) each."""

    x0: jax.Array
    noise: jax.Array


class Objective(abc.ABC):
    """What is drawn, what the network predicts, the loss terms, and the path that samples take.

    Examples are (N, ..., C), times (N,) or (), in units of its own, whole or not. Data become noise
    as x_t = alpha(t) x_0 + sigma(t) noise.

    Attributes:
      fields: those of `config.diffusion` that it reads; others must be as they are by default.
      quartered: the loss terms that are also logged by how noisy the examples are.
      two_times: whether the network is told two times of every example, see `network_time`.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    quartered: ClassVar[tuple[str, ...]] = ("loss",)
    two_times: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def from_options(
        cls,
        options: Mapping[str, Any],
        *,
        learn_sigma: bool,
        num_steps: int | None = None,
        spacing: str = "linear",
    ) -> Self:
        """The objective of the fields of `config.diffusion`.

        `learn_sigma`: whether the network's output has a second half, for the variance;
        `num_steps`: of sampling, None for training; `spacing`: one of `SPACINGS`, of these.
        """

    def check_model(self, model: Any) -> None:
        """Raises UsageError about a field of `config.model` where a network cannot learn this."""
        if model.two_times != self.two_times:
            fix = f"does not fit this config.diffusion.objective: set it to {self.two_times}"
            raise UsageError("model.two_times", model.two_times, fix)

    @abc.abstractmethod
    def draw(self, key: jax.Array, x0) -> tuple[jax.Array, jax.Array]:
        """Times (N,) and noise like x0, of the first two of the key's three parts."""

    @abc.abstractmethod
    def loss_terms(self, model_fn: ModelFn, x0, t, noise) -> dict[str, jax.Array]:
        """The terms of every example by name, (N,) each, with "loss", what to minimise.

        model_fn(x_t, times) is the network's output, see `network_time`; t and noise are `draw`'s.
        """

    @abc.abstractmethod
    def progress(self, t) -> jax.Array:
        """How far times are from clean data (0) to noise (1, not reached)."""

    @property
    @abc.abstractmethod
    def times(self) -> np.ndarray:
        """The points of the path that samples take, (T + 1,): clean data first, noise last."""

    @property
    def num_steps(self) -> int:
        """T, the number of steps from noise to data."""
        return len(self.times) - 1

    @abc.abstractmethod
    def alpha_sigma(self, t) -> tuple[Any, Any]:
        """The factors of x_0 and noise at times t, NumPy (on the host, in float64) or JAX."""

    @abc.abstractmethod
    def estimate(self, output, x, t, clip_denoised: bool = False) -> Estimate:
        """What the network's output for x (N, ..., C) at time t, () or (N,), stands for.

        `clip_denoised` clips x_0 to [-1, 1] and takes the noise that fits it.
        """

    def network_time(self, t, until=None) -> jax.Array:
        """What the network is given for times t; DiCo and DiT are made for 0 to 999.

        `until`: where a step ends, for networks that are told; None says nothing of it.
        """
        return jnp.asarray(t)

    def posterior_variance(self) -> np.ndarray:
        """The variances of q(x_s | x_t, x_0) from every point t to the one before: (T,) float64."""
        alpha, sigma = map(np.asarray, self.alpha_sigma(self.times.astype(np.float64)))
        fresh = sigma[1:] ** 2 - (alpha[1:] / alpha[:-1] * sigma[:-1]) ** 2
        return fresh * (sigma[:-1] / sigma[1:]) ** 2


@dataclasses.dataclass(frozen=True)
class Diffusion(Objective):
    """The published objective: a Gaussian process of T steps, of which times are the indices.

    Attributes:
      schedule: the tables of the (respaced) process.
      prediction: "noise"; "x0", the clean data; or "velocity", alpha noise - sigma x_0 (arXiv
        2202.00512, appendix D), with which x_0 and noise are known where there is no signal, too.
      variance: of p(x_{t-1} | x_t). "learned_range": the model gives it in a second half of its
        channels (improved DDPM, arXiv 2102.09672, equation 15); "fixed_small": the posterior's;
        "fixed_large": beta_t (both: DDPM, arXiv 2006.11239, section 3.2).
      loss: "mse": mean squared error, plus the variational bound if the variance is learned;
        "rescaled_mse": with the bound multiplied by T/1000; "kl": T times the bound alone.
      min_snr_gamma: the highest signal-to-noise ratio that an error of x_0 weighs by in the squared
        error (arXiv 2303.09556, section 3.4); 0 for a weight of 1 of what is predicted.
    """

    schedule: Schedule
    prediction: str = "noise"
    variance: str = "learned_range"
    loss: str = "mse"
    min_snr_gamma: float = 0.0

    fields = ("diffusion_steps", "noise_schedule", "zero_terminal_snr", "min_snr_gamma")
    quartered = ("mse",)

    def __post_init__(self):
        choices = {"prediction": PREDICTIONS, "variance": VARIANCES, "loss": LOSSES}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise UsageError(name, value, f"is unknown: use {' or '.join(map(repr, known))}")

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, Any],
        *,
        learn_sigma: bool,
        num_steps: int | None = None,
        spacing: str = "linear",
    ) -> Self:
        prediction, gamma = options["objective"], options.get("min_snr_gamma", 0.0)
        betas = beta_schedule(options["noise_schedule"], options["diffusion_steps"])
        if options.get("zero_terminal_snr"):
            if prediction != "velocity":
                fix = f"leaves no signal to tell x_0 from with objective={prediction!r}: use"
                raise UsageError("zero_terminal_snr", True, f"{fix} objective='velocity'")
            if gamma:
                fix = "gives no weight to the last step of zero_terminal_snr=True: set one to 0"
                raise UsageError("min_snr_gamma", gamma, fix)
            betas = with_zero_terminal_snr(betas)
        kept = np.arange(len(betas))
        if num_steps is not None:
            kept = spaced_timesteps(spacing, num_steps, np.cumprod(1.0 - betas))
        variance = "learned_range" if learn_sigma else "fixed_large"
        return cls(schedule_of(betas, kept), prediction, variance, min_snr_gamma=gamma)

    @property
    def learns_variance(self) -> bool:
        """Whether the model has twice as many output channels as inputs."""
        return self.variance == "learned_range"

    def draw(self, key: jax.Array, x0) -> tuple[jax.Array, jax.Array]:
        """Timesteps (N,) and noise like x0."""
        t_key, noise_key, _ = jax.random.split(key, 3)
        t = jax.random.randint(t_key, x0.shape[:1], 0, self.num_steps)
        return t, jax.random.normal(noise_key, x0.shape, x0.dtype)

    def loss_terms(self, model_fn: ModelFn, x0, t, noise) -> dict[str, jax.Array]:
        return gaussian.training_losses(self, model_fn, x0, t, noise)

    def progress(self, t) -> jax.Array:
        """The share of the steps before t, a little more, so that no rounding makes it less."""
        return (t + 0.125) / self.num_steps

    @property
    def times(self) -> np.ndarray:
        """The indices, after -1 for clean data."""
        return np.arange(-1, self.schedule.num_steps, dtype=np.int32)

    def alpha_sigma(self, t) -> tuple[Any, Any]:
        """The square roots of alpha-bar and of what it leaves of 1, for NumPy indices alone."""
        alphas_cumprod = np.append(1.0, self.schedule.alphas_cumprod)[np.asarray(t, int) + 1]
        return np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)

    def estimate(self, output, x, t, clip_denoised: bool = False) -> Estimate:
        """The noise is derived anew from x_0, which counts where that is clipped.

        Of a velocity that is not clipped it is known without.
        """
        x, output = gaussian.as_float(x, output)
        x0 = gaussian.p_mean_variance(self, output, x, t, clip_denoised).pred_x0
        if self.prediction == "velocity" and not clip_denoised:
            predicted, _ = gaussian.split_output(self, output, x.shape[-1])
            return Estimate(x0, gaussian.noise_from_velocity(self, x, t, predicted))
        return Estimate(x0, gaussian.noise_from_x0(self, x, t, x0))

    def network_time(self, t, until=None) -> jax.Array:
        """The timesteps of the original process."""
        return gaussian.original_timesteps(self, t)

    def posterior_variance(self) -> np.ndarray:
        """beta-tilde, (T,) float64."""
        return self.schedule.posterior_variance


def create_diffusion(
    timestep_respacing: str | int | Sequence[int] | None = "",
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> Diffusion:
    """A diffusion from the published code's options; the defaults train the released models.

    Args:
      timestep_respacing: which steps are kept, see `respaced_timesteps`; "" keeps all, "250" is
        what the released models are sampled with.
      noise_schedule: "linear" or "squaredcos_cap_v2".
      use_kl: train on the variational bound alone.
      sigma_small: without learn_sigma, the smaller of the two fixed variances.
      predict_xstart: the model predicts x_0 instead of the noise.
      learn_sigma: the model's output has a second half of channels for the variance.
      rescale_learned_sigmas: multiply the bound by T/1000 beside the mean squared error.
      diffusion_steps: steps of the original process.

    Raises:
      UsageError: a value that cannot be had, or an option that another one leaves without effect.
    """
    if learn_sigma and sigma_small:
        raise UsageError("sigma_small=True has no effect with learn_sigma=True: set one to False")
    if rescale_learned_sigmas and (use_kl or not learn_sigma):
        cause = "use_kl=True" if use_kl else "learn_sigma=False"
        raise UsageError("rescale_learned_sigmas", True, f"has no effect with {cause}")
    fixed = "fixed_small" if sigma_small else "fixed_large"
    return Diffusion(
        make_schedule(noise_schedule, diffusion_steps, timestep_respacing),
        prediction="x0" if predict_xstart else "noise",
        variance="learned_range" if learn_sigma else fixed,
        loss="kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse",
    )
