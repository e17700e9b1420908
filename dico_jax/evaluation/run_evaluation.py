"""FID and its family during training: `config.eval`."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dico_jax.data.image_sets import SourceImages
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.evaluation.classifier import NAME as CLASSIFIER
from dico_jax.evaluation.classifier import load_classifier, train_classifier
from dico_jax.evaluation.evaluator import (
    METRICS,
    Evaluator,
    check_weights,
    choose_metrics,
    create_evaluator,
    measure_images,
)
from dico_jax.evaluation.feature_networks import FeatureNetwork, make_feature_fn
from dico_jax.evaluation.registry import create_network
from dico_jax.evaluation.statistics import Statistics, open_reference, save_statistics

_CLASSIFIER_FILE = "classifier.npz"
_REFERENCE_FILE = "reference.npz"
_MAX_OWN_PICTURES = 50_000


class RunEvaluation:
    """Measures samples of a run, as `config.eval` asks. Making it checks and writes nothing."""

    def __init__(
        self,
        config: ConfigDict,
        source: Source,
        read: Callable[[Any, bool], np.ndarray],
        conditions: Callable[[np.ndarray], Any],
        mesh: Mesh,
    ):
        """Loads what is there already.

        Args:
          config: of the run.
          source, read: its examples.
          conditions: from the indices of samples (N,) to what the network is told of them.
          mesh: the devices.

        Raises:
          UsageError: naming the field, its value and the fix.
        """
        self._options, self._mesh = config.eval, mesh
        self._batch_size = config.sampling.batch_size
        self._source, self._read, self._conditions = source, read, conditions
        self._network: FeatureNetwork | None = None
        self._evaluator: Evaluator | None = None
        if not self._options.every_steps:
            return
        _check(self._options, source)
        if self._options.features != CLASSIFIER:
            self._network = create_network(
                self._options.features, self._options.inception, "config.eval."
            )
        if self._network is not None and self._options.reference is not None:
            self._evaluator = self._against(self._network)

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to measure after this step."""
        every = self._options.every_steps
        return every > 0 and (step % every == 0 or step == last_step)

    def open(self, workdir: pathlib.Path) -> None:
        """Makes what was not there: the classifier, and the statistics of the run's own pictures.

        Both are kept in `workdir`, so that a run that goes on measures as before.
        """
        if not self._options.every_steps or self._evaluator is not None:
            return
        network = self._network or self._classifier(workdir / _CLASSIFIER_FILE)
        if self._options.reference is not None:
            self._evaluator = self._against(network)
        else:
            self._evaluator = self._against_own(network, workdir / _REFERENCE_FILE)

    def __call__(self, samples: Callable[[Any, int], Iterator[np.ndarray]]) -> dict[str, float]:
        """The numbers, by "FEATURES/METRIC".

        Args:
          samples: from the conditions of all samples, and the first one to make, to batches.
        """
        evaluator = self._evaluator
        assert evaluator is not None, "open() comes first"
        conditions = self._conditions(np.arange(self._options.num_samples))
        summary = evaluator.summary(
            lambda start: samples(conditions, start), self._options.num_samples, progress=False
        )
        numbers = evaluator.numbers(summary)
        return {f"{evaluator.network.name}/{name}": value for name, value in numbers.items()}

    def _against(self, network: FeatureNetwork) -> Evaluator:
        return create_evaluator(
            network,
            self._options.reference,
            self._options.metrics or None,
            batch_size=self._batch_size,
            mesh=self._mesh,
            flag="config.eval.reference",
        )

    def _against_own(self, network: FeatureNetwork, file: pathlib.Path) -> Evaluator:
        features = make_feature_fn(network, self._batch_size, self._mesh)
        if file.exists():
            statistics = open_reference(str(file))
            assert isinstance(statistics, Statistics), "the run has written it"
            check_weights(statistics, network, str(file))
        else:
            images = SourceImages(self._source, self._read, _MAX_OWN_PICTURES)
            statistics = measure_images(images, network, features, self._batch_size)
            if jax.process_index() == 0:
                save_statistics(str(file), statistics)
        chosen = choose_metrics(self._options.metrics or None, statistics, str(file))
        return Evaluator(network, features, statistics, chosen)

    def _classifier(self, file: pathlib.Path) -> FeatureNetwork:
        if file.exists():
            return load_classifier(file)
        classifier = train_classifier(self._source, self._read)
        if jax.process_index() == 0:
            classifier.save(file)
        return classifier


def _check(options: ConfigDict, source: Source) -> None:
    if options.num_samples < 2:
        raise UsageError(f"config.eval.num_samples={options.num_samples} must be at least 2")
    for name in options.metrics:
        if name not in METRICS:
            raise UsageError(
                f"config.eval.metrics: {name!r} is unknown: use some of {', '.join(METRICS)}"
            )
    if source.kind == "pictures":
        return
    lacks = f"config.data.source has {source.kind}, not pictures: give"
    if options.features == CLASSIFIER:
        raise UsageError(
            f"config.eval.features={CLASSIFIER!r} is trained on pictures, but {lacks} the file of "
            "a classifier, or 'inception'"
        )
    if options.reference is None:
        raise UsageError(f"config.eval.reference is not set, and {lacks} an .npz of statistics")
