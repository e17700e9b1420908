"""The Gaussian process: marginals, posterior, what a model's output means, and losses.

Functions take arrays (N, ..., C) of any rank from 2 on, and t: (N,) indices into the (respaced)
process, 0..T-1, or one index () for all examples. An index beyond the process gives NaN. They
compute in float32, or in float64 if an input has it, whatever the model returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.diffusion.schedule import replace_first
from dico_jax.errors import UsageError

if TYPE_CHECKING:
    from dico_jax.diffusion.objectives import Diffusion

_HALF_BIN = 1.0 / 255.0
_CDF_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)


class GaussianMoments(NamedTuple):
    """Mean (N, ..., C), variance and log variance, which broadcast against it."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array


class ModelMoments(NamedTuple):
    """Moments of p(x_{t-1} | x_t), and the x_0 it assumes: (N, ..., C) each."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array
    pred_x0: jax.Array


def as_float(*arrays) -> list[jax.Array]:
    """`arrays` as JAX arrays of one dtype: float32, or float64 if any of them has it."""
    dtype = jnp.result_type(jnp.float32, *map(jnp.asarray, arrays))
    return [jnp.asarray(array).astype(dtype) for array in arrays]


def table_at(table: np.ndarray, t, x: jax.Array) -> jax.Array:
    """Entries `t`, (N,) or (), of a (T,) table, in the dtype of x and to broadcast with it."""
    # NaN beyond it, so that timesteps of the original process given to a shorter one are noticed.
    values = jnp.asarray(table, x.dtype).at[jnp.asarray(t)].get(mode="fill", fill_value=jnp.nan)
    return spread(values, x)


def spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values (N,) or () with further axes of 1, to broadcast with x (N, ..., C)."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def original_timesteps(diffusion: Diffusion, t) -> jax.Array:
    """The original process's int32 timesteps of indices t: what the model is given."""
    return jnp.asarray(diffusion.schedule.timestep_map, jnp.int32)[jnp.asarray(t)]


def q_mean_variance(diffusion: Diffusion, x0, t) -> GaussianMoments:
    """Moments of q(x_t | x_0), DDPM (arXiv 2006.11239) equation 4."""
    (x0,) = as_float(x0)
    alphas_cumprod = diffusion.schedule.alphas_cumprod
    mean, variance = table_at(np.sqrt(alphas_cumprod), t, x0) * x0, 1.0 - alphas_cumprod
    return GaussianMoments(mean, *(table_at(x, t, x0) for x in (variance, np.log(variance))))


def q_sample(diffusion: Diffusion, x0, t, noise) -> jax.Array:
    """x_t (N, ..., C), a draw of q(x_t | x_0) made of standard normal `noise` of x_0's shape."""
    x0, noise = as_float(x0, noise)
    alphas_cumprod = diffusion.schedule.alphas_cumprod
    signal = table_at(np.sqrt(alphas_cumprod), t, x0)
    return signal * x0 + table_at(np.sqrt(1.0 - alphas_cumprod), t, x0) * noise


def q_posterior(diffusion: Diffusion, x0, x_t, t) -> GaussianMoments:
    """Moments of q(x_{t-1} | x_t, x_0), DDPM (arXiv 2006.11239) equations 6 and 7.

    The log variance is the clipped one: at index 0, where the variance is 0, that of index 1.
    """
    x0, x_t = as_float(x0, x_t)
    s = diffusion.schedule
    mean = table_at(s.posterior_mean_coef1, t, x0) * x0
    mean = mean + table_at(s.posterior_mean_coef2, t, x0) * x_t
    variances = s.posterior_variance, s.posterior_log_variance_clipped
    return GaussianMoments(mean, *(table_at(table, t, x0) for table in variances))


