"""The pass that joins an average over all positions with the dense layer that follows it.

Both are inverted together. For a dense layer W, ``W mean(x) = mean(W x)``, so the order in which a
network computes them must not change an explanation. A sum is n times the average of n positions,
and such a number may also be written out: ``W (c mean(x)) = mean((c W) x)``.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.layout import batch_dimension
from captum_mipin.graph.marks import inherit, mark, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.propagation.draft import number_of, permutation
from captum_mipin.rules import POOLED_LINEAR
from captum_mipin.rules.base import OwnOperation
from captum_mipin.rules.geometry import per_dimension
from captum_mipin.rules.pooling import margins

#: Operations allowed between an average and a dense layer; they change nothing but shapes.
FLAT = ("reshape", "flatten", "squeeze", "clone", "alias", "contiguous", "dropout")


def join_averages(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Replace each dense layer on an average by one operation on the averaged tensor.

    Args:
        graph: The graph, which is changed; see :data:`~captum_mipin.rules.POOLED_LINEAR` for the
            new operation.
        batch: The symbol of the batch size.
        starts: The explained nodes; an average that contains one of them is not joined.
    """
    for node in list(graph.nodes):
        average = None
        if operation(node) == "linear" and value_of(node).ndim == 2:
            average = _average(_source(node), batch, starts)
        if average is None or not _fits(average, argument(node, 1, "weight")):
            continue
        mark(node, original=node.target)
        node.target, node.kwargs = POOLED_LINEAR, {}
        # (x, pooled, weight, bias, dim, scale): dim is the dimension of the channels in x.
        node.args = (average.x, *(*node.args, None)[:3], average.dim, average.scale)
        for part in average.chain:
            mark(part, joined=True)


def _batch_first(x: fx.Node, at: int) -> fx.Node:
    """Return a new node: the value of ``x`` with dimension ``at`` moved to the front."""
    order = [at, *(dim for dim in range(value_of(x).ndim) if dim != at)]
    with x.graph.inserting_after(x):
        first = x.graph.call_function(torch.ops.aten.permute.default, (x, order))
    inherit(first, x, key=f"{marks(x).key}/permute", added=True)
    set_value(first, value_of(x).permute(order))
    return first


def explain_contrast(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Replace the output of a graph by its contrast, see :data:`CONTRAST`.

    Args:
        graph: The graph, which is changed.
        batch: The symbol of the batch size.
        starts: The explained nodes.

    Raises:
        UnsupportedOperationError: The output is no average over positions of two or more classes.
    """
    (output,) = graph.output_node().all_input_nodes
    layer, shape = output, value_of(output).shape
    while layer not in starts and (operation(layer) in FLAT or moves_ones(layer)):
        layer = _source(layer)
    dense = operation(layer) == "linear"
    average = None
    if len(shape) == 2 and shape[1] > 1:
        average = _average(_source(layer) if dense else output, batch, starts)
    if average is None or (dense and not _fits(average, argument(layer, 1, "weight"))):
        raise UnsupportedOperationError(
            f"contrast=True is set, but the output is that of {marks(layer).key}: it has to be an "
            "average over positions, or a dense layer on such an average, for two or more classes. "
            "Pass contrast=False"
        )
    weights = [argument(layer, 1, "weight"), argument(layer, 2, "bias")] if dense else [None, None]
    with graph.inserting_after(output):
        arguments = (average.x, *weights, average.dim, average.scale)
        contrast = graph.call_function(CONTRAST, arguments)
    inherit(contrast, output, key=f"{marks(output).key}/contrast", added=True)
    set_value(contrast, value_of(output))
    graph.output_node().args = (contrast,)
    graph.eliminate_dead_code(lambda node: node in starts or node.is_impure())


def _fits(average: "_Average", weight: fx.Node) -> bool:
    """Return True if the kept dimension of an average holds the features of a dense layer."""
    fits: bool = value_of(average.x).shape[average.dim] == value_of(weight).shape[1]
    return fits


def _contrast(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dim: int, scale: float
) -> Tensor:
    y = x.movedim(dim, -1)
    # W (c mean(x)) + b = mean((c W) x + b)
    y = scale * y if weight is None else F.linear(y, scale * weight, bias)
    # C_c = mean_p relu(y_pc − max_{k ≠ c} y_pk) over the positions p
    return margins(y, -1).clamp(min=0).flatten(1, -2).mean(1)


#: The operation that computes the contrast of each class: the mean over positions of what the
#: class's output at a position is above the largest output of all others there. Its arguments are
#: the averaged tensor x, weight and bias of the dense layer behind the average, or None, the
#: dimension of the features in x, and the number that the average is multiplied by.
CONTRAST = OwnOperation("contrast", _contrast)


class _Average(NamedTuple):
    """An average of a tensor x over all its dimensions but two.

    Attributes:
        x: The node of x, with the batch as its first dimension.
        dim: The dimension of x that is kept.
        scale: The number c of c times the average.
        chain: The operations that compute it, last one first.
    """

    x: fx.Node
    dim: int
    scale: float
    chain: list[fx.Node]


def _average(node: fx.Node, batch: str, starts: Sequence[fx.Node]) -> _Average | None:
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
        elif averaged or not (operation(node) in FLAT or moves_ones(node)):
            break
        chain.append(node)
        node = _source(node)
    at = batch_dimension(value_of(node), batch)
    left = [dim for dim in range(value_of(node).ndim) if dim != at and dim not in averaged]
    if not averaged or at is None or at in averaged or len(left) != 1:
        return None
    if at == 0:
        return _Average(node, left[0], scale, chain)
    return _Average(_batch_first(node, at), left[0] + (left[0] < at), scale, chain)


def moves_ones(node: fx.Node) -> bool:
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
