"""Snapshots of the power-function averages of a run, and averages of any width from them.

WORKDIR/ema_snapshots has one folder per step with an item for each width ("width_0_05") and `meta`
(the widths). They are float32: rounded to float16 they would take half the space, but what is
rebuilt of other widths would be 2e-4 off, and 3e-3 at widths far from theirs, instead of 1e-5 and
5e-4; and a width that was tracked would not come back to the bit.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import flax

from dico_jax.checkpoints.averages import Snapshot, rebuild
from dico_jax.checkpoints.reader import damaged, read_meta, steps_in, stored_leaves, verify
from dico_jax.checkpoints.writer import StepWriter
from dico_jax.errors import UsageError

FOLDER = "ema_snapshots"
_ADVICE = ": restore it, or remove its step's folder to do without that step"


class EmaSnapshots:
    """Keeps the averages of one run, written in the background. Use as a context manager."""

    def __init__(self, workdir: pathlib.Path, every_steps: int, last_step: int | None = None):
        """Opens (or makes) the snapshots of `workdir`; does nothing if `every_steps` is 0.

        Args:
          workdir: folder of the run.
          every_steps: how often to keep the averages; 0 for never.
          last_step: after which they are kept as well.
        """
        self._every, self._last = every_steps, last_step
        self._writer = StepWriter(workdir / FOLDER) if every_steps else None

    def __enter__(self):
        if self._writer is not None:
            self._writer.__enter__()
        return self

    def __exit__(self, *exc):
        if self._writer is not None:
            self._writer.__exit__(*exc)

    def is_due(self, step: int) -> bool:
        """Whether `save` keeps the averages after `step`."""
        return self._every > 0 and (step % self._every == 0 or step == self._last)

    def save(self, step: int, width_emas: Mapping[str, Any]) -> None:
        """Starts saving the averages after `step`, if they are due.

        Snapshots of this step and later ones are removed: the run has returned to an earlier step,
        and need not go on as it did before. Returns when the arrays may be donated.

        Args:
          step: the number of steps taken.
          width_emas: the trees by `width_name`.

        Raises:
          UsageError, RuntimeError: see `StepWriter.write`.
        """
        if self._writer is None or not self.is_due(step):
            return
        self._writer.wait()
        for later in [saved for saved in self._writer.steps() if saved >= step]:
            self._writer.remove(later)
        widths = {name: _width_of(name) for name in width_emas}
        self._writer.write(step, width_emas, {"widths": widths})


def snapshot_steps(workdir: str) -> list[int]:
    """The steps of the finished snapshots of a workdir, in order."""
    return sorted(steps_in(pathlib.Path(workdir) / FOLDER))


def list_snapshots(workdir: str, last_step: int | None = None) -> list[Snapshot]:
    """The snapshots of a workdir, unread, in the order of their steps.

    Args:
      workdir: folder of a run.
      last_step: leaves later ones out.

    Raises:
      UsageError: one is damaged; it is named.
    """
    folder = pathlib.Path(workdir).absolute() / FOLDER
    return [
        Snapshot(step, width, functools.partial(_read, folder / str(step) / name))
        for step in snapshot_steps(workdir)
        if last_step is None or step <= last_step
        for name, width in _widths(folder / str(step)).items()
    ]


def rebuilt_ema(workdir: str, width: float, step: int | None = None) -> Any:
    """The averaged weights of any width, rebuilt from the snapshots of a run.

    Args:
      workdir: its folder.
      width: the relative width wanted.
      step: after which step, one that has a snapshot; the newest if None.

    Returns:
      A parameter tree of float32 NumPy arrays.

    Raises:
      UsageError: there are no snapshots, none of that step, too few for that width, or a snapshot
        that is used is damaged.
    """
    steps = snapshot_steps(workdir)
    if not steps:
        fix = (
            f": {workdir} has no snapshots of averages (looked for {FOLDER}/STEP in it): train "
            "with config.training.ema_widths and config.training.ema_snapshot_every_steps, or "
            "leave the flag out"
        )
        raise UsageError("--ema_width", width, fix)
    step = steps[-1] if step is None else step
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise UsageError("--step", step, f": {workdir} has snapshots of averages of steps {there}")
    return rebuild(list_snapshots(workdir, step), step, width)


def _width_of(name: str) -> float:
    """The relative width of a `width_name`."""
    return float(name.removeprefix("width_").replace("_", "."))


def _widths(folder: pathlib.Path) -> dict[str, float]:
    """The widths of one step's snapshots by item, all of which are there."""
    widths = read_meta(folder).get("widths")
    if not isinstance(widths, dict):
        raise damaged(folder / "meta", "it has no widths", _ADVICE)
    for name in widths:
        if not (folder / name).is_dir():
            raise damaged(folder / name, "it is missing", _ADVICE)
    return widths


def _read(item: pathlib.Path) -> Any:
    verify(item.parent, item.name, _ADVICE)
    try:
        leaves = {path: leaf.read() for path, leaf in stored_leaves(item).items()}
    except (OSError, ValueError, KeyError) as error:
        raise damaged(item, error, _ADVICE) from error
    return flax.traverse_util.unflatten_dict(leaves)
