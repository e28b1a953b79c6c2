"""Attention in one form, the product of values with a softmax of scores, and where it stands.

Methods that send something back through attention weights need the weights as a node of the graph:

- ``scaled_dot_product_attention`` becomes softmax(c Q Kᵀ + M) V, with the factor c and the mask M;
- exp(x) / Σ exp(x) becomes softmax(x).
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layout import Layout
from captum_mipin.graph.marks import inherit, mark, marks, value_of
from captum_mipin.graph.nodes import argument, erase_unused, operation, place
from captum_mipin.graph.subgraph import extract, run_part
from captum_mipin.propagation.batch_layout import lay_out_batch
from captum_mipin.propagation.divisors import steps_before
from captum_mipin.propagation.draft import Draft, descendants
from captum_mipin.propagation.forms import become, insert, spell
from captum_mipin.propagation.marking import drop_unused, mark_signal, mark_varying
from captum_mipin.propagation.passes import draft
from captum_mipin.propagation.runtime import seed
from captum_mipin.rules.base import is_floating, varies
from captum_mipin.rules.gates import gate_source
from captum_mipin.types import Inputs, Target

_aten = torch.ops.aten

#: Operations with weights, and norms: what they return is a new feature, not a comparison.
_WEIGHTED = frozenset(
    {"linear", "mm", "addmm", "matmul", "bmm", "layer_norm", "rms_norm", "embedding"}
    | {f"conv{dims}d" for dims in (1, 2, 3)}
)
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
            _softmax_by_hand(node, starts)
        if operation(node) in SOFTMAX and node not in starts:
            _leave_out_shift(node, starts)
    erase_unused(graph, starts)


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


def _softmax_by_hand(node: Any, starts: Collection[fx.Node]) -> None:
    """Replace exp(x) / Σ exp(x) by a softmax."""
    above, below = node.args
    while operation(below) == "expand":
        below = below.args[0]
    total, dims = steps_before(below, starts)[-1]
    along = argument(total, 1, "dim") or [] if operation(total) == "sum" else []
    if operation(above) != "exp" or len(along) != 1 or value_of(below).ndim != value_of(node).ndim:
        return
    sizes, summed = value_of(below).shape, value_of(total.args[0]).ndim
    removed, dim = value_of(total).ndim < summed, along[0] % summed
    source, order = steps_before(total.args[0], starts)[-1]
    # dimension of Σ exp(x) → dimension of x
    own = [order[at + (removed and at >= dim)] for at in range(value_of(total).ndim)]
    same = operation(source) == "exp" and source.args == above.args
    at_place = all(
        size == 1 or (at is not None and own[at] == place)
        for place, (size, at) in enumerate(zip(sizes, dims, strict=True))
    )
    if same and at_place and order[dim] is not None:
        become(node, _aten.softmax.int, above.args[0], order[dim])


def _leave_out_shift(node: Any, starts: Collection[fx.Node]) -> None:
    """Replace softmax(x − m) by softmax(x), for m that is one number for each row of x."""
    dim = argument(node, 1, "dim") % value_of(node).ndim - value_of(node).ndim
    while operation(node.args[0]) == "sub" and node.args[0] not in starts:
        x, shift = node.args[0].args[:2]
        whole = isinstance(x, fx.Node) and str(value_of(x).shape) == str(value_of(node).shape)
        sizes = value_of(shift).shape if isinstance(shift, fx.Node) else ()
        if not whole or (len(sizes) >= -dim and sizes[dim] != 1):
            return
        node.args = (x, *node.args[1:])


# ------------------------------------------------------------------------ blocks of self-attention


def self_attentions(draft: Draft) -> list[fx.Node]:
    """Return the nodes of all attention weights, in order of execution.

    Args:
        draft: A draft whose attention is expanded, with the marks of ``lay_out_batch``.

    Raises:
        UnsupportedOperationError: There are no attention weights (..., tokens, tokens) of one
            number of tokens; or something else than values is multiplied by them.
    """
    products = [node for node in draft.graph.nodes if _is_product(node)]
    used = {gate_source(n, varies) for node in products for n in node.args[:2]}
    found = [n for n in draft.graph.nodes if operation(n) in SOFTMAX and _is_of_product(n.args[0])]
    if not found:
        raise UnsupportedOperationError(
            "the model has no self-attention, expected a softmax of products of queries and keys "
            "that weights values: use a method for all networks, such as LRP"
        )
    for node in found:
        sizes, at = value_of(node).shape, marks(node).layout.dim
        last = argument(node, 1, "dim") % len(sizes) == len(sizes) - 1
        if node not in used or not last or len(sizes) < 3 or at >= len(sizes) - 2:
            raise _refusal(node, "does not weight values as it is: it is mixed or masked later on")
        if sizes[-2] != sizes[-1]:
            text = f"is cross-attention, of {sizes[-2]} queries and {sizes[-1]} keys"
            raise _refusal(node, text)
    counts = {int(value_of(node).shape[-1]) for node in found}
    if len(counts) > 1:
        text = f"is one of several with {', '.join(map(str, sorted(counts)))} tokens"
        raise _refusal(found[-1], text)
    return found


def _refusal(node: fx.Node, text: str) -> UnsupportedOperationError:
    """Return the error for an attention that is no self-attention of all tokens."""
    return UnsupportedOperationError(
        f"the attention in {place(node).path or 'the model itself'} {text}; expected "
        "self-attention of the same tokens in all blocks: use a method for all networks, such as "
        'LRP(model, attention="attnlrp")'
    )


def _is_product(node: Any) -> bool:
    """Return True for a matrix product, or a weighted sum, of two values of the input."""
    return operation(node) in ("matmul", "bmm", "weighted_sum") and all(map(varies, node.args[:2]))


def _is_of_product(node: Any) -> bool:
    """Return True if a value is computed from a product of two values, without weights between."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if _is_product(node):
            return True
        if operation(node) not in _WEIGHTED:
            waiting.extend(n for n in node.all_input_nodes if varies(n) and n not in seen)
            seen.update(node.all_input_nodes)
    return False


