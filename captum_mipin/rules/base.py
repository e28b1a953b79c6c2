"""The three kinds of rule, and what a learned inverse is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import marks
from captum_mipin.graph.nodes import operation
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Solution

#: Sends the signal at an operation's output back to its input.
Back = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """How a pass reads the rules.

    Attributes:
        local: Use what the sample's forward pass recorded (equation 9). Without, the chain is the global one.
        shares: Average pooling sends the signal to where the value came from; without, it spreads it evenly.
        bias: Keep the biases of the inverses: the source signal S. Without: the attribution A.
        packed: Record masks as bits, for what is kept long.
        evidence: Of an average that the output is, send back what at each place speaks for the output, not its share in it.
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
        weight: Coefficients of the signals that features share, shaped as its :class:`Inverter` wants them, in the dtype
            of the model.
        bias: One value a feature or channel.
        live: Indices of the signals that ``weight`` has columns for; None for all.
        own: (features or channels, branches) coefficients of the signals that each has of its own; None where it has none.
        rows: (rows, features) where there were fewer examples than signals: ``weight`` (rows, signals) is to be multiplied by
            its transpose. Classes share it.
    """

    weight: Tensor
    bias: Tensor
    live: Tensor | None = None
    own: Tensor | None = None
    rows: Tensor | None = None

    def fits(self, inverter: "Inverter") -> bool:
        """Whether it can be an inverse of this family: files may hold anything."""
        groups, features, signals, branches = inverter.size
        columns = signals if self.live is None else len(self.live)
        rows = groups * features if self.rows is None else len(self.rows)
        own = None if self.own is None else self.own.shape
        return (
            self.weight.numel() == rows * columns
            and self.bias.shape == (groups * features // inverter.tied,)
            and own == ((groups * features, branches) if branches else None)
            and (self.rows is None or self.rows.shape == (rows, features))
            and (
                columns == 0
                or self.live is None
                or bool(((self.live >= 0) & (self.live < signals)).all())
            )
        )

    def to(self, other: Tensor) -> "Inverse":
        """This inverse in the dtype and on the device of ``other``."""
        if self.weight.dtype == other.dtype and self.weight.device == other.device:
            return self
        live = None if self.live is None else self.live.to(other.device)
        own, rows = (None if part is None else part.to(other) for part in (self.own, self.rows))
        return Inverse(self.weight.to(other), self.bias.to(other), live, own, rows)


class Inverter(Protocol):
    """A family of inverses x ≈ g(s): its regression and its application.

    Attributes:
        joins: Whether :meth:`moments` looks at nothing but its arguments, so that it can be given several batches as one.
    """

    joins: ClassVar[bool] = False

    @property
    def tied(self) -> int:
        """How many features in a row share their bias, see :func:`captum_mipin.regression.ridge.solve`."""
        return 1

    def part(self, examples: slice) -> "Inverter":
        """The same for some of the examples of the batch."""
        return self

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Groups of the regression; in each the features, the signals they share, and the signals of each feature's own."""
        ...

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        """Moments of one batch: features ``x`` and the signals at the operation's outputs."""
        ...

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        """The inverse that a solved regression stands for, in the dtype and on the device of ``like``."""
        ...

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        """g(S), with or without its bias."""
        ...


def _accept(node: fx.Node) -> str | None:
    return None


def _first(node: fx.Node) -> tuple[int, ...]:
    return (0,)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How an operation is treated.

    Attributes:
        note: What it does with the signal, in a few words.
        refuse: Node → reason why this use of the operation cannot be treated, or None.
        carriers: Node → positions of the arguments that carry signal, several only where the rule :class:`Passes`. Others are
            refused if they depend on the input,
        records: unless this says that they are recorded, as gates and attention weights are: no signal goes there.
        restores: Whether the signal it returns is in the units of its input.
        exact: Whether it is the paper's, or the only one there can be; else it is one choice of several, to be told so.
        caveat: Node → what of the method does not hold there, or None.
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
    """A linear operation without weights: the surrogate runs it as it is, and its adjoint carries the signal."""


