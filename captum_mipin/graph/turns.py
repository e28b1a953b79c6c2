"""Exports and explanations take turns."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class _Turns:
    """Lets explanations in several threads overlap, but nothing overlap an export.

    ``torch.export`` cannot run in two threads at once. While it runs, it switches oneDNN off for
    the whole process, so that convolutions in other threads would round differently.
    """

    def __init__(self) -> None:
        self._changed, self._explaining = Condition(), 0

    @contextmanager
    def explaining(self) -> Iterator[None]:
        with self._changed:
            self._explaining += 1
        try:
            yield
        finally:
            with self._changed:
                self._explaining -= 1
                self._changed.notify_all()

    @contextmanager
    def exporting(self) -> Iterator[None]:
        with self._changed:  # held throughout, so that no explanation begins
            self._changed.wait_for(lambda: self._explaining == 0)
            yield


TURNS = _Turns()
