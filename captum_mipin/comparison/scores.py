"""The metrics of a comparison: by name, and which of them work image by image."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor

from captum_mipin import metrics as library
from captum_mipin.errors import InputError
from captum_mipin.metrics import Boxes, Options, Result
from captum_mipin.metrics.boxes import image_masks
from captum_mipin.options import type_of

Metric = Callable[..., Result]

#: Metrics that use only the maps of a method, which are computed once for all these metrics. The
#: score of an image depends on no other image.
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


def metric_functions(metrics: Any, images: Tensor, boxes: Boxes | None) -> dict[str, Metric]:
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
                f"metric {title!r} is {type_of(metric)}, expected a function: pass a "
                "dictionary name -> function"
            )
    return {str(title): metric for title, metric in metrics.items()}


def uses_maps(metric: Metric) -> bool:
    """Return True if a metric uses only the maps of a method."""
    return _unbound(metric)[0] in _OF_MAPS


def by_image(metric: Metric) -> bool:
    """Return True if a metric may be computed for some images, and later for the others.

    Arguments that ``partial`` has bound must be the same for all images: numbers and texts.
    """
    bound = _unbound(metric)[1].values()
    return uses_maps(metric) and all(isinstance(value, (int, float, str)) for value in bound)


def selected(metric: Metric, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that a metric takes, without those bound by ``partial``.

    A user's metric gets the arguments that are among its parameters.
    """
    function, bound = _unbound(metric)
    known = set(signature(function).parameters)
    if function in METRICS.values():
        known |= Options.__annotations__.keys()
    else:
        known -= {"steps", "ends"}  # what `compare` passes to its own metrics
    known -= bound.keys()
    return {name: value for name, value in arguments.items() if name in known and value is not None}


def _unbound(metric: Metric) -> tuple[Any, dict[str, Any]]:
    """Return the function of a metric, and the keyword arguments that ``partial`` has bound."""
    return (metric.func, metric.keywords) if isinstance(metric, partial) else (metric, {})
