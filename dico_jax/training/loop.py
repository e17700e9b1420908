"""The training loop."""

import collections
import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dico_jax.checkpoints.averages import EmaSnapshots
from dico_jax.checkpoints.checkpointer import Checkpointer
from dico_jax.checkpoints.reader import saved_steps
from dico_jax.checkpoints.state import TrainState
from dico_jax.config import config_to_dict
from dico_jax.evaluation.networks import ClassAgreement
from dico_jax.files import new_file
from dico_jax.models.block_stacks import stack_blocks, unstack_blocks
from dico_jax.parallel.processes import Heartbeat
from dico_jax.terminal import Bar
from dico_jax.training.logging import Logger
from dico_jax.training.run import Run
from dico_jax.training.speed import Meter, Profiler, peak_speed
from dico_jax.training.watch import NanWatch, Preempted, Preemption, StallWatch, stall_file
from dico_jax.training.workdir import open_workdir, workdir_lock


def train(
    config: ConfigDict,
    workdir: str,
    allowed: Sequence[str] = (),
    page: Callable[[Any], str] | None = None,
) -> ClassAgreement | None:
    """Trains what `config` describes in `workdir`, from its newest checkpoint if it has one.

    Fields that are `allowed` may differ from its config. Returns what the classifier says of the
    final samples, where `config.eval` asks for it. In the end `page` is given the workdir, unless
    `config.logging.report` is off, and returns what the last lines say of a page of the run.

    Raises:
      UsageError: something in the config or the workdir cannot work; nothing is changed then.
      TrainingStopped: the run cannot go on, see `config.training.on_nan`.
      Preempted: SIGTERM or ^C came; the state is saved.
    """
    go_on = "the same command goes on from step {}".format
    heartbeat = Heartbeat(lambda: go_on(max(saved_steps(workdir), default=0)))
    with heartbeat, contextlib.ExitStack() as stack:
        run = Run(config, workdir, allowed)
        done, result = run.finished()
        if multihost_utils.broadcast_one_to_all(np.asarray(done)):
            if jax.process_index() == 0:
                print(run.result(max(saved_steps(workdir)), result, "already done"))
            return result
        stack.enter_context(workdir_lock(workdir, jax.process_index()))
        open_workdir(workdir, run.config, allowed, run.data)
        multihost_utils.sync_global_devices("the workdir is open")
        trainer = _Trainer(run, stack)
        stack.push(lambda kind, error, _: error and heartbeat.__exit__(kind, error, _))
        return trainer.train(page)


