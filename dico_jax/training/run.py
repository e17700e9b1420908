"""The parts of a training run, built and checked from its config."""

import contextlib
import dataclasses
import functools
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dico_jax import experiment as experiments
from dico_jax.autoencoders import make_latents_fn
from dico_jax.checkpoints.reader import WarmStart, saved_steps
from dico_jax.checkpoints.state import create_state
from dico_jax.checkpoints.steps import FOLDER, DamagedCheckpointError, verified
from dico_jax.config import check_fields
from dico_jax.data.bad_examples import BadExampleLog, GoodExamples
from dico_jax.data.pipeline import DeviceBatches, training_batches
from dico_jax.errors import UsageError, within
from dico_jax.evaluation.measure import RunEvaluation
from dico_jax.evaluation.networks import ClassAgreement, class_agreement, require_sklearn
from dico_jax.files import as_path, new_file
from dico_jax.models import count_parameters
from dico_jax.models.block_stacks import unstack_blocks
from dico_jax.parallel import mesh as meshes
from dico_jax.parallel.sharding import parse_rules, say_unmet
from dico_jax.sampling.generate import Progress, generate_images, make_generate_fn
from dico_jax.sampling.grids import image_grid, save_png
from dico_jax.training.logging import require_wandb
from dico_jax.training.optimizer import learning_rate_schedule
from dico_jax.training.program import mesh_from_config, training_program
from dico_jax.training.speed import enable_compilation_cache
from dico_jax.training.workdir import check_workdir, data_of


