"""Checks of options, and the words for values that are not what was expected."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from math import isfinite
from numbers import Real
from typing import Any

from captum_mipin.errors import InputError

#: Number of names that an error lists; these are the names closest to the user's.
_SHOWN = 8


def type_of(value: object) -> str:
    """Return what a value is, with an article, for an error message.

    Examples:
        >>> type_of(None), type_of(3), type_of("a"), type_of(int)
        ('None', 'an int', 'a str', 'the class int')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    if name == "ndarray":
        return "a numpy array"
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def closest(name: object, names: Iterable[str]) -> str:
    """Return the names closest to a misspelt one, as text for an error message.

    Examples:
        >>> closest("layer4", ["conv1", "layer1", "layer4.0"])
        "'layer4.0', 'layer1', 'conv1'"
    """
    return ", ".join(map(repr, get_close_matches(str(name), names, _SHOWN, cutoff=0)))


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise InputError if the value of the option ``name`` is not one of ``choices``."""
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise InputError(f"{name}={value!r} is not one of {known}: pass one of them")


def check_number(
    name: str,
    value: Any,
    least: float = 0,
    *,
    above: bool = False,
    whole: bool = False,
    finite: bool = True,
) -> None:
    """Raise InputError unless the value of an option is a number of at least ``least``.

    Args:
        name: The name of the option.
        value: Its value.
        least: The least allowed value.
        above: True if the value must be greater than ``least``.
        whole: True if the value must be an integer.
        finite: True if the value must be less than infinity.

    Examples:
        >>> check_number("ridge", "low")
        Traceback (most recent call last):
        captum_mipin.errors.InputError: ridge='low' must be a finite number of at least 0: change it
    """
    if (
        not isinstance(value, Real)
        or isinstance(value, bool)
        or (finite and not isfinite(value))
        or (whole and not hasattr(value, "__index__"))
        or not (float(value) > least if above else float(value) >= least)
    ):
        expected = f"a {'whole ' if whole else 'finite ' if finite else ''}number "
        expected += f"above {least:g}" if above else f"of at least {least:g}"
        raise InputError(f"{name}={value!r} must be {expected}: change it")
