"""Captum's contract: what its tools expect of ``attribute``, and the arguments that all share."""

import re
from collections.abc import Callable
from functools import wraps
from inspect import cleandoc
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def common(inputs: Any, target: Any = None, additional_forward_args: Any = None) -> NoReturn:
    """Document what every ``attribute`` has; :func:`describe_common` copies the entries below.

    Args:
        inputs: Tensor (batch, ...) or tuple of such tensors, with floating-point values.
        target: The output to explain, in any form that Captum takes: an int, a tuple, a list (one
            target for each example) or an integer tensor. None for a model with one output.
        additional_forward_args: Further arguments of the model: one object, or a tuple of several.

    Raises:
        InputError: ``inputs`` are no tensor or tuple of tensors, are empty, or contain integers or
            NaN. It is also an AssertionError and a ValueError.
        TargetError: The model has no such target. It is also an AssertionError; if the target is
            out of range, it is also an IndexError.
        CaptureError: The model cannot be captured, or cannot run on inputs of this shape, dtype or
            device.
    """
    raise NotImplementedError


#: Heading of a section, "Args:" or "Raises:" → the common entries below it.
COMMON_ENTRIES: dict[str, str] = dict(
    re.findall(r"\n(Args:|Raises:)\n((?: .*\n)+)", f"{cleandoc(common.__doc__ or '')}\n")
)


def describe_common(method: Callable[P, R]) -> Callable[P, R]:
    """Insert :data:`COMMON_ENTRIES` into a method's docstring, where ``help`` shows them.

    The ``Args`` section is made if it is missing; it then stands before ``Returns``. The ``Raises``
    section is completed only if the method has one.
    """
    doc = cleandoc(method.__doc__ or "")
    if "\nArgs:\n" not in doc:
        doc = doc.replace("\nReturns:\n", "\nArgs:\n\nReturns:\n")
    for heading, entries in COMMON_ENTRIES.items():
        doc = doc.replace(f"\n{heading}\n", f"\n{heading}\n{entries}")
    method.__doc__ = doc
    return method


def captum_entry(method: Callable[P, R]) -> Callable[P, R]:
    """Mark an ``attribute`` method for Captum, and describe its common arguments.

    Captum's ``NoiseTunnel`` and ``TCAV`` call ``attribute.__wrapped__``, which ``functools.wraps``
    sets. They thereby skip what a decorator does, so this one changes no value.
    """

    @wraps(describe_common(method))
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        return method(*args, **kwargs)

    return entry


class NoFuture:
    """Base of methods without ``attribute_future``; it comes before Captum's base class."""

    def attribute_future(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError, as Captum's gradient methods do."""
        raise NotImplementedError(
            f"attribute_future is not implemented for {type(self).__name__}: call attribute"
        )
