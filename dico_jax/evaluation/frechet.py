"""The Frechet distance between two normal distributions: FID and sFID, given features."""

import numpy as np

from dico_jax.errors import UsageError

# Of a matrix that was stored in float16. What is further off is no covariance.
_ASYMMETRY = 1e-4
_NEGATIVE = 1e-3


def frechet_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """|mean1 - mean2|^2 + trace(C1 + C2 - 2 sqrt(C1 C2)), in float64.

    With C1 = R R^T, the trace of the root is the sum of the roots of the eigenvalues of R^T C2 R,
    which is symmetric. So it exists for covariances without full rank too, and nothing is added to
    their diagonals. Eigenvalues that rounding made negative count as 0.

    Args:
      mean1: (D,).
      covariance1: (D, D), symmetric.
      mean2: (D,).
      covariance2: (D, D), symmetric.

    Returns:
      The squared distance, at least 0.

    Raises:
      UsageError: shapes that do not fit, NaN or infinite values, or a matrix that is no covariance.
    """
    mean1, covariance1 = check_moments(mean1, covariance1, "the first mean and covariance")
    mean2, covariance2 = check_moments(mean2, covariance2, "the second mean and covariance")
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
    return vectors * np.sqrt(_without_negative(values, "the first covariance")), second


def _without_negative(eigenvalues: np.ndarray, what: str) -> np.ndarray:
    lowest, peak = float(eigenvalues.min()), float(np.abs(eigenvalues).max())
    if lowest < -_NEGATIVE * peak:
        raise UsageError(
            f"{what} has the eigenvalue {lowest:.3g} (the largest is {peak:.3g}), which no "
            "covariance has: compute the statistics again"
        )
    return np.maximum(eigenvalues, 0.0)
