"""Who asks for numbers: the commands, of files or of a checkpoint's samples, and a training run."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dico_jax.data.image_sets import SourceImages
from dico_jax.data.pictures import PictureReader
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.evaluation.classifier import load_classifier, train_classifier
from dico_jax.evaluation.evaluator import (
    METRICS,
    Batches,
    Evaluator,
    check_there,
    choose_metrics,
    create_evaluator,
    create_network,
    measure_images,
    open_images,
)
from dico_jax.evaluation.features import FeatureNetwork, make_feature_fn
from dico_jax.evaluation.statistics import save_statistics
from dico_jax.files import library_versions, result_path, write_json
from dico_jax.parallel.mesh import create_mesh
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler

_CLASSIFIER_FILE = "classifier.npz"
_REFERENCE_FILE = "reference.npz"
_MAX_OWN_PICTURES = 50_000


# The commands.


@dataclasses.dataclass(frozen=True)
class Options:
    """How images are measured.

    Attributes:
      features: "inception", or the file of a classifier.
      inception: file of Inception's weights; looked for, then downloaded, if None.
      metrics: names of `dico_jax.evaluation.evaluator.METRICS`; all that can be had if None.
      batch_size: images at a time.
    """

    features: str = "inception"
    inception: str | None = None
    metrics: tuple[str, ...] | None = None
    batch_size: int = 64

    def evaluator(self, reference: str, flag: str = "--reference") -> Evaluator:
        """See `create_evaluator`; on all devices."""
        check_there(reference, flag)  # before weights are loaded
        network = create_network(self.features, self.inception)
        size, mesh = self.batch_size, create_mesh()
        return create_evaluator(
            network, reference, self.metrics, batch_size=size, mesh=mesh, flag=flag
        )


def evaluate_files(
    path: str,
    reference: str,
    options: Options,
    out: str | None = None,
    *,
    num_samples: int | None = None,
) -> dict[str, Any]:
    """Measures pictures in files, prints a table, and writes `out`.

    Args:
      path: a folder of pictures or an .npz file with arr_0.
      reference: an .npz file or a folder of pictures, see docs/evaluation.md.
      options: how.
      out: a new JSON file.
      num_samples: so many of the first pictures; all if None.

    Returns:
      The result; its fields are in docs/evaluation.md.

    Raises:
      UsageError: something cannot be read or does not fit.
    """
    file = None if out is None else result_path(out, ".json")
    images = open_images(path, "--samples")
    evaluator = options.evaluator(reference)
    evaluator.network.check_images(images.shape, images.name)
    count = len(images) if num_samples is None else num_samples
    if count > len(images):
        raise UsageError("--num_samples", num_samples, f": {images.name} has {len(images)} images")
    samples = {"images": images.name, "count": count}

    def batches(start: int) -> Iterator[np.ndarray]:
        return images.batches(options.batch_size, start, count)

    result = measure(evaluator, batches, samples, file)
    _finish(result, file)
    return result


def evaluate_checkpoint(
    ckpt: str,
    reference: str,
    options: Options,
    out: str | None = None,
    *,
    num_samples: int,
    classes: str = "all",
    **sampler_options,
) -> dict[str, Any]:
    """Measures samples of a checkpoint, which are never written, and ends as `evaluate_files`.

    Args:
      ckpt: workdir of a run, or a converted checkpoint.
      reference, options, out: see `evaluate_files`.
      num_samples: how many.
      classes: see `CheckpointSampler.conditions`.
      **sampler_options: of `CheckpointSampler`.

    Raises:
      UsageError: something cannot be read or does not fit.
    """
    file = None if out is None else result_path(out, ".json")
    samples = CheckpointSamples(CheckpointSampler(ckpt, **sampler_options), num_samples, classes)
    result = measure(options.evaluator(reference), samples, samples.about, file)
    _finish(result, file)
    return result


class CheckpointSamples:
    """Samples of a checkpoint; called with the number of the first one, gives batches of them."""

    def __init__(self, sampler: CheckpointSampler, count: int, classes: str):
        """Chooses conditions.

        Args:
          sampler: makes them.
          count: how many.
          classes: see `CheckpointSampler.conditions`.
        """
        self.sampler, self._count, self._classes = sampler, count, classes
        self._conditions = sampler.conditions(count, classes)

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of them."""
        settings = json.loads(json.dumps(self.sampler.settings | {"classes": self._classes}))
        del settings["sampling"]["batch_size"]  # it does not change an image
        return settings | {"count": self._count}

    def __call__(self, start: int) -> Iterator[np.ndarray]:
        return self.sampler.images(self._conditions, start=start)


