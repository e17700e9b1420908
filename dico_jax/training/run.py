"""The parts of a training run, built and checked from its config."""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dico_jax.autoencoders.registry import make_latents_fn
from dico_jax.checkpoints.averages import parse_widths
from dico_jax.checkpoints.checkpointer import Checkpointer
from dico_jax.checkpoints.state import TrainState, abstract_state, create_state, initializer
from dico_jax.checkpoints.warm_start import open_warm_start
from dico_jax.config import check_fields, config_errors, config_to_dict
from dico_jax.data.bad_examples import BadExampleLog
from dico_jax.data.pipeline import DeviceBatches, training_batches
from dico_jax.data.sources import Source
from dico_jax.errors import UsageError
from dico_jax.evaluation.measure import RunEvaluation
from dico_jax.evaluation.networks import ClassAgreement, class_agreement, require_sklearn
from dico_jax.experiment import (
    Experiment,
    check_training,
    experiment_from_config,
    reader_from_config,
    sampling_from_config,
    source_from_config,
    with_source_options,
)
from dico_jax.models import count_parameters
from dico_jax.models.block_stacks import stack_blocks, stack_shardings, unstack_blocks
from dico_jax.parallel.mesh import (
    batch_sharding,
    check_batch_size,
    create_mesh,
    data_shard,
    num_batch_shards,
    to_global,
)
from dico_jax.parallel.sharding import DEFAULT_RULES, parse_rules, say_unmet, state_sharding
from dico_jax.sampling.generate import generate_images, make_generate_fn
from dico_jax.sampling.grids import image_grid, save_png
from dico_jax.training.compilation_cache import enable_compilation_cache
from dico_jax.training.optimizer import create_optimizer, learning_rate_schedule
from dico_jax.training.speed import SpeedMetrics
from dico_jax.training.step import StepOptions, make_train_step
from dico_jax.training.watch import check_watch
from dico_jax.training.workdir import check_workdir


