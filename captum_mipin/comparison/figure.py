"""The figure of a comparison. Imported where one is drawn: matplotlib is optional."""

import io
from collections.abc import Sequence
from typing import Any

from captum.attr import visualization
from matplotlib import figure
from torch import Tensor

from captum_mipin.comparison.page import pictures
from captum_mipin.comparison.rows import Row

#: What the ends of a scale of colours mean, by the sign of what is drawn.
_ENDS = {
    "all": ("against", "0", "for"),
    "positive": ("0", "for"),
    "negative": ("0", "against"),
    "absolute_value": ("0", "for or against"),
}


class Figure(figure.Figure):
    """A matplotlib figure that shows itself in notebooks, although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        """Return the picture that notebooks show."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def draw(
    rows: Sequence[Row], images: Tensor, titles: Sequence[str], numbers: Sequence[int], options: Any
) -> Figure:
    """Return a figure of images x methods.

    Args:
        rows: Methods to show.
        images: All images (images, channels, height, width).
        titles: One for each of all images.
        numbers: Of the images to show.
        options: Of ``visualize_image_attr``.
    """
    colours = pictures(images).numpy()
    size = 1.4 * (len(rows) + 1), 1.5 * len(numbers) + 0.4
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(len(numbers), len(rows) + 1, squeeze=False)
    defaults = {"method": "heat_map", "sign": "all", "cmap": "RdBu"}
    settings = {**defaults, **options, "use_pyplot": False}
    for line, number in zip(axes, numbers, strict=True):
        line[0].imshow(colours[number])
        line[0].set_ylabel(titles[number], fontsize=8)
        for axis, row in zip(line[1:], rows, strict=True):
            heat = row.heat(number, images)
            if isinstance(heat, str):
                axis.text(0.5, 0.5, heat, ha="center", va="center", transform=axis.transAxes)
            else:
                visualization.visualize_image_attr(
                    heat.unsqueeze(2).numpy(),
                    colours[number],
                    plt_fig_axis=(drawn, axis),
                    **settings,
                )
        for axis in line:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], ["image", *(row.name for row in rows)], strict=True):
        axis.set_title(title, fontsize=8)
    if not settings.get("show_colorbar"):
        _add_legend(drawn, axes, settings["sign"])
    return drawn


def _add_legend(drawn: Figure, axes: Any, sign: str) -> None:
    """Add one key to the colours of all maps; none if they are shades of the image."""
    # each axis has the image below and the map, if there is one, on top
    last = (image for axis in axes.flat for image in axis.images[-1:])
    coloured = next((image for image in last if image.get_array().ndim == 2), None)
    if coloured is not None:
        bar = drawn.colorbar(coloured, ax=axes, location="bottom", shrink=0.4, aspect=30)
        # maps of one sign start at 0, others are symmetric about 0
        low, high = coloured.get_clim()
        bar.set_ticks([low, 0, high] if low else [low, high], labels=_ENDS[sign])
        bar.ax.tick_params(labelsize=8, length=0)
