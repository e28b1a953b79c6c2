"""The pass that writes sums with constant weights in one form, before rules are looked up.

A sum Σ w ⊙ x with constant weights w is a dense layer, and is written as one, with two exceptions:

- if x is a stack of tensors, the sum is the sum of these tensors, each times its weight;
- if all weights are one number in the model's code, it is the plain sum, times this number.

A number by which all terms of a sum or an average are multiplied is multiplied after the sum, and
several numbers after each other are one.
"""

from collections.abc import Sequence
from math import isclose, prod
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import mark, original, value_of
from captum_mipin.graph.nodes import ancestors, argument, erase_unused, operation
from captum_mipin.propagation.averages import whole_dims
from captum_mipin.propagation.canonical import leaves_module
from captum_mipin.propagation.constants import known_value, without_copies
from captum_mipin.propagation.draft import Draft, number_of
from captum_mipin.propagation.forms import (
    as_sum,
    become,
    factors_of,
    insert,
    is_of_example,
    stand_for,
    unmoved,
    with_dims,
)
from captum_mipin.propagation.spelling import rewrite_constant_product
from captum_mipin.propagation.stacks import (
    rearranged,
    scaled_sum,
    stack_behind,
    sum_of_stack,
    total,
)
from captum_mipin.rules.base import is_floating, varies

_aten = torch.ops.aten


def write_sums(draft: Draft) -> None:
    """Rewrite sums and averages of products with constants, and dense layers that are sums."""
    for node in draft.varying():
        if node.op != "call_function":
            continue
        if operation(node) in ("sum", "mean") or "avg_pool" in operation(node):
            _sum(draft, node)
        elif operation(node) == "linear":
            _dense(draft, node)
        elif operation(node) == "mul" and all(map(varies, node.args)):
            _scale_product(draft, node)
        else:
            _join_numbers(draft, node)
    erase_unused(draft.graph, draft.starts)


def _scaled(draft: Draft, node: Any) -> tuple[Any, float] | None:
    """Return x and c for a product c x whose number c may be multiplied later; else None."""
    # in float16 a result may be too large before it is scaled
    stays = node in draft.starts or value_of(node).dtype == torch.float16 or leaves_module(node)
    return None if stays else number_of(node)


def _scale_product(draft: Draft, node: Any) -> None:
    """Rewrite (c x) ⊙ y as c (x ⊙ y) for a number c."""
    for x, y in (node.args, node.args[::-1]):
        scaled = _scaled(draft, x) if len(x.users) == 1 else None
        if scaled is not None and x is not y:
            plain = insert(node, node.target, scaled[0], y)
            become(node, _aten.mul.Tensor, plain, scaled[1])
            _scale_product(draft, plain)
            return


def _join_numbers(draft: Draft, node: Any) -> None:
    """Rewrite (c x) d as (c d) x for numbers c and d."""
    outer, inner = number_of(node), None
    if outer is not None and len(outer[0].users) == 1:
        inner = _scaled(draft, outer[0])
    if outer is None or inner is None:
        return
    x, number = inner[0], inner[1] * outer[1]
    if isclose(number, 1) and not leaves_module(node):
        node.replace_all_uses_with(x)
    else:
        become(node, _aten.mul.Tensor, x, number)


def _sum(draft: Draft, node: Any) -> None:
    """Rewrite a sum or an average."""
    starts, scaled = draft.starts, _scaled(draft, node.args[0])
    if scaled is not None:  # Σ c x = c Σ x
        plain = insert(node, node.target, scaled[0], *node.args[1:], **node.kwargs)
        become(node, _aten.mul.Tensor, plain, scaled[1])
        _sum(draft, plain)
    elif not _sum_of_scaled(draft, node) and not sum_of_stack(node, starts):
        _sum_of_product(draft, node)


