"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

The manifold of a set is the union of balls around its points, each up to the k-th nearest other
point, edge included. Precision is the share of samples inside the manifold of the reference, recall
the share of the reference inside that of the samples. All distances are squared.
"""

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.evaluation import manifolds_adm_float16, manifolds_exact
from dico_jax.evaluation.kid import check_same_width
from dico_jax.evaluation.moments import check_rows

_MANIFOLDS = {"exact": manifolds_exact, "adm_float16": manifolds_adm_float16}
DISTANCES = tuple(_MANIFOLDS)


def precision_recall(
    reference_features: np.ndarray,
    sample_features: np.ndarray,
    k: int = 3,
    distances: str = "exact",
) -> tuple[float, float]:
    """Precision and recall of samples against a reference.

    "exact" decides as exact distances of the features would: tiles in float32 on the default device
    give bounds, and what they leave open is computed in float64 on the host. "adm_float16" is the
    published evaluator of ADM, to the rounding (of TensorFlow on a CPU): features, norms and
    products in float16, and float32 for blocks of 10,000 where one distance is not finite. Recall
    differs by up to about 0.005 between the two, so name which one a figure is.

    Args:
      reference_features: (M, D) of any floating dtype, on the host.
      sample_features: (N, D).
      k: which nearest neighbour is the radius.
      distances: "exact" or "adm_float16".

    Raises:
      UsageError: fewer than k + 1 rows, features of two widths, NaN or infinite ones, an unknown
        name.
    """
    reference_inside, samples_inside = manifold_members(
        reference_features, sample_features, k, distances
    )
    return float(samples_inside.mean()), float(reference_inside.mean())


def manifold_members(
    reference_features: np.ndarray,
    sample_features: np.ndarray,
    k: int = 3,
    distances: str = "exact",
) -> tuple[np.ndarray, np.ndarray]:
    """Who lies inside whose manifold; arguments and errors of `precision_recall`.

    Returns:
      bool (M,), which of the reference lie inside the manifold of the samples, and bool (N,), which
      samples lie inside that of the reference.
    """
    reference = check_rows(reference_features, "reference features")
    samples = check_rows(sample_features, "sample features")
    check_same_width(samples, reference)
    radii = [manifold_radii(features, k, distances) for features in (reference, samples)]
    return _MANIFOLDS[distances].members_of(reference, radii[0], samples, radii[1])


def manifold_radii(features: np.ndarray, k: int = 3, distances: str = "exact") -> np.ndarray:
    """The squared distance of every row to its k-th nearest other row, float64 (N,).

    "adm_float16" counts neighbours as the published evaluator does: it takes entry k of a row's
    sorted distances, for which the row itself need not be the nearest after rounding.

    Raises:
      UsageError: fewer than k + 1 rows, NaN or infinite ones, an unknown name.
    """
    features = check_rows(features, "features")
    if distances not in DISTANCES:
        raise UsageError(f"distances={distances!r} must be one of {', '.join(DISTANCES)}")
    if k < 1:
        raise UsageError(f"k={k} must be at least 1")
    if len(features) <= k:
        raise UsageError(
            f"{len(features)} rows of features have no neighbour k={k}: give at least {k + 1}"
        )
    return _MANIFOLDS[distances].radii_of(features, k)
