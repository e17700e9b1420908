"""scikit-learn's digits, described in words that are measured on each picture."""

import re
from typing import Any

import numpy as np

from dico_jax.data.sources import DigitsSource

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Of each measure five levels of equally many pictures of a digit, from the least to the most.
THICKNESS = ("very thin", "thin", "medium", "thick", "very thick")
SLANT = ("leaning far left", "leaning left", "upright", "leaning right", "leaning far right")
SIZE = ("tiny", "small", "middling", "large", "huge")
POSITION = ("far left", "left", "middle", "right", "far right")

_PHRASES = (
    "a {thickness} {digit} {slant}",
    "{thickness} {digit}, {slant}",
    "{digit}, {thickness} and {slant}",
    "a {size} {thickness} {digit} {slant} at the {position}",
    "the digit {digit}, {slant}, {thickness}, {size}",
)

_SAID = " ".join((*_PHRASES, *DIGITS, *THICKNESS, *SLANT, *SIZE, *POSITION))
# Every word and mark of the captions, in order of the alphabet.
VOCABULARY = " ".join(sorted(set(re.findall(r"[a-z]+|,", re.sub(r"{\w+}", "", _SAID)))))


def measures(images: np.ndarray) -> dict[str, np.ndarray]:
    """What is seen on images of bright ink, (N, H, W) or (N, H, W, 1): float64 (N,) each.

    "thickness" is the ink per length of its outline, in pixels; "slant" the shift to the right, in
    pixels, of ink that is one pixel higher; "size" the deviation of the ink from its middle, in
    pixels; "position" the column of the middle.
    """
    ink = np.asarray(images, np.float64).reshape(*images.shape[:3]) / 255
    _, height, width = ink.shape
    total = ink.sum((1, 2)) + 1e-9
    rows, columns = np.arange(height)[:, None] * 1.0, np.arange(width)[None] * 1.0

    def mean(values):
        return (ink * values).sum((1, 2)) / total

    row, column = mean(rows), mean(columns)
    off_rows = rows - row[:, None, None]
    off_columns = columns - column[:, None, None]
    var_rows, var_columns = mean(off_rows**2), mean(off_columns**2)
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    outline = sum(np.abs(np.diff(padded, axis=axis)).sum((1, 2)) for axis in (1, 2))
    return {
        "thickness": 2 * total / (outline + 1e-9),
        "slant": -mean(off_rows * off_columns) / (var_rows + 1e-9),
        "size": np.sqrt(var_rows + var_columns),
        "position": column,
    }


def levels(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The level 0 to 4 of each value among those of the same label, int (N,)."""
    found = np.zeros(len(values), int)
    for label in np.unique(labels):
        same = labels == label
        bounds = np.quantile(values[same], [0.2, 0.4, 0.6, 0.8])
        found[same] = np.searchsorted(bounds, values[same], side="right")
    return found


class WordedDigits(DigitsSource):
    """The digits with `captions`, the same measures in several phrasings; examples keep labels."""

    def __init__(self):
        super().__init__()
        self.measures = measures(self._examples)
        words = {"thickness": THICKNESS, "slant": SLANT, "size": SIZE, "position": POSITION}
        found = {name: levels(values, self._labels) for name, values in self.measures.items()}
        self._words = {n: [words[n][k] for k in found[n]] for n in words}

    def __getitem__(self, index) -> dict[str, Any]:
        example = super().__getitem__(index)
        words = {name: of_all[index] for name, of_all in self._words.items()}
        words["digit"] = DIGITS[example["label"]]
        return example | {"captions": [phrase.format(**words) for phrase in _PHRASES]}

    def __repr__(self):
        return "WordedDigits()"
