"""Passes that replace operations by others that compute the same, and that have rules.

A constant matrix is a layer with weights, however the product is written. ``x @ W`` is ``linear``
with the weight Wᵀ. ``W @ x``, as in graph networks, is ``linear`` on the transposed x. A vector is
a matrix of one row or column. A product of several matrices side by side, one per head, is a
convolution with groups.

A constant like a tensor of the input, ``h.new_ones(3)``, is a constant of the model. A clamp with
tensors as bounds is a maximum, then a minimum. The product x · x is the power x². Zeros that are
put around the input of a convolution are the padding of the convolution.

An assignment, ``h[:, 0] = x``, and ``x.type_as(h)`` copy x in the shape or the dtype of h. Where a
method has no rule for ``detach()``, it is left out: the value is the same.
"""

from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import inherit, mark, marks, original, set_value, value_of
from captum_mipin.graph.nodes import argument, erase_unused, operation
from captum_mipin.propagation.canonical import is_copy, leaves_module
from captum_mipin.propagation.constants import without_copies
from captum_mipin.propagation.draft import Draft, is_tensor, number_of
from captum_mipin.rules.base import is_floating, varies
from captum_mipin.rules.geometry import per_dimension

aten = torch.ops.aten
#: Convolution → its number of spatial dimensions.
_CONVOLUTIONS = {getattr(aten, f"conv{dims}d").default: dims for dims in (1, 2, 3)}
#: Operation with bounds that are tensors → the names of its arguments.
_TENSOR_BOUNDS: dict[Any, tuple[str, ...]] = {
    aten.clamp.Tensor: ("self", "min", "max"),
    aten.clamp_min.Tensor: ("self", "min"),
    aten.clamp_max.Tensor: ("self", "max"),
}

#: Operations whose arguments are broadcast.
_BROADCASTING = ("mul", "div", "add", "sub", "where", "masked_fill")
#: Operation that makes a constant like another tensor → the number, or where among the arguments.
_FILLED: dict[str, Any] = {
    "new_zeros": 0, "zeros_like": 0, "new_ones": 1, "ones_like": 1,
    "new_full": slice(2, 3), "full_like": slice(1, 2),
}  # fmt: skip


def rewrite_constant_products(draft: Draft) -> None:
    """Replace each product of a tensor and a constant matrix by ``linear`` or ``conv1d``."""
    for node in list(draft.graph.nodes):
        if operation(node) in ("matmul", "mm", "bmm", "mv") and node not in draft.starts:
            rewrite_constant_product(draft.graph, node)


def rewrite_constant_product(graph: fx.Graph, node: Any) -> None:
    """Replace a matrix product by ``linear`` or ``conv1d`` if one factor is constant."""
    left, right = node.args[:2]
    layer = operation(node) == "mm" and varies(left) and value_of(right).shape[1] != 1
    if varies(left) == varies(right) or layer:
        return  # mm with the matrix on the right has a rule of its own
    x, weight = (left, right) if varies(left) else (right, left)
    weight = _unbatched(weight, node)
    if batched(value_of(weight)):
        return  # a matrix that is passed with each example is recorded
    if value_of(x).ndim > 1:
        _replace(graph, node, x, weight, flipped=varies(right))


def replace_copies(draft: Draft) -> None:
    """Replace each copy of a tensor x in the shape and dtype of another tensor by x itself."""
    #: operation → position of x
    copies = {"copy": 1, "fill": 1, "type_as": 0, "detach": 0}
    if str(aten.detach.default) in list(draft.rules):
        del copies["detach"]
    graph = draft.graph
    for node in list(graph.nodes):
        if node in draft.starts:
            continue
        if node.target is aten.select.int and value_of(node.args[0]).shape[node.args[1]] == 1:
            mark(node, original=original(node))
            node.target, node.args = aten.squeeze.dim, node.args[:2]
        _expand_copies(node)
        if operation(node) == "slice" and is_copy(node):
            mark(node, original=original(node))
            node.target, node.args = aten.alias.default, node.args[:1]
        scaled = number_of(node)
        if operation(node) == "pow" and node.args[1] == 1 and is_floating(value_of(node.args[0])):
            scaled = node.args[0], 1.0
        if scaled is not None and scaled[1] == 1 and not leaves_module(node):
            node.replace_all_uses_with(scaled[0])  # 1.0 * x, x ** 1
            graph.erase_node(node)
            continue
        known = operation(node) in copies
        source: Any = node.args[copies[operation(node)]] if known else _broadcast(node)
        if source is None and not known:
            continue
        if not isinstance(source, fx.Node):  # h[:, 0] = 0.0
            node.target = aten.full_like.default
            continue
        value, before = value_of(node), value_of(source)
        if str(value.shape) != str(before.shape):
            sizes: list[Any] = list(value.shape)
            for dim, size in enumerate(value.shape):
                if not isinstance(size, int):  # the size of the batch
                    sizes[dim] = _insert(graph, node, aten.sym_size.int, node.args[0], dim)
            source = _insert(graph, node, aten.expand.default, source, sizes)
        if value.dtype != before.dtype:
            source = _insert(graph, node, aten._to_copy.default, source, dtype=value.dtype)
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _expand_copies(node: Any) -> None:
    """Rewrite stack([x, x], dim), and repeat along dimensions of size 1, as ``expand``."""
    if operation(node) not in ("stack", "repeat") or not varies(node):
        return
    sizes = [n if isinstance(n, int) else -1 for n in value_of(node).shape]
    if operation(node) == "stack" and len(node.all_input_nodes) == 1:
        x = node.args[0][0]
        dim = argument(node, 1, "dim", 0) % len(sizes)
        x = _insert(node.graph, node, aten.unsqueeze.default, x, dim)
    elif operation(node) == "repeat":
        x, shape = node.args[0], value_of(node.args[0]).shape
        before = [1] * (len(sizes) - len(shape)) + list(shape)
        if any(
            n != 1 and str(n) != str(m) for n, m in zip(before, value_of(node).shape, strict=True)
        ):
            return
    else:
        return
    mark(node, original=original(node))
    node.target, node.args, node.kwargs = aten.expand.default, (x, sizes), {}


