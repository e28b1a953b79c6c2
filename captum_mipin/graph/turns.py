"""A lock that keeps explanations in other threads from running during an export."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class _Turns:
    """A lock that any number of explanations can hold at once, or a single export alone.

    ``torch.export`` cannot run in two threads at once. While it runs, it also switches oneDNN off
    for the whole process, so that convolutions in other threads would round differently.
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
        with self._changed:  # held during the whole export, so that no explanation can begin
            self._changed.wait_for(lambda: self._explaining == 0)
            yield


TURNS = _Turns()
