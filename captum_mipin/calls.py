"""Errors of calls and names that do not exist; they say what to type instead."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar, get_args

from captum_mipin.errors import ArgumentError, MIPINError, MissingNameError
from captum_mipin.options import closest, is_network

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_RULES = ("Epsilon(epsilon)", "Gamma(gamma)", "AlphaBeta(alpha, beta)")
_BOTTLENECK = ("beta", "steps", "learning_rate", "copies", "sigma", "start", "tolerance")
_CLASSES = ("label", "labels", "y", "classes", "class_index", "class_idx")
#: Class → argument that neither it nor its methods have → what to type instead.
_ARGUMENTS: dict[str, dict[str, str]] = {
    "LRP": {
        name: f"pass rule={rule}, a class of captum_mipin.methods"
        for rule in (*_RULES, "Epsilon(eps)")
        for name in rule.partition("(")[2].rstrip(")").split(", ")
    },
    "IBA": {name: f"pass settings=Bottleneck({name}=...)" for name in _BOTTLENECK},
    "InputIBA": {
        name: f"pass settings=ThreeStages(Bottleneck({name}=...))" for name in _BOTTLENECK
    },
    "ModelInverse": {
        **dict.fromkeys(_CLASSES, "pass targets="),
        **dict.fromkeys(
            ("alpha", "lam", "lamda", "lambda_", "l2", "regularization"), "pass ridge="
        ),
    },
    "Attribution": dict.fromkeys(_CLASSES, "pass target="),
    "Bottleneck": {"lr": "pass learning_rate="},
    "ThreeStages": {
        **{name: f"pass input=Bottleneck({name}=...), or feature=" for name in _BOTTLENECK},
        "steps": "pass input=Bottleneck(steps=...), or prior=Adversary(epochs=...)",
    },
}
_SIGNAL = "call source_signal(inputs, target) for the signal of a class"
_FRAME = "call pandas.DataFrame(report.to_dict())"
_SCORES = "take result.mean, or result.values, the scores of the examples"
#: Class → name that its objects do not have → what to type instead.
_NAMES: dict[str, dict[str, str]] = {
    "ModelInverse": {
        "attribute": "call MIPINAttribution(model, inverse).attribute(inputs, target)",
        "predict": _SIGNAL, "transform": _SIGNAL, "forward": _SIGNAL,
        "cuda": "call to('cuda')", "cpu": "call to('cpu')",
    },
    "Patterns": {"attribute": "call PatternAttribution(model, patterns).attribute(inputs, target)"},
    "LayerFeatures": {"fit": "call estimate(data)"},
    "_MIPIN": {"fit": "fit its inverse: inverse.fit(data, targets)"},
    "PatternPropagation": {"fit": "fit its patterns: patterns.fit(data)"},
    "Attribution": {
        "fit": "it needs no fit: call attribute(inputs, target)",
        **dict.fromkeys(("to", "cuda", "cpu", "eval", "train"), "call it on the network"),
    },
    "FitReport": {
        **dict.fromkeys(("to_pandas", "dataframe", "df"), _FRAME),
        **dict.fromkeys(("explained_variance", "dead", "condition"), "take it from report.layers"),
    },
    "CheckReport": {"supported": "take report.ok, or report.rows with their status"},
    "Comparison": {
        **{name: f"take comparison[method].{name}" for name in ("maps", "results", "errors")},
        **dict.fromkeys(("plot", "show", "visualize"), "call comparison.figure()"),
        **dict.fromkeys(("save", "to_html"), "call comparison.save_html(path)"),
        **dict.fromkeys(("to_pandas", "to_csv", "dataframe"), "call comparison.table('pandas')"),
    },
    "Result": dict.fromkeys(("score", "scores", "value", "item", "std", "tolist"), _SCORES),
}  # fmt: skip


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function raise ArgumentError for arguments that it does not take or that are missing.

    Examples:
        >>> @explained
        ... def resized(image, *, size=3):
        ...     return image
        >>> resized(1, sise=4)
        Traceback (most recent call last):
        captum_mipin.errors.ArgumentError: resized has no argument 'sise', expected some of image, \
size: pass size=
    """
    expected = signature(function)

    @wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            problem = None if isinstance(error, MIPINError) else _problem(entry, args, kwargs)
            if problem is None:
                raise
        raise problem

    entry.__signature__ = expected  # type: ignore[attr-defined]  # computed once
    return entry


def made_by_name(kind: type[T]) -> type[T]:
    """Let a dataclass raise ArgumentError for fields that it does not have or that are missing.

    Examples:
        >>> from dataclasses import dataclass
        >>> @made_by_name
        ... @dataclass(frozen=True)
        ... class Size:
        ...     width: int
        >>> Size(w=3)
        Traceback (most recent call last):
        captum_mipin.errors.ArgumentError: Size has no argument 'w', expected some of width: pass \
width=
    """
    setattr(kind, "__init__", explained(vars(kind)["__init__"]))  # noqa: B010  # for mypy
    return kind


