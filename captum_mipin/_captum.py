"""The only place that touches more of Captum than its public names: what its tools expect of a method unsaid."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def captum_entry(method: Callable[P, R]) -> Callable[P, R]:
    """Mark an ``attribute`` method for Captum.

    ``NoiseTunnel`` and ``TCAV`` call ``attribute.__wrapped__``, which ``functools.wraps`` leaves behind. They skip
    what a decorator does, so this one does nothing.
    """

    @wraps(method)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        return method(*args, **kwargs)

    return entry


class NoFuture:
    """What methods without ``attribute_future`` inherit, before Captum's base class, which leaves it undefined."""

    def attribute_future(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not implemented, as for Captum's gradient methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")
