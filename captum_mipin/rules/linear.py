"""Operations with weights: their inverses are learned (equations 5-7)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.convolution import Geometry
from captum_mipin.regression import Moments, Solution
from captum_mipin.rules.base import Inverse, Learned


@dataclass(frozen=True)
class Dense:
    """g(S) = W S + b for a dense layer (equation 6): x (..., features), s (..., signals)."""

    features: int
    signals: int

    @property
    def size(self) -> tuple[int, int, int]:
        return 1, self.features, self.signals

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        moments = Moments.zeros(*self.size, device=x.device)
        moments.update(x.reshape(1, -1, self.features), signals[0].reshape(1, -1, self.signals))
        return moments

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        weight = solution.weight[0]
        live = weight.any(0).nonzero().squeeze(1)
        if len(live) == self.signals:
            return Inverse(weight.to(like), solution.bias[0].to(like))
        return Inverse(weight[:, live].to(like), solution.bias[0].to(like), live)

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        (s,) = signals
        if inverse.live is not None:
            s = s[..., inverse.live]
        return torch.nn.functional.linear(s, inverse.weight, inverse.bias if bias else None)


@dataclass(frozen=True)
class Convolution:
    """g(S), the transpose of a (transposed) convolution with a new kernel and a bias a channel (equation 7)."""

    geometry: Geometry
    x_size: torch.Size

    @property
    def size(self) -> tuple[int, int, int]:
        return self.geometry.groups, *self.geometry.features

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        return self.geometry.moments(x, signals[0])

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        return Inverse(self.geometry.to_weight(solution.weight).to(like).contiguous(), solution.bias.flatten().to(like))

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        (s,) = signals
        size = torch.Size([len(s), *self.x_size[1:]])
        return self.geometry.apply(s, inverse.weight, inverse.bias if bias else None, size)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Dense:
    """The inverse of ``linear(x, weight, bias)``."""
    return Dense(weight.shape[1], weight.shape[0])


def product(x: Tensor, *arguments: Tensor, **scales: Any) -> Dense:
    """The inverse of ``mm(x, weight)`` and of ``addmm(bias, x, weight)``."""
    return Dense(*arguments[-1].shape)


def _second(node: fx.Node) -> tuple[int, ...]:
    return (1,)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Convolution:
    """The inverse of ``conv{1,2,3}d``; ``padding`` may be "same" or "valid"."""
    dims = weight.ndim - 2
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    skip: tuple[int, ...] = ()
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
        padding, skip = tuple(n - n // 2 for n in total), tuple(n % 2 for n in total)
    elif padding == "valid":
        padding = 0
    geometry = Geometry(tuple(weight.shape), stride, _each(padding, dims), dilation, groups, skip=skip)
    return Convolution(geometry, x.shape)


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Convolution:
    """The inverse of ``conv_transpose{1,2,3}d``."""
    dims = weight.ndim - 2
    stride, padding, dilation, output_padding = (_each(v, dims) for v in (stride, padding, dilation, output_padding))
    geometry = Geometry(tuple(weight.shape), stride, padding, dilation, groups, True, output_padding)
    return Convolution(geometry, x.shape)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


_CONVOLUTION = {
    f"aten.conv{dims}d.{form}": Learned(inverter=convolution, note="learned transposed convolution", exact=True)
    for dims in (1, 2, 3)
    for form in ("default", "padding")
}
_TRANSPOSED = {
    f"aten.conv_transpose{name}": Learned(inverter=transposed_convolution, note="learned convolution", exact=True)
    for name in ("1d.default", "2d.input", "3d.input")
}
_DENSE = "learned dense inverse"
LINEAR = {
    "aten.linear.default": Learned(inverter=dense, note=_DENSE, exact=True),
    "aten.mm.default": Learned(inverter=product, note=_DENSE, exact=True),
    "aten.addmm.default": Learned(inverter=product, note=_DENSE, carriers=_second, exact=True),
    **_CONVOLUTION,
    **_TRANSPOSED,
}
