"""The restoration of everything that calls of a model write to.

A forward or a hook may write to a global dictionary, to a list of another object, or to a variable
of an enclosing function. None of these belongs to the model, so that no copy of the model has
its own. After a call with traced values they would contain traced values.
"""

import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import (
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from numpy import memmap, ndarray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from captum_mipin.graph.everywhere import original, tables_of_all
from captum_mipin.graph.iterators import StandIn, is_iterator
from captum_mipin.graph.modules import OWN, named_tensors
from captum_mipin.graph.plain import base_of, is_long
from captum_mipin.graph.twin import FOREIGN, attributes_of, package
from captum_mipin.graph.writes import Saved

#: Attributes of recurrent layers that contain their parameters again; torch exchanges these itself.
_AGAIN = frozenset({"_flat_weights", "_flat_weight_refs"})

#: Packages whose module variables and classes calls of a model do not write to.
_SKIPPED = FOREIGN | sys.stdlib_module_names

#: The name of tensors that are not attributes of modules.
A_TENSOR = "a tensor"

#: Methods of objects of C, such as that of an iterator.
_METHODS = (BuiltinMethodType, MethodWrapperType)


class _Place(NamedTuple):
    """Something that calls may write to.

    Attributes:
        read: Function that returns the present entries, as pairs (key, value).
        write: Function that takes such pairs, and writes them.
        entries: The entries at the beginning.
    """

    read: Callable[[], list[tuple[Any, Any]]]
    write: Callable[[list[tuple[Any, Any]]], None]
    entries: list[tuple[Any, Any]]


class Kept:
    """The present contents of all places that calls of a model may write to.

    These are attributes of its modules and of other objects, containers, variables of enclosing
    functions, attributes of classes, and global variables. The search begins at the modules,
    their classes and their forward hooks, and follows every reference. Parameters and buffers are
    left out. Of other tensors the values are kept as well.

    Args:
        model: The model.
        reads: Whether a call may read an attribute with a name. If it is given, the search leaves
            out hooks, and what other attributes alone refer to.

    Attributes:
        changed: Whether a restoration has found other contents.
        words: The names in the code that calls may run.
        counting: The global variables of functions that call ``len``.
        fixed: Iterators that nothing can stand for, as those in tuples and in ``partial``.

    Examples:
        >>> import torch
        >>> values = {}
        >>> model = nn.Linear(2, 1)
        >>> _ = model.register_forward_hook(lambda module, x, y: values.update(last=y))
        >>> kept = Kept(model)
        >>> _ = model(torch.ones(1, 2))
        >>> kept.restore(), values
        (['last'], {})
    """

    def __init__(self, model: nn.Module, reads: Callable[[str], bool] | None = None) -> None:
        self._reads = reads
        self._places: list[_Place] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []  # with their versions and values
        self._iterators: dict[int, Any] = {}  # by id
        self.fixed: list[Any] = []
        self.counting: list[dict[str, Any]] = []
        self._weights: list[Tensor] = []  # of all modules, also of unregistered ones
        self._arrays: list[tuple[Any, Any, bytes]] = []  # with a copy, and its bytes
        self.changed = False
        self.words = set[str]()
        seen: dict[int, Any] = {}  # contains the values, so that no id is used again
        stack: list[Any] = [model]
        if reads is None:
            stack += [original(hook) for table in tables_of_all() for hook in table.values()]
        while stack:
            value = stack.pop()
            if id(value) not in seen:
                seen[id(value)] = value
                parts = list(self._parts(value))
                if isinstance(value, (tuple, partial, *_METHODS)):
                    self.fixed += filter(is_iterator, parts)
                stack.extend(parts)

    def restore(self) -> list[str]:
        """Write the first contents back.

        Returns:
            The names of the attributes and variables that had got another tensor.
        """
        names: list[str] = []
        for read, write, entries in self._places:
            present = read()
            pairs = zip(present, entries, strict=False)
            # a list takes half the time of a generator
            other = [1 for new, old in pairs if new[1] is not old[1] or new[0] is not old[0]]
            if len(present) == len(entries) and not other:
                continue
            # torch.export writes equal tuples in place of those it has read, such as strides
            self.changed |= len(present) != len(entries) or not all(
                new[0] is old[0] and equal(new[1], old[1])
                for new, old in zip(present, entries, strict=True)
            )
            known = {id(value) for _, value in entries}
            for key, value in present:
                leaves = () if id(value) in known else pytree.tree_leaves(value)
                if any(isinstance(leaf, Tensor) for leaf in leaves):
                    names.append(str(key))
            write(entries)
        # an export would record the copy
        tensors = () if torch.compiler.is_exporting() else self._tensors
        for tensor, version, values in tensors:
            if tensor._version != version:
                self.changed = True
                tensor.data.copy_(values)
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        for held, values, content in self._arrays:
            if bytes(held) != content:
                self.changed = True
                held[... if isinstance(held, ndarray) else slice(None)] = values
        return names

    def saved(self, model: nn.Module) -> Saved:
        """Return weights, buffers and the other tensors of a model, to be saved before writes."""
        others = [*self._weights, *(tensor for tensor, _, _ in self._tensors)]
        named = [*named_tensors(model), *((A_TENSOR, tensor) for tensor in others)]
        return Saved(named, self.words)

    @contextmanager
    def standing_in(self) -> Iterator[list[StandIn]]:
        """Put something in the place of each iterator, which advances a copy; return these."""
        if not self._iterators:
            yield []
            return
        places, stand_ins = self._places, dict[int, StandIn]()

        def replaced(key: Any, value: Any) -> tuple[Any, Any]:
            if id(value) not in self._iterators:
                return key, value
            return key, stand_ins.setdefault(id(value), StandIn(key, value))

        self._places = [
            place._replace(entries=[replaced(*entry) for entry in place.entries])
            for place in places
        ]
        changed = [
            (old, new) for old, new in zip(places, self._places, strict=True)
            if any(isinstance(value, StandIn) for _, value in new.entries)
        ]  # fmt: skip
        try:
            for _, new in changed:
                new.write(new.entries)
            yield list(stand_ins.values())
        finally:
            self._places = places
            for old, _ in changed:
                old.write(old.entries)

    def holds(self, iterator: Any) -> bool:
        """Return True if the search has found an iterator."""
        return id(iterator) in self._iterators

    def contents(self) -> list[list[tuple[Any, Any, Any]]]:
        """Return what differs after a write to any place.

        Returns:
            For each place, its entries as (key, value, what differs after each write to the value
            itself).
        """
        return [
            [(key, value, version_of(value)) for key, value in place.read()]
            for place in self._places
        ]

    def _parts(self, value: Any) -> Iterable[Any]:
        """Return what a value refers to, and note the value if calls may write to it."""
        if isinstance(value, Tensor):
            self._keep_values(value)
            return ()
        if isinstance(value, (str, bytes, int, float, type(None))):
            return ()
        if isinstance(value, (ndarray, bytearray, array)):
            self._keep_array(value)
            return ()
        if is_iterator(value):
            self._iterators[id(value)] = value
            return ()
        if isinstance(value, FunctionType):
            return self._parts_of_function(value)
        if isinstance(value, type):
            return self._parts_of_class(value)
        if isinstance(value, MethodType):
            return value.__func__, value.__self__
        if isinstance(value, partial):
            return value.func, *value.args, *value.keywords.values()
        if isinstance(value, (*_METHODS, ReferenceType)):
            return (value() if isinstance(value, ReferenceType) else value.__self__,)
        if isinstance(value, (property, staticmethod, classmethod)):
            return (value.fget if isinstance(value, property) else value.__func__,)
        if isinstance(value, (tuple, frozenset)):
            return () if is_long(value) else list(base_of(value).__iter__(value))
        if isinstance(value, (dict, list, deque, set)):
            return self._contents(value)
        return self._attributes(value)

    def _keep_values(self, tensor: Tensor) -> None:
        """Keep the values of a tensor that calls may write to in place."""
        plain = type(tensor) is Tensor and tensor.layout is torch.strided
        if plain and not tensor.is_inference() and 0 not in tensor.stride():
            self._tensors.append((tensor, tensor._version, tensor.detach().clone()))

    def _keep_array(self, value: Any) -> None:
        """Keep the values of an array; those of a file cannot be kept."""
        if not isinstance(value, ndarray):
            self._arrays.append((value, value[:], bytes(value)))
        elif value.flags.writeable and not isinstance(value, memmap):
            self._arrays.append((value, value.copy(), value.tobytes()))

    def _contents(self, value: Any) -> Iterable[Any]:
        """Note a container; return its entries."""
        base = base_of(value)
        if issubclass(base, dict):

            def write(entries: Any) -> None:
                base.clear(value)
                for key, entry in entries:
                    base.__setitem__(value, key, entry)

            self._note(lambda: list(base.items(value)), write)
            return () if is_long(value) else list(base.values(value))

        def refill(entries: Any) -> None:
            base.clear(value)
            fill = base.update if base is set else base.extend
            fill(value, [entry for _, entry in entries])

        def read() -> list[tuple[str, Any]]:
            return [("an entry of a list", entry) for entry in base.__iter__(value)]

        self._note(read, refill)
        return () if is_long(value) else list(base.__iter__(value))

    def _attributes(self, value: Any) -> Iterator[Any]:
        """Note the attributes of an object; yield their values, and what its calls run."""
        module = isinstance(value, nn.Module)
        names = attributes_of(value)
        if (
            names is None
            or isinstance(value, ModuleType)
            or (package(type(value)) in FOREIGN and not module)
        ):
            return
        hidden, reads = OWN | _AGAIN if module else frozenset(), self._reads

        def present() -> list[str]:
            return [n for n in names if n not in hidden and (reads is None or reads(n))]

        self._note_names(names, present)
        yield from (names[name] for name in present())
        yield type(value)
        if module:
            registered = (*value._parameters.values(), *value._buffers.values())
            self._weights += [tensor for tensor in registered if tensor is not None]
            yield from value._modules.values()
        if module and reads is None:
            yield from value._forward_hooks.values()
            yield from value._forward_pre_hooks.values()

    def _parts_of_class(self, kind: type) -> Iterator[Any]:
        """Note the attributes of a class; yield them and its base classes."""
        if package(kind) in _SKIPPED:
            return

        reads = self._reads

        def names() -> Iterable[str]:
            names = [name for name in vars(kind) if not name.startswith("__")]
            return names if reads is None else filter(reads, names)

        def write(entries: Any) -> None:
            for name in set(names()) - dict(entries).keys():
                delattr(kind, name)
            for name, value in entries:
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)

        self._note(lambda: [(name, vars(kind)[name]) for name in names()], write)
        for name, part in vars(kind).items():
            if reads is None or name.startswith("__") or reads(name):
                yield part
        yield from kind.__mro__[1:]

    def _parts_of_function(self, function: FunctionType) -> Iterator[Any]:
        """Note the variables that a function can write to; yield the values that it can reach."""
        if package(function) in _SKIPPED:
            return
        yield from (function.__defaults__, function.__kwdefaults__, vars(function))
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):

            def read(name: str = name, cell: Any = cell) -> list[tuple[Any, Any]]:
                try:
                    return [(name, cell.cell_contents)]
                except ValueError:  # a variable without a value
                    return []

            def write(entries: Any, cell: Any = cell) -> None:
                if entries:
                    cell.cell_contents = entries[0][1]
                else:
                    del cell.cell_contents

            self._note(read, write)
            yield from (entry for _, entry in read())
        names, scope = tuple(dict.fromkeys(_names(function.__code__))), function.__globals__
        self.words.update(names)
        if "len" in names and "len" not in scope and all(scope is not s for s in self.counting):
            self.counting.append(scope)
        self._note_some(scope, names)
        for value in [scope[name] for name in names if name in scope]:
            if isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in _SKIPPED:
                inside = vars(value)
                self._note_some(inside, names)
                yield from (inside[name] for name in names if name in inside)
            yield value

    def _note(self, read: Any, write: Any) -> None:
        self._places.append(_Place(read, write, read()))

    def _note_some(self, scope: dict[str, Any], names: Iterable[str]) -> None:
        """Note the variables of a scope that have these names."""
        self._note_names(scope, lambda: [name for name in names if name in scope])

    def _note_names(self, scope: dict[str, Any], names: Callable[[], Iterable[str]]) -> None:
        """Note some variables of a scope; ``names`` returns the names of those that exist."""

        def write(entries: Any) -> None:
            for name in set(names()) - dict(entries).keys():
                del scope[name]
            scope.update(entries)

        self._note(lambda: [(name, scope[name]) for name in names()], write)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names of the variables and attributes that a function uses, also inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def equal(a: Any, b: Any) -> bool:
    """Return True for one object, for equal plain values, and for tuples of these."""
    plain = type(a) is type(b) and type(a) in (int, float, bool, str)
    tuples = type(a) is type(b) is tuple and len(a) == len(b)
    return a is b or (plain and a == b) or (tuples and all(map(equal, a, b)))


def version_of(value: Any) -> Any:
    """Return what differs after each write to a tensor or an array; None for others."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return value.tobytes() if isinstance(value, ndarray) and value.dtype != object else None