def prepare_reference(
    path: str,
    source: tuple[Source, PictureReader, int | None] | None,
    out: str,
    *,
    features: str,
    inception: str | None,
    batch_size: int,
) -> str:
    """Measures pictures and writes their statistics, with the features of each.

    Means and covariances that a file has besides its pictures are kept: those of ADM's files are
    of more pictures than lie in them.

    Args:
      path: a folder or an .npz file of pictures that are taken as they are.
      source: in place of them, the examples of a source, how they are read, and how many at most.
      out: a new .npz file.
      features, inception: see `create_network`.
      batch_size: pictures at a time.

    Returns:
      What was done, in a line.

    Raises:
      UsageError: something cannot be read or does not fit.
    """
    file = result_path(out, ".npz")
    if source is None:
        options = Options(features, inception, batch_size=batch_size)
        statistics = options.evaluator(path, "--path").reference
    else:
        network = create_network(features, inception)
        features_of = make_feature_fn(network, batch_size, create_mesh())
        statistics = measure_images(SourceImages(*source), network, features_of, batch_size)
    measured = statistics.pool_features
    if measured is None:
        raise UsageError(f"--path={path} has statistics and no images: use it as it is")
    if statistics.digest:
        made_of = {"path": path, "sha256": statistics.digest}
        statistics = dataclasses.replace(statistics, info=statistics.info | {"made_of": made_of})
    save_statistics(str(file), statistics)
    return f"{file} is written: {len(measured):,} pictures, features: {statistics.features}"


# Results.


def measure(
    evaluator: Evaluator, batches: Batches, samples: dict[str, Any], out: pathlib.Path | None
) -> dict[str, Any]:
    """The result for a set of images.

    Args:
      evaluator: measures.
      batches: see `Evaluator.summary`.
      samples: what the images are, with their "count".
      out: where the result is going to be written; beside it lies what is known on the way.
    """
    about = evaluator.about(samples)
    partial = None if out is None else partial_file(out)
    summary = evaluator.summary(batches, samples["count"], partial, about)
    return {
        "metrics": evaluator.numbers(summary),
        **about,
        "warnings": evaluator.warnings(summary),
        "versions": library_versions(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def partial_file(out: pathlib.Path) -> pathlib.Path:
    """Where an evaluation whose result goes to `out` keeps what is known on the way."""
    return out.with_name(f"{out.name}.partial.npz")


def _finish(result: dict[str, Any], file: pathlib.Path | None) -> None:
    if jax.process_index() != 0:
        return
    print(table(result))
    if file is not None:
        write_json(file, result)
        partial_file(file).unlink(missing_ok=True)


def table(result: dict[str, Any]) -> str:
    """A result as lines of text."""
    samples, reference, features = (result[k] for k in ("samples", "reference", "features"))
    count = reference["count"]
    lines = [
        f"{samples['count']:,} images against {reference['path']}"
        f"{f' ({count:,} images)' if count else ''}, features: {features['name']} "
        f"({features['sha256'][:8]})"
    ]
    width = max(map(len, result["metrics"]))
    lines += [f"  {name:<{width}}  {value:.6g}" for name, value in result["metrics"].items()]
    return "\n".join(lines + [f"warning: {text}" for text in result["warnings"]])


# Training.


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
        self._check()
        if self._options.features != "classifier":
            self._network = create_network(
                self._options.features, self._options.inception, "config.eval."
            )
            if self._options.reference is not None:
                self._evaluator = self._against(self._network, self._options.reference)

    def _check(self) -> None:
        options, source = self._options, self._source
        if options.num_samples < 2:
            raise UsageError("config.eval.num_samples", options.num_samples, "must be at least 2")
        if unknown := set(options.metrics) - set(METRICS):
            fix = f"is unknown: use some of {', '.join(METRICS)}"
            raise UsageError(f"config.eval.metrics: {min(unknown)!r} {fix}")
        if source.kind == "pictures":
            return
        lacks = f"config.data.source has {source.kind}, not pictures: give"
        if options.features == "classifier":
            raise UsageError(
                f"config.eval.features='classifier' is trained on pictures, but {lacks} the file "
                "of a classifier, or 'inception'"
            )
        if options.reference is None:
            raise UsageError(f"config.eval.reference is not set, and {lacks} an .npz of statistics")

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
        own = workdir / _REFERENCE_FILE
        if self._options.reference is not None or own.exists():
            self._evaluator = self._against(network, self._options.reference or str(own))
            return
        features = make_feature_fn(network, self._batch_size, self._mesh)
        images = SourceImages(self._source, self._read, _MAX_OWN_PICTURES)
        statistics = measure_images(images, network, features, self._batch_size)
        if jax.process_index() == 0:
            save_statistics(own, statistics)
        chosen = choose_metrics(self._options.metrics or None, statistics, str(own))
        self._evaluator = Evaluator(network, features, statistics, chosen, str(own))

    def __call__(self, samples: Callable[[Any, int], Iterator[np.ndarray]]) -> dict[str, float]:
        """The numbers, by "FEATURES/METRIC".

        Args:
          samples: function from the conditions of all samples, and the first one to make, to
            batches.
        """
        evaluator, count = self._evaluator, self._options.num_samples
        assert evaluator is not None, "open() comes first"
        conditions = self._conditions(np.arange(count))
        summary = evaluator.summary(lambda start: samples(conditions, start), count, progress=False)
        numbers = evaluator.numbers(summary)
        return {f"{evaluator.network.name}/{name}": value for name, value in numbers.items()}

    def _against(self, network: FeatureNetwork, reference: str) -> Evaluator:
        return create_evaluator(
            network,
            reference,
            self._options.metrics or None,
            batch_size=self._batch_size,
            mesh=self._mesh,
            flag="config.eval.reference",
        )

    def _classifier(self, file: pathlib.Path) -> FeatureNetwork:
        if file.exists():
            return load_classifier(file)
        classifier = train_classifier(self._source, self._read)
        if jax.process_index() == 0:
            classifier.save(file)
        return classifier
