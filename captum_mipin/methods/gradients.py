"""Gradients, and methods that are gradients but for their activations: Deconvnet and Guided Backprop.

Every operation has its derivative, except rectifiers, which gate what is sent back: Deconvnet by the sign of that itself,
Guided Backprop by that and by what the forward pass recorded. Both were defined for ReLU. For its bounded and smooth kin the
derivative stands where the mask of ReLU is; sigmoids and tanh are no rectifiers, and keep their derivative in both methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.capture import CapturedGraph, capture
from captum_mipin.graph.marks import mark, original, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.methods.base import Signal, Table
from captum_mipin.propagation.runtime import seed
from captum_mipin.rules import MIPIN, Options, Passes, Recorded, Rule
from captum_mipin.rules.activations import ACTIVATIONS
from captum_mipin.rules.base import Back, depends, gate_source, varies
from captum_mipin.types import Extras, Inputs, Target

#: Operations that are rectifiers whatever their arguments, besides ReLU.
_RECTIFIERS = (
    "threshold", "silu", "gelu", "hardswish", "leaky_relu", "elu", "celu", "selu", "mish", "softplus",
    "_prelu_kernel", "prelu", "rrelu",
)  # fmt: skip
#: Activations that are none.
_OTHERS = ("tanh", "sigmoid", "hardsigmoid", "log_sigmoid", "glu")
_COMPARISONS = ("gt", "ge", "lt", "le")
#: Operations through which autograd sends nothing back.
_NO_DERIVATIVE = ("heaviside", "nextafter")
#: Gates by which their own argument is multiplied, and what that makes.
_SMOOTH = {"sigmoid": torch.ops.aten.silu.default, "hardsigmoid": torch.ops.aten.hardswish.default}


class _Derived(Signal):
    """A gradient, but for its rectifiers."""

    def _start(self, output: Tensor, targets: Sequence[Target]) -> Tensor:
        return seed(output, targets, unit=True)

    def _capture(self, inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
        return capture(
            self.model, inputs, extras, shared, output=self.output, explained=False, detached=True
        )


class Gradient(_Derived):
    """The gradient of an output, at the input or, by :class:`~captum_mipin.LayerPropagation`, at a layer.

    It is that of the operations that the model runs: what an ``autograd.Function`` gives for one, by a ``backward`` of its
    own, is not asked for.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.

    Source: Simonyan et al., ICLR 2014 (workshop), with its sign.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).eval()
        >>> Gradient(model).attribute(torch.randn(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    _name = "Gradient"

    def _table(self) -> Table:
        return Table(
            _OWN, other=Passes(note="derivative", carriers=_floating, records=True, exact=True)
        )


class Deconvnet(_Derived):
    """Deconvnet: a gradient whose rectifiers let pass what is positive of what is sent back, whatever the forward pass did.

    Max pooling sends back to its switches, and everything else has its derivative. Rectifiers are ReLU in any spelling (as a
    module, in place, as a function, ``clamp``, ``maximum`` with 0, ``where`` and products with comparisons), ReLU6 and other
    ``clamp`` from 0, threshold, SiLU (``x * sigmoid(x)`` as well), GELU, Hardswish, LeakyReLU, PReLU, ELU, CELU, SELU, Mish and
    softplus; sigmoid, tanh and the like are none.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.

    Source: Zeiler and Fergus, ECCV 2014.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
        >>> Deconvnet(model).attribute(torch.randn(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    _name = "Deconvnet"

    def _table(self) -> Table:
        return _gated(forward=False)


class GuidedBackprop(_Derived):
    """Guided Backprop: a gradient whose rectifiers let pass only what is positive of what is sent back.

    Rectifiers are those of :class:`Deconvnet`. Of ReLU6, SiLU, GELU and their like, the derivative stands for the mask of ReLU.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.

    Source: Springenberg et al., ICLR 2015 (workshop).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
        >>> GuidedBackprop(model).attribute(torch.randn(2, 4), target=[1, 2]).shape
        torch.Size([2, 4])
    """

    _name = "Guided Backprop"

    def _table(self) -> Table:
        return _gated(forward=True)


def _gated(forward: bool) -> Table:
    """The table of Deconvnet, or with the forward pass that of Guided Backprop."""
    note = "what is positive of what is sent back" + (", times the forward mask" if forward else "")
    kin = "what is positive of what is sent back" + (", times the derivative" if forward else "")
    rules: dict[str, Rule] = {
        **_OWN,
        "aten.relu.default": Recorded(run=partial(_relu, forward), note=note, exact=True),
        **{
            f"aten.{name}.default": Recorded(
                run=partial(_rectifier, forward), note=kin, caveat=_kin
            )
            for name in _RECTIFIERS
        },
        **{f"aten.{name}.default": Passes(note="derivative", caveat=_none) for name in _OTHERS},
    }
    for what, run in (("clip", _clip), ("bound", _bound), ("switch", _switch)):
        rules[str(Gate(what))] = Recorded(
            run=partial(run, forward), note=note, carriers=_carrier, records=True, caveat=_spelled
        )
    other = Passes(
        note="derivative", carriers=_floating, records=True, refuse=_hidden, caveat=_unknown
    )
    return Table(rules, rewrite=_gates, other=other)


def derivative(
    operation: Any, x: tuple[Tensor, ...], *arguments: Any, **named: Any
) -> tuple[Tensor, Any]:
    """An operation's value, and what autograd sends back through it: one tensor for each of ``x``."""
    with torch.enable_grad():
        probes = tuple(part.detach().requires_grad_() for part in x)
        value = operation(probes, *arguments, **named)
    return value.detach(), lambda s: torch.autograd.grad(value, probes, s, retain_graph=True)


def _relu(forward: bool, options: Options, operation: Any, x: Tensor) -> tuple[Tensor, Back]:
    value = operation(x).detach()
    if not forward:
        return value, lambda s: s.clamp(min=0)
    return value, lambda s: torch.ops.aten.threshold_backward(s.clamp(min=0), value, 0)


def _rectifier(
    forward: bool, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    """s⁺, with ``forward`` times the derivative."""
    if not forward:
        return operation(x, *arguments, **named), lambda s: s.clamp(min=0)
    value, back = derivative(
        lambda xs, *others, **more: operation(*xs, *others, **more), (x,), *arguments, **named
    )
    return value, lambda s: back(s.clamp(min=0))[0]


def _clip(
    forward: bool, options: Options, operation: Any, x: Tensor, low: Any, high: Any
) -> tuple[Tensor, Back]:
    """ReLU, ReLU6 and their like, however they are written: nothing comes back from where x is on a bound or outside."""
    value = operation(x, low, high)
    if not forward:
        return value, lambda s: s.clamp(min=0)
    kept = x < high if low is None else x > low if high is None else (x > low) & (x < high)
    return value, lambda s: s.clamp(min=0) * kept


def _bound(
    forward: bool, options: Options, operation: Any, x: Tensor, bound: Tensor
) -> tuple[Tensor, Back]:
    """``maximum`` or ``minimum`` of x and a constant."""
    value = operation(x, bound)
    kept = (value == x) & (x != bound)
    return value, lambda s: (s.clamp(min=0) * kept if forward else s.clamp(min=0)).sum_to_size(
        x.shape
    )


def _switch(
    forward: bool, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    """X where a comparison of the example holds, else a constant."""
    if not forward:
        return operation(x, *arguments, **named), lambda s: s.clamp(min=0).sum_to_size(x.shape)
    return _rectifier(forward, options, operation, x, *arguments, **named)


@dataclass(frozen=True)
class Gate:
    """A rectifier that is written otherwise, as an operation of the graph.

    Attributes:
        what: "clip", "bound" or "switch".
        name: Of the operation that it was made of.
        operation: It.
        at: Position of the argument that carries signal.
    """

    what: str
    name: str = ""
    operation: Any = None
    at: int = 0

    @property
    def __name__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return f"captum_mipin.{self.what}"

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run it."""
        return self.operation(*arguments, **named)


def _gates(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Let rectifiers that are written with bounds, comparisons and masks be operations of their own."""
    node: Any
    for node in list(graph.nodes):
        if not varies(node) or node.op != "call_function":
            continue
        name, shown = operation(node), original(node)
        if name in ("clamp", "clamp_min", "clip", "clamp_max", "hardtanh", "relu6"):
            low, high = _bounds(node, name)
            numbers = not isinstance(low, fx.Node) and not isinstance(high, fx.Node)
            if numbers and not (low is not None and low < 0 and high is not None):
                node.target, node.args, node.kwargs = (
                    Gate("clip", name, torch.clamp),
                    (node.args[0], low, high),
                    {},
                )
            elif (
                not numbers
                and (low is None or high is None)
                and not varies(low)
                and not varies(high)
            ):
                least = torch.maximum if high is None else torch.minimum
                node.target, node.args, node.kwargs = (
                    Gate("bound", name, least),
                    (node.args[0], low or high),
                    {},
                )
        elif (
            name in ("maximum", "max", "minimum", "min")
            and len(node.args) == 2
            and sum(map(varies, node.args)) == 1
        ):
            node.target = Gate("bound", name, node.target, at=0 if varies(node.args[0]) else 1)
        elif name in ("where", "masked_fill"):
            at = [i for i, n in enumerate(node.args) if varies(n) and _is_floating(n)]
            if len(at) == 1 and varies(node.args[name == "masked_fill"]):
                node.target = Gate("switch", name, node.target, at[0])
        elif name == "mul" and len(node.all_input_nodes) == 2 and not smooth_gate(node):
            for this, (x, gate) in enumerate((node.args, node.args[::-1])):
                if (
                    operation(gate_source(gate, varies)) in _COMPARISONS
                    and varies(gate)
                    and varies(x)
                    and _is_floating(x)
                ):
                    node.target = Gate("switch", name, node.target, this)
                    break
        if node.target is not shown:
            mark(node, original=shown)


def smooth_gate(node: Any) -> bool:
    """Whether a product is ``x * sigmoid(x)`` or ``x * hardsigmoid(x)``; it becomes SiLU or Hardswish."""
    for x, gate in (node.args, node.args[::-1]):
        if operation(gate) in _SMOOTH and gate.args[0] is x:
            mark(node, original=node.target)
            node.target, node.args = _SMOOTH[operation(gate)], (x,)
            return True
    return False


def _bounds(node: Any, name: str) -> tuple[Any, Any]:
    if name == "relu6":
        return 0.0, 6.0
    if name == "clamp_max":
        return None, argument(node, 1, "max")
    if name == "hardtanh":
        return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return argument(node, 1, "min"), argument(node, 2, "max")


def _is_floating(node: Any) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _floating(node: fx.Node) -> tuple[int, ...]:
    """The arguments that a derivative is taken by."""
    return tuple(
        i
        for i, n in enumerate(node.args)
        if any(map(_is_floating, n if isinstance(n, (tuple, list)) else (n,)))
    )


def _copied(
    options: Options, operation: Any, x: Tensor, over: Tensor, *arguments: Any
) -> tuple[Tensor, Back]:
    """X in the place, and in the shape and dtype, of another tensor."""
    return operation(x, over, *arguments), lambda s: s.sum_to_size(x.shape).to(x.dtype)


def _second(node: Any) -> tuple[int, ...]:
    return (1,)


def _nothing(node: Any) -> tuple[int, ...]:
    return ()


def _carrier(node: Any) -> tuple[int, ...]:
    return (node.target.at,)


def _hidden(node: fx.Node) -> str | None:
    """Whether a rectifier may hide in an operation that has its derivative, or a derivative in its further arguments."""
    if operation(node) in _NO_DERIVATIVE:
        return "it has no derivative, and may be part of a rectifier: use relu, clamp or maximum"
    switches = [n for n in node.all_input_nodes if depends(n) and not _is_floating(n)]
    if switches:
        return "it chooses by a comparison of values that depend on the input, as a rectifier does: use relu, clamp or maximum"
    if any(depends(n) and _is_floating(n) for n in node.kwargs.values()):
        return "a further argument of it depends on the input as well"
    return None


def _kin(node: fx.Node) -> str:
    return "outside of the definition: kin of ReLU, treated as one"


def _none(node: fx.Node) -> str:
    return "outside of the definition: no rectifier, has its derivative"


def _unknown(node: fx.Node) -> str | None:
    known = str(node.target) in MIPIN and str(node.target) not in ACTIVATIONS
    return (
        None
        if known
        else "has its derivative: if it is a rectifier, or part of one, it is not treated as such"
    )


def _spelled(node: Any) -> str | None:
    high = node.args[2] if node.target.what == "clip" else None
    return None if high is None else _kin(node)


#: Operations whose derivative autograd does not have as it is meant: what the model detaches, and what it assigns to a part.
_OWN: dict[str, Rule] = {
    "aten.detach.default": Passes(
        note="no derivative", carriers=_nothing, records=True, exact=True
    ),
    "aten.copy.default": Recorded(
        run=_copied, note="derivative", carriers=_second, records=True, exact=True
    ),
}
