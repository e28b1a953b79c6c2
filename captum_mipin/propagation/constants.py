"""Values of a graph that are known, and values without copies of themselves.

A value is known here if neither the input nor a parameter or buffer has any influence on it: it is
made of the numbers in the model's code. Weights may change; the graph must not depend on them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.dimensions import RESHAPES
from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import ancestors, argument, operation
from captum_mipin.propagation.canonical import is_copy
from captum_mipin.propagation.draft import Draft, regrouped
from captum_mipin.propagation.forms import Starts, insert
from captum_mipin.rules.gates import NEGATIONS

_aten = torch.ops.aten

#: Operations that compute each element of their result from one element of each argument.
_ELEMENTWISE = frozenset(
    {"add", "sub", "mul", "div", "divided", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal",
     "exp", "log", "abs", "clamp_min", "clamp", "maximum", "clone", "alias", "contiguous",
     "_to_copy", "detach", "rsub", "gt", "ge", "lt", "le", "eq", "ne", *NEGATIONS, "logical_and",
     "logical_or", "bitwise_and", "bitwise_or", "__and__", "__or__", "where", "masked_fill"}
)  # fmt: skip
#: Operations on the dimensions that their argument names.
_REDUCTIONS = {"sum": 1, "mean": 1, "linalg_vector_norm": 2}
_ORDERS = ("permute", "transpose", "unsqueeze")
#: Largest number of operations that are repeated for a value without its copies.
_LARGEST = 24


def known_value(draft: Draft, node: fx.Node) -> Tensor | None:
    """Return the value of a node; None if it depends on the input, or on weights."""
    needed = ancestors([node], stop=draft.literals)
    made = [n for n in needed if n not in draft.literals]
    if any(n.op != "call_function" for n in made) or batched(value_of(node)):
        return None
    values: dict[fx.Node, Any] = dict(draft.literals)
    try:
        with torch.no_grad():
            for n in draft.graph.nodes:
                if n in needed and n not in values:
                    run: Any = n.target
                    args, named = fx.map_arg((n.args, n.kwargs), values.__getitem__)
                    values[n] = run(*args, **named)
    except Exception:  # of any type: an operation takes no such numbers
        return None
    result: Tensor = values[node]
    return result


def known_number(draft: Draft, node: fx.Node) -> float | None:
    """Return the number that all elements of a constant are; None if they are not known."""
    name, fills = operation(node), {"ones": 1.0, "zeros": 0.0, "full": argument(node, 1, "")}
    fill = fills.get(name.removeprefix("new_").removesuffix("_like"))
    if batched(value_of(node)) or name.endswith("_like"):
        fill = argument(node, 2, "") if name == "new_full" else fill
        return float(fill) if isinstance(fill, (int, float)) else None
    value = known_value(draft, node)
    alike = value is not None and value.numel() > 0 and bool((value == value.flatten()[0]).all())
    return float(value.flatten()[0]) if alike and value is not None else None


def without_copies(node: fx.Node, before: fx.Node, starts: Starts) -> fx.Node:
    """Return the node of a value with size 1 wherever ``expand`` has made copies.

    Args:
        node: The node of the value.
        before: The operation before which nodes are inserted.
        starts: The explained nodes, which no node replaces.
    """
    made: dict[fx.Node, Any] = {}

    def narrow(n: Any) -> Any:
        if n not in made:
            whole = n in starts or len(made) > _LARGEST
            made[n] = n if whole else _narrowed(n, before, narrow)
        return made[n]

    result: fx.Node = narrow(node)
    return result


def _narrowed(node: Any, before: fx.Node, narrow: Callable[[Any], Any]) -> Any:
    """Return a node like ``node`` that is computed from arguments without copies."""
    name, result = operation(node), node
    if name == "slice" and is_copy(node):
        return narrow(node.args[0])
    if name == "expand":
        source = narrow(node.args[0])
        while value_of(source).ndim < value_of(node).ndim:
            source = insert(before, _aten.unsqueeze.default, source, 0)
        return source
    if name in RESHAPES - {"unsqueeze"}:
        return _reshaped(node, before, narrow(node.args[0]))
    if name not in _ELEMENTWISE | _REDUCTIONS.keys() and name not in _ORDERS:
        return node
    arguments = {n: narrow(n) for n in node.all_input_nodes}
    if any(n is not source for n, source in arguments.items()):
        if name in _REDUCTIONS:
            (x, few), at = *arguments.items(), _REDUCTIONS[name]
            dims = node.args[at] if len(node.args) > at else None
            sizes = [[str(value_of(n).shape[dim]) for dim in dims or ()] for n in (x, few)]
            if not dims or sizes[0] != sizes[1]:
                return node
        args, named = fx.map_arg((node.args, node.kwargs), arguments.__getitem__)
        result = insert(before, node.target, *args, **named)
    return result


def _reshaped(node: Any, before: fx.Node, few: fx.Node) -> Any:
    """Return a node like a reshape, of an argument ``few`` without copies."""
    shapes, groups = [value_of(n).shape for n in (node.args[0], few, node)], regrouped(node)
    copied = {
        groups[0][at] for at, (n, m) in enumerate(zip(*shapes[:2], strict=True)) if str(n) != str(m)
    }
    for sizes, places in ((shapes[0], groups[0]), (shapes[2], groups[1])):
        whole = [places[at] for at, size in enumerate(sizes) if size != 1]
        if any(whole.count(group) != 1 for group in copied):
            return node  # a dimension with copies is joined with others
    sizes = [1 if at in copied else size for at, size in zip(groups[1], shapes[2], strict=True)]
    if few is node.args[0] or not all(isinstance(size, int) for size in sizes):
        return node
    return insert(before, _aten.reshape.default, few, sizes)
