"""Places of a model's state: named values that belong together, such as an object's attributes.

A place is read in two ways: once in full, and then at each call of the package, when it must be
compared quickly.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from captum_mipin.graph.leaves import leaves
from captum_mipin.graph.modules import OWN
from captum_mipin.graph.plain import slots
from captum_mipin.graph.twin import attributes_of, package

#: Function object → name → value.
Reader = Callable[[Any], dict[str, Any]]

#: Attributes that every module has, except those that change what a call computes.
IGNORED = OWN - {
    "training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks",
}  # fmt: skip

#: Packages whose objects are compared as a whole. They do not change what a model computes.
_OPAQUE = ("logging", "threading", "captum_mipin", "torch.fx", "torch.export", "torch._ops")

_LIBRARY = sys.stdlib_module_names

#: Attributes of a module that :func:`content_of` contains.
REGISTERED = OWN - IGNORED - {"training"}


#: The same, in a fixed order.
_REGISTERED = tuple(sorted(REGISTERED))


class Place(NamedTuple):
    """Named values that belong together, such as the attributes of an object.

    Attributes:
        owner: Weak reference to the object.
        kind: ``id`` of the object's type.
        read: Function owner → name → value.
        content: See :func:`content_of`.
        inside: Name of a container → ``id`` of each of its leaves.
    """

    owner: Any
    kind: int
    read: Reader
    content: list[Any]
    inside: list[tuple[str, list[int]]]

    def holds(self) -> bool:
        """Return True if all names have the same values as when they were read."""
        owner = self.owner()
        values = self.read(owner)
        if id(type(owner)) != self.kind or content_of(owner, values) != self.content:
            return False
        for name, ids in self.inside:  # noqa: SIM110  # a generator takes twice the time
            if [*map(id, leaves(values[name]))] != ids:
                return False
        return True


def content_of(owner: Any, values: dict[str, Any]) -> list[Any]:
    """Return names and values, the latter by ``id``; for a module, also what it has registered."""
    if not isinstance(owner, nn.Module):
        return [*values, *map(id, values.values())]
    content = [*values, *map(id, values.values())]
    for name in _REGISTERED:
        if entries := values[name]:
            content += (name, *entries, *map(id, entries.values()))
    return content


@dataclass(frozen=True)
class Globals:
    """A function that returns some of the global variables of a function."""

    names: list[str]

    def __call__(self, function: Any) -> dict[str, Any]:
        """Return the variables that exist now, by name."""
        scope = function.__globals__
        return {name: scope[name] for name in self.names if name in scope}


@dataclass(frozen=True)
class Variables:
    """A function that returns some of the variables of a Python module or class."""

    names: list[str]

    def __call__(self, module: Any) -> dict[str, Any]:
        """Return the variables that exist now, by name."""
        scope = vars(module)
        return {name: scope[name] for name in self.names if name in scope}


def function_parts(function: FunctionType) -> dict[str, Any]:
    """Return everything of a function that its result depends on, except global variables."""
    names = [f"variable {name}" for name in function.__code__.co_freevars]
    cells = zip(names, function.__closure__ or (), strict=True)
    return {
        "its code": function.__code__,
        "its defaults": function.__defaults__,
        "its keywords": function.__kwdefaults__,
        **dict(cells),
        **vars(function),
    }


def hooks_of_all_modules(module: Any) -> dict[str, Any]:
    """Return the hooks that torch runs for every module, from the Python module with them."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return {name: getattr(module, name) for name in names}


def class_entries(kind: type) -> dict[str, Any]:
    """Return the attributes that a class itself defines."""
    return dict(vars(kind))


def reader_of(value: Any) -> Reader | None:
    """Return the function that reads the attributes of an object, None if it has none."""
    if isinstance(value, logging.Logger):
        return _levels
    if any("is_set" in vars(base) and package(base) in _LIBRARY for base in type(value).__mro__):
        return _flag
    if type(value).__module__.startswith(_OPAQUE):
        return None
    if slots(value):
        return _all_attributes
    return None if attributes_of(value) is None else vars


def _levels(logger: Any) -> dict[str, Any]:
    """Return what tells which messages a logger takes."""
    levels = {"level": logger.getEffectiveLevel(), "disabled": logger.disabled}
    return levels | {"least level of all": logger.manager.disable}


def _flag(event: Any) -> dict[str, Any]:
    """Return whether an event is set."""
    return {"is set": event.is_set()}


def _all_attributes(value: Any) -> dict[str, Any]:
    return (attributes_of(value) or {}) | slots(value)
