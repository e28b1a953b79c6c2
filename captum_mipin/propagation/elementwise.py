"""The pass that finds activations written by hand, such as GELU by ``pow``, ``tanh`` and products.

If a product, a quotient or a bound is computed from a single tensor x, element by element, it is a
function f(x) of each element. It is treated as one operation: by a built-in activation with the
same values if there is one, else as the function itself.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import mark, marks, original, value_of
from captum_mipin.graph.nodes import erase_unused, nodes_in, operation
from captum_mipin.graph.subgraph import extract
from captum_mipin.propagation.complements import scaled_gate, write_complement
from captum_mipin.propagation.constants import known_number
from captum_mipin.propagation.draft import Draft, is_tensor
from captum_mipin.propagation.forms import become
from captum_mipin.propagation.marking import mark_signal
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
#: Operations by which a gate by hand may end.
_ENDS = frozenset({"mul", "div", "add", "sub", "rsub", "clamp", "hardtanh", "relu6", "reciprocal"})
#: Largest difference to a recognised activation: constants are often written with few digits.
_TOLERANCE = 1e-6


def join_elementwise(draft: Draft) -> None:
    """Replace operations that are, with others before them, a function of a single tensor."""
    for node in list(draft.graph.nodes):
        write_complement(draft, node)
    mark_signal(draft)
    for node in reversed(list(draft.graph.nodes)):  # the outermost operation of a function first
        product = operation(node) == "mul" and all(map(varies, node.args))
        product = product and not any(is_gate(n, varies) for n in node.args)
        quotient = operation(node) == "div" and varies(node.args[1])
        curve = operation(node) in ("reciprocal", "log", "log2", "log10")
        written = product or quotient or curve or _is_bound(draft, node)
        if written and marks(node).signal and node.users and node not in draft.starts:
            # a factor that follows may be a part of the function: x * (1 + tanh(...)) / 2
            outer = reversed(_scaled(draft, node))
            if not any(_replace(draft, n, recognised=True) for n in outer):
                gates = not product and _is_factor(node) and _write_gate(draft, node)
                gates or _replace(draft, node) or (quotient and _multiply_by_gate(draft, node))
        elif (curve or _is_factor(node)) and varies(node) and node not in draft.starts:
            known = _replace(draft, node, recognised=True)
            known or (_is_factor(node) and _write_gate(draft, node))
    erase_unused(draft.graph, draft.starts)


def _is_factor(node: fx.Node) -> bool:
    """Return True for what may be a gate by hand, such as relu6(g + 3) / 6, beside a signal."""
    ends = operation(node) in _ENDS
    return ends and any(operation(u) == "mul" and all(map(varies, u.args)) for u in node.users)


def _multiply_by_gate(draft: Draft, node: Any) -> bool:
    """Rewrite a ratio x / (1 + exp(−q)) as x ⊙ σ(q); return True if rewritten."""
    x, divisor = node.args
    for q, function in _functions(draft, divisor):
        gate = scaled_gate(partial(_inverse, function))
        if gate is not None and gate.activation is torch.ops.aten.sigmoid.default:
            become(node, torch.ops.aten.mul.Tensor, x, gate.insert(draft, node, q))
            return True
    return False


def _write_gate(draft: Draft, node: Any) -> bool:
    """Rewrite a factor that is c σ(q) or c σ(−q) of a tensor q; return True if rewritten."""
    for q, function in _functions(draft, node):
        if (gate := scaled_gate(function)) is not None:
            value = gate.insert(draft, node, q)
            become(node, value.target, *value.args)
            return True
    return False


def _functions(draft: Draft, node: fx.Node) -> Iterator[tuple[fx.Node, Callable[[Tensor], Tensor]]]:
    """Yield each tensor of which a node is a function with numbers alone, and this function."""
    order = {n: at for at, n in enumerate(draft.graph.nodes)}
    for x, inside in arguments_of(node, varies, order, ELEMENTWISE, starts=draft.starts):
        sources = dict.fromkeys(n for one in inside for n in one.all_input_nodes)
        constants = [n for n in sources if n not in inside and n is not x]
        numbers = [c for n in constants if (c := known_number(draft, n)) is not None]
        if len(numbers) == len(constants):
            function = Elementwise(extract(draft.graph, [x, *constants], [node]))
            yield x, partial(_with_numbers, function, numbers)


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


def _scaled(draft: Draft, node: fx.Node) -> list[fx.Node]:
    """Return the operations that multiply the result of ``node`` by numbers, in their order."""
    chain: list[fx.Node] = []
    while len(node.users) == 1 and node not in draft.starts:
        (node,) = node.users
        if operation(node) not in ("mul", "div") or node.all_input_nodes[1:]:
            break
        chain.append(node)
    return chain


def _replace(draft: Draft, node: fx.Node, recognised: bool = False) -> bool:
    """Replace an operation if it is a function of a single tensor; return True if replaced.

    Args:
        draft: The draft, whose graph is changed.
        node: The operation.
        recognised: Whether to replace only by a built-in activation.
    """
    general = Elementwise.name in list(draft.rules) and not recognised
    chosen: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    order = {n: at for at, n in enumerate(draft.graph.nodes)}
    for x, inside in arguments_of(node, varies, order, ELEMENTWISE, starts=draft.starts):
        sources = dict.fromkeys(n for one in inside for n in one.all_input_nodes)
        constants = [n for n in sources if n not in inside and n is not x]
        function = Elementwise(extract(draft.graph, [x, *constants], [node]))
        known = not constants and not _is_bound(draft, node)
        activation = _recognised(function) if known else None
        if activation is not None:
            chosen = activation[0], (x,), activation[1]
            break
        # a function with constants of the model is known only when it runs
        finite = constants or isfinite(float(function(torch.zeros((), dtype=torch.float64))))
        if chosen is None and general and finite:
            chosen = function, (x, *constants), {}
    if chosen is None:
        return False
    mark(node, original=original(node))
    node.target, node.args, node.kwargs = chosen
    return True


def arguments_of(
    node: fx.Node,
    varies: Callable[[Any], bool],
    order: Mapping[fx.Node, int],
    operations: Collection[str],
    *,
    starts: Collection[fx.Node] = (),
    same_shape: bool = True,
) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """Yield each tensor of its shape of which ``node`` is a function, the nearest first.

    Args:
        node: The node.
        varies: Function that returns False for constants.
        order: Node → its position in the graph.
        operations: Names of the operations that the function may consist of.
        starts: Nodes whose arguments are not looked at.
        same_shape: Whether all tensors in between have this shape too, as if the operations work
            element by element.

    Yields:
        The node x of the tensor; the nodes of the operations from x to ``node``, with ``node``.
    """
    shape, inside, ends = str(value_of(node).shape), {node}, _varying(node, varies)
    while ends:
        last = max(ends, key=order.__getitem__)
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
    points = torch.linspace(-8, 8, 101, dtype=torch.float64)  # 0 is among them
    try:
        values = function(points)
    except RuntimeError:  # for a dtype that the model names, or a size
        return None
    for activation, named in _KNOWN:
        if torch.allclose(values, activation(points, **named), rtol=0, atol=_TOLERANCE):
            return activation, named
    return None