def _broadcast(node: Any) -> fx.Node | None:
    """Return the tensor that ``broadcast_tensors`` returned in the same shape; None for others."""
    if node.target is not getitem or operation(node.args[0]) != "broadcast_tensors":
        return None
    source: fx.Node = node.args[0].args[0][node.args[1]]
    return source if str(value_of(source).shape) == str(value_of(node).shape) else None


def split_positions(draft: Draft) -> None:
    """Take the positions that a maximum pooling returns from a copy of it, which is recorded."""
    for node in list(draft.graph.nodes):
        places = [n for n in node.users if n.target is getitem and n.args[1] == 1]
        if "max_pool" in operation(node) and places and node not in draft.starts:
            with draft.graph.inserting_after(node):
                copy = draft.graph.node_copy(node)
            for n in places:
                n.replace_input_with(node, copy)


def replace_bounds(draft: Draft) -> None:
    """Replace each clamp between tensors by ``maximum`` and ``minimum``."""
    graph = draft.graph
    for node in list(graph.nodes):
        if node.target not in _TENSOR_BOUNDS or node in draft.starts:
            continue
        parts: Any = dict(zip(_TENSOR_BOUNDS[node.target], node.args, strict=False)) | node.kwargs
        result = parts.pop("self")
        # clamp(x, a, b) = min(max(x, a), b), also where a > b
        for bound, target in (("min", aten.maximum.default), ("max", aten.minimum.default)):
            if parts.get(bound) is not None:
                result = _insert(graph, node, target, result, parts[bound])
                key = f"{marks(node).key}/{bound}"
                mark(result, added=False, original=original(node), key=key)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def replace_squares(draft: Draft) -> None:
    """Replace x · x and ``square`` by the power x², which has a single argument."""
    for node in draft.graph.nodes:
        same = operation(node) == "mul" and node.args[0] is node.args[1]
        if (same or operation(node) == "square") and varies(node) and node not in draft.starts:
            mark(node, original=original(node))
            node.target, node.args = aten.pow.Tensor_Scalar, (node.args[0], 2)


def fold_padding(draft: Draft) -> None:
    """Give each convolution the zeros that are put around its input, the same on both sides."""
    for node in list(draft.graph.nodes):
        dims = _CONVOLUTIONS.get(node.target, 0)
        while dims and node.args[0] not in draft.starts:
            zeros = _zeros_around(node.args[0], dims)
            if zeros is None:
                break
            args: tuple[Any, ...] = (*node.args, *(None, [1], [0])[len(node.args) - 2 :])
            x, weight, bias, stride, padding, *rest = args
            own = per_dimension(padding, dims)
            padding = [n + m for n, m in zip(own, zeros, strict=True)]
            node.args = (x.args[0], weight, bias, stride, padding, *rest)
    erase_unused(draft.graph, draft.starts)


def _zeros_around(node: Any, dims: int) -> list[int] | None:
    """Return the numbers of zeros before each of the last dimensions, if as many follow behind.

    Returns None if the node is no such padding.
    """
    if operation(node) not in ("pad", "constant_pad_nd"):
        return None
    # pad(x, sizes, mode, value), but constant_pad_nd(x, sizes, value)
    mode = argument(node, 2, "mode", "constant") if operation(node) == "pad" else "constant"
    value = argument(node, 3 if operation(node) == "pad" else 2, "value", 0)
    sizes = node.args[1]  # two numbers a dimension, the last dimension first
    pairs = [*zip(sizes[::2], sizes[1::2], strict=True), *[(0, 0)] * dims]
    equal = all(isinstance(n, int) and n == m >= 0 for n, m in pairs) and not any(
        n for n, _ in pairs[dims:]
    )
    if mode != "constant" or value not in (0, None) or not equal:
        return None
    return [n for n, _ in reversed(pairs[:dims])]


