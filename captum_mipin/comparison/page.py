"""One HTML page that needs nothing else: a table that sorts, and maps over images."""

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from math import isfinite
from os import PathLike
from pathlib import Path
from string import Template

import torch
from torch import Tensor

from captum_mipin.errors import InputError

#: From against the target over neither to for it: the colours of matplotlib's "RdBu".
COLOURS = (
    (103, 0, 31), (178, 24, 43), (214, 96, 77), (244, 165, 130), (253, 219, 199), (247, 247, 247),
    (209, 229, 240), (146, 197, 222), (67, 147, 195), (33, 102, 172), (5, 48, 97),
)  # fmt: skip

#: Images with fewer pixels along a side are drawn with square pixels.
_SMALL = 64


@dataclass(frozen=True)
class Column:
    """A metric: its heading, and whether "higher" or "lower" is better, or "neither"."""

    heading: str
    better: str


@dataclass(frozen=True)
class Line:
    """A method: name, whether it is a control, why it failed if it did, and for each metric what to show and to sort by."""

    name: str
    control: bool
    error: str
    cells: tuple[tuple[str, float | None], ...]


def pictures(images: Tensor) -> Tensor:
    """Images (n, channels, height, width) as colours (n, height, width, 3) in bytes; those outside [0, 1] are scaled to it."""
    if images.ndim != 4:
        raise InputError(
            f"pictures need images (images, channels, height, width), found inputs of shape {tuple(images.shape)}"
        )
    x = images.detach().cpu().float().nan_to_num()
    x = x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)
    low, high = (getattr(x.flatten(1), side)(1).view(-1, 1, 1, 1) for side in ("amin", "amax"))
    outside = (low < 0) | (high > 1)
    x = torch.where(outside, (x - low) / (high - low).clamp(min=1e-12), x)
    return (255 * x).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def strength(heat: Tensor, outliers: float = 2.0) -> Tensor:
    """A map in [-1, 1], scaled as in Captum's pictures: by the value reached at all but ``outliers`` percent of its sum."""
    ordered = heat.abs().flatten().double().sort().values
    total = ordered.cumsum(0)
    top = ordered[total >= total[-1] * (1 - outliers / 100)][0]
    return (heat.double() / top).clamp(-1, 1)


def painted(heat: Tensor) -> Tensor:
    """A map (height, width) in colours (height, width, 3), in bytes."""
    colours = torch.tensor(COLOURS, dtype=torch.float64)
    place = (
        ((strength(heat) * 30).round() / 30 + 1) / 2 * (len(colours) - 1)
    )  # few levels, since they pack better
    low = place.floor().long()
    high = (low + 1).clamp(max=len(colours) - 1)
    return (
        torch.lerp(colours[low], colours[high], place.frac().unsqueeze(2)).round().to(torch.uint8)
    )


def png(pixels: Tensor) -> str:
    """Colours (height, width, 3) in bytes as the address of a PNG picture."""
    height, width, _ = pixels.shape
    lines = torch.cat(
        [torch.zeros(height, 1, dtype=torch.uint8), pixels.reshape(height, -1)], 1
    )  # 0: no filter

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = (
        chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.numpy().tobytes(), 9))
        + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


def write(
    path: str | PathLike[str],
    title: str,
    count: int,
    columns: Sequence[Column],
    lines: Sequence[Line],
    images: Tensor,
    titles: Sequence[str],
    grid: Sequence[tuple[str, Sequence[Tensor | str]]],
    notes: Sequence[str],
) -> None:
    """Write the page.

    Args:
        path: The file.
        title: The heading.
        count: Of the images that the table is of.
        columns, lines: The table.
        images: (images, height, width, 3) in bytes.
        titles: What is written beside each image.
        grid: For each method its name and a map for each image, or why there is none.
        notes: What the figures depend on, and what failed.
    """
    small = "pixel" if max(images.shape[1:3]) < _SMALL else ""
    text = Template(
        resources.files("captum_mipin.comparison").joinpath("page.html").read_text("utf-8")
    ).substitute(
        title=escape(title),
        images=count,
        pictures="\n".join(
            f".i{number}{{background-image:url({png(image)})}}"
            for number, image in enumerate(images)
        ),
        table=_table(columns, lines),
        small=small,
        grid=_grid(titles, grid, images.shape[1:3]),
        notes="\n".join(f"<li>{escape(note)}</li>" for note in notes),
    )
    Path(path).write_text(text, encoding="utf-8")


def _table(columns: Sequence[Column], lines: Sequence[Line]) -> str:
    heads = [
        '<th scope="col" aria-sort="none"><button type="button" data-first="ascending">method</button></th>'
    ]
    for column in columns:
        first = "descending" if column.better == "higher" else "ascending"
        button = f'<button type="button" data-first="{first}">{escape(column.heading)}</button>'
        heads.append(f'<th scope="col" aria-sort="none">{button}</th>')
    best = [
        _best(column.better, [line.cells[index][1] for line in lines if not line.control])
        for index, column in enumerate(columns)
    ]
    rows = []
    for line in lines:
        note = f'<span class="error">{escape(line.error)}</span>' if line.error else ""
        cells = [f'<th scope="row" data-value="{escape(line.name)}">{escape(line.name)}{note}</th>']
        for (shown, value), top in zip(line.cells, best, strict=True):
            known = value is not None and isfinite(value)
            mark = ' class="best"' if known and value == top and not line.control else ""
            cells.append(f'<td data-value="{value if known else ""}"{mark}>{escape(shown)}</td>')
        kind = ' class="control"' if line.control else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return _body("".join(heads), rows)


def _body(heads: str, rows: Sequence[str]) -> str:
    lines = "\n".join(rows)
    return f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>"


def _best(better: str, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and isfinite(value)]
    return (
        None
        if not known or better == "neither"
        else max(known)
        if better == "higher"
        else min(known)
    )


def _grid(
    titles: Sequence[str], grid: Sequence[tuple[str, Sequence[Tensor | str]]], size: Sequence[int]
) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in grid)
    shape = f"aspect-ratio:{size[1]}/{size[0]}"
    rows = []
    for number, title in enumerate(titles):
        name = f"image {number + 1}" + (f", target {title}" if title else "")
        cells = [f'<th scope="row"><div class="frame i{number}" style="{shape}" role="img" aria-label="{escape(name)}"></div>'
                 f"{escape(title)}</th>"]  # fmt: skip
        for method, maps in grid:
            found = maps[number]
            inside = (
                f'<img alt="{escape(method)} on {escape(name)}" src="{png(painted(found))}">'
                if isinstance(found, Tensor)
                else f"<span>{escape(found)}</span>"
            )
            cells.append(f'<td><div class="frame i{number}" style="{shape}">{inside}</div></td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _body(f'<th scope="col">image</th>{heads}', rows)
