"""Attribution maps of the input's size, from the information (in bits) in a layer's features."""

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.errors import InputError
from captum_mipin.types import Inputs


def positions(x: Tensor, channels: int) -> list[int]:
    """Return the dimensions of positions: all but the batch and the channels."""
    return [dim for dim in range(1, x.ndim) if dim != channels % x.ndim]


def at_input(bits: Tensor, inputs: Inputs, channels: int, input_channels: int | None) -> Tensor:
    """Return the bits of each input position, with the same total as the bits of the features.

    The bits are summed over channels, interpolated linearly, and scaled so that their total stays
    the same. The published factor (positions of the layer / positions of the input) does that only
    if the layer's size divides the input's size.

    Args:
        bits: (batch, ...) bits of each feature.
        inputs: The inputs of the model.
        channels: The dimension of ``bits`` that holds the channels.
        input_channels: The dimension of the input that holds the channels; None if it is not
            known.

    Raises:
        InputError: There are several inputs, or the input has not as many dimensions of positions
            as the layer.
    """
    x = inputs[0]
    grid = bits.sum(channels)
    count = grid.ndim - 1
    bare = x.ndim - count == 1  # the input has no channels
    if len(inputs) != 1 or not 1 <= count <= 3 or x.ndim - count not in (1, 2):
        shapes = ", ".join(str(tuple(x.shape[1:])) for x in inputs)
        raise InputError(
            f"the layer's output of shape {tuple(bits.shape[1:])}, with its channels in dimension "
            f"{channels}, has no positions that match those of inputs of shape {shapes}: pass "
            "at='layer', or the dimension that holds the channels as channels="
        )
    if not bare and input_channels is None:
        raise InputError(
            f"it is not known which dimension of inputs of shape {tuple(x.shape)} holds their "
            "channels: pass that dimension as input_channels="
        )
    dims = range(1, x.ndim) if bare else positions(x, input_channels or -1)
    shape = [x.shape[dim] for dim in dims]
    if shape == list(grid.shape[1:]):
        return grid
    mode = ("linear", "bilinear", "trilinear")[count - 1]
    fine = F.interpolate(grid.unsqueeze(1), size=shape, mode=mode, align_corners=False).squeeze(1)
    total, interpolated = grid.flatten(1).sum(1), fine.flatten(1).sum(1)
    # without the minimum, a map of zeros would become 0 / 0 = NaN
    tiny = torch.finfo(fine.dtype).tiny
    scale = torch.where(interpolated > 0, total / interpolated.clamp(min=tiny), 0)
    return fine * scale.view(-1, *(1,) * count)


def spread(maps: Tensor, x: Tensor, channels: int) -> Tensor:
    """Return maps shaped like ``x``: each channel gets an equal share of its position's value."""
    if x.ndim == maps.ndim:
        return maps
    return (maps.unsqueeze(channels % x.ndim) / x.shape[channels]).expand(x.shape)


def finished(maps: Tensor, x: Tensor) -> Tensor:
    """Return contiguous maps, with the dtype of ``x`` if that is a floating-point dtype."""
    return maps.to(x.dtype if x.is_floating_point() else maps.dtype).contiguous()
