"""What is kept of the features of a set of images."""

import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from dico_jax.errors import UsageError
from dico_jax.evaluation.feature_networks import FeatureNetwork, Features
from dico_jax.evaluation.inception_score import InceptionScore
from dico_jax.evaluation.moments import Moments
from dico_jax.evaluation.statistics import Statistics


class FeatureSummary:
    """What is kept of the features of a set of images, to be added to batch by batch."""

    def __init__(self, network: FeatureNetwork, keep_features: bool):
        """Starts with no images.

        Args:
          network: that the features come from.
          keep_features: keep those of every image, which precision, recall and KID need.
        """
        self.pool = Moments(network.width)
        self.spatial = Moments(network.spatial_width) if network.spatial_width else None
        self.score = InceptionScore(network.num_classes)
        self._kept: list[np.ndarray] | None = [] if keep_features else None

    @property
    def count(self) -> int:
        """Number of images."""
        return self.pool.count

    @property
    def pool_features(self) -> np.ndarray | None:
        """Those of all images, float32 (N, D), or None if they are not kept."""
        if self._kept is None:
            return None
        kept = np.concatenate(self._kept)
        self._kept = [kept]
        return kept

    def add(self, features: Features) -> None:
        """Adds the next images.

        Raises:
          UsageError: a feature is not finite.
        """
        self.pool.update(features.pool)
        if self.spatial is not None:
            self.spatial.update(features.spatial)
        self.score.update(features.logits)
        if self._kept is not None:
            self._kept.append(features.pool)

    def statistics(self, features: str, info: dict[str, Any]) -> Statistics:
        """This summary as a reference."""
        return Statistics(
            features=features,
            mean=self.pool.mean,
            covariance=self.pool.covariance,
            spatial_mean=self.spatial.mean if self.spatial else None,
            spatial_covariance=self.spatial.covariance if self.spatial else None,
            pool_features=self.pool_features,
            count=self.count,
            info=info,
        )

    def save(self, path: pathlib.Path, about: dict[str, Any]) -> None:
        """Writes the summary, to go on later; `about` says what it is of."""
        parts = {"pool": self.pool, "spatial": self.spatial, "score": self.score}
        arrays: Any = {
            f"{name}/{key}": value
            for name, part in parts.items()
            if part is not None
            for key, value in part.to_arrays().items()
        }
        if self._kept is not None:
            arrays["kept"] = self.pool_features if self._kept else np.zeros((0, 0))
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, about=text, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: pathlib.Path, about: dict[str, Any]) -> None:
        """Goes on from what `save` has written.

        Raises:
          UsageError: it is damaged, or of something else than `about`.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = json.loads(arrays["about"].tobytes())
                if found == json.loads(json.dumps(about)):
                    self._take(arrays)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} is damaged: remove it to start again ({error})") from error
        differing = [k for k in found if found.get(k) != json.loads(json.dumps(about)).get(k)]
        if differing:
            raise UsageError(
                f"{path} was left by an evaluation of something else ({', '.join(differing)}): "
                "give another --out, or remove it"
            )

    def _take(self, arrays) -> None:
        def part(name):
            return {
                key.removeprefix(f"{name}/"): arrays[key]
                for key in arrays.files
                if key.startswith(f"{name}/")
            }

        self.pool = Moments.from_arrays(part("pool"))
        self.spatial = Moments.from_arrays(part("spatial")) if self.spatial else None
        self.score = InceptionScore.from_arrays(part("score"))
        if self._kept is not None:
            kept = arrays["kept"]
            self._kept = [kept] if len(kept) else []
