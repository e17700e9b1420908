"""Training losses, per example.

Sums and means are in float32, or in float64 if an input has it, whatever the model returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dico_jax.diffusion.gaussian import (
    as_float,
    original_timesteps,
    p_mean_variance,
    q_posterior,
    q_sample,
    split_output,
)

if TYPE_CHECKING:
    from dico_jax.diffusion.objectives import Diffusion


def mean_flat(x: jax.Array) -> jax.Array:
    """The mean over all axes but the first: (N, ...) to (N,)."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def normal_kl(mean1, log_variance1, mean2, log_variance2) -> jax.Array:
    """KL(N(mean1, variance1) || N(mean2, variance2)) per element, in nats; arguments broadcast."""
    difference = log_variance1 - log_variance2
    distance = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (jnp.expm1(difference) - difference + distance)


def discretized_gaussian_log_likelihood(x, mean, log_scale) -> jax.Array:
    """The log-probability of 8-bit data under a Gaussian, per element, in nats.

    DDPM (arXiv 2006.11239) equation 13: the mass of a bin of width 2/255 around x, the bins at -1
    and 1 reaching to infinity, with the tanh approximation of the normal distribution function that
    the published models are trained with. A mass below 1e-12 counts as 1e-12.

    Args:
      x: data in [-1, 1] (latents are treated alike).
      mean: the Gaussian's mean, to broadcast against x.
      log_scale: the logarithm of its standard deviation.
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


_HALF_BIN = 1.0 / 255.0
_CDF_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)


def _cdf_logit(x: jax.Array) -> jax.Array:
    """The logit of the standard normal distribution function, tanh approximation of the latter.

    sigmoid(2y) = (1 + tanh(y)) / 2; the approximation is off by less than 2e-4.
    """
    return _CDF_SLOPE * (x + 0.044715 * x**3)


def vb_terms(
    diffusion: Diffusion, model_output, x0, x_t, t, clip_denoised: bool = False
) -> jax.Array:
    """One term of the variational bound per example: (N,), in bits per dimension.

    DDPM (arXiv 2006.11239) equation 5: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at index
    0 the negative log-likelihood of x_0, see `discretized_gaussian_log_likelihood`.

    Args:
      diffusion: the process and the meaning of the output.
      model_output: what the model returned for x_t, (N, ..., C) or (N, ..., 2C).
      x0: clean data, (N, ..., C).
      x_t: `q_sample(diffusion, x0, t, noise)`.
      t: (N,) indices into the (respaced) process.
      clip_denoised: clip the predicted x_0 to [-1, 1].
    """
    x0, x_t, model_output = as_float(x0, x_t, model_output)
    q = q_posterior(diffusion, x0, x_t, t)
    p = p_mean_variance(diffusion, model_output, x_t, t, clip_denoised=clip_denoised)
    kl = normal_kl(q.mean, q.log_variance, p.mean, p.log_variance)
    log_likelihood = discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    nats = jnp.where(jnp.asarray(t) == 0, -mean_flat(log_likelihood), mean_flat(kl))
    return nats / math.log(2.0)


def training_losses(
    diffusion: Diffusion,
    model_fn: Callable[[jax.Array, jax.Array], jax.Array],
    x0,
    t,
    noise,
) -> dict[str, jax.Array]:
    """The loss and its parts for one batch, per example.

    With a learned variance the loss is the mean squared error plus the variational bound, in which
    the prediction is held constant: the bound trains the variance channels alone (improved DDPM,
    arXiv 2102.09672, section 3.1, without its weight of 1/1000).

    Args:
      diffusion: the process, the meaning of the output, and the loss.
      model_fn: model_fn(x_t, timesteps) is the model's output, (N, ..., C) or (N, ..., 2C); the
        timesteps (N,), int32, are those of the original process.
      x0: clean data, (N, ..., C).
      t: (N,) indices into the (respaced) process.
      noise: standard normal, of x0's shape.

    Returns:
      Arrays (N,): "loss", what to minimise; "mse" of the prediction (with loss="kl" for information
      only); and "vb" in bits per dimension, unless the variance is fixed and the loss has no bound.
    """
    x0, noise = as_float(x0, noise)
    x_t = q_sample(diffusion, x0, t, noise)
    x0, noise, x_t, output = as_float(
        x0, noise, x_t, model_fn(x_t, original_timesteps(diffusion, t))
    )
    prediction, variance_channels = split_output(diffusion, output, x0.shape[-1])
    target = noise if diffusion.prediction == "noise" else x0
    mse = mean_flat(jnp.square(target - prediction))
    if diffusion.loss == "kl":
        vb = vb_terms(diffusion, output, x0, x_t, t)
        return {"loss": diffusion.num_steps * vb, "mse": mse, "vb": vb}
    if variance_channels is None:
        return {"loss": mse, "mse": mse}
    held = jnp.concatenate([jax.lax.stop_gradient(prediction), variance_channels], axis=-1)
    vb = vb_terms(diffusion, held, x0, x_t, t)
    if diffusion.loss == "rescaled_mse":
        vb = vb * (diffusion.num_steps / 1000.0)
    return {"loss": mse + vb, "mse": mse, "vb": vb}
