"""Dense layers on averages over all places: where the averages stand in the graph, and how they are taken together.

``W mean(x) = mean(W x)``: which of the two a network does first is a matter of spelling, and is none of the method's.
"""

from collections.abc import Sequence

import torch
from torch import fx

from captum_mipin.graph.layout import batch_dimension
from captum_mipin.graph.marks import inherit, mark, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.rules import PooledLinear
from captum_mipin.rules.base import each

#: Operations between averages and a dense layer that change a shape at most.
_FLAT = (
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "squeeze",
    "clone",
    "alias",
    "contiguous",
    "dropout",
)


def join_averages(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Let a dense layer on averages over all places be inverted from there, see :class:`~captum_mipin.rules.PooledLinear`."""
    for node in list(graph.nodes):
        if operation(node) != "linear" or value_of(node).ndim != 2:
            continue
        chain, averaged = _averaged(_source(node), starts)
        if not averaged:
            continue
        x = _source(chain[-1])
        at = batch_dimension(value_of(x), batch)
        kept = [dim for dim in range(value_of(x).ndim) if dim != at and dim not in averaged]
        weight = argument(node, 1, "weight")
        if at is None or at in averaged or len(kept) != 1:
            continue
        if value_of(x).shape[kept[0]] == value_of(weight).shape[1]:
            if at != 0:
                x = _batch_first(graph, x, at)  # the channels come after the batch, where they were
            mark(node, original=node.target)
            node.target, node.args, node.kwargs = (
                PooledLinear(),
                (x, *(*node.args, None)[:3], kept[0]),
                {},
            )
            for part in chain:
                mark(part, joined=True)


def _batch_first(graph: fx.Graph, x: fx.Node, at: int) -> fx.Node:
    """``x`` with dimension ``at`` as the first."""
    order = [at, *(dim for dim in range(value_of(x).ndim) if dim != at)]
    with graph.inserting_after(x):
        first = graph.call_function(torch.ops.aten.permute.default, (x, order))
    inherit(first, x, key=f"{marks(x).key}/permute", added=True)
    set_value(first, value_of(x).permute(order))
    return first


def _averaged(node: fx.Node, starts: Sequence[fx.Node]) -> tuple[list[fx.Node], set[int]]:
    """The operations, last first, by which ``node`` is an average, and the dimensions averaged of what goes into them."""
    chain: list[fx.Node] = []
    averaged = set[int]()
    while len(node.users) == 1 and node not in starts:
        dims = whole_dims(node)
        if dims:
            before, after = (value_of(n).ndim for n in (_source(node), node))
            kept = [dim for dim in range(before) if before == after or dim not in dims]
            averaged = {kept[dim] for dim in averaged} | dims
        elif operation(node) not in _FLAT or averaged:
            break
        chain.append(node)
        node = _source(node)
    return (chain, averaged) if averaged else ([], averaged)


def whole_dims(node: fx.Node) -> set[int]:
    """The dimensions that an average takes whole; none for an average of parts, and for other operations."""
    name = operation(node)
    if name == "mean":
        ndim, dims = value_of(_source(node)).ndim, argument(node, 1, "dim")
        return {dim % ndim for dim in dims} if dims else set()
    if "avg_pool" not in name:
        return set()
    before, after = (value_of(n).shape[2:] for n in (_source(node), node))
    if len(before) != int(name[-2]):  # no batch
        return set()
    if "adaptive" in name:
        kernel = tuple(before)
    elif any(each(argument(node, 3, "padding", 0), len(before))) or argument(
        node, 6, "divisor_override"
    ):
        return set()
    else:
        kernel = each(argument(node, 1, "kernel_size"), len(before))
    whole = {
        dim + 2
        for dim, (n, m, k) in enumerate(zip(before, after, kernel, strict=True))
        if m == 1 and k == n
    }
    kept = [dim + 2 for dim, (n, m) in enumerate(zip(before, after, strict=True)) if n == m]
    return whole if len(whole | set(kept)) == len(before) else set()


def _source(node: fx.Node) -> fx.Node:
    """The tensor that an operation works on."""
    return node.all_input_nodes[0]
