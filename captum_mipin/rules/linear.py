"""Operations with weights: their inverses are learned (equations 5-7).

Where a tensor feeds several branches, the inverses of the operations with weights that take it are
learned together, as one regression on the signals of all branches: see
:mod:`captum_mipin.rules.arithmetic`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.regression.convolution import moments_of_patches, moments_of_tiles
from captum_mipin.regression.dual import Rows, RowSolution
from captum_mipin.regression.geometry import Geometry
from captum_mipin.regression.lag_gram import CHUNK
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Solution
from captum_mipin.rules.base import Inverse, Inverter, Learned, Options, along, at
from captum_mipin.rules.geometry import ConvolutionArguments
from captum_mipin.rules.pooling import shared_out


def add_own(x: Tensor, inverse: Inverse, own: Sequence[Tensor], dim: int) -> Tensor:
    """Add Σ a ⊙ O to ``x``, whose channels are along ``dim``, and return it."""
    if inverse.own is not None:
        for o, weight in zip(own, inverse.own.unbind(1), strict=True):
            x.addcmul_(o, along(weight, x, dim))
    return x


@dataclass(frozen=True)
class Dense(Inverter):
    """g(S) = W S + b + Σ a ⊙ O, the inverse of dense layers (equation 6).

    x is (..., features), each signal S is (..., signals), and each O is like x.

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
        live, count = s[0].any(0).nonzero().squeeze(1), s.shape[2]
        # Of the logits only the target's is not zero: most of their Gram matrix would be zeros.
        some = 2 * len(live) < count
        s = s[..., live] if some else s
        moments = Moments.zeros(1, self.features, s.shape[2], self.own, x.device)
        moments.update(x, s, own)
        return replace(moments, live=(live, count)) if some else moments

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        weight, live = solution.weight[0], solution.live
        own = solution.own[0].to(like) if self.own else None
        # Signals that never vary have zeros for coefficients: their columns are not kept.
        used = weight.any(0).nonzero().squeeze(1)
        if len(used) < weight.shape[1]:
            weight, live = weight[:, used], used if live is None else live[used]
        return Inverse(weight.to(like), solution.bias[0].to(like), live, own)

    def inverse_of_rows(self, solution: RowSolution, live: Tensor, rows: Rows) -> Inverse:
        """Return a regression solved row by row as an inverse, in its smaller form.

        Args:
            solution: The solved regression.
            live: Indices of the signals that it was solved for.
            rows: The features that it was solved for.
        """
        weight, bias = solution.coefficients.to(rows.x), solution.bias.to(rows.x)
        n, signals = weight.shape
        index = None if signals == sum(self.signals) else live
        # W = Xᵀ K S: kept as its two factors where these are smaller than the product
        if n * (signals + self.features) < signals * self.features:
            return Inverse(weight, bias, index, rows=rows.x)
        return Inverse(rows.x.mT @ weight, bias, index)

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        s, own = self._divided(signals)
        if inverse.live is not None:
            s = s[..., inverse.live]
        # eq. 6: g(S) = W S + b
        weight = inverse.weight
        if inverse.rows is not None:  # W = rowsᵀ weight, which would be larger than both
            s, weight = F.linear(s, weight), inverse.rows.mT
        return add_own(F.linear(s, weight, inverse.bias if bias else None), inverse, own, -1)

    def _divided(self, signals: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """Return the signals of dense layers side by side, and the other signals."""
        shared, own = signals[: len(self.signals)], list(signals[len(self.signals) :])
        return shared[0] if len(shared) == 1 else torch.cat(shared, -1), own


@dataclass(frozen=True)
class Convolution(Inverter):
    """g(S) = Σ Wᵀ * S + b + Σ a ⊙ O, the inverse of (transposed) convolutions (equation 7).

    Wᵀ * S is the transpose of a convolution with a new kernel W; b has one value a channel.

    Attributes:
        geometries: Of each convolution that x goes to; all have as many groups.
        x_size: Size of x.
        own: Number of other branches that x goes to.
    """

    joins = True
    geometries: tuple[Geometry, ...]
    x_size: torch.Size
    own: int = 0

    @property
    def plain(self) -> bool:
        """Return True for the inverse of one convolution alone."""
        return len(self.geometries) == 1 and not self.own

    @property
    def tied(self) -> int:
        first = self.geometries[0]
        return prod(first.kernel) if self.plain and first.tiles(self.x_size) else 1

    @property
    def size(self) -> tuple[int, int, int, int]:
        first, signals = self.geometries[0], sum(conv.features[1] for conv in self.geometries)
        return first.groups, first.channels[0] * self.tied, signals // self.tied, self.own

    def moments(
        self, x: Tensor, signals: tuple[Tensor, ...], places: Tensor | None = None
    ) -> Moments:
        """Return the moments of one batch, or of some positions of x alone.

        Args:
            x: The features.
            signals: The signal at each convolution, then those of the other branches.
            places: The positions, counted row by row; None for all.
        """
        convs = enumerate(self.geometries)
        wide = [i for i, conv in convs if conv.transposed or prod(conv.kernel) > 1]
        if places is None and self.tied > 1:
            return moments_of_tiles(self.geometries[0], x, signals[0])
        if places is None and (len(wide) == 1 or len(self.geometries) == 1):
            return self._moments_around(wide[0] if wide else 0, x, signals)
        moments = Moments.zeros(*self.size, x.device)
        count = prod(x.shape[2:]) if places is None else len(places)
        chunk = max(1, CHUNK // (self.size[0] * self.size[2] * count))
        for x_part, *parts in zip(*(t.split(chunk) for t in (x, *signals)), strict=True):
            pairs = zip(self.geometries, parts, strict=False)
            patches = [conv.patches(s, x.shape, places) for conv, s in pairs]
            rows, *own = (self._rows(t, places) for t in (x_part, *parts[len(patches) :]))
            moments.update(rows, torch.cat(patches, 2), own)
        return moments

    def _moments_around(self, wide: int, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        """Return the moments where all convolutions but number ``wide`` have a single tap.

        The patches of a single tap are a map like x, so no patches need to be made.
        """
        n, count = len(x), len(self.geometries)
        others = [i for i in range(count) if i != wide]
        pointwise = []
        for i in others:
            rows = self.geometries[i].patches(signals[i], x.shape).unflatten(1, (n, -1))
            pointwise.append(rows.permute(1, 0, 3, 2).reshape(n, -1, *x.shape[2:]))
        conv, own = self.geometries[wide], signals[count:]
        moments = moments_of_patches(conv, x, signals[wide], own, pointwise)
        if wide == 0:
            return moments
        # The signals of the wide one come first there, but belong at its place.
        widths = [self.geometries[i].features[1] for i in (wide, *others)]
        parts = list(torch.arange(sum(widths), device=x.device).split(widths))
        parts.insert(wide, parts.pop(0))
        return moments.among(torch.cat(parts))

    def _rows(self, x: Tensor, places: Tensor | None) -> Tensor:
        """Return ``x`` as (groups, rows, channels of a group)."""
        x = x.flatten(2) if places is None else x.flatten(2)[:, :, places]
        n, (g, channels) = len(x), self.size[:2]
        return x.reshape(n, g, channels, -1).permute(1, 0, 3, 2).reshape(g, -1, channels)

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        # of tiles: taps next to their signal, as in the rows of a kernel
        weight = solution.weight.unflatten(1, (-1, self.tied)).transpose(2, 3).flatten(2)
        rows = weight.split([conv.features[1] for conv in self.geometries], 2)
        pairs = zip(self.geometries, rows, strict=True)
        weight = torch.cat([conv.to_weight(part).flatten() for conv, part in pairs])
        own = solution.own.flatten(0, 1).to(like) if self.own else None
        return Inverse(weight.to(like), solution.bias.flatten().to(like), own=own)

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        size = torch.Size([len(signals[0]), *self.x_size[1:]])
        weights = inverse.weight.split([prod(conv.weight_shape) for conv in self.geometries])
        # eq. 7: g(S) = Σ Wᵀ * S + b, summed over the convolutions
        parts = zip(self.geometries, weights, signals, strict=False)
        x = reduce(
            Tensor.add_, (conv.apply(s, w.view(conv.weight_shape), size) for conv, w, s in parts)
        )
        if bias:
            x.add_(along(inverse.bias, x, 1))
        return add_own(x, inverse, signals[len(self.geometries) :], 1)


@dataclass(frozen=True)
class PooledDense(Inverter):
    """The inverse of a dense layer on averages: each logit goes to where it came from.

    The dense layer could as well come first: W mean(x) = mean(W x), so y = W x is the map whose
    average is the output. The signal is shared out over it, see
    :func:`~captum_mipin.rules.pooling.shared_out`, and x is regressed on it at each place. Averages
    inverted one by one instead would send the signal to wherever a channel is active, whatever it
    says of the output.

    Attributes:
        dense: The inverse at each place.
        x: (n, ..., features), what is averaged.
        weight: (outputs, features), of the dense layer.
        bias: (outputs,), of the dense layer; None for no bias.
        options: How the pass reads the rules.
        dim: The dimension of the features in x as the operation takes it.
    """

    dense: Dense
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Options
    dim: int

    def part(self, examples: slice) -> "PooledDense":
        return replace(self, x=self.x[examples])

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.dense.size

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        live = signals[0].any(0).nonzero().squeeze(1)
        s = self._map(signals[0], live)
        at_places = Dense(self.dense.features, (len(live),))
        moments = at_places.moments(self.x.to(s.dtype), (s,)).whole()
        return replace(moments, live=(live, self.size[2]))

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        return self.dense.inverse(solution, like)

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        s = self._map(signals[0], inverse.live)
        x = self.dense.apply(Inverse(inverse.weight, inverse.bias), (s,), bias)
        return x.movedim(-1, self.dim)

    def _map(self, s: Tensor, live: Tensor | None) -> Tensor:
        """Return the signals ``live`` of (n, outputs) where they came from: (n, ..., signals)."""
        weight, bias, options = self.weight, self.bias, self.options
        if live is not None:
            s, weight, bias = s[:, live], weight[live], None if bias is None else bias[live]
        # y = W x + b at each place; its average over the places is the output
        y = F.linear(self.x.contiguous(), weight, bias)
        over = tuple(range(1, y.ndim - 1))
        recorded = options.local and options.shares
        return shared_out(lambda t: t.mean(over), y, recorded, options.evidence, leading=1)[1](s)


class PooledLinear:
    """``linear(pooled, weight, bias)``, as an operation on the x that ``pooled`` is the average of.

    Its arguments are x, pooled, weight, bias, and the dimension of the features in x. It is
    inverted by :class:`PooledDense`.
    """

    __name__ = "pooled_linear"

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        """Return the value of the dense layer."""
        return F.linear(*arguments[:3])

    def __repr__(self) -> str:
        return f"captum_mipin.{self.__name__}.default"


def pooled_dense(options: Options, x: Tensor, *arguments: Any) -> PooledDense:
    """Return the inverse of :class:`PooledLinear`, whose arguments it takes."""
    _, weight, bias, dim = arguments
    inverse = dense(options, x, weight)
    return PooledDense(inverse, x.detach().movedim(dim, -1), weight, bias, options, dim)


def dense(options: Options, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Dense:
    """Return the inverse of ``linear(x, weight, bias)``."""
    return Dense(weight.shape[1], (weight.shape[0],))


def product(options: Options, x: Tensor, *arguments: Tensor, **scales: Any) -> Dense:
    """Return the inverse of ``mm(x, weight)`` or of ``addmm(bias, x, weight)``."""
    return dense(options, x, arguments[-1].mT)


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

_DENSE = "learned dense inverse"
_CONVOLUTION = Learned(inverter=convolution, note="learned transposed convolution", exact=True)
_TRANSPOSED = Learned(inverter=transposed_convolution, note="learned convolution", exact=True)
LINEAR = {
    "aten.linear.default": Learned(inverter=dense, note=_DENSE, exact=True),
    str(PooledLinear()): Learned(
        inverter=pooled_dense,
        note="learned dense inverse at each place, where the output came from",
        records=True,
    ),
    "aten.mm.default": Learned(inverter=product, note=_DENSE, exact=True),
    "aten.addmm.default": Learned(inverter=product, note=_DENSE, carriers=at(1), exact=True),
    **{f"aten.conv{n}d.{form}": _CONVOLUTION for n in (1, 2, 3) for form in ("default", "padding")},
    **{f"aten.conv_transpose{n}": _TRANSPOSED for n in ("1d.default", "2d.input", "3d.input")},
}
