"""Rows and columns of a comparison."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any

from torch import Tensor

from captum_mipin.errors import InputError
from captum_mipin.metrics import Result
from captum_mipin.metrics.maps import heat, resized
from captum_mipin.metrics.result import Better

#: Text that replaces a map whose values are all 0.
ALL_ZERO = "all 0"
#: Letters of a reason that replaces a map.
_LETTERS = 80
_ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}


@dataclass(frozen=True)
class Column:
    """A column of the table: a metric, or one part of its results.

    Attributes:
        metric: Name of the metric.
        part: Name of the part; empty for the metric itself.
        better: "higher" or "lower" for the direction of better scores, or "neither".
    """

    metric: str
    part: str
    better: Better = "neither"

    @property
    def name(self) -> str:
        """The name of the metric, followed by the name of the part if there is one."""
        return f"{self.metric}, {self.part}" if self.part else self.metric

    @property
    def heading(self) -> str:
        """The heading, with an arrow up or down for the direction of better scores."""
        return self.name.replace("_", " ") + _ARROWS[self.better]


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the table: one method or control, with its maps, results and errors.

    Attributes:
        name: Label of the method.
        control: True for a control, see :func:`~captum_mipin.comparison.methods.controls`.
        maps: Maps (images, ...) of the method; None if the method failed.
        results: Name of a metric -> result.
        errors: Name of a metric that failed, or "" for the method -> text of the error.
        seconds: Time to compute the maps, in seconds.
        missing: Reason -> indices of images for which the method failed; their maps are NaN.
        place: Reading and layer, such as "A at features.12", for captions of pictures.

    Examples:
        >>> import torch
        >>> Row("mine", control=False, maps=torch.rand(2, 1, 8, 8)).error
        ''
    """

    name: str
    control: bool
    maps: Tensor | None
    results: Mapping[str, Result] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    missing: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    place: str = ""

    @property
    def caption(self) -> str:
        """Text over the method's pictures: its label, and in a second line its place."""
        return f"{self.name}\n{self.place}".strip()

    @property
    def error(self) -> str:
        """Text of the method's error; empty if the method did not fail."""
        return self.errors.get("", "")

    def result(self, column: Column) -> Result | None:
        """Return the result of a column; None if the row has no result for this column."""
        result = self.results.get(column.metric)
        return result.parts.get(column.part) if result is not None and column.part else result

    def cell(self, column: Column) -> str:
        """Return mean ± standard error as text; add the number of scored images if not all are."""
        result = self.result(column)
        if result is None:
            return "failed" if self.error else "–"
        scored = "" if result.n == len(result) else f" ({result.n} of {len(result)})"
        spread = "" if isnan(result.standard_error) else f" ± {result.standard_error:.2g}"
        return f"{result.mean:.3g}{spread}{scored}"

    def heat(self, number: int, images: Tensor) -> Tensor | str:
        """Return the map of one image without channels, or a text if there is no map to show.

        Args:
            number: Index of the image.
            images: All images (images, channels, height, width).

        Returns:
            Map (height, width) with a largest absolute value of 1; or one of the texts "failed",
            "no image", "NaN" and "all 0", or the short reason why this image has no map.
        """
        if self.maps is None:
            return "failed"
        for why, indices in self.missing.items():
            if number in indices:
                # the first part says what happened; the rest, what to do, stands under the table
                return textwrap.shorten(re.split("[;:.] ", why)[0], _LETTERS, placeholder=" …")
        try:
            heats = heat(self.maps[number : number + 1], images[:1])
            (heat_map,) = resized(heats, images.shape[2:]).cpu()
        except InputError:
            return "no image"
        if not heat_map.isfinite().all():
            return "NaN"
        return heat_map / heat_map.abs().max() if heat_map.any() else ALL_ZERO

    def to_dict(self) -> dict[str, Any]:
        """Return the row without its maps, as values that JSON supports."""
        return {
            "name": self.name,
            "control": self.control,
            "seconds": self.seconds,
            "errors": dict(self.errors),
            "missing": {reason: list(images) for reason, images in self.missing.items()},
            "results": {metric: result.to_dict() for metric, result in self.results.items()},
        }


def columns(rows: Sequence[Row], metrics: Sequence[str], parts: bool) -> list[Column]:
    """Return the columns of a table.

    Args:
        rows: Rows of the table.
        metrics: Names of the metrics.
        parts: True to add a column for each part that any row has.
    """
    chosen = []
    for metric in metrics:
        results = [row.results[metric] for row in rows if metric in row.results]
        # not all results have the same parts: for example, only maps that are images have SSIM
        named: dict[str, Better] = {"": results[0].better if results else "neither"}
        for result in results if parts else ():
            for name, part in result.parts.items():
                named.setdefault(name, part.better)
        chosen += [Column(metric, name, better) for name, better in named.items()]
    return chosen