class Run:
    """What a run consists of. Building it checks everything and changes nothing.

    Attributes:
      config: complete, with what the source knows of the network.
      workdir: its folder, which may not be there yet.
      mesh: of all devices.
      experiment: network, objective and autoencoder.
      source: the training examples.
      target: shapes and shardings of the state, as checkpoints have it.
      train_step: see `make_train_step`; its state is one of `pack`.
      to_latents: see `make_latents_fn`.
      learning_rate: by the number of steps taken.
      evaluation: measures samples.
    """

    def __init__(self, config: ConfigDict, workdir: str):
        check_fields(config)
        check_training(config)
        check_watch(config)
        enable_compilation_cache(config.training.compilation_cache)
        with config_errors():
            self.mesh = create_mesh(
                data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor
            )
            rules = parse_rules(config.mesh.rules)
        self._check_batch_size(config)
        self.source: Source = source_from_config(config)
        self.config = config = with_source_options(config, self.source)
        self.experiment: Experiment = experiment_from_config(config)
        process, sampling_options = sampling_from_config(config)
        self.read = reader_from_config(config, self.experiment, self.source)
        model, training = self.experiment.model, config.training
        with config_errors():
            optimizer = create_optimizer(config.optimizer, training.num_steps)
            self.learning_rate = learning_rate_schedule(config.optimizer, training.num_steps)
            widths = parse_widths(training.ema_widths, training.ema_snapshot_every_steps)
            self._init = initializer(model, optimizer, self.experiment.latent_shape, widths)
            self.target = _with_sharding(
                abstract_state(self._init), self.mesh, rules or DEFAULT_RULES
            )
            self.to_latents = make_latents_fn(
                self.source.kind,
                self.experiment.autoencoder,
                latent_sampling=config.data.latent_sampling,
                seed=config.seed,
                mesh=self.mesh,
            )
            if count := config.eval.class_agreement_samples:
                require_sklearn("eval.class_agreement_samples")
                if "label" not in model.zero_condition(1):
                    fix = "is for networks that are told a class: set it to 0"
                    raise UsageError("eval.class_agreement_samples", count, fix)
            self._generate = make_generate_fn(
                model,
                process,
                self.experiment.autoencoder,
                self.experiment.latent_shape,
                sampling_options,
                self.mesh,
                load=any((config.sampling.grid_every_steps, count, config.eval.every_steps)),
            )
        self.evaluation = RunEvaluation(
            config,
            self.source,
            self.read,
            functools.partial(model.default_conditions, source=self.source),
            self.mesh,
        )
        self._warm_start = open_warm_start(training.init_from, workdir, model)
        check_workdir(workdir, config)
        say_unmet(self.target.params, self.mesh, rules)
        self.workdir = pathlib.Path(workdir)
        sharding = jax.tree.map(lambda leaf: leaf.sharding, self.target)
        self.train_step = make_train_step(
            model,
            self.experiment.diffusion,
            optimizer,
            mesh=self.mesh,
            options=StepOptions(
                seed=config.seed,
                ema_decay=training.ema_decay,
                ema_widths=widths,
                accumulation_steps=training.accumulation_steps,
                skip_bad_steps=training.on_nan == "skip",
            ),
            sharding=stack_shardings(sharding, model.stacked_stages),
        )

    def _check_batch_size(self, config: ConfigDict) -> None:
        shards, parts = num_batch_shards(self.mesh), config.training.accumulation_steps
        size = config.data.batch_size
        check_batch_size(size, shards, "config.data.batch_size")
        if size % (shards * parts):
            raise UsageError(
                f"config.training.accumulation_steps={parts} does not divide the {size // shards} "
                f"examples of config.data.batch_size={size} that each of {shards} devices has"
            )

    def describe(self, start: int) -> str:
        """One line of what is about to be trained, where and from which step on."""
        parameters = count_parameters(self.experiment.model)
        kind = self.mesh.devices.flat[0].device_kind
        axes = [f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1]
        shape = (
            f" ({' x '.join(axes)})" if axes[1:] or self.mesh.shape["data"] == 1 < len(axes) else ""
        )
        return (
            f"{self.config.model.name}, {parameters:,} parameters; {len(self.source):,} examples; "
            f"{self.mesh.size} x {kind}{shape}; steps {start} to {self.config.training.num_steps} "
            f"in {self.workdir}"
        )

    def speed(self) -> SpeedMetrics:
        """Utilisation and memory, for the metrics."""
        return SpeedMetrics(
            self.experiment.model, self.experiment.latent_shape, self.mesh.devices.flat
        )

    def checkpointer(self) -> Checkpointer:
        """The checkpoints of the workdir."""
        meta = {"config": config_to_dict(self.config), "class_names": list(self.source.class_names)}
        training = self.config.training
        return Checkpointer(
            self.workdir, meta, training.keep_checkpoints, training.keep_every_steps
        )

    def initial_state(self) -> TrainState:
        """A fresh state, or that of `config.training.init_from`."""
        sharding = jax.tree.map(lambda leaf: leaf.sharding, self.target)
        state = create_state(self._init, self.config.seed, sharding)
        if self._warm_start is None:
            return state
        if jax.process_index() == 0:
            print(self._warm_start)
        return self._warm_start.apply(state)

    def pack(self, state: TrainState) -> TrainState:
        """The state as the training step has it; the one given may not be used any more."""
        return stack_blocks(state, self.experiment.model.stacked_stages, consume=True)

    def unpack(self, state: Any) -> Any:
        """A packed state, or a part of it, as checkpoints have it."""
        return unstack_blocks(state)

    def batches(self, start_step: int) -> DeviceBatches:
        """Batches on the mesh, from the one after `start_step` on."""
        data, sharding = self.config.data, batch_sharding(self.mesh)
        shard = data_shard(sharding)
        read_condition = self.experiment.model.read_condition
        batches = training_batches(
            self.source,
            self.read,
            read_condition,
            batch_size=data.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            horizontal_flip=data.horizontal_flip,
            max_bad_fraction=data.max_bad_fraction,
            num_workers=data.num_workers,
            process_index=shard.index,
            process_count=shard.count,
        )
        part = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
        file = self.workdir / f"bad_examples{part}.jsonl"
        log = BadExampleLog(self.source, self.read, data.max_bad_fraction, file, read_condition)
        return DeviceBatches(batches, lambda batch: to_global(batch, sharding), log)

    def sample(self, state: TrainState, conditions: Any) -> np.ndarray:
        """Images of the averaged weights of a packed state, uint8 (N, H, W, C)."""
        return np.concatenate(list(self._samples(state, conditions)))

    def _samples(self, state: TrainState, conditions: Any, start: int = 0) -> Iterator[np.ndarray]:
        return generate_images(
            self._generate,
            self.unpack(state.ema_params),
            conditions,
            self.config.sampling.batch_size,
            num_batch_shards(self.mesh),
            start,
        )

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """FID and its family of the averaged weights, see `RunEvaluation`."""
        return self.evaluation(functools.partial(self._samples, state))

    def is_evaluation_step(self, step: int) -> bool:
        """Whether `config.eval` asks for `evaluate` after this step."""
        return self.evaluation.is_due(step, self.config.training.num_steps)

    def is_grid_step(self, step: int) -> bool:
        """Whether `config.sampling` asks for a grid after this step."""
        every = self.config.sampling.grid_every_steps
        return every > 0 and step % every == 0

    def save_grid(self, step: int, state: TrainState) -> np.ndarray:
        """Writes samples/step_N.png, a row per condition, and returns it."""
        sampling, model = self.config.sampling, self.experiment.model
        conditions, names = model.grid_conditions(sampling.grid_rows, self.source)
        repeated = jax.tree.map(lambda a: np.repeat(a, sampling.grid_columns, axis=0), conditions)
        grid = image_grid(np.split(self.sample(state, repeated), len(names)), names)
        if jax.process_index() == 0:
            folder = self.workdir / "samples"
            folder.mkdir(exist_ok=True)
            save_png(folder / f"step_{step:07d}.png", grid)
        return grid

    def judge(self, state: TrainState) -> ClassAgreement | None:
        """Samples every class in turn and asks a classifier fitted on the real pictures."""
        num_samples = self.config.eval.class_agreement_samples
        if not num_samples:
            return None
        asked = self.experiment.model.default_conditions(np.arange(num_samples), self.source)
        images = self.sample(state, asked)
        return class_agreement(images, asked["label"], self.source, self.read)


def _with_sharding(state: TrainState, mesh, rules) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_sharding(state, mesh, rules),
    )