class _Trainer:
    def __init__(self, run: Run, stack: contextlib.ExitStack):  # closes what is opened here
        config, training = run.config, run.config.training
        self.run, self.config, self.num_steps = run, config, training.num_steps
        self.preemption = stack.enter_context(Preemption(training.preemption_exit_status))
        self.preemption.at_once = self.preemption.statuses
        meta = {"config": (fields := config_to_dict(config)), **run.data}
        rules = training.keep_checkpoints, training.keep_every_steps
        self.saver = stack.enter_context(Checkpointer(run.workdir, meta, *rules))
        every = training.ema_snapshot_every_steps
        self.snapshots = stack.enter_context(EmaSnapshots(run.workdir, every, self.num_steps))
        self._go_on_from(self.saver.restore_newest(run.target))
        run.evaluation.open(run.workdir)
        where = run.workdir, self.start, self.num_steps, config.logging.wandb_project
        self.log = log = stack.enter_context(Logger(*where, fields))
        seconds, file = training.stall_warning_seconds, stall_file(run.workdir)
        self.stall = stack.enter_context(StallWatch(seconds, file, log.say))
        self.profiler = stack.enter_context(Profiler(config.profile, run.workdir, log.say))
        attempt = self.saver.extra(self.start).get("attempt", 0) if self.start else 0
        self.watch = NanWatch(training.on_nan, attempt, log.say)
        network = run.experiment.model, run.experiment.latent_shape
        self.meter = Meter(config.data.batch_size, peak_speed(*network, run.mesh.devices.flat))
        self.in_flight = collections.deque[Any]()
        self.first_loss, self.began = dict[str, str](), time.monotonic()

    def _go_on_from(self, found: tuple[TrainState, int] | None) -> None:
        state, self.start = (self.run.initial_state(), 0) if found is None else found
        self.state = stack_blocks(state, self.run.experiment.model.stacked_stages, consume=True)

    def train(self, page: Callable[[Any], str] | None) -> ClassAgreement | None:
        """Takes all steps that are left, and judges the samples of the final state."""
        self.log.say(self.run.describe(self.start))
        overview, params = parameter_overview.get_parameter_overview, self.run.target.params
        if jax.process_index() == 0:
            with new_file(self.run.workdir / "parameters.txt") as file:
                file.write(f"{overview(params, include_stats='sharding')}\n".encode())
        if self.start < self.num_steps:
            self.log.say("compiling the training step ...")
        while self.start < self.num_steps:
            self._take_steps()
            self.preemption.at_once = self.preemption.statuses
        self.log.bar.close()
        if count := self.config.eval.class_agreement_samples:
            self.log.say(f"judging {count:,} samples ...")
        result = self.run.judge(functools.partial(self._samples, self.num_steps))
        if result is not None:
            self.log.scalars(self.start, {f"eval/{k}": v for k, v in vars(result).items()})
        self.saver.wait()
        said = ""
        if page and self.config.logging.report and jax.process_index() == 0:
            self.log.flush()
            said = page(self.run.workdir)
        self.log.say(self.run.result(self.start, result, page=said))
        return result

    def _take_steps(self) -> None:
        """Steps to the end, or until the run has to return to an earlier one."""
        with self.run.batches(self.start) as batches:  # which have no end
            self.preemption.waits = lambda: batches.waits
            steps = range(self.start + 1, self.num_steps + 1)
            for step, batch in zip(steps, batches, strict=False):
                latents = self.run.to_latents(batch, np.int32(step))
                self.state, metrics = self.run.train_step(self.state, latents, self.watch.attempt)
                self._took(step, metrics, batches.waited)
                if not (due := self._due(step)):
                    continue
                back = self.watch.check(max(self.saver.steps(), default=None))
                if back is not None:
                    return self._return_to(back)
                for action in due:
                    action(step)
            if step < self.num_steps:  # no batch has come
                if self.watch.check(None) is None:
                    self._save(step)
                self._leave(step)
        self.start = self.num_steps

    def _took(self, step: int, metrics: dict, waited: float) -> None:
        """Notes a step that was just dispatched, and waits for one that was before."""
        if not self.first_loss:
            self._compiled(metrics)
        self.in_flight.append(metrics["loss"])
        if len(self.in_flight) > 2:  # enough to keep devices busy, and few enough to notice a stall
            jax.block_until_ready(self.in_flight.popleft())
        self.watch.add(step, metrics["finite"])
        self.meter.add(metrics, waited)
        self.stall.step_done(step)
        self.saver.check()
        self.log.bar.update(1)
        if self.profiler.step_done(step, metrics) or step == self.start + 1:
            self._rested(step)  # what has passed so far was compilation

    def _compiled(self, metrics: dict) -> None:
        """Waits for the first step of this process, and says what it was."""
        self.first_loss = {"loss": f"{float(metrics['loss']):.4f}"}
        self.log.say(f"compiled in {time.monotonic() - self.began:.0f} s")
        self.log.bar.set_postfix(self.first_loss, refresh=False)

    def _due(self, step: int) -> list[Callable[[int], None]]:
        """What is to be done after a step, in order: what is not to be lost comes first."""
        training, grid_every = self.config.training, self.config.sampling.grid_every_steps
        last, preempted = step == self.num_steps, self.preemption.requested()
        averages = self.snapshots.is_due(step)
        self.preemption.step, self.preemption.at_once = step + 1, {}
        rules = (
            (self._report, last or step % training.log_every_steps == 0),
            (lambda n: self.snapshots.save(n, unstack_blocks(self.state.width_emas)), averages),
            (self._save, last or preempted or step % training.checkpoint_every_steps == 0),
            (self._leave, preempted),
            (self._save_grid, grid_every > 0 and step % grid_every == 0),
            (self._evaluate, self.run.evaluation.is_due(step, self.num_steps)),
        )
        return [action for action, is_due in rules if is_due]

    def _report(self, step: int) -> None:
        values = self.meter.read() | self.watch.metrics()
        self.log.scalars(step, values | {"learning_rate": float(self.run.learning_rate(step - 1))})
        shown = {"loss": f"{values['loss']:.4f}", "img_s": f"{values['images_per_second']:.0f}"}
        self.log.bar.set_postfix(shown, refresh=False)

    def _save_grid(self, step: int) -> None:
        with self._looking(step, "grid") as samples:
            self.log.image(step, "samples", self.run.save_grid(step, samples))

    def _evaluate(self, step: int) -> None:
        with self._looking(step, "evaluation") as samples:
            numbers = self.run.evaluation(samples)
            self.log.scalars(step, {f"eval/{name}": value for name, value in numbers.items()})

    @contextlib.contextmanager
    def _looking(self, step: int, what: str) -> Iterator[Callable]:
        """Around what shows how the run goes: where it fails, the run goes on."""
        self.saver.wait()
        saved, statuses = step in self.saver.steps(), self.preemption.statuses
        self.preemption.at_once = statuses if saved else {signal.SIGINT: 130}
        self.log.say(f"step {step:,}: {what} ...")
        try:
            yield functools.partial(self._samples, step)
        except Exception as error:
            text = " ".join(str(error).split())[:500] or type(error).__name__
            self.log.say(f"warning: the {what} of step {step} failed, training goes on: {text}")
        self.preemption.at_once = {}
        self._rested(step)

    def _samples(self, step: int, conditions: Any, start: int = 0) -> Iterator[np.ndarray]:
        """Batches of images of the averaged weights; where SIGTERM comes, saves and ends."""
        style: Any = {"unit": "image", "disable": jax.process_index() > 0, "leave": False}
        count = len(jax.tree.leaves(conditions)[0])
        with Bar(total=count, initial=start, desc="samples", compiles=True, **style) as bar:
            for images in self.run.samples(self.state, conditions, start, bar.update):
                if self.preemption.requested():
                    self._save(step)
                    self._leave(step)
                yield images

    def _save(self, step: int) -> None:
        self.log.flush()
        self.saver.save(step, unstack_blocks(self.state), {"attempt": self.watch.attempt})

    def _leave(self, step: int) -> None:
        self.saver.wait()
        by_hand = multihost_utils.process_allgather(np.bool_(self.preemption.interrupted)).any()
        name, saved = "^C" if by_hand else "SIGTERM", max(self.saver.steps(), default=0)
        self.log.preempted(saved, name)
        self.log.say(f"{name}: step {saved} is saved; the same command goes on")
        raise Preempted(130 if by_hand else self.config.training.preemption_exit_status)

    def _rested(self, step: int) -> None:
        """Keeps what has just passed out of the throughput."""
        self.meter.restart_clock()
        self.log.bar.skip()
        self.stall.step_done(step)

    def _return_to(self, step: int) -> None:
        del self.state  # two may not fit
        self.meter.pending.clear()
        self.saver.wait()
        self._go_on_from(self.saver.restore_newest(self.run.target, self.log.say) if step else None)
        self.log.rewind(self.start)
