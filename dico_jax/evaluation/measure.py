"""Who asks for numbers: the commands, of files or of a checkpoint's samples, and a training run."""

import dataclasses
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
from dico_jax.evaluation.evaluator import (
    Batches,
    Evaluator,
    check_metrics,
    check_there,
    choose_metrics,
    create_evaluator,
    create_network,
    measure_images,
    open_images,
)
from dico_jax.evaluation.networks import (
    FeatureNetwork,
    load_classifier,
    make_feature_fn,
    train_classifier,
)
from dico_jax.evaluation.statistics import save_statistics
from dico_jax.files import result_path, write_json
from dico_jax.parallel.mesh import create_mesh
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler

_MAX_OWN_PICTURES = 50_000


# The commands.


@dataclasses.dataclass(frozen=True)
class Options:
    """How images are measured, see `create_network` and `create_evaluator`."""

    features: str = "inception"
    inception: str | None = None
    metrics: tuple[str, ...] | None = None
    batch_size: int = 64

    def evaluator(self, reference: str, flag: str = "--reference") -> Evaluator:
        """See `create_evaluator`; on all devices."""
        check_there(reference, flag)  # before weights are loaded
        network = create_network(self.features, self.inception)
        how: Any = {"batch_size": self.batch_size, "mesh": create_mesh(), "flag": flag}
        return create_evaluator(network, reference, self.metrics, **how)


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
    about = {"images": images.name, "count": count}

    def batches(start: int) -> Iterator[np.ndarray]:
        return images.batches(options.batch_size, start, count)

    return _finish(evaluator, batches, about, file)


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
    """Measures samples of a checkpoint, which are never written; else as `evaluate_files`.

    Args:
      ckpt: workdir of a run, or a converted checkpoint.
      reference, options, out: see `evaluate_files`.
      num_samples: how many.
      classes: see `CheckpointSampler.conditions`.
      **sampler_options: of `CheckpointSampler`.
    """
    file = None if out is None else result_path(out, ".json")
    samples = CheckpointSamples(CheckpointSampler(ckpt, **sampler_options), num_samples, classes)
    return _finish(options.evaluator(reference), samples, samples.about, file)


class CheckpointSamples:
    """Samples of a checkpoint; called with the number of the first one, gives batches of them."""

    def __init__(self, sampler: CheckpointSampler, count: int, classes: str):
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
      features, inception, batch_size: see `Options`.

    Returns:
      What was done, in a line.
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
    save_statistics(file, statistics)
    return f"{file} is written: {len(measured):,} pictures, features: {statistics.features}"


# Results.


def partial_file(out: pathlib.Path) -> pathlib.Path:
    """Where an evaluation whose result goes to `out` keeps what is known on the way."""
    return out.with_name(f"{out.name}.partial.npz")


def _finish(
    evaluator: Evaluator, batches: Batches, about: dict[str, Any], file: pathlib.Path | None
) -> dict[str, Any]:
    result = evaluator.measure(batches, about, file and partial_file(file))
    if jax.process_index() == 0:
        print(table(result))
        if file is not None:
            write_json(file, result)
            partial_file(file).unlink(missing_ok=True)
    return result


def table(result: dict[str, Any]) -> str:
    """A result as lines of text."""
    samples, reference, features = (result[k] for k in ("samples", "reference", "features"))
    count = f" ({reference['count']:,} images)" if reference["count"] else ""
    lines = [
        f"{samples['count']:,} images against {reference['path']}{count}, features: "
        f"{features['name']} ({features['sha256'][:8]})"
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
        """Loads what is there already; UsageError, naming the field, where that cannot work.

        `source` and `read` give the run's examples; `conditions` makes, of the indices of samples
        (N,), what the network is told of them.
        """
        self._options, self._conditions = config.eval, conditions
        self._source, self._read = source, read
        self._how: Any = {"batch_size": config.sampling.batch_size, "mesh": mesh}
        self._network: FeatureNetwork | None = None
        self._evaluator: Evaluator | None = None
        if not self._options.every_steps:
            return
        self._check()
        if self._options.features != "classifier":
            files = self._options.features, self._options.inception
            self._network = create_network(*files, "config.eval.")
            if self._options.reference is not None:
                self._evaluator = self._against(self._network, self._options.reference)

    def _check(self) -> None:
        options, source = self._options, self._source
        if options.num_samples < 2:
            raise UsageError("config.eval.num_samples", options.num_samples, "must be at least 2")
        check_metrics(options.metrics, "config.eval.")
        lacks = f"config.data.source has {source.kind}, not pictures: give"
        if source.kind != "pictures" and options.features == "classifier":
            raise UsageError(
                f"config.eval.features='classifier' is trained on pictures, but {lacks} the file "
                "of a classifier, or 'inception'"
            )
        if source.kind != "pictures" and options.reference is None:
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
        network = self._network or self._classifier(workdir / "classifier.npz")
        own, metrics = workdir / "reference.npz", self._options.metrics or None
        if self._options.reference is not None or own.exists():
            self._evaluator = self._against(network, self._options.reference or str(own))
            return
        features = make_feature_fn(network, **self._how)
        images = SourceImages(self._source, self._read, _MAX_OWN_PICTURES)
        found = measure_images(images, network, features, self._how["batch_size"])
        if jax.process_index() == 0:
            save_statistics(own, found)
        chosen = choose_metrics(metrics, found, str(own), False)
        self._evaluator = Evaluator(network, features, found, chosen, str(own))

    def __call__(self, samples: Callable[[Any, int], Iterator[np.ndarray]]) -> dict[str, float]:
        """The numbers, by "FEATURES/METRIC".

        `samples` makes, of the conditions of all and the first one to make, batches.
        """
        evaluator, count = self._evaluator, self._options.num_samples
        assert evaluator is not None, "open() comes first"
        conditions = self._conditions(np.arange(count))
        result = evaluator.measure(
            lambda start: samples(conditions, start), {"count": count}, progress=False
        )
        return {
            f"{evaluator.network.name}/{key}": value for key, value in result["metrics"].items()
        }

    def _against(self, network: FeatureNetwork, reference: str) -> Evaluator:
        metrics, flag = self._options.metrics or None, "config.eval.reference"
        return create_evaluator(network, reference, metrics, **self._how, flag=flag)

    def _classifier(self, file: pathlib.Path) -> FeatureNetwork:
        if file.exists():
            return load_classifier(file)
        classifier = train_classifier(self._source, self._read)
        if jax.process_index() == 0:
            classifier.save(file)
        return classifier
