"""A progress bar of bytes that also says when a conversion may be interrupted."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import tqdm


class ByteProgress:
    """A progress bar of bytes on stderr, and the place where signals are heeded.

    While files are written, SIGINT and SIGTERM (of schedulers) take effect between two pieces of a
    tensor: anywhere else, threads of Orbax might still be writing into what is being removed.
    """

    def __init__(self) -> None:
        self._update: Callable[[int], object] | None = None
        self._signal: int | None = None

    def advance(self, count: int) -> None:
        """Counts bytes, while the bar is there.

        Raises:
          KeyboardInterrupt, SystemExit: there was a SIGINT or a SIGTERM.
        """
        if self._update:
            self._update(count)
        if self._signal is not None:
            number, self._signal = self._signal, None
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    @contextlib.contextmanager
    def running(self, total: int, what: str) -> Iterator[None]:
        """Shows the bar of `total` bytes while the block runs."""
        with (
            self._holding_signals(),
            tqdm.tqdm(total=total, desc=what, unit="B", unit_scale=True, dynamic_ncols=True) as bar,
        ):
            self._update = bar.update
            yield
            self._update = None

    @contextlib.contextmanager
    def _holding_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only there may one do this
            yield
            return
        old = {int(s): signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _: object) -> None:
            self._signal = number
            signal.signal(number, old[number])  # a second one means it

        for number in old:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
