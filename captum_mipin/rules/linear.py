"""Operations with weights: their inverses are learned (equations 5-7).

Where a tensor feeds several branches, the inverses of the operations with weights that take it are learned together, as
one regression on the signals of all branches; see :mod:`captum_mipin.rules.arithmetic`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.regression.convolution import moments_of_patches, moments_of_tiles
from captum_mipin.regression.dual import Rows, RowSolution
from captum_mipin.regression.geometry import Geometry
from captum_mipin.regression.lag_gram import CHUNK
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Solution
from captum_mipin.rules.base import Inverse, Inverter, Learned, Options
from captum_mipin.rules.geometry import ConvolutionArguments
from captum_mipin.rules.pooling import shared_out


@dataclass(frozen=True)
class Dense(Inverter):
    """g(S) = W S + b + Σ a ⊙ O for dense layers (equation 6): x (..., features), s (..., signals), o (..., features).

    Attributes:
        features: Of x.
        signals: Of each dense layer that x goes to.
        own: Number of other branches that x goes to.
    """

    joins = True
    features: int
    signals: tuple[int, ...]
    own: int = 0

    @property
    def size(self) -> tuple[int, int, int, int]:
        return 1, self.features, sum(self.signals), self.own

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        s, own = self._divided(signals)
        x, s, *own = (t.flatten(0, -2).unsqueeze(0) for t in (x, s, *own))
        live = s[0].any(0).nonzero().squeeze(1)
        some = 2 * len(live) < s.shape[2]  # of the logits, only the target's is there
        moments = Moments.zeros(
            1, self.features, len(live) if some else s.shape[2], self.own, x.device
        )
        moments.update(x, s[..., live] if some else s, own)
        return replace(moments, live=(live, s.shape[2])) if some else moments

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        weight, bias = solution.weight[0], solution.bias[0].to(like)
        own = solution.own[0].to(like) if self.own else None
        live = weight.any(0).nonzero().squeeze(1)
        if len(live) < weight.shape[1]:
            weight, places = weight[:, live], live if solution.live is None else solution.live[live]
            return Inverse(weight.to(like), bias, places, own)
        return Inverse(weight.to(like), bias, solution.live, own)

    def inverse_of_rows(self, solution: RowSolution, live: Tensor, rows: Rows) -> Inverse:
        """The inverse that a regression on the signals ``live`` solved row by row stands for, in its smaller form."""
        weight, bias = solution.coefficients.to(rows.x), solution.bias.to(rows.x)
        n, signals = weight.shape
        index = None if signals == sum(self.signals) else live
        if n * (signals + self.features) < signals * self.features:
            return Inverse(weight, bias, index, rows=rows.x)
        return Inverse(rows.x.mT @ weight, bias, index)

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        s, own = self._divided(signals)
        if inverse.live is not None:
            s = s[..., inverse.live]
        weight = inverse.weight
        if inverse.rows is not None:
            s, weight = torch.nn.functional.linear(s, weight), inverse.rows.mT
        x = torch.nn.functional.linear(s, weight, inverse.bias if bias else None)
        return add_own(x, inverse, own, -1)

    def _divided(self, signals: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """The signals of dense layers side by side, and the others."""
        shared, own = signals[: len(self.signals)], list(signals[len(self.signals) :])
        return shared[0] if len(shared) == 1 else torch.cat(shared, -1), own


@dataclass(frozen=True)
class Convolution(Inverter):
    """g(S), the transpose of (transposed) convolutions with new kernels, a bias a channel, and a ⊙ O (equation 7).

    Attributes:
        geometries: Of each convolution that x goes to; their groups are alike.
        x_size: Size of x.
        own: Number of other branches that x goes to.
    """

    joins = True
    geometries: tuple[Geometry, ...]
    x_size: torch.Size
    own: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is the inverse of one convolution alone."""
        return len(self.geometries) == 1 and not self.own

    @property
    def tied(self) -> int:
        first = self.geometries[0]
        return prod(first.kernel) if self.plain and first.tiles(self.x_size) else 1

    @property
    def size(self) -> tuple[int, int, int, int]:
        first, signals = (
            self.geometries[0],
            sum(geometry.features[1] for geometry in self.geometries),
        )
        return first.groups, first.channels[0] * self.tied, signals // self.tied, self.own

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        shared, own = signals[: len(self.geometries)], signals[len(self.geometries) :]
        if self.tied > 1:
            return moments_of_tiles(self.geometries[0], x, shared[0])
        if len(shared) == 1:
            return moments_of_patches(self.geometries[0], x, shared[0], own)
        wide = [
            index
            for index, geometry in enumerate(self.geometries)
            if geometry.transposed or prod(geometry.kernel) > 1
        ]
        if len(wide) == 1:
            return self._moments_of_one_wide(wide[0], x, list(shared), own)
        moments = Moments.zeros(*self.size, x.device)
        chunk = max(1, CHUNK // (self.size[0] * self.size[2] * prod(x.shape[2:])))
        for part in zip(*(t.split(chunk) for t in (x, *signals)), strict=True):
            part_x, part_s, part_own = part[0], part[1 : 1 + len(shared)], part[1 + len(shared) :]
            patches = [
                g.patches(g.full(s), x.shape) for g, s in zip(self.geometries, part_s, strict=True)
            ]
            moments.update(
                self._rows(part_x), torch.cat(patches, 2), [self._rows(o) for o in part_own]
            )
        return moments

    def moments_at(self, x: Tensor, signals: tuple[Tensor, ...], places: Tensor) -> Moments:
        """:meth:`moments` of some positions of x alone, counted row by row."""
        count = len(self.geometries)
        moments = Moments.zeros(*self.size, x.device)
        chunk = max(1, CHUNK // (self.size[0] * self.size[2] * len(places)))
        for part in zip(*(t.split(chunk) for t in (x, *signals)), strict=True):
            part_x, *part_own = (t.flatten(2)[:, :, places] for t in (part[0], *part[1 + count :]))
            signal = part[1 : 1 + count]
            patches = [
                g.patches(g.full(s), x.shape, places)
                for g, s in zip(self.geometries, signal, strict=True)
            ]
            moments.update(
                self._rows(part_x), torch.cat(patches, 2), [self._rows(o) for o in part_own]
            )
        return moments

    def _moments_of_one_wide(
        self, wide: int, x: Tensor, shared: list[Tensor], own: Sequence[Tensor]
    ) -> Moments:
        """Where all convolutions but one have a single tap: patches of single taps are maps, and no others need to be made."""
        geometry, s, g = self.geometries[wide], shared.pop(wide), self.size[0]
        others = [other for index, other in enumerate(self.geometries) if index != wide]
        maps = [
            other.patches(other.full(t), x.shape) for other, t in zip(others, shared, strict=True)
        ]
        pointwise = [
            m.view(g, len(x), -1, m.shape[2]).permute(1, 0, 3, 2).reshape(len(x), -1, *x.shape[2:])
            for m in maps
        ]
        moments = moments_of_patches(geometry, x, s, own, pointwise)
        counts = [other.features[1] for other in others]
        before, total = sum(counts[:wide]), geometry.features[1]
        order = [
            *range(total, total + before),
            *range(total),
            *range(total + before, total + sum(counts)),
        ]
        return moments if before == 0 else moments.among(torch.tensor(order, device=x.device))

    def _rows(self, x: Tensor) -> Tensor:
        """``x`` as (groups, rows, channels of a group)."""
        n, (g, channels) = len(x), self.size[:2]
        return x.reshape(n, g, channels, -1).permute(1, 0, 3, 2).reshape(g, -1, channels)

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        weight = (
            solution.weight.unflatten(1, (-1, self.tied)).transpose(2, 3).flatten(2)
        )  # taps next to their signal
        rows = weight.split([geometry.features[1] for geometry in self.geometries], 2)
        weights = [
            g.to_weight(part).flatten() for g, part in zip(self.geometries, rows, strict=True)
        ]
        own = solution.own.flatten(0, 1).to(like) if self.own else None
        return Inverse(torch.cat(weights).to(like), solution.bias.flatten().to(like), own=own)

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        size = torch.Size([len(signals[0]), *self.x_size[1:]])
        weights = inverse.weight.split(
            [prod(geometry.weight_shape) for geometry in self.geometries]
        )
        x: Tensor | None = None
        for geometry, weight, s in zip(self.geometries, weights, signals, strict=False):
            part = geometry.apply(
                s,
                weight.view(geometry.weight_shape),
                inverse.bias if bias and x is None else None,
                size,
            )
            x = part if x is None else x.add_(part)
        assert x is not None  # for mypy: there is a convolution
        return add_own(x, inverse, signals[len(self.geometries) :], 1)


@dataclass(frozen=True)
class PooledDense(Inverter):
    """The inverse of a dense layer on averages: each logit goes where it came from, then as :class:`Dense`, place by place.

    The dense layer could as well come first: W mean(x) = mean(W x), so y = W x is the map whose average is the output. The
    signal is shared out over it (:func:`~captum_mipin.rules.pooling.shared_out`), and x regressed on it at each place. Averages
    inverted one by one instead would send the signal to wherever a channel is active, whatever it says of the output.

    Attributes:
        dense: The inverse at each place.
        x: (n, ..., features), what is averaged.
        weight, bias: Of the dense layer.
        recorded, evidence: See :func:`~captum_mipin.rules.pooling.shared_out`.
        dim: Where the channels are in x as it is given.
    """

    dense: Dense
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    recorded: bool
    evidence: bool
    dim: int

    def part(self, examples: slice) -> "PooledDense":
        return replace(self, x=self.x[examples])

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.dense.size

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        live = signals[0].any(0).nonzero().squeeze(1)
        at_places = self._map(signals[0], live)
        moments = (
            Dense(self.dense.features, (len(live),))
            .moments(self.x.to(at_places.dtype), (at_places,))
            .whole()
        )
        return replace(moments, live=(live, self.size[2]))

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        return self.dense.inverse(solution, like)

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        whole = Inverse(inverse.weight, inverse.bias)
        return self.dense.apply(whole, (self._map(signals[0], inverse.live),), bias).movedim(
            -1, self.dim
        )

    def _map(self, s: Tensor, live: Tensor | None) -> Tensor:
        """The signals ``live``, or all, of (n, outputs) at the places (n, ..., signals) they came from."""
        weight, bias = self.weight, self.bias
        if live is not None:
            s, weight, bias = s[:, live], weight[live], None if bias is None else bias[live]
        y = torch.nn.functional.linear(self.x.contiguous(), weight, bias)
        over = tuple(range(1, y.ndim - 1))
        return shared_out(lambda t: t.mean(over), y, self.recorded, self.evidence, leading=1)[1](s)


class PooledLinear:
    """``linear(pooled, weight, bias)`` as an operation on what ``pooled`` is the average of; see :class:`PooledDense`."""

    __name__ = "pooled_linear"

    def __call__(
        self, x: Tensor, pooled: Tensor, weight: Tensor, bias: Tensor | None, dim: int
    ) -> Tensor:
        return torch.nn.functional.linear(pooled, weight, bias)

    def __repr__(self) -> str:
        return f"captum_mipin.{self.__name__}.default"


def pooled_dense(
    options: Options, x: Tensor, pooled: Tensor, weight: Tensor, bias: Tensor | None, dim: int
) -> PooledDense:
    """The inverse of :class:`PooledLinear`; the channels of ``x`` are along ``dim``."""
    inner = Dense(weight.shape[1], (weight.shape[0],))
    recorded = options.local and options.shares
    return PooledDense(
        inner, x.detach().movedim(dim, -1), weight, bias, recorded, options.evidence, dim
    )


def add_own(x: Tensor, inverse: Inverse, own: Sequence[Tensor], dim: int) -> Tensor:
    """``x`` + Σ a ⊙ O, the channels along ``dim``; changes ``x``."""
    if inverse.own is not None:
        shape = (-1, *(1,) * (x.ndim - 1 - dim % x.ndim))
        for o, weight in zip(own, inverse.own.unbind(1), strict=True):
            x.addcmul_(o, weight.view(shape))
    return x


def dense(options: Options, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Dense:
    """The inverse of ``linear(x, weight, bias)``."""
    return Dense(weight.shape[1], (weight.shape[0],))


def product(options: Options, x: Tensor, *arguments: Tensor, **scales: Any) -> Dense:
    """The inverse of ``mm(x, weight)`` and of ``addmm(bias, x, weight)``."""
    features, signals = arguments[-1].shape
    return Dense(features, (signals,))


def _second(node: fx.Node) -> tuple[int, ...]:
    return (1,)


def convolution(
    options: Options, x: Tensor, *arguments: Any, transposed: bool = False, **named: Any
) -> Convolution:
    """Return the inverse of ``conv{1,2,3}d(x, weight, ...)``, or of ``conv_transpose{1,2,3}d``."""
    parsed = ConvolutionArguments.of(arguments, named, transposed=transposed)
    return Convolution((parsed.geometry,), x.shape)


def transposed_convolution(
    options: Options, x: Tensor, *arguments: Any, **named: Any
) -> Convolution:
    """Return the inverse of ``conv_transpose{1,2,3}d(x, weight, ...)``."""
    return convolution(options, x, *arguments, transposed=True, **named)


#: Families of inverses that can be learned together where a tensor feeds several of them.
TOGETHER = (dense, product, convolution, transposed_convolution)

_CONVOLUTION = {
    f"aten.conv{dims}d.{form}": Learned(
        inverter=convolution, note="learned transposed convolution", exact=True
    )
    for dims in (1, 2, 3)
    for form in ("default", "padding")
}
_TRANSPOSED = {
    f"aten.conv_transpose{name}": Learned(
        inverter=transposed_convolution, note="learned convolution", exact=True
    )
    for name in ("1d.default", "2d.input", "3d.input")
}
_DENSE = "learned dense inverse"
LINEAR = {
    "aten.linear.default": Learned(inverter=dense, note=_DENSE, exact=True),
    str(PooledLinear()): Learned(
        inverter=pooled_dense,
        note="learned dense inverse at each place, where the output came from",
        records=True,
    ),
    "aten.mm.default": Learned(inverter=product, note=_DENSE, exact=True),
    "aten.addmm.default": Learned(inverter=product, note=_DENSE, carriers=_second, exact=True),
    **_CONVOLUTION,
    **_TRANSPOSED,
}
