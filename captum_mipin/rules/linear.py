"""Operations with weights: their inverses are learned (equations 5-7).

If a tensor feeds several branches, one regression on the signals of all branches learns the
inverses of the operations with weights together: see :mod:`captum_mipin.rules.arithmetic`.
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
from captum_mipin.regression.geometry import Geometry, parts_by_position
from captum_mipin.regression.lag_gram import CHUNK
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Part, Solution
from captum_mipin.rules.base import Inverse, Inverter, Learned, Options, along, at
from captum_mipin.rules.geometry import ConvolutionArguments


def add_own(x: Tensor, inverse: Inverse, own: Sequence[Tensor], dim: int) -> Tensor:
    """Add Σ a ⊙ O to ``x`` in place, and return ``x``.

    Args:
        x: Tensor to which the sum is added.
        inverse: The inverse with the weights a; one without them adds nothing.
        own: The signals O of the branches without weights, each of the shape of x.
        dim: The dimension of the channels.
    """
    if inverse.own is not None:
        for o, weight in zip(own, inverse.own.unbind(1), strict=True):
            x.addcmul_(o, along(weight, x, dim))
    return x


@dataclass(frozen=True)
class Dense(Inverter):
    """The inverse of dense layers that share one input x (equation 6).

    x ≈ g(S) = W S + b + Σ a ⊙ O. Here x is (..., features), and S contains the signals of all dense
    layers, (..., signals). Each O is the signal of a branch without weights, in the shape of x.

    Attributes:
        features: Number of features of x.
        signals: Number of outputs of each dense layer.
        own: Number of branches without weights.
    """

    joins = True
    features: int
    signals: tuple[int, ...]
    own: int = 0

    @property
    def size(self) -> tuple[int, int, int, int]:
        return 1, self.features, sum(self.signals), self.own

    def by_rows(self, rows: int) -> bool:
        """Return True if the dual of a regression with this number of rows is cheaper."""
        return rows < sum(self.signals)

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        x, s, own = self.rows(x, signals)
        live, count = s[0].any(0).nonzero().squeeze(1), s.shape[2]
        # At the logits only the target's signal is not 0: most of the Gram matrix would be zeros.
        some = 2 * len(live) < count
        s = s[..., live] if some else s
        moments = Moments.zeros(1, self.features, s.shape[2], self.own, x.device)
        moments.update(x, s, own)
        return replace(moments, live=(live, count)) if some else moments

    def rows(self, x: Tensor, signals: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the features, the shared and the own signals of a batch, as (1, rows, ...)."""
        s, own = self._divided(signals)
        x, s, *own = (t.flatten(0, -2).unsqueeze(0) for t in (x, s, *own))
        return x, s, own

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        weight, live = solution.weight[0], solution.live
        own = solution.own[0].to(like) if self.own else None
        # Signals that never vary have zero coefficients: these columns are dropped.
        used = weight.any(0).nonzero().squeeze(1)
        if len(used) < weight.shape[1]:
            weight, live = weight[:, used], used if live is None else live[used]
        return Inverse(weight.to(like), solution.bias[0].to(like), live, own)

    def inverse_of_rows(self, solution: RowSolution, live: Tensor, rows: Rows) -> Inverse:
        """Return the inverse from a regression that was solved in its dual form.

        Args:
            solution: The solution, with one coefficient per row and signal.
            live: Indices of the signals that the regression used.
            rows: The rows of features that the regression used.
        """
        weight, bias = solution.coefficients.to(rows.x), solution.bias.to(rows.x)
        n, signals = weight.shape
        index = None if signals == sum(self.signals) else live
        # W = Xᵀ · coefficients: stored as these two factors if they are smaller than the product
        if n * (signals + self.features) < signals * self.features:
            return Inverse(weight, bias, index, rows=rows.x)
        return Inverse(rows.x.mT @ weight, bias, index)

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        s, own = self._divided(signals)
        if inverse.live is not None:
            s = s[..., inverse.live]
        # eq. 6: g(S) = W S + b
        weight = inverse.weight
        if inverse.rows is not None:  # W = rowsᵀ weight: apply the factors, for W is larger
            s, weight = F.linear(s, weight), inverse.rows.mT
        return add_own(F.linear(s, weight, inverse.bias if bias else None), inverse, own, -1)

    def _divided(self, signals: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """Return the concatenated signals of the dense layers, and the list of other signals."""
        shared, own = signals[: len(self.signals)], list(signals[len(self.signals) :])
        return shared[0] if len(shared) == 1 else torch.cat(shared, -1), own


@dataclass(frozen=True)
class Convolution(Inverter):
    """The inverse of (transposed) convolutions that share one input x (equation 7).

    x ≈ g(S) = Σ Wᵀ * S + b + Σ a ⊙ O. The first sum is over the convolutions: Wᵀ * S is the
    transposed convolution of the signal S with a learned kernel W. The second sum is over the
    branches without weights, with signal O. b has one value per channel.

    Attributes:
        geometries: The geometry of each convolution; all have the same number of groups.
        x_size: The size of x.
        own: Number of branches without weights.
    """

    joins = True
    geometries: tuple[Geometry, ...]
    x_size: torch.Size
    own: int = 0

    @property
    def plain(self) -> bool:
        """Return True if this is the inverse of a single convolution without other branches."""
        return len(self.geometries) == 1 and not self.own

    @property
    def tied(self) -> int:
        first = self.geometries[0]
        return prod(first.kernel) if self.plain and first.tiles(self.x_size) else 1

    @property
    def size(self) -> tuple[int, int, int, int]:
        first, signals = self.geometries[0], sum(conv.features[1] for conv in self.geometries)
        return first.groups, first.channels[0] * self.tied, signals // self.tied, self.own

    def by_rows(self, rows: int) -> bool:
        """Return True if the dual of a regression with this number of rows is cheaper.

        The Gram matrix of rows needs all products of rows and signals; the Gram matrix of signals
        needs only the products at different lags.
        """
        groups, _, signals, _ = self.size
        largest = max((len(index) for index, _ in self.parts), default=signals)
        return groups == self.tied == 1 and 2 * rows < largest

    @property
    def parts(self) -> list[Part]:
        return [] if self.tied > 1 else parts_by_position(self.geometries, self.x_size)

    @property
    def blocks(self) -> list[Tensor]:
        parts = [index for index, _ in self.parts]
        return parts if len(parts) > 1 and len(self.geometries) == 1 else []

    def moments(
        self, x: Tensor, signals: tuple[Tensor, ...], places: Tensor | None = None
    ) -> Moments:
        """Return the moments of one batch, over all positions or over some of them.

        Args:
            x: Tensor (batch, channels, *spatial) of the features.
            signals: The signal of each convolution, then the signal of each other branch.
            places: Integer tensor with the indices of the positions, numbered row by row; None for
                all positions.
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
        for parts in zip(*(t.split(chunk) for t in (x, *signals)), strict=True):
            rows, s, own = self.rows(parts[0], parts[1:], places)
            moments.update(rows, s, own)
        return moments

    def rows(
        self, x: Tensor, signals: tuple[Tensor, ...], places: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the features, the patches and the own signals of a batch, (groups, rows, ...)."""
        pairs = zip(self.geometries, signals, strict=False)
        patches = [conv.patches(s, x.shape, places) for conv, s in pairs]
        own = [self._rows(t, places) for t in signals[len(patches) :]]
        return self._rows(x, places), torch.cat(patches, 2), own

    def _moments_around(self, wide: int, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        """Return the moments of one batch for 1x1 convolutions and at most one wider convolution.

        The patches of a 1x1 convolution are its signal itself, so that no patches are copied.

        Args:
            wide: Number of the wider convolution.
            x: Tensor (batch, channels, *spatial) of the features.
            signals: The signal of each convolution, then the signal of each other branch.
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
        # In these moments the signals of the wider convolution come first: restore the order.
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
        # For tied taps, the moments have signals and taps in the reverse order of a kernel's rows.
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


#: Functions whose inverses can be learned together if a tensor feeds several of the operations.
TOGETHER = (dense, product, convolution, transposed_convolution)

_DENSE = "learned dense inverse"
_CONVOLUTION = Learned(inverter=convolution, note="learned transposed convolution", exact=True)
_TRANSPOSED = Learned(inverter=transposed_convolution, note="learned convolution", exact=True)
LINEAR = {
    "aten.linear.default": Learned(inverter=dense, note=_DENSE, exact=True),
    "aten.mm.default": Learned(inverter=product, note=_DENSE, exact=True),
    "aten.addmm.default": Learned(inverter=product, note=_DENSE, carriers=at(1), exact=True),
    **{f"aten.conv{n}d.{form}": _CONVOLUTION for n in (1, 2, 3) for form in ("default", "padding")},
    **{f"aten.conv_transpose{n}": _TRANSPOSED for n in ("1d.default", "2d.input", "3d.input")},
}
