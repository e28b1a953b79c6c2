"""The three kinds of rule, and what a learned inverse is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import marks
from captum_mipin.graph.nodes import operation
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Solution

#: Sends the signal at an operation's output back to its input.
Back = Callable[[Tensor], Tensor]

#: An operation's value, and how a signal comes back through it.
Recording = tuple[Tensor, Back]


@dataclass(frozen=True)
class Options:
    """How a pass reads the rules.

    Attributes:
        local: Use what the sample's forward pass recorded (equation 9). Without it, the chain is
            the global one, the same for all samples.
        shares: Send the signal of an average to where its value came from. Without it, evenly.
        bias: Keep the biases of the inverses, which gives the source signal S. Without them, it is
            the attribution A.
        packed: Record masks as bits, for what is kept long.
        evidence: Where the output is an average, send back what speaks for the output at each
            place, instead of each place's share in it.
    """

    local: bool = True
    shares: bool = True
    bias: bool = True
    packed: bool = False
    evidence: bool = False


@dataclass(frozen=True)
class Inverse:
    """A fitted inverse of one operation for one target.

    Attributes:
        weight: Coefficients of the signals that features share, shaped as the :class:`Inverter` has
            them, in the dtype of the model.
        bias: One value a feature or channel.
        live: Indices of the signals that ``weight`` has columns for; None for all.
        own: (features or channels, branches) coefficients of the signals that each feature has of
            its own; None where it has none.
        rows: (rows, features), where there were fewer examples than signals. Then ``weight`` is
            (rows, signals), and the coefficients are rowsᵀ weight. All classes share ``rows``.
    """

    weight: Tensor
    bias: Tensor
    live: Tensor | None = None
    own: Tensor | None = None
    rows: Tensor | None = None

    def fits(self, inverter: "Inverter") -> bool:
        """Return True if the shapes are those of this family; a file may hold anything."""
        groups, features, signals, branches = inverter.size
        count = groups * features
        rows = count if self.rows is None else len(self.rows)
        columns = signals if self.live is None else len(self.live)
        return (
            self.weight.numel() == rows * columns
            and self.bias.shape == (count // inverter.tied,)
            and getattr(self.own, "shape", None) == ((count, branches) if branches else None)
            and (self.rows is None or self.rows.shape == (rows, features))
            and (self.live is None or not ((self.live < 0) | (self.live >= signals)).any())
        )

    def to(self, other: Tensor) -> "Inverse":
        """Return this inverse in the dtype and on the device of ``other``."""
        parts: dict[str, Any] = {
            name: part.to(other if part.is_floating_point() else other.device)
            for name, part in vars(self).items()
            if part is not None
        }
        return Inverse(**parts)


class Inverter(Protocol):
    """A family of inverses x ≈ g(s): its regression and its application.

    Attributes:
        joins: Whether :meth:`moments` depends on its arguments alone, so that several batches can
            be passed as one.
    """

    joins: ClassVar[bool] = False

    @property
    def tied(self) -> int:
        """Return how many features in a row share a bias: ``tied`` of ``ridge.solve``."""
        return 1

    def part(self, examples: slice) -> "Inverter":
        """Return the same for some of the examples of the batch."""
        return self

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Return the size of the regression.

        Returns:
            Groups; in each, features, signals that they share, and signals of each feature's own.
        """
        ...

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        """Return the moments of one batch.

        Args:
            x: The features.
            signals: The signal at each output of the operation.
        """
        ...

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        """Return a solved regression as an inverse, in the dtype and on the device of ``like``."""
        ...

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        """Return g(S), with or without its bias."""
        ...


def at(*positions: int) -> Callable[[fx.Node], tuple[int, ...]]:
    """Return the ``carriers`` of a rule whose signal goes to the arguments at these positions."""
    return partial(_positions, positions)


def _positions(positions: tuple[int, ...], node: fx.Node) -> tuple[int, ...]:
    return positions


# The names of these two are part of what a file knows a registered rule by.
def _first(node: fx.Node) -> tuple[int, ...]:
    return (0,)


