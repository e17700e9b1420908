"""Classes by number or by name: those of the data, and those of ImageNet with their synonyms."""

import difflib
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from dico_jax.errors import UsageError

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """ImageNet's 1,000 classes in their order: WordNet id to "name, synonym, ..."."""
    return dict(line.split(" ", 1) for line in _IMAGENET.read_text().splitlines())


class ClassNames:
    """The classes of a network, of which some or all have names.

    Without names of their own 1,000 classes are ImageNet's. A class that is named by a WordNet id
    has that class's names as well. `by_name` has, per name in lower case, its classes.
    """

    def __init__(self, num_classes: int, own: Sequence[str] = ()):
        """`own` are names of classes 0, 1, ..., as the data has them."""
        known = imagenet_classes()
        self._num_classes = num_classes
        self._own = list(own or ([*known] if num_classes == len(known) else []))
        self._synonyms = [known.get(name, "") for name in self._own]
        self.by_name: dict[str, list[int]] = {}
        for number, (name, synonyms) in enumerate(zip(self._own, self._synonyms, strict=True)):
            for each in {name, synonyms, *synonyms.split(", ")} - {""}:
                self.by_name.setdefault(each.casefold(), []).append(number)

    def title(self, number: int) -> str:
        """The name of a class for a person to read, or its number."""
        if number >= len(self._own):
            return str(number)
        return self._synonyms[number].split(", ")[0] or self._own[number]

    def lines(self) -> list[str]:
        """Per class its number and its names."""
        lacking = [""] * (self._num_classes - len(self._own))
        names = zip(self._own + lacking, self._synonyms + lacking, strict=True)
        return [f"{number} {own} {known}".rstrip() for number, (own, known) in enumerate(names)]

    def numbers(self, asked: str | Sequence[str | int]) -> list[int]:
        """The classes that are asked for, by numbers or names in a list or between commas.

        UsageError for what is no class, or may be several.
        """
        if isinstance(asked, str):
            known = sorted((name for name in self.by_name if "," in name), key=len, reverse=True)
            pattern = rf"(?:^|,)\s*({'|'.join(map(re.escape, known))}|[^,]*?)\s*(?=,|$)"
            parts: Sequence[str | int] = re.findall(pattern, asked, re.IGNORECASE)  # longest first
        else:
            parts = asked
        return [self._number(part, asked) for part in parts]

    def _number(self, part: Any, asked: str | Sequence[str | int]) -> int:
        part = part.tolist() if hasattr(part, "tolist") else part  # one of an array
        text = f"#{part}" if (by_number := type(part) is int) else str(part)
        digits = text.removeprefix("#")
        found = {int(digits)} if digits.isdecimal() and int(digits) < self._num_classes else set()
        if not by_number:  # which may be names, too
            found |= {number for number, name in enumerate(self._own) if name == text}
            found = found or {*self.by_name.get(text.casefold(), [])}
        if len(both := sorted(found)) > 1:
            fix = f": {part} may be each of classes {both[:9]}: write #{both[0]}, or another"
            raise UsageError("--classes", str(asked), fix)
        if both:
            return both[0]
        close = difflib.get_close_matches(text.casefold(), self.by_name, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        fix = f": the model has no class {part}, use 0 to {self._num_classes - 1}, names, "
        raise UsageError("--classes", str(asked), f"{fix}'all' or 'random'{hint}")
