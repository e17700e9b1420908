"""FID and its family of images in files, or of a checkpoint's samples; what `evaluate` runs."""

import dataclasses
import datetime
import decimal
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dico_jax.data.image_sets import ImageSet, SourceImages
from dico_jax.data.pictures import PictureReader
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.evaluation.evaluator import (
    Batches,
    check_there,
    create_evaluator,
    describe_reference,
    measure_images,
    open_images,
)
from dico_jax.evaluation.feature_networks import make_feature_fn
from dico_jax.evaluation.plots import plot_sweep, require_matplotlib
from dico_jax.evaluation.registry import create_network
from dico_jax.evaluation.statistics import save_statistics
from dico_jax.files import library_versions, result_path, write_json
from dico_jax.parallel.mesh import create_mesh
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler


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


class Evaluation:
    """Measures sets of images against one reference."""

    def __init__(self, reference: str, options: Options):
        """Loads the network and the reference; of a reference of images, measures them.

        Args:
          reference: an .npz file or a folder of pictures, see docs/evaluation.md.
          options: how.

        Raises:
          UsageError: something cannot be read or does not fit.
        """
        check_there(reference, "--reference")  # before weights are loaded
        self._options = options
        self._evaluator = create_evaluator(
            create_network(options.features, options.inception),
            reference,
            options.metrics,
            batch_size=options.batch_size,
            mesh=create_mesh(),
        )
        self._about_reference = describe_reference(reference, self._evaluator.reference)

    def of_images(self, images: ImageSet, num_samples: int | None, out: pathlib.Path | None):
        """The result for pictures in files; its fields are in docs/evaluation.md.

        Args:
          images: the pictures.
          num_samples: so many of the first ones; all if None.
          out: where the result is going to be written; beside it lies what is known on the way.
        """
        self._evaluator.network.check_images(images.shape, images.name)
        count = len(images) if num_samples is None else num_samples
        if count > len(images):
            raise UsageError(f"--num_samples={count}: {images.name} has {len(images)} images")
        size = self._options.batch_size
        samples = {"images": images.name, "count": count}
        return self._result(lambda start: images.batches(size, start, count), samples, out)

    def of_sampler(
        self,
        sampler: CheckpointSampler,
        conditions: Any,
        count: int,
        classes: str,
        out: pathlib.Path | None,
    ) -> dict[str, Any]:
        """The result for samples of a checkpoint, which are never written.

        Args:
          sampler: makes them.
          conditions: of all samples, see `CheckpointSampler.conditions`.
          count: how many there are.
          classes: what the conditions are made of.
          out: as for `of_images`.
        """
        samples = samples_of(sampler, count, classes)
        return self._result(lambda start: sampler.images(conditions, start=start), samples, out)

    def about(self, samples: dict[str, Any]) -> dict[str, Any]:
        """What a result says of its origin, but for versions, devices and date."""
        network = self._evaluator.network
        return {
            "metric_names": list(self._evaluator.metrics),
            "samples": samples,
            "reference": self._about_reference,
            "features": {"name": network.name, "sha256": network.digest},
        }

    def _result(
        self, batches: Batches, samples: dict[str, Any], out: pathlib.Path | None
    ) -> dict[str, Any]:
        evaluator, about = self._evaluator, self.about(samples)
        kept = {"keeps_features": evaluator.keeps_features}
        partial = None if out is None else _partial(out)
        summary = evaluator.summary(batches, samples["count"], partial, about | kept)
        return {
            "metrics": evaluator.numbers(summary),
            **about,
            "warnings": evaluator.warnings(summary),
            "versions": library_versions(),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }


