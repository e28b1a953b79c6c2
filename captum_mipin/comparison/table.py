"""The result of ``compare``, which can be shown as table, figure or HTML page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from typing import Any, Literal

from torch import Tensor

from captum_mipin import report
from captum_mipin.calls import Helpful
from captum_mipin.comparison.differences import Difference, best, difference, sentences
from captum_mipin.comparison.rows import Row, columns
from captum_mipin.errors import InputError, MissingNameError
from captum_mipin.options import check_choice

#: Entries of a difference in `Comparison.to_dict`.
_SHOWN = ("mean", "standard error", "n")


@dataclass(frozen=True, eq=False)
class Comparison(Helpful):
    """The maps and scores of methods and controls for the same images and metrics.

    Attributes:
        rows: Methods, then controls.
        metrics: Names of the metrics.
        images: The explained images (images, ...).
        titles: One title per image, by default the name of its target.
        note: The reason why some images were not used; empty if all were used.
        captions: One text per image for figures and pages; empty to show the titles.

    Examples:
        >>> import torch
        >>> from captum_mipin import compare
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 2)).eval(), torch.rand(4, 6)
        >>> result = compare(["Saliency"], x, 0, model=model, progress=False)
        >>> result["Saliency"].maps.shape, result.metrics
        (torch.Size([4, 6]), ('deletion',))
        >>> len(result.differences("deletion", to="random"))
        3
    """

    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    images: Tensor
    titles: tuple[str, ...]
    note: str = ""
    captions: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(repr(row.name) for row in self.rows)
        raise MissingNameError(
            f"{name!r} is not one of {names}: pass one of them, or take comparison.rows for all"
        )

    def __str__(self) -> str:
        return str(self.table())

    def _repr_markdown_(self) -> str:
        """Return the table as Markdown, which notebooks show."""
        return str(self.table("markdown"))

    def table(
        self, form: Literal["text", "markdown", "pandas"] = "text", parts: bool = False
    ) -> Any:
        """Return the table: one row per method, with mean ± standard error of each metric.

        If a score could not be computed for all images, the cell also has the number of scores.
        Lines below the table say which differences are within noise, and what failed.

        Args:
            form: "text", "markdown", or "pandas" for a ``DataFrame`` with separate columns for
                mean, standard error and number of scores.
            parts: True to show the parts of each result as well, such as positive APC or SSIM.

        Raises:
            InputError: The form is not known.
            ImportError: pandas is not installed.
        """
        if form == "pandas":
            return self._frame(parts)
        check_choice("form", form, ("text", "markdown", "pandas"))
        chosen = columns(self.rows, self.metrics, parts)
        header = ["method", *(column.heading for column in chosen)]
        cells = [[row.name, *map(row.cell, chosen)] for row in self.rows]
        if form == "markdown":
            lines = [header, ["---"] * len(header), *cells]
            escaped = (
                [" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines
            )
            drawn = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
        else:
            drawn = report.table(header, cells)
        notes = self._notes()
        joint = "\n\n" if form == "markdown" else "\n"  # Markdown joins lines to a paragraph
        return f"{drawn}\n\n{joint.join(notes)}" if notes else drawn

    def differences(
        self, metric: str | None = None, to: str | None = None
    ) -> tuple[Difference, ...]:
        """Return the paired differences of all rows to one row, with standard errors.

        Both methods saw the same images, so a paired difference varies less than the scores do.

        Args:
            metric: Name of the metric; None for all metrics.
            to: Label of the row that the others are compared with; by default the best method.

        Raises:
            MissingNameError: There is no such row.
            InputError: There is no such metric.
        """
        if metric is not None and metric not in self.metrics:
            raise InputError(
                f"metric={metric!r} was not measured: pass one of {', '.join(self.metrics)}"
            )
        found = []
        for title in self.metrics if metric is None else [metric]:
            methods = [row for row in self.rows if not row.control]
            other = best(methods, title) if to is None else self[to]
            if other is not None and title in other.results:
                rows = (row for row in self.rows if row is not other and title in row.results)
                found += [difference(row, other, title) for row in rows]
        return tuple(found)

    def figure(
        self,
        methods: Sequence[str] | str | None = None,
        images: Sequence[int] | None = None,
        *,
        controls: bool = False,
        across: bool = False,
        **options: Any,
    ) -> Any:
        """Return a figure with one line per image and one column per method.

        By default, each map lies over its image in grey: blue is positive, red is negative, and the
        image is seen where the map is 0. What a positive value says depends on the method. A map
        without values of the option ``sign`` is drawn empty. One colour scale explains the colours
        of all maps.

        Args:
            methods: Names of the rows to show, or one name; by default the methods that have maps.
            images: Indices of the images to show; by default the first eight images.
            controls: True to show also the controls, if ``methods`` is None.
            across: True for one column per image and one line per method.
            **options: Options of Captum's ``visualize_image_attr``, which draws the maps for
                another ``method=`` than "overlay", such as "heat_map", "blended_heat_map" or
                "masked_image". ``sign`` ("all", "positive", "negative" or "absolute_value") and
                ``cmap`` are for all; "masked_image" and "alpha_scaling" need another ``sign`` than
                "all". With ``show_colorbar=True`` Captum draws one scale per map.

        Returns:
            A ``matplotlib.figure.Figure``. Notebooks show it; its ``savefig`` writes a file.

        Raises:
            ImportError: matplotlib is not installed.
            InputError: The inputs are not images, or ``method`` or ``sign`` is not known, or they
                do not go together.
        """
        _require_matplotlib("a figure")
        from captum_mipin.comparison.figure import draw

        rows = [row for row in self.rows if row.maps is not None and (controls or not row.control)]
        names = [methods] if isinstance(methods, str) else methods
        rows = rows if names is None else [self[name] for name in names]
        numbers = range(min(8, len(self.images))) if images is None else images
        captions = self.captions or self.titles
        return draw(rows, self.images, captions, numbers, options, across=across)

    def save_html(
        self,
        path: str | PathLike[str],
        title: str = "Attributions side by side",
        images: Sequence[int] | None = None,
        parts: bool = False,
        *,
        controls: bool = False,
    ) -> None:
        """Write an HTML page, one file with a sortable table and the maps over the images.

        Args:
            path: Path of the file to write.
            title: Heading of the page.
            images: Indices of the images to show, by default the first 24. The scores in the table
                are those of all images.
            parts: True to show the parts of each result as well.
            controls: True to show also the maps of controls, which have rows in the table anyway.

        Raises:
            ImportError: matplotlib is not installed.
            InputError: The inputs are not images.
        """
        _require_matplotlib("a page with maps")
        from captum_mipin.comparison import page

        results = (result for row in self.rows for result in row.results.values())
        page.write(
            path,
            self.rows,
            columns(self.rows, self.metrics, parts),
            images=self.images,
            titles=self.captions or self.titles,
            numbers=range(min(24, len(self.images))) if images is None else images,
            title=title,
            controls=controls,
            notes=[*self._notes(), *(str(result).splitlines()[0] for result in results)],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison without images and maps, as values that JSON supports."""
        return {
            "images": len(self.images),
            "titles": list(self.titles),
            "metrics": list(self.metrics),
            "note": self.note,
            "rows": [row.to_dict() for row in self.rows],
            "differences": [
                {
                    "metric": one.metric,
                    "method": one.name,
                    "to": one.other,
                    "within noise": one.within_noise,
                    **{key: value for key, value in one.result.to_dict().items() if key in _SHOWN},
                }
                for one in self.differences()
            ],
        }

    def _notes(self) -> list[str]:
        """Return lines: images used, layers, what differs by more than noise, and errors with rows.

        An error is told once, with the names of all rows that have it.
        """
        rows: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            failures = {metric or "failed": why for metric, why in row.errors.items()}
            for why, images in row.missing.items():
                failures[f"no map for {', '.join(map(self._image, images))}"] = why
            for failure in failures.items():
                rows.setdefault(failure, []).append(row.name)
        told = [row for row in self.rows if re.search(r"\bat (?!the input)", row.place)]
        layers = "; ".join(f"{row.name}: {row.place}" for row in told)
        return [
            *([self.note] if self.note else []),
            *([f"maps of layers: {layers}"] if layers else []),
            *(line for metric in self.metrics for line in sentences(self.rows, metric)),
            *(f"{what} ({', '.join(names)}): {why}" for (what, why), names in rows.items()),
        ]

    def _image(self, index: int) -> str:
        title = self.titles[index]
        return f"image {index + 1}" + (f" ({title})" if title else "")

    def _frame(self, parts: bool) -> Any:
        """Return the table as a ``DataFrame``."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "pandas is not installed; form='pandas' needs pandas: pip install pandas"
            ) from error
        lines = []
        for row in self.rows:
            line: dict[str, Any] = {"control": row.control}
            for column in columns(self.rows, self.metrics, parts):
                result, name = row.result(column), column.name
                line[name] = None if result is None else result.mean
                line[f"{name}, standard error"] = None if result is None else result.standard_error
                line[f"{name}, n"] = 0 if result is None else result.n
            lines.append({**line, "error": row.error})
        return pandas.DataFrame(lines, index=[row.name for row in self.rows])


def _require_matplotlib(purpose: str) -> None:
    """Raise ImportError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ImportError(
            f"matplotlib is not installed; {purpose} needs matplotlib: pip install matplotlib"
        )
