"""The three kinds of rule, and the parts of a learned inverse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import marks
from captum_mipin.regression.moments import Moments
from captum_mipin.regression.ridge import Part, Solution

#: Function: signal at an operation's output → signal at its input.
Back = Callable[[Tensor], Tensor]

#: The result of an operation, and the function that sends a signal back through the operation.
Recording = tuple[Tensor, Back]


@dataclass(frozen=True)
class Options:
    """The options of the rules in one pass.

    Attributes:
        local: Use the values recorded in the sample's forward pass (equation 9). If False, the
            backward pass is the same function for all samples.
        shares: Distribute the signal of an average in proportion to the averaged values. If False,
            distribute it evenly.
        bias: Add the biases of the inverses; the result is the source signal S. If False, the
            result is the attribution A.
        packed: Store masks as bits, to save memory.
        evidence: For an output that is an average: send back the evidence for the output at each
            position, instead of the position's share in it.
        contrast: With ``evidence``, the dimension of the classes in the averaged tensor: evidence
            is what the target has beyond all other classes. None: all that the target has.

    Examples:
        >>> Options().shares, Options(shares=False).shares
        (True, False)
    """

    local: bool = True
    shares: bool = True
    bias: bool = True
    packed: bool = False
    evidence: bool = False
    contrast: int | None = None


@dataclass(frozen=True)
class Inverse:
    """A fitted inverse of one operation for one target.

    Attributes:
        weight: Tensor of the coefficients W, in the dtype of the model. The :class:`Inverter`
            determines its shape.
        bias: Tensor (features or channels,), the bias b.
        live: Integer tensor (columns,) with the indices of the signals for which ``weight`` has
            columns; None if it has columns for all signals.
        own: Tensor (features or channels, branches) of coefficients for signals that belong to a
            single feature each; None if there are no such signals.
        rows: Tensor (rows, features), or None. It is used if the fit had fewer examples than
            signals: then ``weight`` is (rows, signals), and W = rowsᵀ weight. All classes share it.

    Examples:
        >>> Inverse(torch.ones(2, 3), torch.zeros(3)).weight.shape
        torch.Size([2, 3])
    """

    weight: Tensor
    bias: Tensor
    live: Tensor | None = None
    own: Tensor | None = None
    rows: Tensor | None = None

    def fits(self, inverter: "Inverter") -> bool:
        """Return True if the tensors have the shapes that ``inverter`` needs.

        A file may contain tensors of any shape.
        """
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
        if self.weight.dtype == other.dtype and self.weight.device == other.device:
            return self
        parts: dict[str, Any] = {
            name: part.to(other if part.is_floating_point() else other.device)
            for name, part in vars(self).items()
            if part is not None
        }
        return Inverse(**parts)


class Inverter(Protocol):
    """A family of inverses x ≈ g(s): the regression that fits them, and their application.

    Attributes:
        joins: Whether :meth:`moments` depends only on its arguments. Then the arguments of several
            batches can be concatenated and passed at once.

    Examples:
        >>> from captum_mipin.rules import table
        >>> rule = table()["aten.linear.default"]
        >>> inverter = rule.inverter(Options(), torch.rand(9, 3), torch.rand(2, 3))
        >>> inverter.tied, inverter.joins
        (1, True)
    """

    joins: ClassVar[bool] = False

    @property
    def tied(self) -> int:
        """Return the number of consecutive features with one bias: ``tied`` of ``ridge.solve``."""
        return 1

    @property
    def parts(self) -> Sequence[Part]:
        """Return the parts of the signals that are solved one by one: ``parts`` of ``solve``."""
        return ()

    @property
    def blocks(self) -> Sequence[Tensor]:
        """Return the ``parts`` of the :class:`Moments` that :meth:`moments` returns."""
        return ()

    def part(self, examples: slice) -> "Inverter":
        """Return the family for the selected examples of the batch."""
        return self

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Return the size of the regression.

        Returns:
            Number of groups; number of features per group; number of signals that all features of a
            group share; number of signals that belong to a single feature.
        """
        ...

    def moments(self, x: Tensor, signals: tuple[Tensor, ...]) -> Moments:
        """Return the moments of one batch, from which the regression is solved.

        Args:
            x: Tensor of the features, the input of the operation.
            signals: One tensor per output of the operation, the signal there.
        """
        ...

    def inverse(self, solution: Solution, like: Tensor) -> Inverse:
        """Return the inverse from a solved regression, with dtype and device of ``like``."""
        ...

    def apply(self, inverse: Inverse, signals: tuple[Tensor, ...], bias: bool) -> Tensor:
        """Return g(S), with its bias if ``bias`` is True."""
        ...


def at(*positions: int) -> Callable[[fx.Node], tuple[int, ...]]:
    """Return a function for ``carriers=``: the arguments at ``positions`` carry signal."""
    return partial(_positions, positions)


def _positions(positions: tuple[int, ...], node: fx.Node) -> tuple[int, ...]:
    return positions


# Saved files contain the names of these two functions in the descriptions of registered rules.
def _first(node: fx.Node) -> tuple[int, ...]:
    return (0,)


