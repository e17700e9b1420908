"""Snapshots of the power-function averages of a run, and averages of any width from them.

WORKDIR/ema_snapshots has one folder per step, written by Orbax, with an item for each width
("width_0_05") and `meta` (JSON: the widths). They are float32: rounded to float16 they would take
half the space, but what is rebuilt of other widths would be 2e-4 off, and 3e-3 at widths far from
theirs, instead of 1e-5 and 5e-4; and a width that was tracked would not come back to the bit.
"""

import contextlib
import functools
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import orbax.checkpoint as ocp

from dico_jax.checkpoints.averages import Snapshot, rebuild
from dico_jax.checkpoints.checksums import find_damage
from dico_jax.checkpoints.orbax_reports import unreported
from dico_jax.checkpoints.step_folders import check_accepted, read_meta, seal
from dico_jax.checkpoints.streaming import stored_leaves
from dico_jax.errors import UsageError

FOLDER = "ema_snapshots"


class EmaSnapshots:
    """Keeps the averages of one run, written in the background. Use as a context manager."""

    def __init__(self, workdir: pathlib.Path, every_steps: int, last_step: int | None = None):
        """Opens (or makes) the snapshots of `workdir`; does nothing if `every_steps` is 0.

        Args:
          workdir: folder of the run.
          every_steps: how often to keep the averages; 0 for never.
          last_step: after which they are kept as well.
        """
        self._every, self._last, self._manager = every_steps, last_step, None
        # Orbax needs an absolute path; a relative one fails later, in a background thread.
        self._folder = (workdir / FOLDER).absolute()
        self._saving = -1  # the step of the save that may still be under way
        if every_steps:
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    cleanup_tmp_directories=True,
                    async_options=ocp.options.AsyncOptions(
                        post_finalization_callback=lambda: seal(self._folder, self._saving)
                    ),
                ),
            )

        self._resources = contextlib.ExitStack()

    def __enter__(self):
        self._resources.enter_context(unreported())
        return self

    def __exit__(self, exc_type, exc, traceback):
        with self._resources:
            if self._manager is None:
                return
            self._resources.callback(self._manager.close)
            try:
                self.wait()
            except Exception as error:
                if exc is None:
                    raise
                print(f"warning: {error}", file=sys.stderr)  # what ended the run matters more

    def is_due(self, step: int) -> bool:
        """Whether `save` keeps the averages after `step`."""
        return self._manager is not None and (step % self._every == 0 or step == self._last)

    def save(self, step: int, width_emas: Mapping[str, Any]) -> None:
        """Starts saving the averages after `step`, if they are due.

        Snapshots of this step and later ones are removed: the run has returned to an earlier step,
        and need not go on as it did before. Returns when the arrays may be donated.

        Args:
          step: the number of steps taken.
          width_emas: the trees by `width_name`.

        Raises:
          UsageError: this save cannot start, or the one before it failed, for want of space or
            permission.
          RuntimeError: it failed otherwise.
        """
        if self._manager is None or not self.is_due(step):
            return
        self.wait()
        for old in [saved for saved in self._manager.all_steps() if saved >= step]:
            self._manager.delete(old)
        items = {name: ocp.args.StandardSave(tree) for name, tree in width_emas.items()}
        meta = ocp.args.JsonSave({"widths": {name: _width_of(name) for name in items}})
        self._saving = step
        with self._explained():
            saved = self._manager.save(step, args=ocp.args.Composite(meta=meta, **items))
        check_accepted(saved, step, self._folder)

    def wait(self) -> None:
        """Waits until the save in the background is finished; raises what `save` raises."""
        if self._manager is not None:
            with self._explained():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Makes a UsageError of what Orbax raises when the disk is full or the folder goes away."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{self._folder}: the averages of step {self._saving} could not be kept "
                f"({_one_line(error)}): make room, or train with "
                "--config.training.ema_snapshot_every_steps=0"
            ) from error


def snapshot_steps(workdir: str) -> list[int]:
    """The steps of the finished snapshots of a workdir, in order.

    Orbax renames a folder to its number when all of it is written.
    """
    folder = pathlib.Path(workdir).absolute() / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


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
        raise UsageError(
            f"--ema_width={width}: {workdir} has no snapshots of averages (looked for "
            f"{FOLDER}/STEP in it): train with config.training.ema_widths and "
            "config.training.ema_snapshot_every_steps, or leave the flag out"
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UsageError(
            f"--step={step}: {workdir} has snapshots of averages of steps "
            f"{', '.join(map(str, steps))}"
        )
    return rebuild(list_snapshots(workdir, step), step, width)


def _width_of(name: str) -> float:
    """The relative width of a `width_name`."""
    return float(name.removeprefix("width_").replace("_", "."))


def _widths(folder: pathlib.Path) -> dict[str, float]:
    """The widths of one step's snapshots by item, all of which are there."""
    try:
        widths = read_meta(folder)["widths"]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder / "meta", error) from error
    for name in widths:
        if not (folder / name).is_dir():
            raise _damaged(folder / name, "it is missing")
    return widths


def _read(folder: pathlib.Path) -> Any:
    _, reason = find_damage(folder.parent, folder.name)
    if reason:
        raise _damaged(folder, reason)
    try:
        leaves = {path: leaf.read() for path, leaf in stored_leaves(folder).items()}
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from error
    return flax.traverse_util.unflatten_dict(leaves)


def _damaged(path: pathlib.Path, reason: object) -> UsageError:
    return UsageError(
        f"{path} is damaged ({_one_line(reason)}): restore it, or remove {path.parent} to do "
        "without that step"
    )


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:200]
