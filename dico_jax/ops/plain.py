"""What operations share: plain forms beside special gradients, the precision of sums, 3x3 taps."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dico_jax.errors import UsageError

_PLAIN = jax.make_user_context(False)  # jitted functions are traced anew where it changes

# Rows and columns of a 3x3 kernel: entry (i, j) is for the neighbour at (i - 1, j - 1).
TAPS = [(i, j) for i in range(3) for j in range(3)]


@contextlib.contextmanager
def plain_ops(enabled: bool = True) -> Iterator[None]:
    """What is traced inside takes every operation's plain form, if `enabled`.

    `jax.jvp`, `jax.hessian` and all else that differentiates forwards or more than once needs this.
    """
    with _PLAIN(True) if enabled else contextlib.nullcontext():
        yield


def wants_plain() -> bool:
    return _PLAIN.value


class Operation:
    """A decorator of a plain function of arrays, which gets a gradient of its own.

    A call can be differentiated once, backwards, but where `plain_ops` is in force.
    """

    def __init__(self, plain: Callable[..., Any]):
        functools.update_wrapper(self, plain)
        self.plain = self._special = plain

    def gradient(self, forward: Callable, primal: Callable | None = None) -> Callable:
        """Decorates its backward pass, as for `jax.custom_vjp`; `primal` runs without gradients."""

        def define(backward):
            self._special = jax.custom_vjp(primal or self.plain)
            self._special.defvjp(forward, backward)
            return backward

        return define

    def __call__(self, *args: jax.Array, **named: jax.Array) -> Any:
        return (self.plain if wants_plain() else self._special)(*args, **named)


def accumulation_dtype(dtype) -> jnp.dtype:
    """The dtype of statistics and sums for activations of `dtype`: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(x: jax.Array) -> jax.Array:
    return x.astype(accumulation_dtype(x.dtype))


def check_float64(field: str, dtype) -> None:
    """Raises UsageError for float64 where JAX would make float32 of it; `field` is what asked."""
    if jnp.dtype(dtype) == "float64" != jax.dtypes.canonicalize_dtype(dtype):
        raise UsageError(field, "float64", "needs JAX's own switch: set JAX_ENABLE_X64=1")


def zero_padded(x: jax.Array, by: int = 1) -> jax.Array:
    """X (N, H, W, C) with rings of zeros around its positions: (N, H + 2 by, W + 2 by, C)."""
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), (by, by, 0), (by, by, 0), (0, 0, 0)))


def direct_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3x3 convolution of x (N, H, W, C) by kernel (3, 3, C, D), zero padding 1 and stride 1."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=layout)


def direct_kernel_gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """Gradient of the kernel of `direct_conv3x3` for dy (N, H, W, D)."""
    return jax.vjp(lambda kernel: direct_conv3x3(x, kernel), kernel)[1](dy)[0]
