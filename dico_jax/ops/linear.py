"""Linear layers over channels, or 1x1 convolutions, with gradients of their own.

Biases and gates get gradients that are summed in float32 or better. The kernel's is a product that
needs one of its arrays in another order: written as here, XLA for CPU moves the smaller ones only.
"""

import jax
from jax import lax

from dico_jax.ops.cpu import apart, with_sums
from dico_jax.ops.gelu import gelu, times_slope, times_slope_by_quotient
from dico_jax.ops.plain import Operation
from dico_jax.ops.precision import widened
from dico_jax.ops.vectors import over_positions


@Operation
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The product x @ kernel + bias of x (N, ..., C), kernel (C, D) and bias (D,): (N, ..., D)."""
    return x @ kernel + bias


def _linear_fwd(x, kernel, bias):
    # Not `linear` itself, which would hide the product from a policy of what is kept.
    return x @ kernel + bias, (x, kernel)


def _linear_bwd(residuals, dy):
    x, kernel = residuals
    dy = dy.astype(x.dtype)
    dbias = with_sums(_position_sums, dy).sum(0).astype(kernel.dtype)
    return _input_gradient(dy, kernel), _kernel_gradient(x, dy), dbias


linear.defvjp(_linear_fwd, _linear_bwd)


@Operation
def gated_linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, gate: jax.Array) -> jax.Array:
    """A linear layer whose results are multiplied by a vector per example.

    Args:
      x: (N, ..., C) activations, any floating dtype.
      kernel, bias, gate: (C, D), (D,) and (N, D), dtype of x.

    Returns:
      (x @ kernel + bias) * gate, (N, ..., D) of x's dtype.
    """
    return _gated(x @ kernel + bias, gate)


def _gated_linear_fwd(x, kernel, bias, gate):
    product = x @ kernel
    return _gated(product + bias, gate), (x, kernel, bias, gate, product)


def _gated_linear_bwd(residuals, dy):
    x, kernel, bias, gate, product = residuals
    total, along = with_sums(_gate_sums, dy, product)
    dgate = along + widened(bias) * total
    dbias = (total * widened(gate)).sum(0)
    dy = apart(_gated, dy, gate).astype(x.dtype)
    return (
        _input_gradient(dy, kernel),
        _kernel_gradient(x, dy),
        dbias.astype(bias.dtype),
        dgate.astype(gate.dtype),
    )


gated_linear.defvjp(_gated_linear_fwd, _gated_linear_bwd)


@Operation
def linear_gelu(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The exact GELU of a linear layer.

    Args:
      x: (N, ..., C) activations, any floating dtype.
      kernel, bias: (C, D) and (D,), dtype of x.

    Returns:
      gelu(x @ kernel + bias), (N, ..., D) of x's dtype.
    """
    return gelu(x @ kernel + bias)


def _linear_gelu_fwd(x, kernel, bias):
    product = x @ kernel
    y = apart(_biased_gelu, product, bias)
    return y, (x, kernel, bias, product, y)


def _linear_gelu_bwd(residuals, dy):
    x, kernel, bias, product, y = residuals

    def slope(times):
        return lambda product, bias, y, dy: times(product + bias, y, dy)

    operands = product, bias, y, dy.astype(x.dtype)
    dy = apart(slope(times_slope), *operands, on_cpu=slope(times_slope_by_quotient))
    return _linear_bwd((x, kernel), dy)


def _linear_gelu(x, kernel, bias):
    def of_matrix(product, bias):  # XLA for CPU multiplies matrices: as one, it is read once
        return _biased_gelu(product.reshape(-1, *bias.shape), bias).reshape(product.shape)

    return lax.platform_dependent(x @ kernel, bias, cpu=of_matrix, default=_biased_gelu)


linear_gelu.defvjp(_linear_gelu_fwd, _linear_gelu_bwd, primal=_linear_gelu)


def _biased_gelu(product, bias):
    return gelu(product + bias)


def _gated(y, gate):
    return y * over_positions(gate, y)


def _position_sums(sums, dy):
    return sums.over_positions(widened, dy)


def _gate_sums(sums, dy, product):
    """Sums over positions of dy and of dy times the product, (N, D)."""
    return sums.over_positions(widened, dy), sums.over_positions(
        lambda dy, product: widened(dy) * widened(product), dy, product
    )


def _input_gradient(dy, kernel):
    """The product dy @ kernel.T of dy (N, ..., D) and kernel (C, D): (N, ..., C)."""
    if dy.ndim > 2:
        return dy @ kernel.T

    def transposed(kernel, dy):  # the few rows are brought into another order, not the kernel
        return lax.dot_general(kernel, dy, (((1,), (1,)), ((), ())))

    return apart(transposed, kernel, dy).T


def _kernel_gradient(x, dy):
    """The sum over all positions of the products of x (N, ..., C) and dy (N, ..., D): (C, D)."""
    summed = tuple(range(x.ndim - 1))
    result = x.shape[-1] * dy.shape[-1]
    # One of the two is brought into another order; if it is dy, so is the result.
    if x.size <= dy.size + result:
        return lax.dot_general(x, dy, ((summed, summed), ((), ())))
    return lax.dot_general(dy, x, ((summed, summed), ((), ()))).T
