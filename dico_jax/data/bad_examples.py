"""Examples that cannot be read: skipped, counted, listed in a file, and an error when too many."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from dico_jax.data.pictures import BadExample
from dico_jax.errors import UsageError

MAX_BAD_FIELD = "config.data.max_bad_fraction"

_LISTED = 10


def too_many_bad(
    bad: Mapping[str, str], num_examples: int, max_bad_fraction: float, field: str = MAX_BAD_FIELD
) -> UsageError:
    """The error that stops for bad examples (id to reason); `field` is what sets the fraction."""
    listed = "; ".join(f"{name}: {reason}" for name, reason in list(bad.items())[:_LISTED])
    more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    return UsageError(
        f"{field}={max_bad_fraction}: {len(bad)} of {num_examples} examples cannot "
        f"be read ({listed}{more}): mend or remove them, or allow more"
    )


class BadExampleLog:
    """The bad examples met so far, in a file with one JSON object {"id", "reason"} a line."""

    def __init__(
        self,
        source,
        read,
        max_bad_fraction: float,
        file: pathlib.Path | None = None,
        read_condition=lambda example: {},
    ):
        """Takes up what the file already has, and what the source skipped when it was opened.

        Args:
          source: the examples.
          read: their reader, which raises BadExample.
          max_bad_fraction: of all examples; more is an error.
          file: made when there is something to write; None keeps no file.
          read_condition: the other reader of the examples, which may raise BadExample, too.

        Raises:
          UsageError: there are already too many.
        """
        self._source, self._read, self._fraction = source, read, max_bad_fraction
        self._read_condition = read_condition
        self._file = file
        self.bad: dict[str, str] = {}
        if file is not None and file.exists():
            lines = [line for line in file.read_text().split("\n")[:-1] if line.endswith("}")]
            self.bad = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
        for name, reason in source.skipped.items():
            self._note(name, reason)
        self._check()

    def add_skipped(self, index: np.ndarray, skipped: np.ndarray) -> None:
        """Notes the `skipped[i]` examples before example `index[i]`, for every i of a batch.

        Raises:
          UsageError: now there are too many.
        """
        for at in np.flatnonzero(skipped):
            for back in range(1, int(skipped[at]) + 1):
                self._examine(int(index[at] - back) % len(self._source))
        self._check()

    def _examine(self, index: int) -> None:
        """Reads an example once more, here, for the reason."""
        name = self._source.example_id(index)
        if name in self.bad:
            return
        try:
            example = self._source[index]
            self._read(example["image"], False)
            self._read_condition(example)
        except BadExample as error:
            self._note(name, str(error))

    def _note(self, name: str, reason: str) -> None:
        if name in self.bad:
            return
        self.bad[name] = reason
        if self._file is not None:
            with self._file.open("a") as stream:
                stream.write(json.dumps({"id": name, "reason": reason}) + "\n")

    def _check(self) -> None:
        total = len(self._source) + len(self._source.skipped)
        if len(self.bad) > self._fraction * total:
            raise too_many_bad(self.bad, total, self._fraction)
