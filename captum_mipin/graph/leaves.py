"""The values that containers, bound methods and similar objects consist of.

An object that may be compared by identity is a leaf. A container is not, because other entries may
be written to it.
"""

from collections import defaultdict, deque, namedtuple
from contextvars import ContextVar
from enum import Enum
from functools import cache, partial
from sys import intern
from types import (
    BuiltinMethodType,
    CellType,
    ClassMethodDescriptorType,
    GenericAlias,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    UnionType,
    WrapperDescriptorType,
)
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor

from captum_mipin.graph.plain import ATOMS, BUFFERS, FEW, base_of, digest_of, slots
from captum_mipin.graph.twin import attributes_of

#: Types of values that are compared by their form and version instead of their content.
MEASURED = (Tensor, np.ndarray)

#: Entries of classes that are written in C, and annotations. Each is the same as long as its class.
DESCRIPTORS = (
    GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType, WrapperDescriptorType,
    ClassMethodDescriptorType, type(vars(namedtuple("_", "field"))["field"]), UnionType,
    GenericAlias,
)  # fmt: skip

#: Number of elements up to which the values of tensors that are no weights are compared.
_FEW = 64

#: Largest depth of containers in containers.
_DEPTH = 40

_END = ("end of a container",)

#: The last leaf of a container whose entries have a digest in their place.
WHOLE = ("end of a digest",)


def is_atom(value: Any) -> bool:
    """Return True for numbers, strings, and tuples of them."""
    kind = type(value)
    if kind in ATOMS or isinstance(value, (Enum, np.generic)):
        return True
    return kind in (tuple, frozenset) and ATOMS.issuperset(map(type, value))


def is_container(value: Any) -> bool:
    """Return True for a value to which entries can be written."""
    return isinstance(value, (dict, list, set, deque))


def leaves(value: Any, depth: int = 0, known: dict[int, Any] | None = None) -> list[Any]:
    """Return a value if it is a leaf, else its type and the leaves of its parts.

    A large container of numbers and strings has its digest in place of these leaves.

    Args:
        value: Any value.
        depth: Number of containers around it.
        known: ``id`` of each container before it → its number and itself. A container that comes
            again, such as in a circle of references, is only named by its number.

    Examples:
        >>> leaves(2.0), leaves((1, 2)), leaves([1, {"a": 2}])[1:-1]
        ([2.0], [(1, 2)], [1, <class 'dict'>, 'a', 2, ('end of a container',)])
    """
    if type(value) in ATOMS or is_atom(value):
        return [value]
    known = {} if known is None else known
    if id(value) in known:
        return [_again(known[id(value)][0])]
    parts = _parts(value)
    if parts is None or depth > _DEPTH:
        return [value]
    if len(parts) > FEW and (digest := digest_of(value)) is not None:
        return [type(value), digest, WHOLE]
    known[id(value)] = len(known), value
    if not ATOMS.issuperset(map(type, parts)):
        parts = [leaf for part in parts for leaf in leaves(part, depth + 1, known)]
    return [type(value), *parts, _END]


@cache  # the same object for the same number: leaves are compared by identity
def _again(number: int) -> tuple[str, int]:
    return "a container again", number


def _parts(value: Any) -> list[Any] | None:
    """Return what a container or a similar object refers to, None for another object."""
    if isinstance(value, MappingProxyType):
        return [*value, *value.values()]
    if isinstance(value, dict):
        base, factory = base_of(value), []
        if isinstance(value, defaultdict):
            factory = [value.default_factory]
        return [*base.__iter__(value), *base.values(value), *factory, *_own(value)]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [*base_of(value).__iter__(value), *_own(value)]
    if isinstance(value, BUFFERS):
        return [digest_of(value), *_own(value)]
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        return [intern(f"{value.shape} {value.dtype}"), *value.ravel().tolist()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords, *_own(value)]
    if isinstance(value, BuiltinMethodType):
        bound = value.__self__
        return None if isinstance(bound, (ModuleType, type)) else [intern(value.__name__), bound]
    if isinstance(value, ReferenceType):
        return [value()]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, ContextVar):
        return [value.get(None)]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    if isinstance(value, CellType):
        return [value.cell_contents] if value != CellType() else []
    if not type(value).__weakrefoffset__ and not isinstance(value, DESCRIPTORS):
        fields = slots(value) | (attributes_of(value) or {})
        return [*fields, *fields.values()] if fields else None
    return None


def _own(value: Any) -> list[Any]:
    """Return the attributes of an object of a subclass of a container."""
    names = getattr(value, "__dict__", None)
    fields = slots(value) | (names if type(names) is dict else {})
    return [*fields, *fields.values()]


def form_of(tensor: Tensor) -> Any:
    """Return everything of a parameter or buffer that a graph depends on, not its values."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def measured(value: Any) -> Any:
    """Return the form of a tensor or array, and what tells whether it was written to."""
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.strides, value.tobytes()
    version = None if value.is_inference() else value._version
    few = value.numel() <= _FEW and value.device.type == "cpu" and value.layout == torch.strided
    return form_of(value), version, repr(value.tolist()) if few else None
