"""One HTML page that needs no other file: a table that sorts, and maps over images.

Imported where a page or figure is made: matplotlib, whose colours it takes and which brings Pillow,
is optional.
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

import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from captum_mipin.comparison.rows import Column, Row
from captum_mipin.errors import InputError

#: Colour levels on each side of 0: few levels make small pictures.
_LEVELS = 30
#: Images with fewer pixels along a side are drawn with square pixels.
_SMALL = 64


def pictures(images: Tensor) -> Tensor:
    """Return images as colours (images, height, width, 3), uint8.

    Args:
        images: (images, channels, height, width); images with values outside [0, 1] are scaled.

    Raises:
        InputError: The inputs are no images.
    """
    if images.ndim != 4:
        raise InputError(
            "pictures need images (images, channels, height, width), found inputs of shape "
            f"{tuple(images.shape)}"
        )
    x = images.detach().cpu().float().nan_to_num()
    # other numbers of channels have no colours: their mean is shown
    x = x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    # normalised images: x -> (x - min) / (max - min), each image for itself
    outside = (low < 0) | (high > 1)
    x = torch.where(outside, (x - low) / (high - low).clamp(min=1e-12), x)
    return (255 * x).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def strength(heat: Tensor, outliers: float = 2.0) -> Tensor:
    """Return a map scaled to [-1, 1] as in Captum's pictures.

    The value reached at all but ``outliers`` percent of the sum of absolute values becomes 1. A map
    of zeros stays as it is.
    """
    # the smallest value v with Σ_{|a| ≤ v} |a| ≥ 98 % of Σ |a|
    ordered = heat.abs().flatten().double().sort().values
    total = ordered.cumsum(0)
    top = ordered[total >= total[-1] * (1 - outliers / 100)][0]
    return (heat.double() / top.where(top > 0, 1.0)).clamp(-1, 1)


def painted(heat: Tensor) -> Tensor:
    """Return a map (height, width) in colours (height, width, 3), uint8: red, white, blue."""
    # levels 0 ... 60, 30 is neither for nor against the target
    level = (strength(heat) * _LEVELS).round().long() + _LEVELS
    rgba = colormaps["RdBu"].resampled(2 * _LEVELS + 1)(level.numpy())
    return torch.from_numpy((255 * rgba[..., :3]).round()).to(torch.uint8)


def png(pixels: Tensor) -> str:
    """Return colours (height, width, 3), uint8, as the address of a PNG picture."""
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
) -> None:
    """Write the page.

    Args:
        path: The file.
        rows: Methods.
        columns: Metrics.
        images: All images (images, channels, height, width).
        titles: One for each of all images.
        numbers: Of the images to show.
        title: Heading of the page.
        notes: What the figures depend on, and what failed.
    """
    colours = pictures(images[list(numbers)])
    styles = (f".i{i}{{background-image:url({png(image)})}}" for i, image in enumerate(colours))
    template = resources.files("captum_mipin.comparison").joinpath("page.html").read_text("utf-8")
    text = Template(template).substitute(
        title=escape(title),
        images=len(images),
        pictures="\n".join(styles),
        table=_table(rows, columns),
        small="pixel" if max(colours.shape[1:3]) < _SMALL else "",
        grid=_grid([row for row in rows if row.maps is not None], images, titles, numbers),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in notes),
    )
    Path(path).write_text(text, encoding="utf-8")


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return the table of scores in HTML."""
    heads = [_head("method", "ascending")]
    best = []
    for column in columns:
        first = "descending" if column.better == "higher" else "ascending"
        heads.append(_head(column.heading, first))
        # controls cannot be the best method
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
            # an empty value sorts last, whatever the direction
            value = score if isfinite(score) else ""
            mark = ' class="best"' if value == top and not row.control else ""
            line += f'<td data-value="{value}"{mark}>{escape(row.cell(column))}</td>'
        kind = ' class="control"' if row.control else ""
        lines.append(f"<tr{kind}>{line}</tr>")
    return _body("".join(heads), lines)


def _head(text: str, first: str) -> str:
    """Return the head of a column that sorts, ``first`` in this direction."""
    button = f'<button type="button" data-first="{first}">{escape(text)}</button>'
    return f'<th scope="col" aria-sort="none">{button}</th>'


def _score(row: Row, column: Column) -> float:
    """Return the mean of a result; NaN if there is none."""
    result = row.result(column)
    return float("nan") if result is None else result.mean


def _grid(
    rows: Sequence[Row], images: Tensor, titles: Sequence[str], numbers: Sequence[int]
) -> str:
    """Return the maps over the images in HTML; arguments as for :func:`write`."""
    heads = "".join(f'<th scope="col">{escape(row.name)}</th>' for row in rows)
    height, width = images.shape[2:]
    lines = []
    for place, number in enumerate(numbers):
        title = titles[number]
        name = escape(f"image {place + 1}" + (f", target {title}" if title else ""))
        frame = f'<div class="frame i{place}" style="aspect-ratio:{width}/{height}"'
        label = f'{frame} role="img" aria-label="{name}"></div>{escape(title)}'
        line = f'<th scope="row">{label}</th>'
        for row in rows:
            heat = row.heat(number, images)
            inside = (
                f'<img alt="{escape(row.name)} on {name}" src="{png(painted(heat))}">'
                if isinstance(heat, Tensor)
                else f"<span>{escape(heat)}</span>"
            )
            line += f"<td>{frame}>{inside}</div></td>"
        lines.append(f"<tr>{line}</tr>")
    return _body(f'<th scope="col">image</th>{heads}', lines)


def _body(heads: str, lines: Sequence[str]) -> str:
    rows = "\n".join(lines)
    return f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
