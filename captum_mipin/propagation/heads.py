"""The passes on the end of a model: a dense layer behind an average over all positions.

Both are inverted together. For a dense layer W, ``W mean(x) = mean(W x)``, so the order in which a
network computes them must not change an explanation. A number may stand in front:
``W (c mean(x)) = mean((c W) x)``. A dense layer behind a weighted average is inverted so too.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.layout import batch_dimension
from captum_mipin.graph.marks import inherit, mark, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, erase_unused, is_size, operation
from captum_mipin.graph.subgraph import extract
from captum_mipin.propagation.averages import (
    FLAT,
    Average,
    average_of,
    batch_first,
    is_flat,
    moves_ones,
)
from captum_mipin.propagation.draft import Draft, permutation
from captum_mipin.propagation.forms import insert
from captum_mipin.rules import POOLED_LINEAR
from captum_mipin.rules.base import OwnOperation, varies
from captum_mipin.rules.gates import REARRANGED
from captum_mipin.rules.pooling import averaged, margins

_aten = torch.ops.aten

#: Operations that a weighted average may be computed with.
_WEIGHTED = (REARRANGED - {"rsub", "slice", "getitem", "chunk", "split", "unsafe_split"}) | {
    "matmul", "bmm", "weighted_sum", "mul", "sum", "add", "addcmul", "div", "divided", "mean",
    *(f"{kind}avg_pool{dims}d" for kind in ("", "adaptive_", "_adaptive_") for dims in (1, 2, 3)),
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
            average = _joined(pooled, batch, starts)
            known = (average is not None and average.shares is not None) or (
                _unmoved(pooled, starts) in starts
            )
            if not known and _weighted(pooled, batch, ()):
                # a product inside the average is explained: the layer then has another inverse
                mark(node, key=f"{marks(node).key}, alone")
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
        average = _joined(pooled, batch, starts)
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
    erase_unused(graph, starts)


def _unmoved(node: fx.Node, starts: Sequence[fx.Node]) -> fx.Node:
    """Return the node of a value before transpositions and the operations :data:`FLAT`."""
    while node not in starts and (is_flat(node) or permutation(node) is not None):
        node = node.all_input_nodes[0]
    return node


def _joined(node: fx.Node, batch: str, starts: Sequence[fx.Node]) -> Average | None:
    """Return the average or weighted average that a node's value is; None for others."""
    return _weighted(node, batch, starts) or average_of(node, batch, starts)


def _fits(average: Average, weight: fx.Node) -> bool:
    """Return True if the kept dimension of an average holds the features of a dense layer."""
    fits: bool = value_of(average.x).shape[average.dim] == value_of(weight).shape[1]
    return fits


class _Part(NamedTuple):
    """The part of a graph that computes a value from weights w and a tensor x.

    Attributes:
        chain: The operations, last one first.
        gate: The node of w.
        x: The node of x.
        copies: Node that computes w or x a second time → ``gate`` or ``x``.
        sizes: The nodes of the batch size.
    """

    chain: list[fx.Node]
    gate: fx.Node
    x: fx.Node
    copies: dict[fx.Node, fx.Node]
    sizes: list[fx.Node]


def _part(node: fx.Node, starts: Sequence[fx.Node]) -> _Part | None:
    """Return the part by which a node may be a weighted average; None if there is none.

    Args:
        node: The node.
        starts: The explained nodes, which are no part of the chain.
    """
    chain, ends, waiting = list[fx.Node](), dict[Any, list[fx.Node]](), [node]
    sizes = dict[fx.Node, None]()
    while waiting and len(chain) < _LONGEST:
        n = waiting.pop()
        if operation(n) in _WEIGHTED and n not in starts:
            chain.append(n)
            sizes.update(dict.fromkeys(filter(is_size, n.all_input_nodes)))
            carried = (i for i in n.all_input_nodes if varies(i) and not is_size(i))
            waiting.extend(i for i in carried if i not in chain)
        else:
            key = n if n in starts else (n.target, n.args, *n.kwargs.items())
            ends.setdefault(key, []).append(n)
    firsts = [min(same) for same in ends.values()]
    gates = [n for n in firsts if operation(n) in _GATES]
    if waiting or len(ends) != 2 or len(gates) != 1:
        return None
    (x,) = (n for n in firsts if n is not gates[0])
    copies = {n: min(same) for same in ends.values() for n in same if n is not min(same)}
    return _Part(chain, gates[0], x, copies, [*sizes])


