"""The figure of a comparison.

This module needs matplotlib, an optional package; it is imported only when a figure is drawn.
"""

import io
import textwrap
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from captum.attr import visualization
from matplotlib import figure
from torch import Tensor

from captum_mipin.calls import unknown_argument
from captum_mipin.comparison.page import OVERLAY, SMALL, pictures, strength
from captum_mipin.comparison.rows import ALL_ZERO, Row
from captum_mipin.errors import InputError
from captum_mipin.options import check_choice

#: Option ``sign`` -> labels of the colour scale, from its lower to its upper end.
_ENDS = {
    "all": ("negative", "0", "positive"),
    "positive": ("0", "positive"),
    "negative": ("0", "negative"),
    "absolute_value": ("0", "positive or negative"),
}
#: Option ``sign`` -> function that returns the part of a map with this sign.
_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda heat: heat,
    "positive": lambda heat: heat.clamp(min=0),
    "negative": lambda heat: heat.clamp(max=0),
    "absolute_value": torch.abs,
}
#: Method of this package, beside those of ``visualize_image_attr``.
_OVERLAY = "overlay"
#: Methods of ``visualize_image_attr`` that draw values of one sign only.
_OF_ONE_SIGN = "masked_image", "alpha_scaling"
#: Width of a picture in inches, and letters of a title that fit above it.
_INCHES, _LETTERS = 1.5, 20
#: Height of a legend in inches, and width of a figure in which no word of it is cut off.
LEGEND_INCHES, LEGEND_WIDTH = 0.55, 3.0


class Figure(figure.Figure):
    """A matplotlib figure that notebooks show, and of which no title is cut off in a file."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """Write the figure, with ``bbox_inches="tight"`` by default."""
        super().savefig(fname, **{"bbox_inches": "tight", "pad_inches": 0.06, **options})

    def _repr_png_(self) -> bytes:
        """Return the figure as PNG, which notebooks show."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def draw(
    rows: Sequence[Row],
    images: Tensor,
    titles: Sequence[str],
    numbers: Sequence[int],
    options: Any,
    *,
    across: bool = False,
) -> Figure:
    """Return a figure with one line per image and one column per method.

    Args:
        rows: Rows of the methods to show.
        images: All images (images, channels, height, width).
        titles: Titles of all images.
        numbers: Indices of the images to show.
        options: Options of Captum's ``visualize_image_attr``; ``method="overlay"``, the default, is
            of this package.
        across: True for one column per image and one line per method.

    Raises:
        InputError: The option ``method`` or ``sign`` is not known, or they do not go together.
    """
    settings = _settings(options)
    colours = pictures(images).numpy()
    shape = len(numbers), len(rows) + 1
    shape = shape[::-1] if across else shape
    height, width = colours.shape[1:3]
    tall = _INCHES * min(max(height / width, 0.4), 2.5)
    # each line of pictures has room for a title below it, and the figure for its legend
    below = 0.2 + 0.13 * max((_wrapped(titles[n]).count("\n") + 1 for n in numbers), default=1)
    size = (_INCHES + 0.1) * shape[1], (tall + (0.05 if across else below)) * shape[0] + 0.35
    drawn = Figure(figsize=(size[0], size[1] + LEGEND_INCHES), layout="compressed")
    grid = drawn.subplots(*shape, squeeze=False)
    axes = grid.T if across else grid
    for line, number in zip(axes, numbers, strict=True):
        line[0].imshow(colours[number], interpolation=_interpolation(colours))
        # names of images stand at the images: below them, or above the columns
        label = line[0].set_title if across else line[0].set_xlabel
        label(_wrapped(titles[number]), fontsize=8)
        for axis, row in zip(line[1:], rows, strict=True):
            _draw_cell(drawn, axis, row.heat(number, images), colours[number], settings)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    names = "image", *(f"{row.caption}{_enlarged(row, images)}" for row in rows)
    for axis, name in zip(axes[0], names, strict=True):
        label = axis.set_ylabel if across else axis.set_title
        label(_wrapped(name), fontsize=8)
    if settings["method"] == _OVERLAY or not settings.get("show_colorbar"):
        # the last picture on an axis is the map, or the image if there is no map
        last = [image for axis in grid.flat for image in axis.images[-1:]]
        maps = [image for image in last if image.get_array().ndim == 2]
        add_legend(drawn, grid, maps, sign=settings["sign"])
    return drawn


def _settings(options: Any) -> dict[str, Any]:
    """Return all options of the drawing; raise InputError if one is not known or does not fit."""
    settings = {"method": _OVERLAY, "sign": "all", "cmap": "RdBu", **options, "use_pyplot": False}
    names = [*signature(visualization.visualize_image_attr).parameters][2:]
    for name in settings:
        if name not in names:
            raise unknown_argument("Comparison.figure", name, names)
    method, sign = settings["method"], settings["sign"]
    check_choice("method", method, (_OVERLAY, *visualization.ImageVisualizationMethod.__members__))
    check_choice("sign", sign, tuple(_ENDS))
    if method in _OF_ONE_SIGN and sign == "all":
        signs = [repr(other) for other in _ENDS if other != "all"]
        raise InputError(
            f"method={method!r} has sign='all', but it draws values of one sign only: pass "
            f"sign={', '.join(signs[:-1])} or {signs[-1]}"
        )
    return settings


def _wrapped(title: str) -> str:
    """Return a title in lines that are as wide as a picture."""
    return "\n".join(textwrap.fill(line, _LETTERS) for line in title.splitlines())


