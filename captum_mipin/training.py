"""The modules of a model that compute something else in training mode than in evaluation mode."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

from captum_mipin.errors import TrainingModeError

#: Number of modules that the error lists.
_SHOWN = 5

#: Classes of torch whose code reads ``training`` → whether the mode of such a module matters.
_MATTERS: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.modules.dropout._DropoutNd: lambda module: module.p > 0,
    nn.RNNBase: lambda module: module.dropout > 0,
    nn.MultiheadAttention: lambda module: module.dropout > 0,
    nn.modules.batchnorm._NormBase: lambda module: module.running_mean is not None,
    # in evaluation mode these two only choose a faster way to the same result
    nn.TransformerEncoderLayer: lambda module: False,
    nn.TransformerEncoder: lambda module: False,
}


def check_evaluation(model: nn.Module) -> None:
    """Raise TrainingModeError if a module is in training mode and computes something else in it.

    Most modules compute the same in both modes, for example an ``nn.Linear`` that replaced the head
    of a model after ``model.eval()``.

    Examples:
        >>> check_evaluation(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)).train())
    """
    names = [
        f"{path!r} ({type(module).__name__})" if path else f"the {type(module).__name__} itself"
        for path, module in model.named_modules()
        if module.training and _mode_matters(module)
    ]
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise TrainingModeError(
            f"the model is in training mode, in which {', '.join(names[:_SHOWN])}{more} may "
            "compute something else (dropout, batch statistics, or code that reads "
            "self.training); expected evaluation mode: call model.eval() first"
        )


def settle(model: nn.Module) -> None:
    """Switch modules of torch to evaluation mode if they compute the same in training mode."""
    for module in model.modules():
        if module.training and isinstance(module, tuple(_MATTERS)) and not _mode_matters(module):
            module.training = False


def _mode_matters(module: nn.Module) -> bool:
    """Return True if a module may compute something else in the other mode."""
    own = [vars(module).get("forward"), *module._forward_hooks.values()]
    own += module._forward_pre_hooks.values()
    if _readers([(nn.Module, function) for function in own]):
        return True
    kind: type = type(module)
    for base in _readers_of(kind):
        rules = (rule for torchs, rule in _MATTERS.items() if issubclass(base, torchs))
        if not base.__module__.startswith("torch.nn.") or next(rules, bool)(module):
            return True
    return False


@cache
def _readers_of(kind: type) -> frozenset[type]:
    """Return the classes in a class's hierarchy whose part of ``forward`` reads the mode."""
    family = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    return _readers(_methods(family, ("forward", "__call__")), family)


def _methods(family: Iterable[type], names: Iterable[str]) -> list[tuple[type, Any]]:
    return [(base, vars(base)[name]) for base in family for name in names if name in vars(base)]


def _readers(roots: Iterable[tuple[type, Any]], family: Iterable[type] = ()) -> frozenset[type]:
    """Return the classes whose functions read an attribute ``training``.

    A function is followed into the methods of ``family``, the functions of its own module and the
    functions of its closure that it names. Functions of torch get the mode as an argument, and are
    not followed.

    Args:
        roots: Pairs of a class and one of its attributes, such as a method or a property.
        family: The classes whose methods the functions may call.
    """
    waiting, seen, readers = list(roots), set[int](), set[type]()
    while waiting:
        base, function = waiting.pop()
        # a property, a functools.partial, a static, class or bound method
        for part in ("fget", "func", "__func__"):
            function = getattr(function, part, function)
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        names = set(_names(function.__code__))
        if "training" in names:
            readers.add(base)
        near = [value for name, value in function.__globals__.items() if name in names]
        near += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        waiting += [(base, f) for f in near if not _is_torchs(f)]
        waiting += _methods(family, names)
    return frozenset(readers)


def _is_torchs(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("torch.")


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names and strings in a function's code, and in functions that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):
            yield constant
