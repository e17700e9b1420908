"""Fresh runs that start from the weights of another one, or from converted ones."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dico_jax.checkpoints.checkpointer import listed
from dico_jax.checkpoints.reader import saved_steps
from dico_jax.checkpoints.saved_weights import SavedWeights
from dico_jax.checkpoints.state import TrainState
from dico_jax.errors import UsageError
from dico_jax.models import abstract_params

_FIELD = "config.training.init_from"
_MAX_LISTED = 20


class WarmStart:
    """The weights that a run starts from: the averaged ones where there are some.

    Everything is taken over but the tables of a condition with another number of rows (another
    number of classes, or a null class on one side only), which start fresh. The
    networks have no weights that depend on the resolution. Optimizer and step start fresh.

    Attributes:
      folder: where they are from.
      fresh: paths of the parameters that start fresh.
    """

    def __init__(self, folder: str, model: Any):
        """Opens the newest checkpoint of `folder` and compares shapes; no weights are read.

        Args:
          folder: workdir of a run, or a converted checkpoint.
          model: the network to start.

        Raises:
          UsageError: there is no checkpoint, or it is of another network.
        """
        saved = SavedWeights(folder, flag=_FIELD)
        self.folder = folder
        self._weights = next(iter(saved.available()), "ema")
        self._step = saved.step
        self._leaves = saved.leaves(self._weights)
        wanted = {p: v.shape for p, v in flatten_dict(abstract_params(model)).items()}
        found = {path: tuple(leaf.shape) for path, leaf in self._leaves.items()}
        self.fresh = [  # tables of another number of rows
            path
            for path, (rows, *others) in wanted.items()
            if path[0] in model.condition_tables and path in found
            if found[path][0] != rows and list(found[path][1:]) == others
        ]
        problems = [
            f"{'/'.join(path)} is {found.get(path)} there and {shape} here"
            for path, shape in wanted.items()
            if path not in self.fresh and found.get(path) != shape
        ]
        problems += [
            f"{'/'.join(path)} is there only" for path in sorted(found.keys() - wanted.keys())
        ]
        if problems:
            name = saved.config["model"]["name"]
            fix = f"has another network ({name}) than this config: {listed(problems, _MAX_LISTED)}"
            raise UsageError(f"{_FIELD}={folder} {fix}")

    def __str__(self) -> str:
        """What is taken over, in a line."""
        text = f"starting from the weights {self._weights!r} of {self.folder}, step {self._step}"
        if self.fresh:
            rows = self._leaves[self.fresh[0]].shape[0]
            text += f"; the label tables have {rows} rows there, so they start fresh"
        return text

    def apply(self, state: TrainState) -> TrainState:
        """A fresh `state` with these weights, in its own shardings and dtypes."""

        def taken(path, value):
            if path in self.fresh:
                return value
            array = np.asarray(self._leaves[path].read(), value.dtype)
            return jax.make_array_from_callback(
                value.shape, value.sharding, lambda index: array[index]
            )

        flat = flatten_dict(state.params)
        params = unflatten_dict({path: taken(path, value) for path, value in flat.items()})
        # The average starts as a copy: two names for one buffer could not both be donated.
        return state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))


def open_warm_start(folder: str | None, workdir: str, model: Any) -> WarmStart | None:
    """What `config.training.init_from` asks for; None where a run goes on from its own checkpoint.

    Raises:
      UsageError: see `WarmStart`.
    """
    if not folder or saved_steps(pathlib.Path(workdir)):
        return None
    return WarmStart(folder, model)
