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
from captum_mipin.rules import POOLED_LINEAR
from captum_mipin.rules.base import OwnOperation, varies
from captum_mipin.rules.gates import REARRANGED
from captum_mipin.rules.pooling import averaged, margins

_aten = torch.ops.aten

#: Operations that a weighted average may be computed with.
_WEIGHTED = (REARRANGED - {"rsub", "slice", "getitem", "chunk", "split", "unsafe_split"}) | {
    "matmul", "bmm", "weighted_sum", "mul", "sum", "add", "div", "divided",
}  # fmt: skip
#: Operations that make the shares, or weights that are divided by their sum.
_GATES = ("softmax", "_softmax", "_safe_softmax", "exp")
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

    The shares a_p of the positions p are gates that sum to 1, as in the pooling of a sequence by
    attention: the result of a softmax, or weights that are divided by their sum. Whether it is such
    an average is found by values.

    Args:
        node: The node.
        starts: The explained nodes; the operations of the average do not contain them.
    """
    chain, ends, waiting = list[fx.Node](), dict[Any, fx.Node](), [node]
    while waiting and len(chain) < _LONGEST:
        n = waiting.pop()
        if operation(n) in _WEIGHTED and n not in starts:
            chain.append(n)
            waiting.extend(i for i in n.all_input_nodes if varies(i) and i not in chain)
        elif not is_size(n):
            key = n if n in starts else (n.target, n.args, *n.kwargs.items())
            first, last = sorted([n, ends.get(key, n)])
            if first is not last:  # the same value, written twice
                last.replace_all_uses_with(first)
            ends[key] = first
    gates = [n for n in ends.values() if operation(n) in _GATES]
    if waiting or len(ends) != 2 or len(gates) != 1 or value_of(node).ndim != 2:
        return None
    (gate,), (x,) = gates, [n for n in ends.values() if n is not gates[0]]
    sizes, positions = [*value_of(x).shape[1:]], prod(value_of(gate).shape[1:])
    for dim, size in enumerate(sizes, 1):
        aligned = [-1, *sizes[: dim - 1], 1, *sizes[dim:]]
        if len(sizes) < 2 or value_of(node).shape[1:] != (size,) or positions != prod(aligned[1:]):
            continue
        kind = _kind(node, gate, x, dim)
        if kind is None:
            return None
        shares = insert(node, _aten.reshape.default, gate, [-1, positions])
        if kind == "normalised":
            total = insert(node, _aten.sum.dim_IntList, shares, [1], True)
            shares = insert(node, _aten.div.Tensor, shares, total)
        return Average(x, dim, 1.0, chain, insert(node, _aten.reshape.default, shares, aligned))
    return None


def _kind(node: fx.Node, gate: fx.Node, x: fx.Node, dim: int) -> str | None:
    """Return the kind of a node's weighted average, by its values for two random examples.

    Args:
        node: The node.
        gate: The weights w, one for each position.
        x: The tensor that is averaged.
        dim: The dimension of x that is kept.

    Returns:
        "sum" for Σ_p w_p x_p with a softmax w over all positions, "normalised" for
        Σ_p w_p x_p / Σ_p w_p, None for any other function.
    """
    draw = torch.Generator().manual_seed(0)
    w, values = (
        torch.rand(2, *value_of(n).shape[1:], dtype=torch.float64, generator=draw)
        for n in (gate, x)
    )
    try:
        (found,) = extract(node.graph, [gate, x], [node])(w, values)
    except Exception:  # of any type: it depends on other values, or takes no float64
        return None
    places = values.movedim(dim, -1).flatten(1, -2)
    total = torch.einsum("bp,bpc->bc", w.flatten(1), places)
    if found.shape == total.shape:
        if torch.allclose(found, total / w.flatten(1).sum(1, keepdim=True), rtol=1e-9):
            return "normalised"
        whole = "softmax" in operation(gate) and (
            value_of(gate).shape[argument(gate, 1, "dim")] == w[0].numel()
        )
        if whole and torch.allclose(found, total, rtol=1e-9):
            return "sum"
    return None


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
