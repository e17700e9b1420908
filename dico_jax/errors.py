"""The one exception for what a user can mend, and the one place where it is put into words."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

_LONGEST = 1500  # characters of a message's beginning, and of its end
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def shown(text: str) -> str:
    """A text with escapes in the place of what would change a terminal, or is not Unicode."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(message: Any) -> str:
    """A message in one line of bounded length; what to do stands at its end."""
    text = shown(" ".join(str(message).split()))
    return text if len(text) <= 2 * _LONGEST else f"{text[:_LONGEST]} ... {text[-_LONGEST:]}"


def several(parts: Sequence[str], most: int = 1000) -> str:
    """What a message lists, or the first of very many."""
    more = f"; and {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more


class UsageError(ValueError):
    """A wrong config field, flag, name, file or folder.

    Its text is a single line; the commands print it without a traceback, and exit with status 2.

    Args:
      field: what is wrong, as the user writes it: "config.model.name", "--ckpt", a file. Given
        alone, it is the whole text.
      value: what the field has.
      fix: what is wrong with it and what to do, such as "must be at least 1" or ": no such file".
    """

    def __init__(self, field: str, value: Any = ..., fix: str = ""):
        super().__init__(field, value, fix)
        self.field, self.value, self.fix = field, value, fix

    def __str__(self):
        if self.value is ...:
            return self.field
        shown = self.value if self.field.startswith("--") else repr(self.value)
        return f"{self.field}={shown}{'' if self.fix[:1] in ':;,' else ' '}{self.fix}"


class TrainingStopped(Exception):  # noqa: N818  it says what has happened
    """Training has ended before its last step for a reason that the message gives."""


@contextlib.contextmanager
def within(prefix: str) -> Iterator[None]:
    """Completes the name of the field that an error starts with, such as by "config.model."."""
    try:
        yield
    except UsageError as error:
        error.field = prefix + error.field
        raise
