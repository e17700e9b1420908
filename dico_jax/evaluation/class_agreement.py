"""Two numbers for small labelled sets of pictures, where Inception features mean nothing.

Class agreement: the share of generated images that a classifier fitted on the real ones takes for
the class they were asked for. Spread: the mean distance between two generated images of a class
over that of two real ones, which falls towards 0 when a class collapses.
"""

import dataclasses
import importlib.util

import numpy as np

from dico_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ClassAgreement:
    """The result of `class_agreement`.

    Attributes:
      num_samples: how many generated images were judged.
      classifier_accuracy: share of held-out real images that the classifier gets right.
      agreement: share of generated images taken for the class they were asked for.
      spread: mean over classes of the generated over the real mean pairwise distance.
    """

    num_samples: int
    classifier_accuracy: float
    agreement: float
    spread: float

    def __str__(self):
        return (
            f"class agreement {self.agreement:.1%} of {self.num_samples} samples, "
            f"spread {self.spread:.3f} of the real images' "
            f"(the classifier is right on {self.classifier_accuracy:.1%} of unseen real images)"
        )


def class_agreement(
    real_images: np.ndarray,
    real_labels: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
) -> ClassAgreement:
    """Judges generated images by a support vector classifier fitted on real ones.

    The classifier (RBF kernel) is fitted on three quarters of the real images, and its own accuracy
    is taken on the rest.

    Args:
      real_images: uint8 (M, H, W, C).
      real_labels: (M,) ints.
      images: uint8 (N, H, W, C), generated.
      labels: (N,) ints, the classes asked for.

    Raises:
      UsageError: scikit-learn is not installed.
    """
    require_sklearn("class_agreement")
    from sklearn import model_selection, svm

    real, generated = _flatten(real_images), _flatten(images)
    fit_x, held_x, fit_y, held_y = model_selection.train_test_split(
        real, real_labels, test_size=0.25, random_state=0, stratify=real_labels
    )
    classifier = svm.SVC(C=10.0, gamma="scale").fit(fit_x, fit_y)
    ratios = [
        mean_pairwise_distance(generated[labels == c])
        / mean_pairwise_distance(real[real_labels == c])
        for c in np.unique(labels)
    ]
    return ClassAgreement(
        num_samples=len(images),
        classifier_accuracy=float(classifier.score(held_x, held_y)),
        agreement=float(np.mean(classifier.predict(generated) == labels)),
        spread=float(np.mean(ratios)),
    )


def require_sklearn(field: str) -> None:
    """Raises UsageError, naming what needs it, where scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError(f"{field} needs scikit-learn: pip install 'dico_jax[demo]'")


def mean_pairwise_distance(x: np.ndarray) -> float:
    """The mean Euclidean distance between two different rows of x (N, D), N at least 2."""
    squares = np.sum(x**2, axis=1)
    squared = np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0)
    return float(np.sqrt(squared)[~np.eye(len(x), dtype=bool)].mean())


def _flatten(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 255