def x0_from_noise(diffusion: Diffusion, x_t, t, noise) -> jax.Array:
    """The x_0 (N, ..., C) of which x_t was made with `noise`; the inverse of `q_sample`."""
    x_t, noise = as_float(x_t, noise)
    inverse = 1.0 / diffusion.schedule.alphas_cumprod
    scaled = table_at(np.sqrt(inverse), t, x_t) * x_t
    return scaled - table_at(np.sqrt(inverse - 1.0), t, x_t) * noise


def noise_from_x0(diffusion: Diffusion, x_t, t, x0) -> jax.Array:
    """The noise (N, ..., C) with which x_t was made of `x0`; the inverse of `q_sample`."""
    x_t, x0 = as_float(x_t, x0)
    alphas_cumprod = diffusion.schedule.alphas_cumprod
    if not alphas_cumprod[-1]:  # with no signal, of which nothing is a part, at the last step
        rest = x_t - table_at(np.sqrt(alphas_cumprod), t, x_t) * x0
        return rest / table_at(np.sqrt(1.0 - alphas_cumprod), t, x_t)
    inverse = 1.0 / alphas_cumprod
    scaled = table_at(np.sqrt(inverse), t, x_t) * x_t
    return (scaled - x0) / table_at(np.sqrt(inverse - 1.0), t, x_t)


def velocity(diffusion: Diffusion, x0, t, noise) -> jax.Array:
    """The velocity alpha noise - sigma x_0 (N, ..., C), arXiv 2202.00512, appendix D."""
    return q_sample(diffusion, noise, t, -jnp.asarray(x0))


def x0_from_velocity(diffusion: Diffusion, x_t, t, velocity) -> jax.Array:
    """The x_0 (N, ..., C) of x_t and its velocity: alpha x_t - sigma velocity."""
    return q_sample(diffusion, x_t, t, -jnp.asarray(velocity))


def noise_from_velocity(diffusion: Diffusion, x_t, t, velocity) -> jax.Array:
    """The noise (N, ..., C) of x_t and its velocity: sigma x_t + alpha velocity."""
    return q_sample(diffusion, velocity, t, x_t)


def min_snr_weights(diffusion: Diffusion) -> np.ndarray:
    """The weights (T,) float64 of squared errors, see `Diffusion.min_snr_gamma`."""
    signal = diffusion.schedule.alphas_cumprod
    snr = signal / (1.0 - signal)
    of_x0 = np.minimum(snr, diffusion.min_snr_gamma)
    # An error of the noise is sqrt(snr) times that of the x_0 it gives; of v, sqrt(snr + 1) times.
    return of_x0 / {"noise": snr, "x0": 1.0, "velocity": snr + 1.0}[diffusion.prediction]


def split_output(diffusion: Diffusion, model_output, num_channels: int):
    """A model's output as the prediction (N, ..., C) and the variance channels, alike or None.

    Raises:
      UsageError: the output has another number of channels than C, or 2C with a learned variance.
    """
    expected = num_channels * (2 if diffusion.learns_variance else 1)
    if model_output.shape[-1] != expected:
        what = f"the model returned {model_output.shape[-1]} channels for data of {num_channels}"
        fix = f"needs {expected}: give the model and the diffusion the same learn_sigma"
        raise UsageError(f"{what}, and variance={diffusion.variance!r} {fix}")
    if not diffusion.learns_variance:
        return model_output, None
    return model_output[..., :num_channels], model_output[..., num_channels:]