def crossings(draft: Draft) -> list[fx.Node]:
    """Return the nodes through which all values pass on their way to the output, in order.

    Values start at inputs with floating-point numbers, and at embeddings. What integers are used
    for besides, such as masks, does not count.
    """
    order = {node: at for at, node in enumerate(draft.graph.nodes)}
    passing, reach, found = set[fx.Node](), 0, []
    for node in draft.graph.nodes:
        starts = node in draft.starts or operation(node) == "embedding"
        follows = starts or any(n in passing for n in node.all_input_nodes)
        if node.op == "output" or not (
            follows and marks(node).depends and is_floating(value_of(node))
        ):
            continue
        passing.add(node)
        if reach <= order[node]:
            found.append(node)
        # no path jumps over a node if no value before it is used behind it
        reach = max([reach, *(order[user] for user in node.users)])
    return found


def _expand_all(made: Draft) -> None:
    """Write all attention of a draft as products and a softmax."""
    expand_attention(made.graph, made.starts)


class Encoder:
    """The self-attention of a captured graph, in modules that return its values.

    Args:
        captured: The graph of a transformer.

    Attributes:
        tokens: Number of tokens.
        layouts: One layout per A_l, where its examples lie.
        place: Dimension of the tokens in Z_l; that of the examples is 1 − place.
        blocks: Whether the ends of all blocks are known.
        per_token: Whether the model has outputs per token, so that the target decides what is read.

    Raises:
        UnsupportedOperationError: The graph has no attention, or no attention of all tokens.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        passes = (mark_varying, drop_unused, spell, _expand_all, mark_signal, lay_out_batch)
        made = draft(captured, {}, passes=passes)
        for node in made.graph.nodes:
            if mixes := marks(node).mixes:
                raise UnsupportedOperationError(
                    f"aten.{operation(node)} in {place(node).path or 'the model itself'}: {mixes}"
                )
        weights = self_attentions(made)
        self.tokens = int(value_of(weights[0]).shape[-1])
        self.layouts = [marks(node).layout for node in weights]
        ends = self._ends(made, weights)
        # the end of a block lies at the same place in all blocks; a norm may follow the last one
        counts = {len(nodes) for nodes in ends[:-1]}
        self.blocks = len(counts) == 1 and len(ends[-1]) >= max(counts)
        streams = [nodes[max(counts) - 1] for nodes in ends] if self.blocks else [ends[-1][-1]]
        self.place = 1 - marks(streams[-1]).layout.dim
        self._build(made, [_watched(made.graph, node) for node in weights], streams)

    def _ends(self, made: Draft, weights: Sequence[fx.Node]) -> list[list[fx.Node]]:
        """Return, for each block, the nodes behind its attention through which all values pass."""
        order = {node: at for at, node in enumerate(made.graph.nodes)}
        tokens = [node for node in crossings(made) if self._is_stream(node)]
        bounds = [*(order[node] for node in weights), len(order)]
        ends = [
            [node for node in tokens if start < order[node] < stop]
            for start, stop in pairwise(bounds)
        ]
        for node, behind in zip(weights, ends, strict=True):
            if not behind:
                raise _refusal(
                    node,
                    "is of windows, channels, or one of several branches: behind it is no tensor "
                    f"(batch, {self.tokens} tokens, features) through which all values pass",
                )
        return ends

    def _is_stream(self, node: fx.Node) -> bool:
        """Return True for a tensor (batch, tokens, features) or (tokens, batch, features)."""
        value, layout = value_of(node), marks(node).layout
        if not isinstance(value, Tensor) or value.ndim != 3 or layout.dim > 1:
            return False
        return layout == Layout(layout.dim) and value.shape[1 - layout.dim] == self.tokens

    def _build(self, made: Draft, weights: list[fx.Node], streams: list[fx.Node]) -> None:
        """Make the modules that compute A_l and Z_l, the output, and what the output reads."""
        graph, last, output = made.graph, streams[-1], made.output
        placeholders = graph.find_nodes(op="placeholder")
        self._order = [marks(node).origin for node in placeholders]
        above = descendants([last])
        taken = dict.fromkeys(n for node in above for n in node.all_input_nodes if n not in above)
        others = [node for node in taken if node not in above]
        after = [n for n in crossings(made) if n in above and n is not last]
        read = next((n for n in after if not self._is_stream(n)), output)
        self.per_token = read is output
        self._counts = len(weights), len(streams)
        self._body = extract(graph, placeholders, [*weights, *streams, *others])
        self._tail = extract(graph, [last, *others], [output])
        self._reading = extract(graph, [last, *others], [read])

    def run(
        self, values: Mapping[str, Any], shown: Inputs
    ) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """Return all A_l, all Z_l (only the last one if ``blocks`` is False), and other values.

        Args:
            values: Name of a placeholder of the captured graph → its value.
            shown: Tensors whose shapes an error message contains.
        """
        results = run_part(self._body, [values[name] for name in self._order], shown)
        first, second = self._counts[0], sum(self._counts)
        return list(results[:first]), list(results[first:second]), list(results[second:])

    def output(self, z: Tensor, others: Sequence[Any]) -> Tensor:
        """Return the model's output for the tokens Z_L."""
        result: Tensor = self._tail(z, *others)[0]
        return result

    def rows(self, z: Tensor, others: Sequence[Any], targets: Sequence[Target]) -> Tensor:
        """Return the mean over the tokens that the output reads, as weights (batch, tokens)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            read = self._reading(z, *others)[0]
            if self.per_token:
                start = seed(read, targets, unit=True)
            else:
                generator = torch.Generator().manual_seed(0)
                start = torch.randn(read.shape, generator=generator).to(read)
            (gradient,) = torch.autograd.grad(read, z, start)
        # for a random g, ∂⟨g, read⟩ / ∂z is 0 only at tokens that are not read
        used = (gradient.movedim(1 - self.place, 0) != 0).any(-1).to(z.dtype)
        return used / used.sum(1, keepdim=True)

    def by_example(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return A_l, or their gradients, in the shape (batch, heads, tokens, tokens)."""
        return [
            layout.first(a).reshape(-1, *a.shape[-2:]).unflatten(0, (self._batch(layout, a), -1))
            for layout, a in zip(self.layouts, weights, strict=True)
        ]

    @staticmethod
    def _batch(layout: Layout, a: Tensor) -> int:
        return a.shape[layout.dim] // (layout.outer * layout.inner)


def _watched(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return a new node behind another one, with respect to which there are gradients."""
    with graph.inserting_after(node):
        leaf = graph.call_function(_leaf, (node,))
    node.replace_all_uses_with(leaf, delete_user_cb=lambda user: user is not leaf)
    inherit(leaf, node)
    return leaf


def _leaf(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()
