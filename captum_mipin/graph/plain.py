"""Large containers of numbers and strings, which are read as a whole and not entry by entry."""

import ctypes
import hashlib
import pickle
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain, compress, repeat
from sys import intern
from types import MemberDescriptorType, SimpleNamespace
from typing import Any

import torch

#: Number of entries up to which a container is read entry by entry.
FEW = 256

#: Types of values that never change and refer to no other object.
ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, type(...), torch.dtype,
     torch.device, torch.layout, torch.memory_format, torch.Size}
)  # fmt: skip

#: Types of objects that consist of bytes: arrays, and the structures and numbers of C.
BUFFERS: Any = (bytearray, array, ctypes._SimpleCData.__mro__[1])

#: Types that pickle writes without a call of Python code.
_CONTAINERS = frozenset({list, dict, tuple, set, frozenset})


class LongList(list[Any]):
    """A list whose entries torch does not look at."""

    __slots__ = ()


class LongDict(dict[Any, Any]):
    """A dictionary whose entries torch does not look at."""

    __slots__ = ()


class LongTuple(tuple[Any, ...]):
    """A tuple whose entries torch does not look at."""

    __slots__ = ()


#: Type of a large container → that of its copy, which ``torch.utils._pytree`` takes for one value.
COPIES: dict[type, type] = {list: LongList, dict: LongDict, tuple: LongTuple}
_ORIGINALS = {copy: original for original, copy in COPIES.items()}


#: The built-in containers, of which a class may be derived.
_BASES = (OrderedDict, dict, list, tuple, set, frozenset, deque)


def base_of(value: Any) -> Any:
    """Return the built-in type of a container, whose methods read and write its own entries.

    A class derived from it may have other methods, as one that imports what it is asked for.
    """
    return next(base for base in _BASES if isinstance(value, base))


def slots(value: Any) -> dict[str, Any]:
    """Return those attributes of an object that its class lists in ``__slots__``."""
    fields: dict[str, Any] = {}
    for base in type(value).__mro__:
        for name, part in vars(base).items() if "__slots__" in vars(base) else ():
            if type(part) is MemberDescriptorType:
                with suppress(AttributeError):  # an attribute without a value
                    fields[name] = part.__get__(value)
    return fields


class _Pickler(pickle.Pickler):
    """A pickler that takes containers, numbers and strings of Python alone."""

    def reducer_override(self, value: Any) -> Any:
        raise pickle.PicklingError(f"{type(value)} is neither a number nor a string")


def is_long(value: Any) -> bool:
    """Return True for a large container of numbers, strings and tuples of them alone."""
    kind = type(value)
    if kind not in _CONTAINERS or len(value) <= FEW or not _are_atoms(value):
        return kind in _ORIGINALS
    return kind is not dict or _are_atoms(value.values())


def _are_atoms(values: Iterable[Any]) -> bool:
    kinds = set(map(type, values))
    if tuple not in kinds:
        return kinds <= ATOMS
    inside = chain.from_iterable(compress(values, map(isinstance, values, repeat(tuple))))
    return kinds - {tuple} <= ATOMS and ATOMS.issuperset(map(type, inside))


def digest_of(value: Any) -> str | None:
    """Return a digest of bytes, or of a large container of numbers and strings; else None.

    It is the same string for the same contents, and differs for any other.

    Examples:
        >>> numbers = list(range(1000))
        >>> digest_of(numbers) is digest_of(list(range(1000))), digest_of([*numbers, object()])
        (True, None)
        >>> before, numbers[7] = digest_of(numbers), 7.0
        >>> digest_of(numbers) == before
        False
    """
    kind = _ORIGINALS.get(type(value), type(value))
    if isinstance(value, BUFFERS):
        return intern(hashlib.sha1(bytes(value), usedforsecurity=False).hexdigest())
    if kind is deque and len(value) > FEW:
        value = list(value)
    elif kind not in _CONTAINERS or len(value) <= FEW:
        return None
    elif kind is not type(value):
        value = kind(value)
    digest = hashlib.sha1(usedforsecurity=False)
    pickler = _Pickler(SimpleNamespace(write=digest.update), 5)
    pickler.fast = True  # equal contents have the same bytes, also if they are other objects
    try:
        pickler.dump(value)
    except Exception:  # of any type: the contents are something else, or contain themselves
        return None
    return intern(digest.hexdigest())
