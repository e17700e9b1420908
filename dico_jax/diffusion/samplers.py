"""Samplers, the loop that runs them, and randomness that belongs to an image.

A step takes what the model returned, not the model, and the noise, not a key: it is a function of
arrays. A new sampler is a step like `ddpm_step` and a line in `SAMPLERS`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.diffusion.gaussian import (
    Diffusion,
    as_float,
    noise_from_x0,
    original_timesteps,
    p_mean_variance,
    table_at,
)
from dico_jax.diffusion.schedule import Schedule
from dico_jax.errors import UsageError


class Step(Protocol):
    """One step of a sampler, from index i to i - 1; see `ddpm_step`."""

    def __call__(
        self,
        diffusion: Diffusion,
        model_output,
        x,
        i,
        noise,
        *,
        eta: float = 0.0,
        clip_denoised: bool = False,
        denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (x_{i-1}, predicted x_0)."""


class Trajectory(NamedTuple):
    """Every step of a sampling loop, first step (the largest index) first: (T, N, ..., C) each.

    Attributes:
      x: x after each step.
      pred_x0: the x_0 that the step predicted.
    """

    x: jax.Array
    pred_x0: jax.Array


def ddpm_step(
    diffusion: Diffusion,
    model_output,
    x,
    i,
    noise,
    *,
    eta: float = 0.0,
    clip_denoised: bool = False,
    denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One ancestral step, DDPM (arXiv 2006.11239) algorithm 2, with the diffusion's variance.

    Args:
      diffusion: the process and the meaning of the output.
      model_output: what the model returned for (x, `original_timesteps(diffusion, i)`).
      x: x_i, (N, ..., C).
      i: () or (N,) indices into the (respaced) process.
      noise: standard normal of x's shape; without effect at index 0.
      eta: must be 0, it belongs to "ddim".
      clip_denoised: clip the predicted x_0 to [-1, 1].
      denoised_fn: applied to the predicted x_0, before clipping.

    Returns:
      x_{i-1} and the predicted x_0, (N, ..., C), in float32 or better.

    Raises:
      UsageError: another eta, or a number of output channels that does not fit.
    """
    if eta != 0:
        raise UsageError(f"eta={eta} has no effect with sampler='ddpm': use eta=0, or 'ddim'")
    p = p_mean_variance(diffusion, model_output, x, i, clip_denoised, denoised_fn)
    return _add_noise(p.mean, jnp.exp(0.5 * p.log_variance), i, noise), p.pred_x0


def ddim_step(
    diffusion: Diffusion,
    model_output,
    x,
    i,
    noise,
    *,
    eta: float = 0.0,
    clip_denoised: bool = False,
    denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of DDIM (arXiv 2010.02502), equations 12 and 16.

    The noise is derived anew from the predicted x_0, which counts where that was changed or
    clipped. The model's variance is not used.

    Args:
      diffusion: the process and the meaning of the output.
      model_output: what the model returned for (x, `original_timesteps(diffusion, i)`).
      x: x_i, (N, ..., C).
      i: () or (N,) indices into the (respaced) process.
      noise: standard normal of x's shape; without effect at index 0; may be None with eta=0.
      eta: a Python number from 0 (deterministic) to 1 (the posterior's variance).
      clip_denoised: clip the predicted x_0 to [-1, 1].
      denoised_fn: applied to the predicted x_0, before clipping.

    Returns:
      x_{i-1} and the predicted x_0, (N, ..., C), in float32 or better.

    Raises:
      UsageError: another eta, or a number of output channels that does not fit.
    """
    signal, direction, sigma = _ddim_coefficients(diffusion.schedule, eta)
    x, model_output = as_float(x, model_output)
    x0 = p_mean_variance(diffusion, model_output, x, i, clip_denoised, denoised_fn).pred_x0
    predicted_noise = noise_from_x0(diffusion, x, i, x0)
    mean = table_at(signal, i, x) * x0 + table_at(direction, i, x) * predicted_noise
    return (mean if eta == 0 else _add_noise(mean, table_at(sigma, i, x), i, noise)), x0


def _ddim_coefficients(s: Schedule, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors (T,) of the predicted x_0, the predicted noise, and fresh noise."""
    if not 0 <= eta <= 1:
        raise UsageError(f"eta={eta} must be from 0 (deterministic) to 1 (as noisy as 'ddpm')")
    sigma = eta * np.sqrt(s.posterior_variance)
    direction = np.sqrt(1.0 - s.alphas_cumprod_prev - sigma**2)
    return np.sqrt(s.alphas_cumprod_prev), direction, sigma


def _add_noise(mean: jax.Array, sigma: jax.Array, i, noise) -> jax.Array:
    # Selected rather than multiplied by 0, so that not even a NaN in unused noise has an effect.
    mean, noise = as_float(mean, noise)
    index = jnp.asarray(i)
    index = index.reshape(index.shape + (1,) * (mean.ndim - index.ndim))
    return jnp.where(index > 0, mean + sigma * noise, mean)


SAMPLERS: dict[str, Step] = {"ddpm": ddpm_step, "ddim": ddim_step}


def sample_loop(
    diffusion: Diffusion,
    model_fn: Callable[[jax.Array, jax.Array], jax.Array],
    x_T,
    noise_fn: Callable[[jax.Array], jax.Array] | None,
    *,
    sampler: str = "ddpm",
    eta: float = 0.0,
    clip_denoised: bool = False,
    denoised_fn: Callable[[jax.Array], jax.Array] | None = None,
    return_trajectory: bool = False,
):
    """Samples by running every step of the (respaced) process in one compiled loop.

    Args:
      diffusion: the process and the meaning of the output.
      model_fn: model_fn(x, timesteps) is the model's output; timesteps (N,), int32, are those of
        the original process. See `guided_model_fn`.
      x_T: standard normal (N, ..., C), see `initial_noise`.
      noise_fn: noise_fn(i), with a traced int32 index () from T - 1 to 0, is standard normal of
        x_T's shape, see `step_noise`. What it gives for index 0 has no effect. May be None for
        "ddim" with eta=0, which draws none.
      sampler: a key of `SAMPLERS`.
      eta: for "ddim", a Python number from 0 (deterministic) to 1.
      clip_denoised: clip the predicted x_0 to [-1, 1] (for pixels, not for latents).
      denoised_fn: applied to the predicted x_0, before clipping.
      return_trajectory: return every step as well; takes T times the memory of x.

    Returns:
      The samples (N, ..., C), in float32 or better; with return_trajectory, samples and Trajectory.

    Raises:
      UsageError: an unknown sampler, an eta it does not have, missing noise, or a model whose
        channels do not fit the diffusion.
    """
    step = _find_step(sampler, eta, noise_fn)
    (x_T,) = as_float(x_T)

    def body(x, i):
        timesteps = jnp.broadcast_to(original_timesteps(diffusion, i), x.shape[:1])
        x_prev, x0 = step(
            diffusion,
            model_fn(x, timesteps),
            x,
            i,
            None if noise_fn is None else noise_fn(i),
            eta=eta,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
        )
        x_prev = x_prev.astype(x.dtype)
        return x_prev, Trajectory(x_prev, x0) if return_trajectory else None

    indices = jnp.arange(diffusion.num_steps, dtype=jnp.int32)
    samples, trajectory = jax.lax.scan(body, x_T, indices, reverse=True)
    if not return_trajectory:
        return samples
    return samples, jax.tree.map(lambda a: a[::-1], trajectory)


def _find_step(sampler: str, eta: float, noise_fn) -> Step:
    if sampler not in SAMPLERS:
        choices = " or ".join(map(repr, SAMPLERS))
        raise UsageError(f"sampler={sampler!r} is unknown: use {choices}")
    if noise_fn is None and (sampler != "ddim" or eta != 0):
        raise UsageError(
            f"sampler={sampler!r} with eta={eta} draws noise at every step: give a noise_fn, or "
            "use sampler='ddim' with eta=0"
        )
    return SAMPLERS[sampler]


def image_keys(seed: int, indices: Sequence[int] | np.ndarray | jax.Array) -> jax.Array:
    """One random key per image, of the seed and the image's index alone.

    Whatever batch and device an image falls into, its noise is the same. The generator is threefry,
    whatever `jax_default_prng_impl` says, since others do not promise that.

    Args:
      seed: the seed of a set of images, 0 to 2**32 - 1.
      indices: (N,) non-negative indices of images within the set.

    Returns:
      (N,) typed keys for `initial_noise` and `step_noise`, which fold in 0..T. Fold in numbers from
      2**31 on for draws of your own.

    Raises:
      UsageError: a seed out of range, which JAX would cut to 32 bits without a word.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed} must be from 0 to {2**32 - 1}")
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices, jnp.uint32))


def initial_noise(keys: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """x_T, (N, *shape) standard normal, of (N,) `image_keys` and an image's shape (H, W, C)."""
    return _normal(keys, 0, shape, dtype)


def step_noise(keys: jax.Array, i, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """The noise of step i: (N, *shape) standard normal.

    Args:
      keys: (N,) `image_keys`.
      i: the index of the step in the (respaced) process, a number or an integer array ().
      shape: the shape (H, W, C) of an image.
      dtype: float32 or float64.
    """
    return _normal(keys, jnp.asarray(i, jnp.uint32) + 1, shape, dtype)


def _normal(keys, stream, shape, dtype) -> jax.Array:
    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, stream), tuple(shape), dtype)

    return jax.vmap(draw)(keys)
