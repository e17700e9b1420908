"""Who asks for numbers: the commands, of files or of a checkpoint's samples, and a training run."""

import dataclasses
import decimal
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dico_jax.data.image_sets import SourceImages
from dico_jax.data.pipeline import Reader
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.evaluation import evaluator as evaluators
from dico_jax.evaluation import networks
from dico_jax.evaluation.clip_score import CLIP_SCORE, ClipScorer, texts_of
from dico_jax.evaluation.evaluator import Evaluator, check_there, create_network, measure_images
from dico_jax.evaluation.statistics import open_reference, save_statistics
from dico_jax.files import as_path, new_file, result_path, write_json
from dico_jax.parallel.mesh import create_mesh
from dico_jax.sampling.checkpoint_sampler import CheckpointSampler
from dico_jax.sampling.image_folder import differences

_MAX_SCALES = 1000
_MAX_OWN_PICTURES, _MAX_COMPARED = 50_000, 5_000
_CLIP_FILES = "a folder of CLIP as transformers writes it, a file, or hf://OWNER/REPO/FILE"
_PLOTTED = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception Score"}


@dataclasses.dataclass(frozen=True)
class Options:
    """How images are measured, see `create_network` and `create_evaluator`."""

    features: str = "inception"
    inception: str | None = None
    metrics: tuple[str, ...] | None = None
    batch_size: int = 64
    max_bad_fraction: float = 0.0  # of the pictures of a folder or source
    clip: str | None = None  # for the CLIP score
    prompts: str | None = None  # see `texts_of`

    def check(self, reference: str | None, sampled: bool = False) -> None:
        """Raises UsageError where reference, metrics and CLIP do not fit together.

        Images that are `sampled` have prompts, with or without a score.
        """
        evaluators.check_metrics(self.metrics or (), "--")
        scores = self.clip is not None if self.metrics is None else CLIP_SCORE in self.metrics
        if scores != (self.clip is not None):
            fix = f"needs --clip: {_CLIP_FILES}" if scores else "leave it out, or name clip_score"
            raise UsageError(f"--metrics: {CLIP_SCORE} {fix}" if scores else f"--clip: {fix}")
        if self.prompts is not None and not scores and not sampled:
            raise UsageError("--prompts", self.prompts, "is for --clip and the CLIP score")
        others = [name for name in self.metrics or () if name != CLIP_SCORE]
        if reference is None and (others or not scores):
            what = ", ".join(others) or "what is compared with"
            raise UsageError(
                f"--reference is needed: {what} (an .npz file or a folder of pictures)"
            )
        if reference is not None and self.metrics and not others:
            raise UsageError("--reference", reference, f"is not for {CLIP_SCORE}: leave it out")

    def evaluator(
        self, reference: str | None, flag: str = "--reference", texts: Sequence[str] = ()
    ) -> Evaluator:
        """See `create_evaluator`, with a `ClipScorer` of the `texts`, if any; on all devices."""
        how: Any = {"batch_size": self.batch_size, "mesh": create_mesh()}
        if reference is not None:
            check_there(reference, flag)  # before weights are loaded
        scorer = ClipScorer(str(self.clip), texts, **how) if self.clip is not None else None
        if reference is None and scorer is not None:
            return Evaluator(scorer.network, scorer.features, None, (), "", scorer)
        network = create_network(self.features, self.inception)
        names = self.metrics and tuple(name for name in self.metrics if name != CLIP_SCORE)
        given: Any = network, reference, names, flag, self.max_bad_fraction
        return dataclasses.replace(evaluators.create_evaluator(*given, **how), scorer=scorer)


