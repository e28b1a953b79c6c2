"""Normalisation: an affine map a channel, absorbed by the inverse of the operation before it."""

from typing import Any

import torch
from torch import Tensor

from captum_mipin.rules.base import Back, Options, Recorded


def batch_norm(options: Options, operation: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Back]:
    """Pass the signal on: a convolution and its batch norm are inverted as the one convolution they amount to."""
    return operation(x, *arguments)[0], lambda s: s


def layer_norm(
    options: Options,
    operation: Any,
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *arguments: Any,
) -> tuple[Tensor, Back]:
    """S · σ with the deviation σ = √(variance + ε) that this sample was divided by; the rest is affine, and absorbed."""
    if not options.local:
        return operation(x, shape, weight, bias, eps, *arguments), lambda s: s
    value, _, inverse_of_sigma = torch.native_layer_norm(x, shape, weight, bias, eps)
    inverse_of_sigma = inverse_of_sigma.to(x.dtype)
    return value, lambda s: s / inverse_of_sigma


def rms_norm(
    options: Options,
    operation: Any,
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Back]:
    """As :func:`layer_norm`, with the root mean square that this sample was divided by."""
    value = operation(x, shape, weight, eps)
    if not options.local:
        return value, lambda s: s
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    root = (x.square().mean(tuple(range(-len(shape), 0)), keepdim=True) + eps).sqrt()
    return value, lambda s: s * root


def instance_norm(
    options: Options,
    operation: Any,
    x: Tensor,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    own: bool,
    momentum: float,
    eps: float,
    *arguments: Any,
) -> tuple[Tensor, Back]:
    """As :func:`group_norm` with one channel a group; with kept statistics instead of its ``own``, as :func:`batch_norm`."""
    value = operation(x, weight, bias, mean, variance, own, momentum, eps, *arguments)
    return value, _rescaled(options, x, tuple(range(2, x.ndim)), eps) if own else lambda s: s


def group_norm(
    options: Options,
    operation: Any,
    x: Tensor,
    groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *arguments: Any,
) -> tuple[Tensor, Back]:
    """As :func:`layer_norm`, with one σ a group of channels."""
    parts = x.reshape(len(x), groups, -1)
    back = _rescaled(options, parts, (-1,), eps)
    return operation(x, groups, weight, bias, eps, *arguments), lambda s: back(
        s.reshape(parts.shape)
    ).reshape(x.shape)


def _rescaled(options: Options, x: Tensor, dims: tuple[int, ...], eps: float) -> Back:
    if not options.local:
        return lambda s: s
    sigma = (x.var(dims, correction=0, keepdim=True) + eps).sqrt()
    return lambda s: s * sigma


NORMALIZATION = {
    "aten._native_batch_norm_legit_no_training.default": Recorded(
        run=batch_norm,
        note="passed on; the next inverse absorbs the affine map",
        restores=False,
        exact=True,
    ),
    "aten.layer_norm.default": Recorded(
        run=layer_norm, note="times the recorded σ", restores=False
    ),
    "aten.rms_norm.default": Recorded(
        run=rms_norm, note="times the recorded root mean square", restores=False
    ),
    "aten.instance_norm.default": Recorded(
        run=instance_norm, note="times the recorded σ", restores=False
    ),
    "aten.group_norm.default": Recorded(
        run=group_norm, note="times the recorded σ", restores=False
    ),
}
