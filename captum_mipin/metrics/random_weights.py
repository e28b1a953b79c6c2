"""Does the attribution depend on what the network has learned? Its weights are made random.

Everything is done to a deep copy of the model, and of the method with it. A method that was fitted
to the network can be asked two questions. Without ``refit`` it keeps its fit: the result says how
much the maps owe to the rest of the network, such as its masks. (An ``InverseNetwork`` needs
``changed="ignore"`` for that.) With ``refit`` it is made anew for each random network.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from captum_mipin.copies import copy_memo
from captum_mipin.errors import InputError
from captum_mipin.metrics.case import (
    Case,
    Method,
    Options,
    attribution_of,
    check_choice,
    raw_outputs,
)
from captum_mipin.metrics.examples import Examples, Inputs
from captum_mipin.metrics.maps import flattened
from captum_mipin.metrics.result import Result, finite_rows
from captum_mipin.metrics.similarity import spearman, ssim, ssim_inputs

Refit = Callable[[nn.Module], Method]
#: A parameter and a generator -> the parameter's random values.
Redraw = Callable[[Tensor, torch.Generator], Tensor]
#: Name of a layer -> its parameters.
Stages = dict[str, list[nn.Parameter]]


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
    """Return how similar maps stay when the network's weights are made random.

    Args:
        method: Any method; a callable or maps only with ``refit``.
        inputs: Tensor (examples, ...) or tuple of such.
        target: The class, as Captum takes it.
        refit: Model -> method; makes the method anew, as this module's text says.
        order: "cascading", all layers from the output down to one; or "independent", one alone.
        layers: Names or modules in the order to randomise, each with all inside; by default every
            module with parameters of its own, the one that ran last first.
        init: "normal" with a parameter's own mean and standard deviation; "permuted", its values
            shuffled; or a function. Buffers stay.
        **options: See :class:`~captum_mipin.metrics.case.Options`. The generator draws weights.

    Returns:
        Spearman's correlation with the maps of the trained network, mean over layers: near 0 is
        best; at 1 the network does not matter. ``curves`` have one value per layer, see
        ``settings["layers"]``. Parts: the same of absolute values, and SSIM. Unscored: "constant"
        maps, "NaN".

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
    # the copied method explains the copied model
    changed, twin = copy.deepcopy((trained, () if refit else method), copy_memo(trained))
    stages = _stages(changed, _paths(trained, layers), case.examples)
    measured = []
    for _ in _randomised(changed, stages, order, init, case.generator):
        anew = replace(case, method=refit(changed) if refit else twin)
        measured.append(_similarities(case.maps, anew.maps, case.examples))
    choices = {"order": order, "init": init, "fit": "made anew" if refit else "kept"}
    return _result(measured, case.settings(case.maps, layers=list(stages), **choices), case.maps)


def _module(case: Case, refit: Refit | None) -> nn.Module:
    """Return the network to copy. Raise InputError if there is none, or the method stays behind."""
    trained = case.model
    if not isinstance(trained, nn.Module):
        raise InputError(
            f"the model is a {type(trained).__name__}, expected a torch.nn.Module, whose weights "
            "can be made random"
        )
    attribution = attribution_of(case.method)
    if refit is None and (attribution is None or attribution.forward_func is not trained):
        raise InputError(
            "a method that does not know its model cannot be moved to another: pass refit=, a "
            "function model -> method"
        )
    return trained


def _result(
    measured: list[dict[str, Tensor]], settings: dict[str, Any], before: tuple[Tensor, ...]
) -> Result:
    """Return the result: one dictionary of similarities (examples,) per layer goes in."""
    results = {}
    for name in measured[0]:
        curves = torch.stack([similarities[name] for similarities in measured], 1)
        unscored = {"NaN": ~finite_rows(*before), "constant": ~finite_rows(curves)}
        results[name] = Result.of(name, curves.mean(1), "lower", settings, unscored, curves=curves)
    return replace(results.pop("Spearman"), metric="randomization", parts=results)


def _similarities(
    before: tuple[Tensor, ...], after: tuple[Tensor, ...], examples: Examples
) -> dict[str, Tensor]:
    """Return each measure (examples,) of how similar two methods' maps are."""
    a, b = flattened(before), flattened(after)
    measures = {
        "Spearman": spearman(a, b),
        "Spearman of absolute values": spearman(a.abs(), b.abs()),
    }
    images = ssim_inputs(before, after, examples.inputs[0])
    if images is not None:
        a, b, window = images
        # random weights may turn the sign of a whole map: the larger SSIM of both signs counts
        measures["SSIM"] = torch.maximum(ssim(a, b, window), ssim(a, -b, window))
    return measures


def _paths(model: nn.Module, layers: Sequence[str | nn.Module] | None) -> list[str] | None:
    """Return the names of the user's layers. Raise InputError if one is not of the model."""
    if layers is None:
        return None
    modules, paths = dict(model.named_modules()), []
    for layer in layers:
        path = next((path for path, module in modules.items() if layer in (path, module)), None)
        if path is None:
            raise InputError(
                f"layers has {layer!r}, which is no module of the model: pass modules of the model "
                "or their names, as in model.named_modules()"
            )
        paths.append(path)
    return paths


def _stages(model: nn.Module, paths: list[str] | None, examples: Examples) -> Stages:
    """Return the parameters of each layer; parameters that layers share are in the first of them.

    Args:
        model: The copy.
        paths: Layers, each with all inside; None for all modules with own parameters.
        examples: Tell which module runs last: it is the first layer.
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
            # a constant parameter has no spread to draw with
            if p not in seen and p.is_floating_point() and (p != p.flatten()[:1]).any()
        ]
        seen.update(parameters)
        if parameters:
            stages[path or "(model)"] = parameters
        elif paths is not None:
            raise InputError(
                f"layer {path!r} has nothing to make random: no parameter that varies and that no "
                "layer before it holds. Leave it out of layers="
            )
    if not stages:
        raise InputError("the model has no parameter that varies: nothing to make random")
    return stages


def _execution_order(model: nn.Module, examples: Examples) -> dict[str, int]:
    """Return when each module ran last, from hooks on the copy.

    A module that is not called, but whose parameters others use, ran with the module that holds it.
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
    # a module that is called twice counts at its last call
    order = {path: number for number, path in enumerate(calls)}
    for path, _ in model.named_modules():  # modules come before what they hold
        order.setdefault(path, order.get(path.rpartition(".")[0], -1))
    return order


def _randomised(
    model: nn.Module,
    stages: Stages,
    order: str,
    init: Literal["normal", "permuted"] | Redraw,
    generator: torch.Generator,
) -> Iterator[str]:
    """Make layer after layer random, in place, and yield its name while it is so."""
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
    """Return random values for a parameter."""
    if callable(init):
        return init(p, generator)
    if init == "permuted":
        order = torch.randperm(p.numel(), generator=generator, device=generator.device)
        return p.flatten()[order.to(p.device)].view_as(p)
    noise = torch.randn(
        p.shape, generator=generator, device=generator.device, dtype=torch.float64
    ).to(p.device)
    # normal: mean(p) + std(p) · N(0, 1)
    return p.double().mean() + p.double().std(correction=0) * noise
