"""The exact GELU and its derivative from what Pallas kernels have; to be traced into a kernel."""

import math

import jax.numpy as jnp


def normal_cdf_and_pdf(y):
    """Phi(y) and phi(y) of the standard normal distribution, float32.

    Phi by the formula 7.1.26 of Abramowitz and Stegun, off by at most 1e-7: neither Triton nor
    older Mosaic have erf, and this shares its exponential with phi.
    """
    bell = jnp.exp(-0.5 * y * y)
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(y))
    polynomial = jnp.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + coefficient) * t
    tail = 0.5 * polynomial * bell  # Phi(-|y|)
    return jnp.where(y > 0, 1 - tail, tail), bell * (1 / math.sqrt(2 * math.pi))


def gelu(y):
    """Y * Phi(y)."""
    return y * normal_cdf_and_pdf(y)[0]


def gelu_slope(y):
    """The derivative of `gelu`."""
    cdf, pdf = normal_cdf_and_pdf(y)
    return cdf + y * pdf
