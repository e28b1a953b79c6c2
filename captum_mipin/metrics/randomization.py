"""Does the attribution depend on what the network has learned: layers randomised, one after the other or one at a time."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_mipin.errors import InputError
from captum_mipin.graph.modules import copy_memo
from captum_mipin.metrics.common import (
    Examples,
    Inputs,
    Method,
    described,
    explain,
    finite_rows,
    heat,
    model_of,
    option,
    owner,
    raw_outputs,
    seeded,
)  # fmt: skip
from captum_mipin.metrics.result import Result
from captum_mipin.metrics.similarity import spearman, ssim, ssim_window

#: Of a parameter, with a generator, its random values.
Redraw = Callable[[Tensor, torch.Generator], Tensor]


@torch.inference_mode(False)  # weights copied in inference mode would have no gradients
def randomization(
    method: Method,
    inputs: Inputs,
    target: Any = None,
    *,
    refit: Callable[[nn.Module], Method] | None = None,
    order: Literal["cascading", "independent"] = "cascading",
    layers: Sequence[str | nn.Module] | None = None,
    init: Literal["normal", "permuted"] | Redraw = "normal",
    model: nn.Module | None = None,
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """How alike maps stay when the network's weights are made random (Adebayo et al., NeurIPS 2018).

    All is done to a deep copy of the model, and of the method with it. A method that was fitted to the network can be asked
    two questions. Without ``refit`` the fit is kept, and the result says how much the maps owe to the rest of the network: the
    masks, say. (An ``InverseNetwork`` has to be told so: ``changed="ignore"``.) With ``refit``, say
    ``lambda model: MIPINAttribution(model, InverseNetwork(model).fit(x))``, the method is made anew for each random network.

    Args:
        method: An ``Attribution``, or its bound ``attribute``; with ``refit`` also a callable, or the trained network's maps.
        inputs: Tensor (examples, ...) or tuple of such.
        target: As Captum takes it.
        refit: Model → method. Needed where the method does not know its model, and for Captum's classes the class itself.
        order: "cascading" from the output down, all layers so far random; or "independent", one at a time.
        layers: Names or modules of the model, in the order in which to randomise them, each with all that is inside; by default
            every module with parameters of its own, the one that ran last first.
        init: Of each parameter "normal" draws with its own mean and standard deviation, its own values "permuted", or a
            function of parameter and generator. Buffers stay.
        model: What is explained; by default the method's ``forward_func``.
        additional_forward_args: Further arguments of the model.
        generator: Draws the weights.
        batch_size: Examples explained at once.

    Returns:
        Spearman's correlation with the maps of the trained network, averaged over layers; near 0 is best, 1 says that the
        network does not matter. The parts are the same of absolute values, and SSIM, the larger of that with the map and with
        its negative, where maps are images of at least 3 x 3. ``curves`` have each layer; settings["layers"] their names.
        Unscored: "constant" maps, before or for any layer, "NaN".

    Raises:
        InputError: The method does not know a ``torch.nn.Module`` as its model; a layer is none of the model's, or has nothing
            to randomise.

    Examples:
        >>> import captum.attr
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> result = randomization(captum.attr.Saliency(model), torch.randn(5, 6), 0)
        >>> result.n, result.settings["layers"], result.settings["fit"]
        (5, ['2', '0'], 'kept')
    """
    option("order", order, ("cascading", "independent"))
    if not callable(init):
        option("init", init, ("normal", "permuted"))
    examples, random = Examples.of(inputs, target, additional_forward_args), seeded(generator)
    trained = model_of(method, model)
    if not isinstance(trained, nn.Module):
        raise InputError(
            f"the model is a {type(trained).__name__}, expected a torch.nn.Module, whose weights can be made random"
        )
    if refit is None and (owner(method) is None or model_of(method, None) is not trained):
        raise InputError(
            "a method that does not know its model cannot be moved to another: pass refit=, a function model -> method"
        )
    before = explain(method, examples, batch_size)
    copied: tuple[Any, nn.Module] = copy.deepcopy(
        (method if refit is None else None, trained), copy_memo(trained)
    )
    twin, changed = copied  # the model of the one is the other
    stages = _stages(changed, _paths(trained, layers), examples, layers is None)
    measured = [
        _alike(
            before,
            explain(twin if refit is None else refit(changed), examples, batch_size),
            examples,
        )
        for _ in _randomised(changed, stages, order, init, random)
    ]
    settings = described(method, examples, before, layers=list(stages), order=order,
                         init=init, fit="kept" if refit is None else "made anew")  # fmt: skip
    broken = {"NaN": ~finite_rows(*before)}
    results = {}
    for name in measured[0]:
        curves = torch.stack([values[name] for values in measured], 1)
        reasons = {**broken, "constant": ~finite_rows(curves)}
        results[name] = Result.of(name, curves.mean(1), "lower", settings, reasons, curves=curves)
    first = results.pop("Spearman")
    return Result(
        "randomization",
        first.values,
        "lower",
        settings,
        first.unscored,
        None,
        first.curves,
        results,
    )


def _paths(model: nn.Module, layers: Sequence[str | nn.Module] | None) -> list[str]:
    """Names of the layers to randomise."""
    paths = {id(module): path for path, module in model.named_modules()}
    if layers is None:
        return [
            path
            for path, module in model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]
    names, found = set(paths.values()), []
    for layer in layers:
        path = layer if isinstance(layer, str) else paths.get(id(layer))
        if path not in names or path is None:
            raise InputError(f"layers has {layer!r}, which is no module of the model")
        found.append(path)
    return found


def _stages(
    model: nn.Module, paths: list[str], examples: Examples, by_execution: bool
) -> dict[str, list[nn.Parameter]]:
    """Name → parameters of each layer, the one that ran last first unless the order is given; shared ones in the first."""
    if by_execution:
        ran = _executed(model, examples)
        paths = sorted(paths, key=lambda path: (ran[path], paths.index(path)), reverse=True)
    stages, seen = {}, set[int]()
    for path in paths:
        mine = [
            p
            for p in model.get_submodule(path).parameters(recurse=not by_execution)
            if p.is_floating_point()
        ]
        mine = [
            p for p in mine if id(p) not in seen and (p != p.reshape(-1)[:1]).any()
        ]  # a constant has no spread to draw with
        seen.update(map(id, mine))
        if mine:
            stages[path or "(model)"] = mine
        elif not by_execution:
            raise InputError(
                f"layer {path!r} has nothing to make random: no parameter that varies and no layer before it holds"
            )
    if not stages:
        raise InputError("the model has no parameter that varies: nothing to make random")
    return stages


def _executed(model: nn.Module, examples: Examples) -> dict[str, int]:
    """When each module last ran; those whose parameters others use run with the module that holds them."""
    order: dict[str, int] = {}
    count = iter(range(1 << 62))
    handles = [
        module.register_forward_hook(
            lambda *_, path=path: order.update({path: next(count)})
        )  # on the copy
        for path, module in model.named_modules()
    ]
    try:
        raw_outputs(model, examples.pick(torch.arange(1)))
    finally:
        for handle in handles:
            handle.remove()
    for path, _ in model.named_modules():  # holders come before what they hold
        if path not in order:
            order[path] = order.get(path.rpartition(".")[0], -1)
    return order


def _randomised(
    model: nn.Module,
    stages: dict[str, list[nn.Parameter]],
    order: str,
    init: Literal["normal", "permuted"] | Redraw,
    generator: torch.Generator,
) -> Iterator[str]:
    """Make layer after layer random, in place, and tell each."""
    for name, parameters in stages.items():
        trained = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.copy_(
                    init(p.detach().clone(), generator)
                    if callable(init)
                    else _redrawn(p, init, generator)
                )
        yield name
        if order == "independent":
            with torch.no_grad():
                for p, values in zip(parameters, trained, strict=True):
                    p.copy_(values)


def _redrawn(p: Tensor, init: str, generator: torch.Generator) -> Tensor:
    if init == "permuted":
        return p.reshape(-1)[
            torch.randperm(p.numel(), generator=generator, device=generator.device).to(p.device)
        ].view_as(p)
    noise = torch.randn(
        p.shape, generator=generator, device=generator.device, dtype=torch.float64
    ).to(p.device)
    values = p.double()
    return (values.mean() + values.std(correction=0) * noise).to(p.dtype)


def _alike(
    before: tuple[Tensor, ...], after: tuple[Tensor, ...], examples: Examples
) -> dict[str, Tensor]:
    """(examples,) of each measure."""
    a, b = (torch.cat([m.double().flatten(1) for m in maps], 1) for maps in (before, after))
    found = {"Spearman": spearman(a, b), "Spearman of absolute values": spearman(a.abs(), b.abs())}
    first, second = (heat(maps[0], examples.inputs[0]) for maps in (before, after))
    window = ssim_window(*first.shape[1:]) if len(before) == 1 and first.ndim == 3 else None
    if window is not None:
        found["SSIM"] = torch.maximum(ssim(first, second, window), ssim(first, -second, window))
    return found
