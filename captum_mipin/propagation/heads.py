"""The passes on the end of a model: a dense layer behind an average over all positions.

Both are inverted together. For a dense layer W, ``W mean(x) = mean(W x)``, so the order in which a
network computes them must not change an explanation. The same holds for weighted averages, and for
a number in front: ``W (c mean(x)) = mean((c W) x)``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.marks import inherit, mark, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.propagation.averages import FLAT, Average, average_of, moves_ones
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.forms import insert
from captum_mipin.propagation.softmax import softmax
from captum_mipin.rules import POOLED_LINEAR
from captum_mipin.rules.base import OwnOperation, varies
from captum_mipin.rules.pooling import averaged, margins


def rewrite_for_method(draft: Draft) -> None:
    """Run the rewrite of a method: ``rewrite`` of its table of rules, by default for MIP-IN.

    MIP-IN has the rewrite :func:`join_averages`.
    """
    rewrite = getattr(draft.rules, "rewrite", join_averages)
    rewrite(draft.graph, draft.batch, draft.starts)


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
            pooled = node.all_input_nodes[0]
            average = average_of(pooled, batch, starts) or _weighted(pooled, starts)
        if average is None or not _fits(average, argument(node, 1, "weight")):
            continue
        mark(node, original=node.target)
        node.target, node.kwargs = POOLED_LINEAR, {}
        # (x, pooled, weight, bias, dim, scale, shares): dim is that of the channels in x.
        own = average.dim, average.scale, average.shares
        node.args = (average.x, *(*node.args, None)[:3], *own)
        for part in average.chain:
            mark(part, joined=True)


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
        layer = layer.all_input_nodes[0]
    dense = operation(layer) == "linear"
    average = None
    if len(shape) == 2 and shape[1] > 1:
        pooled = layer.all_input_nodes[0] if dense else output
        average = average_of(pooled, batch, starts) or _weighted(pooled, starts)
    if average is None or (dense and not _fits(average, argument(layer, 1, "weight"))):
        raise UnsupportedOperationError(
            f"contrast=True is set, but the output is that of {marks(layer).key}: it has to be an "
            "average over positions, or a dense layer on such an average, for two or more classes. "
            "Pass contrast=False"
        )
    weights = [argument(layer, 1, "weight"), argument(layer, 2, "bias")] if dense else [None, None]
    with graph.inserting_after(output):
        arguments = (average.x, *weights, average.dim, average.scale, average.shares)
        contrast = graph.call_function(CONTRAST, arguments)
    inherit(contrast, output, key=f"{marks(output).key}/contrast", added=True)
    set_value(contrast, value_of(output))
    graph.output_node().args = (contrast,)
    graph.eliminate_dead_code(lambda node: node in starts or node.is_impure())


def _fits(average: Average, weight: fx.Node) -> bool:
    """Return True if the kept dimension of an average holds the features of a dense layer."""
    fits: bool = value_of(average.x).shape[average.dim] == value_of(weight).shape[1]
    return fits


def _weighted(node: Any, starts: Sequence[fx.Node]) -> Average | None:
    """Return the weighted average Σ_p a_p x_p that a node's value (batch, kept) is, or None.

    The shares a_p of the positions p are the result of a softmax over all positions, as in the
    pooling of a sequence by attention.

    Args:
        node: The node.
        starts: The explained nodes; the operations of the average do not contain them.
    """
    chain: list[fx.Node] = []
    while len(node.users) == 1 and node not in starts and operation(node) in FLAT:
        chain.append(node)
        node = node.all_input_nodes[0]
    product = operation(node) in ("matmul", "bmm")
    if not (product or operation(node) == "weighted_sum") or len(node.users) != 1 or node in starts:
        return None
    for shares, x in (node.args[:2], node.args[1::-1]):
        if not (isinstance(x, fx.Node) and value_of(x).ndim == 3):
            continue
        # (batch, 1, positions) @ x, x @ (batch, positions, 1), or a sum over the positions
        at: int = (2 if x is node.args[0] else 1) if product else node.args[2][0] % 3
        if not _is_softmax_of(shares, value_of(x).shape[at]):
            continue
        if product:
            shares = insert(node, torch.ops.aten.transpose.int, shares, 1, 2)
        return Average(x, 3 - at, 1.0, [*chain, node], shares)
    return None


def _is_softmax_of(node: Any, count: Any) -> bool:
    """Return True for a softmax over ``count`` positions of each example, also rearranged."""
    while operation(node) in (*FLAT, "transpose", "permute", "unsqueeze"):
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node):
        return False
    found = softmax(node, varies, {n: at for at, n in enumerate(node.graph.nodes)})
    if found is None or found[0] != "softmax":
        return False
    sizes = [size for size in value_of(node).shape if size != 1]
    return len(sizes) == 2 and count in sizes


def _contrast(x: Tensor, weight: Tensor | None, bias: Tensor | None, *about: Any) -> Tensor:
    dim, scale, shares = about
    y = x.movedim(dim, -1)
    # W (c mean(x)) + b = mean((c W) x + b)
    y = scale * y if weight is None else F.linear(y, scale * weight, bias)
    # C_c = mean_p relu(y_pc − max_{k ≠ c} y_pk) over the positions p
    shares = None if shares is None else shares.movedim(dim, -1)
    return averaged(margins(y, -1).clamp(min=0), shares)


#: The operation that computes the contrast of each class: the mean over positions of what the
#: class's output at a position is above the largest output of all others there. Its arguments are
#: the averaged tensor x, weight and bias of the dense layer behind the average, or None, the
#: dimension of the features in x, the number that the average is multiplied by, and the shares of
#: the positions in a weighted average, in a shape that broadcasts with x, or None.
CONTRAST = OwnOperation("contrast", _contrast)
