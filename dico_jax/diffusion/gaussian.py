"""The Gaussian diffusion process: its marginals, its posterior, and what a model's output means.

Functions take arrays (N, ..., C) of any rank from 2 on, and t: (N,) indices into the (respaced)
process, 0..T-1, or one index () for all examples. An index beyond the process gives NaN. They
compute in float32, or in float64 if an input has it; bfloat16 inputs are cast to float32 first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.diffusion.schedule import replace_first
from dico_jax.errors import UsageError

if TYPE_CHECKING:
    from dico_jax.diffusion.objectives import Diffusion


class GaussianMoments(NamedTuple):
    """Mean (N, ..., C), variance and log variance, which broadcast against it."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array


class ModelMoments(NamedTuple):
    """Mean, variance and log variance of p(x_{t-1} | x_t), and the x_0 it assumes: (N, ..., C)."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array
    pred_x0: jax.Array


def as_float(*arrays) -> list[jax.Array]:
    """`arrays` as JAX arrays of one dtype: float32, or float64 if any of them has it."""
    converted = [jnp.asarray(array) for array in arrays]
    dtype = jnp.result_type(jnp.float32, *converted)
    return [array.astype(dtype) for array in converted]


def table_at(table: np.ndarray, t, x: jax.Array) -> jax.Array:
    """Entries `t`, (N,) or (), of a (T,) table in the dtype of x (N, ..., C), to broadcast with it.

    An entry that the table does not have is NaN, so that timesteps of the original process given
    to a shorter one are noticed.
    """
    values = jnp.asarray(table, x.dtype).at[jnp.asarray(t)].get(mode="fill", fill_value=jnp.nan)
    return spread(values, x)


def spread(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values (N,) or () with further axes of 1, to broadcast with x (N, ..., C)."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def original_timesteps(diffusion: Diffusion, t) -> jax.Array:
    """The timesteps of the original process, int32, of indices t: what the model is given."""
    return jnp.asarray(diffusion.schedule.timestep_map, jnp.int32)[jnp.asarray(t)]


def q_mean_variance(diffusion: Diffusion, x0, t) -> GaussianMoments:
    """Moments of q(x_t | x_0), DDPM (arXiv 2006.11239) equation 4."""
    (x0,) = as_float(x0)
    alphas_cumprod = diffusion.schedule.alphas_cumprod
    return GaussianMoments(
        mean=table_at(np.sqrt(alphas_cumprod), t, x0) * x0,
        variance=table_at(1.0 - alphas_cumprod, t, x0),
        log_variance=table_at(np.log(1.0 - alphas_cumprod), t, x0),
    )


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
    return GaussianMoments(
        mean=mean + table_at(s.posterior_mean_coef2, t, x0) * x_t,
        variance=table_at(s.posterior_variance, t, x0),
        log_variance=table_at(s.posterior_log_variance_clipped, t, x0),
    )


def x0_from_noise(diffusion: Diffusion, x_t, t, noise) -> jax.Array:
    """The x_0 (N, ..., C) of which x_t was made with `noise`; the inverse of `q_sample`."""
    x_t, noise = as_float(x_t, noise)
    inverse = 1.0 / diffusion.schedule.alphas_cumprod
    scaled = table_at(np.sqrt(inverse), t, x_t) * x_t
    return scaled - table_at(np.sqrt(inverse - 1.0), t, x_t) * noise


def noise_from_x0(diffusion: Diffusion, x_t, t, x0) -> jax.Array:
    """The noise (N, ..., C) with which x_t was made of `x0`; the inverse of `q_sample`."""
    x_t, x0 = as_float(x_t, x0)
    inverse = 1.0 / diffusion.schedule.alphas_cumprod
    scaled = table_at(np.sqrt(inverse), t, x_t) * x_t
    return (scaled - x0) / table_at(np.sqrt(inverse - 1.0), t, x_t)


def split_output(diffusion: Diffusion, model_output, num_channels: int):
    """A model's output as (prediction, variance channels), split along the last axis.

    Args:
      diffusion: says whether there are variance channels.
      model_output: (N, ..., 2C) if the variance is learned, else (N, ..., C).
      num_channels: C, the channels of the data.

    Returns:
      The prediction (N, ..., C), and the variance channels (N, ..., C) or None.

    Raises:
      UsageError: the output has another number of channels.
    """
    expected = num_channels * (2 if diffusion.learns_variance else 1)
    if model_output.shape[-1] != expected:
        raise UsageError(
            f"the model returned {model_output.shape[-1]} channels for data of {num_channels}, and "
            f"variance={diffusion.variance!r} needs {expected}: give the model and the diffusion "
            "the same learn_sigma"
        )
    if not diffusion.learns_variance:
        return model_output, None
    return model_output[..., :num_channels], model_output[..., num_channels:]


def p_mean_variance(
    diffusion: Diffusion,
    model_output,
    x,
    t,
    clip_denoised: bool = False,
    denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> ModelMoments:
    """Moments of p(x_{t-1} | x_t) that a model's output stands for.

    DDPM (arXiv 2006.11239) section 3.2, and for the learned variance improved DDPM (arXiv
    2102.09672) equation 15.

    Args:
      diffusion: the process and the meaning of the output.
      model_output: what the model returned for (x, `original_timesteps(diffusion, t)`): (N, ..., C)
        or, with a learned variance, (N, ..., 2C). Variance channels in [-1, 1] span the range from
        the posterior's variance to beta_t; values beyond extrapolate.
      x: x_t, (N, ..., C).
      t: (N,) or () indices into the (respaced) process.
      clip_denoised: clip the predicted x_0 to [-1, 1] (for pixels, not for latents).
      denoised_fn: applied to the predicted x_0, before clipping.

    Returns:
      Four arrays (N, ..., C). At index 0 the variance of "fixed_small" is 0, and its log variance
      that of index 1.

    Raises:
      UsageError: a number of output channels that does not fit.
    """
    x, model_output = as_float(x, model_output)
    prediction, variance_channels = split_output(diffusion, model_output, x.shape[-1])
    variance, log_variance = _model_variance(diffusion, variance_channels, x, t)
    if diffusion.prediction == "noise":
        prediction = x0_from_noise(diffusion, x, t, prediction)
    if denoised_fn is not None:
        prediction = denoised_fn(prediction)
    if clip_denoised:
        prediction = jnp.clip(prediction, -1.0, 1.0)
    mean = q_posterior(diffusion, prediction, x, t).mean
    return ModelMoments(
        mean,
        jnp.broadcast_to(variance, x.shape),
        jnp.broadcast_to(log_variance, x.shape),
        prediction,
    )


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
