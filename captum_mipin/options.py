"""Checks of options, and the words for values that are not what was expected."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from math import isfinite
from numbers import Integral, Real
from os import PathLike
from typing import Any

from torch import Generator, Tensor, nn

from captum_mipin.errors import CaptureError, InputError

#: Number of names that an error lists; these are the names closest to the user's.
_SHOWN = 8
#: Largest number of characters of a value in an error.
_LONGEST = 80


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


def named(what: str, value: object) -> str:
    """Return a word with the value that it stands for, or the word alone if the value is long.

    Examples:
        >>> named("target", "cat"), named("target", list(range(99)))
        ("target 'cat'", 'the target')
    """
    code = repr(value)
    return f"{what} {code}" if len(code) <= _LONGEST and "\n" not in code else f"the {what}"


def is_network(value: object) -> bool:
    """Return True for a module that cannot be called with two arguments, as methods are."""
    if not isinstance(value, nn.Module):
        return False
    try:
        signature(value.forward).bind(None, None)
    except TypeError:
        return True
    return False


def for_inputs(value: Any) -> str:
    """Return what to pass instead of a value that is not inputs, for an error message."""
    parts = list(value) if isinstance(value, (list, tuple, set, range)) and value else [value]
    if any(isinstance(part, nn.Module) for part in parts):
        return (
            "a network is no input and comes before the inputs, as in check(model, inputs), or by "
            "name, as in compare(methods, inputs, targets, model=model)"
        )
    if any(hasattr(part, "attribute") or hasattr(part, "source_signal") for part in parts):
        return (
            "a method is no input and comes first, as in deletion(method, inputs, target), or by "
            "name, as in check(model, inputs, method=method)"
        )
    if all(isinstance(part, Integral) for part in parts):
        return (
            "integers are classes, which come second, as in fit(data, targets) and "
            "attribute(inputs, target): pass the inputs first"
        )
    if all(isinstance(part, (str, bytes, PathLike)) for part in parts):
        return (
            "names are no inputs: load files into a tensor; names of methods come first, as in "
            "compare(methods, inputs, targets)"
        )
    if all(type(part).__module__.startswith("PIL.") for part in parts):
        return "pass torch.stack([transform(image) for image in images]), as in the training"
    if isinstance(value, Mapping) and value:
        return f"pass its tensor of inputs, such as data[{next(iter(value))!r}]"
    if value is not parts[0] and all(isinstance(part, Tensor) for part in parts):
        return "pass tuple(inputs) for several inputs, torch.stack(inputs) for several examples"
    if hasattr(value, "batch_sampler"):
        return "pass one batch of the loader, such as next(iter(loader))[0]"
    if hasattr(value, "__len__") or isinstance(value, Real):
        return "pass torch.as_tensor(inputs, dtype=torch.float32)"
    return "pass the model's inputs"


def for_method(value: Any) -> str:
    """Return what to pass instead of a value that is not a method, for an error message."""
    if isinstance(value, type):
        return f"pass for example {value.__name__}(model)"
    if is_network(value):
        return "pass for example captum.attr.Saliency(model), and the network itself as model="
    if hasattr(value, "source_signal"):
        return "pass MIPINAttribution(model, inverse)"
    return "pass for example captum.attr.Saliency(model)"


def for_model(value: Any) -> str:
    """Return what to pass instead of a value that is not a network, for an error message."""
    if isinstance(value, type):
        return f"pass an object of the class, with trained weights: model = {value.__name__}(...)"
    if hasattr(value, "attribute") or hasattr(value, "source_signal"):
        return "pass its network, which comes first: the attribute model or forward_func"
    if isinstance(value, Mapping):
        return "make the network, and load a state dict into it: model.load_state_dict(...)"
    if isinstance(value, (str, PathLike)):
        return (
            "pass the network object, with its weights loaded. A path comes first only in "
            "load(path, model)"
        )
    if callable(value):
        return (
            "pass the network object, with its weights loaded. Wrap a function in an nn.Module "
            "that has the network as an attribute and calls it in forward()"
        )
    return "pass the network first, and data, layers and inverses after it"


def check_callable(model: object) -> None:
    """Raise CaptureError unless a model can be called, and is no class."""
    if not callable(model) or isinstance(model, type):
        raise CaptureError(
            f"the model is {type_of(model)}, expected a torch.nn.Module: {for_model(model)}"
        )


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise InputError if the value of the option ``name`` is not one of ``choices``."""
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise InputError(f"{name}={value!r} is not one of {known}: pass one of them")


def check_generator(generator: Any) -> None:
    """Raise InputError unless ``generator`` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, Generator):
        raise InputError(
            f"generator is {type_of(generator)}, expected a torch.Generator: pass "
            "torch.Generator().manual_seed(0)"
        )


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
