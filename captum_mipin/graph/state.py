"""The state of a model: everything except the values of its weights that its graph depends on.

It consists of the modules, their attributes and hooks, the fields of other objects, and the code
that ``forward`` can reach: functions with their closures and global variables, and classes. Two
equal states of a model have the same graph.
"""

import builtins
import gc
import logging
import os
import sys
import sysconfig
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from captum_mipin.graph.code import attribute_names, global_names, imported_names
from captum_mipin.graph.leaves import (
    DESCRIPTORS,
    MEASURED,
    WHOLE,
    form_of,
    is_atom,
    is_container,
    leaves,
    measured,
)
from captum_mipin.graph.modules import tree
from captum_mipin.graph.places import (
    IGNORED,
    REGISTERED,
    Globals,
    Place,
    Reader,
    Variables,
    class_entries,
    content_of,
    function_parts,
    hooks_of_all_modules,
    reader_of,
)
from captum_mipin.graph.plain import ATOMS, digest_of
from captum_mipin.graph.twin import FOREIGN, package

#: A place in the state: the names that lead to it from the model.
Path = tuple[str, ...]

#: Packages whose functions and classes are compared as a whole, without what they refer to. So are
#: installed packages that define no layer of the model: nobody edits them while they are used.
_CLOSED = FOREIGN | sys.stdlib_module_names | {"captum", "captum_mipin"}
_INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")})

#: Names of functions by which code may read an attribute whose name it does not contain.
_DYNAMIC = frozenset(
    {"getattr", "vars", "__dict__", "__getattribute__", "attrgetter", "eval", "exec", "locals",
     "globals", "methodcaller"}
)  # fmt: skip

#: Entries of a class that its calls do not read.
_NOISE = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__slotnames__",
     "__static_attributes__", "__firstlineno__", "__abstractmethods__", "_abc_impl"}
)  # fmt: skip

#: Methods of a module that Python calls itself, but not in ``forward``.
_UNUSED = frozenset(
    {"__init__", "__new__", "__repr__", "__str__", "__del__", "__dir__", "__init_subclass__",
     "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__",
     "__class_getitem__", "__set_name__", "__subclasshook__"}
)  # fmt: skip


class State:
    """The present state of a model.

    It refers to the model and its parts by weak references only.

    Args:
        model: The model.
        hooks: Whether the hooks that torch runs for every module belong to it.

    Attributes:
        dynamic: Whether the model's own code, which is not installed, may compute the names of what
            it reads. Then the model may depend on more than its state.

    Examples:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> before = State(model)
        >>> before.holds()
        True
        >>> model.scale = 2.0
        >>> before.holds(), sorted(before.changes(State(model)))
        (False, [('scale',)])
    """

    def __init__(self, model: nn.Module, hooks: bool = True) -> None:
        self._lost = False
        walk = _Walk(model, self._lose, hooks)
        self.entries: dict[Path, Any] = walk.entries
        self._places, self._kept = walk.places, walk.kept
        self._weights, self._measured = walk.weights, walk.measured
        self._words, self.dynamic = walk.words, walk.dynamic

    def holds(self) -> bool:
        """Return True if nothing has changed since; this is quick."""
        try:
            return (
                not self._lost
                and all(place.holds() for place in self._places)
                and all(form_of(tensor()) == form for tensor, form in self._weights)
                and all(measured(part()) == form for part, form in self._measured)
                and not self._lost
            )
        except Exception:  # of any type: an attribute is gone, or another thread writes to it
            return False

    def may_read(self, attribute: str) -> bool:
        """Return True if the model's code may read an attribute with this name."""
        return attribute in self._words or not self._words.isdisjoint(_DYNAMIC)

    def changes(self, other: "State") -> set[Path]:
        """Return the places at which two states differ."""
        mine, theirs = self.entries, other.entries
        return {path for path in mine.keys() | theirs.keys() if mine.get(path) != theirs.get(path)}

    def _lose(self, _: Any) -> None:
        """Note that an object is gone, after which another may get its ``id``."""
        self._lost = True