def _weighted(node: fx.Node, batch: str, starts: Sequence[fx.Node]) -> Average | None:
    """Return c times the weighted average Σ_p a_p x_p that a value (batch, kept) is, or None.

    The shares a_p of the positions p are gates that sum to 1, as in the pooling of a sequence by
    attention: the result of a softmax, or exponentials that are divided by their sum. Whether a
    value is such an average is found by numbers.

    Args:
        node: The node of the value.
        batch: The symbol of the batch size.
        starts: The explained nodes; the operations of the average do not contain them.
    """
    part = _part(node, starts) if value_of(node).ndim == 2 else None
    if part is None:
        return None
    gate, x, at = part.gate, part.x, batch_dimension(value_of(part.x), batch)
    gate_at = batch_dimension(value_of(gate), batch)
    sizes = [size for dim, size in enumerate(value_of(x).shape) if dim != at]
    if at is None or gate_at is None or len(sizes) < 2:
        return None
    numbers = _numbers(node, part, batch)
    if numbers is None:
        return None
    w, values, found = numbers
    w, values = w.movedim(gate_at, 0).flatten(1), values.movedim(at, 0)
    dims = value_of(gate).shape[argument(gate, 1, "dim")] if "softmax" in operation(gate) else 0
    for dim, size in enumerate(sizes, 1):
        aligned = [-1, *sizes[: dim - 1], 1, *sizes[dim:]]
        if value_of(node).shape[1:] != (size,) or w.shape[1] != prod(aligned[1:]):
            continue
        total = torch.einsum("bp,bpc->bc", w, values.movedim(dim, -1).flatten(1, -2))
        normalised = _ratio(found, total / w.sum(1, keepdim=True))
        scale = normalised or (_ratio(found, total) if dims == w.shape[1] else None)
        if scale is None:
            continue
        for copy, first in part.copies.items():
            copy.replace_all_uses_with(first)
        if gate_at:
            order = [gate_at, *(d for d in range(value_of(gate).ndim) if d != gate_at)]
            gate = insert(node, _aten.permute.default, gate, order)
        shares = insert(node, _aten.reshape.default, gate, [-1, w.shape[1]])
        if normalised:
            sums = insert(node, _aten.sum.dim_IntList, shares, [1], True)
            shares = insert(node, _aten.div.Tensor, shares, sums)
        shares = insert(node, _aten.reshape.default, shares, aligned)
        return Average(batch_first(x, at) if at else x, dim, scale, part.chain, shares)
    return None


def _numbers(node: fx.Node, part: _Part, batch: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return random weights w and values x of two examples, and what the graph makes of them."""
    draw = torch.Generator().manual_seed(0)
    given = {}
    for n in (part.gate, part.x):
        shape = [2 if str(size) == batch else size for size in value_of(n).shape]
        if not all(isinstance(size, int) for size in shape):
            return None
        given[n] = torch.rand(shape, dtype=torch.float64, generator=draw)
    copies = {copy: given[first] for copy, first in part.copies.items()}
    sizes = {n: 2 for n in part.sizes if str(value_of(n)) == batch}
    inputs: dict[fx.Node, Any] = {**given, **copies, **sizes}
    try:
        (found,) = extract(node.graph, inputs, [node])(*inputs.values())
    except Exception:  # of any type: it depends on other values, or takes no such numbers
        return None
    return given[part.gate], given[part.x], found


def _ratio(found: Tensor, expected: Tensor) -> float | None:
    """Return c if ``found`` is c times ``expected`` in the precision of its dtype; else None."""
    if found.shape != expected.shape or not found.is_floating_point():
        return None
    exact = found.dtype == torch.float64
    tolerance = max(1e-9, 20 * torch.finfo(found.dtype).eps)
    ratio = float((found.double() * expected).sum() / expected.square().sum()) if exact else 1.0
    scale = round(ratio, 12)
    close = torch.allclose(found.double(), scale * expected, rtol=tolerance, atol=0)
    return scale if close and scale else None


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
