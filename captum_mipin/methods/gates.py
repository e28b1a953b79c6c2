"""Rectifiers that a model computes with bounds, comparisons, masks or smooth gates.

Such an operation is a rectifier if its value is x⁺: a lower bound of 0, or x if x > 0, else 0. A
bound other than 0 is not a rectifier. No operation is one if its value only scales the signal, as
in x / norm.clamp(min=0), x / relu(norm) and x * scale.clamp(0, 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import mark, original, value_of
from captum_mipin.graph.nodes import ancestors, argument, operation
from captum_mipin.methods.base import NamedOperation
from captum_mipin.propagation.draft import as_number
from captum_mipin.propagation.forms import become, insert
from captum_mipin.rules.base import varies
from captum_mipin.rules.gates import DIVISIONS, NEGATIONS, gate_source, is_gate

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
#: Activations other than ReLU that are rectifiers for all values of their options.
RECTIFIERS = (
    "silu", "gelu", "hardswish", "leaky_relu", "elu", "celu", "selu", "mish",
    "softplus", "_prelu_kernel", "prelu", "rrelu",
)  # fmt: skip
#: Sums of products of two tensors.
_SUMS = ("matmul", "bmm", "linear", "weighted_sum")
#: Operations that are layers if one factor is a weight of the model; so are convolutions.
_LAYERS = frozenset({"linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "bilinear"})
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
    """Replace x · sigmoid(x) by SiLU, x · hardsigmoid(x) by Hardswish; return True if replaced.

    A product x · sigmoid(−x) is −SiLU(−x).
    """
    for x, gate in (node.args, node.args[::-1]) if operation(node) == "mul" else ():
        if operation(gate) not in _SMOOTH:
            continue
        (q,), smooth = gate.args, _SMOOTH[operation(gate)]
        if q is x:
            become(node, smooth, x)
            return True
        if operation(q) == "neg" and q.args[0] is x:
            become(node, torch.ops.aten.neg.default, insert(node, smooth, q))
            return True
    return False


def _gate(node: Any, name: str) -> tuple[Gate | None, tuple[Any, ...]]:
    """Return the gate that replaces a node, or None, and the gate's arguments."""
    args, rule, at = node.args, "", 0
    if name in _CLAMPS:
        return (None, ()) if _only_scales(node) else _clamp(node, name)
    if name in ("relu", *RECTIFIERS) and _only_scales(node):
        run = partial(node.target, **node.kwargs)
        return Gate(rule="captum_mipin.scale", name=name, run=run), args
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
    if rule and rule != "captum_mipin.choice" and _only_scales(node):
        rule = "captum_mipin.scale"
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


def _only_scales(node: fx.Node) -> bool:
    """Return True if all paths from a node end in divisors, or in factors of fewer elements.

    A path goes on through any operation but a layer of the model, behind which the value is no
    scale any more, and comparisons, which have no derivative.
    """
    waiting: list[tuple[Any, float]] = [(node, inf)]
    seen = {node}
    while waiting:
        source, least = waiting.pop()
        if not source.users:
            return False
        least = min(least, _elements(source))
        for user in source.users:
            if user in seen or _divides_by(user, source) or _scales(user, source, least):
                continue
            if user.op == "output" or _is_layer(user):
                return False
            if varies(user) and is_floating(user):
                seen.add(user)
                several = sum(map(varies, user.all_input_nodes)) > 1
                waiting.append((user, inf if several else least))
    return True


def _elements(node: fx.Node) -> int:
    """Return the number of elements of a value for a batch of a size that no other size is."""
    value = value_of(node)
    sizes = value.shape if isinstance(value, Tensor) else ()
    return prod(as_number(size, 7919) for size in sizes)


def _scales(user: Any, source: fx.Node, least: float) -> bool:
    """Return True if a value is a factor of the product ``user`` that only scales the other one.

    Args:
        user: The product.
        source: The value.
        least: Number of elements from which the value was computed alone, as by ``expand``.
    """
    name, pair = operation(user), user.args[:2]
    if name not in ("mul", *_SUMS) or not all(map(varies, pair)) or pair.count(source) != 1:
        return False
    at = pair.index(source)
    other = pair[1 - at]
    if not is_floating(other) or least >= _elements(other) or is_gate(other, varies):
        return False  # beside a gate, the value is what carries the signal
    shapes = [value_of(n).shape for n in pair]
    if name in ("mul", "weighted_sum"):  # the other factor has all elements of the product
        return str(torch.broadcast_shapes(*shapes)) == str(shapes[1 - at])
    # the other factor has them if this one is one row, or one column
    return bool(shapes[at][-1 if at and name != "linear" else -2] == 1)


def _is_layer(node: fx.Node) -> bool:
    """Return True for an operation that multiplies with weights of the model, as layers do."""
    if operation(node) not in _LAYERS and "conv" not in operation(node):
        return False
    weights = ancestors(n for n in node.all_input_nodes if not varies(n))
    return any(
        n.op in ("placeholder", "get_attr")
        and not all(operation(user) == "lift_fresh_copy" for user in n.users)
        for n in weights
    )


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
