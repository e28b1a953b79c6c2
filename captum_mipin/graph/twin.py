"""Copies of models that share their tensors.

A model is captured on such a copy, so that a forward that writes to ``self`` does not change the
user's model.
"""

import copy
from collections import OrderedDict, defaultdict, deque
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from captum_mipin.copies import copy_memo
from captum_mipin.graph.modules import named_tensors
from captum_mipin.graph.plain import COPIES, base_of, is_long, slots

#: Packages whose objects are shared by all copies of a model. pytest is there because an ``assert``
#: of a model in a test module calls it.
FOREIGN = frozenset({"torch", "numpy", "logging", "threading", "builtins", "_pytest"})

#: Hooks that only a backward pass calls. A capture has none.
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")

#: Attributes of classes that define how their objects are created, copied or closed.
_OWN_WAY = (
    *("__new__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"),
    *("__del__", "__slots__"),
)


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its tensors and has no backward hooks.

    Modules, containers, bound methods and other objects are copied, so that they refer to modules
    of the copy. A module is copied even if its ``__deepcopy__`` fails. Another object that cannot
    be copied is shared.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> twin = twin_of(model)
        >>> twin[0] is model[0], twin[0].weight is model[0].weight
        (False, True)
    """
    tensors = {id(tensor): tensor for _, tensor in named_tensors(model)}
    twin: nn.Module = _copied(model, tensors | copy_memo(model))
    for module in twin.modules():
        for name in _BACKWARD:
            getattr(module, name).clear()
        if isinstance(module, torch._dynamo.OptimizedModule):  # the user's module would run
            vars(module)["forward"] = partial(_call, module._orig_mod)
    return twin


def _call(module: nn.Module, *arguments: Any, **named: Any) -> Any:
    """Call a module; ``module.__call__`` would skip what torch.export puts in its place."""
    return module(*arguments, **named)


def package(kind: Any) -> str:
    """Return the name of the package that defines a class or function."""
    return str(getattr(kind, "__module__", None)).partition(".")[0]


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the dictionary of an object's attributes; None if it cannot be read."""
    try:
        names = vars(value)
    except Exception:  # of any type: a class may define the look-up of attributes
        return None
    return names if isinstance(names, dict) else None


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a value.

    Args:
        value: The value.
        memo: ``id`` of a value → its copy, for the values that were copied before.
    """
    kind = type(value)
    if id(value) in memo:
        return memo[id(value)]
    result: Any
    if is_long(value):
        memo[id(value)] = result = COPIES.get(kind, kind)(value)
    elif issubclass(kind, nn.Module) or _is_plain(value):
        memo[id(value)] = result = object.__new__(kind)
        vars(result).update((name, _copied(part, memo)) for name, part in vars(value).items())
    elif issubclass(kind, (dict, list, deque, set)):
        memo[id(value)] = result = _emptied(value)
        base = base_of(value)
        if base in (dict, OrderedDict):
            for key, entry in list(base.items(value)):
                base.__setitem__(result, _copied(key, memo), _copied(entry, memo))
        elif base is set:
            base.update(result, base.__iter__(value))
        else:
            for entry in list(base.__iter__(value)):
                base.append(result, _copied(entry, memo))
    elif kind is FunctionType:
        memo[id(value)] = result = _enclosing(value, memo)
    elif kind in (MethodType, partial) or issubclass(kind, tuple):
        memo[id(value)] = result = _rebound(value, memo)
    else:
        result = _deep_copy(value, memo)
    return result


def _emptied(value: Any) -> Any:
    """Return a container without entries, of the same class and with the same attributes."""
    kind: Any = type(value)
    result = kind.__new__(kind)
    if isinstance(value, deque):
        deque.__init__(result, maxlen=value.maxlen)
    if isinstance(value, defaultdict):
        result.default_factory = value.default_factory
    for name, part in {**slots(value), **(attributes_of(value) or {})}.items():
        object.__setattr__(result, name, part)
    return result


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """Return a tuple, bound method or partial function with copies of its parts."""
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _copied(value.__self__, memo))
    if isinstance(value, partial):
        function, *arguments = (_copied(part, memo) for part in (value.func, *value.args))
        return partial(function, *arguments, **_copied(value.keywords, memo))
    parts = [_copied(part, memo) for part in value]
    if all(part is old for part, old in zip(parts, value, strict=True)):
        return value
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _enclosing(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Return a function that refers to the copies of the modules in its enclosing variables."""
    before = function.__closure__ or ()
    cells = []
    for cell in before:
        try:
            module = isinstance(cell.cell_contents, nn.Module)
        except ValueError:  # a variable without a value
            module = False
        cells.append(CellType(_copied(cell.cell_contents, memo)) if module else cell)
    if all(cell is old for cell, old in zip(cells, before, strict=True)):
        return function
    code, scope, name = function.__code__, function.__globals__, function.__name__
    result = FunctionType(code, scope, name, function.__defaults__, tuple(cells))
    result.__kwdefaults__, result.__qualname__ = function.__kwdefaults__, function.__qualname__
    vars(result).update(vars(function))
    return result


def _is_plain(value: Any) -> bool:
    """Return True for an object whose class is written in Python and defines no way to copy it."""
    kind = type(value)
    return (
        package(kind) not in FOREIGN
        and attributes_of(value) is not None
        and all(getattr(kind, n, None) is getattr(object, n, None) for n in _OWN_WAY)
    )


def _deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an object by its own way, or the object itself if there is none."""
    if package(type(value)) in FOREIGN or hasattr(type(value), "__del__"):
        return value
    attempt = dict(memo)
    try:
        result = copy.deepcopy(value, attempt)
    except Exception:  # of any type: the class decides
        return value
    memo.update(attempt)
    return result
