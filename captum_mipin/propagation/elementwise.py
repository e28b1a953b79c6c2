"""The pass that finds activations written by hand, such as GELU by ``pow``, ``tanh`` and products.

If a value is computed from a single tensor x, element by element, it is a function f(x) of each
element. It is treated as one operation: as the built-in activation or the gate with the same values
if there is one. Any other product, quotient or bound is treated as the function itself.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import marks, value_of
from captum_mipin.graph.nodes import erase_unused, nodes_in, operation
from captum_mipin.graph.subgraph import extract
from captum_mipin.propagation.complements import POINTS, TOLERANCE, same_values, scaled_gate
from captum_mipin.propagation.constants import known_number
from captum_mipin.propagation.draft import Draft, is_tensor, number_of
from captum_mipin.propagation.forms import SAME_NUMBERS, become
from captum_mipin.propagation.marking import mark_signal
from captum_mipin.propagation.mixtures import write_mixture
from captum_mipin.rules.activations import ACTIVATIONS, CURVES, Elementwise, moves_zero
from captum_mipin.rules.base import Recorded, varies
from captum_mipin.rules.gates import is_gate

#: Operations that compute each element of their result from the same element of their arguments.
ELEMENTWISE: frozenset[str] = frozenset(
    {name.split(".")[1] for name in ACTIVATIONS} - {"glu"}
    | {name.split(".")[0] for name in CURVES}
    | {"add", "sub", "rsub", "mul", "div", "neg", "maximum", "minimum", "where", "masked_fill",
       "_to_copy", "clone", "alias", "detach", "contiguous", "gt", "ge", "lt", "le", "eq", "ne",
       "logical_and", "logical_or", "logical_not", "sign", "exp", "log", "log2", "log10",
       "reciprocal", "rsqrt"}
)  # fmt: skip
#: Activations that are recognised, with their arguments by name.
_KNOWN: tuple[tuple[Any, dict[str, Any]], ...] = tuple(
    (getattr(torch.ops.aten, name).default, named)
    for name, named in (
        ("relu", {}), ("gelu", {}), ("gelu", {"approximate": "tanh"}), ("silu", {}), ("mish", {}),
        ("hardswish", {}), ("tanh", {}), ("sigmoid", {}), ("hardsigmoid", {}), ("softplus", {}),
    )
)  # fmt: skip
#: Operations by which a function by hand may end.
_ENDS = frozenset(
    {"mul", "div", "add", "sub", "rsub", "neg", "clamp", "clamp_max", "hardtanh", "relu6",
     "minimum", "maximum", "reciprocal", "pow", "exp", "log", "log2", "log10"}
)  # fmt: skip
#: Operations that make no activation with each other.
_AFFINE = frozenset({"mul", "div", "add", "sub", "rsub", "neg", *SAME_NUMBERS})
#: A tensor, a function of it, and the operations that compute this function.
_Function = tuple[fx.Node, Callable[[Tensor], Tensor], set[fx.Node]]


def join_elementwise(draft: Draft) -> None:
    """Replace operations that are, with others before them, a function of a single tensor."""
    _write_known(draft)
    for node in list(draft.graph.nodes):
        write_mixture(draft, node)
    erase_unused(draft.graph, draft.starts)
    mark_signal(draft)
    for node in reversed(list(draft.graph.nodes)):  # the outermost operation of a function first
        product = operation(node) == "mul" and all(map(varies, node.args))
        product = product and not any(is_gate(n, varies) for n in node.args)
        quotient = operation(node) == "div" and varies(node.args[1])
        curve = operation(node) in ("reciprocal", "log", "log2", "log10")
        written = product or quotient or curve or _is_bound(draft, node)
        if written and marks(node).signal and node.users and node not in draft.starts:
            _replace(draft, node)
    erase_unused(draft.graph, draft.starts)


def _write_known(draft: Draft) -> None:
    """Rewrite functions of a single tensor that are activations or gates."""
    unused: set[fx.Node] = set()
    for node in reversed(list(draft.graph.nodes)):  # the outermost operation of a function first
        if node.op == "call_function" and unused.issuperset(node.users):
            unused.add(node)
        elif operation(node) in _ENDS and varies(node) and node not in draft.starts:
            functions = list(_functions(draft, node))
            known = _recognise(node, functions)
            known = known or (_is_factor(node) and _write_gate(draft, node, functions))
            if not known and operation(node) == "div" and varies(node.args[1]):
                _multiply_by_gate(draft, node)
    erase_unused(draft.graph, draft.starts)


def _is_factor(node: fx.Node) -> bool:
    """Return True for what may be a gate by hand, such as relu6(g + 3) / 6, beside a signal."""
    return any(
        _is_factor(user)
        if operation(user) in SAME_NUMBERS or number_of(user)
        else operation(user) == "mul" and all(map(varies, user.args))
        for user in node.users
    )


def _multiply_by_gate(draft: Draft, node: Any) -> bool:
    """Rewrite a ratio x / (1 + exp(−q)) as x ⊙ σ(q); return True if rewritten."""
    x, divisor = node.args
    for q, function, _ in _functions(draft, divisor):
        gate = scaled_gate(partial(_inverse, function))
        if gate is not None and gate.activation is torch.ops.aten.sigmoid.default:
            become(node, torch.ops.aten.mul.Tensor, x, gate.insert(draft, node, q))
            return True
    return False


def _write_gate(draft: Draft, node: Any, functions: Sequence[_Function]) -> bool:
    """Rewrite a factor that is c σ(k q) of a tensor q; return True if rewritten."""
    found = [(scaled_gate(function), q) for q, function, _ in functions]
    gates = [(gate, q) for gate, q in found if gate is not None]
    for gate, q in sorted(gates, key=lambda pair: abs(pair[0].slope) != 1)[:1]:
        value = gate.insert(draft, node, q)
        become(node, value.target, *value.args)
    return bool(gates)


def _recognise(node: Any, functions: Sequence[_Function]) -> bool:
    """Replace a function that a built-in activation computes as well; return True if replaced."""
    for x, function, inside in functions:
        known = _recognised(function)
        if known is not None and not any(n.target is known[0] and n.args[0] is x for n in inside):
            become(node, known[0], x)
            node.kwargs = known[1]
            return True
    return False


def _functions(draft: Draft, node: fx.Node) -> Iterator[_Function]:
    """Yield each tensor of which a node is a curve, and this curve, if it has numbers alone."""
    for x, inside, constants in _parts(draft, node):
        if _AFFINE.issuperset(map(operation, inside)):
            continue
        numbers = [c for n in constants if (c := known_number(draft, n)) is not None]
        if len(numbers) == len(constants):
            function = Elementwise(extract(draft.graph, [x, *constants], [node]))
            yield x, partial(_with_numbers, function, numbers), inside


def _parts(draft: Draft, node: fx.Node) -> Iterator[tuple[fx.Node, set[fx.Node], list[fx.Node]]]:
    """Yield each tensor of which a node is a function, its operations, and its constants."""
    for x, inside in arguments_of(node, varies, ELEMENTWISE, starts=draft.starts):
        sources = dict.fromkeys(n for one in inside for n in one.all_input_nodes)
        yield x, inside, [n for n in sources if n not in inside and n is not x]


def _with_numbers(function: Elementwise, numbers: Sequence[float], x: Tensor) -> Tensor:
    """Return f(x) for constants that are numbers."""
    return function(x, *(x.new_tensor(n) for n in numbers))


def _inverse(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return 1 / f(x)."""
    return 1 / function(x)