def _enlarged(row: Row, images: Tensor) -> str:
    """Return a line with the size of maps that were enlarged to the images, or no text."""
    maps = row.maps
    if maps is None or maps.ndim < 3 or maps.shape[-2:] == images.shape[-2:]:
        return ""
    return "\n{} × {} enlarged".format(*maps.shape[-2:])


def _interpolation(colours: Any) -> str:
    """Return the interpolation of matplotlib: small images keep their pixels."""
    return "nearest" if max(colours.shape[-3:-1]) < SMALL else "antialiased"


def _draw_cell(
    drawn: Figure, axis: Any, heat: Tensor | str, image: Any, settings: dict[str, Any]
) -> None:
    """Draw one map over its image, or the text that replaces the map.

    Args:
        drawn: The figure.
        axis: The axis to draw on.
        heat: The map (height, width), or a text such as "failed".
        image: The image (height, width, 3), uint8.
        settings: Options of Captum's ``visualize_image_attr``.
    """
    if isinstance(heat, str):
        place = {"ha": "center", "va": "center", "fontsize": 8, "transform": axis.transAxes}
        axis.text(0.5, 0.5, _wrapped(heat), **place)
        if heat != ALL_ZERO:
            return
        heat = torch.zeros(image.shape[:2], dtype=torch.float64)
    if settings["method"] == _OVERLAY:
        _draw_overlay(axis, _PARTS[settings["sign"]](heat), image, settings)
    else:
        _draw_map(drawn, axis, heat, image, settings)


def _draw_overlay(axis: Any, part: Tensor, image: Any, settings: dict[str, Any]) -> None:
    """Draw a map over its image in grey: the larger a value is, the less of the image is seen."""
    # luminance of ITU-R BT.601; lighter than the image, so that dark colours can be seen on it
    grey = 0.3 + 0.65 * (image @ np.array([0.299, 0.587, 0.114])) / 255
    shown = _interpolation(image)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation=shown)
    scale = strength(part).numpy()
    if settings["cmap"] == "RdBu":
        axis.imshow(scale, cmap=OVERLAY, vmin=-1, vmax=1, interpolation=shown)
    else:  # as Captum does: maps of one sign have colours from 0 to 1
        values = scale if settings["sign"] == "all" else np.abs(scale)
        options: dict[str, Any] = {"vmin": -1 if settings["sign"] == "all" else 0, "vmax": 1}
        options |= {"alpha": 0.9 * np.abs(scale), "interpolation": shown}
        axis.imshow(values, cmap=settings["cmap"], **options)


def _draw_map(drawn: Figure, axis: Any, heat: Tensor, image: Any, settings: Any) -> None:
    """Draw the part of a map that has the sign of the option ``sign``, as Captum does.

    If the map has no values of this sign, an empty map is drawn.

    Args:
        drawn: The figure.
        axis: The axis to draw on.
        heat: The map (height, width).
        image: The image (height, width, 3), uint8.
        settings: Options of Captum's ``visualize_image_attr``.
    """
    part = _PARTS[settings["sign"]](heat)
    largest = part.abs().max()
    # Captum divides by a high percentile of the values of this sign: it fails if this is 0, and
    # warns below 1e-5. Hence values are scaled to maximum 1, and an empty map is drawn as ones.
    stand_in = torch.full_like(part, -1.0 if settings["sign"] == "negative" else 1.0)
    values = part / largest if largest > 0 else stand_in
    visualization.visualize_image_attr(
        values.unsqueeze(2).numpy(), image, plt_fig_axis=(drawn, axis), **settings
    )
    if not largest > 0 and settings["method"] != "original_image":
        # the last picture on the axis is the map: replace its ones by 0, the colour of no heat
        picture = axis.images[-1]
        picture.set_data(np.zeros_like(picture.get_array()))


def add_legend(drawn: Figure, axes: Any, maps: Sequence[Any], *, sign: str = "all") -> None:
    """Add one colour scale for all maps; do nothing if no map is drawn in colours.

    Args:
        drawn: The figure; its legend takes ``LEGEND_INCHES`` of its height.
        axes: The axis or axes to draw the scale below.
        maps: The maps as matplotlib has them, with values and a colour map.
        sign: The option ``sign`` of the maps.
    """
    if not maps:
        return
    # the distance is a share of the height: 0.1 inches, also below many images
    pad = 0.1 / drawn.get_figheight()
    bar = drawn.colorbar(maps[0], ax=axes, location="bottom", shrink=0.4, aspect=30, pad=pad)
    if maps[0].get_cmap() is OVERLAY:  # a symmetric scale: show the part that occurs in the maps
        values = [image.get_array() for image in maps]
        signs = {int(np.sign(v)) for array in values for v in (array.min(), array.max())}
        words = {-1: "negative", 0: "0", 1: _ENDS[sign][-1] if sign != "negative" else "positive"}
        ticks = {end: words[end] for end in sorted(signs | {0})}
        ticks = ticks if len(ticks) > 1 else {0: "0", 1: words[1]}
        bar.ax.set_xlim(min(ticks), max(ticks))
    else:  # the scale of maps of one sign begins at 0; the scale of all maps is symmetric about 0
        low, high = maps[0].get_clim()
        ticks = dict(zip([low, 0, high] if low else [low, high], _ENDS[sign], strict=True))
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.tick_params(labelsize=8, length=0)
    bar.set_label("value of the map, as a share of its own largest", fontsize=8)
