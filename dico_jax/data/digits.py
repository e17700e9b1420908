"""scikit-learn's handwritten digits."""

from typing import Any

import numpy as np

from dico_jax.errors import UsageError


class DigitsSource:
    """1,797 pictures of handwritten digits: uint8 (8, 8, 1), ink 255, ten classes."""

    kind = "pictures"

    def __init__(self):
        """Loads the digits.

        Raises:
          UsageError: scikit-learn is not installed.
        """
        try:
            from sklearn import datasets
        except ImportError as error:
            raise UsageError(
                "data.source='digits' needs scikit-learn: pip install 'dico_jax[demo]'"
            ) from error
        digits = datasets.load_digits()
        self._images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        self._labels = digits.target.astype(np.int32)
        self.class_names = [str(i) for i in range(10)]
        self.skipped: dict[str, str] = {}

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index) -> dict[str, Any]:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def example_id(self, index) -> str:
        """The position of a digit."""
        return str(range(len(self))[index])

    def __repr__(self):
        return "DigitsSource()"