def _is_bound(draft: Draft, node: fx.Node) -> bool:
    """Return True for a bound without a rule of its own: a constant tensor, or clamp(x, min=1)."""
    if operation(node) in ("maximum", "minimum", "max", "min"):
        tensors = [n for n in node.args if isinstance(n, fx.Node)]
        return len(tensors) == 2 and sum(map(varies, tensors)) == 1
    rule = draft.rule(node)
    return isinstance(rule, Recorded) and rule.refuse is moves_zero and moves_zero(node) is not None


def _replace(draft: Draft, node: fx.Node) -> None:
    """Replace an operation by a function of the nearest tensor, if there is one."""
    if Elementwise.name not in list(draft.rules):
        return
    for x, _, constants in _parts(draft, node):
        function = Elementwise(extract(draft.graph, [x, *constants], [node]))
        # a function with constants of the model is known only when it runs
        if constants or isfinite(float(function(torch.zeros((), dtype=torch.float64)))):
            become(node, function, x, *constants)
            return


def arguments_of(
    node: fx.Node,
    varies: Callable[[Any], bool],
    operations: Collection[str],
    *,
    starts: Collection[fx.Node] = (),
    same_shape: bool = True,
) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """Yield each tensor of its shape of which ``node`` is a function, the nearest first.

    Args:
        node: The node.
        varies: Function that returns False for constants.
        operations: Names of the operations that the function may consist of.
        starts: Nodes whose arguments are not looked at.
        same_shape: Whether all tensors in between have this shape too, as if the operations work
            element by element.

    Yields:
        The node x of the tensor; the nodes of the operations from x to ``node``, with ``node``.
    """
    shape, inside, ends = str(value_of(node).shape), {node}, _varying(node, varies)
    while ends:
        last = max(ends)
        value = value_of(last)
        value = value[0] if isinstance(value, tuple) else value
        alike = isinstance(value, Tensor) and str(value.shape) == shape
        if same_shape and not alike:
            return
        if alike and len(ends) == 1 and is_tensor(last) and value.is_floating_point():
            yield last, set(inside)
        if last in starts or operation(last) not in operations:
            return
        inside.add(last)
        ends = ends - {last} | _varying(last, varies)


def _varying(node: fx.Node, varies: Callable[[Any], bool]) -> set[fx.Node]:
    return {n for n in nodes_in((node.args, node.kwargs)) if varies(n)}


def _recognised(function: Callable[[Tensor], Tensor]) -> tuple[Any, dict[str, Any]] | None:
    """Return the activation with the same values and its arguments by name; None if none has."""
    try:
        values = function(POINTS)
    except RuntimeError:  # for a dtype that the model names, or a size
        return None
    for activation, named in _KNOWN:
        # the bound max(x, 1e-12) of a norm is no ReLU
        tolerance = 0.0 if activation is torch.ops.aten.relu.default else TOLERANCE
        if same_values(values, activation(POINTS, **named), tolerance):
            return activation, named
    return None
