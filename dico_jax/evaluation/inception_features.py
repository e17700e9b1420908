"""The FID Inception network as a feature network."""

from typing import Any

import jax

from dico_jax.errors import UsageError
from dico_jax.evaluation.feature_networks import Features, repeat_grey
from dico_jax.evaluation.inception import NUM_FEATURES, NUM_LOGITS, SPATIAL_CHANNELS, Inception
from dico_jax.evaluation.inception_weights import InceptionWeights, load_inception

_OTHER_WEIGHTS = (
    "these are not the published weights of Inception: the numbers compare with no other ones"
)


class InceptionFeatures:
    """TensorFlow's Inception of 2015-12-05, as ADM's evaluator uses it; a `FeatureNetwork`."""

    name = "inception"
    width = NUM_FEATURES
    spatial_width = 17 * 17 * SPATIAL_CHANNELS
    num_classes = NUM_LOGITS

    cpu_batch_size = 2  # more do not fit its caches

    def __init__(self, weights: InceptionWeights):
        """The network with these weights."""
        self.params: Any = weights.params
        self.digest = weights.digest
        self.warning = None if weights.is_published else _OTHER_WEIGHTS

    @classmethod
    def load(cls, path: str | None, flag: str = "--") -> "InceptionFeatures":
        """The network with weights of a file.

        Args:
          path: the file; looked for, then downloaded, if None.
          flag: what messages put before "inception".

        Raises:
          UsageError: they cannot be had.
        """
        return cls(load_inception(path, flag=f"{flag}inception"))

    def check_images(self, shape: tuple[int, int, int], name: str) -> None:
        """Raises UsageError unless images are grey or RGB; any size is scaled to 299x299."""
        if shape[-1] not in (1, 3):
            raise UsageError(f"{name} has images of {shape[-1]} channels: 1 or 3 are needed")

    def apply(self, params: Any, images: jax.Array) -> Features:
        """See `FeatureNetwork`."""
        taps: Any = Inception().apply({"params": params}, repeat_grey(images))
        return Features(taps["pool"], taps["spatial"], taps["logits"])