def _sum_of_scaled(draft: Draft, node: Any) -> bool:
    """Rewrite Σ s x and Σ x / s as s Σ x and (Σ x) / s, for s constant along the sum.

    s is given with each example, or a constant of one element. A divisor may also be computed from
    the input, but not from x: then it normalises x.
    """
    source, along = node.args[0], argument(node, 1, "dim")
    if operation(source) not in ("mul", "div") or source in draft.starts or not along:
        return False
    x, scale = source.args if varies(source.args[0]) else source.args[::-1]
    if not isinstance(value_of(scale), Tensor):  # a number, or the size of the batch
        return False
    if str(value_of(x).shape) != str(value_of(source).shape):
        return False
    own = {
        x,
        *(n for n in factors_of(x) or () if isinstance(n, fx.Node) and is_floating(value_of(n))),
    }
    if varies(scale) and (operation(source) == "mul" or not own.isdisjoint(ancestors([scale]))):
        return False
    if not is_of_example(scale) and value_of(scale).numel() > 1:
        return False
    scale = with_dims(node, scale, value_of(x).ndim)
    if any(value_of(scale).shape[dim] != 1 for dim in along):
        return False
    if not argument(node, 2, "keepdim", False):
        scale = insert(node, _aten.squeeze.dims, scale, along)
    plain = insert(node, node.target, x, *node.args[1:], **node.kwargs)
    become(node, source.target, plain, scale)
    _sum(draft, plain)
    return True


# -------------------------------------------------------------------- sums of constant products


def _sum_of_product(draft: Draft, node: Any) -> None:
    """Rewrite Σ x ⊙ w with constant weights w as a dense layer."""
    name = operation(node)
    along = argument(node, 1, "dim") if name in ("sum", "mean") else whole_dims(node)
    if not along or "dtype" in node.kwargs:
        return
    product, dims = unmoved(node.args[0], along, draft.starts)
    pair = factors_of(product)
    if pair is None or product in draft.starts or leaves_module(product):
        return
    if sum(map(varies, pair)) != 1 or len(product.all_input_nodes) != 2:
        return
    if not all(isinstance(value_of(n), Tensor) for n in pair):  # a number is no layer
        return
    ndim, shape = value_of(product).ndim, value_of(product).shape
    factors = sorted(pair, key=varies, reverse=True)
    x, w = (with_dims(node, without_copies(n, node, draft.starts), ndim) for n in factors)
    mixed = value_of(x).dtype != value_of(product).dtype
    if batched(value_of(w)) or mixed or not all(isinstance(shape[dim], int) for dim in dims):
        return
    if str(torch.broadcast_shapes(value_of(x).shape, value_of(w).shape)) != str(shape):
        x, w = (with_dims(node, n, ndim) for n in factors)  # the product itself has copies
    kinds = _kinds(value_of(x).shape, value_of(w).shape, dims)
    if kinds is None:
        return
    sizes = [shape[dim] if dim in dims else -1 for dim in range(ndim)]
    w = insert(node, _aten.expand.default, w, sizes)
    w = insert(node, _aten._to_copy.default, w, dtype=value_of(x).dtype)
    if name != "sum":
        w = insert(node, _aten.div.Tensor, w, prod(shape[dim] for dim in dims))
    value = _layer(draft, node, (x, w), kinds, dims)
    order = [dim for kind in kinds for dim in kind]
    back = [order.index(dim) for dim in sorted(order)]
    if back != sorted(back):
        value = insert(node, _aten.permute.default, value, back)
    stand_for(node, as_sum(node, value, along, ndim))


def _kinds(
    x: Sequence[Any], w: Sequence[Any], dims: Sequence[int]
) -> tuple[list[int], list[int], list[int]] | None:
    """Return which dimensions of a product x ⊙ w are rows, heads and outputs of a dense layer.

    Args:
        x: Sizes of the tensor.
        w: Sizes of the weights.
        dims: The dimensions that are summed over.

    Returns:
        The dimensions along which only x varies, x and w vary, and only w varies. None if the
        weights do not vary along ``dims``, or for several dimensions of heads.
    """
    others = [dim for dim in range(len(x)) if dim not in dims]
    rows = [dim for dim in others if w[dim] == 1]
    heads = [dim for dim in others if w[dim] != 1 and x[dim] != 1]
    outputs = [dim for dim in others if w[dim] != 1 and x[dim] == 1]
    copied = any(x[dim] == 1 and w[dim] != 1 for dim in dims)
    if copied or all(w[dim] == 1 for dim in dims) or len(heads) > 1:
        return None
    return rows, heads, outputs


