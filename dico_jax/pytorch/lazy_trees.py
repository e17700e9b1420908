"""Parameter trees of files, and state dicts of checkpoints, with leaves that are made when asked.

Names, shapes and dtypes are all checked first, which reads no tensor; then whoever writes the
result asks for one leaf after the other, and holds no more than that.
"""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dico_jax.checkpoints.reader import differences
from dico_jax.errors import UsageError, several
from dico_jax.files import Deferred
from dico_jax.pytorch.key_maps import Entry, KeyMap, Path, check_tensors, entries, known_names
from dico_jax.terminal import Bar

_MAX_NAMED = 5


class ByteProgress:
    """tqdm's bar of bytes on stderr, and the place where signals are heeded.

    While files are written, SIGINT and SIGTERM (of schedulers) take effect between two pieces of a
    tensor: anywhere else, threads of Orbax might still be writing into what is being removed.
    """

    def __init__(self) -> None:
        self._update: Callable[[int], object] = lambda count: None
        self._signal: int | None = None

    def advance(self, count: int) -> None:
        """Counts bytes, while the bar is there; ends the process if there was a signal."""
        self._update(count)
        if self._signal is not None:
            number, self._signal = self._signal, None
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    @contextlib.contextmanager
    def running(self, total: int, what: str) -> Iterator[None]:
        """Shows the bar of `total` bytes while the block runs."""
        old = {}
        if threading.current_thread() is threading.main_thread():  # only there may one do this
            old = {int(s): signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            style: dict[str, Any] = {"unit": "B", "unit_scale": True}
            with Bar(total=total, desc=what, **style) as bar:
                self._update = bar.update
                yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one means it


class Health:
    """Counts NaN and infinite weights while they pass, and tells of them in the end."""

    def __init__(self) -> None:
        self._bad: dict[str, int] = {}
        self.rounded = 0  # tensors that float32 does not hold exactly

    def look(self, key: str, values: np.ndarray) -> None:
        # A finite sum has finite terms, and takes no memory; else they are counted.
        with np.errstate(all="ignore"):
            if np.isfinite(values.sum(dtype=np.float32)):
                return
        count = int(values.size - np.count_nonzero(np.isfinite(values)))
        if count:
            self._bad[key] = self._bad.get(key, 0) + count

    def warn(self) -> None:
        """Prints on stderr what there is to say."""
        if self.rounded:
            print(f"warning: {self.rounded} float64 tensors, rounded to float32", file=sys.stderr)
        if self._bad:
            worst = sorted(self._bad.items(), key=lambda item: -item[1])
            named = several([f"{key} ({count})" for key, count in worst], _MAX_NAMED)
            what = f"{sum(self._bad.values())} weights are NaN or infinite"
            print(f"warning: {what}, in {len(worst)} tensors: {named}", file=sys.stderr)


def load_params(tensors: Mapping[str, Any], abstract_params: Any, key_map: KeyMap) -> Any:
    """The parameter tree of a state dict, read now: float32 NumPy arrays, C-contiguous.

    UsageError: tensors are missing, unexpected, misshapen, or hold no floats; all are listed.
    """
    health = Health()
    tree = deferred_tree(tensors, entries(abstract_params, key_map), key_map, health)
    params = jax.tree.map(lambda leaf: np.ascontiguousarray(leaf.read()), tree)
    health.warn()
    return params


def deferred_tree(
    tensors: Mapping[str, Any], wanted: list[Entry], key_map: KeyMap, health: Health
) -> Any:
    """The tree of the parameters `wanted`, float32, leaves unread; errors as in `load_params`."""
    found = known_names(tensors, key_map)
    check_tensors(found, wanted, key_map)
    wrong = [key for key, ref in found.items() if not jnp.issubdtype(ref.dtype, jnp.floating)]
    if wrong:
        listed = several([f"{key} is {found[key].dtype}" for key in wrong])
        raise UsageError(f"weights must be floating-point numbers: {listed}")
    health.rounded += sum(ref.dtype.itemsize > 4 for ref in found.values())

    def read(entry: Entry) -> np.ndarray:
        tensor = found[entry.key].read()
        health.look(entry.key, tensor)
        return entry.to_jax(tensor.astype(np.float32, copy=False))

    return flax.traverse_util.unflatten_dict(
        {e.path: Deferred(np.float32, e.shape, functools.partial(read, e)) for e in wanted}
    )


def deferred_state_dict(
    leaves: Mapping[Path, Any], wanted: list[Entry], name: str, health: Health
) -> dict[str, Deferred]:
    """The state dict of saved parameters, in the order of `wanted`, tensors unread.

    Where the `leaves` are not these, UsageError lists the differences, and calls them `name`.
    """
    there = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    if differ := differences(there, {entry.path: entry.shape for entry in wanted}):
        raise UsageError(f"{name} are not those of the config's model: {differ}")

    def make(entry: Entry) -> np.ndarray:
        leaf = leaves[entry.path].read()
        health.look(entry.key, leaf)
        return entry.to_torch(leaf)

    return {
        e.key: Deferred(leaves[e.path].dtype, e.torch_shape, functools.partial(make, e))
        for e in wanted
    }
