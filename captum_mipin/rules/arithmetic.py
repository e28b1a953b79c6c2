"""Sums, scales and forks.

Sums and scales by constants hand the signal on as their adjoint does, which is right up to a factor
for each channel. That factor is learned where it matters. Mostly this is by the inverse of the next
operation with weights. At inputs, and at forks, whose branches bring several signals for one
tensor, it is by a weight for each channel and branch. All that comes back to one tensor is
calibrated together, by one regression: x ≈ g(S of the operations with weights) + Σ a ⊙ S of the
other branches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
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
    along,
    depends,
    every,
    factors,
)
from captum_mipin.rules.linear import Convolution, Dense, add_own


@dataclass(frozen=True)
class Channelwise(Inverter):
    """x ≈ Σ_j a_j s_j + b, one regression a channel, over the signals s_j of several branches.

    Attributes:
        channels: Number of channels.
        branches: Number of signals.
        dim: The dimension of the channels; None where all is one channel.
    """

    channels: int
    branches: int
    dim: int | None

    @property
    def size(self) -> tuple[int, int, int, int]:
        return 1, self.channels, 0, self.branches

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        moments = Moments.zeros(*self.size, x.device)
        # No signals are shared: each channel is regressed on its own ones alone.
        rows = self._rows(x)
        moments.update(rows, rows[..., :0], [self._rows(s) for s in signals])
        return moments

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        return Inverse(like.new_empty(0), solution.bias[0].to(like), own=solution.own[0].to(like))

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        # x = Σ_j a_j ⊙ s_j + b
        dim = -1 if self.dim is None else self.dim
        x = add_own(signals[0].new_zeros(signals[0].shape), inverse, signals, dim)
        return x.add_(along(inverse.bias, x, dim)) if bias else x

    def _rows(self, x: Tensor) -> Tensor:
        """Return ``x`` as (1, rows, channels)."""
        return (x if self.dim is None else x.movedim(self.dim, -1)).reshape(1, -1, self.channels)


#: Positional and named arguments of an operation behind x.
Call = tuple[Sequence[Any], dict[str, Any]]


@dataclass(frozen=True)
class Fork:
    """Hands a tensor to several branches: first to operations with weights, which it runs.

    Attributes:
        operations: The operations, either all dense or all convolutions of as many groups.
        inverters: What each of them alone would be inverted by.
        plain: Number of further branches, which get the tensor itself.
        dim: Dimension of the channels; None where all is one channel.
    """

    operations: tuple[Callable[..., Any], ...]
    inverters: tuple[Callable[..., Inverter], ...]
    plain: int
    dim: int | None

    def __call__(self, x: Tensor, *calls: Call) -> tuple[Tensor, ...]:
        """Return the value of each operation, then ``x`` once for each further branch."""
        pairs = zip(self.operations, calls, strict=True)
        results = [operation(x, *args, **named) for operation, (args, named) in pairs]
        return *results, *(x.detach() for _ in range(self.plain))

    def inverter(self, options: Options, x: Tensor, *calls: Call) -> Inverter:
        """Return the joint inverse of all branches."""
        pairs = zip(self.inverters, calls, strict=True)
        parts: list[Any] = [make(options, x, *args, **named) for make, (args, named) in pairs]
        if not parts:
            return Channelwise(1 if self.dim is None else x.shape[self.dim], self.plain, self.dim)
        if isinstance(parts[0], Dense):
            signals = chain.from_iterable(part.signals for part in parts)
            return Dense(parts[0].features, tuple(signals), self.plain)
        geometries = chain.from_iterable(part.geometries for part in parts)
        return Convolution(tuple(geometries), x.shape, self.plain)

    @property
    def rule(self) -> Learned:
        """Return the rule of this operation."""
        return Learned(
            inverter=self.inverter,
            note="learned together, with a weight a channel for each plain branch",
        )


def _two_signals(node: fx.Node) -> str | None:
    if len(factors(node)) < 2:
        return None
    reason = (
        "it multiplies two values that both depend on the input, "
        "and neither is a gate that a sigmoid made"
    )
    if any(n.op == "placeholder" and len(n.users) == 1 for n in node.all_input_nodes):
        reason += ": what only scales goes into additional_forward_args, which fit takes by unpack="
    return reason


def _divides_by_signal(node: fx.Node) -> str | None:
    return "it divides by a value that depends on the input" if depends(node.args[1]) else None


_SUM = Passes(
    note="the sum's signal goes to each term; its scale is learned", carriers=every, restores=False
)
_SCALE = Passes(
    note="adjoint, gates as recorded; its scale is learned",
    carriers=factors,
    records=True,
    restores=False,
    refuse=_two_signals,
)
_RATIO = Passes(
    note="adjoint; its scale is learned", records=True, restores=False, refuse=_divides_by_signal
)

ARITHMETIC = {
    f"aten.{name}": rule
    for rule, names in (
        (_SUM, "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar neg.default"),
        (_SCALE, "mul.Tensor mul.Scalar"),
        (_RATIO, "div.Tensor div.Scalar"),
    )
    for name in names.split()
}
