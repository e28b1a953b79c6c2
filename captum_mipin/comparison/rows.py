"""Rows and columns of a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any

from torch import Tensor

from captum_mipin.errors import InputError
from captum_mipin.metrics import Result
from captum_mipin.metrics.maps import heat, resized
from captum_mipin.metrics.result import Better

#: What stands in the place of a map without information.
ALL_ZERO = "all 0"
_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}


@dataclass(frozen=True)
class Column:
    """A metric, or one part of its results.

    Attributes:
        metric: Name of the metric.
        part: Name of the part; empty for the metric itself.
        better: The better score: "higher", "lower", or "neither".
    """

    metric: str
    part: str
    better: Better = "neither"

    @property
    def name(self) -> str:
        """The metric's name, and that of the part."""
        return f"{self.metric}, {self.part}" if self.part else self.metric

    @property
    def heading(self) -> str:
        """The heading, with an arrow towards better scores."""
        return self.name.replace("_", " ") + _ARROWS[self.better]


@dataclass(frozen=True, eq=False)
class Row:
    """One method in a comparison.

    Attributes:
        name: Name of the method.
        control: It is a control, which knows less than a method should.
        maps: Maps (images, ...) as the method gave them; None if it failed.
        results: Metric -> result.
        errors: What failed: metric, or "" for the method itself -> why.
        seconds: Time that the maps took.
    """

    name: str
    control: bool
    maps: Tensor | None
    results: Mapping[str, Result] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def error(self) -> str:
        """Why the method failed; empty if it did not."""
        return self.errors.get("", "")

    def result(self, column: Column) -> Result | None:
        """Return the result of a column; None if there is none."""
        result = self.results.get(column.metric)
        return result.parts.get(column.part) if result is not None and column.part else result

    def cell(self, column: Column) -> str:
        """Return mean ± standard error, and how many images were scored if not all."""
        result = self.result(column)
        if result is None:
            return "failed" if self.error else "–"
        scored = "" if result.n == len(result) else f" ({result.n} of {len(result)})"
        spread = "" if isnan(result.standard_error) else f" ± {result.standard_error:.2g}"
        return f"{result.mean:.3g}{spread}{scored}"

    def heat(self, number: int, images: Tensor) -> Tensor | str:
        """Return the map of one image without channels, or why there is none to be seen.

        Args:
            number: Of the image.
            images: All images (images, channels, height, width).

        Returns:
            (height, width), its largest absolute value 1; or a word or two.
        """
        if self.maps is None:
            return "failed"
        try:
            heats = heat(self.maps[number : number + 1], images[:1])
            (heat_map,) = resized(heats, images.shape[2:]).cpu()
        except InputError:
            return "no image"
        if not heat_map.isfinite().all():
            return "NaN"
        return heat_map / heat_map.abs().max() if heat_map.any() else ALL_ZERO

    def to_dict(self) -> dict[str, Any]:
        """Return all but the maps, as JSON can hold it."""
        return {
            "name": self.name,
            "control": self.control,
            "seconds": self.seconds,
            "errors": dict(self.errors),
            "results": {metric: result.to_dict() for metric, result in self.results.items()},
        }


def columns(rows: Sequence[Row], metrics: Sequence[str], parts: bool) -> list[Column]:
    """Return a column for each metric and, if asked for, for the parts of any of its results."""
    chosen = []
    for metric in metrics:
        results = [row.results[metric] for row in rows if metric in row.results]
        # a part may be missing from some results, such as SSIM where maps are no images
        named: dict[str, Better] = {"": results[0].better if results else "neither"}
        for result in results if parts else ():
            for name, part in result.parts.items():
                named.setdefault(name, part.better)
        chosen += [Column(metric, name, better) for name, better in named.items()]
    return chosen