def p_mean_variance(
    diffusion: Diffusion, model_output, x, t, clip_denoised: bool = False, denoised_fn=None
) -> ModelMoments:
    """Moments of p(x_{t-1} | x_t) that a model's output stands for.

    DDPM (arXiv 2006.11239) section 3.2, and for the learned variance improved DDPM (arXiv
    2102.09672) equation 15.

    Args:
      diffusion: the process and the meaning of the output.
      model_output: for (x, `original_timesteps(diffusion, t)`): (N, ..., C) or, with a learned
        variance, (N, ..., 2C). Variance channels in [-1, 1] span the range from the posterior's
        variance to beta_t; values beyond extrapolate.
      x: x_t, (N, ..., C).
      t: (N,) or () indices into the (respaced) process.
      clip_denoised: clip the predicted x_0 to [-1, 1] (for pixels, not for latents).
      denoised_fn: applied to the predicted x_0, before clipping.
    """
    x, model_output = as_float(x, model_output)
    prediction, variance_channels = split_output(diffusion, model_output, x.shape[-1])
    variance, log_variance = _model_variance(diffusion, variance_channels, x, t)
    if diffusion.prediction == "noise":
        prediction = x0_from_noise(diffusion, x, t, prediction)
    elif diffusion.prediction == "velocity":
        prediction = x0_from_velocity(diffusion, x, t, prediction)
    if denoised_fn is not None:
        prediction = denoised_fn(prediction)
    if clip_denoised:
        prediction = jnp.clip(prediction, -1.0, 1.0)
    mean = q_posterior(diffusion, prediction, x, t).mean
    variance, log_variance = (jnp.broadcast_to(v, x.shape) for v in (variance, log_variance))
    return ModelMoments(mean, variance, log_variance, prediction)


def _model_variance(diffusion: Diffusion, variance_channels, x: jax.Array, t):
    """Variance and log variance of p(x_{t-1} | x_t), to broadcast against x."""
    s = diffusion.schedule
    if diffusion.variance == "learned_range":
        share = (variance_channels + 1.0) / 2.0
        log_beta = table_at(np.log(s.betas), t, x)
        log_posterior = table_at(s.posterior_log_variance_clipped, t, x)
        log_variance = share * log_beta + (1.0 - share) * log_posterior
        return jnp.exp(log_variance), log_variance
    if diffusion.variance == "fixed_small":
        variance, log_variance = s.posterior_variance, s.posterior_log_variance_clipped
    else:
        # beta_0 is the variance of nothing: the first entry is the posterior's at index 1, which
        # gives the t = 0 term of the bound a better likelihood.
        variance = np.append(replace_first(s.posterior_variance, s.betas)[:1], s.betas[1:])
        log_variance = np.log(variance)
    return table_at(variance, t, x), table_at(log_variance, t, x)


