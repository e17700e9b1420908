"""Where the numbers of a run go.

metrics.jsonl, TensorBoard events and a progress bar always, Weights & Biases where
config.logging.wandb_project names a project. The main process alone writes.
"""

import importlib
import importlib.util
import json
import math
import pathlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

from dico_jax.errors import UsageError
from dico_jax.files import new_file

WANDB_ID_FILE = "wandb_run_id"


def require_wandb(project: str) -> None:
    """Raises UsageError where `config.logging.wandb_project` is set and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        fix = "needs Weights & Biases: pip install 'dico_jax[wandb]', or leave it empty"
        raise UsageError("logging.wandb_project", project, fix)


def open_logger(
    workdir: pathlib.Path,
    start_step: int,
    num_steps: int,
    wandb_project: str = "",
    config: dict[str, Any] | None = None,
) -> "Logger":
    """The logger of this process, which is silent unless it is the main one.

    Args:
      workdir: folder of the run.
      start_step, num_steps: the step that the run goes on from, and its last one.
      wandb_project: a project of Weights & Biases; "" for none.
      config: the run's config in plain values, shown there.

    Raises:
      UsageError: Weights & Biases is not installed or refuses.
    """
    if jax.process_index() != 0:
        return Logger(start_step, num_steps)
    wandb = [WandbRun(wandb_project, workdir, config or {})] if wandb_project else []
    outputs = [MetricsFile(workdir, start_step), EventFiles(workdir, start_step), *wandb]
    return Logger(start_step, num_steps, outputs)


class Output:
    """One place that numbers and pictures go to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers of `step`."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture, uint8 (H, W, 3)."""

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, where that can be done."""

    def close(self, failed: bool) -> None:
        """Ends it, and says whether the run failed."""


class Logger:
    """What a run reports to: a progress bar and outputs. Use as a context manager.

    Without outputs it is silent, and shows no bar either.
    """

    def __init__(self, start_step: int, num_steps: int, outputs: Sequence[Output] = ()):
        self._outputs = outputs
        self._bar = tqdm.tqdm(
            total=num_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=0.5,
            disable=not outputs,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *_):
        self._bar.close()
        for output in self._outputs:
            output.close(failed=exception_type is not None)

    def advance(self) -> None:
        """Moves the progress bar on by one step."""
        self._bar.update(1)

    def restart_clock(self) -> None:
        """Keeps what has passed since the last step out of the bar's speed and time left."""
        self._bar.unpause()

    def show(self, **values: str) -> None:
        """Shows values on the progress bar, beside the steps done and the time left."""
        self._bar.set_postfix(values, refresh=False)

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self._outputs:
            self._bar.write(text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers of `step`."""
        for output in self._outputs:
            output.scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture, uint8 (H, W, 3)."""
        for output in self._outputs:
            output.image(step, name, image)

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, which the run has returned to."""
        for output in self._outputs:
            output.rewind(step)
        self._bar.n = self._bar.last_print_n = step
        self._bar.unpause()
        self._bar.refresh()


class MetricsFile(Output):
    """metrics.jsonl: one JSON object a line, with "step".

    Lines of steps after the one that the run goes on from, which an interrupted run may have left,
    are dropped: they are written again with the same numbers.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        self._path = workdir / "metrics.jsonl"
        _drop_lines_after(self._path, start_step)
        self._file = self._path.open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        line = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        self._file.close()
        _drop_lines_after(self._path, step)
        self._file = self._path.open("a")

    def close(self, failed: bool) -> None:
        self._file.close()


class EventFiles(Output):
    """TensorBoard's events; it forgets what it has read of steps that are taken again."""

    def __init__(self, workdir: pathlib.Path, start_step: int):
        self._workdir, self._events = workdir, _event_writer(workdir, start_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._events.add_image(name, image, step, dataformats="HWC")

    def rewind(self, step: int) -> None:
        self._events.close()
        self._events = _event_writer(self._workdir, step)

    def close(self, failed: bool) -> None:
        self._events.close()


def _event_writer(workdir: pathlib.Path, start_step: int) -> tensorboardX.SummaryWriter:
    # Two event files of one second would have one name, and the second replace the first.
    suffix = f".{time.time_ns()}"
    return tensorboardX.SummaryWriter(
        str(workdir), purge_step=start_step + 1, filename_suffix=suffix, write_to_disk=True
    )


class WandbRun(Output):
    """A run of Weights & Biases, the same one whenever the run in `workdir` goes on.

    Its id is kept in the workdir's file WANDB_ID_FILE. W&B's own settings (WANDB_ENTITY,
    WANDB_MODE=offline, ...) come from its environment variables. It drops nothing: it shows the
    steps that are taken again twice. UsageError: wandb is not installed, or refuses.
    """

    def __init__(self, project: str, workdir: pathlib.Path, config: dict[str, Any]):
        require_wandb(project)
        self._wandb: Any = importlib.import_module("wandb")
        try:
            self._run = self._wandb.init(
                project=project,
                id=_wandb_id(workdir),
                name=workdir.absolute().name,
                resume="allow",
                dir=str(workdir),
                config=config,
            )
        except self._wandb.Error as error:  # not logged in, no such project, no network
            fix = (
                f": Weights & Biases says: {error}; run `wandb login`, set WANDB_MODE=offline, or "
                "leave it empty"
            )
            raise UsageError("config.logging.wandb_project", project, fix) from error
        # Its own steps cannot go back, ours can: they are one more number of each line.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({"step": step, name: self._wandb.Image(image)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_id(workdir: pathlib.Path) -> str:
    file = workdir / WANDB_ID_FILE
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def _is_before(line: dict, step: int) -> bool:
    """Whether a run that goes on after `step` will not write this line again."""
    # The classifier's judgement comes after the last save.
    return line["step"] < step or (line["step"] == step and "eval/agreement" not in line)


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _is_before(json.loads(line), step)]
    if len(kept) < len(lines):
        with new_file(path) as file:
            file.write("".join(kept).encode())
