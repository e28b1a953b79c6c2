"""Sums, scales and forks.

Sums and scales by constants hand the signal on as their adjoint does, which is right up to a factor a channel. That
factor is learned where it matters: by the inverse of the next operation with weights, or by a :class:`Channelwise`
inverse where there is none, that is at forks, whose branches bring several signals for one tensor, and at inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from captum_mipin.regression import Moments, Solution
from captum_mipin.rules.base import Inverse, Learned, Passes, every, factors


@dataclass(frozen=True)
class Channelwise:
    """x ≈ Σ_j a_j s_j + b, one regression a channel, over the signals s_j that come back from m branches.

    A channel is an entry of dimension ``dim``; with None, all is one channel.
    """

    channels: int
    branches: int
    dim: int | None

    @property
    def size(self) -> tuple[int, int, int]:
        return self.channels, 1, self.branches

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        moments = Moments.zeros(*self.size, device=x.device)
        moments.update(self._rows(x).unsqueeze(2), torch.stack([self._rows(s) for s in signals], 2))
        return moments

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        return Inverse(solution.weight[:, 0].to(like).contiguous(), solution.bias[:, 0].to(like))

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        shape = () if self.dim is None else (self.channels, *(1,) * (signals[0].ndim - 1 - self.dim))
        weights = [weight.view(shape) for weight in inverse.weight.unbind(1)]
        total = signals[0] * weights[0]
        for s, weight in zip(signals[1:], weights[1:], strict=True):
            total.addcmul_(s, weight)
        return total.add_(inverse.bias.view(shape)) if bias else total

    def _rows(self, x: Tensor) -> Tensor:
        """``x`` as (channels, rows)."""
        return x.reshape(1, -1) if self.dim is None else x.movedim(self.dim, 0).reshape(self.channels, -1)


def fork(x: Tensor, branches: int, dim: int | None) -> Channelwise:
    """The inverse of handing ``x``, whose channels are along ``dim``, to several branches."""
    return Channelwise(1 if dim is None else x.shape[dim], branches, dim)


def _two_signals(node: fx.Node) -> str | None:
    if len(factors(node)) > 1:
        return "it multiplies two values that both depend on the input, and neither is a gate that a sigmoid made"
    return None


def _divides_by_signal(node: fx.Node) -> str | None:
    divisor = node.args[1]
    if isinstance(divisor, fx.Node) and divisor.meta.get("depends"):
        return "it divides by a value that depends on the input"
    return None


_SUM = Passes(note="the sum's signal goes to each term; its scale is learned", carriers=every, restores=False)
_SCALE = Passes(
    note="adjoint, gates as recorded; its scale is learned", carriers=factors, records=True, restores=False,
    refuse=_two_signals,
)  # fmt: skip
_RATIO = Passes(note="adjoint; its scale is learned", records=True, restores=False, refuse=_divides_by_signal)

FORK = Learned(inverter=fork, note="learned weight a channel for each branch")
ARITHMETIC = {
    **{f"aten.{name}": _SUM for name in ("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "neg.default")},
    **{f"aten.{name}": _SCALE for name in ("mul.Tensor", "mul.Scalar")},
    **{f"aten.{name}": _RATIO for name in ("div.Tensor", "div.Scalar")},
}
