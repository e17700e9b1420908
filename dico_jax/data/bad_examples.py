"""Examples that cannot be read: skipped, counted, listed in a file, and an error when too many."""

import json
from collections.abc import Mapping

import numpy as np

from dico_jax.data.pictures import BadExample
from dico_jax.errors import UsageError, several
from dico_jax.files import append, json_lines

_FIELD = "config.data.max_bad_fraction"
_LISTED = 10


def too_many_bad(
    bad: Mapping[str, str], num_examples: int, fraction: float, field: str = _FIELD
) -> UsageError:
    """The error that stops for bad examples (id to reason); `field` is what sets the fraction."""
    listed = several([f"{name}: {reason}" for name, reason in bad.items()], _LISTED)
    what = f": {len(bad)} of {num_examples} examples cannot be read ({listed})"
    return UsageError(field, fraction, f"{what}: mend or remove them, or allow more")


def check_bad(bad: Mapping[str, str], num_examples: int, fraction: float, *field: str) -> None:
    """Raises `too_many_bad` where there are."""
    if len(bad) > fraction * num_examples:
        raise too_many_bad(dict(bad), num_examples, fraction, *field)


class BadExampleLog:
    """The bad examples met so far, in a file with one JSON object {"id", "reason", "step"} a line.

    "step" is the one that the first batch without the example is for, or the start of the run.
    """

    def __init__(self, source, read, max_bad_fraction: float, file=None, read_condition=None,
                 start_step: int = 0):  # fmt: skip
        """Takes up what the file already has, and what the source skipped when it was opened.

        `read` and `read_condition` are the readers of its examples, `start_step` the steps before
        the first batch. More bad ones than the fraction are a UsageError, here and later. The file
        is made when there is something to write.
        """
        self._source, self._fraction, self._file = source, max_bad_fraction, file
        self._read, self._read_condition, self._step = read, read_condition, start_step
        self.bad: dict[str, str] = {}
        if file is not None:
            entries = json_lines(file, lambda entry: {entry["id"]: entry["reason"]})
            self.bad = {entry["id"]: entry["reason"] for entry in entries}
        for name, reason in source.skipped.items():
            self._note(name, reason)
        self._check()

    def add_skipped(self, index: np.ndarray, skipped: np.ndarray) -> None:
        """Notes the `skipped[i]` examples before example `index[i]`, for every i of a batch."""
        self._step += 1
        for at in np.flatnonzero(skipped):
            for back in range(1, int(skipped[at]) + 1):
                self._examine(int(index[at] - back) % len(self._source))
        self._check()

    def _examine(self, index: int) -> None:
        try:
            example = self._source[index]
            self._read(example["image"], False)
            if self._read_condition is not None:
                self._read_condition(example)
        except BadExample as error:
            self._note(self._source.example_id(index), str(error))

    def _note(self, name: str, reason: str) -> None:
        if name not in self.bad:
            self.bad[name] = reason
            if self._file is not None:
                entry = {"id": name, "reason": reason, "step": self._step}
                append(self._file, (json.dumps(entry) + "\n").encode())

    def _check(self) -> None:
        check_bad(self.bad, len(self._source) + len(self._source.skipped), self._fraction)


class GoodExamples:
    """A source for what looks at it: in place of a bad example stands the next good one."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        for k in range(count := len(self)):
            try:
                return self._source[(index + k) % count]
            except BadExample:  # counted where it is trained on
                continue
        raise UsageError(f"{self._source!r} has no example that can be read")