def no_list(advice: str) -> Callable[[Any, Any], NoReturn]:
    """Return a ``__getitem__`` that raises ArgumentError with what to take instead."""

    def entry(self: Any, index: Any) -> NoReturn:
        kind = type(self).__name__
        raise ArgumentError(f"a {kind} is no list, expected one of its names: {advice}")

    return entry


class Helpful:
    """A base class whose objects say what to type instead of a wrong argument or name."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", explained(vars(cls)["__init__"]))  # noqa: B010  # for mypy

    if not TYPE_CHECKING:  # type checkers still report unknown names

        def __getattr__(self, name: str) -> NoReturn:
            """Raise MissingNameError with the name to type instead."""
            kind = type(self)
            if hasattr(kind, name):  # a property that raised AttributeError: raise that again
                return object.__getattribute__(self, name)
            names = [known for known in dir(self) if known[0] != "_"]
            advice = _advice(_NAMES, kind, name) or f"the closest names are {closest(name, names)}"
            raise MissingNameError(f"{kind.__name__} has no name {name!r}: {advice}")


def unknown_argument(call: str, name: str, names: Iterable[str], advice: str = "") -> ArgumentError:
    """Return the error of an argument that a call does not have, with the closest one.

    Args:
        call: The name of what was called.
        name: The argument.
        names: The arguments that there are.
        advice: What to type instead; "" for the closest argument.
    """
    names = [*names]
    begun = [known for known in names if known.startswith(name)]  # an abbreviation
    near = get_close_matches(name, names, 1) or begun
    advice = advice or (f"pass {near[0]}=" if near else "leave it out")
    return ArgumentError(
        f"{call} has no argument {name!r}, expected some of {', '.join(names)}: {advice}"
    )


def _problem(function: Any, args: Any, kwargs: dict[str, Any]) -> ArgumentError | None:
    """Return the error of a call whose arguments do not fit; None if they fit."""
    expected: Signature = function.__signature__
    parameters, owner = [*expected.parameters.values()], None
    call: str = function.__name__
    if parameters[0].name in ("self", "cls") and args:
        owner = args[0] if isinstance(args[0], type) else type(args[0])
        parameters, args = parameters[1:], args[1:]
        call = owner.__name__ if call == "__init__" else f"{owner.__name__}.{call}"
    names, free = _names(parameters)
    if owner is not None and function.__name__ == "__init__":
        names, free = _made_with(owner), False
    unknown = [name for name in kwargs if name not in names and not free]
    if unknown:
        advice = "" if owner is None else _advice(_ARGUMENTS, owner, unknown[0])
        if unknown[0] in ("seed", "random_state") and "generator" in names:
            advice = "pass generator=torch.Generator().manual_seed(0)"
        if not advice and function.__name__ == "attribute":
            near = get_close_matches(unknown[0], names, 1)
            start = f"pass {near[0]}=" if near else "leave it out"
            advice = f"{start}, or look for it among the arguments of the class"
        return unknown_argument(call, unknown[0], names, advice)
    ordered = [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    pattern = f"{call}({', '.join(ordered)})"
    if len(args) > len(ordered) and Parameter.VAR_POSITIONAL not in {p.kind for p in parameters}:
        advice = "pass the others by name"
        if ordered[:1] == ["method"] and is_network(args[0]):
            advice = f"a network goes by name, as in {pattern[:-1]}, model=model)"
        return ArgumentError(f"{len(args)} values were given, expected {pattern}: {advice}")
    twice = [name for name in ordered[: len(args)] if name in kwargs]
    if twice:
        return ArgumentError(f"{call} got {twice[0]} twice, expected {pattern}: pass it once")
    needed = [p for p in parameters if p.default is p.empty and p.name in names]
    missing = [p.name for p in needed if p.name not in {*ordered[: len(args)], *kwargs}]
    if not missing:
        return None
    named = "".join(f", {p.name}=..." for p in needed if p.name not in ordered)
    wanted = f"{pattern[:-1]}{named})"
    return ArgumentError(
        f"{call} was called without {missing[0]}, expected {wanted}: pass {missing[0]}"
    )


def _names(parameters: list[Parameter]) -> tuple[list[str], bool]:
    """Return the names of arguments, and True if any other name is taken too."""
    several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    names, free = [p.name for p in parameters if p.kind not in several], False
    for parameter in parameters:
        if parameter.kind is Parameter.VAR_KEYWORD:
            (options,) = get_args(parameter.annotation) or (None,)  # of Unpack[a TypedDict]
            names += getattr(options, "__annotations__", ())
            free = options is None
    return names, free


def _made_with(kind: type) -> list[str]:
    """Return the names of all arguments that objects of a class are made with."""
    names: list[str] = []
    for made in (vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)):
        more, free = _names([*signature(made).parameters.values()][1:])
        names += more
        if not free:
            break
    return [*dict.fromkeys(names)]


def _advice(table: dict[str, dict[str, str]], kind: type, name: str) -> str:
    """Return what a table says of a name for a class or the nearest of its bases; "" if nothing."""
    found = (table.get(base.__name__, {}).get(name) for base in kind.__mro__)
    return next((advice for advice in found if advice), "")
