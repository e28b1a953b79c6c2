"""Checks of the arguments of ``compare``, made before any method runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_mipin.comparison.methods import CONTROLS, METHODS, known_name, label_of
from captum_mipin.comparison.names import ClassNames, check_names, class_name, class_names
from captum_mipin.errors import InputError, TargetError, TrainingModeError
from captum_mipin.graph.modules import module_of, unwrapped
from captum_mipin.inverse.base import ModelInverse
from captum_mipin.metrics.case import Case, attribution_of, raw_outputs
from captum_mipin.metrics.examples import Examples
from captum_mipin.options import for_method, is_network, type_of
from captum_mipin.targets import per_example


def named_methods(methods: Any) -> dict[str, Any]:
    """Return label -> method or name of a method.

    Args:
        methods: As for :func:`~captum_mipin.compare`. The default label of a method is its name;
            further methods with the same name get a number, as in "LRP" and "LRP (2)".

    Raises:
        InputError: ``methods`` is empty, contains an object that is not a method, or contains a
            name that is not known.
    """
    if isinstance(methods, Mapping):
        pairs = [(str(label), method) for label, method in methods.items()]
    else:
        is_one = isinstance(methods, (str, Attribution, Tensor)) or callable(methods)
        if not is_one and not isinstance(methods, Iterable):
            raise InputError(
                f"methods is {type_of(methods)}, expected methods or their names: pass a list, or "
                f"a dictionary label -> method; {for_method(methods)}"
            )
        pairs = [(label_of(method), method) for method in ([methods] if is_one else methods)]
    if not pairs:
        raise InputError(
            "methods is empty, expected at least one method to compare: pass a list of names, or a "
            "dictionary label -> method"
        )
    named: dict[str, Any] = {}
    for name, method in pairs:
        _check_method(name, method)
        label, number = name, 1
        while label in named:
            number += 1
            label = f"{name} ({number})"
        named[label] = known_name(method) if isinstance(method, str) else method
    return named


def _check_method(label: str, method: Any) -> None:
    """Raise InputError if a method is neither a known name nor a method."""
    if isinstance(method, str):
        if known_name(method) is None:
            raise InputError(
                f"no method has the name {method!r}; known are {', '.join((*METHODS, *CONTROLS))}. "
                "Pass one of these names, or a method"
            )
        return
    known = isinstance(method, (Attribution, Tensor, tuple)) or callable(method)
    if isinstance(method, type) or is_network(method) or not known:
        raise InputError(
            f"method {label!r} is {type_of(method)}, expected a name, a Captum Attribution, a "
            f"function (inputs, target) -> maps, or maps: {for_method(method)}"
        )


def compared_model(
    model: Callable[..., Any] | None, inverse: Any, methods: Iterable[Any]
) -> Callable[..., Any] | None:
    """Return the network of a comparison.

    Args:
        model: The network that the user passed, or None.
        inverse: Inverse whose network is used if the user passed none, or None.
        methods: Methods; otherwise the network of the first ``Attribution`` is used.

    Raises:
        InputError: ``inverse`` is not an inverse, or there are methods by name but no network.
    """
    if inverse is not None and not isinstance(inverse, ModelInverse):
        raise InputError(
            f"inverse is {type_of(inverse)}, expected an InverseNetwork or a "
            "NeighbourInverse: pass a fitted inverse"
        )
    methods = list(methods)
    if model is None and inverse is not None:
        model = inverse.model
    if model is None:
        owners = (attribution_of(method) for method in methods)
        model = next((owner.forward_func for owner in owners if owner is not None), None)
    if isinstance(model, MethodType):
        model = unwrapped(model)
    if any(isinstance(method, str) for method in methods) and not isinstance(model, nn.Module):
        found = "no network" if model is None else f"{type_of(model)}"
        raise InputError(
            f"methods by name need the network, a torch.nn.Module, found {found}: pass model="
        )
    return model


def layer_of(layer: nn.Module | str | None, model: Any) -> nn.Module | None:
    """Return a layer of the network.

    Args:
        layer: The module, its dotted name as in ``model.named_modules()``, or None.
        model: The network, or None.

    Raises:
        InputError: The layer is not a module of the network.
    """
    if isinstance(unwrapped(model), nn.Module):
        return None if layer is None else module_of(layer, model)
    if layer is None or isinstance(layer, nn.Module):
        return layer
    raise InputError(
        f"layer={layer!r} cannot be looked up without the network, a torch.nn.Module: pass model="
    )


def check_targets(case: Case, model: Any, methods: Iterable[Any]) -> None:
    """Raise an error if there is no explained network whose outputs fit the targets.

    The check runs each network on one image. If a network fails, it counts as one that fits: the
    rows of its methods will show the error.

    Args:
        case: The images and targets.
        model: The network of the comparison, or None.
        methods: Methods; an ``Attribution`` can have a network that differs from ``model``.

    Raises:
        TargetError: A network has several outputs but there is no target, or the target is not the
            index of an output.
        TrainingModeError: The network is in training mode.
    """
    owners = (attribution_of(method) for method in methods)
    models = [model, *(owner.forward_func for owner in owners if owner is not None)]
    distinct = {id(network): network for network in models if network is not None}
    errors = [_target_error(case, network) for network in distinct.values()]
    # if the targets fit one of the networks, methods of the other networks fail in their rows
    if errors and errors[0] is not None and all(errors):
        raise errors[0]


def _first_output(case: Case, model: Any) -> Tensor | None:
    """Return a network's output for the first image; None if the network fails.

    Raises:
        TrainingModeError: The network is in training mode.
    """
    network = replace(case, user_model=model).model
    try:
        return raw_outputs(network, case.examples.select(torch.arange(1)))
    except Exception:  # the network fails: the rows of its methods will show the error
        return None


def _target_error(case: Case, model: Any) -> Exception | None:
    """Return the error of the targets of a case for a network; None if the targets fit."""
    try:
        output = _first_output(case, model)
    except TrainingModeError as error:
        return error
    if output is None:
        return None
    shape = tuple(output.shape[1:])
    if case.examples.target is None and any(size != 1 for size in shape):
        return TargetError(
            f"no targets were given, but the model has outputs of shape {shape} for each image, "
            "expected the class to explain: pass targets=, one class for all images or a list with "
            "one class per image"
        )
    try:
        per_example(case.examples.target, output.expand(len(case.examples), *shape))
    except TargetError as error:
        return error
    return None


def checked_names(names: ClassNames, case: Case, model: Any) -> dict[int, str]:
    """Return class -> name, see :func:`~captum_mipin.comparison.names.class_names`.

    Raises:
        InputError: The names have no known form, or do not fit the outputs of the network.
    """
    known = class_names(names, model)
    output = None if names is None or model is None else _first_output(case, model)
    if output is not None:
        check_names(names, known, output.shape[1] if output.ndim > 1 else 1)
    return known


def image_titles(
    titles: Sequence[str] | None, examples: Examples, names: Mapping[int, str]
) -> tuple[str, ...]:
    """Return one title per image: the user's title, or by default the name of the image's target.

    Args:
        titles: The user's titles, or None.
        examples: The images and targets.
        names: Names by class.

    Raises:
        InputError: The number of titles is not the number of images.
    """
    if titles is None:
        return tuple(class_name(names, target) for target in examples.targets)
    if len(titles) != len(examples):
        raise InputError(
            f"there are {len(titles)} titles, but {len(examples)} images: pass one title per image"
        )
    return tuple(map(str, titles))
