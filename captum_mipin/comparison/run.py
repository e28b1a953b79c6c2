"""The function ``compare``, which computes and scores the maps of several methods."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import Unpack

from captum_mipin import metrics as library
from captum_mipin.attribution import LayerMIPINAttribution, MIPINAttribution
from captum_mipin.comparison.arguments import (
    check_targets,
    compared_model,
    image_titles,
    module_of,
    named_methods,
)
from captum_mipin.comparison.methods import METHODS, Setup
from captum_mipin.comparison.methods import controls as control_methods
from captum_mipin.comparison.rows import Row
from captum_mipin.comparison.table import Comparison
from captum_mipin.copies import copy_memo
from captum_mipin.errors import InputError
from captum_mipin.inverse.base import ModelInverse
from captum_mipin.metrics import Boxes, Method, Options, Result
from captum_mipin.metrics.boxes import image_masks
from captum_mipin.metrics.case import Case, attribution_of
from captum_mipin.metrics.examples import Examples

Metric = Callable[..., Result]

#: Metrics that use only the maps of a method, which are computed once for all these metrics.
_OF_MAPS: tuple[Any, ...] = (
    library.bounding_box_accuracy,
    library.pointing_game,
    library.effective_heat_ratio,
    library.deletion,
    library.insertion,
    library.sensitivity_n,
    library.infidelity,
)
_OF_METHODS: tuple[Any, ...] = (
    library.completeness,
    library.grid_pointing_game,
    library.class_sensitivity,
    library.sensitivity_max,
    library.randomization,
)
#: Name -> metric, for metrics that users pass to ``compare`` by name.
METRICS: dict[str, Metric] = {metric.__name__: metric for metric in _OF_MAPS + _OF_METHODS}


@torch.inference_mode(False)  # weights copied in inference mode would have no gradients
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
    titles: Sequence[str] | None = None,
    progress: bool = True,
    **options: Unpack[Options],
) -> Comparison:
    """Compare attribution methods on the same images.

    If a method or metric fails, its error is stored in the row. A method whose scores are not
    better than those of the controls gives no evidence about the image.

    Args:
        methods: A method or a name of :data:`METHODS`; or a list, or a dictionary label -> method,
            of these. Methods by name use a copy of the model.
        images: Tensor (images, channels, height, width); for a table alone, any inputs.
        targets: Classes to explain, as Captum takes them; None if the model has one output.
        metrics: Names of :data:`METRICS`, or a dictionary name -> function; the default depends on
            whether there are images and boxes.
        boxes: Boxes or masks of objects, see :func:`~captum_mipin.metrics.box_masks`.
        inverse: Fitted inverse for the methods "MIP-IN"; its stop layer is explained.
        layer: Layer for Grad-CAM and Grad×Feature by name: a module or its dotted name.
        controls: True to add controls, see :func:`~captum_mipin.comparison.methods.controls`.
        titles: Text for each image; by default its target.
        progress: Whether to show a progress bar.
        **options: See :class:`~captum_mipin.metrics.case.Options`. Random numbers are the same for
            all methods.

    Raises:
        InputError: Names are not known, or boxes or titles do not fit the images.
        TargetError: The targets do not fit the images or the outputs.
        TrainingModeError: The model is in training mode.

    Examples:
        >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), torch.rand(2, 1, 8, 8)
        >>> result = compare(["Saliency"], x, 0, model=model, metrics=["deletion"], progress=False)
        >>> [row.name for row in result.rows]
        ['Saliency', 'random', 'centre prior', 'mask only']
    """
    x = Examples.of(images, targets).x
    case = Case.of((), x, targets, **options)
    named = named_methods(methods)
    functions = _metric_functions(metrics, x, boxes)
    written = image_titles(titles, case.examples)
    model = compared_model(case.user_model, inverse, named.values())
    module = module_of(layer, model)
    check_targets(case, model, named.values())
    made = _made(named, model, inverse, module)
    added = control_methods(made.values(), model) if controls else {}
    made |= {name: control for name, control in added.items() if name not in made}
    run = _Run(case, {**options, "boxes": boxes, "model": model}, _seed(case.generator))
    rows = run.rows(made, named, functions, progress)
    return Comparison(tuple(rows), tuple(functions), x.detach().cpu(), written)


@dataclass(frozen=True)
class _Run:
    """Images and arguments that are the same for all methods and metrics of a comparison.

    Attributes:
        case: Case with the images and targets, without a method.
        arguments: Keyword arguments; each metric gets those that it has as parameters.
        seed: Seed of the generator that each metric gets.
    """

    case: Case
    arguments: dict[str, Any]
    seed: int

    def rows(
        self,
        made: Mapping[str, Any],
        named: Mapping[str, Any],
        functions: Mapping[str, Metric],
        progress: bool,
    ) -> list[Row]:
        """Return one row per method, with its maps, results and errors.

        Args:
            made: Label -> method or control, or the exception raised when it was made.
            named: Label -> method, for the methods of the user; all others are controls.
            functions: Name -> metric.
            progress: Whether to show a progress bar.
        """
        rows, total = [], len(made) * (1 + len(functions))
        with tqdm(total=total, desc="compare", disable=not progress, leave=False) as bar:
            for name, method in made.items():
                rows.append(self.explained(name, method, name not in named, bar))
                for title, metric in functions.items():
                    rows[-1] = self.scored(rows[-1], method, title, metric, bar)
        return rows

    def explained(self, name: str, method: Any, control: bool, bar: Any) -> Row:
        """Return the row of a method, with its maps or its error.

        Args:
            name: Label of the method.
            method: The method, or the exception raised when it was made.
            control: True for a control.
            bar: Progress bar, which goes on by one step.
        """
        bar.set_postfix_str(name)
        start = perf_counter()
        maps, errors = None, {}
        try:
            if isinstance(method, Exception):
                raise method
            tensors = replace(self.case, method=method).maps
            if len(tensors) != 1:
                raise InputError(
                    f"the method gave {len(tensors)} tensors of maps, expected one: pass a method "
                    "that returns one tensor"
                )
            (maps,) = tensors
        except Exception as error:  # of any type: other methods must still be computed
            errors = {"": _first_line(error)}
        bar.update()
        return Row(name, control, maps, errors=errors, seconds=perf_counter() - start)

    def scored(self, row: Row, method: Any, title: str, metric: Metric, bar: Any) -> Row:
        """Return the row with the result of a metric added, or the metric's error.

        Args:
            row: The row of the method.
            method: The method.
            title: Name of the metric.
            metric: The metric.
            bar: Progress bar, which goes on by one step.
        """
        bar.set_postfix_str(f"{row.name}, {title}")
        bar.update()
        if row.maps is None:
            return row
        try:
            # metrics that use only maps get the maps of the row, so that none are computed twice
            function = metric.func if isinstance(metric, partial) else metric
            source = row.maps if function in _OF_MAPS else method
            examples, arguments = self.case.examples, self._arguments(metric, method)
            result = metric(source, examples.x, examples.target, **arguments)
        except Exception as error:  # of any type: other metrics must still be computed
            return replace(row, errors={**row.errors, title: _first_line(error)})
        result = replace(result, settings={**result.settings, "method": row.name})
        return replace(row, results={**row.results, title: result})

    def _arguments(self, metric: Metric, method: Any) -> dict[str, Any]:
        """Return the keyword arguments for a metric, without those that a ``partial`` has bound."""
        # a new generator for each call, so that all methods get the same random numbers
        arguments = {**self.arguments, "generator": torch.Generator().manual_seed(self.seed)}
        attribution = attribution_of(method)
        if attribution is not None:  # each method is measured on the network that it explains
            arguments["model"] = attribution.forward_func
        function, bound = metric, dict[str, Any]()
        if isinstance(metric, partial):
            function, bound = metric.func, metric.keywords
        # a metric gets the arguments that are among its parameters; metrics of this package also
        # take the parameters in `Options`
        known = set(signature(function).parameters)
        if function in METRICS.values():
            known |= Options.__annotations__.keys()
        known -= bound.keys()
        return {
            name: value for name, value in arguments.items() if name in known and value is not None
        }


def _metric_functions(metrics: Any, images: Tensor, boxes: Boxes | None) -> dict[str, Metric]:
    """Return name -> metric.

    The default for images is insertion and deletion, for other inputs deletion; with boxes, box
    accuracy and the pointing game are added.

    Raises:
        InputError: A name is not known, a metric is not a function, or boxes do not fit the images.
    """
    if boxes is not None:
        image_masks(boxes, images)
    if metrics is None:
        metrics = ["bounding_box_accuracy", "pointing_game"] * (boxes is not None)
        metrics += ["insertion", "deletion"] if images.ndim == 4 else ["deletion"]
    if not isinstance(metrics, Mapping):
        if isinstance(metrics, str) or any(name not in [*METRICS] for name in metrics):
            raise InputError(
                f"metrics is {metrics!r}, expected a list of names among "
                f"{', '.join(METRICS)}: pass such a list, or a dictionary name -> function"
            )
        metrics = {name: METRICS[name] for name in metrics}
    for title, metric in metrics.items():
        if not callable(metric):
            raise InputError(
                f"metric {title!r} is a {type(metric).__name__}, expected a function: pass a "
                "dictionary name -> function"
            )
    return {str(title): metric for title, metric in metrics.items()}


def _made(
    named: Mapping[str, Any], model: Any, inverse: ModelInverse[Any] | None, layer: nn.Module | None
) -> dict[str, Any]:
    """Return label -> method; methods given by name are made.

    Args:
        named: Label -> method or name of a method.
        model: The network.
        inverse: Fitted inverse for MIP-IN, or None.
        layer: Layer for methods of a layer, or None.

    Returns:
        Label -> method, or the exception raised when the method was made.
    """
    if not any(isinstance(method, str) for method in named.values()):
        return dict(named)
    mipin: Any = None
    if inverse is not None:
        kind = MIPINAttribution if inverse.layer is None else LayerMIPINAttribution
        mipin = kind(model, inverse)
    # methods get a copy of the network: if DeepLift, for example, fails, it does not remove hooks
    copied: tuple[nn.Module, nn.Module | None] = copy.deepcopy((model, layer), copy_memo(model))
    setup = Setup(*copied, mipin)

    def made(method: Any) -> Any:
        try:
            return METHODS[method](setup) if isinstance(method, str) else method
        except Exception as error:  # of any type: other methods must still be made
            return error

    return {name: made(method) for name, method in named.items()}


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 62, (1,), generator=generator, device=generator.device))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
