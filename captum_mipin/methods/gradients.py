"""Gradients, and two methods that differ from them at rectifiers: Deconvnet, Guided Backprop.

Every operation has its derivative, except rectifiers such as y = x⁺. There, with the signal s at y:

    gradient          s · [x > 0]
    Deconvnet         s⁺
    Guided Backprop   s⁺ · [x > 0]

These are defined for ReLU. For its bounded and smooth relatives (ReLU6, SiLU, ...) the derivative
stands for the mask [x > 0]. Sigmoid and tanh are no rectifiers, and keep their derivative.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import mark, original, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.methods.base import NamedOperation, Signal, Table
from captum_mipin.rules import MIPIN, Options, Passes, Recorded, Rule
from captum_mipin.rules.activations import ACTIVATIONS
from captum_mipin.rules.base import Back, depends, gate_source, value_and_adjoint, varies

#: Operations besides ReLU that are rectifiers with any arguments.
_RECTIFIERS = (
    "threshold", "silu", "gelu", "hardswish", "leaky_relu", "elu", "celu", "selu", "mish",
    "softplus", "_prelu_kernel", "prelu", "rrelu",
)  # fmt: skip
#: Activations that are no rectifiers.
_OTHERS = ("tanh", "sigmoid", "hardsigmoid", "log_sigmoid", "glu")
#: Operations that are rectifiers if their bounds are those of one.
_CLAMPS = ("clamp", "clamp_min", "clip", "clamp_max", "hardtanh", "relu6")
_COMPARISONS = ("gt", "ge", "lt", "le")
#: Operations through which autograd sends nothing back.
_NO_DERIVATIVE = ("heaviside", "nextafter")
#: σ in x · σ(x) → the operation that the product is.
_SMOOTH = {"sigmoid": torch.ops.aten.silu.default, "hardsigmoid": torch.ops.aten.hardswish.default}


class _Derived(Signal):
    """The base of gradients and their variants, which start with 1 and follow ``detach()``."""

    _unit = True
    _detached = True


class Gradient(_Derived):
    """The gradient ∂Φ_c/∂x; with :class:`LayerPropagation`, that at a layer.

    It is the gradient of the operations that the model runs: the ``backward`` of an
    ``autograd.Function`` is not used.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.

    Source: Simonyan et al., ICLR 2014 (workshop), with its sign.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
        >>> Gradient(model).attribute(torch.randn(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    _name = "Gradient"

    def _table(self) -> Table:
        return Table(_OWN, other=_derivative(exact=True))


class _Gated(_Derived):
    """The base of methods that pass s⁺ at rectifiers, where s is the signal."""

    #: Whether the forward mask [x > 0] applies as well.
    _masked = False

    def _table(self) -> Table:
        part = "positive part of the signal"
        mask = ", times the forward mask" if self._masked else ""
        slope = ", times the derivative" if self._masked else ""
        rules: dict[str, Rule] = {
            **_OWN,
            "aten.relu.default": Recorded(
                run=partial(_rectifier, self._masked, _relu), note=part + mask, exact=True
            ),
        }
        for name in _RECTIFIERS:
            run = partial(_rectifier, self._masked, _slope)
            rules[f"aten.{name}.default"] = Recorded(run=run, note=part + slope, caveat=_relative)
        for name in _OTHERS:
            rules[f"aten.{name}.default"] = Passes(note="derivative", caveat=_no_rectifier)
        for name, back_of in _GATES.items():
            rules[name] = Recorded(
                run=partial(_rectifier, self._masked, back_of),
                note=part + mask,
                carriers=_carrier,
                records=True,
                caveat=_gate_caveat,
            )
        return Table(rules, _rewrite, other=_derivative(refuse=_hides_rectifier, caveat=_unknown))


class Deconvnet(_Gated):
    """Deconvnet: a gradient that passes only the positive part s⁺ of the signal at rectifiers.

    Maximum pooling sends it back to its switches; everything else has its derivative. Rectifiers
    are ReLU in any spelling (a module, in place, a function, ``clamp``, ``maximum`` with 0,
    ``where`` and products with comparisons), ReLU6 and other ``clamp`` from 0, threshold, SiLU
    (also as ``x * sigmoid(x)``), GELU, Hardswish, LeakyReLU, PReLU, ELU, CELU, SELU, Mish and
    softplus. Sigmoid, tanh and the like are none.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.

    Source: Zeiler and Fergus, ECCV 2014.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> Deconvnet(model).attribute(torch.randn(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    _name = "Deconvnet"


class GuidedBackprop(_Gated):
    """Guided Backprop: a gradient that passes only s⁺ · [x > 0] at rectifiers.

    Rectifiers are those of :class:`Deconvnet`. For ReLU6, SiLU, GELU and their like, the derivative
    stands for the mask.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.

    Source: Springenberg et al., ICLR 2015 (workshop).

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> GuidedBackprop(model).attribute(torch.randn(2, 4), target=[1, 2]).shape
        torch.Size([2, 4])
    """

    _name = "Guided Backprop"
    _masked = True


# ------------------------------------------------------------------------------------- the way back


def run_operator(
    back_of: Callable[..., Any],
    options: Options,
    operation: Any,
    x: Any,
    *arguments: Any,
    **named: Any,
) -> Any:
    """Run a rule, bound to it by ``partial``, that is a function of an operator and x.

    Args:
        back_of: (operator, x) → the operator's value at x, and how a signal comes back. x is a
            tensor, or a tuple if several arguments carry signal.
        options: Not used: these rules have none.
        operation: The operation; with all arguments but x as they are, it is the operator.
        x: What carries signal.
        arguments: The other arguments.
        named: Arguments by name.
    """
    return back_of(lambda t: operation(t, *arguments, **named), x)


def derivative(operator: Callable[..., Tensor], x: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
    """Return an operator's value, and what autograd sends back: one tensor for each of ``x``."""
    with torch.enable_grad():
        probes = tuple(part.detach().requires_grad_() for part in x)
        value = operator(probes)
    return value.detach(), lambda s: torch.autograd.grad(value, probes, s, retain_graph=True)


def _rectifier(
    masked: bool,
    back_of: Callable[..., tuple[Tensor, Back]],
    options: Options,
    operation: Any,
    x: Tensor,
    *arguments: Any,
    **named: Any,
) -> tuple[Tensor, Back]:
    """Run a rectifier, and send back s⁺, times its mask or derivative if ``masked``."""
    if not masked:
        value = operation(x, *arguments, **named)
        return value, lambda s: s.clamp(min=0).sum_to_size(x.shape)
    value, back = back_of(operation, x, *arguments, **named)
    return value, lambda s: back(s.clamp(min=0))


def _relu(operation: Any, x: Tensor) -> tuple[Tensor, Back]:
    """Return s · [x > 0]."""
    value = operation(x).detach()
    return value, lambda s: torch.ops.aten.threshold_backward(s, value, 0)


def _slope(operation: Any, x: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Back]:
    """Return s times the derivative."""
    return value_and_adjoint(lambda t: operation(t, *arguments, **named), x)


def _clip(operation: Any, x: Tensor, low: Any, high: Any) -> tuple[Tensor, Back]:
    """Return s · [low < x < high] for bounds that are numbers or None."""
    inside = x < high if low is None else x > low if high is None else (x > low) & (x < high)
    return operation(x, low, high), lambda s: s * inside


def _bound(operation: Any, x: Tensor, bound: Tensor) -> tuple[Tensor, Back]:
    """Return s where ``maximum`` or ``minimum`` of x and a constant is x alone."""
    value = operation(x, bound)
    chosen = (value == x) & (x != bound)
    return value, lambda s: (s * chosen).sum_to_size(x.shape)


#: Name of the rule of a :class:`Gate` → its value and derivative. A switch is x where a comparison
#: of the example holds, else a constant.
_GATES: dict[str, Callable[..., tuple[Tensor, Back]]] = {
    "captum_mipin.clip": _clip, "captum_mipin.bound": _bound, "captum_mipin.switch": _slope
}  # fmt: skip


def _copied(
    options: Options, operation: Any, x: Tensor, over: Tensor, *arguments: Any
) -> tuple[Tensor, Back]:
    """Put x into the place, shape and dtype of another tensor."""
    return operation(x, over, *arguments), lambda s: s.sum_to_size(x.shape).to(x.dtype)


# ------------------------------------------------------------- rectifiers in the graph's spellings


@dataclass(frozen=True, kw_only=True)
class Gate(NamedOperation):
    """A rectifier that the model spells with bounds, comparisons or masks.

    Attributes:
        at: Position of the argument that carries signal.
    """

    at: int = 0


def _rewrite(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Make one operation of each rectifier that is spelled with bounds, comparisons or masks."""
    node: Any
    for node in list(graph.nodes):
        if varies(node) and node.op == "call_function" and not replace_smooth_gate(node):
            gate, args = _gate(node, operation(node))
            if gate is not None:
                mark(node, original=original(node))
                node.target, node.args, node.kwargs = gate, args, {}


def replace_smooth_gate(node: Any) -> bool:
    """Make SiLU of x · sigmoid(x) and Hardswish of x · hardsigmoid(x); return True if it is one."""
    if operation(node) == "mul":
        for x, gate in (node.args, node.args[::-1]):
            if operation(gate) in _SMOOTH and gate.args[0] is x:
                mark(node, original=original(node))
                node.target, node.args = _SMOOTH[operation(gate)], (x,)
                return True
    return False


def _gate(node: Any, name: str) -> tuple[Gate | None, tuple[Any, ...]]:
    """Return the gate that a node is, if it is one, and its arguments."""
    args, rule, at = node.args, "", 0
    if name in _CLAMPS:
        return _clamp(node, name)
    if name in ("maximum", "max", "minimum", "min"):
        if len(args) == 2 and sum(map(varies, args)) == 1:  # one of them is a constant
            rule, at = "captum_mipin.bound", 0 if varies(args[0]) else 1
    elif name in ("where", "masked_fill"):
        carriers = [i for i, n in enumerate(args) if varies(n) and _is_floating(n)]
        if len(carriers) == 1 and varies(args[name == "masked_fill"]):  # the condition varies
            rule, at = "captum_mipin.switch", carriers[0]
    elif name == "mul" and len(node.all_input_nodes) == 2:
        for i, (x, gate) in enumerate((args, args[::-1])):
            compared = operation(gate_source(gate, varies)) in _COMPARISONS
            if not rule and compared and varies(gate) and varies(x) and _is_floating(x):
                rule, at = "captum_mipin.switch", i
    return Gate(rule=rule, name=name, run=node.target, at=at) if rule else None, args


def _clamp(node: Any, name: str) -> tuple[Gate | None, tuple[Any, ...]]:
    """Return the gate that a clamp is, if it is one, and its arguments."""
    low, high = _bounds(node, name)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        if varies(low) or varies(high) or (low is not None and high is not None):
            return None, ()
        extreme, bound = (torch.maximum, low) if high is None else (torch.minimum, high)
        return Gate(rule="captum_mipin.bound", name=name, run=extreme), (node.args[0], bound)
    if low is not None and low < 0 and high is not None:
        return None, ()  # such as hardtanh, which is no rectifier
    return Gate(rule="captum_mipin.clip", name=name, run=torch.clamp), (node.args[0], low, high)


def _bounds(node: Any, name: str) -> tuple[Any, Any]:
    if name == "relu6":
        return 0.0, 6.0
    if name == "clamp_max":
        return None, argument(node, 1, "max")
    if name == "hardtanh":
        return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return argument(node, 1, "min"), argument(node, 2, "max")


# ------------------------------------------------------------------------- derivatives and caveats


def _is_floating(node: Any) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _floating(node: fx.Node) -> tuple[int, ...]:
    """Return the positions of arguments that have a derivative."""
    lists = [n if isinstance(n, (tuple, list)) else (n,) for n in node.args]
    return tuple(i for i, nodes in enumerate(lists) if any(map(_is_floating, nodes)))


def _derivative(**options: Any) -> Passes:
    return Passes(note="derivative", carriers=_floating, records=True, **options)


def _hides_rectifier(node: fx.Node) -> str | None:
    """Return why an operation with its derivative may be part of a rectifier, or None."""
    if operation(node) in _NO_DERIVATIVE:
        return "it has no derivative, and may be part of a rectifier: use relu, clamp or maximum"
    if any(depends(n) and not _is_floating(n) for n in node.all_input_nodes):
        return (
            "it chooses by a comparison of values that depend on the input, as a rectifier does: "
            "use relu, clamp or maximum"
        )
    if any(depends(n) and _is_floating(n) for n in node.kwargs.values()):
        return "an argument that it takes by name depends on the input as well"
    return None


def _relative(node: fx.Node) -> str:
    return "outside of the definition: treated as a relative of ReLU"


def _no_rectifier(node: fx.Node) -> str:
    return "outside of the definition: no rectifier, has its derivative"


def _unknown(node: fx.Node) -> str | None:
    if str(node.target) in MIPIN and str(node.target) not in ACTIVATIONS:
        return None
    return "has its derivative: if it is a rectifier, or part of one, it is not treated as such"


def _carrier(node: Any) -> tuple[int, ...]:
    return (node.target.at,)


def _gate_caveat(node: Any) -> str | None:
    if node.target.rule != "captum_mipin.clip" or node.args[2] is None:
        return None
    return _relative(node)  # bounded from above, as ReLU6 is


#: What the model detaches, and what it assigns to a part: not as autograd has it.
_OWN: dict[str, Rule] = {
    "aten.detach.default": Passes(
        note="no derivative", carriers=lambda node: (), records=True, exact=True
    ),
    "aten.copy.default": Recorded(
        run=_copied, note="derivative", carriers=lambda node: (1,), records=True, exact=True
    ),
}
