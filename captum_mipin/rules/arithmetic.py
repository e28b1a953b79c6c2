"""Sums, products with constants, and forks.

Sums and products with constants send the signal back by their adjoint, which is right up to a
factor per channel. Usually the inverse of the next operation with weights learns this factor. There
are two other cases: at the model's inputs, a weight per channel is learned; at forks, where a
tensor gets several signals, a weight per channel and branch. One regression learns all weights of a
tensor x together: x ≈ g(S of the operations with weights) + Σ a ⊙ S, the sum over the other
branches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Solution
from captum_mipin.rules.base import (
    Inverse,
    Inverter,
    Learned,
    Options,
    OwnOperation,
    Passes,
    Recorded,
    Recording,
    along,
    depends,
    every,
)
from captum_mipin.rules.gates import factors
from captum_mipin.rules.linear import Convolution, Dense, add_own


@dataclass(frozen=True)
class Channelwise(Inverter):
    """The inverse x ≈ Σ_j a_j s_j + b, with one regression per channel.

    The signals s_j come from several branches.

    Attributes:
        channels: Number of channels.
        branches: Number of branches, and so of signals.
        dim: The dimension of the channels; None if x has a single channel.
    """

    channels: int
    branches: int
    dim: int | None

    @property
    def size(self) -> tuple[int, int, int, int]:
        return 1, self.channels, 0, self.branches

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        moments = Moments.zeros(*self.size, x.device)
        # No signal is shared by several channels: each channel is regressed on its own signals.
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


#: Positional and named arguments of an operation, without its first argument x.
Call = tuple[Sequence[Any], dict[str, Any]]


@dataclass(frozen=True)
class Fork:
    """An operation that passes a tensor on to several branches.

    If branches begin with operations with weights, the fork runs these operations itself, so that
    they are inverted together.

    Attributes:
        operations: The operations with weights: all dense, or all convolutions with the same number
            of groups.
        inverters: Function that makes the inverse of one operation alone, per operation.
        plain: Number of the other branches, which get the tensor itself.
        dim: The dimension of the channels; None if the tensor has a single channel.

    Examples:
        >>> import torch
        >>> fork = Fork((torch.nn.functional.linear,), (), plain=1, dim=1)
        >>> first, second = fork(torch.ones(1, 2), ((torch.ones(3, 2),), {}))
        >>> first.tolist(), second.tolist()
        ([[2.0, 2.0, 2.0]], [[1.0, 1.0]])
    """

    operations: tuple[Callable[..., Any], ...]
    inverters: tuple[Callable[..., Inverter], ...]
    plain: int
    dim: int | None

    def __call__(self, x: Tensor, *calls: Call) -> tuple[Tensor, ...]:
        """Return the result of each operation, then ``x`` once per other branch."""
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
        """Return the rule of this fork."""
        return Learned(
            inverter=self.inverter,
            note="learned together, with a weight a channel for each plain branch",
        )


def divided(options: Options, operation: Any, x: Tensor, divisor: Tensor) -> Recording:
    """Send back S ⊙ d for y = x / d, where the divisor d is recorded, as a normalisation does."""
    value = operation(x, divisor)
    if not options.local:
        return value, lambda s: s.sum_to_size(x.shape)
    return value, lambda s: (s * divisor).sum_to_size(x.shape)


#: The operation ``div`` where the divisor depends on the input: a scale of the sample.
DIVIDED = OwnOperation("divided", torch.div)


def two_signals(node: fx.Node) -> str | None:
    """Return the caveat of a product of which several factors carry signal."""
    if len(factors(node)) < 2:
        return None
    return "neither factor is a gate: each gets the signal times the other, as recorded"


def mere_scale(node: fx.Node) -> str | None:
    """Return the reason to refuse a product with an input itself, which may be a mere scale."""
    inputs = [n for n in node.all_input_nodes if n.op == "placeholder" and depends(n)]
    signals = {node.args[at] for at in factors(node)}  # only one for x · x
    if len(signals) < 2 or all(len(n.users) > 1 for n in inputs):
        return None
    return (
        "it multiplies two values that both depend on the input, and one of them is an input that "
        "is used nowhere else, as a signal or as a mere scale: pass a mere scale by "
        "additional_forward_args, which fit takes by unpack="
    )


def _constant_dividend(node: fx.Node) -> str | None:
    if depends(node.args[0]) or not depends(node.args[1]):
        return None
    return (
        "it divides a constant by a value that depends on the input: a divisor is recorded as a "
        "scale, so no value is left that a signal could go to"
    )


_SUM = Passes(
    note="the sum's signal goes to each term; its scale is learned", carriers=every, restores=False
)
_RATIO = Passes(
    note="adjoint; its scale is learned",
    carriers=factors,
    records=True,
    restores=False,
    refuse=_constant_dividend,
)
PRODUCT = replace(
    _RATIO,
    note="adjoint, gates as recorded; its scale is learned",
    refuse=mere_scale,
    caveat=two_signals,
)

ARITHMETIC = {
    f"aten.{name}": rule
    for rule, names in (
        (_SUM, "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar neg.default"),
        (PRODUCT, "mul.Tensor mul.Scalar"),
        (_RATIO, "div.Tensor div.Scalar"),
    )
    for name in names.split()
} | {
    str(DIVIDED): Recorded(
        run=divided, note="times the recorded divisor", records=True, restores=False
    )
}
