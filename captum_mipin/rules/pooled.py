"""A dense layer behind an average over positions: both are inverted together."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Solution
from captum_mipin.rules.base import Inverse, Inverter, Learned, Options, OwnOperation
from captum_mipin.rules.linear import Dense, dense
from captum_mipin.rules.pooling import averaged, evidence, margins, shared_out


@dataclass(frozen=True)
class PooledDense(Inverter):
    """The joint inverse of an average over positions and the dense layer after it.

    For a dense layer W, W mean(x) = mean(W x). So the output is the average of the map y = W x. The
    signal of an output is distributed over the positions of y, see
    :func:`~captum_mipin.rules.pooling.shared_out`, and a dense inverse is fitted from y's signal to
    x, position by position. If the average were inverted alone, its signal would go to all
    positions where a channel is active, even to those that do not contribute to the output.

    Attributes:
        dense: The inverse at each position.
        x: Tensor (batch, ..., features), the averaged tensor.
        weight: Tensor (outputs, features), the weight of the dense layer.
        bias: Tensor (outputs,), the bias of the dense layer; None for no bias.
        options: The options of the pass.
        dim: The dimension of the features in the operation's own argument x.
        shares: Tensor (batch, ..., 1), the shares of the positions in a weighted average; None for
            equal shares.
    """

    dense: Dense
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Options
    dim: int
    shares: Tensor | None = None

    def part(self, examples: slice) -> "PooledDense":
        shares = None if self.shares is None else self.shares[examples]
        return replace(self, x=self.x[examples], shares=shares)

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
        """Return the signal of the outputs, distributed over the positions.

        Args:
            s: Tensor (batch, outputs), the signal.
            live: Integer tensor (signals,) with the indices of the outputs to use; None for all.

        Returns:
            Tensor (batch, ..., signals).
        """
        weight, bias, options = self.weight, self.bias, self.options
        classes = options.contrast if options.evidence else None  # None, or the last dimension
        if live is not None and classes is None:
            s, weight, bias = s[:, live], weight[live], None if bias is None else bias[live]
        # y = W x + b at each position; its average over the positions is the output
        y = F.linear(self.x.contiguous(), weight, bias)

        average = partial(averaged, shares=self.shares)
        if not options.evidence:
            leading = 1 if self.shares is None else 0  # examples have shares of their own
            recorded = options.local and options.shares
            return shared_out(average, y, recorded, leading=leading)[1](s)
        if classes is None:
            return evidence(average, y, y)(s)
        shown = evidence(average, y, margins(y, classes))(s)
        return shown if live is None else shown[..., live]


def _linear_of_pooled(x: Tensor, *arguments: Any) -> Tensor:
    return F.linear(*arguments[:3])


#: The operation ``linear(pooled, weight, bias)`` with the averaged tensor x as first argument. The
#: arguments are x, pooled (a number times the average of x), weight, bias, the dimension of the
#: features in x, the number, and the shares of a weighted average, or None. Its inverse is
#: :class:`PooledDense`.
POOLED_LINEAR = OwnOperation("pooled_linear", _linear_of_pooled)


def pooled_dense(options: Options, x: Tensor, *arguments: Any) -> PooledDense:
    """Return the inverse of :data:`POOLED_LINEAR` for the arguments of that operation."""
    _, weight, bias, dim, scale, shares = arguments
    weight = weight if scale == 1 else weight * scale
    inverse, x = dense(options, x, weight), x.detach().movedim(dim, -1)
    shares = None if shares is None else shares.detach().movedim(dim, -1)
    return PooledDense(inverse, x, weight, bias, options, dim, shares)


POOLED = {
    str(POOLED_LINEAR): Learned(
        inverter=pooled_dense,
        note="learned dense inverse at each place, where the output came from",
        records=True,
    )
}
