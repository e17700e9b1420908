"""Classes by number or by name: those of the data, and those of ImageNet with their synonyms."""

import difflib
import functools
import pathlib
import re
from collections.abc import Sequence

from dico_jax.errors import UsageError

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_classes.txt")


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """ImageNet's 1,000 classes in their order: WordNet id to "name, synonym, ..."."""
    return dict(line.split(" ", 1) for line in _IMAGENET.read_text().splitlines())


class ClassNames:
    """The classes of a network, of which some or all have names.

    Without names of their own 1,000 classes are ImageNet's. A class that is named by a WordNet id
    has that class's names as well.
    """

    def __init__(self, num_classes: int, own: Sequence[str] = ()):
        """`own` are names of classes 0, 1, ..., as the data has them."""
        known = imagenet_classes()
        self._num_classes = num_classes
        self._own = list(own or ([*known] if num_classes == len(known) else []))
        self._synonyms = [known.get(name, "") for name in self._own]
        self._names: dict[str, list[int]] = {}  # the classes of every name, in lower case
        for number, (name, synonyms) in enumerate(zip(self._own, self._synonyms, strict=True)):
            for each in {name, synonyms, *synonyms.split(", ")} - {""}:
                self._names.setdefault(each.casefold(), []).append(number)

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
            known = sorted((name for name in self._names if "," in name), key=len, reverse=True)
            pattern = rf"(?:^|,)\s*({'|'.join(map(re.escape, known))}|[^,]*?)\s*(?=,|$)"
            parts: Sequence[str | int] = re.findall(pattern, asked, re.IGNORECASE)  # longest first
        else:
            parts = asked
        return [self._number(str(part), asked) for part in parts]

    def _number(self, part: str, asked: str | Sequence[str | int]) -> int:
        digits, text = part.removeprefix("#"), str(asked)
        found = {number for number, name in enumerate(self._own) if name == part}
        found |= {int(digits)} if digits.isdecimal() and int(digits) < self._num_classes else set()
        found = found or {*self._names.get(part.casefold(), [])}
        if len(both := sorted(found)) > 1:
            fix = f": {part} may be each of classes {both[:9]}: write #{both[0]}, or another"
            raise UsageError("--classes", text, fix)
        if both:
            return both[0]
        close = difflib.get_close_matches(part.casefold(), self._names, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        fix = f": the model has no class {part}, use 0 to {self._num_classes - 1}, names, "
        raise UsageError("--classes", text, f"{fix}'all' or 'random'{hint}")