def evaluate_files(
    path: str,
    reference: str | None,
    options: Options,
    out: Any = None,
    *,
    num_samples: int | None = None,
) -> dict[str, Any]:
    """Measures pictures in files, prints a table, and writes `out`, a new JSON file.

    `path` is a folder of pictures or an .npz file with arr_0, of which `num_samples` may be taken,
    `reference` an .npz file or a folder; the CLIP score needs none. Returns the result, see
    docs/evaluation.md.
    """
    options.check(reference)
    file = None if out is None else _checked_outputs(out)
    images = evaluators.open_images(path, "--samples", options.max_bad_fraction)
    texts = [] if options.clip is None else texts_of(images, path, options.prompts)
    count = len(images) if num_samples is None else num_samples
    if count > len(images):
        raise UsageError("--num_samples", num_samples, f": {images.name} has {len(images)} images")
    images.take(count)
    if texts:
        texts = [texts[index] for index in images.indices]
    evaluator = options.evaluator(reference, texts=texts)
    evaluator.network.check_images(images.shape, images.name)
    batches = functools.partial(images.batches, options.batch_size)
    return _evaluate(evaluator, batches, {"images": images.name, "count": count}, file, images.bad)


def check_sampled(
    reference: str | None, options: Options, out: Any, *, sweep_cfg: str | None
) -> tuple[tuple[float, ...] | None, Any]:
    """The scales of a sweep, if any, and the path of `out`; cheap, so it comes before weights."""
    options.check(reference, sampled=True)
    if options.clip is not None and options.prompts is None:
        raise UsageError("--clip", options.clip, "needs --prompts, whose images it scores")
    scales = parse_sweep(sweep_cfg) if sweep_cfg else None
    return scales, None if out is None else _checked_outputs(out, bool(scales))


def evaluate_checkpoint(
    ckpt: str, reference: str | None, options: Options, out, *, num_samples, asked, sweep_cfg, **how
) -> Any:
    """Measures samples of a checkpoint, which are never written; else as `evaluate_files`.

    With `sweep_cfg`, see `parse_sweep`, at every scale, with a plot beside `out`; `how` are options
    of `CheckpointSampler`.
    """
    scales, file = check_sampled(reference, options, out, sweep_cfg=sweep_cfg)
    results = _read_results(str(out)) if scales else []
    sampler = CheckpointSampler(ckpt, **how)
    samples = functools.partial(sampler.images, sampler.conditions(num_samples, **asked))
    texts = sampler.texts(num_samples, str(options.prompts)) if options.clip is not None else []
    evaluator = options.evaluator(reference, texts=texts)

    def about(scale: float | None = None) -> dict[str, Any]:
        if scale is not None:
            sampler.set_guidance(scale)
        return sampler.about(**asked) | {"count": num_samples}

    if not scales or file is None:
        return _evaluate(evaluator, samples, about(), file)
    return _sweep(evaluator, samples, about, scales, results, file)


def prepare_reference(path: str, source: Any, out: str, **how: Any) -> str:
    """Measures pictures and writes their statistics, with the features of each, as a new .npz file.

    Means and covariances that a file has besides its pictures are kept: those of ADM's files are
    of more pictures than lie in them. `source` is in place of a path the examples of a source, how
    they are read, and how many at most; `how` are fields of `Options`. Returns what was done.
    """
    file, options = result_path(out, ".npz"), Options(**how)
    if source is None:
        statistics: Any = options.evaluator(path, "--path").reference
    else:
        network, size = create_network(options.features, options.inception), options.batch_size
        features_of = networks.make_feature_fn(network, size, create_mesh())
        examples, read, limit = source
        images = SourceImages(examples, read, limit, options.max_bad_fraction)
        statistics = measure_images(images, network, features_of, size)
    measured = statistics.pool_features
    if measured is None:
        raise UsageError(f"--path={path} has statistics and no images: use it as it is")
    if statistics.digest:
        statistics.info["made_of"] = {"path": path, "sha256": statistics.digest}
    save_statistics(file, statistics)
    bad = f" ({len(found)} bad ones left out)" if (found := statistics.info.get("bad")) else ""
    return f"{file} is written: {len(measured):,} pictures{bad}, features: {statistics.features}"


def _evaluate(evaluator: Evaluator, batches: Any, about: Any, file: Any, bad: Any = None) -> Any:
    result = evaluator.measure(batches, about, file and _partial_file(file), bad=bad)
    if jax.process_index() == 0:
        print(table(result))
        if file is not None:
            write_json(file, result)
            _partial_file(file).unlink(missing_ok=True)
    return result


def _checked_outputs(out: str, sweep: bool = False) -> Any:
    """The path of --out, once all that is written there and beside it is found to be possible."""
    file = result_path(out, ".json", exists=sweep)
    result_path(str(_partial_file(file)), exists=True)
    if sweep:
        result_path(str(file.with_suffix(".png")), exists=file.exists())
    return file


