"""Keeps a failed save from being reported many times over.

Orbax logs the traceback of every array that it could not write, asyncio every task that nobody has
waited for, and TensorStore prints every write of that kind: thousands of lines for a full disk.
`Checkpointer` raises the error itself, once.
"""

import contextlib
import logging
import sys


def unreported() -> contextlib.AbstractContextManager[None]:
    """While it lasts, what is printed of failed saves is dropped.

    Where an error ends it, that goes on: what is left of a save is reported when it is collected.
    """
    return _Unreported()


class _Unreported(contextlib.AbstractContextManager):
    """No generator: that would end when it is collected."""

    def __enter__(self) -> None:
        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        self._hook = sys.unraisablehook
        for logger in self._loggers:
            logger.addFilter(self._is_other_record)
        sys.unraisablehook = self._report_others

    def __exit__(self, exc_type, exc, traceback) -> None:
        if exc is not None:
            return
        for logger in self._loggers:
            logger.removeFilter(self._is_other_record)
        sys.unraisablehook = self._hook

    def _is_other_record(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        return "orbax" not in (record.pathname if record.name == "absl" else record.getMessage())

    def _report_others(self, report) -> None:
        if str(report.exc_value) != "Event loop is closed":
            self._hook(report)