def _accept(node: fx.Node) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule: the treatment of an operation in the backward pass of the signal.

    Attributes:
        note: Description of the treatment in a few words.
        refuse: Function: node → the reason why this use of the operation is not supported, or None.
        carriers: Function: node → positions of the arguments that carry signal. It may return
            several positions for :class:`Passes`, and for :class:`Recorded` with ``several``.
        records: Whether arguments that carry no signal may depend on the input. If True, they are
            recorded, like gates and attention weights; if False, such a use is refused.
        restores: Whether the signal that the rule sends back has the units of the operation's
            input.
        exact: Whether the rule is that of the paper, or the only possible one. If False, reports
            mark it as one choice of several.
        caveat: Function: node → the property of the method that does not hold at this node, or
            None.

    Examples:
        >>> from captum_mipin.rules import table
        >>> rule = table()["aten.relu.default"]
        >>> isinstance(rule, Rule), rule.records
        (True, False)
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
    """The rule of a linear operation without weights: its adjoint sends the signal back.

    Examples:
        >>> from captum_mipin.rules import register_rule, unregister_rule
        >>> @torch.library.custom_op("doctest::turn", mutates_args=())
        ... def turn(x: Tensor) -> Tensor:
        ...     return x.flip(1)
        >>> register_rule("doctest::turn", Passes(note="turned back"))
        >>> unregister_rule("doctest::turn")
    """


@dataclass(frozen=True, kw_only=True)
class Recorded(Rule):
    """The rule of an operation that is inverted by values recorded in its forward pass.

    Attributes:
        run: Function (options, operation, x, \\*arguments) → (the result of the operation, the
            function that sends a signal back). x is the argument that carries signal, at whatever
            position the model passes it; ``operation`` must be called with x first as well.
        several: Whether several arguments carry signal. Then x is the tuple of these arguments, and
            the function returns a tuple of signals.

    Examples:
        >>> def send_back(options, operation, x):
        ...     share = torch.sigmoid(x)  # the share of x in x * sigmoid(x)
        ...     return operation(x), lambda s: s * share
        >>> value, back = send_back(Options(), lambda x: x * torch.sigmoid(x), torch.zeros(2))
        >>> Recorded(run=send_back, note="recorded gate").note, back(torch.ones(2)).tolist()
        ('recorded gate', [0.5, 0.5])
    """

    run: Callable[..., tuple[Tensor, Callable[[Tensor], Any]]]
    several: bool = False


@dataclass(frozen=True, kw_only=True)
class Learned(Rule):
    """The rule of an operation that is inverted by a regression.

    Attributes:
        inverter: Function (options, x, \\*arguments) → the family of the inverse. x is the argument
            that carries signal.

    Examples:
        >>> from captum_mipin.rules import table
        >>> rule = table()["aten.linear.default"]
        >>> inverter = rule.inverter(Options(), torch.rand(9, 3), torch.rand(2, 3))
        >>> inverter.size  # one regression of 3 features on 2 signals
        (1, 3, 2, 0)
    """

    inverter: Callable[..., Inverter]


def every(node: fx.Node) -> tuple[int, ...]:
    """Return the positions of all arguments, for a rule that sends signal to all arguments."""
    return tuple(range(len(node.args)))


def depends(value: Any) -> bool:
    """Return True if an argument is computed from the explained tensors."""
    return isinstance(value, fx.Node) and marks(value).depends


def varies(value: Any) -> bool:
    """Return True if an argument is computed from the model's inputs."""
    return isinstance(value, fx.Node) and marks(value).varies


def is_floating(value: Any) -> bool:
    """Return True if a traced value is a floating tensor, or a list or tuple with such a tensor."""
    if isinstance(value, (tuple, list)):
        return any(map(is_floating, value))
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class OwnOperation:
    """An operation that a rewrite inserts, with a rule of its own.

    Attributes:
        name: Name of the operation; its rule is that of "captum_mipin.<name>.default".
        run: Function that computes the operation.
    """

    name: str
    run: Callable[..., Any]

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *arguments: Any) -> Any:
        """Run the operation."""
        return self.run(*arguments)

    def __repr__(self) -> str:
        return f"captum_mipin.{self.name}.default"


def adjoint(operator: Callable[[Tensor], Tensor], like: Tensor) -> Back:
    """Return the adjoint of a linear operator on tensors of the shape of ``like``."""
    return value_and_adjoint(operator, torch.zeros_like(like))[1]


def value_and_adjoint(operator: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Back]:
    """Return the value of a linear operator P at ``x``, and the adjoint of P."""
    # The gradient of ⟨s, P x⟩ with respect to x is Pᵀ s.
    with torch.enable_grad():
        probe = x.detach().requires_grad_()
        value = operator(probe)
    return value.detach(), lambda s: torch.autograd.grad(value, probe, s, retain_graph=True)[0]


def derivative(operator: Callable[..., Tensor], x: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
    """Return an operator's value, and autograd's backward function: s → one tensor per ``x``."""
    with torch.enable_grad():
        probes = tuple(part.detach().requires_grad_() for part in x)
        value = operator(probes)
    return value.detach(), lambda s: torch.autograd.grad(value, probes, s, retain_graph=True)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, and 0 where below is 0."""
    return above / below.masked_fill(below == 0, torch.inf)


def along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return ``values``, one per channel, in a shape that broadcasts along ``dim`` of ``x``."""
    return values.view(-1, *(1,) * (x.ndim - 1 - dim % x.ndim))
