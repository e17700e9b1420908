"""The training loop."""

import pathlib
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from dico_jax.autoencoders.encoding import make_latents_fn
from dico_jax.build import (
    Experiment,
    check_fields,
    check_training,
    config_errors,
    experiment_from_config,
    reader_from_config,
    sampling_from_config,
    source_from_config,
    with_num_classes,
)
from dico_jax.data.bad_examples import BadExampleLog
from dico_jax.data.pipeline import DeviceBatches, training_batches
from dico_jax.data.sources import Source
from dico_jax.generation import generate_images, make_generate_fn
from dico_jax.grids import class_name, image_grid, save_png
from dico_jax.mesh import batch_sharding, check_batch_size, create_mesh, replicated, to_global
from dico_jax.metrics.class_agreement import ClassAgreement, class_agreement, require_sklearn
from dico_jax.models import count_parameters
from dico_jax.training.checkpoints import Checkpointer
from dico_jax.training.logging import RunLogger
from dico_jax.training.state import TrainState, create_optimizer, create_state
from dico_jax.training.step import make_train_step
from dico_jax.training.warm_start import open_warm_start
from dico_jax.training.workdir import config_to_dict, open_workdir


def train(config: ConfigDict, workdir: str) -> ClassAgreement | None:
    """Trains what `config` describes in `workdir`, from its newest checkpoint if it has one.

    Args:
      config: a locked config, see configs/default.py.
      workdir: folder for config.json, checkpoints/, samples/, metrics.jsonl and events.

    Returns:
      What the classifier says of the final samples, where `config.eval` asks for it.

    Raises:
      UsageError: something in the config or the workdir cannot work; nothing is changed then.
    """
    run = Run(config, workdir)
    training = config.training
    with run.checkpointer() as saver, run.logger(saver.latest_step() or 0) as log:
        state = run.initial_state()
        if saver.latest_step() is not None:
            state = saver.restore(saver.latest_step(), state)
        start = int(state.step)
        steps = range(start + 1, training.num_steps + 1)
        meter = Meter(config.data.batch_size)
        log.say(run.describe(start))
        with run.batches(start) as batches:
            for step, batch in zip(steps, batches, strict=False):  # batches have no end
                state, metrics = run.train_step(state, run.to_latents(batch, np.int32(step)))
                meter.add(metrics, waited=batches.waited)
                if step == start + 1:  # what has passed so far was compilation
                    meter.restart_clock()
                    log.restart_clock()
                log.advance()
                last = step == training.num_steps
                if last or step % training.log_every_steps == 0:
                    values = meter.read()
                    log.scalars(step, values)
                    log.show(
                        loss=f"{values['loss']:.4f}", img_s=f"{values['images_per_second']:.0f}"
                    )
                if run.is_grid_step(step):
                    log.image(step, "samples", run.save_grid(step, state))
                    meter.restart_clock()
                    log.restart_clock()
                if last or step % training.checkpoint_every_steps == 0:
                    saver.save(step, state)
        result = run.judge(state)
        if result is not None:
            log.say(str(result))
            log.scalars(int(state.step), {f"eval/{k}": v for k, v in vars(result).items()})
    return result


