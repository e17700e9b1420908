"""The project's own small set of numbers, which is always there (see make_numbers.py)."""

import jax
import numpy as np
import pytest

from tests.golden import distance
from tests.make_numbers import FILE, MODELS, compute

# Five sampling steps with clipping enlarge the rounding of float32, and every processor rounds in
# its own way.
BARS = {"float64": 1e-10, "float32": 1e-4}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] * (dtype == "float64"))
        for name in MODELS
        for dtype in BARS
    ],
)
def test_own_numbers(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        ours = compute(name, dtype)
    with np.load(FILE) as recorded:
        assert {k for k in recorded.files if k.startswith(f"{name}/")} == {
            f"{name}/{key}" for key in ours
        }
        for key, value in ours.items():
            assert distance(value, recorded[f"{name}/{key}"]) < BARS[dtype], key
