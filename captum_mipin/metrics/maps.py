"""Maps as tensors: reduced over channels, resized, and sorted."""

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
    """Return maps without channels, float64: (examples, *places).

    Each feature of maps (examples, features) is a place of its own.

    Args:
        maps: (examples, channels, *places), or without channels if ``like`` has one dimension more.
        like: The inputs (examples, channels, *places).
        reduction: Over channels: "sum", "relu_of_sum" (the paper's wording), "sum_of_relu",
            "sum_of_abs", "max_of_abs", or a function of the maps.

    Raises:
        InputError: The reduction is not known, or its result is no map per example.
    """
    maps = maps.double()
    if callable(reduction):
        reduced = reduction(maps)
        if len(reduced) != len(maps) or reduced.ndim < 2:
            raise InputError(
                f"the reduction gives shape {tuple(reduced.shape)} for maps of shape "
                f"{tuple(maps.shape)}, expected (examples, *places)"
            )
        return reduced.detach().double()
    if reduction not in _REDUCTIONS:
        raise InputError(
            f"reduction={reduction!r} is not one of {', '.join(map(repr, _REDUCTIONS))}, or a "
            "function"
        )
    # maps (examples, features) have no channels, nor maps with one dimension less than the inputs
    has_channels = maps.ndim > 2 and maps.ndim != like.ndim - 1
    return _REDUCTIONS[reduction](maps if has_channels else maps.unsqueeze(1))


def resized(heat: Tensor, size: Sequence[int]) -> Tensor:
    """Return heat (examples, *places) at another resolution, by linear interpolation.

    Interpolation is that of Captum's ``LayerAttribution.interpolate``.

    Raises:
        InputError: The number of dimensions differs; or the proportions differ by more than two
            places, as they do where tokens and their features are taken for height and width.
    """
    places, size = tuple(heat.shape[1:]), tuple(size)
    if places == size:
        return heat
    if len(places) != len(size) or len(size) not in _INTERPOLATIONS:
        raise InputError(
            f"maps with places {places} cannot be laid over inputs with places {size}, expected "
            f"{len(size)} dimensions: rearrange the maps, or pass a function as reduction="
        )
    # a layer's map may be up to two places larger or smaller than the scale says: padding
    scale = places[0] / size[0]
    if any(abs(scale * whole - part) > 2 for whole, part in zip(size, places, strict=True)):
        raise InputError(
            f"maps with places {places} have other proportions than inputs {size}: rearrange "
            "tokens as (examples, height, width)"
        )
    mode = _INTERPOLATIONS[len(size)]
    finer = F.interpolate(heat.unsqueeze(1), size, mode=mode, align_corners=False).squeeze(1)
    # round to 2^-40 of the maximum: interpolating equal values leaves differences of rounding,
    # which would break ties at will
    unit = finer.flatten(1).abs().amax(1).view(-1, *(1,) * len(size)) * 2.0**-40
    return torch.where(unit > 0, (finer / unit).round() * unit, finer)


def hottest_first(flat: Tensor, random: Tensor) -> Tensor:
    """Return the places of maps from hot to cold (examples, places).

    Args:
        flat: Heat (examples, places).
        random: Numbers (examples, places) that break ties: among equal heats the least comes first.
    """
    # NumPy sorts several times as fast as torch on the CPU, but breaks ties at will
    on_cpu = flat.device.type == "cpu"
    order = torch.from_numpy(np.argsort(-flat.numpy(), axis=1)) if on_cpu else (-flat).argsort(1)
    ordered = flat.gather(1, order)
    if (ordered[:, 1:] != ordered[:, :-1]).all():
        return order
    # a stable sort keeps the random order among equal heats
    order = random.argsort(dim=1, stable=True)
    return order.gather(1, flat.gather(1, order).argsort(dim=1, descending=True, stable=True))


def positions(order: Tensor) -> Tensor:
    """Return where each place stands in its row's order (rows, places): the inverse permutation."""
    index = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, index)


def flattened(maps: Iterable[Tensor]) -> Tensor:
    """Return all maps of an example in one row (examples, entries), float64."""
    return torch.cat([m.double().flatten(1) for m in maps], 1)