class _Walk:
    """A walk through everything that a model's ``forward`` can reach.

    Attributes:
        entries: Place → what stands for its value; equal for equal values.
        places: The places, in a form that is compared quickly.
        weights: Parameters and buffers, and their forms.
        measured: Other tensors and arrays, their forms and versions.
        words: The names and strings in the code.
        kept: Objects that must live as long as the state, because their ``id`` stands for them.
        dynamic: See :class:`State`.
    """

    def __init__(self, model: nn.Module, lose: Callable[[Any], None], hooks: bool) -> None:
        self.entries: dict[Path, Any] = {}
        self.places: list[Place] = []
        self.weights: list[tuple[Any, Any]] = []
        self.measured: list[tuple[Any, Any]] = []
        self.kept: list[Any] = []
        self.dynamic = False
        self._lose, self._seen, self._numbers = lose, dict[int, Any](), dict[int, int]()
        self._names, self._waiting = {"forward"}, defaultdict[str, list[tuple[Any, Path]]](list)
        self._scopes: dict[int, tuple[Any, Path, set[str]]] = {}
        self._modules: dict[int, tuple[ModuleType, Path]] = {}
        self._stack: list[tuple[Any, Path]] = []
        self._closed = dict.fromkeys(_CLOSED, True)
        for _, module in tree(model):
            layers = (base for base in type(module).__mro__ if issubclass(base, nn.Module))
            for base in layers:
                self._closed.setdefault(package(base), False)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                self._numbers.setdefault(id(tensor), len(self._numbers))
        self._visit_tree(model, ())
        if hooks:
            self._note(hooks_of_all, ("every module",), hooks_of_all_modules)
        self._follow()
        self._note_scopes()

    def _visit_tree(self, module: nn.Module, path: Path) -> None:
        """Visit a module and its parts, before everything else that refers to them."""
        self._visit(module, path)
        for name, part in module._modules.items():
            if part is not None and id(part) not in self._seen:
                self._visit_tree(part, (*path, "_modules", f"[{name!r}]"))

    def _follow(self) -> None:
        """Visit everything that can be reached, until nothing new is found."""
        while self._stack:
            while self._stack:
                self._visit(*self._stack.pop())
            for owner, path, names in list(self._scopes.values()):
                self._scan(owner.__globals__, path, names)
            for module, path in list(self._modules.values()):
                self._scan(vars(module), path, self._names)
            if not self._names.isdisjoint(("environ", "getenv")):
                self._push(os.environ, ("environ",))
            if "getLogger" in self._names:
                for logger in self._loggers():
                    self._push(logger, ("logger", logger.name))
            if not self._names.isdisjoint(("modules", "import_module", "__import__")):
                for name in sorted(self._names & sys.modules.keys()):
                    self._push(sys.modules[name], ("modules", name))

    def _loggers(self) -> list[logging.Logger]:
        """Return the loggers that the code may look up by name."""
        modules = {path[-1] for _, path, _ in self._scopes.values()}
        known = logging.Logger.manager.loggerDict.values()
        named = [logger for logger in list(known) if isinstance(logger, logging.Logger)]
        return [logging.root] + [
            logger for logger in named
            if logger.name in modules or self._names.issuperset(logger.name.split("."))
        ]  # fmt: skip

    def _scan(self, scope: dict[str, Any], path: Path, names: set[str]) -> None:
        """Push the values of global variables; of those of torch, only the Python modules."""
        closed = self._is_closed(_package_of(scope))
        for name in sorted(names.intersection(scope)):
            if isinstance(scope[name], ModuleType):
                self._push(scope[name], (*path, name))
            for leaf in () if closed else leaves(scope[name]):
                self._push(leaf, (*path, name))

    def _note_scopes(self) -> None:
        """Note the global variables that the code uses, when all of its names are known."""
        self.words = self._names.union(*(names for _, _, names in self._scopes.values()))
        for owner, path, names in self._scopes.values():
            closed = self._is_closed(_package_of(owner.__globals__))
            known = owner.__globals__ if closed else {}
            names = {name for name in names if not is_container(known.get(name))}
            self._note(owner, path, Globals(sorted(names)), False)
        for module, path in self._modules.values():
            known = vars(module)
            closed = self._is_closed(_package_of(known))
            names = {name for name in self._names & known.keys() if not is_container(known[name])}
            self._note(module, path, Variables(sorted(names if closed else self._names)), False)
        for owner in (builtins, Tensor):
            self._note(owner, (owner.__name__,), Variables(sorted(self.words)), False)

    def _is_closed(self, name: str) -> bool:
        """Return True if the code of a package is compared as a whole."""
        if name not in self._closed:
            self._closed[name] = _is_installed(name)
        return self._closed[name]

    def _push(self, value: Any, path: Path) -> None:
        """Note that something has to be visited; of a class that may be called, all methods."""
        found = [(value, path)] if type(value) not in ATOMS else []
        for base in value.__mro__ if isinstance(value, type) else ():
            if not self._is_closed(package(base)):
                names = sorted(_UNUSED & vars(base).keys())
                found += [(vars(base)[name], (*path, name)) for name in names]
        self._stack += [(part, where) for part, where in found if id(part) not in self._seen]

    def _visit(self, value: Any, path: Path) -> None:
        """Note the parts of an object, and push what they refer to."""
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        kind = type(value)
        if isinstance(value, MEASURED) or is_atom(value) or not kind.__weakrefoffset__:
            return
        if isinstance(value, ModuleType):
            self._modules[id(value)] = value, ("variables of", value.__name__)
        elif isinstance(value, FunctionType):
            if not self._is_closed(package(value)):
                self._note(value, path, function_parts)
                self._reach(value, path)
        elif isinstance(value, type):
            self._visit_class(value, path)
        elif read := reader_of(value):
            self._note(value, path, read)
            self._stack.append((kind, (*path, "type")))

    def _visit_class(self, kind: type, path: Path) -> None:
        """Note a class; of its methods, visit those that the code calls by name."""
        module = issubclass(kind, nn.Module)
        if self._is_closed(package(kind)) and not module:
            return
        entries = self._note(kind, path, class_entries, pushes=not self._is_closed(package(kind)))
        for name, value in entries.items():
            parts = [part for part in leaves(value) if type(part) is FunctionType]
            for part in parts if kind is not nn.Module else ():
                special = _is_special(name) and not (module and name in _UNUSED)
                if special or name in self._names:
                    self._visit_method(part, (*path, name))
                else:
                    self._waiting[name].append((part, (*path, name)))
        self._stack += [(base, (*path, base.__name__)) for base in kind.__mro__[1:]]
        self._stack.append((type(kind), (*path, "metaclass")))

    def _visit_method(self, function: Any, path: Path) -> None:
        if self._is_closed(package(function)):
            if id(function) not in self._seen:  # of a layer of torch: only the names that it uses
                self._seen[id(function)] = function
                self._reach(function, path)
        else:
            self._push(function, path)

    def _reach(self, function: FunctionType, path: Path) -> None:
        """Note the names that a function uses."""
        code, scope = function.__code__, function.__globals__
        where = ("variables of", str(scope.get("__name__")))
        _, _, names = self._scopes.setdefault(id(scope), (function, where, set()))
        names |= global_names(code)
        names |= attribute_names(code) if "globals" in names else set()
        if not _DYNAMIC.isdisjoint(attribute_names(code)):
            name = package(function)
            self.dynamic |= not (self._is_closed(name) or _is_installed(name))
        for name in attribute_names(code) - self._names:
            self._names.add(name)
            for method in self._waiting.pop(name, ()):
                self._visit_method(*method)
        for name in imported_names(code) & sys.modules.keys():
            self._push(sys.modules[name], path)

    def _note(self, owner: Any, path: Path, read: Reader, pushes: bool = True) -> dict[str, Any]:
        """Note the named values of an object, push what they refer to, and return them."""
        while (*path, "") in self.entries:
            path = (*path, "another")
        values, module = read(owner), isinstance(owner, nn.Module)
        ignored = IGNORED if module else _NOISE
        inside: list[tuple[str, list[int]]] = []
        for name, value in values.items():
            if name in ignored:
                continue
            parts = leaves(value)
            if parts[0] is not value and not (module and name in REGISTERED):
                inside.append((name, [*map(id, parts)]))
            for where, some in _by_key(name, value, parts):
                self.entries[(*path, *where)] = tuple([self._entry(part) for part in some])
                for index, part in enumerate(some if pushes else ()):
                    if not (isinstance(owner, type) and type(part) is FunctionType):
                        self._push(part, (*path, *where, *([str(index)] if len(some) > 1 else ())))
        self.kept += [value for value in values.values() if is_atom(value)]
        whose = (owner, type(owner)) if not isinstance(read, Globals) else ()
        self.entries[(*path, "")] = [self._identity(part) for part in whose]
        content = content_of(owner, values)
        self.places.append(Place(ref(owner), id(type(owner)), read, content, inside))
        return {name: value for name, value in values.items() if name not in ignored}

    def _entry(self, value: Any) -> Any:
        """Return what stands for a leaf: equal for equal values."""
        if is_atom(value):
            self.kept.append(value)
            same = value if isinstance(value, (str, bytes)) else digest_of(value) or repr(value)
            return type(value).__qualname__, same
        if isinstance(value, MEASURED):
            if isinstance(value, Tensor) and id(value) in self._numbers:
                self.weights.append((ref(value, self._lose), form_of(value)))
                return self._numbers[id(value)], form_of(value)
            self.measured.append((ref(value, self._lose), measured(value)))
            return self._identity(value), measured(value)
        return self._identity(value)

    def _identity(self, value: Any) -> Any:
        """Return what stands for an object itself, and differs for every other object."""
        if not type(value).__weakrefoffset__:
            if gc.is_tracked(value) and not isinstance(value, DESCRIPTORS):
                self._lose(None)  # it may refer to the model, so that it cannot be kept
            else:
                self.kept.append(value)
            return type(value).__qualname__, repr(value)
        # the reference without a callback is the same for each state, and its id is not used again
        self.kept += [plain := ref(value), ref(value, self._lose)]
        return id(plain)


def _by_key(name: str, value: Any, parts: list[Any]) -> list[tuple[Path, list[Any]]]:
    """Return the leaves of a value with their place: for a dictionary, those of each entry."""
    plain = type(value) in (dict, OrderedDict) and not getattr(value, "__dict__", None)
    if not plain or parts[-1] is WHOLE or not ATOMS.issuperset(map(type, value)):
        return [((name,), parts)]
    entries = [((name, f"[{key!r}]"), leaves(entry)) for key, entry in value.items()]
    return [((name,), [type(value), *value]), *entries]


def _package_of(scope: dict[str, Any]) -> str:
    """Return the name of the package that global variables belong to."""
    return str(scope.get("__name__")).partition(".")[0]


def _is_installed(name: str) -> bool:
    """Return True if a package is installed, so that nobody edits it while it is used."""
    module = sys.modules.get(name)
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(str(place).startswith(_INSTALLED) for place in places)


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
