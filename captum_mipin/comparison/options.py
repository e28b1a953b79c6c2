"""The options of ``compare`` that say how much is done and what the result shows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captum_mipin.calls import unknown_argument
from captum_mipin.comparison.names import ClassNames
from captum_mipin.comparison.table import Comparison
from captum_mipin.metrics import Options
from captum_mipin.options import check_number

#: Keywords that ``compare`` itself names.
_NAMED = "metrics", "boxes", "inverse", "layer", "controls"


class Settings(Options, total=False):
    """The keyword arguments of ``compare``, together with the keyword arguments of all metrics.

    Attributes:
        titles: Text for each image; by default the name of its target, with softmax and logit
            below it in figures and pages.
        names: Names of the classes, see :func:`~captum_mipin.comparison.names.class_names`.
        steps: Largest number of steps of insertion and deletion, by default 32. None for their own
            protocol, one row of pixels per step.
        budget: Seconds after which no further images are begun; None, the default, for all images.
            At least one image is used. Metrics that need all images at once come after that. The
            result says how many images were used.
        callback: Function that gets the comparison so far, again and again, for example to save it.
        progress: Whether to show a bar with method, metric and the time that is left.
    """

    titles: Sequence[str] | None
    names: ClassNames
    steps: int | None
    budget: float | None
    callback: Callable[[Comparison], Any] | None
    progress: bool


@dataclass(frozen=True)
class Extent:
    """The options of :class:`Settings` with their defaults, without those of all metrics."""

    titles: Sequence[str] | None = None
    names: ClassNames = None
    steps: int | None = 32
    budget: float | None = None
    callback: Callable[[Comparison], Any] | None = None
    progress: bool = True

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> tuple["Extent", dict[str, Any]]:
        """Return the extent, and the keyword arguments that all metrics take.

        Raises:
            InputError: A keyword is not known, or ``steps`` or ``budget`` is out of range.
        """
        known = {**Settings.__annotations__, **Options.__annotations__}
        for name in options:
            if name not in known:
                names = ["methods", "images", "targets", *_NAMED, *known]
                raise unknown_argument("compare", name, names)
        shared = {name: options[name] for name in Options.__annotations__ if name in options}
        extent = cls(**{name: value for name, value in options.items() if name not in shared})
        if extent.steps is not None:
            check_number("steps", extent.steps, 1, whole=True)
        if extent.budget is not None:
            check_number("budget", extent.budget, finite=False)
        return extent, shared
