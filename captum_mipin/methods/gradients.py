"""Gradients, and two methods that differ from them at rectifiers: Deconvnet, Guided Backprop.

Every operation has its derivative, except rectifiers such as y = x⁺. There, with the signal s at y:

    gradient          s · [x > 0]
    Deconvnet         s⁺
    Guided Backprop   s⁺ · [x > 0]

The two methods are defined for ReLU. For its bounded and smooth variants (ReLU6, SiLU, ...) the
mask [x > 0] is replaced by the derivative. Sigmoid and tanh are not rectifiers, and have their
derivative. The same holds for bounds other than 0, and for what only scales the signal, such as a
divisor, ``x / norm.clamp(min=0)``, or a factor of fewer elements, ``x * scale.clamp(0, 1)``.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from captum_mipin.graph.nodes import operation
from captum_mipin.methods.base import Signal, Table
from captum_mipin.methods.gates import RECTIFIERS, is_floating, replace_gates
from captum_mipin.propagation.heads import explain_contrast
from captum_mipin.rules import MIPIN, Options, Passes, Recorded, Rule
from captum_mipin.rules.activations import ACTIVATIONS
from captum_mipin.rules.base import Back, along, depends, value_and_adjoint
from captum_mipin.types import Output

#: Activations that are not rectifiers.
_OTHERS = ("tanh", "sigmoid", "hardsigmoid", "log_sigmoid", "glu")
#: Operations that return the positions of elements that they select, alone or as second result.
_POSITIONS = frozenset(
    {"argmax", "argmin", "argsort", "max", "min", "sort", "topk", "kthvalue", "median", "mode"}
    | {f"max_pool{dims}d_with_indices" for dims in (1, 2, 3)}
)
#: Products of a value and weights.
_PRODUCTS = ("weighted_sum", "matmul", "bmm", "divided")
#: Operations without a derivative in autograd.
_NO_DERIVATIVE = ("heaviside", "nextafter")


class _Derived(Signal):
    """Base class of gradients and their variants, which start with 1 and respect ``detach()``.

    They are derivatives of what the model returns, also if that is a probability.
    """

    _unit = True
    _logits = False
    _detached = True


class Gradient(_Derived):
    """The gradient ∂Φ_c/∂x, or at a layer with :class:`LayerPropagation`.

    It is the gradient of the operations that the model runs. The ``backward`` of an
    ``autograd.Function`` is not used, and the gradient of ``detach()`` and of operations under
    ``torch.no_grad()`` is 0.

    Args:
        model: The network, see :class:`~captum_mipin.methods.base.Propagation`.
        output: The output to explain if the model returns several tensors.
        contrast: True for the gradient of :data:`~captum_mipin.propagation.heads.CONTRAST`, what
            the target has beyond all other classes, in place of that of its output.

    Source: Simonyan et al., ICLR 2014 (workshop), with its sign; the contrast is our own.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
        >>> Gradient(model).attribute(torch.randn(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    _name = "Gradient"

    def __init__(self, model: nn.Module, *, output: Output = None, contrast: bool = False) -> None:
        super().__init__(model, output=output)
        self.contrast, self._logits = contrast, contrast

    def _table(self) -> Table:
        rewrite = {"rewrite": explain_contrast} if self.contrast else {}
        return Table(_OWN, **rewrite, other=_derivative(exact=True))


class _Gated(_Derived):
    """Base class of methods whose rectifiers pass only s⁺, where s is the signal."""

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
        for name in RECTIFIERS:
            run = partial(_rectifier, self._masked, _slope)
            rules[f"aten.{name}.default"] = Recorded(run=run, note=part + slope, caveat=_relative)
        for name in _OTHERS:
            rules[f"aten.{name}.default"] = Passes(note="derivative", caveat=_no_rectifier)
        rules["captum_mipin.choice"] = Recorded(
            run=_chosen, note="derivative", carriers=_carrier, records=True, caveat=_no_gate
        )
        rules["captum_mipin.scale"] = Recorded(
            run=_chosen, note="derivative, as it only scales", carriers=_carrier, records=True
        )
        rules["captum_mipin.lower"] = Recorded(
            run=partial(_lower, self._masked),
            note=f"where the bound is 0: {part}{mask}; elsewhere the derivative",
            carriers=_carrier,
            records=True,
        )
        for name, back_of in _GATES.items():
            rules[name] = Recorded(
                run=partial(_rectifier, self._masked, back_of),
                note=part + mask,
                carriers=_carrier,
                records=True,
                caveat=_gate_caveat,
            )
        return Table(
            rules, replace_gates, other=_derivative(refuse=_hides_rectifier, caveat=_unknown)
        )


class Deconvnet(_Gated):
    """Deconvnet: a gradient that passes only the positive part s⁺ of the signal at rectifiers.

    All other operations have their derivative. Rectifiers are ReLU in any form (a module, in place,
    a function, ``clamp``, ``maximum`` with 0, ``where`` and products with x > 0, threshold at 0),
    ReLU6 and other ``clamp`` with the lower bound 0, SiLU (also as ``x * sigmoid(x)``), GELU,
    Hardswish, LeakyReLU, PReLU, ELU, CELU, SELU, Mish and softplus. Activations such as sigmoid and
    tanh are not rectifiers, nor are bounds other than 0, such as ``clamp(min=1e-6)``. No operation
    is one whose value, before any further layer, only divides or is a factor of fewer elements.

    Args:
        model: The network, see :class:`~captum_mipin.methods.base.Propagation`.
        output: The output to explain if the model returns several tensors.

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

    Rectifiers are those of :class:`Deconvnet`. For bounded and smooth ones, such as ReLU6, SiLU and
    GELU, the mask [x > 0] is replaced by the derivative.

    Args:
        model: The network, see :class:`~captum_mipin.methods.base.Propagation`.
        output: The output to explain if the model returns several tensors.

    Source: Springenberg et al., ICLR 2015 (workshop).

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> GuidedBackprop(model).attribute(torch.randn(2, 4), target=[1, 2]).shape
        torch.Size([2, 4])
    """

    _name = "Guided Backprop"
    _masked = True


# ------------------------------------------------------------------------------ backward functions


def run_operator(
    back_of: Callable[..., Any],
    options: Options,
    operation: Any,
    x: Any,
    *arguments: Any,
    **named: Any,
) -> Any:
    """Run an operation by a rule that is a function of an operator and x.

    With ``back_of`` bound by ``partial``, it is the ``run`` of a
    :class:`~captum_mipin.rules.Recorded`.

    Args:
        back_of: (operator, x) → (the operator's value at x, the backward function). The operator
            is the operation as a function of x alone.
        options: Not used, because these rules have no options.
        operation: The operation, a function of x and the other arguments.
        x: The argument that carries signal: a tensor, or a tuple of several such arguments.
        arguments: The other positional arguments.
        named: The keyword arguments.
    """
    return back_of(lambda t: operation(t, *arguments, **named), x)


def _rectifier(
    masked: bool,
    back_of: Callable[..., tuple[Tensor, Back]],
    options: Options,
    operation: Any,
    x: Tensor,
    *arguments: Any,
    **named: Any,
) -> tuple[Tensor, Back]:
    """Run a rectifier; the backward function returns s⁺, times mask or derivative if ``masked``."""
    if not masked:
        value = operation(x, *arguments, **named)
        return value, lambda s: s.clamp(min=0).sum_to_size(x.shape)
    value, back = back_of(operation, x, *arguments, **named)
    return value, lambda s: back(s.clamp(min=0))


def _relu(operation: Any, x: Tensor) -> tuple[Tensor, Back]:
    """Run ReLU; the backward function returns s · [x > 0]."""
    value = operation(x).detach()
    return value, lambda s: torch.ops.aten.threshold_backward(s, value, 0)


def _slope(operation: Any, x: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Back]:
    """Run an operation; the backward function returns s times the derivative."""
    return value_and_adjoint(lambda t: operation(t, *arguments, **named), x)


def _clip(operation: Any, x: Tensor, low: Any, high: Any) -> tuple[Tensor, Back]:
    """Run a clamp; the backward function returns s · [low < x < high], without bounds of None."""
    inside = x < high if low is None else x > low if high is None else (x > low) & (x < high)
    return operation(x, low, high), lambda s: s * inside


def _upper(operation: Any, x: Tensor, bound: Tensor) -> tuple[Tensor, Back]:
    """Run a minimum of x and a tensor; the backward function returns s · [x < bound]."""
    return operation(x, bound), lambda s: (s * (x < bound)).sum_to_size(x.shape)


def _lower(
    masked: bool, options: Options, operation: Any, x: Tensor, bound: Tensor
) -> tuple[Tensor, Back]:
    """Run a maximum of x and a constant tensor: elements with the constant 0 are rectifiers.

    All other elements have their derivative.
    """
    value, derivative_back = value_and_adjoint(lambda t: operation(t, bound), x)
    zero = bound == 0
    mask = zero & (x > bound) if masked else zero

    def back(s: Tensor) -> Tensor:
        rectified = (s.clamp(min=0) * mask).sum_to_size(x.shape)
        return rectified + derivative_back(s.masked_fill(zero, 0))

    return value, back


def _chosen(options: Options, operation: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Back]:
    """Run an operation that is not a rectifier; the backward function is the derivative."""
    return _slope(operation, x, *arguments)


#: Name of the rule of a :class:`Gate` → function that runs it, and returns its value and backward
#: function. A switch is x if x > 0, else 0, by a comparison.
_GATES: dict[str, Callable[..., tuple[Tensor, Back]]] = {
    "captum_mipin.clip": _clip, "captum_mipin.upper": _upper, "captum_mipin.switch": _slope
}  # fmt: skip


# ------------------------------------------------------------------------- derivatives and caveats


def _floating(node: fx.Node) -> tuple[int, ...]:
    """Return the positions of arguments that have a derivative.

    Weights of a sum that are computed from masks or positions alone have the derivative 0.
    """
    lists = [n if isinstance(n, (tuple, list)) else (n,) for n in node.args]
    found = [i for i, nodes in enumerate(lists) if any(map(is_floating, nodes))]
    if operation(node) in _PRODUCTS:
        found = [i for i in found if not _is_chosen(node.args[i])] or found
    return tuple(found)


def _is_chosen(node: Any) -> bool:
    """Return True if a value depends on the input, but only through values without a derivative."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if not is_floating(node):
            continue
        sources = [n for n in node.all_input_nodes if depends(n)]
        if not sources:
            return False
        waiting.extend(n for n in sources if n not in seen)
        seen.update(sources)
    return True


def _derivative(**options: Any) -> Passes:
    return Passes(note="derivative", carriers=_floating, records=True, **options)


def _hides_rectifier(node: fx.Node) -> str | None:
    """Return the reason why an operation may be part of a rectifier; None if there is none."""
    if operation(node) in _NO_DERIVATIVE:
        return "it has no derivative, and may be part of a rectifier: use relu, clamp or maximum"
    discrete = [n for n in node.all_input_nodes if depends(n) and not is_floating(n)]
    if not all(map(_is_position, discrete)):
        return (
            "it chooses by a comparison of values that depend on the input, as a rectifier does: "
            "use relu, clamp or maximum"
        )
    if any(depends(n) and is_floating(n) for n in node.kwargs.values()):
        return "a keyword argument also depends on the input, expected a positional one"
    return None


def _is_position(node: fx.Node) -> bool:
    """Return True if a discrete value is computed from positions of selected elements alone."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        source: Any = node.args[0] if node.target is operator.getitem else node
        if operation(source) in _POSITIONS:
            continue
        sources = [n for n in node.all_input_nodes if depends(n)]
        if not sources or any(map(is_floating, sources)):
            return False
        waiting.extend(sources)
    return True


def _relative(node: fx.Node) -> str:
    return "outside of the definition: treated as a relative of ReLU"


def _no_rectifier(node: fx.Node) -> str:
    return "outside of the definition: no rectifier, has its derivative"


def _no_gate(node: fx.Node) -> str:
    return "chooses by a comparison, but not as x⁺ does: no rectifier, has its derivative"


def _unknown(node: fx.Node) -> str | None:
    if str(node.target) in MIPIN and str(node.target) not in ACTIVATIONS:
        return None
    return "has its derivative: if it is a rectifier, or part of one, it is not treated as such"


def _carrier(node: Any) -> tuple[int, ...]:
    return (node.target.at,)


def _gate_caveat(node: Any) -> str | None:
    rule = node.target.rule
    if rule == "captum_mipin.upper" or (rule == "captum_mipin.clip" and node.args[2] is not None):
        return _relative(node)  # it has an upper bound, like ReLU6
    return None


def _batch_norm(
    options: Options, operation: Any, x: Tensor, *arguments: Any
) -> tuple[Tensor, Back]:
    """Run a batch norm y = γ (x − μ) / √(σ² + ε) + β; the backward function returns s ∂y/∂x.

    Autograd's own is wrong on CPUs for one example whose signal has its channels last (torch 2.14).
    """
    # ∂y/∂x = γ / √(σ² + ε)
    gamma, _, _, variance, _, eps = arguments
    slope = (variance + eps).rsqrt() if gamma is None else gamma * (variance + eps).rsqrt()
    return operation(x, *arguments)[0], lambda s: s * along(slope, x, 1)


#: The rules of ``detach``, which has no derivative, and of batch norm.
_OWN: dict[str, Rule] = {
    "aten._native_batch_norm_legit_no_training.default": Recorded(
        run=_batch_norm, note="derivative", exact=True
    ),
    "aten.detach.default": Passes(
        note="no derivative", carriers=lambda node: (), records=True, exact=True
    ),
}
