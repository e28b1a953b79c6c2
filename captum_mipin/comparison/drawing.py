"""Drawings of attributions that are no images: of tokens, signals, table rows and volumes.

This module needs matplotlib, an optional package. Colours are those of :mod:`page
<captum_mipin.comparison.page>`: blue is positive, red is negative, and each drawing is scaled to
its own largest value; its legend says so.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor

from captum_mipin.comparison.figure import LEGEND_INCHES, LEGEND_WIDTH, Figure, add_legend
from captum_mipin.comparison.page import LEGEND, OVERLAY, painted, strength
from captum_mipin.errors import InputError

__all__ = ["draw_row", "draw_signal", "draw_tokens", "draw_volume", "tokens_html"]


#: Width of a letter of tokens in inches.
_LETTER = 0.08


def tokens_html(tokens: Sequence[str], values: Tensor, *, legend: bool = True) -> str:
    """Return tokens as HTML, each on the colour of its attribution, with a line of legend below.

    Args:
        tokens: The tokens of one text, as they are to be read.
        values: Attributions (tokens,), or (tokens, features), which are summed over features.
        legend: False to leave out the legend, for all but the last of several texts on a page.

    Raises:
        InputError: The numbers of tokens and attributions differ.

    Examples:
        >>> tokens_html(["<b>"], torch.tensor([1.0]), legend=False)
        '<span style="background:rgba(5,48,97,0.90);color:#fff" title="1">&lt;b&gt;</span>'
    """
    heat = _one_value_each(tokens, values, "tokens")
    colours = painted(heat[None])[0].tolist()
    spans = []
    for token, (red, green, blue, alpha), value in zip(tokens, colours, heat.tolist(), strict=True):
        ink = "#fff" if alpha > 128 else "#000"
        style = f"background:rgba({red},{green},{blue},{alpha / 255:.2f});color:{ink}"
        spans.append(f'<span style="{style}" title="{value:.3g}">{escape(token)}</span>')
    return " ".join(spans) + (f"<br><small>{LEGEND}</small>" if legend else "")


def draw_tokens(tokens: Sequence[str], values: Tensor, *, letters: int = 70) -> Figure:
    """Return a figure of a text, each token on the colour of its attribution.

    Args:
        tokens: The tokens of one text, as they are to be read.
        values: Attributions (tokens,), or (tokens, features), which are summed over features.
        letters: Letters in a line, about.

    Raises:
        InputError: The numbers of tokens and attributions differ.

    Examples:
        >>> draw_tokens(["a", "good", "film"], torch.tensor([0.0, 1.0, -0.2])).axes[0].texts[1]
        Text(2, 0, 'good')
    """
    scale = strength(_one_value_each(tokens, values, "tokens"))
    places, column, line = [], 0, 0
    for token in tokens:
        if column and column + len(token) > letters:
            column, line = 0, line + 1
        places.append((column, line))
        column += len(token) + 1
    width, height = max(_LETTER * letters, LEGEND_WIDTH), 0.3 * (line + 1) + 0.2
    drawn = Figure(figsize=(width, height + LEGEND_INCHES), layout="constrained")
    axis = drawn.subplots()
    axis.set(xlim=(0, width / _LETTER), ylim=(line + 0.6, -0.6))
    axis.axis("off")
    for token, (x, y), value in zip(tokens, places, scale.tolist(), strict=True):
        ink = "white" if abs(value) > 0.55 else "black"
        box = {"facecolor": OVERLAY((value + 1) / 2), "edgecolor": "none", "pad": 1.5}
        options: dict[str, Any] = {"family": "monospace", "fontsize": 9, "va": "center"}
        # a dollar sign would begin a formula
        axis.text(x, y, token.replace("$", r"\$"), color=ink, bbox=box, **options)
    coloured = ScalarMappable(Normalize(-1, 1), OVERLAY)
    coloured.set_array(scale.numpy())
    add_legend(drawn, axis, [coloured])
    return drawn


def draw_signal(
    signal: Tensor,
    values: Tensor,
    *,
    names: Sequence[str] | None = None,
    rate: float | None = None,
    unit: str | None = None,
) -> Figure:
    """Return a figure of a signal in time, on the colours of its attributions.

    Args:
        signal: The signal (channels, times) or (times,).
        values: Attributions of the same shape.
        names: Names of the channels.
        rate: Samples per second, for an axis in seconds; None for an axis in time steps.
        unit: Unit of all channels, such as "µV", shown beside their names; the channels are then
            drawn on one scale.

    Raises:
        InputError: The shapes differ, the number of names is not that of the channels, or the rate
            is not above 0.

    Examples:
        >>> len(draw_signal(torch.randn(2, 50), torch.randn(2, 50), names=["C3", "C4"]).axes)
        3
    """
    if signal.shape != values.shape or signal.ndim not in (1, 2):
        raise InputError(
            f"the signal has shape {tuple(signal.shape)}, its attributions {tuple(values.shape)}, "
            "expected the same shape (channels, times) or (times,): pass one example of each"
        )
    signal, scale = (torch.atleast_2d(x.detach().cpu().double()) for x in (signal, values))
    names = [f"channel {number}" for number in range(len(signal))] if names is None else names
    if len(names) != len(signal):
        raise InputError(
            f"there are {len(names)} names, but {len(signal)} channels: pass one name per channel"
        )
    if rate is not None and not rate > 0:
        raise InputError(f"rate is {rate!r}, expected samples per second above 0: pass another")
    scale, step = strength(scale), 1 / (rate or 1)
    times = step * torch.arange(signal.shape[1])
    drawn = Figure(figsize=(8, 1.1 * len(signal) + 0.4 + LEGEND_INCHES), layout="constrained")
    axes = drawn.subplots(len(signal), sharex=True, sharey=bool(unit), squeeze=False)[:, 0]
    for axis, x, colours, name in zip(axes, signal, scale, names, strict=True):
        low, high = map(float, (signal if unit else x).aminmax())
        margin = 0.08 * (high - low) or 1.0
        extent = (-0.5 * step, (len(x) - 0.5) * step, low - margin, high + margin)
        axis.imshow(
            colours[None], cmap=OVERLAY, vmin=-1, vmax=1, aspect="auto", extent=extent,
            interpolation="nearest",
        )  # fmt: skip
        axis.plot(times, x, color="black", linewidth=1)
        axis.set_ylabel(f"{name} ({unit})" if unit else name, fontsize=8)
        axis.tick_params(labelsize=8)
        # as many ticks at any height: if the layout changed their labels, names would be cut off
        axis.locator_params(axis="y", nbins=4)
    axes[-1].set_xlabel("time (s)" if rate else "time step", fontsize=8)
    add_legend(drawn, axes, [axis.images[-1] for axis in axes])
    return drawn


def draw_row(
    names: Sequence[str], values: Tensor, *, row: Sequence[Any] | None = None, largest: int = 20
) -> Figure:
    """Return a figure with one bar per feature of a table row, the largest attributions first.

    Args:
        names: Names of the features.
        values: Attributions (features,).
        row: Values of the features, shown beside their names.
        largest: Number of features to show; a last bar has the sum of all others.

    Raises:
        InputError: The numbers of names, attributions and values of the row differ.

    Examples:
        >>> bars = draw_row(["age", "income"], torch.tensor([0.2, -1.0]), row=[31, 2500]).axes[0]
        >>> [label.get_text() for label in bars.get_yticklabels()]
        ['income = 2500', 'age = 31']
    """
    heat = _one_value_each(names, values, "features")
    labels = [*names]
    if row is not None:
        if len(row) != len(names):
            raise InputError(
                f"there are {len(names)} names, but {len(row)} values of the row: pass one value "
                "per name"
            )
        labels = [f"{name} = {_short(value)}" for name, value in zip(names, row, strict=True)]
    order = heat.abs().argsort(descending=True, stable=True).tolist()
    shown = [(labels[index], float(heat[index])) for index in order[:largest]]
    if len(order) > largest:
        rest = order[largest:]
        shown.append((f"{len(rest)} others", float(heat[rest].sum())))
    drawn = Figure(figsize=(5, 0.28 * len(shown) + 0.5), layout="constrained")
    axis = drawn.subplots()
    colours: list[Any] = [OVERLAY(1.0 if value > 0 else 0.0) for _, value in shown[:largest]]
    colours += ["silver"] * (len(shown) - largest)  # a sum, not the largest of the features
    axis.barh(range(len(shown)), [value for _, value in shown], color=colours)
    axis.set_yticks(range(len(shown)), [label.replace("$", r"\$") for label, _ in shown])
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.tick_params(labelsize=8)
    axis.set_xlabel("attribution", fontsize=8)
    return drawn


def draw_volume(volume: Tensor, values: Tensor, *, slices: int = 6) -> Figure:
    """Return a figure of slices of a volume, with the attributions over them.

    The slices are at equal distances along the first side, all on one scale.

    Args:
        volume: The volume (depth, height, width).
        values: Attributions (depth, height, width), or with channels before.
        slices: Number of slices at most.

    Raises:
        InputError: The shapes do not fit.

    Examples:
        >>> figure = draw_volume(torch.rand(9, 8, 8), torch.randn(2, 9, 8, 8), slices=3)
        >>> [axis.get_title() for axis in figure.axes[:3]]
        ['slice 0', 'slice 4', 'slice 8']
    """
    heat = values.detach().cpu().double()
    heat = heat.sum(0) if heat.ndim == 4 else heat
    if volume.ndim != 3 or heat.shape != volume.shape:
        raise InputError(
            f"the volume has shape {tuple(volume.shape)}, its attributions {tuple(values.shape)}, "
            "expected (depth, height, width) for both, the latter also with channels before: pass "
            "one example, and enlarge maps of a layer with LayerAttribution.interpolate"
        )
    scale, grey = strength(heat), volume.detach().cpu().double()
    depths = torch.linspace(0, len(grey) - 1, min(slices, len(grey))).round().long().tolist()
    size = max(1.6 * len(depths), LEGEND_WIDTH), 2 + LEGEND_INCHES
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.subplots(1, len(depths), squeeze=False)[0]
    for axis, depth in zip(axes, depths, strict=True):
        axis.imshow(grey[depth], cmap="gray", vmin=float(grey.min()), vmax=float(grey.max()))
        axis.imshow(scale[depth], cmap=OVERLAY, vmin=-1, vmax=1)
        axis.set_title(f"slice {depth}", fontsize=8)
        axis.axis("off")
    add_legend(drawn, axes, [axis.images[-1] for axis in axes])
    return drawn


def _short(value: Any) -> str:
    """Return the value of a feature with four digits, if it is a number that has more."""
    value = value.item() if hasattr(value, "item") else value  # of tensors and NumPy numbers
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _one_value_each(names: Sequence[str], values: Tensor, kind: str) -> Tensor:
    """Return one attribution per name, float64; raise InputError if the numbers differ."""
    heat = values.detach().cpu().double()
    heat = heat.sum(1) if heat.ndim == 2 else heat
    if heat.ndim != 1 or len(heat) != len(names):
        raise InputError(
            f"there are {len(names)} {kind}, but attributions of shape {tuple(values.shape)}, "
            f"expected one for each of the {kind}: pass those of one example"
        )
    return heat
