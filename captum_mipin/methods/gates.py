"""Rectifiers that a model computes with bounds, comparisons, masks or smooth gates.

Such an operation is a rectifier if its value is x⁺: a lower bound of 0, or x if x > 0, else 0. A
bound other than 0 is not a rectifier. A lower bound of a value that is only a divisor is not one
either: in x / norm.clamp(min=0) it only scales the signal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import mark, original, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.methods.base import NamedOperation
from captum_mipin.rules.base import varies
from captum_mipin.rules.gates import DIVISIONS, NEGATIONS, gate_source

#: Operations that are rectifiers if their lower bound is 0.
_CLAMPS = ("clamp", "clamp_min", "clip", "clamp_max", "hardtanh", "relu6")
_COMPARISONS = ("gt", "ge", "lt", "le")
#: Operations that combine comparisons.
_COMBINATIONS = frozenset(
    pattern.format(name)
    for pattern in ("logical_{}", "bitwise_{}", "__{}__")
    for name in ("and", "or", "xor")
)
#: Comparison → the equivalent comparison with exchanged sides.
_EXCHANGED = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge"}
#: Operations f for which a value x is only a divisor if all their results f(x) are only divisors.
_TOWARDS_DIVISORS = frozenset(
    {"sqrt", "square", "pow", "abs", "add", "sub", "mul", "neg", "sum", "weighted_sum", "mean",
     "expand", "expand_as", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten",
     "unflatten", "permute", "transpose", "select", "slice", "clone", "contiguous", "alias",
     "_to_copy"}
    | {*_CLAMPS, *DIVISIONS, "maximum", "minimum", "where", "masked_fill"}
)  # fmt: skip
#: Operations that make a tensor of zeros. Operations that make a tensor of one number → the
#: position of the number in their arguments.
_ZEROS = ("zeros", "zeros_like", "new_zeros")
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
#: Name of σ → the operation that computes x · σ(x).
_SMOOTH = {"sigmoid": torch.ops.aten.silu.default, "hardsigmoid": torch.ops.aten.hardswish.default}


@dataclass(frozen=True, kw_only=True)
class Gate(NamedOperation):
    """A rectifier that the model computes with bounds, comparisons or masks.

    Attributes:
        at: Position of the argument that carries signal.
    """

    at: int = 0


def replace_gates(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Replace each rectifier made of bounds, comparisons or masks by one operation."""
    node: Any
    for node in list(graph.nodes):
        if varies(node) and node.op == "call_function" and not replace_smooth_gate(node):
            gate, args = _gate(node, operation(node))
            if gate is not None:
                mark(node, original=original(node))
                node.target, node.args, node.kwargs = gate, args, {}


def replace_smooth_gate(node: Any) -> bool:
    """Replace x · sigmoid(x) by SiLU, x · hardsigmoid(x) by Hardswish; return True if replaced."""
    if operation(node) == "mul":
        for x, gate in (node.args, node.args[::-1]):
            if operation(gate) in _SMOOTH and gate.args[0] is x:
                mark(node, original=original(node))
                node.target, node.args = _SMOOTH[operation(gate)], (x,)
                return True
    return False


def _gate(node: Any, name: str) -> tuple[Gate | None, tuple[Any, ...]]:
    """Return the gate that replaces a node, or None, and the gate's arguments."""
    args, scales = node.args, _leads_to_divisors(node)
    if name in _CLAMPS:
        return (None, ()) if scales else _clamp(node, name)
    rule, at = "", 0
    if name in ("maximum", "max", "minimum", "min"):
        # this excludes max(x, dim), whose second argument is a number
        if all(isinstance(n, fx.Node) for n in args) and list(map(varies, args)).count(False) == 1:
            at = 0 if varies(args[0]) else 1
            rule = _bound_rule(args[at], upper=name.startswith("min"))
    elif name == "threshold":
        rule = "captum_mipin.switch" if _is_zero(args[1]) and _is_zero(args[2]) else ""
    elif name in ("where", "masked_fill"):
        carriers = [i for i, n in enumerate(args) if varies(n) and is_floating(n)]
        condition = args[name == "masked_fill"]
        if len(carriers) == 1 and varies(condition) and not _combines(condition, args[carriers[0]]):
            at = carriers[0]
            other = args[{0: 2, 1: 2, 2: 1}[at]]
            positive = _is_zero(other) and _is_positive(condition, args[at], at == 1)
            rule = "captum_mipin.switch" if positive else "captum_mipin.choice"
    elif name == "mul" and len(node.all_input_nodes) == 2:
        for i, (x, gate) in enumerate((args, args[::-1])):
            compared = operation(gate_source(gate, varies)) in _COMPARISONS
            if not rule and compared and varies(gate) and varies(x) and is_floating(x):
                positive = _is_positive(gate, x, True)
                rule, at = "captum_mipin.switch" if positive else "captum_mipin.choice", i
    if rule in ("captum_mipin.switch", "captum_mipin.lower") and scales:
        rule = "captum_mipin.choice"
    return Gate(rule=rule, name=name, run=node.target, at=at) if rule else None, args


