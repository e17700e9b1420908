"""Operations with a gradient of their own, and the plain forms that they stand for."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

_PLAIN = jax.make_user_context(False)  # jitted functions are traced anew where it changes


@contextlib.contextmanager
def plain_ops(enabled: bool = True) -> Iterator[None]:
    """What is traced inside takes every operation's plain form, so that JAX derives its gradient.

    `jax.jvp`, `jax.hessian` and all else that differentiates forwards or more than once needs this;
    a gradient takes more time and memory so. Without `enabled` all stays as it is outside.
    """
    with _PLAIN(True) if enabled else contextlib.nullcontext():
        yield


def wants_plain() -> bool:
    """Whether `plain_ops` is in force."""
    return _PLAIN.value


class Operation:
    """A function of arrays with a gradient of its own, used as a decorator of its plain form.

    Attributes:
      plain: the function as it is written down, which JAX can differentiate as often as one likes.
    """

    def __init__(self, plain: Callable[..., Any]):
        """The function as it is, until `defvjp` gives it its gradient."""
        functools.update_wrapper(self, plain)
        self.plain = self._special = plain

    def defvjp(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        primal: Callable[..., Any] | None = None,
    ) -> None:
        """Gives it a gradient as `jax.custom_vjp` takes it.

        Args:
          forward, backward: arguments to (results, residuals), and with cotangents to gradients.
          primal: what runs where no gradient is taken, the plain form if None.
        """
        self._special = jax.custom_vjp(primal or self.plain)
        self._special.defvjp(forward, backward)

    def __call__(self, *args: jax.Array, **named: jax.Array) -> Any:
        """The function's results, which can be differentiated once, backwards; or `plain`'s."""
        return (self.plain if wants_plain() else self._special)(*args, **named)
