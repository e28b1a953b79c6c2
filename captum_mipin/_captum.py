"""Helpers for Captum's interface, and the description of the arguments of all ``attribute``."""

import re
from collections.abc import Callable
from inspect import cleandoc
from typing import Any, NoReturn, ParamSpec, TypeVar

from captum_mipin.calls import Helpful, explained

P = ParamSpec("P")
R = TypeVar("R")


def common(inputs: Any, target: Any = None, additional_forward_args: Any = None) -> NoReturn:
    """Describe the common arguments and errors; :func:`describe_common` copies these entries.

    Args:
        inputs: Tensor (batch, ...) or tuple of such tensors, with floating-point values.
        target: The output to explain, in any form that Captum takes: an int, a tuple, a list (one
            target per example) or an integer tensor. None for a model with one output.
        additional_forward_args: Further arguments of the model: one object, or a tuple of several.

    Raises:
        InputError: ``inputs`` is not a tensor or tuple of tensors, is empty, or contains integers
            or NaN. InputError is a subclass of AssertionError and ValueError.
        TargetError: The model has no such target. TargetError is a subclass of AssertionError. Its
            subclass TargetRangeError, for a target out of range, is also an IndexError.
        CaptureError: The model cannot be captured, or cannot run on inputs of this shape, dtype or
            device.
    """
    raise NotImplementedError


#: Heading of a section, "Args:" or "Raises:" → the common entries of this section.
COMMON_ENTRIES: dict[str, str] = dict(
    re.findall(r"\n(Args:|Raises:)\n((?: .*\n)+)", f"{cleandoc(common.__doc__ or '')}\n")
)


def describe_common(method: Callable[P, R]) -> Callable[P, R]:
    """Insert :data:`COMMON_ENTRIES` into a method's docstring, so that ``help`` shows them.

    If there is no ``Args`` section, it is added before ``Returns``. Common errors are inserted only
    if there is a ``Raises`` section.
    """
    doc = cleandoc(method.__doc__ or "")
    if "\nArgs:\n" not in doc:
        doc = doc.replace("\nReturns:\n", "\nArgs:\n\nReturns:\n")
    for heading, entries in COMMON_ENTRIES.items():
        doc = doc.replace(f"\n{heading}\n", f"\n{heading}\n{entries}")
    method.__doc__ = doc
    return method


def captum_entry(method: Callable[P, R]) -> Callable[P, R]:
    """Add ``__wrapped__`` to an ``attribute`` method for Captum, and describe common arguments.

    Captum's ``NoiseTunnel`` and ``TCAV`` call ``attribute.__wrapped__``, which ``functools.wraps``
    sets. Such a call skips the code of a decorator. Therefore this one only changes error messages.
    """
    return explained(describe_common(method))


class NoFuture(Helpful):
    """A class without ``attribute_future``; list it as a base before Captum's base class."""

    def attribute_future(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError, as Captum's gradient methods do."""
        raise NotImplementedError(
            f"attribute_future is not implemented for {type(self).__name__}: call attribute"
        )
