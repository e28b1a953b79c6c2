"""Randomisation: similarity of the maps of the trained network and of networks with random weights.

All changes are made to a deep copy of the model and the method. For a method that is fitted to the
network, such as MIP-IN, there are two tests. Without ``refit`` the method keeps its fit, so that
the result shows how far the maps depend on the rest of the network, such as its masks. (An
``InverseNetwork`` needs ``changed="ignore"`` for this.) With ``refit`` the method is fitted again
to each random network.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from captum_mipin.calls import explained
from captum_mipin.copies import copy_memo
from captum_mipin.errors import InputError
from captum_mipin.metrics.case import (
    Case,
    Method,
    Options,
    attribution_of,
    method_name,
    raw_outputs,
)
from captum_mipin.metrics.examples import Examples, Inputs
from captum_mipin.metrics.maps import flattened
from captum_mipin.metrics.result import Result, finite_rows
from captum_mipin.metrics.similarity import spearman, ssim, ssim_inputs
from captum_mipin.options import check_choice, closest, type_of

Refit = Callable[[nn.Module], Method]
#: Function (parameter, generator) -> random values of the parameter's shape.
Redraw = Callable[[Tensor, torch.Generator], Tensor]
#: Name of a layer -> its parameters.
Stages = dict[str, list[nn.Parameter]]


@explained
@torch.inference_mode(False)  # weights copied in inference mode would have no gradients
def randomization(
    method: Method,
    inputs: Inputs,
    target: Any = None,
    *,
    refit: Refit | None = None,
    order: Literal["cascading", "independent"] = "cascading",
    layers: Sequence[str | nn.Module] | None = None,
    init: Literal["normal", "permuted"] | Redraw = "normal",
    **options: Unpack[Options],
) -> Result:
    """Return the similarity of maps before and after the network's weights are made random.

    Args:
        method: Any method; a callable or maps only with ``refit``.
        inputs: Tensor (examples, ...) or tuple of such.
        target: The class, as Captum takes it.
        refit: Function model -> method that fits the method again to each random network.
        order: "cascading" to randomise layer after layer, from the output to the input, and keep
            earlier layers random; "independent" to randomise one layer at a time.
        layers: Names or modules in the order of randomisation, each with its submodules; by default
            all modules with own parameters, in the reverse order of execution.
        init: "normal" for normal values with the parameter's mean and standard deviation,
            "permuted" for the parameter's values in random order, or a function (parameter,
            generator) -> values. Buffers do not change.
        **options: See :class:`~captum_mipin.metrics.case.Options`. The generator draws weights.

    Returns:
        Spearman's correlation with the maps of the trained network, mean over layers; 0 is best,
        and 1 means that the weights do not affect the maps. ``curves`` have one value per layer of
        ``settings["layers"]``. Parts: the correlation of absolute values, and SSIM. Reasons for no
        score: "constant" maps, "NaN".

    Source: Adebayo et al., NeurIPS 2018.

    Examples:
        >>> from captum.attr import Saliency
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> randomization(Saliency(model), torch.randn(5, 6), 0).settings["layers"]
        ['2', '0']
    """
    check_choice("order", order, ("cascading", "independent"))
    if not callable(init):
        check_choice("init", init, ("normal", "permuted"))
    case = Case.of(method, inputs, target, **options)
    trained = _module(case, refit)
    # model and method are copied together, so that the copied method explains the copied model
    changed, twin = copy.deepcopy((trained, () if refit else method), copy_memo(trained))
    stages = _stages(changed, _paths(trained, layers), case.examples)
    measured = []
    for _ in _randomised(changed, stages, order, init, case.generator):
        anew = replace(case, method=refit(changed) if refit else twin)
        measured.append(_similarities(case.maps, anew.maps, case.examples))
    choices = {"order": order, "init": init, "fit": "made anew" if refit else "kept"}
    return _result(measured, case.settings(case.maps, layers=list(stages), **choices), case.maps)


def _module(case: Case, refit: Refit | None) -> nn.Module:
    """Return the network to copy.

    Raises:
        InputError: The model is not a module, or without ``refit`` the method does not contain the
            model, so that a copy of the method would explain the wrong network.
    """
    trained = case.model
    if not isinstance(trained, nn.Module):
        raise InputError(
            f"the model is {type_of(trained)}, expected a torch.nn.Module with weights to "
            "make random: pass the network as model="
        )
    attribution = attribution_of(case.method)
    if refit is None and (attribution is None or attribution.forward_func is not trained):
        raise InputError(
            f"the method {method_name(case.method)} is not an Attribution of the model, so that it "
            "cannot explain a copy with random weights: pass refit=, a function model -> method"
        )
    return trained


def _result(
    measured: list[dict[str, Tensor]], settings: dict[str, Any], before: tuple[Tensor, ...]
) -> Result:
    """Return the result of all layers.

    Args:
        measured: Per layer, measure -> similarities (examples,).
        settings: Settings of the result.
        before: Maps (examples, ...) of the trained network.
    """
    results = {}
    for name in measured[0]:
        curves = torch.stack([similarities[name] for similarities in measured], 1)
        unscored = {"NaN": ~finite_rows(*before), "constant": ~finite_rows(curves)}
        results[name] = Result.of(name, curves.mean(1), "lower", settings, unscored, curves=curves)
    return replace(results.pop("Spearman"), metric="randomization", parts=results)


def _similarities(
    before: tuple[Tensor, ...], after: tuple[Tensor, ...], examples: Examples
) -> dict[str, Tensor]:
    """Return measure -> similarities (examples,) of the maps before and after randomisation."""
    a, b = flattened(before), flattened(after)
    measures = {
        "Spearman": spearman(a, b),
        "Spearman of absolute values": spearman(a.abs(), b.abs()),
    }
    images = ssim_inputs(before, after, examples.inputs[0])
    if images is not None:
        a, b, window = images
        # max(SSIM(a, b), SSIM(a, -b)), because random weights can flip the sign of a whole map
        measures["SSIM"] = torch.maximum(ssim(a, b, window), ssim(a, -b, window))
    return measures


def _paths(model: nn.Module, layers: Sequence[str | nn.Module] | None) -> list[str] | None:
    """Return the names of the user's layers, None for the default.

    Raises:
        InputError: A layer is not a module of the model.
    """
    if layers is None:
        return None
    modules, paths = dict(model.named_modules()), []
    for layer in layers:
        path = next((path for path, module in modules.items() if layer in (path, module)), None)
        if path is None:
            raise InputError(
                f"layers contains {layer!r}, expected modules of the model or their names as in "
                f"model.named_modules(): pass for example {closest(layer, filter(None, modules))}"
            )
        paths.append(path)
    return paths


def _stages(model: nn.Module, paths: list[str] | None, examples: Examples) -> Stages:
    """Return layer -> parameters. A parameter of several layers belongs to the first layer.

    Args:
        model: The copy of the network.
        paths: Names of layers, each with its submodules; None for all modules with own parameters.
        examples: Examples to run the model on, which gives the order of modules.
    """
    names = paths
    if names is None:
        ran = _execution_order(model, examples)
        names = sorted((path for path, _ in model.named_modules()), key=ran.__getitem__)[::-1]
    stages: Stages = {}
    seen = set[nn.Parameter]()
    for path in names:
        parameters = [
            p
            for p in model.get_submodule(path).parameters(recurse=paths is not None)
            # a constant parameter has standard deviation 0: its random values would not change
            if p not in seen and p.is_floating_point() and (p != p.flatten()[:1]).any()
        ]
        seen.update(parameters)
        if parameters:
            stages[path or "(model)"] = parameters
        elif paths is not None:
            raise InputError(
                f"layer {path!r} has nothing to make random: all its parameters are constant or "
                "belong to an earlier layer of layers=. Expected a parameter with varying values: "
                "remove this layer from layers="
            )
    if not stages:
        raise InputError(
            f"{type(model).__name__} has nothing to make random: it has no parameter with varying "
            "values, expected at least one. Pass a trained network"
        )
    return stages


def _execution_order(model: nn.Module, examples: Examples) -> dict[str, int]:
    """Return module name -> number of its last call, recorded by hooks on the copy.

    A module that is never called itself, because only its parameters are used, gets the number of
    its parent module.
    """
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: calls.append(path))
        for path, module in model.named_modules()
    ]
    try:
        raw_outputs(model, examples.select(torch.arange(1)))
    finally:
        for handle in handles:
            handle.remove()
    # for a module that is called twice, the later call replaces the earlier
    order = {path: number for number, path in enumerate(calls)}
    # named_modules gives a parent before its submodules
    for path, _ in model.named_modules():
        order.setdefault(path, order.get(path.rpartition(".")[0], -1))
    return order


def _randomised(
    model: nn.Module,
    stages: Stages,
    order: str,
    init: Literal["normal", "permuted"] | Redraw,
    generator: torch.Generator,
) -> Iterator[str]:
    """Make one layer after the other random, in place, and yield the name of each.

    With the order "independent", a layer gets its trained weights again after the yield.
    """
    for name, parameters in stages.items():
        trained = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.copy_(_redrawn(p.detach().clone(), init, generator))
        yield name
        if order == "independent":
            with torch.no_grad():
                for p, values in zip(parameters, trained, strict=True):
                    p.copy_(values)


def _redrawn(
    p: Tensor, init: Literal["normal", "permuted"] | Redraw, generator: torch.Generator
) -> Tensor:
    """Return random values of the shape of a parameter ``p``, see ``init`` of `randomization`."""
    if callable(init):
        return init(p, generator)
    if init == "permuted":
        order = torch.randperm(p.numel(), generator=generator, device=generator.device)
        return p.flatten()[order.to(p.device)].view_as(p)
    noise = torch.randn(
        p.shape, generator=generator, device=generator.device, dtype=torch.float64
    ).to(p.device)
    # random values = mean(p) + std(p) · N(0, 1)
    return p.double().mean() + p.double().std(correction=0) * noise