def replace_constants(draft: Draft) -> None:
    """Replace constants that are made like a tensor of the input, as ``h.new_ones(3)``.

    A value that is copied by ``expand``, and then used element by element, is used itself.
    """
    node: Any
    for node in list(draft.graph.nodes):
        if operation(node) in _FILLED and isinstance(value_of(node), torch.Tensor):
            value, fill = value_of(node), _FILLED[operation(node)]
            number = node.args[fill] if isinstance(fill, slice) else (fill,)
            if isinstance(number[0], (int, float)) and all(isinstance(n, int) for n in value.shape):
                node.target, node.args = aten.full.default, (list(value.shape), *number)
                node.kwargs = {"dtype": value.dtype, "device": value.device}
                mark(node, varies=False)
        if operation(node) in _BROADCASTING and varies(node) and node not in draft.starts:
            few = fx.map_arg(node.args, partial(_unbatched, before=node))
            shapes = [value_of(n).shape for n in few if isinstance(n, fx.Node) and is_tensor(n)]
            if few != node.args and str(torch.broadcast_shapes(*shapes)) == str(
                value_of(node).shape
            ):
                node.args = few
            _broadcast_copies(draft, node)


def _broadcast_copies(draft: Draft, node: fx.Node) -> None:
    """Let an operation broadcast its arguments itself, instead of their copies by ``expand``."""
    for copy in node.all_input_nodes:
        if operation(copy) in ("expand", "expand_as") and copy not in draft.starts:
            first = copy.all_input_nodes[0]
            sources = [first if n is copy else n for n in node.all_input_nodes]
            shapes = [value_of(n).shape for n in sources if is_tensor(n)]
            whole = str(torch.broadcast_shapes(*shapes)) == str(value_of(node).shape)
            if varies(copy) and whole and not leaves_module(copy):
                node.replace_input_with(copy, first)


def _unbatched(node: fx.Node, before: fx.Node) -> fx.Node:
    """Return the node of a constant before it was copied to each example; else the node itself."""
    if varies(node) or not batched(value_of(node)):
        return node
    few = without_copies(node, before, ())
    return node if batched(value_of(few)) else few


def _insert(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **named: Any) -> fx.Node:
    """Add an operation before ``node``, with the key and the module of ``node``."""
    with graph.inserting_before(node):
        new = graph.call_function(target, args, named)
    with value_of(node).fake_mode, enable_python_dispatcher():
        value = target(*fx.map_arg(args, value_of), **named)
    computed = [n for n in new.all_input_nodes if varies(n)]
    inherit(new, node, added=True, varies=bool(computed) and isinstance(value, torch.Tensor))
    set_value(new, value)
    return new


def _replace(graph: fx.Graph, node: Any, x: fx.Node, weight: fx.Node, flipped: bool) -> None:
    """Replace a product of ``x`` and a constant ``weight``.

    Args:
        graph: The graph, which is changed.
        node: The product.
        x: The factor that is computed from the model's inputs.
        weight: The constant factor.
        flipped: Whether the weight is the left factor: then W x = (xᵀ Wᵀ)ᵀ.
    """
    call = partial(_insert, graph, node)

    def transposed(source: fx.Node) -> fx.Node:
        return call(aten.transpose.int, source, -2, -1)

    vector = value_of(weight).ndim == 1
    if vector:  # a matrix of one row or column, which the result does not have
        weight = call(aten.unsqueeze.default, weight, 0 if flipped else 1)
    sizes, shape = list(value_of(weight).shape), list(value_of(x).shape)
    heads = [n for n in sizes[:-2] if n != 1]
    if heads and (len(heads) > 1 or heads != sizes[-3:-2] or heads != shape[-3:-2]):
        return  # it is left to the rule of products, which refuses it
    x = transposed(x) if flipped else x
    weight = weight if flipped else transposed(weight)
    if not heads:
        weight = call(aten.reshape.default, weight, list(value_of(weight).shape[-2:]))
        result = layer = call(aten.linear.default, x, weight)
    else:
        (count,), (rows, columns), ndim = heads, value_of(weight).shape[-2:], len(shape)
        # x (..., heads, M, K) → (... · M, heads · K, 1), whose heads are the groups of channels
        order = [*range(ndim - 3), ndim - 2, ndim - 3, ndim - 1]
        flat = call(aten.reshape.default, call(aten.permute.default, x, order),
                    [-1, count * columns, 1])  # fmt: skip
        kernel = call(aten.reshape.default, weight, [count * rows, columns, 1])
        layer = call(aten.conv1d.default, flat, kernel, None, [1], [0], [1], count)
        size = [value_of(x).shape[dim] for dim in order[:-2]]
        size = [n if isinstance(n, int) else -1 for n in size]
        result = call(aten.reshape.default, layer, [*size, count, rows])
        result = call(aten.permute.default, result, order)
    mark(layer, added=False, original=original(node))
    result = transposed(result) if flipped else result
    result = call(aten.squeeze.dim, result, -2 if flipped else -1) if vector else result
    node.replace_all_uses_with(result)
    graph.erase_node(node)
