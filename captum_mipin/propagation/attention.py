"""Attention in one form: the product of values with a softmax of scores.

Methods that send something back through attention weights need the weights as a node of the graph:

- ``scaled_dot_product_attention`` becomes softmax(c Q Kᵀ + M) V, with the factor c and the mask M;
- exp(x) / Σ exp(x) becomes softmax(x);
- softmax(x − m) becomes softmax(x), if m is the same for all entries that the softmax adds up.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.marks import mark, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.propagation.forms import become, insert
from captum_mipin.rules.base import varies

_aten = torch.ops.aten

#: Operations that compute a softmax along the dimension of their second argument.
SOFTMAX = ("softmax", "_softmax", "_safe_softmax")


def expand_attention(graph: fx.Graph, starts: Collection[fx.Node]) -> None:
    """Write all attention in a marked graph as products and a softmax.

    Args:
        graph: The graph, which is changed.
        starts: The explained nodes, which stay as they are.
    """
    node: Any
    for node in list(graph.nodes):
        if operation(node) == "scaled_dot_product_attention" and not argument(node, 4, "dropout_p"):
            _expand(node)
        elif operation(node) == "divided" and node not in starts:
            _softmax_by_hand(node)
        # after the ratio, which may have become a softmax
        if operation(node) in SOFTMAX:
            _leave_out_shifts(node, starts)
    graph.eliminate_dead_code(lambda n: n in starts or n.is_impure())


def _expand(node: Any) -> None:
    """Replace a fused attention by softmax(c Q Kᵀ + M) V.

    The softmax is 0, and not NaN, for a query that the mask allows to look nowhere.
    """
    (query, key, value), scale = node.args[:3], argument(node, 6, "scale")
    if argument(node, 7, "enable_gqa", False):  # each head of K and V serves several heads of Q
        count = value_of(query).shape[-3] // value_of(key).shape[-3]
        key = insert(node, _aten.repeat_interleave.self_int, key, count, -3)
        value = insert(node, _aten.repeat_interleave.self_int, value, count, -3)
    scale = value_of(query).shape[-1] ** -0.5 if scale is None else scale
    key = insert(node, _aten.transpose.int, key, -2, -1)
    scores = insert(node, _aten.matmul.default, query, key)
    scaled = insert(node, _aten.mul.Tensor, scores, scale)
    mark(key, added=True)
    mark(scaled, added=True)
    weights = insert(node, _aten._safe_softmax.default, _masked(node, scaled), -1)
    become(node, _aten.matmul.default, weights, value)


def _masked(node: Any, scores: fx.Node) -> fx.Node:
    """Return the node of scores behind the mask of a fused attention."""
    mask = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal", False):
        ones = insert(node, _aten.ones_like.default, scores, dtype=torch.bool)
        mask = insert(node, _aten.tril.default, ones)
    if mask is None:
        return scores
    if value_of(mask).dtype == torch.bool:
        return insert(node, _aten.where.ScalarOther, mask, scores, -torch.inf)
    return insert(node, _aten.add.Tensor, scores, mask)


def _softmax_by_hand(node: Any) -> None:
    """Replace exp(x) / Σ exp(x) by a softmax."""
    above, below = node.args
    if operation(below) == "expand":
        below = below.args[0]
    sizes = value_of(below).shape
    total = below.args[0] if operation(below) == "unsqueeze" else below
    if operation(above) != "exp" or operation(total) != "sum" or len(sizes) != value_of(node).ndim:
        return
    dims = argument(total, 1, "dim") or ()
    same = operation(total.args[0]) == "exp" and total.args[0].args == above.args
    if same and len(dims) == 1 and sizes[dims[0]] == 1:
        become(node, _aten.softmax.int, above.args[0], dims[0])


def _leave_out_shifts(node: Any, starts: Collection[fx.Node]) -> None:
    """Replace softmax(x ± m) by softmax(x), for m that is the same along the softmax."""
    x, dim = node.args[:2]
    while operation(x) in ("add", "sub") and x not in starts and not x.kwargs:
        pairs = (x.args, x.args[::-1]) if operation(x) == "add" else (x.args,)
        kept = [one for one, shift in pairs if varies(one) and _is_shift(shift, x, dim)]
        if not kept:
            break
        x = kept[0]
    node.args = (x, *node.args[1:])


def _is_shift(shift: Any, total: fx.Node, dim: int) -> bool:
    """Return True if a term of a sum is the same for all entries along a dimension."""
    if not isinstance(shift, fx.Node):
        return True
    sizes, behind = value_of(shift).shape, value_of(total).ndim - dim % value_of(total).ndim
    return len(sizes) < behind or bool(sizes[-behind] == 1)