def _partial_file(out: Any) -> Any:
    return out.with_name(f"{out.name}.partial.npz")


def table(result: dict[str, Any]) -> str:
    """A result as lines of text."""
    samples, reference, features = (result[k] for k in ("samples", "reference", "features"))
    count = f" ({reference['count']:,} images)" if reference and reference["count"] else ""
    against = f" against {reference['path']}{count}" if reference else ""
    lines = [
        f"{samples['count']:,} images{against}, features: "
        f"{features['name']} ({features['sha256'][:8]})"
    ]
    width = max(map(len, result["metrics"]))
    for name, value in result["metrics"].items():
        lines.append(f"  {name:<{width}}  {'null' if value is None else f'{value:.6g}'}")
    return "\n".join(lines + [f"warning: {text}" for text in result["warnings"]])


def _read_results(out: str) -> list[dict[str, Any]]:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--sweep_cfg needs matplotlib for its plot: pip install matplotlib")
    try:
        results = json.loads(as_path(out).read_text())["sweep"]
        return [result for result in results if _but_scale(result)]  # which are none without those
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError("--out", out, "is no result of a sweep: give another name") from error


def _sweep(evaluator: Evaluator, samples: Any, about: Any, scales: Any, results: Any, file: Any):
    for scale in scales:
        found = about(scale)
        new = _but_scale(evaluator.about(found))
        for said in filter(None, (differences(_but_scale(result), new) for result in results)):
            raise UsageError("--out", file, f"is of another sweep ({said}): give another name")
        if scale not in map(_scale_of, results):
            partial = _partial_file(file.with_name(f"{file.stem}-{scale}.json"))
            results.append(evaluator.measure(samples, found, partial))
            if jax.process_index() == 0:
                write_json(file, {"sweep": results})
            partial.unlink(missing_ok=True)
        metrics = next(result for result in results if _scale_of(result) == scale)["metrics"]
        numbers = [f"{name} {value:.6g}" for name, value in metrics.items() if value is not None]
        print(f"guidance scale {scale}: {', '.join(numbers)}")
    plot_sweep(file.with_suffix(".png"), sorted(results, key=_scale_of))
    return results


def parse_sweep(text: str) -> tuple[float, ...]:
    """The numbers from A to B by steps of C, both ends included, of "A:B:C"; or UsageError."""
    try:
        first, last, step = (decimal.Decimal(part) for part in text.split(":"))
        if not (0 <= first <= last < 1e9 and step > 0 and last - first < _MAX_SCALES * step):
            raise ValueError
    except (ValueError, ArithmeticError) as error:
        fix = ": write the first scale, the last and the step, such as 1.0:2.0:0.1"
        raise UsageError("--sweep_cfg", text, fix) from error
    return tuple(float(first + i * step) for i in range(int((last - first) / step) + 1))


def plot_sweep(file: Any, results: Sequence[dict[str, Any]]) -> None:
    """Plots FID, sFID and Inception Score, as far as they are there, of results by rising scale."""
    from matplotlib.figure import Figure

    scales = [_scale_of(result) for result in results]
    names = [name for name in _PLOTTED if name in results[0]["metrics"]]
    figure = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot(scales, [result["metrics"][name] for result in results], marker="o")
        axis.set(xlabel="guidance scale", ylabel=_PLOTTED[name])
        axis.grid(alpha=0.3)
    samples, features = results[0]["samples"], results[0]["features"]
    figure.suptitle(f"{samples['count']:,} samples, features: {features['name']}", fontsize=10)
    with new_file(file) as stream:
        figure.savefig(stream, dpi=120)


def _scale_of(result: dict[str, Any]) -> float:
    return result["samples"]["sampling"]["cfg_scale"]


def _but_scale(result: dict[str, Any]) -> dict[str, Any]:
    samples = result["samples"] | {"sampling": result["samples"]["sampling"] | {"cfg_scale": 0}}
    return {key: result[key] for key in ("metric_names", "reference", "features")} | samples


