"""Iterators that a model or its hooks hold: calls advance copies of them.

What an iterator returns next cannot be read without advancing it, and it cannot be set back. So
while a model runs, something else stands in its place.
"""

import copy
import re
import warnings
from collections.abc import Iterator
from itertools import count
from typing import Any

from captum_mipin.errors import CaptureError
from captum_mipin.graph.twin import FOREIGN, attributes_of, package

#: What Python writes for a counter: its next number, and its step. Python 3.14 copies none.
_COUNT = re.compile(r"count\((-?\d+)(?:, (-?\d+))?\)")


def is_iterator(value: Any) -> bool:
    """Return True for an iterator whose state is not in attributes, as a generator or a cycle."""
    if not isinstance(value, Iterator):
        return False
    return attributes_of(value) is None or package(type(value)) in FOREIGN


class StandIn:
    """Stands for an iterator: returns what it would return, and leaves it as it is.

    Args:
        name: The name of the attribute or variable that holds it.
        iterator: The iterator.

    Attributes:
        iterator: The iterator.
        advanced: Whether a value was taken.
        copied: Whether it can be copied; else no value can be taken.

    Examples:
        >>> from itertools import cycle
        >>> scales = cycle([1, 2])
        >>> stand_in = StandIn("scales", scales)
        >>> next(stand_in), next(stand_in), next(scales), stand_in.advanced
        (1, 2, 1, True)
    """

    def __init__(self, name: Any, iterator: Any) -> None:
        self.name, self.iterator = str(name), iterator
        self.advanced, self.copied = False, True
        self._copy: Any = None

    def __iter__(self) -> "StandIn":
        return self

    def __next__(self) -> Any:
        """Return the next value of a copy.

        Raises:
            CaptureError: The iterator cannot be copied.
        """
        if not self.advanced:
            self.advanced = True
            self._copy = _copied(self.iterator)
            self.copied = self._copy is not None
        if not self.copied:
            raise self.refusal()
        return next(self._copy)

    def refusal(self) -> CaptureError:
        """Return the error for a model that takes values of the iterator."""
        return CaptureError(
            f"a call of the model takes the next value of the iterator {self.name!r} "
            f"({type(self.iterator).__name__}), so that its result depends on the number of calls "
            "before; expected a forward whose result depends on its arguments alone: take the "
            "value outside of the model, and pass it as an argument"
        )


def _copied(iterator: Any) -> Any:
    """Return an iterator over the same values, None if there is none."""
    if type(iterator) is count and (numbers := _COUNT.fullmatch(repr(iterator))):
        return count(*(int(number) for number in numbers.groups() if number))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 and 3.13 warn of copies
            # a shallow copy of a cycle would share the iterator inside it
            return copy.deepcopy(iterator)
    except Exception:  # of any type: the iterator decides
        return None
