"""Sums, scales and forks.

Sums and scales by constants hand the signal on as their adjoint does, which is right up to a factor a channel. That
factor is learned where it matters: by the inverse of the next operation with weights, or, where there is none, that is at
forks, whose branches bring several signals for one tensor, and at inputs, by a weight a channel and branch. All that comes
back to one tensor is calibrated together, by one regression: x ≈ g(S of the operations with weights) + Σ a ⊙ S of the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Solution
from captum_mipin.rules.base import (
    Inverse,
    Inverter,
    Learned,
    Options,
    Passes,
    depends,
    every,
    factors,
)
from captum_mipin.rules.linear import Convolution, Dense


@dataclass(frozen=True)
class Channelwise(Inverter):
    """x ≈ Σ_j a_j s_j + b, one regression a channel, over the signals s_j that come back from m branches.

    A channel is an entry of dimension ``dim``; with None, all is one channel.
    """

    channels: int
    branches: int
    dim: int | None

    @property
    def size(self) -> tuple[int, int, int, int]:
        return 1, self.channels, 0, self.branches

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        moments = Moments.zeros(*self.size, x.device)
        rows = self._rows(x)
        moments.update(rows, rows[..., :0], [self._rows(s) for s in signals])
        return moments

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        return Inverse(like.new_empty(0), solution.bias[0].to(like), own=solution.own[0].to(like))

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        assert inverse.own is not None  # for mypy: it is all there is
        shape = (
            () if self.dim is None else (self.channels, *(1,) * (signals[0].ndim - 1 - self.dim))
        )
        weights = [weight.view(shape) for weight in inverse.own.unbind(1)]
        total = signals[0] * weights[0]
        for s, weight in zip(signals[1:], weights[1:], strict=True):
            total.addcmul_(s, weight)
        return total.add_(inverse.bias.view(shape)) if bias else total

    def _rows(self, x: Tensor) -> Tensor:
        """``x`` as (1, rows, channels)."""
        return (
            x.reshape(1, -1, 1)
            if self.dim is None
            else x.movedim(self.dim, -1).reshape(1, -1, self.channels)
        )


@dataclass(frozen=True)
class Fork:
    """Handing a tensor to several branches: first to operations with weights, which are run at once, then plainly.

    Attributes:
        operations: The operations, either all dense or all convolutions of as many groups.
        inverters: What each alone would be inverted by.
        others: Number of further branches.
        dim: Dimension of the channels; None where all is one channel.
    """

    operations: tuple[Callable[..., Any], ...]
    inverters: tuple[Callable[..., Inverter], ...]
    others: int
    dim: int | None

    def __call__(
        self, x: Tensor, *calls: tuple[Sequence[Any], dict[str, Any]]
    ) -> tuple[Tensor, ...]:
        results = [
            operation(x, *args, **named)
            for operation, (args, named) in zip(self.operations, calls, strict=True)
        ]
        return *results, *(x.detach() for _ in range(self.others))

    def inverter(
        self, options: Options, x: Tensor, *calls: tuple[Sequence[Any], dict[str, Any]]
    ) -> Inverter:
        """The joint inverse of all branches."""
        parts = [
            inverter(options, x, *args, **named)
            for inverter, (args, named) in zip(self.inverters, calls, strict=True)
        ]
        dense = [part for part in parts if isinstance(part, Dense)]
        if dense:
            return Dense(
                dense[0].features, tuple(n for part in dense for n in part.signals), self.others
            )
        convolutions = [part for part in parts if isinstance(part, Convolution)]
        if convolutions:
            return Convolution(
                tuple(g for part in convolutions for g in part.geometries), x.shape, self.others
            )
        return Channelwise(1 if self.dim is None else x.shape[self.dim], self.others, self.dim)

    @property
    def rule(self) -> Learned:
        """How it is inverted."""
        return Learned(
            inverter=self.inverter,
            note="learned together, with a weight a channel for each plain branch",
        )


def _two_signals(node: fx.Node) -> str | None:
    if len(factors(node)) < 2:
        return None
    inputs = {n for n in node.all_input_nodes if n.op == "placeholder" and len(n.users) == 1}
    hint = (
        ": what only scales goes into additional_forward_args, which fit takes by unpack="
        if inputs
        else ""
    )
    return f"it multiplies two values that both depend on the input, and neither is a gate that a sigmoid made{hint}"


def _divides_by_signal(node: fx.Node) -> str | None:
    divisor = node.args[1]
    if depends(divisor):
        return "it divides by a value that depends on the input"
    return None


_SUM = Passes(
    note="the sum's signal goes to each term; its scale is learned", carriers=every, restores=False
)
_SCALE = Passes(
    note="adjoint, gates as recorded; its scale is learned", carriers=factors, records=True, restores=False,
    refuse=_two_signals,
)  # fmt: skip
_RATIO = Passes(
    note="adjoint; its scale is learned", records=True, restores=False, refuse=_divides_by_signal
)

ARITHMETIC = {
    **{
        f"aten.{name}": _SUM
        for name in (
            "add.Tensor",
            "add.Scalar",
            "sub.Tensor",
            "sub.Scalar",
            "rsub.Scalar",
            "neg.default",
        )
    },
    **{f"aten.{name}": _SCALE for name in ("mul.Tensor", "mul.Scalar")},
    **{f"aten.{name}": _RATIO for name in ("div.Tensor", "div.Scalar")},
}
