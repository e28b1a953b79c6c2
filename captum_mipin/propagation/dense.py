"""The passes that write a dense layer in one form: ``linear(x, weight, bias)``, on x as it is.

Code computes ``x @ W + b``, ``addmm(b, x, W)`` or ``einsum``, which reshapes x before the product,
and may flatten the examples and tokens of x. Then the bias becomes an argument of the layer, also
of a convolution. If x goes to several operations, reshapes that leave the features as they are
come behind the layer.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.dimensions import RESHAPES
from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import mark, marks, original, value_of
from captum_mipin.graph.nodes import ancestors, erase_unused, is_size, operation
from captum_mipin.propagation.averages import moves_ones
from captum_mipin.propagation.canonical import is_copy, leaves_module
from captum_mipin.propagation.draft import Draft, is_tensor, moved, permutation
from captum_mipin.propagation.forms import Starts, become, insert, stand_for
from captum_mipin.rules.base import varies

_aten = torch.ops.aten
_LAYERS = ("linear", "conv1d", "conv2d", "conv3d")


def write_layers(draft: Draft) -> None:
    """Rewrite products with a matrix as dense layers, before reshapes of examples and tokens."""
    for node in draft.varying():
        if operation(node) in ("mm", "addmm") and not node.kwargs:
            _product(node)
        if operation(node) == "linear":
            _before_reshapes(node, draft.starts)
    erase_unused(draft.graph, draft.starts)


def _product(node: Any) -> None:
    """Rewrite ``mm(x, W)`` and ``addmm(b, x, W)``, with constants W and b, as a dense layer."""
    *bias, x, weight = node.args
    if not varies(x) or any(varies(n) or batched(value_of(n)) for n in (weight, *bias)):
        return
    if all(value_of(n).ndim == 1 and value_of(n).numel() > 1 for n in bias):
        weight = insert(node, _aten.transpose.int, weight, 0, 1)
        become(node, _aten.linear.default, x, weight, *bias)


def _before_reshapes(node: Any, starts: Starts) -> None:
    """Rewrite the layer of a reshaped x as a reshape of the layer of x, if x is used twice."""
    width, source = value_of(node.args[0]).shape[-1], None
    for x in _reshaped(node.args[0], starts):
        several = sum(not is_size(user) for user in x.users) > 1
        if several and value_of(x).ndim > 1 and value_of(x).shape[-1] == width:
            source = x
    sizes = [size if isinstance(size, int) else -1 for size in value_of(node).shape]
    if source is None or sizes.count(-1) > 1:
        return
    layer = insert(node, _aten.linear.default, source, *node.args[1:])
    mark(layer, key=marks(node).key)
    stand_for(node, insert(node, _aten.reshape.default, layer, sizes))


def _reshaped(node: Any, starts: Starts) -> list[Any]:
    """Return the values before ``node`` that have the same elements in the same order."""
    found = []
    while node not in starts and not leaves_module(node):
        order = permutation(node)
        if order is not None:
            shape = value_of(node.args[0]).shape
            order = [dim for dim in order if shape[dim] != 1]
        same = operation(node) in RESHAPES or is_copy(node)
        if order != sorted(order) if order is not None else not same:
            break
        node = node.args[0]
        found.append(node)
    return found


def join_biases(draft: Draft) -> None:
    """Rewrite a layer without bias, and a constant that is added to its result, as one layer."""
    for node in draft.varying():
        if operation(node) != "add" or node.kwargs:
            continue
        for value, bias in (node.args, node.args[::-1]):
            if isinstance(bias, fx.Node) and is_tensor(bias) and not varies(bias):
                layer = _layer(value, node, bias, draft.starts)
                if layer is not None:
                    _join(layer, bias)
                    stand_for(node, value)
    erase_unused(draft.graph, draft.starts)


def _layer(value: Any, user: fx.Node, bias: fx.Node, starts: Starts) -> Any:
    """Return the layer without bias whose result is a value, or a term of it; None for others.

    Args:
        value: The node of the value.
        user: The operation that adds the bias.
        bias: The constant, which has to fit the outputs of the layer.
        starts: The explained nodes.
    """
    if not _is_plain(value, user, starts):
        return None
    if operation(value) == "add" and not value.kwargs and all(map(varies, value.args)):
        for term in value.args:
            if (layer := _layer(term, value, bias, starts)) is not None:
                return layer
        return None
    chain = []
    while operation(value) not in _LAYERS:
        before = value.args[0] if permutation(value) else next(iter(_reshaped(value, starts)), None)
        if leaves_module(value) or not _is_plain(before, value, starts):
            return None
        chain.append(value)
        value = before
    return value if _fits(value, chain, bias) else None


def _is_plain(node: Any, user: fx.Node, starts: Starts) -> bool:
    """Return True if a value has the shape or size of its only user, and nothing else sees it."""
    if not isinstance(node, fx.Node) or node in starts or not varies(node) or not is_tensor(node):
        return False
    whole = operation(user) != "add" or str(value_of(node).shape) == str(value_of(user).shape)
    alone = [n for n in node.users if not is_size(n)] == [user]
    return whole and alone and not leaves_module(node)


def _fits(layer: Any, chain: Sequence[fx.Node], bias: fx.Node) -> bool:
    """Return True if ``bias`` is one number for each output of a layer that has no bias.

    Args:
        layer: The layer.
        chain: The reshapes and transpositions of its result, last one first; to the result of
            these, the bias is added.
        bias: The node of the bias.
    """
    last = chain[0] if chain else layer
    _, weight, *others = layer.args
    if any(others[:1]) or layer.kwargs or batched(value_of(bias)) or varies(weight):
        return False
    outputs, shape, sizes = value_of(weight).shape[0], value_of(last).shape, value_of(bias).shape
    sizes = (1,) * (len(shape) - len(sizes)) + tuple(sizes)
    if value_of(bias).dtype != value_of(layer).dtype or len(sizes) > len(shape):
        return False
    channels, ndim = -1, value_of(layer).ndim
    if operation(layer) != "linear":  # (batch, channels, ...)
        channels = 1 - value_of(weight).ndim
    if channels != -1 or any(permutation(move) and not moves_ones(move) for move in chain):
        order: list[int | None] | None = list(range(ndim))
        for move in reversed(chain):
            order = order and (list(order) if is_copy(move) else moved(order, move, True))
        places = [at for at, dim in enumerate(order or ()) if dim == ndim + channels]
        wide = [at for at, size in enumerate(sizes) if size != 1]
        return wide == places and prod(sizes) == outputs
    count = next((n for n in range(1, len(shape)) if prod(sizes[-n:]) == outputs), 0)
    features = shape[len(shape) - count :]
    plain = all(isinstance(n, int) for n in features) and prod(sizes) == outputs > 1
    return plain and tuple(features) == sizes[len(sizes) - count :]


def _join(layer: Any, bias: fx.Node) -> None:
    """Give a layer the bias, whose operations are moved before it."""
    needed = ancestors([bias])
    nodes = list(layer.graph.nodes)
    for node in nodes[nodes.index(layer) :]:
        if node in needed:
            layer.prepend(node)
    if value_of(bias).ndim > 1:
        bias = insert(layer, _aten.reshape.default, bias, [value_of(bias).numel()])
    mark(layer, original=original(layer))
    layer.args = (*layer.args[:2], bias, *layer.args[3:])