def _accept(node: fx.Node) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How an operation is treated.

    Attributes:
        note: What it does with the signal, in a few words.
        refuse: Node → why this use of the operation cannot be treated; None if it can.
        carriers: Node → positions of the arguments that carry signal. Several only where the rule
            :class:`Passes`. Other arguments that depend on the input are refused.
        records: Whether other arguments may depend on the input after all. They are recorded then,
            as gates and attention weights are, and get no signal.
        restores: Whether the signal it returns is in the units of its input.
        exact: Whether the rule is the paper's, or the only possible one. If not, reports say that
            it is one choice of several.
        caveat: Node → what of the method does not hold there; None if all holds.
    """

    note: str
    refuse: Callable[[fx.Node], str | None] = _accept
    carriers: Callable[[fx.Node], tuple[int, ...]] = _first
    records: bool = False
    restores: bool = True
    exact: bool = False
    caveat: Callable[[fx.Node], str | None] = _accept


@dataclass(frozen=True, kw_only=True)
class Passes(Rule):
    """A linear operation without weights, run as it is: its adjoint carries the signal."""


@dataclass(frozen=True, kw_only=True)
class Recorded(Rule):
    """An operation inverted by what its forward pass records.

    Attributes:
        run: (options, operation, x, \\*arguments) → the operation's value, and how a signal comes
            back. x is the argument that carries signal, whatever its position; the operation takes
            its arguments in this order as well.
        several: Whether x is a tuple of all arguments that carry signal; a tuple of their signals
            comes back then.
    """

    run: Callable[..., tuple[Tensor, Callable[[Tensor], Any]]]
    several: bool = False


@dataclass(frozen=True, kw_only=True)
class Learned(Rule):
    """An operation inverted by regression.

    Attributes:
        inverter: (options, x, \\*arguments) → the family of its inverse. x is the argument that
            carries signal.
    """

    inverter: Callable[..., Inverter]


def every(node: fx.Node) -> tuple[int, ...]:
    """Return the positions of all arguments: each carries signal."""
    return tuple(range(len(node.args)))


def depends(value: Any) -> bool:
    """Return True if an argument is computed from what is explained."""
    return isinstance(value, fx.Node) and marks(value).depends


def varies(value: Any) -> bool:
    """Return True if an argument is computed from the model's inputs."""
    return isinstance(value, fx.Node) and marks(value).varies


def is_gate(node: Any, counts: Callable[[Any], bool] = depends) -> bool:
    """Return True if a sigmoid, softmax or comparison made the value: it is a gate.

    It may have been rearranged since, and scaled or shifted by constants.
    """
    return operation(gate_source(node, counts)) in _GATES


def gate_source(node: Any, counts: Callable[[Any], bool]) -> Any:
    """Return the value from before it was rearranged, scaled or shifted; None if it is a mixture.

    Args:
        node: The value.
        counts: Returns False for constants.
    """
    # Walk back through what keeps a gate a gate: 1 − σ(x), 2 σ(x), σ(x).view(...).
    while operation(node) in _REARRANGED | _SCALED:
        rearranged = operation(node) in _REARRANGED
        sources = node.args[:1] if rearranged else [n for n in node.args if counts(n)]
        if len(sources) != 1 or (operation(node) == "div" and sources[0] is not node.args[0]):
            return None
        node = sources[0]
    return node


def factors(
    node: fx.Node, first: int = 0, counts: Callable[[Any], bool] = depends
) -> tuple[int, ...]:
    """Return the positions of the factors of a product that carry signal: those that are no gates.

    Args:
        node: The product.
        first: Position of its first factor.
        counts: Returns False for constants, which carry nothing.
    """
    positions = [i for i, n in enumerate(node.args) if i >= first and counts(n)]
    return tuple(i for i in positions if not is_gate(node.args[i], counts)) or tuple(positions)


_GATES = frozenset(
    {"sigmoid", "hardsigmoid", "softmax", "_softmax", "gt", "ge", "lt", "le", "eq", "ne",
     "logical_and", "logical_or", "logical_not"}
)  # fmt: skip
_SCALED = frozenset({"mul", "div", "add", "sub", "neg"})
_REARRANGED = frozenset(
    {"view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "permute", "transpose",
     "clone", "dropout", "contiguous", "flatten", "unflatten", "rsub", "slice", "select", "getitem",
     "chunk", "split", "unsafe_split", "alias", "_to_copy"}
)  # fmt: skip


def adjoint(operator: Callable[[Tensor], Tensor], like: Tensor) -> Back:
    """Return the adjoint of a linear operator on tensors shaped like ``like``."""
    return value_and_adjoint(operator, torch.zeros_like(like))[1]


def value_and_adjoint(operator: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Back]:
    """Return a linear operator's value at ``x``, and its adjoint."""
    # The gradient of ⟨s, P x⟩ with respect to x is Pᵀ s.
    with torch.enable_grad():
        probe = x.detach().requires_grad_()
        value = operator(probe)
    return value.detach(), lambda s: torch.autograd.grad(value, probe, s, retain_graph=True)[0]


def along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return one value a channel, shaped to broadcast with ``x`` and its channels along ``dim``."""
    return values.view(-1, *(1,) * (x.ndim - 1 - dim % x.ndim))
