"""The pass that joins an average over all positions with the dense layer that follows it.

Both are inverted together. For a dense layer W, ``W mean(x) = mean(W x)``, so the order in which a
network computes them must not change an explanation. A sum is n times the average of n positions,
and such a number may also be written out: ``W (c mean(x)) = mean((c W) x)``.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from captum_mipin.graph.layout import batch_dimension
from captum_mipin.graph.marks import inherit, mark, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.propagation.draft import number_of, permutation
from captum_mipin.rules import POOLED_LINEAR
from captum_mipin.rules.geometry import per_dimension

#: Operations allowed between an average and a dense layer; they change nothing but shapes.
_FLAT = ("reshape", "flatten", "squeeze", "clone", "alias", "contiguous", "dropout")


def join_averages(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Replace each dense layer on an average by one operation on the averaged tensor.

    Args:
        graph: The graph, which is changed; see :data:`~captum_mipin.rules.POOLED_LINEAR` for the
            new operation.
        batch: The symbol of the batch size.
        starts: The explained nodes; an average that contains one of them is not joined.
    """
    for node in list(graph.nodes):
        if operation(node) != "linear" or value_of(node).ndim != 2:
            continue
        chain, averaged, scale = _averaged(_source(node), starts)
        if not averaged:
            continue
        x, weight = _source(chain[-1]), argument(node, 1, "weight")
        value, at = value_of(x), batch_dimension(value_of(x), batch)
        kept = [dim for dim in range(value.ndim) if dim != at and dim not in averaged]
        if at is None or at in averaged or len(kept) != 1:
            continue
        if value.shape[kept[0]] != value_of(weight).shape[1]:
            continue
        if at != 0:
            x = _batch_first(graph, x, at)
        mark(node, original=node.target)
        node.target, node.kwargs = POOLED_LINEAR, {}
        # (x, pooled, weight, bias, dim, scale): dim is the dimension of the channels in x.
        node.args = (x, *(*node.args, None)[:3], kept[0], scale)
        for part in chain:
            mark(part, joined=True)


def _batch_first(graph: fx.Graph, x: fx.Node, at: int) -> fx.Node:
    """Return a new node: the value of ``x`` with dimension ``at`` moved to the front."""
    order = [at, *(dim for dim in range(value_of(x).ndim) if dim != at)]
    with graph.inserting_after(x):
        first = graph.call_function(torch.ops.aten.permute.default, (x, order))
    inherit(first, x, key=f"{marks(x).key}/permute", added=True)
    set_value(first, value_of(x).permute(order))
    return first


def _averaged(node: fx.Node, starts: Sequence[fx.Node]) -> tuple[list[fx.Node], set[int], float]:
    """Return the chain of operations that computes ``node`` as an average of a tensor x.

    Args:
        node: The argument of a dense layer.
        starts: The explained nodes; the chain does not contain them.

    Returns:
        The operations of the chain, last one first; the dimensions of x that they average; the
        number c for c times the average. The first two are empty if ``node`` is no average.
    """
    chain: list[fx.Node] = []
    averaged, scale = set[int](), 1.0
    while len(node.users) == 1 and node not in starts:
        dims, scaled = whole_dims(node), number_of(node)
        if operation(node) == "sum":
            ndim, sizes = value_of(_source(node)).ndim, value_of(_source(node)).shape
            dims = {dim % ndim for dim in argument(node, 1, "dim") or ()}
            if not all(isinstance(sizes[dim], int) for dim in dims):
                break  # over the batch
            scale *= prod(sizes[dim] for dim in dims)
        if dims:
            before, after = (value_of(n).ndim for n in (_source(node), node))
            # Later averages number their dimensions without those that this one removes.
            kept = [dim for dim in range(before) if before == after or dim not in dims]
            averaged = {kept[dim] for dim in averaged} | dims
        elif scaled is not None and not averaged:
            scale *= scaled[1]
        elif averaged or not (operation(node) in _FLAT or _moves_ones(node)):
            break
        chain.append(node)
        node = _source(node)
    return (chain, averaged, scale) if averaged else ([], averaged, scale)


def _moves_ones(node: fx.Node) -> bool:
    """Return True for a transposition that moves dimensions of size 1 only."""
    order = permutation(node) or []
    moved = [dim for dim in order if value_of(_source(node)).shape[dim] != 1]
    return bool(order) and moved == sorted(moved)


def whole_dims(node: fx.Node) -> set[int]:
    """Return the dimensions that an average reduces completely; empty for other operations."""
    name = operation(node)
    if name == "mean":
        ndim, dims = value_of(_source(node)).ndim, argument(node, 1, "dim")
        return {dim % ndim for dim in dims or ()}
    if "avg_pool" not in name:
        return set()
    before, after = (value_of(n).shape[2:] for n in (_source(node), node))
    count = len(before)
    if count != int(name[-2]):  # without a batch
        return set()
    kernel: tuple[int, ...] = tuple(before)
    if "adaptive" not in name:
        padded = any(per_dimension(argument(node, 3, "padding", 0), count))
        if padded or argument(node, 6, "divisor_override"):
            return set()
        kernel = per_dimension(argument(node, 1, "kernel_size"), count)
    sizes = list(enumerate(zip(before, after, kernel, strict=True), 2))
    # Each dimension must be averaged completely (to size 1, by a kernel of its size), or unchanged.
    whole = {dim for dim, (n, m, k) in sizes if m == 1 and k == n}
    kept = {dim for dim, (n, m, _) in sizes if n == m}
    return whole if len(whole | kept) == count else set()


def _source(node: fx.Node) -> fx.Node:
    """Return the first argument node of an operation."""
    return node.all_input_nodes[0]
