"""Distances between the features of two sets: FID and sFID (Frechet's), and KID (a kernel's).

The samples come first, the reference second, here as everywhere.
"""

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.evaluation.moments import check_rows, check_same_width

# Of a matrix that was stored in float16. What is further off is no covariance.
_ASYMMETRY = 1e-4
_NEGATIVE = 1e-3


def frechet_distance(
    sample_mean: np.ndarray,
    sample_covariance: np.ndarray,
    reference_mean: np.ndarray,
    reference_covariance: np.ndarray,
) -> float:
    """|m1 - m2|^2 + trace(C1 + C2 - 2 sqrt(C1 C2)) of two normal distributions, in float64.

    With C1 = R R^T, the trace of the root is the sum of the roots of the eigenvalues of R^T C2 R,
    which is symmetric. So it exists for covariances without full rank too, and nothing is added to
    their diagonals. Eigenvalues that rounding made negative count as 0.

    Args:
      sample_mean, reference_mean: (D,).
      sample_covariance, reference_covariance: (D, D), symmetric.

    Returns:
      The squared distance, at least 0; the same either way round.

    Raises:
      UsageError: shapes that do not fit, NaN or infinite values, or a matrix that is no covariance.
    """
    mean1, covariance1 = check_moments(sample_mean, sample_covariance, "the samples")
    mean2, covariance2 = check_moments(reference_mean, reference_covariance, "the reference")
    if len(mean1) != len(mean2):
        raise UsageError(
            f"means of {len(mean1)} and {len(mean2)} numbers cannot be compared: take both from "
            "one feature network"
        )
    root, other = _root_of_one(covariance1, covariance2)
    product = root.T @ other @ root
    products = np.linalg.eigvalsh((product + product.T) / 2)
    products = _without_negative(products, "the product of the covariances")
    delta = mean1 - mean2
    traces = np.trace(covariance1) + np.trace(covariance2)
    return max(0.0, float(delta @ delta + traces - 2 * np.sum(np.sqrt(products))))


def check_moments(
    mean: np.ndarray, covariance: np.ndarray, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """A mean (D,) and a covariance (D, D) in float64.

    Raises:
      UsageError: starting with `what`: other shapes, NaN or infinite values, not symmetric.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or not mean.size:
        raise UsageError(f"{what}: the mean has shape {mean.shape}, and must have one axis")
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise UsageError(f"{what}: the covariance has shape {covariance.shape}, and must be square")
    if len(covariance) != len(mean):
        raise UsageError(
            f"{what}: a covariance of shape {covariance.shape} does not fit a mean of {len(mean)} "
            "numbers: they must come from the same features"
        )
    for name, array in (("mean", mean), ("covariance", covariance)):
        bad = np.count_nonzero(~np.isfinite(array))
        if bad:
            raise UsageError(
                f"{what}: {bad} of {array.size} numbers of the {name} are NaN or infinite: "
                "compute them again, from finite features"
            )
    off = np.max(np.abs(covariance - covariance.T))
    if off > _ASYMMETRY * np.max(np.abs(covariance)):
        raise UsageError(
            f"{what}: the covariance is not symmetric (by up to {off:.2g}): compute it again"
        )
    return mean, covariance


def rank_warning(count: int, width: int) -> str | None:
    """A warning for a covariance of `count` rows of `width` numbers that lacks full rank, or None.

    The distance can be computed then, but it is biased, and far from what more samples give.
    """
    if count > width:
        return None
    return (
        f"{count} samples are fewer than the {width + 1} that a covariance of {width} features "
        "needs for full rank: the distance is biased upwards; published figures have 50,000 samples"
    )


def _root_of_one(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R with R R^T one of the two covariances, and the other one.

    Cholesky's factor, which takes a twentieth of the time of an eigendecomposition, where one of
    them has full rank.
    """
    for matrix, other in ((first, second), (second, first)):
        try:
            return np.linalg.cholesky(matrix), other
        except np.linalg.LinAlgError:
            continue
    values, vectors = np.linalg.eigh(first)
    return vectors * np.sqrt(_without_negative(values, "the covariance of the samples")), second


def _without_negative(eigenvalues: np.ndarray, what: str) -> np.ndarray:
    lowest, peak = float(eigenvalues.min()), float(np.abs(eigenvalues).max())
    if lowest < -_NEGATIVE * peak:
        raise UsageError(
            f"{what} has the eigenvalue {lowest:.3g} (the largest is {peak:.3g}), which no "
            "covariance has: compute the statistics again"
        )
    return np.maximum(eigenvalues, 0.0)


def kernel_distance(
    sample_features: np.ndarray,
    reference_features: np.ndarray,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """The Kernel Inception Distance (Binkowski et al., arXiv 1801.01401): the squared maximum mean
    discrepancy of random subsets, unbiased, in float64.

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


def squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate for x (N, D) and y (M, D); a row is not compared with itself."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    within = [_kernel(z, z) for z in (x, y)]
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within]
    return float(sum(means) - 2 * _kernel(x, y).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3