class Run:
    """What a run consists of. Building it checks everything and changes nothing.

    `target` has the shapes and shardings of a state of checkpoints, `stacked` of `train_step`'s.
    """

    def __init__(self, config: ConfigDict, workdir: str, allowed: Sequence[str] = ()):
        check_fields(config)
        enable_compilation_cache(config.training.compilation_cache)
        with within("config."):
            require_wandb(config.logging.wandb_project)
        self.mesh = mesh_from_config(config)
        self.source = experiments.source_from_config(config)
        self.config = config = experiments.with_source_options(config, self.source)
        self.experiment = experiments.experiment_from_config(config, self.source)
        process, sampling = experiments.sampling_from_config(config)
        self.read = experiments.reader_from_config(config, self.experiment, self.source)
        training, model = config.training, self.experiment.model
        autoencoder, latent_shape = self.experiment.autoencoder, self.experiment.latent_shape
        program = training_program(config, self.experiment, self.mesh)
        self._init, self.target, self.stacked, self.train_step = program
        with within("config."):
            self.learning_rate = learning_rate_schedule(config.optimizer, training.num_steps)
            draws: Any = {"mesh": self.mesh, "latent_sampling": config.data.latent_sampling}
            encoded = self.source.kind, autoencoder
            to_latents = make_latents_fn(*encoded, seed=config.seed, **draws)
            self.to_latents = lambda batch, step: to_latents(
                batch | {"condition": model.from_read(batch["condition"])}, step
            )
            if count := config.eval.class_agreement_samples:
                require_sklearn("eval.class_agreement_samples")
                if not self.source.class_names:
                    fix = "is for examples that have a class: set it to 0"
                    raise UsageError("eval.class_agreement_samples", count, fix)
            samples = any((config.sampling.grid_every_steps, count, config.eval.every_steps))
            how = autoencoder, latent_shape, sampling, self.mesh
            self._generate = make_generate_fn(model, process, *how, load=samples)
        self._good = GoodExamples(self.source)
        conditions = functools.partial(model.default_conditions, source=self._good)
        self.evaluation = RunEvaluation(config, self.source, self.read, conditions, self.mesh)
        fresh = training.init_from and not saved_steps(workdir)
        self._warm_start = WarmStart(training.init_from, model, self.source) if fresh else None
        self.data = data_of(self.source, getattr(model, "texts", None))
        check_workdir(workdir, config, allowed, self.data)
        say_unmet(self.target.params, self.mesh, parse_rules(config.mesh.rules))
        self.workdir = as_path(workdir)

    def describe(self, start: int) -> str:
        """Five lines of what is about to be trained, where and from which step on."""
        config, model, axes = self.config, self.experiment.model, dict(self.mesh.shape)
        sizes = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
        shape = f" ({sizes})" if self.mesh.size > axes["data"] else ""
        names, classes = self.source.class_names, getattr(model, "num_classes", 0)
        few = f" of {len(names):,} of the {classes:,} classes" * (len(names) < classes)
        objective, training = config.diffusion.objective, config.training
        parameters = count_parameters(model)
        every = f"saved every {training.checkpoint_every_steps:,}"
        if grids := config.sampling.grid_every_steps:
            every += f", a grid every {grids:,}"
        if count := config.eval.class_agreement_samples:
            every += f", {count:,} samples judged in the end"
        lines = {
            "model": f"{config.model.name}, {parameters:,} parameters, objective {objective}",
            "data": f"{len(self.source):,} examples{few}, {config.data.batch_size:,} at a time",
            "devices": f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}{shape}",
            "training": f"steps {start} to {training.num_steps}, {every}",
            "workdir": f"{self.workdir}",
        }
        return "\n".join(f"{name:10}{text}" for name, text in lines.items())

    def finished(self) -> tuple[bool, ClassAgreement | None]:
        """Whether the last step is saved, and judged if that is asked for; what was found then."""
        newest = max(saved_steps(self.workdir), default=0)
        count, found = self.config.eval.class_agreement_samples, None
        if newest < self.config.training.num_steps:
            return False, None
        file = self.workdir / "metrics.jsonl"
        for line in file.read_bytes().splitlines() if count and file.exists() else ():
            with contextlib.suppress(ValueError, TypeError, LookupError):
                values = json.loads(line)
                names = [field.name for field in dataclasses.fields(ClassAgreement)]
                judged = {name: values[f"eval/{name}"] for name in names}
                if values["step"] == newest and judged["num_samples"] == count:
                    found = ClassAgreement(**judged)
        try:
            if jax.process_index() == 0:
                verified(self.workdir / FOLDER / str(newest))
        except DamagedCheckpointError:  # said by what restores it
            return False, None
        return found is not None or not count, found

    def result(self, step: int, judged: ClassAgreement | None, done="done", page="") -> str:
        """The last lines of a run: what came out, where it is, and what to do next."""
        folder, report = shlex.quote(str(self.workdir)), self.workdir / "report.html"
        page = page or (str(report) if report.exists() else f"python -m dico_jax.report {folder}")
        grids = sorted((self.workdir / "samples").glob("step_*.png"))
        lines = {
            "checkpoint": f"{self.workdir / FOLDER / str(step)}",
            "grid": f"{grids[-1]}" if grids else "",
            "metrics": f"{self.workdir / 'metrics.jsonl'}; tensorboard --logdir={folder}",
            "page": page,
            "next": f"python -m dico_jax.sample --ckpt={folder} --out={folder}/out",
        }
        first = f"{done}: step {step} of {self.config.training.num_steps}"
        shown = [f"{name:12}{text}" for name, text in lines.items() if text]
        return "\n".join([first, *([str(judged)] if judged else []), *shown])

    def initial_state(self) -> Any:
        """A fresh `TrainState`, or that of `config.training.init_from`."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.target)
        state = create_state(self._init, self.config.seed, places)
        if self._warm_start is not None and jax.process_index() == 0:
            print(self._warm_start)
        return state if self._warm_start is None else self._warm_start.apply(state)

    def batches(self, start_step: int) -> DeviceBatches:
        """Batches on the mesh, from the one after `start_step` on."""
        data, sharding = self.config.data, meshes.batch_sharding(self.mesh)
        index, count = meshes.data_shard(sharding)
        read_condition = self.experiment.model.read_condition
        how = {"seed": self.config.seed, "process_index": index, "process_count": count}
        options = ("batch_size", "horizontal_flip", "max_bad_fraction", "num_workers")
        how |= {name: data[name] for name in options} | {"start_step": start_step}
        batches = training_batches(self.source, self.read, read_condition, **how)
        part = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
        file = self.workdir / f"bad_examples{part}.jsonl"
        most = data.max_bad_fraction
        log = BadExampleLog(self.source, self.read, most, file, read_condition, start_step)
        return DeviceBatches(batches, lambda batch: meshes.to_global(batch, sharding), log)

    def samples(
        self, state: Any, conditions: Any, start: int, progress: Progress
    ) -> Iterator[np.ndarray]:
        """Images of the averaged weights, in batches, see `generate_images`: uint8 (n, H, W, C)."""
        weights, size = unstack_blocks(state.ema_params), self.config.sampling.batch_size
        shards = meshes.num_batch_shards(self.mesh)
        how = conditions, size, shards, start, progress
        return generate_images(self._generate, weights, *how)

    def save_grid(self, step: int, samples: Callable) -> np.ndarray:
        """Writes samples/step_N.png, a row per condition, and returns it."""
        sampling, model = self.config.sampling, self.experiment.model
        conditions, names = model.grid_conditions(sampling.grid_rows, self._good)
        repeated = jax.tree.map(lambda a: np.repeat(a, sampling.grid_columns, axis=0), conditions)
        rows = np.split(np.concatenate(list(samples(repeated))), len(names))
        grid = image_grid(rows, names)
        if jax.process_index() == 0:
            (self.workdir / "samples").mkdir(exist_ok=True)
            with new_file(self.workdir / "samples" / f"step_{step:07d}.png") as file:
                save_png(file, grid)
        return grid

    def judge(self, samples: Callable) -> ClassAgreement | None:
        """Samples every class in turn and asks a classifier fitted on the real pictures."""
        if not (count := self.config.eval.class_agreement_samples):
            return None
        model = self.experiment.model
        asked = model.default_conditions(np.arange(count), self._good)
        if (labels := model.class_labels(asked)) is None:  # those of the examples it is asked for
            found = (self._good[k % len(self._good)]["label"] for k in range(count))
            labels = np.fromiter(found, np.int64)
        images, most = np.concatenate(list(samples(asked))), self.config.data.max_bad_fraction
        return class_agreement(images, labels, self.source, self.read, most)