def _clamp(node: Any, name: str) -> tuple[Gate | None, tuple[Any, ...]]:
    """Return the gate that replaces a clamp, or None, and the gate's arguments."""
    x, (low, high) = node.args[0], _bounds(node, name)
    if not isinstance(low, fx.Node) and not isinstance(high, fx.Node):
        if low == 0 or (low is None and _is_rectified(x)):
            return Gate(rule="captum_mipin.clip", name=name, run=torch.clamp), (x, low, high)
        return None, ()
    if varies(low) or varies(high) or (low is not None and high is not None):
        return None, ()
    upper = low is None
    rule, bound = _bound_rule(x, upper), high if upper else low
    run = torch.minimum if upper else torch.maximum
    return (Gate(rule=rule, name=name, run=run), (x, bound)) if rule else (None, ())


def _bound_rule(x: Any, upper: bool) -> str:
    """Return the rule of a bound that is a tensor; "" if the bound is not part of a rectifier."""
    if not upper:
        return "captum_mipin.lower"
    return "captum_mipin.upper" if _is_rectified(x) else ""


def _is_rectified(node: Any) -> bool:
    """Return True if a node computes x⁺; with a further upper bound the result is a ReLU6."""
    if not isinstance(node.target, Gate):
        return operation(node) == "relu"
    rule = node.target.rule
    if rule == "captum_mipin.lower":
        return _is_zero(node.args[1 - node.target.at])
    return rule == "captum_mipin.switch" or (rule == "captum_mipin.clip" and node.args[1] == 0)


def _is_positive(condition: Any, x: Any, kept: bool) -> bool:
    """Return True if a condition selects the positive x.

    Args:
        condition: The node of the condition.
        x: The node whose sign is compared.
        kept: True if the operation keeps x where the condition holds, so that it must be x > 0 or
            x ≥ 0. False if the operation replaces x there, so that it must be x < 0 or x ≤ 0.
    """
    while operation(condition) in ("_to_copy", "alias", "clone"):
        condition = condition.args[0]
    name = operation(condition)
    if name in NEGATIONS:
        return _is_positive(condition.args[0], x, not kept)
    if name not in _COMPARISONS:
        return False
    left, right = condition.args[:2]
    if right is x:
        left, right, name = right, left, _EXCHANGED[name]
    return left is x and _is_zero(right) and (name in ("gt", "ge")) == kept


def _combines(condition: Any, x: Any) -> bool:
    """Return True if a condition combines several comparisons of x, as a rectifier may do."""
    while operation(condition) in ("_to_copy", "alias", "clone", *NEGATIONS):
        condition = condition.args[0]
    if operation(condition) not in _COMBINATIONS:
        return False
    return any(x in source.all_input_nodes for source in condition.all_input_nodes)


def _is_zero(value: Any) -> bool:
    """Return True if an argument is the number 0, or a tensor that the model fills with 0."""
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float)) and value == 0
    name = operation(value)
    if name in ("_to_copy", "lift_fresh_copy", "expand", "view"):
        return _is_zero(value.args[0])
    return name in _ZEROS or (name in _FILLED and _is_zero(value.args[_FILLED[name]]))


def _leads_to_divisors(node: fx.Node) -> bool:
    """Return True if all paths from a node lead to divisors, so that its value only scales."""
    waiting, seen = [node], {node}
    while waiting:
        source = waiting.pop()
        if not source.users:
            return False
        for user in source.users:
            if _divides_by(user, source) or user in seen:
                continue
            if operation(user) not in _TOWARDS_DIVISORS:
                return False
            seen.add(user)
            waiting.append(user)
    return True


def _divides_by(user: Any, source: fx.Node) -> bool:
    """Return True if the operation ``user`` divides by the value of ``source``."""
    name = operation(user)
    if name == "pow":
        exponent = user.args[1]
        return user.args[0] is source and isinstance(exponent, (int, float)) and exponent < 0
    if name in DIVISIONS:
        return user.args[1] is source and user.args[0] is not source
    return name in ("rsqrt", "reciprocal")


def _bounds(node: Any, name: str) -> tuple[Any, Any]:
    if name == "relu6":
        return 0.0, 6.0
    if name == "clamp_max":
        return None, argument(node, 1, "max")
    if name == "hardtanh":
        return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return argument(node, 1, "min"), argument(node, 2, "max")


def is_floating(node: Any) -> bool:
    """Return True if an argument is a floating-point or complex tensor, or a list of them."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
