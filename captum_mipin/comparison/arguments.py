"""What users pass to ``compare``, checked before any method is asked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_mipin.comparison.methods import METHODS
from captum_mipin.errors import InputError, TargetError, TrainingModeError
from captum_mipin.graph.modules import unwrapped
from captum_mipin.inverse.base import ModelInverse
from captum_mipin.metrics.case import Case, attribution_of, method_name, raw_outputs
from captum_mipin.metrics.examples import Examples
from captum_mipin.targets import per_example

#: Names of modules that an error lists, the closest ones.
_NAMES_SHOWN = 8


def named_methods(methods: Any) -> dict[str, Any]:
    """Return label -> method, or name of a method.

    Args:
        methods: As for :func:`~captum_mipin.compare`. Without a label a method has its own name;
            a number keeps methods of one name apart, as in "LRP" and "LRP (2)".

    Raises:
        InputError: There is no method, one is none, or a name is not known.
    """
    if isinstance(methods, Mapping):
        pairs = [(str(label), method) for label, method in methods.items()]
    else:
        is_one = isinstance(methods, (str, Attribution, Tensor)) or callable(methods)
        if not is_one and not isinstance(methods, Iterable):
            raise InputError(
                f"methods is a {type(methods).__name__}, expected methods or their names: pass a "
                "list, or label -> method"
            )
        pairs = [(_label(method), method) for method in ([methods] if is_one else methods)]
    if not pairs:
        raise InputError("there are no methods to compare: pass names or name -> method")
    named: dict[str, Any] = {}
    for name, method in pairs:
        _check_method(name, method)
        label, number = name, 1
        while label in named:
            number += 1
            label = f"{name} ({number})"
        named[label] = method
    return named


def _label(method: Any) -> str:
    """Return the label of a method that the user gave none."""
    # browsers and Markdown would take "<lambda>" for a tag
    return method if isinstance(method, str) else method_name(method).strip("<>")


def _check_method(label: str, method: Any) -> None:
    """Raise InputError if a method is neither a known name nor a method."""
    if isinstance(method, str):
        if method not in METHODS:
            raise InputError(
                f"no method has the name {method!r}; known are {', '.join(METHODS)}. Pass one of "
                "these names, or a method itself"
            )
    elif isinstance(method, type):
        raise InputError(
            f"method {label!r} is the class {method.__name__}, expected a method made from it: "
            f"pass for example {method.__name__}(model)"
        )
    elif not (isinstance(method, (Attribution, Tensor, tuple)) or callable(method)):
        raise InputError(
            f"method {label!r} is a {type(method).__name__}, expected a name, a Captum "
            "Attribution, a function (inputs, target) -> maps, or maps"
        )


def compared_model(
    model: Callable[..., Any] | None, inverse: Any, methods: Iterable[Any]
) -> Callable[..., Any] | None:
    """Return the network of a comparison: the user's, the inverse's, or the first method's.

    Raises:
        InputError: The inverse is none, or methods by name have no network.
    """
    if inverse is not None and not isinstance(inverse, ModelInverse):
        raise InputError(
            f"inverse is a {type(inverse).__name__}, expected an InverseNetwork or a "
            "NeighbourInverse: pass one that is fitted"
        )
    methods = list(methods)
    if model is None and inverse is not None:
        model = inverse.model
    if model is None:
        owners = (attribution_of(method) for method in methods)
        model = next((owner.forward_func for owner in owners if owner is not None), None)
    if any(isinstance(method, str) for method in methods) and not isinstance(model, nn.Module):
        raise InputError("methods by name need the network: pass model=")
    return model


def module_of(layer: nn.Module | str | None, model: Any) -> nn.Module | None:
    """Return a layer of the network.

    Args:
        layer: The module, its dotted name as in ``model.named_modules()``, or None.
        model: The network, if it is known.

    Raises:
        InputError: The layer is no module of the network.
    """
    if layer is None or (isinstance(layer, nn.Module) and not isinstance(model, nn.Module)):
        return layer
    if not isinstance(model, nn.Module):
        raise InputError(
            f"layer={layer!r} cannot be looked up without the network, a torch.nn.Module: pass "
            "model="
        )
    modules = unwrapped(model).named_modules()
    names: dict[str, nn.Module] = {name: module for name, module in modules if name}
    if isinstance(layer, str) and layer in names:
        return names[layer]
    if isinstance(layer, nn.Module) and any(layer is module for module in model.modules()):
        return layer
    described = repr(layer) if isinstance(layer, str) else f"a {type(layer).__name__}"
    closest = get_close_matches(str(layer), names, _NAMES_SHOWN, cutoff=0)
    raise InputError(
        f"layer is {described}, expected a module of the {type(model).__name__} that is explained, "
        "or its name as in model.named_modules(): pass for example one of "
        f"{', '.join(map(repr, closest))}"
    )


def check_targets(case: Case, model: Any, methods: Iterable[Any]) -> None:
    """Raise TargetError if the targets fit the outputs of no network that is explained.

    One image goes through each network for that. A network that cannot be asked is no error here:
    its methods tell why.

    Args:
        case: The images and targets.
        model: The network of the comparison, if it is known.
        methods: Methods, some of which may explain networks of their own.

    Raises:
        TargetError: Several outputs and no target, or a target that is none of the outputs.
        TrainingModeError: The network is in training mode.
    """
    owners = (attribution_of(method) for method in methods)
    models = [model, *(owner.forward_func for owner in owners if owner is not None)]
    distinct = {id(network): network for network in models if network is not None}
    errors = [_target_error(case, network) for network in distinct.values()]
    # where the targets fit another network, the others leave their errors in their rows
    if errors and errors[0] is not None and all(errors):
        raise errors[0]


def _target_error(case: Case, model: Any) -> Exception | None:
    """Return why the targets of a case do not fit a network; None if they do."""
    try:
        network = replace(case, user_model=model).model
    except TrainingModeError as error:
        return error
    try:
        output = raw_outputs(network, case.examples.select(torch.arange(1)))
    except Exception:  # the methods of a network that cannot be asked tell why
        return None
    shape = tuple(output.shape[1:])
    if case.examples.target is None and any(size != 1 for size in shape):
        return TargetError(
            f"no targets were given, but the model has outputs of shape {shape} for each image, "
            "expected the one to explain: pass targets=, one class for all images or a list with "
            "one for each"
        )
    try:
        per_example(case.examples.target, output.expand(len(case.examples), *shape))
    except TargetError as error:
        return error
    return None


def image_titles(titles: Sequence[str] | None, examples: Examples) -> tuple[str, ...]:
    """Return a title per image: the user's, or its target."""
    if titles is None:
        return tuple("" if target is None else str(target) for target in examples.targets)
    if len(titles) != len(examples):
        raise InputError(f"there are {len(titles)} titles, but {len(examples)} images")
    return tuple(map(str, titles))
