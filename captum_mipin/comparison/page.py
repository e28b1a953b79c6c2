"""The HTML page of a comparison: one file with a sortable table and the maps over the images.

This module needs matplotlib for colours, and Pillow, which matplotlib installs. Both are optional
packages; the module is imported only when a page or figure is made.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib import resources
from math import isfinite
from os import PathLike
from pathlib import Path
from string import Template

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from PIL import Image
from torch import Tensor

from captum_mipin.comparison.rows import Column, Row
from captum_mipin.errors import InputError

#: Number of colours on each side of 0; a small number makes small files.
_LEVELS = 30
#: What the colours of maps mean, in HTML.
LEGEND = "Blue is positive, red is negative, and 0 has no colour; each map has a scale of its own."
#: Images whose sides are all shorter than this number of pixels are enlarged without smoothing.
SMALL = 64


def _overlay() -> ListedColormap:
    """Return colours of values from -1 to 1 to lay over an image.

    Blue is positive, red is negative; the smaller a value is, the more of the image is seen.
    """
    values = np.linspace(-1, 1, 2 * _LEVELS + 1)
    # from the middle of each half of RdBu to its end: pale colours would hide the image as fog
    strong = np.sign(values) * (0.5 + 0.5 * np.abs(values))
    colours = colormaps["RdBu"]((strong + 1) / 2)
    colours[:, 3] = 0.9 * np.abs(values)
    return ListedColormap(colours, "overlay")


#: The colours of maps over images, in figures and pages.
OVERLAY = _overlay()


def pictures(images: Tensor) -> Tensor:
    """Return images as colours (images, height, width, 3), uint8.

    Args:
        images: Tensor (images, channels, height, width); an image with values outside [0, 1] is
            scaled to [0, 1].

    Raises:
        InputError: The tensor does not have four dimensions.
    """
    if images.ndim != 4:
        raise InputError(
            f"inputs have shape {tuple(images.shape)}, but pictures need images (images, channels, "
            "height, width): for other inputs use the table, and draw_signal, draw_tokens, "
            "draw_row or draw_volume of captum_mipin.comparison.drawing"
        )
    x = images.detach().cpu().float().nan_to_num()
    # only 1 or 3 channels are colours: otherwise show the mean of the channels
    x = x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    # normalised images: x -> (x - min) / (max - min), with min and max per image
    outside = (low < 0) | (high > 1)
    x = torch.where(outside, (x - low) / (high - low).clamp(min=1e-12), x)
    return (255 * x).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def strength(heat: Tensor, outliers: float = 2.0) -> Tensor:
    """Return a map scaled to [-1, 1] as in Captum's pictures.

    Args:
        heat: The map, of any shape.
        outliers: Share, in percent of the sum of absolute values, of the largest values; they are
            clipped to 1 or -1. A map of zeros does not change.
    """
    # scale = the smallest v with Σ_{|a| ≤ v} |a| ≥ (1 - outliers / 100) Σ |a|
    ordered = heat.abs().flatten().double().sort().values
    total = ordered.cumsum(0)
    top = ordered[total >= total[-1] * (1 - outliers / 100)][0]
    return (heat.double() / top.where(top > 0, 1.0)).clamp(-1, 1)


def painted(heat: Tensor) -> Tensor:
    """Return colours and opacity (height, width, 4), uint8, of a map (height, width).

    Blue is positive, red is negative, and 0 is transparent.
    """
    # levels 0 ... 60; level 30 is the value 0
    level = (strength(heat) * _LEVELS).round().long() + _LEVELS
    return torch.from_numpy((255 * OVERLAY(level.numpy())).round()).to(torch.uint8)


def png(pixels: Tensor) -> str:
    """Return a picture (height, width, 3 or 4), uint8, as a data URL that contains it as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write(
    path: str | PathLike[str],
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    images: Tensor,
    titles: Sequence[str],
    numbers: Sequence[int],
    title: str,
    notes: Sequence[str],
    controls: bool = False,
) -> None:
    """Write the HTML page.

    Args:
        path: Path of the file to write.
        rows: Rows of the table, one per method.
        columns: Columns of the table, one per metric or part.
        images: All images (images, channels, height, width).
        titles: Titles of all images.
        numbers: Indices of the images to show.
        title: Heading of the page.
        notes: Texts below the maps: settings of the results, and errors.
        controls: True to show also the maps of controls.
    """
    colours = pictures(images[list(numbers)])
    shown = [row for row in rows if row.maps is not None and (controls or not row.control)]
    styles = (f".i{i}{{background-image:url({png(image)})}}" for i, image in enumerate(colours))
    template = resources.files("captum_mipin.comparison").joinpath("page.html").read_text("utf-8")
    text = Template(template).substitute(
        title=escape(title),
        images=len(images),
        legend=LEGEND,
        pictures="\n".join(styles),
        table=_table(rows, columns),
        small="pixel" if max(colours.shape[1:3]) < SMALL else "",
        grid=_grid(shown, images, titles, numbers),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in notes),
    )
    Path(path).write_text(text, encoding="utf-8")


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return the table of scores as HTML."""
    heads = [_head("method", "ascending")]
    best = []
    for column in columns:
        first = "descending" if column.better == "higher" else "ascending"
        heads.append(_head(column.heading, first))
        # only methods can be marked as best, not controls
        scores = [_score(row, column) for row in rows if not row.control]
        known = [score for score in scores if isfinite(score)]
        pick = {"higher": max, "lower": min}.get(column.better)
        best.append(pick(known) if known and pick else None)
    lines = []
    for row in rows:
        note = f'<span class="error">{escape(row.error)}</span>' if row.error else ""
        name = escape(row.name)
        line = f'<th scope="row" data-value="{name}">{name}{note}</th>'
        for column, top in zip(columns, best, strict=True):
            score = _score(row, column)
            # an empty value is sorted last in both directions
            value = score if isfinite(score) else ""
            mark = ' class="best"' if value == top and not row.control else ""
            line += f'<td data-value="{value}"{mark}>{escape(row.cell(column))}</td>'
        kind = ' class="control"' if row.control else ""
        lines.append(f"<tr{kind}>{line}</tr>")
    return _body("".join(heads), lines)


def _head(text: str, first: str) -> str:
    """Return the heading of a sortable column as HTML.

    Args:
        text: The heading.
        first: Direction of the first click, "ascending" or "descending".
    """
    button = f'<button type="button" data-first="{first}">{escape(text)}</button>'
    return f'<th scope="col" aria-sort="none">{button}</th>'


def _score(row: Row, column: Column) -> float:
    """Return the mean score of a row in a column; NaN if there is no result."""
    result = row.result(column)
    return float("nan") if result is None else result.mean


def _grid(
    rows: Sequence[Row], images: Tensor, titles: Sequence[str], numbers: Sequence[int]
) -> str:
    """Return the maps over the images as HTML; the arguments are those of :func:`write`."""
    captions = (escape(row.caption).replace("\n", "<br>") for row in rows)
    heads = "".join(f'<th scope="col">{caption}</th>' for caption in captions)
    height, width = images.shape[2:]
    lines = []
    for place, number in enumerate(numbers):
        title = titles[number]
        target = f", target {title}" if title else ""
        name = escape(f"image {place + 1}{target}".replace("\n", ", "))
        shape = f'i{place}" style="aspect-ratio:{width}/{height}"'
        label = f'<div class="frame {shape} role="img" aria-label="{name}"></div>'
        label += escape(title).replace("\n", "<br>")
        line = f'<th scope="row">{label}</th>'
        for row in rows:
            heat = row.heat(number, images)
            caption = escape(" ".join(row.caption.split()))
            inside = (
                f'<img alt="{caption} on {name}" src="{png(painted(heat))}">'
                if isinstance(heat, Tensor)
                else f"<span>{escape(heat)}</span>"
            )
            line += f'<td><div class="frame map {shape}>{inside}</div></td>'
        lines.append(f"<tr>{line}</tr>")
    return _body(f'<th scope="col">image</th>{heads}', lines)


def _body(heads: str, lines: Sequence[str]) -> str:
    rows = "\n".join(lines)
    return f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
