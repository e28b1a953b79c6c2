"""Normalisations by the sample's own statistics, as the scales they are once those are recorded: x ↦ γ (x − μ) / σ + β."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *others: Any,
) -> Tensor:
    """γ / σ, for each element of x."""
    return _scale(x.var(tuple(range(-len(shape), 0)), correction=0, keepdim=True), eps, weight)


def rms_norm(
    x: Tensor, shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    """γ / σ, for each element of x, where σ is the root mean square; there is no μ."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _scale(x.square().mean(tuple(range(-len(shape), 0)), keepdim=True), eps, weight)


def group_norm(
    x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *others: Any
) -> Tensor:
    """γ / σ, for each element of x, with one σ a group of channels."""
    variance = (
        x.reshape(len(x), groups, -1)
        .var(-1, correction=0)
        .repeat_interleave(x.shape[1] // groups, 1)
    )
    return _scale(variance.view(*variance.shape, *(1,) * (x.ndim - 2)), eps, _channels(weight, x))


def instance_norm(
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    own: bool,
    momentum: float,
    eps: float,
    *others: Any,
) -> Tensor:
    """γ / σ, for each element of x, with one σ a channel, or a kept one instead of the sample's ``own``."""
    found = (
        x.var(tuple(range(2, x.ndim)), correction=0, keepdim=True)
        if own
        else _channels(variance, x)
    )
    return _scale(found, eps, _channels(weight, x))


def _scale(variance: Tensor, eps: float, weight: Any) -> Tensor:
    found = (variance + eps).rsqrt()
    return found if weight is None else found * weight


def _channels(values: Any, x: Tensor) -> Any:
    return None if values is None else values.view(-1, *(1,) * (x.ndim - 2))


#: Operation → what it multiplies x by.
SCALES: Mapping[str, Callable[..., Tensor]] = {
    f"aten.{scale.__name__}.default": scale
    for scale in (layer_norm, rms_norm, group_norm, instance_norm)
}