@dataclass(frozen=True, kw_only=True)
class Recorded(Rule):
    """An operation inverted by what its forward pass records.

    Attributes:
        run: (options, operation, x, \\*arguments) → the operation's value, and how a signal comes back. x is the argument
            that carries signal, whatever its position; the operation is called in this order as well.
        several: Whether x is a tuple of all arguments that carry signal, and what comes back a tuple of their signals.
    """

    run: Callable[..., tuple[Tensor, Callable[[Tensor], Any]]]
    several: bool = False


@dataclass(frozen=True, kw_only=True)
class Learned(Rule):
    """An operation inverted by regression.

    Attributes:
        inverter: (options, x, \\*arguments) → the family of its inverse; x is the argument that carries signal.
    """

    inverter: Callable[..., Inverter]


def each(value: Any, dims: int) -> tuple[int, ...]:
    """One number a dimension, from one for all or one each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def every(node: fx.Node) -> tuple[int, ...]:
    """All arguments carry signal."""
    return tuple(range(len(node.args)))


def depends(value: Any) -> bool:
    """Whether an argument is computed from what is explained."""
    return isinstance(value, fx.Node) and marks(value).depends


def varies(value: Any) -> bool:
    """Whether an argument is computed from the model's inputs, wherever the explanation starts."""
    return isinstance(value, fx.Node) and marks(value).varies


def is_gate(node: Any, counts: Callable[[Any], bool] = depends) -> bool:
    """Whether a value is a gate or attention weights: what a sigmoid, softmax or comparison made.

    It may have been rearranged since, and scaled or shifted by constants.
    """
    return operation(gate_source(node, counts)) in _GATES


def gate_source(node: Any, depends: Callable[[Any], bool]) -> Any:
    """What a value was made of before it was rearranged, scaled or shifted; ``depends`` tells constants apart."""
    while operation(node) in _REARRANGED | _SCALED:
        made_from = (
            node.args[:1]
            if operation(node) in _REARRANGED
            else [n for n in node.args if depends(n)]
        )
        if len(made_from) != 1 or (operation(node) == "div" and made_from[0] is not node.args[0]):
            return None
        node = made_from[0]
    return node


def factors(
    node: fx.Node, first: int = 0, counts: Callable[[Any], bool] = depends
) -> tuple[int, ...]:
    """Positions of the factors of a product, the first of them given, that carry signal: those that are no recorded gates.

    What ``counts`` says of them tells those that may from constants.
    """
    positions = [i for i, n in enumerate(node.args) if i >= first and counts(n)]
    return tuple(i for i in positions if not is_gate(node.args[i], counts)) or tuple(positions)


_GATES = frozenset(
    {"sigmoid", "hardsigmoid", "softmax", "_softmax", "gt", "ge", "lt", "le", "eq", "ne",
     "logical_and", "logical_or", "logical_not"}
)  # fmt: skip
_SCALED = frozenset({"mul", "div", "add", "sub", "neg"})
_REARRANGED = frozenset(
    {"view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "permute", "transpose", "clone", "dropout",
     "contiguous", "flatten", "unflatten", "rsub", "slice", "select", "getitem", "chunk", "split",
     "unsafe_split", "alias", "_to_copy"}
)  # fmt: skip


def adjoint(operator: Callable[[Tensor], Tensor], like: Tensor) -> Back:
    """The adjoint of a linear operator on tensors shaped like ``like``."""
    return value_and_adjoint(operator, torch.zeros_like(like))[1]


def value_and_adjoint(operator: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Back]:
    """A linear operator's value at ``x``, and its adjoint."""
    with torch.enable_grad():
        probe = x.detach().requires_grad_()
        value = operator(probe)
    return value.detach(), lambda s: torch.autograd.grad(value, probe, s, retain_graph=True)[0]
