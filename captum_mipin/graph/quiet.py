"""A block in which torch does not print what is raised as an error as well."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from threading import get_ident
from typing import Any

#: Loggers of torch that print a traceback for an error that is reported in one line here.
_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


class _OtherThreads:
    """A stream without what the present thread writes to it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, get_ident()

    def write(self, text: str) -> int:
        """Write text of any other thread."""
        silent = get_ident() == self._thread
        return len(text) if silent else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging the errors of an export, which are raised as well.

    torch also prints the operations that it had recorded before the error.
    """
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    stream: Any = _OtherThreads(sys.stderr)
    try:
        with redirect_stderr(stream):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
