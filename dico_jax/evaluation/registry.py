"""Feature networks by name."""

from dico_jax.errors import UsageError
from dico_jax.evaluation.classifier import load_classifier
from dico_jax.evaluation.feature_networks import FeatureNetwork

INCEPTION = "inception"


def create_network(features: str, inception: str | None, flag: str = "--") -> FeatureNetwork:
    """The network that makes the features, with its weights.

    Args:
      features: "inception", or the file of a classifier.
      inception: file of Inception's weights; looked for, then downloaded, if None.
      flag: what messages put before the names of these arguments.

    Raises:
      UsageError: its weights cannot be had.
    """
    if features == INCEPTION:
        # A late import: most who name a classifier have no need of it.
        from dico_jax.evaluation.inception_features import InceptionFeatures

        return InceptionFeatures.load(inception, flag)
    if inception is not None:
        raise UsageError(
            f"{flag}inception={inception} is for {flag}features=inception, not for {features!r}"
        )
    return load_classifier(features)
