"""Where the numbers of a run go: a progress bar, metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import importlib
import importlib.util
import json
import math
import pathlib
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

from dico_jax.errors import UsageError
from dico_jax.files import new_file


class Logger:
    """What a run reports to. Use as a context manager; silent but in the main process.

    metrics.jsonl has one JSON object a line. What an interrupted run left of steps after the one
    that it goes on from is dropped there, and TensorBoard forgets it; W&B shows it twice.
    UsageError: W&B refuses.
    """

    def __init__(
        self, workdir: pathlib.Path, start_step: int, num_steps: int, wandb_project="", config=None
    ):
        self._workdir, self._is_main = workdir, jax.process_index() == 0
        uses_wandb = self._is_main and wandb_project
        self._wandb = _open_wandb(wandb_project, workdir, config) if uses_wandb else None
        shape = {"unit": "step", "dynamic_ncols": True, "mininterval": 0.5}
        self.bar: Any = tqdm.tqdm(
            total=num_steps, initial=start_step, disable=not self._is_main, **shape
        )
        self._open(start_step)

    def _open(self, step: int) -> None:
        self._files = contextlib.ExitStack()
        if self._is_main:
            file = self._workdir / "metrics.jsonl"
            _drop_lines_after(file, step)
            self._metrics = self._files.enter_context(file.open("a"))
            # Two event files of one second would have one name, and the second replace the first.
            events = {"purge_step": step + 1, "filename_suffix": f".{time.time_ns()}"}
            writer = tensorboardX.SummaryWriter(str(self._workdir), **events)
            self._events = self._files.enter_context(writer)

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *_):
        self.bar.close()
        self._files.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(exception_type is not None))

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self._is_main:
            self.bar.write(text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._is_main:
            line = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            self._metrics.write(json.dumps({"step": step, **line}) + "\n")
            self._metrics.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({"step": step, **values})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture, uint8 (H, W, 3)."""
        if self._is_main:
            self._events.add_image(name, image, step, dataformats="HWC")
        if self._wandb:
            self._wandb.log({"step": step, name: importlib.import_module("wandb").Image(image)})

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, which the run has returned to."""
        self._files.close()
        self._open(step)
        self.bar.n = self.bar.last_print_n = step
        self.bar.unpause()
        self.bar.refresh()


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Drops the lines that a run which goes on after `step` writes again, and half a line."""

    def stays(line: str) -> bool:
        if not line.endswith("\n"):
            return False
        values = json.loads(line)
        # The classifier's judgement comes after the last save.
        return (values["step"], "eval/agreement" in values) <= (step, False)

    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if stays(line)]
    if len(kept) < len(lines):
        with new_file(path) as file:
            file.write("".join(kept).encode())


def require_wandb(project: str) -> None:
    """Raises UsageError where `config.logging.wandb_project` is set and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        fix = "needs Weights & Biases: pip install 'dico_jax[wandb]', or leave it empty"
        raise UsageError("logging.wandb_project", project, fix)


def _open_wandb(project: str, workdir: pathlib.Path, config: dict[str, Any] | None) -> Any:
    """The run of Weights & Biases whose id is kept in `workdir`, so that it goes on as well."""
    require_wandb(project)
    wandb: Any = importlib.import_module("wandb")
    id_file = workdir / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8] + "\n")
    name, run_id = workdir.absolute().name, id_file.read_text().strip()
    which = {"project": project, "id": run_id, "name": name, "resume": "allow"}
    try:
        run = wandb.init(dir=str(workdir), config=config or {}, **which)
    except wandb.Error as error:  # not logged in, no such project, no network
        fix = f": it says {error}; run `wandb login`, set WANDB_MODE=offline, or leave it empty"
        raise UsageError("config.logging.wandb_project", project, fix) from error
    # Its own steps cannot go back, ours can: they are one more number of each line.
    run.define_metric("*", step_metric="step")
    return run
