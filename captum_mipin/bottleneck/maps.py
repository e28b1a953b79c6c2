"""From bits of a layer's features to maps of the input."""

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.errors import InputError
from captum_mipin.types import Inputs


def positions(x: Tensor, channels: int) -> list[int]:
    """Return the dimensions of a tensor other than the batch and the channels."""
    return [dim for dim in range(1, x.ndim) if dim != channels % x.ndim]


def at_input(bits: Tensor, inputs: Inputs, channels: int, input_channels: int | None) -> Tensor:
    """Return bits of features as bits of the input's positions, with the same total.

    They are summed over channels, interpolated linearly, and scaled. The published scale (positions
    of the layer / positions of the input) keeps the total only where one size divides the other.

    Args:
        bits: (batch, ...) bits of each feature.
        inputs: The inputs of the model.
        channels: The dimension of ``bits`` that holds the channels.
        input_channels: That of the input; None if it is not known.

    Raises:
        InputError: The positions of the layer are not like those of the input.
    """
    x = inputs[0]
    grid = bits.sum(channels)
    count = grid.ndim - 1
    bare = x.ndim - count == 1  # the input has no channels
    if len(inputs) != 1 or not 1 <= count <= 3 or x.ndim - count not in (1, 2):
        shapes = ", ".join(str(tuple(x.shape[1:])) for x in inputs)
        raise InputError(
            f"the layer's output of shape {tuple(bits.shape[1:])}, channels along dimension "
            f"{channels}, has no positions like those of inputs of shape {shapes}: ask with "
            "at='layer', or say where the channels are with channels="
        )
    if not bare and input_channels is None:
        raise InputError(
            f"which dimension of inputs of shape {tuple(x.shape)} holds their channels? Say it "
            "with input_channels="
        )
    dims = range(1, x.ndim) if bare else positions(x, input_channels or -1)
    shape = [x.shape[dim] for dim in dims]
    if shape == list(grid.shape[1:]):
        return grid
    mode = ("linear", "bilinear", "trilinear")[count - 1]
    fine = F.interpolate(grid.unsqueeze(1), size=shape, mode=mode, align_corners=False).squeeze(1)
    total, interpolated = grid.flatten(1).sum(1), fine.flatten(1).sum(1)
    # a map of zeros stays one, instead of 0 / 0
    tiny = torch.finfo(fine.dtype).tiny
    scale = torch.where(interpolated > 0, total / interpolated.clamp(min=tiny), 0)
    return fine * scale.view(-1, *(1,) * count)


def spread(maps: Tensor, x: Tensor, channels: int) -> Tensor:
    """Return a map of positions in the shape of an input, whose channels share it evenly."""
    if x.ndim == maps.ndim:
        return maps
    return (maps.unsqueeze(channels % x.ndim) / x.shape[channels]).expand(x.shape)


def finished(maps: Tensor, x: Tensor) -> Tensor:
    """Return maps contiguous and in the dtype of a floating input."""
    return maps.to(x.dtype if x.is_floating_point() else maps.dtype).contiguous()
