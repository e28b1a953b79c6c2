"""The pass that writes what is made of the slices of one tensor in one form.

Code may take a tensor h apart, into h[:, 0], h[:, 1], ..., and put the slices together again. Then

- stacked or concatenated slices become h itself, a longer slice of it, or an index of it;
- a sum of slices becomes a sum over the dimension; slices that have scalar weights become a sum
  of h times the weights, and products of slices of two tensors a sum of their product;
- the last slice of a cumulative sum becomes the sum.

A difference of slices stays what it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import argument, erase_unused, operation
from captum_mipin.propagation.canonical import is_copy, leaves_module
from captum_mipin.propagation.draft import Draft, is_tensor, number_of
from captum_mipin.propagation.forms import Starts, become, insert, stand_for, unmoved
from captum_mipin.propagation.stacks import scaled_sum, sum_of_stack
from captum_mipin.rules.base import varies

_aten = torch.ops.aten
#: Operations that return several slices.
_SPLITS = ("unbind", "split", "split_with_sizes", "chunk")


@dataclass(frozen=True)
class Slice:
    """Entries ``start`` to ``stop`` of a tensor along one dimension.

    Attributes:
        source: The node of the tensor.
        dim: The dimension.
        start: The first entry.
        stop: The entry after the last one.
        kept: Whether the dimension is kept; if False, there is one entry.
    """

    source: fx.Node
    dim: int
    start: int
    stop: int
    kept: bool

    @property
    def form(self) -> tuple[fx.Node, int, bool]:
        """Return what slices of one tensor along one dimension have in common."""
        return self.source, self.dim, self.kept


def join_slices(draft: Draft) -> None:
    """Rewrite stacks and sums of the slices of one tensor."""
    rewrites: tuple[dict[str, Any], ...] = (
        {**dict.fromkeys(("stack", "cat"), _put_together),
         **dict.fromkeys(("select", "slice"), _last_of_cumsum),
         **dict.fromkeys(("sum", "mean"), sum_of_stack)},
        dict.fromkeys(("add", "sub"), _sum),
    )  # fmt: skip
    for rewrite in rewrites:
        for node in draft.varying():
            if node.op == "call_function" and operation(node) in rewrite:
                rewrite[operation(node)](node, draft.starts)
    erase_unused(draft.graph, draft.starts)


def slice_or_copy(node: Any, starts: Starts) -> Slice | None:
    """Return the slice that a node computes, or copies; None for other operations."""
    node = _uncopied(node, starts)
    name = operation(node)
    if node in starts or not isinstance(node, fx.Node) or leaves_module(node):
        return None
    if name == "squeeze":
        part, dims = slice_or_copy(node.args[0], starts), argument(node, 1, "dim")
        if part is None or not part.kept or part.stop != part.start + 1:
            return None
        dims = [dims] if isinstance(dims, int) else list(dims or ())
        same = [dim % value_of(part.source).ndim for dim in dims] == [part.dim]
        return replace(part, kept=False) if same else None
    return slice_of(node, starts)


def slice_of(node: Any, starts: Starts) -> Slice | None:
    """Return the slice that an operation takes out of a tensor; None for other operations."""
    if operation(node) in ("select", "slice"):
        return _taken(node, node, starts)
    source: Any = node.args[0] if node.target is getitem else None
    return _taken(node, source, starts) if operation(source) in _SPLITS else None


def _taken(node: Any, taken: Any, starts: Starts) -> Slice | None:
    """Return the slice that an operation takes out of a tensor.

    Args:
        node: The node of the slice.
        taken: The operation: the node itself, or the one that returns a tuple with the slice.
        starts: The explained nodes.
    """
    source = _uncopied(taken.args[0], starts)
    at = 1 if operation(taken) in ("select", "slice", "unbind") else 2
    dim = argument(taken, at, "dim", 0) % value_of(source).ndim
    kept = value_of(node).ndim == value_of(source).ndim
    if not kept:
        source, (dim,) = unmoved(source, [dim], starts, reshapes=False)
    size = value_of(source).shape[dim]
    if not isinstance(size, int) or len(node.all_input_nodes) > 1:  # by an index of the example
        return None
    if node is not taken:  # number ``node.args[1]`` of several slices
        widths = [value.shape[dim] if kept else 1 for value in value_of(taken)]
        start = sum(widths[: node.args[1]])
        return Slice(source, dim, start, start + widths[node.args[1]], kept)
    if operation(node) == "select":
        return Slice(source, dim, node.args[2] % size, node.args[2] % size + 1, kept)
    bounds = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    start, stop, step = slice(*bounds).indices(size)
    return Slice(source, dim, start, stop, kept) if step == 1 else None


def _uncopied(node: Any, starts: Starts) -> Any:
    """Return the node of which a node is a copy, or the node itself."""
    while isinstance(node, fx.Node) and node not in starts and is_copy(node):
        node = node.args[0]
    return node


# -------------------------------------------------------------------------------- stacks of slices


def _put_together(node: Any, starts: Starts) -> None:
    """Rewrite a stack of slices of one tensor as an index of this tensor."""
    parts = [slice_or_copy(part, starts) for part in node.args[0]]
    first, dim = parts[0], argument(node, 1, "dim", 0) % value_of(node).ndim
    if first is None or len(parts) < 2 or any(p is None or p.form != first.form for p in parts):
        return
    slices: list[Slice] = [part for part in parts if part is not None]
    row = all(a.stop == b.start for a, b in pairwise(slices))
    single = all(part.stop == part.start + 1 for part in slices)
    if operation(node) == "cat" and first.kept:
        if dim == first.dim and (row or single):
            stand_for(node, _entries(node, slices, row))
        return
    if first.kept:
        return
    value = _entries(node, slices, row)  # with the slices along their own dimension
    order = [n for n in range(value_of(value).ndim) if n != first.dim]
    order.insert(dim, first.dim)
    if operation(node) == "stack":
        become(node, _aten.permute.default, value, order)
    else:  # cat puts the entries of all slices one after the other
        value = insert(node, _aten.permute.default, value, order)
        become(node, _aten.flatten.using_ints, value, dim, dim + 1)


def _entries(node: fx.Node, slices: Sequence[Slice], row: bool) -> fx.Node:
    """Return the node of the entries that slices take from their tensor, along their dimension.

    Args:
        node: The operation before which nodes are inserted.
        slices: The slices.
        row: Whether each slice begins where the one before ends.
    """
    first, size = slices[0], value_of(slices[0].source).shape[slices[0].dim]
    if row:
        if first.start == 0 and slices[-1].stop == size:
            return first.source
        bounds = first.start, slices[-1].stop
        return insert(node, _aten.slice.Tensor, first.source, first.dim, *bounds)
    kind = {"dtype": torch.int64, "device": value_of(first.source).device}
    index = numbers(node, [part.start for part in slices], **kind)
    return insert(node, _aten.index_select.default, first.source, first.dim, index)


def numbers(node: fx.Node, values: Sequence[float], **kind: Any) -> fx.Node:
    """Return the node of a constant vector, inserted before a node.

    Args:
        node: The operation before which nodes are inserted.
        values: The numbers.
        kind: Dtype and device.
    """
    scalars = [insert(node, _aten.full.default, [], value, **kind) for value in values]
    return insert(node, _aten.stack.default, scalars)


# ---------------------------------------------------------------------------------- sums of slices


@dataclass(frozen=True, eq=False)
class _Term:
    """A term of a sum: c · w · node, with a number c.

    Attributes:
        node: The node of the term without its factors, which may be a slice.
        number: The number c.
        weight: The node of w, a constant of one element; None for w = 1.
        whole: The node of the term, up to its sign.
        sign: 1 or −1.
    """

    node: Any
    number: float
    weight: fx.Node | None
    whole: Any
    sign: int


def _sum(node: fx.Node, starts: Starts) -> None:
    """Rewrite a sum in which several terms are slices of one tensor."""
    if _is_term(node, starts):
        return  # it is a part of a longer sum
    terms, groups, others = _terms(node, 1, starts), dict[Any, dict[Any, _Term]](), []
    for term in terms:
        key, index = _group(term, starts)
        if key is None or index in groups.get(key, {}):
            others.append(term)
        else:
            groups.setdefault(key, {})[index] = term
    totals: list[Any] = []
    for key, group in groups.items():
        total = _total(node, key, group) if len(group) > 1 else None
        if total is None:
            others += group.values()
        else:
            totals.append(total)
    if not totals:
        return
    (result, *more), others = totals, [term for term in terms if term in others]
    for total in more:
        result = insert(node, _aten.add.Tensor, result, total)
    for term in others:
        if isinstance(term.whole, fx.Node) or term.whole != 0:  # Python's sum begins with 0
            add = _aten.add.Tensor if term.sign > 0 else _aten.sub.Tensor
            result = insert(node, add, result, term.whole)
    stand_for(node, result)


def _is_term(node: Any, starts: Starts) -> bool:
    """Return True for a sum that is used only as a term of another sum."""
    plain = operation(node) in ("add", "sub") and not node.kwargs and is_tensor(node)
    if not plain or node in starts or len(node.users) != 1 or leaves_module(node):
        return False
    (user,) = node.users
    return operation(user) in ("add", "sub") and not user.kwargs and user not in starts


def _terms(node: Any, sign: int, starts: Starts) -> list[_Term]:
    """Return the terms of a sum."""
    found = []
    waiting = [(n, -sign if i and operation(node) == "sub" else sign)
               for i, n in enumerate(node.args)] if not node.kwargs else []  # fmt: skip
    while waiting:
        n, sign = waiting.pop()
        if _is_term(n, starts):
            other = -sign if operation(n) == "sub" else sign
            waiting += [(n.args[0], sign), (n.args[1], other)]
        else:
            found.append(_term(n, sign, starts))
    return found[::-1]


def _term(whole: Any, sign: int, starts: Starts) -> _Term:
    """Return a term with its constant factors apart."""
    node, number = whole, float(sign)
    weight: Any = None
    while isinstance(node, fx.Node) and node not in starts and not leaves_module(node):
        if (scaled := number_of(node)) is not None:
            node, number = scaled[0], number * scaled[1]
        elif operation(node) == "mul" and weight is None and sum(map(varies, node.args)) == 1:
            factors: Any = node.args
            x, w = factors if varies(factors[0]) else factors[::-1]
            if not _is_scalar(w) or value_of(w).ndim > value_of(x).ndim:
                break
            node, weight = x, w
        else:
            break
    return _Term(node, number, weight, whole, sign)


def _is_scalar(node: Any) -> bool:
    """Return True for a tensor of one element."""
    return not batched(value_of(node)) and value_of(node).numel() == 1


def _group(term: _Term, starts: Starts) -> tuple[Any, Any]:
    """Return what a term has in common with others of the same kind, and what tells it from them.

    These are tensor and dimension of its slice, and the index; (None, None) for other terms.
    """
    node = term.node
    if operation(node) == "mul" and not node.kwargs and all(map(varies, node.args)):
        parts = [slice_or_copy(n, starts) for n in node.args]
    else:
        parts = [slice_or_copy(node, starts)]
    slices = [part for part in parts if part is not None]
    if len(slices) < len(parts) or any(p.stop != p.start + 1 for p in slices):
        return None, None
    if any(operation(p.source) in ("stack", "cat") for p in slices):
        return None, None  # the slice is one of the tensors that were stacked
    if len(slices) == 2:
        if slices[0].start != slices[1].start or slices[0].kept or slices[1].kept:
            return None, None
        slices.sort(key=lambda part: part.source.name)
    return tuple(part.form for part in slices), slices[0].start


def _total(node: fx.Node, key: Any, group: dict[int, _Term]) -> fx.Node | None:
    """Return the node of a sum of slices, over their dimension; None for a difference of slices.

    Args:
        node: The operation before which nodes are inserted.
        key: Source, dimension and ``kept`` of the slices: of one tensor, or of two tensors that
            are multiplied.
        group: Index → term.
    """
    terms, pairs = [group[index] for index in sorted(group)], []
    sizes, weighted = [term.number for term in terms], any(term.weight for term in terms)
    if not weighted and len(set(map(abs, sizes))) == 1 < len(set(sizes)):
        return None
    for source, dim, kept in key:
        slices = [Slice(source, dim, index, index + 1, kept) for index in sorted(group)]
        row = all(a.stop == b.start for a, b in pairwise(slices))
        pairs.append((_entries(node, slices, row), dim))
    value, dim, kept = *pairs[0], key[0][2]
    if len(key) == 2:  # (a ⊙ b) with the slices along the first dimension
        value, dim = insert(node, _aten.mul.Tensor, *_aligned(node, pairs)), 0
    if weighted or len(set(sizes)) > 1:
        behind = value_of(value).ndim - dim - 1
        weights = insert(node, _aten.reshape.default, _weights(node, terms), [-1] + [1] * behind)
        value, sizes = insert(node, _aten.mul.Tensor, value, weights), [1.0]
    if not value_of(value).is_floating_point():
        return None
    return scaled_sum(node, value, dim, sizes[0], kept)


def _weights(node: fx.Node, terms: Sequence[_Term]) -> fx.Node:
    """Return the node of the weights of terms, as a vector."""
    like, weights = value_of(terms[0].whole), []
    kind = {"dtype": like.dtype, "device": like.device}
    if not any(term.weight for term in terms):
        return numbers(node, [term.number for term in terms], **kind)
    for term in terms:
        weight: Any = term.weight
        if weight is None:
            weight = insert(node, _aten.full.default, [1], term.number, **kind)
        else:
            weight = insert(node, _aten.reshape.default, weight, [1])
            weight = insert(node, _aten._to_copy.default, weight, dtype=like.dtype)
            if term.number != 1:
                weight = insert(node, _aten.mul.Tensor, weight, term.number)
        weights.append(weight)
    return insert(node, _aten.cat.default, weights)


def _aligned(node: fx.Node, pairs: Sequence[tuple[fx.Node, int]]) -> list[fx.Node]:
    """Return two tensors with one of their dimensions in front, which broadcast behind it."""
    ndim, results = max(value_of(value).ndim for value, _ in pairs), []
    for value, dim in pairs:
        order = [dim, *(n for n in range(value_of(value).ndim) if n != dim)]
        value = insert(node, _aten.permute.default, value, order)
        while value_of(value).ndim < ndim:
            value = insert(node, _aten.unsqueeze.default, value, 1)
        results.append(value)
    return results


def _last_of_cumsum(node: Any, starts: Starts) -> None:
    """Rewrite the last slice of a cumulative sum as the sum."""
    part = slice_or_copy(node, starts)
    source: Any = part.source if part else None
    if part is None or operation(source) != "cumsum" or source in starts or source.kwargs:
        return
    size = value_of(source).shape[part.dim]
    if source.args[1] % value_of(source).ndim == part.dim and part.start == size - 1:
        become(node, _aten.sum.dim_IntList, source.args[0], [part.dim], part.kept)