def samples_of(sampler: CheckpointSampler, count: int, classes: str) -> dict[str, Any]:
    """What a result says of samples of a checkpoint."""
    settings = json.loads(json.dumps(sampler.settings | {"classes": classes}))
    del settings["sampling"]["batch_size"]  # it does not change an image
    return settings | {"count": count}


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
      reference, options: see `Evaluation`.
      out: a new JSON file.
      num_samples: so many of the first pictures; all if None.

    Raises:
      UsageError: something cannot be read or does not fit.
    """
    file = None if out is None else result_path(out, ".json")
    images = open_images(path, "--samples")
    result = Evaluation(reference, options).of_images(images, num_samples, file)
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
    sweep_cfg: str | None = None,
    **sampler_options,
) -> dict[str, Any]:
    """Measures samples of a checkpoint, prints a table, and writes `out`.

    Args:
      ckpt: workdir of a run, or a converted checkpoint.
      reference, options: see `Evaluation`.
      out: a JSON file; it must be new, but for a sweep that goes on.
      num_samples: how many.
      classes: see `CheckpointSampler.conditions`.
      sweep_cfg: guidance scales, see `parse_sweep`; the result then is {"sweep": [a result per
        scale]}, and a plot lies beside `out`.
      **sampler_options: of `CheckpointSampler`.

    Raises:
      UsageError: something cannot be read or does not fit.
    """
    file = None if out is None else pathlib.Path(out)
    if file is not None and sweep_cfg is None:
        result_path(str(file), ".json")
    scales = None if sweep_cfg is None else parse_sweep(sweep_cfg)
    if scales is not None:
        require_matplotlib("--sweep_cfg")
    sampler = CheckpointSampler(ckpt, **sampler_options)
    conditions = sampler.conditions(num_samples, classes)
    evaluation = Evaluation(reference, options)
    if scales is None:
        result = evaluation.of_sampler(sampler, conditions, num_samples, classes, file)
        _finish(result, file)
        return result
    assert file is not None
    return {"sweep": _sweep(evaluation, sampler, conditions, num_samples, classes, scales, file)}


def _sweep(
    evaluation: Evaluation,
    sampler: CheckpointSampler,
    conditions: Any,
    count: int,
    classes: str,
    scales: Sequence[float],
    file: pathlib.Path,
) -> list[dict[str, Any]]:
    """Measures the guidance scales that `file` lacks, one after the other, and plots all."""
    results = _read_sweep(file)
    for scale in scales:
        sampler.set_guidance(scale)
        _check_same_sweep(evaluation.about(samples_of(sampler, count, classes)), results, file)
        if scale not in map(_scale_of, results):
            part = file.with_name(f"{file.stem}-{scale}.json")
            results.append(evaluation.of_sampler(sampler, conditions, count, classes, part))
            _write(file, {"sweep": results})
            _partial(part).unlink(missing_ok=True)
        print(f"guidance scale {scale}: {_line(next(r for r in results if _scale_of(r) == scale))}")
    plot_sweep(file.with_suffix(".png"), sorted(results, key=_scale_of))
    return results


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
    file, mesh = result_path(out, ".npz"), create_mesh()
    if source is None:
        check_there(path, "--path")  # before weights are loaded
    network = create_network(features, inception)
    if source is None:
        evaluator = create_evaluator(
            network, path, None, batch_size=batch_size, mesh=mesh, flag="--path"
        )
        statistics = evaluator.reference
    else:
        features_of = make_feature_fn(network, batch_size, mesh)
        statistics = measure_images(SourceImages(*source), network, features_of, batch_size)
    measured = statistics.pool_features
    if measured is None:
        raise UsageError(f"--path={path} has statistics and no images: use it as it is")
    if statistics.digest:
        made_of = {"path": path, "sha256": statistics.digest}
        statistics = dataclasses.replace(statistics, info=statistics.info | {"made_of": made_of})
    save_statistics(str(file), statistics)
    return f"{file} is written: {len(measured):,} pictures, features: {network.name}"


def parse_sweep(text: str) -> tuple[float, ...]:
    """The numbers from A to B by steps of C, both ends included, of "A:B:C".

    Raises:
      UsageError: something else, or no numbers at all.
    """
    try:
        first, last, step = (decimal.Decimal(part) for part in text.split(":"))
        if not (first >= 0 and step > 0 and last >= first):
            raise ValueError
    except (ValueError, ArithmeticError) as error:
        raise UsageError(
            f"--sweep_cfg={text}: write the first scale, the last and the step, such as 1.0:2.0:0.1"
        ) from error
    count = int((last - first) / step) + 1
    return tuple(float(first + i * step) for i in range(count))


# Files of results.


def _partial(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f"{out.name}.partial.npz")


def _write(file: pathlib.Path, value: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_json(file, value)


def _finish(result: dict[str, Any], file: pathlib.Path | None) -> None:
    if jax.process_index() != 0:
        return
    print(table(result))
    if file is not None:
        _write(file, result)
        _partial(file).unlink(missing_ok=True)


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


# Sweeps.


def _scale_of(result: dict[str, Any]) -> float:
    return result["samples"]["sampling"]["cfg_scale"]


def _line(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in result["metrics"].items())


def _read_sweep(file: pathlib.Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text())["sweep"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--out={file} is no result of a sweep: give another name") from error


def _check_same_sweep(about: dict, others: list[dict], file: pathlib.Path) -> None:
    """Raises UsageError where results differ in more than the guidance scale."""

    def rest(found):
        sampling = {k: v for k, v in found["samples"]["sampling"].items() if k != "cfg_scale"}
        about = {k: found[k] for k in ("metric_names", "reference", "features")}
        return about | {"samples": found["samples"] | {"sampling": sampling}}

    for other in others:
        if rest(other) != rest(about):
            raise UsageError(f"--out={file} is of another sweep: give another name")
