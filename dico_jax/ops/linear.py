"""Linear layers over channels, with gradients of biases and gates summed in float32 or better."""

import jax
from jax import lax

from dico_jax.ops.cpu import apart, with_sums
from dico_jax.ops.plain import Operation, widened
from dico_jax.ops.pointwise import gelu, multiply_vector, times_slope, times_slope_by_quotient


@Operation
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The product x @ kernel + bias of x (N, ..., C), kernel (C, D) and bias (D,): (N, ..., D)."""
    return x @ kernel + bias


# Not `linear` itself forward, which would hide the product from a policy of what is kept.
@linear.gradient(lambda x, kernel, bias: (x @ kernel + bias, (x, kernel)))
def _linear_bwd(residuals, dy):
    x, kernel = residuals
    dy = dy.astype(x.dtype)
    total = with_sums(lambda sums, dy: sums.over_positions(widened, dy), dy)
    dbias = total.sum(0).astype(kernel.dtype)
    return _input_gradient(dy, kernel), _kernel_gradient(x, dy), dbias


@Operation
def gated_linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, gate: jax.Array) -> jax.Array:
    """`linear`, its results times a vector (N, D) per example."""
    return multiply_vector.plain(x @ kernel + bias, gate)


def _gated_linear_fwd(x, kernel, bias, gate):
    product = x @ kernel
    return multiply_vector.plain(product + bias, gate), (x, kernel, bias, gate, product)


@gated_linear.gradient(_gated_linear_fwd)
def _gated_linear_bwd(residuals, dy):
    x, kernel, bias, gate, product = residuals
    total, along = with_sums(_gate_sums, dy, product)
    dgate = along + widened(bias) * total
    dbias = (total * widened(gate)).sum(0)
    dy = apart(multiply_vector.plain, dy, gate).astype(x.dtype)
    dx, dkernel = _input_gradient(dy, kernel), _kernel_gradient(x, dy)
    return dx, dkernel, dbias.astype(bias.dtype), dgate.astype(gate.dtype)


def _gate_sums(sums, dy, product):
    """Sums over positions of dy and of dy times the product, (N, D)."""
    return sums.over_positions(widened, dy), sums.over_positions(
        lambda dy, product: widened(dy) * widened(product), dy, product
    )


@Operation
def linear_gelu(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The exact GELU of `linear`."""
    return gelu(x @ kernel + bias)


def _biased_gelu(product, bias):
    return gelu(product + bias)


def _linear_gelu(x, kernel, bias):
    def of_matrix(product, bias):  # XLA for CPU multiplies matrices: as one, it is read once
        return _biased_gelu(product.reshape(-1, *bias.shape), bias).reshape(product.shape)

    return lax.platform_dependent(x @ kernel, bias, cpu=of_matrix, default=_biased_gelu)


def _linear_gelu_fwd(x, kernel, bias):
    product = x @ kernel
    y = apart(_biased_gelu, product, bias)
    return y, (x, kernel, bias, product, y)


@linear_gelu.gradient(_linear_gelu_fwd, primal=_linear_gelu)
def _linear_gelu_bwd(residuals, dy):
    x, kernel, bias, product, y = residuals

    def slope(times):
        return lambda product, bias, y, dy: times(product + bias, y, dy)

    operands = product, bias, y, dy.astype(x.dtype)
    dy = apart(slope(times_slope), *operands, on_cpu=slope(times_slope_by_quotient))
    return _linear_bwd((x, kernel), dy)


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
    contracted = ((summed, summed), ((), ()))
    # One of the two is brought into another order; if it is dy, so is the result.
    if x.size <= dy.size + x.shape[-1] * dy.shape[-1]:
        return lax.dot_general(x, dy, contracted)
    return lax.dot_general(dy, x, contracted).T
