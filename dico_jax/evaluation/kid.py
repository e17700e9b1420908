"""The Kernel Inception Distance (Binkowski et al., arXiv 1801.01401)."""

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.evaluation.moments import check_rows

_BLOCK = 1024  # rows and columns of a part of a kernel matrix


def kernel_distance(
    sample_features: np.ndarray,
    reference_features: np.ndarray,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """The squared maximum mean discrepancy of random subsets, unbiased, in float64.

    The kernel is (x . y / D + 1)^3. Per subset, rows of the samples are drawn without replacement,
    then rows of the reference, by `numpy.random.RandomState(seed)`, as torch-fidelity draws them.

    Args:
      sample_features: (N, D) of any floating dtype.
      reference_features: (M, D).
      num_subsets: how many subsets.
      subset_size: rows of each that a subset has, at least 2.
      seed: of the subsets.

    Returns:
      The mean and the standard deviation (divided by their number) over the subsets. The mean may
      be below 0.

    Raises:
      UsageError: subsets that do not fit, features of two widths, NaN or infinite ones.
    """
    samples = check_rows(sample_features, "sample features")
    reference = check_rows(reference_features, "reference features")
    check_same_width(samples, reference)
    if num_subsets < 1:
        raise UsageError(f"num_subsets={num_subsets} must be at least 1")
    fewest = min(len(samples), len(reference))
    if not 2 <= subset_size <= fewest:
        raise UsageError(
            f"subset_size={subset_size} does not fit {len(samples)} samples and {len(reference)} "
            f"reference features: it must be in 2 to {fewest}"
        )
    random = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        rows = samples[random.choice(len(samples), subset_size, replace=False)]
        others = reference[random.choice(len(reference), subset_size, replace=False)]
        values.append(squared_discrepancy(rows, others))
    return float(np.mean(values)), float(np.std(values))


def check_same_width(samples: np.ndarray, reference: np.ndarray) -> None:
    """Raises UsageError unless the rows of both have as many numbers."""
    if samples.shape[1] != reference.shape[1]:
        raise UsageError(
            f"sample features of {samples.shape[1]} numbers and reference features of "
            f"{reference.shape[1]} cannot be compared: take both from one feature network"
        )


def squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate for x (N, D) and y (M, D); a row is not compared with itself."""
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - _kernel_diagonal(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - _kernel_diagonal(y)) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for rows in _blocks(x):
        total += sum(
            float(np.sum((rows @ others.T / x.shape[1] + 1) ** 3)) for others in _blocks(y)
        )
    return total


def _kernel_diagonal(x: np.ndarray) -> float:
    return sum(
        float(np.sum((np.sum(rows**2, axis=1) / x.shape[1] + 1) ** 3)) for rows in _blocks(x)
    )


def _blocks(x: np.ndarray):
    for start in range(0, len(x), _BLOCK):
        yield x[start : start + _BLOCK].astype(np.float64)
