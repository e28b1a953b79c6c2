"""Functions that reduce maps over channels, resize and dilate them, and sort their places."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.errors import InputError

Reduction = (
    Literal["sum", "relu_of_sum", "sum_of_relu", "sum_of_abs", "max_of_abs"]
    | Callable[[Tensor], Tensor]
)

#: Reductions of maps (examples, channels, *places) over the channels.
_REDUCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    "sum": lambda maps: maps.sum(1),
    "relu_of_sum": lambda maps: maps.sum(1).relu(),
    "sum_of_relu": lambda maps: maps.relu().sum(1),
    "sum_of_abs": lambda maps: maps.abs().sum(1),
    "max_of_abs": lambda maps: maps.abs().amax(1),
}
_INTERPOLATIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}


def heat(maps: Tensor, like: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Return heat (examples, *places), float64: maps reduced over their channels.

    A place is a pixel, or a feature of maps (examples, features).

    Args:
        maps: Maps (examples, channels, *places) or (examples, features); maps with one dimension
            less than the inputs are (examples, *places).
        like: The explained inputs (examples, channels, *places) or (examples, features).
        reduction: Reduction over channels: "sum", "relu_of_sum" (as in the paper), "sum_of_relu",
            "sum_of_abs", "max_of_abs", or a function maps -> heat.

    Raises:
        InputError: The reduction is not known, or does not give one map per example.
    """
    maps = maps.double()
    if callable(reduction):
        reduced = reduction(maps)
        if len(reduced) != len(maps) or reduced.ndim < 2:
            raise InputError(
                f"the reduction gives shape {tuple(reduced.shape)} for maps of shape "
                f"{tuple(maps.shape)}, expected (examples, *places): pass a reduction= that "
                "reduces only channels"
            )
        return reduced.detach().double()
    if reduction not in _REDUCTIONS:
        raise InputError(
            f"reduction={reduction!r} is not known: pass one of "
            f"{', '.join(map(repr, _REDUCTIONS))}, or a function maps -> heat"
        )
    # maps without channels: (examples, features), or one dimension less than the inputs
    has_channels = maps.ndim > 2 and maps.ndim != like.ndim - 1
    return _REDUCTIONS[reduction](maps if has_channels else maps.unsqueeze(1))


def resized(heat: Tensor, size: Sequence[int]) -> Tensor:
    """Return heat (examples, *size) by linear interpolation.

    The interpolation is that of Captum's ``LayerAttribution.interpolate``.

    Args:
        heat: Heat (examples, *places).
        size: Numbers of places of the result, such as height and width.

    Raises:
        InputError: The number of dimensions differs, or the proportions differ by more than two
            places. An example are maps (examples, tokens, features), which are not images.
    """
    places, size = tuple(heat.shape[1:]), tuple(size)
    if places == size:
        return heat
    if len(places) != len(size) or len(size) not in _INTERPOLATIONS:
        raise InputError(
            f"maps of size {places} cannot be resized to inputs of size {size}, expected "
            f"{len(size)} dimensions: rearrange the maps, or pass a function as reduction="
        )
    # padding can make the map of a layer up to two places larger or smaller than its scale
    scale = places[0] / size[0]
    if any(abs(scale * whole - part) > 2 for whole, part in zip(size, places, strict=True)):
        raise InputError(
            f"maps of size {places} do not have the proportions of the inputs, expected those of "
            f"{size}: rearrange tokens as (examples, height, width)"
        )
    mode = _INTERPOLATIONS[len(size)]
    finer = F.interpolate(heat.unsqueeze(1), size, mode=mode, align_corners=False).squeeze(1)
    # round to 2^-40 of the maximum: interpolation of equal values gives values that differ by
    # rounding errors, which would decide about ties
    unit = finer.flatten(1).abs().amax(1).view(-1, *(1,) * len(size)) * 2.0**-40
    return torch.where(unit > 0, (finer / unit).round() * unit, finer)


def hottest_first(flat: Tensor, random: Tensor) -> Tensor:
    """Return the indices (examples, places) of places, sorted from the largest heat to the least.

    Args:
        flat: Heat (examples, places).
        random: Numbers (examples, places) that break ties: of places with equal heat, the place
            with the smallest number comes first.
    """
    # on the CPU NumPy sorts several times as fast as torch; its order of ties is not defined
    on_cpu = flat.device.type == "cpu"
    order = torch.from_numpy(np.argsort(-flat.numpy(), axis=1)) if on_cpu else (-flat).argsort(1)
    ordered = flat.gather(1, order)
    if (ordered[:, 1:] != ordered[:, :-1]).all():
        return order
    # there are ties: sort by the random numbers, then stably by heat, which keeps their order
    order = random.argsort(dim=1, stable=True)
    return order.gather(1, flat.gather(1, order).argsort(dim=1, descending=True, stable=True))


def positions(order: Tensor) -> Tensor:
    """Return the position of each place in ``order`` (rows, places): the inverse permutation."""
    index = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, index)


def flattened(maps: Iterable[Tensor]) -> Tensor:
    """Return all maps of each example as one row (examples, entries), float64."""
    return torch.cat([m.double().flatten(1) for m in maps], 1)


def dilated(masks: Tensor, tolerance: float) -> Tensor:
    """Return booleans (examples, height, width), True within ``tolerance`` pixels of the mask."""
    # near: a disk around the pixel overlaps the mask. Its row at a distance dy has the pixels with
    # dx² + dy² ≤ tolerance²; sums over rows are differences of cumulative sums.
    height, width = masks.shape[1:]
    squared = math.floor(min(tolerance, height + width) ** 2)
    sums = F.pad(masks.cumsum(2), (1, 0))
    columns, near = torch.arange(width, device=masks.device), torch.zeros_like(masks)
    for dy in range(min(math.isqrt(squared), height - 1) + 1):
        reach = math.isqrt(squared - dy**2)
        after = (columns + reach + 1).clamp(max=width)
        row = sums[:, :, after] > sums[:, :, (columns - reach).clamp(min=0)]
        near[:, dy:] |= row[:, : height - dy]
        near[:, : height - dy] |= row[:, dy:]
    return near
