"""The passes on the end of a model: a dense layer behind an average over all positions.

Both are inverted together. For a dense layer W, ``W mean(x) = mean(W x)``, so the order in which a
network computes them must not change an explanation. The same holds for weighted averages, and for
a number in front: ``W (c mean(x)) = mean((c W) x)``.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.marks import inherit, mark, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, is_size, operation
from captum_mipin.graph.subgraph import extract
from captum_mipin.propagation.averages import FLAT, Average, average_of, moves_ones
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.forms import insert
from captum_mipin.propagation.softmax import softmax
from captum_mipin.rules import POOLED_LINEAR
from captum_mipin.rules.base import OwnOperation, varies
from captum_mipin.rules.gates import REARRANGED
from captum_mipin.rules.pooling import averaged, margins

#: Operations that a weighted average may be computed with.
_WEIGHTED = (REARRANGED - {"rsub", "slice", "getitem", "chunk", "split", "unsafe_split"}) | {
    "matmul", "bmm", "weighted_sum", "mul", "sum",
}  # fmt: skip
#: Largest number of such operations.
_LONGEST = 40


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


def _weighted(node: fx.Node, starts: Sequence[fx.Node]) -> Average | None:
    """Return the weighted average Σ_p a_p x_p that a node's value (batch, kept) is, or None.

    The shares a_p of the positions p are the result of a softmax over all positions, as in the
    pooling of a sequence by attention. Whether it is one is found by values.

    Args:
        node: The node.
        starts: The explained nodes; the operations of the average do not contain them.
    """
    order = {n: at for at, n in enumerate(node.graph.nodes)}
    chain, ends, waiting = list[fx.Node](), list[fx.Node](), [node]
    while waiting and len(chain) < _LONGEST:
        n = waiting.pop()
        if operation(n) in _WEIGHTED and n not in starts:
            chain.append(n)
            waiting.extend(i for i in n.all_input_nodes if varies(i) and i not in (*chain, *ends))
        elif n not in ends and not is_size(n):
            ends.append(n)
    shares = [n for n in ends if (softmax(n, varies, order) or ("",))[0] == "softmax"]
    if waiting or len(ends) != 2 or len(shares) != 1:
        return None
    (a,), (x,) = shares, [n for n in ends if n is not shares[0]]
    sizes = [*value_of(x).shape[1:]]
    positions = prod(value_of(a).shape[1:])
    for dim, size in enumerate(sizes, 1):
        if not isinstance(size, int) or value_of(node).shape[1:] != (size,):
            continue
        aligned = [-1, *sizes[: dim - 1], 1, *sizes[dim:]]
        if positions == prod(aligned[1:]) and _averages(node, a, x, dim):
            a = insert(node, torch.ops.aten.reshape.default, a, aligned)
            return Average(x, dim, 1.0, chain, a)
    return None


def _averages(node: fx.Node, a: fx.Node, x: fx.Node, dim: int) -> bool:
    """Return True if a node's value is Σ_p a_p x_p over all positions, for two random examples."""
    draw = torch.Generator().manual_seed(0)
    shares, values = (
        torch.rand(2, *value_of(n).shape[1:], dtype=torch.float64, generator=draw) for n in (a, x)
    )
    try:
        (found,) = extract(node.graph, [a, x], [node])(shares, values)
    except Exception:  # of any type: it depends on other values, or takes no float64
        return False
    expected = torch.einsum("bp,bpc->bc", shares.flatten(1), values.movedim(dim, -1).flatten(1, -2))
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-9)


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
