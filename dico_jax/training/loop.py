"""The training loop."""

import collections
import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dico_jax.checkpoints.checkpointer import Checkpointer
from dico_jax.checkpoints.snapshots import EmaSnapshots
from dico_jax.checkpoints.state import TrainState
from dico_jax.config import config_to_dict
from dico_jax.evaluation.networks import ClassAgreement
from dico_jax.files import new_file
from dico_jax.training.logging import open_logger
from dico_jax.training.nan_policy import NanWatch
from dico_jax.training.preemption import Preempted, Preemption
from dico_jax.training.profiling import Profiler
from dico_jax.training.run import Run
from dico_jax.training.step_metrics import mean_of_steps
from dico_jax.training.watch import StallWatch, stall_file
from dico_jax.training.workdir import open_workdir, workdir_lock

_STEPS_AHEAD = 2  # of the devices: enough to keep them busy, and few enough to notice a stall
_OVERVIEW_LINES = 12


def train(config: ConfigDict, workdir: str) -> ClassAgreement | None:
    """Trains what `config` describes in `workdir`, from its newest checkpoint if it has one.

    Args:
      config: a locked config, see configs/default.py.
      workdir: folder for config.json, checkpoints/, samples/, metrics.jsonl and events.

    Returns:
      What the classifier says of the final samples, where `config.eval` asks for it.

    Raises:
      UsageError: something in the config or the workdir cannot work; nothing is changed then.
      TrainingStopped: the run cannot go on, see `config.training.on_nan`.
      Preempted: SIGTERM came; the state is saved.
    """
    run = Run(config, workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(workdir_lock(workdir, jax.process_index()))
        open_workdir(workdir, run.config)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the workdir is open")
        trainer = Trainer(run, stack)
        state = trainer.train()
        return trainer.judge(state)


class Trainer:
    """Takes the steps of a run, and watches over them."""

    def __init__(self, run: Run, stack: contextlib.ExitStack):
        """Opens what the run reads and writes; `stack` closes it."""
        config, training = run.config, run.config.training
        self.run, self.config = run, config
        self.preemption = stack.enter_context(Preemption())
        self.saver: Checkpointer = stack.enter_context(run.checkpointer())
        self.snapshots = stack.enter_context(
            EmaSnapshots(run.workdir, training.ema_snapshot_every_steps, training.num_steps)
        )
        self.state, self.start = self._packed(self.saver.restore_newest(run.target))
        run.evaluation.open(run.workdir)
        project, fields = config.logging.wandb_project, config_to_dict(config)
        self.log = stack.enter_context(
            open_logger(run.workdir, self.start, training.num_steps, project, fields)
        )
        self.stall = stack.enter_context(
            StallWatch(training.stall_warning_seconds, stall_file(run.workdir), self.log.say)
        )
        self.profiler = stack.enter_context(Profiler(config.profile, run.workdir, self.log.say))
        attempt = self.saver.extra(self.start).get("attempt", 0) if self.start else 0
        self.watch = NanWatch(training.on_nan, attempt, self.log.say)
        self.meter = Meter(config.data.batch_size)
        self.speed = run.speed()
        self.in_flight = collections.deque[Any]()

    def train(self) -> TrainState:
        """Takes all steps that are left."""
        self.log.say(self.run.describe(self.start))
        self.log.say(write_overview(self.run.target.params, self.run.workdir))
        while self.start < self.config.training.num_steps:
            self.state, self.start = self._steps(self.state, self.start)
        return self.state

    def _steps(self, state: TrainState, start: int) -> tuple[TrainState, int]:
        """Steps to the end, or until the run has to return to an earlier one."""
        num_steps = self.config.training.num_steps
        with self.run.batches(start) as batches:
            # Batches have no end.
            for step, batch in zip(range(start + 1, num_steps + 1), batches, strict=False):
                latents = self.run.to_latents(batch, np.int32(step))
                state, metrics = self.run.train_step(state, latents, self.watch.attempt)
                self._took(step, metrics, batches.waited, first=step == start + 1)
                if not (due := self._due(step)):
                    continue
                back = self.watch.check(self.saver.latest_step())
                if back is not None:
                    del state, metrics  # two states may not fit
                    return self._returned(back)
                for action in due:
                    action(step, state)
        return state, num_steps

    def _took(self, step: int, metrics: dict, waited: float, first: bool) -> None:
        """Notes a step that was just dispatched, and waits for one that was before."""
        self.in_flight.append(metrics["loss"])
        if len(self.in_flight) > _STEPS_AHEAD:
            jax.block_until_ready(self.in_flight.popleft())
        self.watch.add(step, metrics["finite"])
        self.meter.add(metrics, waited)
        self.stall.step_done(step)
        self.log.advance()
        if self.profiler.step_done(step, metrics) or first:
            self._rested(step)  # what has passed so far was compilation

    def _due(self, step: int) -> list[Callable[[int, TrainState], None]]:
        """What is to be done after a step, in order."""
        training, last = self.config.training, step == self.config.training.num_steps
        preempted = self.preemption.requested(step)
        saves = last or preempted or step % training.checkpoint_every_steps == 0
        rules = (
            (self._report, last or step % training.log_every_steps == 0),
            (self._save_grid, self.run.is_grid_step(step)),
            (self._evaluate, self.run.is_evaluation_step(step)),
            (self._keep_averages, self.snapshots.is_due(step)),
            (self._save, saves),
            (self._leave, preempted and not last),
        )
        return [action for action, is_due in rules if is_due]

    def _report(self, step: int, _) -> None:
        values = self.meter.read()
        values["learning_rate"] = float(self.run.learning_rate(step - 1))
        values |= self.watch.metrics() | self.speed.metrics(values["images_per_second"])
        self.log.scalars(step, values)
        self.log.show(loss=f"{values['loss']:.4f}", img_s=f"{values['images_per_second']:.0f}")

    def _save_grid(self, step: int, state: TrainState) -> None:
        self.log.image(step, "samples", self.run.save_grid(step, state))
        self._rested(step)

    def _evaluate(self, step: int, state: TrainState) -> None:
        numbers = self.run.evaluate(state)
        self.log.scalars(step, {f"eval/{name}": value for name, value in numbers.items()})
        self._rested(step)

    def _keep_averages(self, step: int, state: TrainState) -> None:
        self.snapshots.save(step, self.run.unpack(state.width_emas))

    def _save(self, step: int, state: TrainState) -> None:
        self.saver.save(step, self.run.unpack(state), {"attempt": self.watch.attempt})

    def _leave(self, step: int, _) -> None:
        self.saver.wait()
        self.log.say(f"SIGTERM: step {step} is saved; the same command goes on")
        raise Preempted(self.config.training.preemption_exit_status)

    def _rested(self, step: int) -> None:
        """Keeps what has just passed out of the throughput."""
        self.meter.restart_clock()
        self.log.restart_clock()
        self.stall.step_done(step)

    def _returned(self, step: int) -> tuple[TrainState, int]:
        """The state of an earlier step, which the run goes on from."""
        self.meter = Meter(self.config.data.batch_size)
        self.saver.wait()
        found = self.saver.restore_newest(self.run.target, self.log.say) if step else None
        self.log.rewind(0 if found is None else found[1])
        return self._packed(found)

    def _packed(self, found: tuple[TrainState, int] | None) -> tuple[TrainState, int]:
        state, step = (self.run.initial_state(), 0) if found is None else found
        return self.run.pack(state), step

    def judge(self, state: TrainState) -> ClassAgreement | None:
        """What the classifier says of samples of the final state."""
        result = self.run.judge(state)
        if result is not None:
            self.log.say(str(result))
            self.log.scalars(int(state.step), {f"eval/{k}": v for k, v in vars(result).items()})
        return result


def write_overview(params: Any, workdir: pathlib.Path) -> str:
    """Writes shapes, sizes and shardings of all parameters to parameters.txt; returns their top.

    Args:
      params: a tree of ShapeDtypeStruct with shardings.
      workdir: folder of the run.
    """
    overview = parameter_overview.get_parameter_overview
    if jax.process_index() == 0:
        with new_file(workdir / "parameters.txt") as file:
            file.write(f"{overview(params, include_stats='sharding')}\n".encode())
    return overview(params, include_stats="sharding", max_lines=_OVERVIEW_LINES)


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
        """Means since the last reading (see `mean_of_steps`); waits for the steps.

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
        return mean_of_steps(values) | speed
