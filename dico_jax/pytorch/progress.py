"""A progress bar of bytes that also says when a conversion may be interrupted."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import tqdm


class ByteProgress:
    """tqdm's bar of bytes on stderr, and the place where signals are heeded.

    While files are written, SIGINT and SIGTERM (of schedulers) take effect between two pieces of a
    tensor: anywhere else, threads of Orbax might still be writing into what is being removed.
    """

    def __init__(self) -> None:
        self._update: Callable[[int], object] = lambda count: None
        self._signal: int | None = None

    def advance(self, count: int) -> None:
        """Counts bytes, while the bar is there.

        Raises:
          KeyboardInterrupt, SystemExit: there was a SIGINT or a SIGTERM.
        """
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
            with tqdm.tqdm(
                total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True
            ) as bar:
                self._update = bar.update
                yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one means it
