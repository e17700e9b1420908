"""The size of a tree from a file, as a program sees it that walks it without knowing of sharing.

A few bytes of a pickle can say "this list, twice" thirty times over, or put a list into itself.
"""

import argparse
from typing import NoReturn

from dico_jax.errors import UsageError

_MAX_DEPTH = 64
_MAX_VALUES = 2_000_000


def check_tree(tree: object, where: str, leaves: tuple[type, ...]) -> None:
    """Refuses a tree that is too deep, too large, contains itself, or has a strange leaf.

    Args:
      tree: of dict, list, tuple and argparse.Namespace, perhaps with shared parts.
      where: what messages call it, with its file.
      leaves: the types of leaves besides str, int, float, bool and None.

    Raises:
      UsageError: more than 64 levels, more than two million values, or another type.
    """
    _Measure(where, leaves).measure(tree, 0)


class _Measure:
    """Walks a tree, shared parts once."""

    def __init__(self, where: str, leaves: tuple[type, ...]):
        self.where = where
        self.leaves: tuple[type, ...] = (str, int, float, type(None), *leaves)
        self.done: dict[int, tuple[int, int]] = {}  # id -> (values below, levels below)

    def measure(self, value: object, level: int) -> tuple[int, int]:
        """(values, levels) of the tree under `value`, which lies `level` levels deep."""
        count, levels = self.done.get(id(value), (0, 0))
        if not count:
            if isinstance(value, self.leaves):
                return 1, 1
            if level >= _MAX_DEPTH:
                self.refuse(f"is nested more than {_MAX_DEPTH} levels deep, or contains itself")
            below = [self.measure(v, level + 1) for v in self.children(value)]
            count = 1 + sum(c for c, _ in below)
            levels = 1 + max((n for _, n in below), default=0)
            self.done[id(value)] = count, levels
        if count > _MAX_VALUES:
            self.refuse(f"stands for more than {_MAX_VALUES} values, by repeating shared ones")
        if level + levels > _MAX_DEPTH + 1:
            self.refuse(f"is nested more than {_MAX_DEPTH} levels deep")
        return count, levels

    def children(self, value: object) -> list[object]:
        """The values that `value` holds."""
        if isinstance(value, argparse.Namespace):
            return list(vars(value).values())
        if isinstance(value, dict):
            return list(value.values())
        if type(value) in (list, tuple):
            return list(value)  # type: ignore[call-overload]
        what = getattr(value, "name", type(value).__name__)
        self.refuse(f"holds {what} by itself, which is not data and is refused")

    def refuse(self, what: str) -> NoReturn:
        raise UsageError(f"{self.where} {what}")
