"""The function ``compare``, which computes and scores the maps of several methods."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import Unpack

from captum_mipin.attribution import LayerMIPINAttribution, MIPINAttribution
from captum_mipin.calls import explained
from captum_mipin.comparison.arguments import (
    check_targets,
    checked_names,
    compared_model,
    image_titles,
    layer_of,
    named_methods,
)
from captum_mipin.comparison.methods import CONTROLS, METHODS, Setup
from captum_mipin.comparison.methods import controls as control_methods
from captum_mipin.comparison.names import captions
from captum_mipin.comparison.options import Extent, Settings
from captum_mipin.comparison.scores import Metric, metric_functions
from captum_mipin.comparison.table import Comparison
from captum_mipin.comparison.work import Line, Work
from captum_mipin.copies import copy_memo
from captum_mipin.errors import MIPINError, NotFittedError
from captum_mipin.inverse.base import ModelInverse
from captum_mipin.metrics import Boxes, Method
from captum_mipin.metrics.case import Case
from captum_mipin.metrics.examples import Examples
from captum_mipin.propagation.independent import require_independent


@torch.inference_mode(False)  # weights copied in inference mode would have no gradients
@explained
def compare(
    methods: Mapping[str, Method | str] | Iterable[Method | str] | Method | str,
    images: Tensor,
    targets: Any = None,
    *,
    metrics: Sequence[str] | Mapping[str, Metric] | None = None,
    boxes: Boxes | None = None,
    inverse: ModelInverse[Any] | None = None,
    layer: nn.Module | str | None = None,
    controls: bool = True,
    **options: Unpack[Settings],
) -> Comparison:
    """Compare attribution methods on the same images.

    If a method or metric fails, its error is stored in the row; an image whose class has no fitted
    inverse has no map. A method whose scores are not better than those of the controls gives no
    evidence about the image. Ctrl-C ends the work early, and what is done is returned.

    Args:
        methods: A method or a name of :data:`METHODS`; or a list, or a dictionary label -> method,
            of these. Methods by name use a copy of the model.
        images: Tensor (images, channels, height, width); for a table alone, any inputs.
        targets: Classes to explain, as Captum takes them; None if the model has one output.
        metrics: Names of :data:`METRICS`, or a dictionary name -> function; the default depends on
            whether there are images and boxes.
        boxes: Boxes or masks of objects, see :func:`~captum_mipin.metrics.box_masks`.
        inverse: Fitted inverse for the methods "MIP-IN"; the layer where it stops is explained.
        layer: Layer for Grad-CAM and Grad×Feature by name: a module or its dotted name.
        controls: True to add controls, see :func:`~captum_mipin.comparison.methods.controls`.
        **options: See :class:`~captum_mipin.comparison.options.Settings`. Random numbers are the
            same for all methods.

    Raises:
        InputError: Names or keywords are not known, an option is out of range, or boxes, titles or
            names of classes do not fit.
        TargetError: The targets do not fit the images or the outputs.
        TrainingModeError: The model is in training mode.

    Examples:
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), torch.rand(2, 1, 8, 8)
        >>> result = compare(["Saliency"], x, 0, model=model, metrics=["deletion"], progress=False)
        >>> [row.name for row in result.rows]
        ['Saliency', 'random', 'centre prior', 'mask only']
    """
    extent, arguments = Extent.of(options)
    case = Case.of((), Examples.of(images, targets).x, targets, **arguments)
    named, functions = named_methods(methods), metric_functions(metrics, case.examples.x, boxes)
    model = compared_model(case.user_model, inverse, named.values())
    module = layer_of(layer, model)
    check_targets(case, model, named.values())
    titles = image_titles(extent.titles, case.examples, checked_names(extent.names, case, model))
    made = _made(named, model, inverse, module, case.examples)
    lines = _with_controls(made, model, controls)
    known = {**arguments, "boxes": boxes, "model": model, "steps": extent.steps}
    return _run(Work(case, lines, functions, known, _seed(case.generator)), extent, titles)


def _run(work: Work, extent: Extent, titles: Sequence[str]) -> Comparison:
    """Do the work until it is done, interrupted, or the budget is used up.

    Args:
        work: The work.
        extent: Budget, progress and callback.
        titles: One title per image.

    Raises:
        KeyboardInterrupt: The work was interrupted before anything was done.
    """
    x, targets = work.case.examples.x.detach(), work.case.examples.targets
    case, told = replace(work.case, user_model=work.arguments["model"]), list[str]()

    def so_far(count: int, note: str = "") -> Comparison:
        """Return the comparison on the first ``count`` images."""
        rows = tuple(ln.row(targets[:count]) for ln in work.lines if ln.reached >= count)
        if extent.titles is None and count > len(told):
            index = torch.arange(len(told), count)
            part = replace(case, examples=case.examples.select(index))
            told.extend(captions(part, titles[len(told) : count]))
        texts = tuple(titles[:count]), note, tuple(told[:count])
        return Comparison(rows, tuple(work.metrics), x[:count].cpu(), *texts)

    done, note, hidden = 0, "", not extent.progress
    with tqdm(total=work.units, desc="compare", disable=hidden, leave=False, smoothing=0) as bar:
        try:
            for done in work.groups(extent.budget, bar):
                if extent.callback is not None:
                    extent.callback(so_far(done))
        except KeyboardInterrupt:
            if not done:
                raise
            left = work.left(done)
            note = "interrupted" + f" before {', '.join(left)}" * bool(left)
    if done < len(x):
        reason = note or f"the budget of {extent.budget:g} s was used up"
        note = f"{done} of {len(x)} images were used: {reason}"
    return so_far(done, note)


def _with_controls(made: Mapping[str, Any], model: Any, controls: bool) -> list[Line]:
    """Return lines of methods, then of controls.

    Args:
        made: Label -> method; the name of a control, for a control that the user asked for by name;
            or the exception raised when the method was made.
        model: The network.
        controls: True to add all controls.
    """
    known = control_methods(made.values(), model)
    missing = NotFittedError(
        "pattern only is a control for MIP-IN, but no method is MIP-IN: add MIP-IN to the methods"
    )
    names = {label: name for label, name in made.items() if isinstance(name, str)}
    asked = {label: known.get(name, missing) for label, name in names.items()}
    added = {name: control for name, control in known.items() if controls and name not in made}
    methods = [Line(name, method, False) for name, method in made.items() if name not in asked]
    return [*methods, *(Line(name, method, True) for name, method in {**asked, **added}.items())]


def _made(
    named: Mapping[str, Any],
    model: Any,
    inverse: ModelInverse[Any] | None,
    layer: nn.Module | None,
    examples: Examples,
) -> dict[str, Any]:
    """Return label -> method; methods given by name are made.

    Args:
        named: Label -> method or name of a method.
        model: The network.
        inverse: Fitted inverse for MIP-IN, or None.
        layer: Layer for methods of a layer, or None.
        examples: The images, of which a method by name must explain each alone.

    Returns:
        Label -> method, or the exception raised when the method was made.
    """
    if not any(method in METHODS for method in named.values() if isinstance(method, str)):
        return dict(named)
    mipin: Any = None
    if inverse is not None:
        kind = MIPINAttribution if inverse.layer is None else LayerMIPINAttribution
        mipin = kind(model, inverse)
    # methods get a copy of the network: if DeepLift, for example, fails, it does not remove hooks
    copied: tuple[nn.Module, nn.Module | None] = copy.deepcopy((model, layer), copy_memo(model))
    setup, refusal = Setup(*copied, mipin), None
    try:
        require_independent(model, examples.inputs, examples.extras)
    except MIPINError as error:
        refusal = error

    def made(method: Any) -> Any:
        try:
            if not isinstance(method, str) or method in CONTROLS:
                return method
            if refusal is not None:
                raise refusal
            return METHODS[method](setup)
        except Exception as error:  # of any type: other methods must still be made
            return error

    return {name: made(method) for name, method in named.items()}


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 62, (1,), generator=generator, device=generator.device))