class Run:
    """The parts of a run, built and checked from its config."""

    def __init__(self, config: ConfigDict, workdir: str):
        self.mesh = create_mesh()
        check_fields(config)
        check_training(config)
        check_batch_size(config.data.batch_size, self.mesh.size, "config.data.batch_size")
        self.source: Source = source_from_config(config)
        self.config = config = with_num_classes(config, self.source)
        self.experiment: Experiment = experiment_from_config(config)
        process, options = sampling_from_config(config)
        self.read = reader_from_config(config, self.experiment, self.source)
        with config_errors():
            self.to_latents = make_latents_fn(
                self.source.kind,
                self.experiment.autoencoder,
                latent_sampling=config.data.latent_sampling,
                seed=config.seed,
                mesh=self.mesh,
            )
            self.optimizer = create_optimizer(config.optimizer)
            self.generate = make_generate_fn(
                self.experiment.model,
                process,
                self.experiment.autoencoder,
                self.experiment.latent_shape,
                options,
                self.mesh,
                load=bool(config.sampling.grid_every_steps or config.eval.class_agreement_samples),
            )
            if config.eval.class_agreement_samples:
                require_sklearn("eval.class_agreement_samples")
        init_from = config.training.init_from
        self.warm_start = open_warm_start(init_from, workdir, self.experiment.model)
        self.workdir: pathlib.Path = open_workdir(workdir, config)
        self.train_step = make_train_step(
            self.experiment.model,
            self.experiment.diffusion,
            self.optimizer,
            ema_decay=config.training.ema_decay,
            seed=config.seed,
            mesh=self.mesh,
        )

    def describe(self, start: int) -> str:
        """One line of what is about to be trained, where and from which step on."""
        parameters = count_parameters(self.experiment.model)
        kind = self.mesh.devices.flat[0].device_kind
        return (
            f"{self.config.model.name}, {parameters:,} parameters; {len(self.source):,} examples; "
            f"{self.mesh.size} x {kind}; steps {start} to {self.config.training.num_steps} "
            f"in {self.workdir}"
        )

    def checkpointer(self) -> Checkpointer:
        meta = {"config": config_to_dict(self.config), "class_names": self.source.class_names}
        return Checkpointer(self.workdir, meta, self.config.training.keep_checkpoints)

    def logger(self, start_step: int) -> RunLogger:
        return RunLogger(self.workdir, start_step, self.config.training.num_steps)

    def initial_state(self) -> TrainState:
        state = create_state(
            self.experiment.model,
            self.optimizer,
            self.experiment.latent_shape,
            self.config.seed,
            replicated(self.mesh),
        )
        if self.warm_start is None:
            return state
        if jax.process_index() == 0:
            print(self.warm_start)
        return self.warm_start.apply(state)

    def batches(self, start_step: int) -> DeviceBatches:
        """Batches on the mesh, from the one after `start_step` on."""
        data, sharding = self.config.data, batch_sharding(self.mesh)
        batches = training_batches(
            self.source,
            self.read,
            batch_size=data.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            horizontal_flip=data.horizontal_flip,
            max_bad_fraction=data.max_bad_fraction,
            num_workers=data.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        part = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
        file = self.workdir / f"bad_examples{part}.jsonl"
        log = BadExampleLog(self.source, self.read, data.max_bad_fraction, file)
        return DeviceBatches(batches, lambda batch: to_global(batch, sharding), log)

    def sample(self, state: TrainState, labels: np.ndarray) -> np.ndarray:
        """Images of the averaged weights, uint8 (N, H, W, C)."""
        batches = generate_images(
            self.generate,
            state.ema_params,
            labels,
            self.config.sampling.batch_size,
            self.mesh.size,
        )
        return np.concatenate(list(batches))

    def is_grid_step(self, step: int) -> bool:
        every = self.config.sampling.grid_every_steps
        return every > 0 and step % every == 0

    def save_grid(self, step: int, state: TrainState) -> np.ndarray:
        """Writes samples/step_N.png, a row per class, and returns it."""
        sampling, num_classes = self.config.sampling, self.experiment.model.num_classes
        rows = min(sampling.grid_rows, num_classes)
        classes = np.linspace(0, num_classes - 1, rows).round().astype(int)  # spread over all
        images = self.sample(state, np.repeat(classes, sampling.grid_columns))
        grid = image_grid(
            np.split(images, rows), [class_name(self.source.class_names, c) for c in classes]
        )
        folder = self.workdir / "samples"
        folder.mkdir(exist_ok=True)
        save_png(folder / f"step_{step:07d}.png", grid)
        return grid

    def judge(self, state: TrainState) -> ClassAgreement | None:
        """Samples every class in turn and asks a classifier fitted on the real pictures."""
        num_samples = self.config.eval.class_agreement_samples
        if not num_samples:
            return None
        examples = [self.source[i] for i in range(len(self.source))]
        labels = np.arange(num_samples) % self.experiment.model.num_classes
        return class_agreement(
            np.stack([self.read(e["image"], False) for e in examples]),
            np.array([e["label"] for e in examples]),
            self.sample(state, labels),
            labels,
        )


class Meter:
    """Means of step metrics, the throughput and the wait for data since the last reading.

    Metrics stay on the devices until they are read, so that steps are not waited for one by one.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._pending: list[dict] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Forgets the time since the last reading and its steps, for throughput and wait."""
        self._since, self._timed_steps, self._waited = time.monotonic(), 0, 0.0

    def add(self, metrics: dict, waited: float) -> None:
        """Takes the metrics of one step, and the seconds that it waited for its batch."""
        self._pending.append(metrics)
        self._timed_steps += 1
        self._waited += waited

    def read(self) -> dict[str, float]:
        """Means since the last reading; waits for the steps.

        Besides them "images_per_second", and "data_wait", the fraction of the time in which the
        next batch was not ready.
        """
        values, self._pending = jax.device_get(self._pending), []
        seconds = time.monotonic() - self._since
        speed = {
            "images_per_second": self._timed_steps * self._batch_size / seconds,
            "data_wait": self._waited / seconds,
        }
        self.restart_clock()
        return {name: float(np.mean([v[name] for v in values])) for name in values[0]} | speed