def _is_of(file: Any, kept: Any, digest: str) -> bool:
    """Whether what a run has kept in a file is of these pictures, as far as it says; else said."""
    is_it = getattr(kept, "info", {}).get("pictures", digest) == digest
    if not is_it and jax.process_index() == 0:
        print(f"warning: {file} is of other pictures than the data: made anew", file=sys.stderr)
    return is_it


class RunEvaluation:
    """Measures samples of a run, as `config.eval` asks. Making it checks and writes nothing."""

    def __init__(
        self, config: ConfigDict, source: Source, read: Reader, conditions: Callable, mesh: Mesh
    ):
        """Loads what is there; `conditions` makes, of indices (N,), what the network is told."""
        self._conditions, self._given = conditions, (source, read)
        self._fraction = config.data.max_bad_fraction
        self._how: Any = {"batch_size": config.sampling.batch_size, "mesh": mesh}
        self._network: networks.FeatureNetwork | None = None
        self._evaluator: Evaluator | None = None
        self._options, options, kind = config.eval, config.eval, source.kind
        if not options.every_steps:
            return
        if options.num_samples < 2:
            raise UsageError("config.eval.num_samples", options.num_samples, "must be at least 2")
        evaluators.check_metrics(options.metrics, "config.eval.")
        if kind != "pictures" and (options.features == "classifier" or options.reference is None):
            raise UsageError(
                f"config.data.source has {kind}, not pictures: give config.eval.reference, an .npz "
                "of statistics, and config.eval.features, 'inception' or the file of a classifier"
            )
        if options.features != "classifier":
            self._network = create_network(options.features, options.inception, "config.eval.")
            if options.reference is not None:
                self._evaluator = self._against(self._network, options.reference)

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to measure after this step."""
        every = self._options.every_steps
        return every > 0 and (step % every == 0 or step == last_step)

    def open(self, workdir: Any) -> None:
        """Makes what `workdir` lacks: the classifier, the statistics of the run's own pictures.

        What is there, but of other pictures, is made anew: up to 5,000 are read to compare them.
        """
        if not self._options.every_steps or self._evaluator is not None:
            return
        own, file = workdir / "reference.npz", workdir / "classifier.npz"
        network, reference = self._network, self._options.reference
        given = SourceImages(*self._given, _MAX_COMPARED, self._fraction).batches(64)
        digest = functools.reduce(lambda a, b: evaluators.pictures_digest(b, a), given, b"").hex()
        is_first = jax.process_index() == 0
        if network is None and file.exists():
            kept = networks.load_classifier(file)
            network = kept if _is_of(file, kept, digest) else None
        if network is None:
            network = networks.train_classifier(*self._given, max_bad_fraction=self._fraction)
            network.info["pictures"] = digest
            if is_first:
                network.save(file)
        if reference is None and own.exists() and _is_of(own, open_reference(own), digest):
            reference = str(own)
        if reference is not None:
            self._evaluator = self._against(network, reference)
            return
        features = networks.make_feature_fn(network, **self._how)
        images = SourceImages(*self._given, _MAX_OWN_PICTURES, self._fraction)
        found = measure_images(images, network, features, self._how["batch_size"])
        found.info["pictures"] = digest
        if is_first:
            own.unlink(missing_ok=True)
            save_statistics(own, found)
        chosen = evaluators.choose_metrics(self._options.metrics or None, found, str(own))
        self._evaluator = Evaluator(network, features, found, chosen, str(own))

    def __call__(self, samples: Callable[[Any, int], Iterator[np.ndarray]]) -> dict[str, float]:
        """The numbers, by "FEATURES/METRIC", of what `samples` makes of conditions, from one on."""
        evaluator, about = self._evaluator, {"count": self._options.num_samples}
        assert evaluator is not None, "open() comes first"
        batches = functools.partial(samples, self._conditions(np.arange(about["count"])))
        found = evaluator.measure(batches, about, progress=False)["metrics"]
        name = evaluator.network.name
        return {f"{name}/{key}": value for key, value in found.items() if value is not None}

    def _against(self, network: networks.FeatureNetwork, reference: str) -> Evaluator:
        given = self._options.metrics or None, "config.eval.reference", self._fraction
        return evaluators.create_evaluator(network, reference, *given, **self._how)