def mean_flat(x: jax.Array) -> jax.Array:
    """The mean over all axes but the first: (N, ...) to (N,)."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def normal_kl(mean1, log_variance1, mean2, log_variance2) -> jax.Array:
    """KL(N(mean1, variance1) || N(mean2, variance2)) per element, in nats; arguments broadcast."""
    difference = log_variance1 - log_variance2
    distance = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (jnp.expm1(difference) - difference + distance)


def discretized_gaussian_log_likelihood(x, mean, log_scale) -> jax.Array:
    """The log-probability of 8-bit data x in [-1, 1] (or latents) under a Gaussian, in nats.

    DDPM (arXiv 2006.11239) equation 13: the mass of a bin of width 2/255 around x, the bins at -1
    and 1 reaching to infinity, with the tanh approximation of the normal distribution function that
    the published models are trained with. A mass below 1e-12 counts as 1e-12.
    """
    # The mass is the difference of two sigmoids, F(a) - F(b). Subtracted as such, as the published
    # code does, it is rounding noise in float32 from four standard deviations on; its logarithm
    # log F(a) + log F(-b) + log(1 - exp(b - a)) loses nothing.
    inverse_scale = jnp.exp(-log_scale)
    lower = (x - mean - _HALF_BIN) * inverse_scale
    upper = (x - mean + _HALF_BIN) * inverse_scale
    # a - b without cancellation, hence never 0, where the logarithm's gradient would be infinite.
    cubic = 0.044715 * (jnp.square(lower) + lower * upper + jnp.square(upper))
    width = _CDF_SLOPE * (2.0 * _HALF_BIN * inverse_scale) * (1.0 + cubic)
    log_upto = jax.nn.log_sigmoid(_cdf_logit(upper))
    log_beyond = jax.nn.log_sigmoid(-_cdf_logit(lower))
    log_bin = log_upto + log_beyond + jnp.log(-jnp.expm1(-width))
    log_mass = jnp.where(x < -0.999, log_upto, jnp.where(x > 0.999, log_beyond, log_bin))
    return jnp.maximum(log_mass, math.log(1e-12))


def _cdf_logit(x: jax.Array) -> jax.Array:
    """The logit of the normal distribution function, approximated by tanh to 2e-4."""
    return _CDF_SLOPE * (x + 0.044715 * x**3)


def vb_terms(diffusion: Diffusion, model_output, x0, x_t, t, clip_denoised=False) -> jax.Array:
    """One term of the variational bound per example: (N,), in bits per dimension.

    DDPM (arXiv 2006.11239) equation 5: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at index
    0 the negative log-likelihood of x_0, see `discretized_gaussian_log_likelihood`. Arguments are
    those of `p_mean_variance` and `q_posterior`.
    """
    x0, x_t, model_output = as_float(x0, x_t, model_output)
    q = q_posterior(diffusion, x0, x_t, t)
    p = p_mean_variance(diffusion, model_output, x_t, t, clip_denoised=clip_denoised)
    kl = normal_kl(q.mean, q.log_variance, p.mean, p.log_variance)
    log_likelihood = discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    return jnp.where(jnp.asarray(t) == 0, -mean_flat(log_likelihood), mean_flat(kl)) / math.log(2.0)


def training_losses(
    diffusion: Diffusion, model_fn: Callable[[jax.Array, jax.Array], jax.Array], x0, t, noise
) -> dict[str, jax.Array]:
    """The loss and its parts for one batch, per example.

    With a learned variance the loss is the mean squared error plus the variational bound, in which
    the prediction is held constant: the bound trains the variance channels alone (improved DDPM,
    arXiv 2102.09672, section 3.1, without its weight of 1/1000).

    Args:
      diffusion: the process, the meaning of the output, and the loss.
      model_fn: model_fn(x_t, timesteps) is the model's output, (N, ..., C) or (N, ..., 2C); the
        timesteps (N,), int32, are those of the original process.
      x0, noise: clean data (N, ..., C), and standard normal of its shape.
      t: (N,) indices into the (respaced) process.

    Returns:
      Arrays (N,): "loss", what to minimise; "mse" of the prediction, never weighted (with
      loss="kl" for information only); and "vb" in bits per dimension, unless the variance is fixed
      and the loss has no bound.
    """
    x0, noise = as_float(x0, noise)
    x_t = q_sample(diffusion, x0, t, noise)
    output = model_fn(x_t, original_timesteps(diffusion, t))
    x0, noise, x_t, output = as_float(x0, noise, x_t, output)
    prediction, variance_channels = split_output(diffusion, output, x0.shape[-1])
    targets = {"noise": noise, "x0": x0, "velocity": velocity(diffusion, x0, t, noise)}
    mse = mean_flat(jnp.square(targets[diffusion.prediction] - prediction))
    squares = mse
    if diffusion.min_snr_gamma:
        squares = table_at(min_snr_weights(diffusion), t, mse) * mse
    if diffusion.loss == "kl":
        vb = vb_terms(diffusion, output, x0, x_t, t)
        return {"loss": diffusion.num_steps * vb, "mse": mse, "vb": vb}
    if variance_channels is None:
        return {"loss": squares, "mse": mse}
    held = jnp.concatenate([jax.lax.stop_gradient(prediction), variance_channels], axis=-1)
    vb = vb_terms(diffusion, held, x0, x_t, t)
    if diffusion.loss == "rescaled_mse":
        vb = vb * (diffusion.num_steps / 1000.0)
    return {"loss": squares + vb, "mse": mse, "vb": vb}
