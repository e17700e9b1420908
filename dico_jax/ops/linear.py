"""Linear layers over channels, or 1x1 convolutions, with gradients of their own.

Biases and gates get gradients that are summed in float32 or better. The kernel's is a product that
needs one of its arrays in another order: written as here, XLA for CPU moves the smaller ones only.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.ops.precision import accumulation_dtype, widened
from dico_jax.ops.vectors import over_positions


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The product x @ kernel + bias of x (N, ..., C), kernel (C, D) and bias (D,): (N, ..., D)."""
    return x @ kernel + bias


def _linear_fwd(x, kernel, bias):
    # Not `linear` itself, which would hide the product from a policy of what is kept.
    return x @ kernel + bias, (x, kernel)


def _linear_bwd(residuals, dy):
    x, kernel = residuals
    dy = dy.astype(x.dtype)
    dbias = widened(dy).sum(tuple(range(dy.ndim - 1)))
    return dy @ kernel.T, _kernel_gradient(x, dy), dbias.astype(kernel.dtype)


linear.defvjp(_linear_fwd, _linear_bwd)


@jax.custom_vjp
def gated_linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, gate: jax.Array) -> jax.Array:
    """A linear layer whose results are multiplied by a vector per example.

    Args:
      x: (N, ..., C) activations, any floating dtype.
      kernel, bias, gate: (C, D), (D,) and (N, D), dtype of x.

    Returns:
      (x @ kernel + bias) * gate, (N, ..., D) of x's dtype.
    """
    return (x @ kernel + bias) * over_positions(gate, x)


def _gated_linear_fwd(x, kernel, bias, gate):
    ungated = x @ kernel + bias
    return ungated * over_positions(gate, x), (x, kernel, gate, ungated)


def _gated_linear_bwd(residuals, dy):
    x, kernel, gate, ungated = residuals
    positions = tuple(range(1, dy.ndim - 1))
    dgate = (widened(dy) * widened(ungated)).sum(positions)
    dbias = (widened(dy).sum(positions) * widened(gate)).sum(0)
    dkernel = lax.platform_dependent(
        x, dy, gate, cpu=_gated_kernel_gradient_on_cpu, default=_gated_kernel_gradient
    )
    dx = _gated(dy, gate) @ kernel.T
    return dx, dkernel, dbias.astype(kernel.dtype), dgate.astype(gate.dtype)


gated_linear.defvjp(_gated_linear_fwd, _gated_linear_bwd)


def _kernel_gradient(x, dy):
    """The sum over all positions of the products of x (N, ..., C) and dy (N, ..., D): (C, D)."""
    summed = tuple(range(x.ndim - 1))
    if x.ndim == 2:  # few rows: bringing x into another order costs less than the result
        return lax.dot_general(x, dy, ((summed, summed), ((), ())))
    return lax.dot_general(dy, x, ((summed, summed), ((), ()))).T


def _gated(dy, gate):
    return (dy * over_positions(gate, dy)).astype(dy.dtype)


def _gated_kernel_gradient(x, dy, gate):
    return _kernel_gradient(x, _gated(dy, gate))


def _gated_kernel_gradient_on_cpu(x, dy, gate):
    """The same with the gate after the product, for products of images.

    A gate in the loop that transposes dy takes five times as long as the transposing alone. But
    each example then has a gradient: only where that is no larger than the example itself.
    """
    if x.size // x.shape[-1] < x.shape[0] * dy.shape[-1]:
        return _gated_kernel_gradient(x, dy, gate)
    summed = tuple(range(1, x.ndim - 1))
    wide = accumulation_dtype(x.dtype)
    examples = lax.dot_general(
        dy, x, ((summed, summed), ((0,), (0,))), preferred_element_type=wide
    )  # (N, D, C)
    return jnp.einsum("ndc,nd->cd", examples, gate.astype(wide)).astype(x.dtype)
