"""Where the numbers of a run go: metrics.jsonl, TensorBoard events and a progress bar."""

import json
import math
import os
import pathlib

import numpy as np
import tensorboardX
import tqdm


class RunLogger:
    """Writes the metrics of a run from `start_step` on. Use as a context manager.

    metrics.jsonl has one JSON object a line, with "step". Lines of steps after `start_step`, which
    an interrupted run may have left, are dropped: they are written again with the same numbers.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int, num_steps: int):
        path = workdir / "metrics.jsonl"
        _drop_lines_after(path, start_step)
        self._file = path.open("a")
        self._events = tensorboardX.SummaryWriter(
            str(workdir), purge_step=start_step + 1, write_to_disk=True
        )
        self._bar = tqdm.tqdm(
            total=num_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._bar.close()
        self._file.close()
        self._events.close()

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
        self._bar.write(text)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records numbers of `step`."""
        line = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture, uint8 (H, W, 3)."""
        self._events.add_image(name, image, step, dataformats="HWC")


def _is_before(line: dict, step: int) -> bool:
    """Whether a run that goes on after `step` will not write this line again."""
    return line["step"] < step or (line["step"] == step and "loss" in line)


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _is_before(json.loads(line), step)]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
