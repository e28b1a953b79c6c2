"""Averages of a tensor over all positions, however they are written.

A sum is n times the average of n positions, and such a number may also be written out.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import fx

from captum_mipin.graph.layout import batch_dimension
from captum_mipin.graph.marks import inherit, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.propagation.draft import number_of, permutation
from captum_mipin.rules.geometry import per_dimension

#: Operations allowed between an average and a dense layer; they change nothing but shapes.
FLAT = ("reshape", "flatten", "squeeze", "clone", "alias", "contiguous", "dropout")


def batch_first(x: fx.Node, at: int) -> fx.Node:
    """Return a new node: the value of ``x`` with dimension ``at`` moved to the front."""
    order = [at, *(dim for dim in range(value_of(x).ndim) if dim != at)]
    with x.graph.inserting_after(x):
        first = x.graph.call_function(torch.ops.aten.permute.default, (x, order))
    inherit(first, x, key=f"{marks(x).key}/permute", added=True)
    set_value(first, value_of(x).permute(order))
    return first


class Average(NamedTuple):
    """An average of a tensor x over all its dimensions but two, or a weighted average.

    Attributes:
        x: The node of x, with the batch as its first dimension.
        dim: The dimension of x that is kept.
        scale: The number c of c times the average.
        chain: The operations that compute it, last one first.
        shares: The node of the shares of the positions, made by a softmax, in a shape that
            broadcasts with x. None for equal shares.
    """

    x: fx.Node
    dim: int
    scale: float
    chain: list[fx.Node]
    shares: fx.Node | None = None


def average_of(node: fx.Node, batch: str, starts: Sequence[fx.Node]) -> Average | None:
    """Return the average over positions that a node's value (batch, kept) is; None for others.

    Args:
        node: The node. If its batch is not the first dimension of x, a node is added to the graph.
        batch: The symbol of the batch size.
        starts: The explained nodes; the operations of the average do not contain them.
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
        elif (order := permutation(node)) is not None:
            averaged = {order[dim] for dim in averaged}
        elif averaged or not is_flat(node):
            break
        chain.append(node)
        node = _source(node)
    at = batch_dimension(value_of(node), batch)
    left = [dim for dim in range(value_of(node).ndim) if dim != at and dim not in averaged]
    if not averaged or at is None or at in averaged or len(left) != 1:
        return None
    if at == 0:
        return Average(node, left[0], scale, chain)
    return Average(batch_first(node, at), left[0] + (left[0] < at), scale, chain)


def moves_ones(node: fx.Node) -> bool:
    """Return True for a transposition that moves dimensions of size 1 only."""
    order = permutation(node) or []
    moved = [dim for dim in order if value_of(_source(node)).shape[dim] != 1]
    return bool(order) and moved == sorted(moved)


def is_flat(node: fx.Node) -> bool:
    """Return True if an operation changes no numbers, and moves or leaves out sizes of 1 only."""
    if operation(node) not in FLAT:
        return False
    before, after = ([str(n) for n in value_of(n).shape] for n in (_source(node), node))
    return [size for size in before if size != "1"] == [size for size in after if size != "1"]


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