def _layer(
    draft: Draft,
    node: fx.Node,
    factors: tuple[fx.Node, fx.Node],
    kinds: tuple[list[int], list[int], list[int]],
    dims: Sequence[int],
) -> fx.Node:
    """Return the node of Σ x ⊙ w as a dense layer: (*rows, *heads, *outputs).

    Args:
        draft: The draft, whose graph is changed.
        node: The sum, before which nodes are inserted.
        factors: x and w, with the same number of dimensions.
        kinds: The dimensions of rows, heads and outputs.
        dims: The dimensions that are summed over.
    """
    (x, w), (rows, heads, outputs) = factors, kinds
    sizes = [value_of(w).shape[dim] for dim in outputs]
    x = insert(node, _aten.permute.default, x, [*rows, *heads, *outputs, *dims])
    first = len(rows) + len(heads)
    if outputs:
        x = insert(node, _aten.squeeze.dims, x, list(range(first, first + len(outputs))))
    x = insert(node, _aten.flatten.using_ints, x, first, -1) if len(dims) > 1 else x
    heights = [value_of(w).shape[dim] for dim in heads]
    w = insert(node, _aten.permute.default, w, [*heads, *outputs, *rows, *dims])
    w = insert(node, _aten.reshape.default, w, [*heights, prod(sizes), -1])
    if heads:  # (*rows, heads, 1, K) (heads, K, outputs)
        x = insert(node, _aten.unsqueeze.default, x, -2)
        w = insert(node, _aten.transpose.int, w, -2, -1)
        value = insert(node, _aten.matmul.default, x, w)
        value = insert(node, _aten.squeeze.dim, value, -2)
        rewrite_constant_product(draft.graph, value.all_input_nodes[0])
    else:
        value = layer = insert(node, _aten.linear.default, x, w)
        mark(layer, original=original(node))
        _dense(draft, layer)
    if len(sizes) > 1:
        return insert(node, _aten.unflatten.int, value, -1, sizes)
    return value if sizes else insert(node, _aten.squeeze.dim, value, -1)


# ---------------------------------------------------------------- dense layers that are plain sums


def _dense(draft: Draft, node: Any) -> None:
    """Rewrite a dense layer of one output without bias if it is a sum of stacked tensors, or plain.

    Args:
        draft: The draft, whose graph is changed.
        node: The dense layer.
    """
    x, weight = node.args[:2]
    if argument(node, 2, "bias") is not None or value_of(weight).shape[0] != 1 or varies(weight):
        return
    known, last = known_value(draft, weight), value_of(x).ndim - 1
    plain = known is not None and bool((known == known[0, 0]).all())
    number = float(known[0, 0]) if known is not None and plain else 1.0
    stack = stack_behind(x, last, draft.starts)
    if stack is not None:
        parts = stack.parts if plain else _weighted(node, stack.parts, weight)
        value = rearranged(node, total(node, parts), stack)
        stand_for(node, value if number == 1 else insert(node, _aten.mul.Tensor, value, number))
    elif plain:
        stand_for(node, scaled_sum(node, x, last, number, keep=True))


def _weighted(node: fx.Node, parts: Sequence[fx.Node], weight: fx.Node) -> list[fx.Node]:
    """Return the nodes of tensors times their weights, the entries of a constant (1, tensors)."""
    weights = insert(node, _aten.reshape.default, weight, [-1])
    scales = [insert(node, _aten.select.int, weights, 0, at) for at in range(len(parts))]
    return [insert(node, _aten.mul.Tensor, *pair) for pair in zip(parts, scales, strict=True)]
