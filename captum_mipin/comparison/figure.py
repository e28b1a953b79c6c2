"""The figure of a comparison.

This module needs matplotlib, an optional package; it is imported only when a figure is drawn.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from captum.attr import visualization
from matplotlib import figure
from torch import Tensor

from captum_mipin.comparison.page import pictures
from captum_mipin.comparison.rows import ALL_ZERO, Row
from captum_mipin.errors import InputError

#: Option ``sign`` -> labels of the colour scale, from its lower to its upper end.
_ENDS = {
    "all": ("against", "0", "for"),
    "positive": ("0", "for"),
    "negative": ("0", "against"),
    "absolute_value": ("0", "for or against"),
}
#: Option ``sign`` -> function that returns the part of a map with this sign.
_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda heat: heat,
    "positive": lambda heat: heat.clamp(min=0),
    "negative": lambda heat: heat.clamp(max=0),
    "absolute_value": torch.abs,
}


class Figure(figure.Figure):
    """A matplotlib figure that notebooks show, although it was not made by pyplot."""

    def _repr_png_(self) -> bytes:
        """Return the figure as PNG, which notebooks show."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def draw(
    rows: Sequence[Row], images: Tensor, titles: Sequence[str], numbers: Sequence[int], options: Any
) -> Figure:
    """Return a figure with one line per image and one column per method.

    Args:
        rows: Rows of the methods to show.
        images: All images (images, channels, height, width).
        titles: Titles of all images.
        numbers: Indices of the images to show.
        options: Options of Captum's ``visualize_image_attr``.

    Raises:
        InputError: The option ``sign`` is not known.
    """
    colours = pictures(images).numpy()
    size = 1.4 * (len(rows) + 1), 1.5 * len(numbers) + 0.4
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(len(numbers), len(rows) + 1, squeeze=False)
    defaults = {"method": "heat_map", "sign": "all", "cmap": "RdBu"}
    settings = {**defaults, **options, "use_pyplot": False}
    if settings["sign"] not in _ENDS:
        known = ", ".join(map(repr, _ENDS))
        raise InputError(f"sign={settings['sign']!r} is not known: pass one of {known}")
    for line, number in zip(axes, numbers, strict=True):
        line[0].imshow(colours[number])
        line[0].set_ylabel(titles[number], fontsize=8)
        for axis, row in zip(line[1:], rows, strict=True):
            heat = row.heat(number, images)
            if isinstance(heat, str):
                axis.text(0.5, 0.5, heat, ha="center", va="center", transform=axis.transAxes)
            if heat == ALL_ZERO:
                heat = torch.zeros(colours.shape[1:3], dtype=torch.float64)
            if not isinstance(heat, str):
                _draw_map(drawn, axis, heat, colours[number], settings)
        for axis in line:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ["image", *(row.name for row in rows)], strict=True):
        axis.set_title(title, fontsize=8)
    if not settings.get("show_colorbar"):
        _add_legend(drawn, axes, settings["sign"])
    return drawn


def _draw_map(drawn: Figure, axis: Any, heat: Tensor, image: Any, settings: Any) -> None:
    """Draw the part of a map that has the sign of the option ``sign``.

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


def _add_legend(drawn: Figure, axes: Any, sign: str) -> None:
    """Add one colour scale for all maps; do nothing if no map is drawn in colours."""
    # the last picture on an axis is the map, or the image if there is no map
    last = (image for axis in axes.flat for image in axis.images[-1:])
    coloured = next((image for image in last if image.get_array().ndim == 2), None)
    if coloured is not None:
        bar = drawn.colorbar(coloured, ax=axes, location="bottom", shrink=0.4, aspect=30)
        # the scale of maps of one sign begins at 0; other scales are symmetric about 0
        low, high = coloured.get_clim()
        bar.set_ticks([low, 0, high] if low else [low, high], labels=_ENDS[sign])
        bar.ax.tick_params(labelsize=8, length=0)
