"""The weights of a checkpoint of a run, or of a converted one, for reading."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from dico_jax.checkpoints.reader import (
    FOLDER,
    read_meta,
    read_tree,
    saved_steps,
    stored_leaves,
    verify,
)
from dico_jax.config import with_defaults
from dico_jax.errors import UsageError
from dico_jax.files import Deferred
from dico_jax.ops.cpu import copies_fit

_ITEMS = {"ema": "ema_params", "params": "params"}


class SavedWeights:
    """The weights of a checkpoint, for reading.

    Attributes:
      folder: as given.
      step: the step of the checkpoint.
      config: the config it was made with, a dict; fields it did not have yet have their defaults.
      class_names: of the classes it was trained on.
      converted: of a converted checkpoint, where it came from; else None.
    """

    def __init__(self, folder: str, step: int | None = None, flag: str = "--ckpt"):
        """Opens the newest checkpoint of a workdir (or of a converted one), or that of `step`.

        Args:
          folder: the workdir.
          step: of the checkpoint; the newest if None.
          flag: what messages call the folder.

        Raises:
          UsageError: there is no such folder, no checkpoint in it, or no such step; its meta is
            damaged.
        """
        self.folder = folder
        path = pathlib.Path(folder).absolute()
        steps = saved_steps(path)
        if not steps:
            lacks = f" holds no checkpoint (looked for {FOLDER}/STEP in it)"
            raise UsageError(
                f"{flag}={folder}{lacks if path.is_dir() else ': no such folder'}: give the "
                "workdir of a run or a converted checkpoint"
            )
        if step is not None and step not in steps:
            raise UsageError(
                f"--step={step}: {folder} has steps {', '.join(map(str, sorted(steps)))}"
            )
        self.step = max(steps) if step is None else step
        self._path = path / FOLDER / str(self.step)
        self._verify("meta")
        meta = read_meta(self._path)
        self.config, self.class_names = with_defaults(meta["config"]), meta["class_names"]
        self.converted = meta.get("converted")

    def read(self, weights: str, abstract_params: Any) -> Any:
        """The parameter tree called `weights`: "ema" or "params".

        Args:
          weights: which.
          abstract_params: tree of ShapeDtypeStruct with shardings.

        Raises:
          UsageError: this checkpoint does not have those weights, or they are damaged.
        """
        return read_tree(self._item(weights), abstract_params)

    def available(self) -> list[str]:
        """The weights that this checkpoint has, of "ema" and "params"."""
        return [name for name, folder in _ITEMS.items() if (self._path / folder).is_dir()]

    def leaves(self, weights: str) -> dict[tuple[str, ...], Deferred]:
        """The arrays of the parameter tree called `weights` by path, each read when asked for.

        Raises:
          UsageError: this checkpoint does not have those weights, or they are damaged.
        """
        return stored_leaves(self._item(weights))

    def optimizer_leaves(self) -> dict[tuple[str, ...], Deferred]:
        """The arrays of the optimizer's state by path, each read when asked for.

        Raises:
          UsageError: this checkpoint has none, or it is damaged.
        """
        if not (self._path / "opt_state").is_dir():
            raise UsageError(f"{self._path} has weights alone, and no state of an optimizer")
        self._verify("opt_state")
        return stored_leaves(self._path / "opt_state")

    def _item(self, weights: str) -> pathlib.Path:
        item = self._path / _ITEMS[weights]
        if not item.is_dir():
            have = ", ".join(self.available()) or "none"
            raise UsageError(f"--weights={weights}: {self._path} has only {have}")
        self._verify(_ITEMS[weights])
        return item

    def _verify(self, item: str) -> None:
        verify(self._path, item, advice=": use the checkpoint of another step")


def weights_fit(folder: str | None) -> Callable[[int], bool]:
    """Says of a number of devices whether copies of a checkpoint's weights fit in memory.

    Args:
      folder: a workdir or converted checkpoint, of which the newest step counts. Where there is
        none, all numbers are right.
    """
    path = pathlib.Path(folder or "")
    steps = saved_steps(path) if folder else ()
    sizes = [
        sum(file.stat().st_size for file in (path / FOLDER / str(max(steps)) / item).rglob("*"))
        for item in _ITEMS.values()
        if steps
    ]
    return functools.partial(copies_fit, max(sizes, default=0))
