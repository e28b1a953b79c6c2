"""The pass that writes products, ratios and sums in one form, before rules are looked up.

The rule of an operation must not depend on the way in which a model writes it. Therefore

- a ratio whose divisor depends on the input, and a product with such a reciprocal, become the
  operation ``divided``;
- each result of ``var_mean`` becomes an operation of its own;
- a variance that is a feature, and no part of a norm, becomes mean((x − μ)²), for methods that have
  no rule for it; a standard deviation becomes the norm of x − μ, divided by √n;
- √Σ x², also of two tensors, becomes the norm of a vector;
- the sum of a product of two values that depend on the input becomes ``weighted_sum``, which has
  the rule of a matrix product; their average becomes this sum, divided by a number.
"""

from collections.abc import Callable, Collection, Sequence
from math import isclose, prod
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from captum_mipin.graph.dimensions import RESHAPES
from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import inherit, mark, marks, original, set_value, value_of
from captum_mipin.graph.nodes import argument, erase_unused, operation
from captum_mipin.propagation.averages import whole_dims
from captum_mipin.propagation.draft import Draft, number_of, permutation, regrouped
from captum_mipin.propagation.marking import mark_as_varying, mark_varying
from captum_mipin.rules import DIVIDED, WEIGHTED_SUM
from captum_mipin.rules.base import varies
from captum_mipin.rules.gates import NEGATIONS, gate_source, is_gate

_aten = torch.ops.aten

#: The explained nodes, which no rewrite may leave out.
Starts = Collection[fx.Node]


def spell(draft: Draft) -> None:
    """Rewrite products, ratios and sums of values that depend on the model's inputs."""
    node: Any
    for node in list(draft.graph.nodes):
        if node.op == "call_function" and is_of_example(node) and node not in draft.starts:
            any(rewrite(node, draft.starts) for rewrite in _REWRITES.get(operation(node), ()))
    erase_unused(draft.graph, draft.starts)
    mark_varying(draft)


def _product_with_one(node: Any, starts: Starts) -> bool:
    """Rewrite x · 1, a part of other operations, as x."""
    for x, factor in (node.args, node.args[::-1]):
        if not isinstance(factor, fx.Node) and factor == 1:
            become(node, _aten.alias.default, x)
            return True
    return False


def _ratio(node: Any, starts: Starts) -> bool:
    """Rewrite a ratio x / d as the operation ``divided`` if d depends on the example."""
    x, divisor = node.args
    if node.kwargs or not varies(x) or not is_of_example(divisor):
        return False
    if operation(divisor) == "mul" and sum(map(is_of_example, divisor.args)) == 1:
        own, other = sorted(divisor.args, key=is_of_example, reverse=True)
        if isinstance(other, fx.Node):  # x / (d c) = (x / d) / c for a constant c
            value = insert(node, _aten.div.Tensor, x, own)
            _divide(value, x, own, starts)
            become(node, _aten.div.Tensor, value, other)
            return True
    _divide(node, x, divisor, starts)
    return True


def _product_with_reciprocal(node: Any, starts: Starts) -> bool:
    """Rewrite x · r as x divided by 1 / r, if r is a reciprocal of a value of the input."""
    for x, factor in (node.args, node.args[::-1]):
        if not varies(x):
            continue
        r, scale = _unscaled(factor, starts)
        if not is_of_example(factor):
            if operation(r) == "reciprocal" and scale in (None, 1):  # of a constant
                become(node, _aten.div.Tensor, x, r.args[0])
                return True
        elif _is_reciprocal(r):
            plain = operation(r) == "reciprocal" and r not in starts  # 1 / (1 / d) is d
            divisor = r.args[0] if plain else insert(node, _aten.reciprocal.default, r)
            _divide(node, x, divisor, starts, scale)
            return True
    return False


def _divide(node: fx.Node, x: Any, divisor: Any, starts: Starts, *scales: Any) -> None:
    """Rewrite a node as x / d times constants, which come behind the ratio."""
    x, scale = _unscaled(x, starts)
    divisor, below = _number_before(node, divisor, starts)
    factors: list[Any] = [factor for factor in (scale, *scales) if isinstance(factor, fx.Node)]
    number = prod(n for n in (1 / below, scale, *scales) if isinstance(n, (int, float)))
    factors += [] if isclose(number, 1) else [number]
    if not factors:
        become(node, DIVIDED, x, divisor)
        return
    value = insert(node, DIVIDED, x, divisor)
    for factor in factors[:-1]:
        value = insert(node, _aten.mul.Tensor, value, factor)
    become(node, _aten.mul.Tensor, value, factors[-1])


def _number_before(node: fx.Node, divisor: Any, starts: Starts) -> tuple[Any, float]:
    """Return d and c for a divisor c d with a number c, as an average Σ x / n; else itself, 1."""
    number = 1.0
    while divisor not in starts:
        if (scaled := number_of(divisor)) is not None:
            divisor, number = scaled[0], number * scaled[1]
        elif operation(divisor) == "mean" and (dims := argument(divisor, 1, "dim")):
            sizes = [value_of(divisor.args[0]).shape[dim] for dim in dims]
            if not all(isinstance(size, int) for size in sizes):
                break
            keep = argument(divisor, 2, "keepdim", False)
            divisor = insert(node, _aten.sum.dim_IntList, divisor.args[0], dims, keep)
            number /= prod(sizes)
        else:
            break
    return divisor, number


def _unscaled(node: Any, starts: Starts) -> tuple[Any, Any]:
    """Return x and c for a product of a value x of the input and a constant c; else node, None."""
    if node not in starts and len(getattr(node, "users", ())) == 1:
        if (scaled := number_of(node)) is not None:
            return scaled
        for x, scale in (node.args, node.args[::-1]) if operation(node) == "mul" else ():
            if varies(x) and not varies(scale):
                return x, scale
    return node, None


def _moment(node: Any, starts: Starts) -> bool:
    """Rewrite one result of ``var_mean`` or ``std_mean`` as an operation of its own."""
    both, which = node.args
    name = operation(both)
    if name not in ("var_mean", "std_mean") or node.target is not getitem:
        return False
    x, *others = both.args
    if which == 1:
        dims, keepdim = argument(both, 1, "dim"), both.kwargs.get("keepdim", False)
        if not dims:
            return False
        if len(others) > 2:  # var_mean.dim(x, dim, unbiased, keepdim)
            keepdim = others[2]
        become(node, _aten.mean.dim, x, dims, keepdim)
    else:
        alone = getattr(getattr(_aten, name[:3]), str(both.target).split(".")[-1])
        kwargs = dict(both.kwargs)
        become(node, alone, *both.args)
        node.kwargs = kwargs
    return True


def _length(node: Any, starts: Starts) -> bool:
    """Rewrite √(c Σ x²), with a sum or an average, and √(a² + b²) as the norm of a vector."""
    inner, factor = node.args[0], 1.0
    if (operation(node) == "pow" and node.args[1] != 0.5) or inner in starts or node.kwargs:
        return False
    if (scaled := number_of(inner)) is not None:
        inner, factor = scaled
    name, plain = operation(inner), not getattr(inner, "kwargs", True)
    if name == "var" and len(inner.users) == 1 and scaled is None:
        named = inner.kwargs
        become(node, getattr(_aten.std, str(inner.target).split(".")[-1]), *inner.args)
        node.kwargs = named
        return True
    if inner in starts or factor <= 0 or not plain:
        return False
    x, dims = None, ([-1],)
    if name in ("sum", "mean") and len(inner.args) > 1 and inner.args[1]:
        x, dims = _squared(inner.args[0], starts), inner.args[1:]
    elif name == "add":
        x = _stacked(node, [_squared(n, starts) for n in inner.args])
    sizes = [value_of(x).shape[dim] for dim in dims[0]] if name == "mean" and x else []
    if x is None or not all(isinstance(size, int) for size in sizes):
        return False
    factor /= prod(sizes)
    if factor == 1:
        become(node, _aten.linalg_vector_norm.default, x, 2, *dims)
    else:
        length = insert(node, _aten.linalg_vector_norm.default, x, 2, *dims)
        become(node, _aten.mul.Tensor, length, factor**0.5)
    return True


def _hypotenuse(node: Any, starts: Starts) -> bool:
    """Rewrite hypot(a, b) as the norm of the vector (a, b)."""
    if (x := _stacked(node, list(node.args))) is not None:
        become(node, _aten.linalg_vector_norm.default, x, 2, [-1])
    return x is not None


def _squared(node: Any, starts: Starts) -> fx.Node | None:
    """Return x for x²; None for other operations."""
    power = operation(node) == "pow" and node.args[1] == 2
    return node.args[0] if power and node not in starts else None


def _stacked(before: fx.Node, parts: list[Any]) -> fx.Node | None:
    """Return the stack of tensors of one shape; None for others."""
    if any(not isinstance(part, fx.Node) or not varies(part) for part in parts):
        return None
    if len({str(value_of(part).shape) for part in parts}) > 1:
        return None
    return insert(before, _aten.stack.default, parts, -1)


def _is_reciprocal(node: Any) -> bool:
    while operation(node) in SAME_NUMBERS:
        node = node.args[0]
    if operation(node) == "pow":
        return isinstance(node.args[1], (int, float)) and node.args[1] < 0
    return operation(node) in ("rsqrt", "reciprocal")


def _sum_of_product(node: Any, starts: Starts) -> bool:
    """Rewrite Σ w ⊙ h as a weighted sum, if w and h both depend on the example.

    An average of w ⊙ h, also by a pooling over all positions, is Σ w ⊙ h / n.
    """
    name, source = operation(node), node.args[0]
    along = argument(node, 1, "dim") if name in ("sum", "mean") else whole_dims(node)
    if not along or "dtype" in node.kwargs:
        return False
    product, dims = unmoved(source, along, starts)
    factors: Any = factors_of(product)
    if factors is None or product in starts or not _both_vary(product, factors, dims):
        return False
    sizes, ndim = [value_of(product).shape[dim] for dim in dims], value_of(product).ndim
    if name != "sum" and not all(isinstance(size, int) for size in sizes):
        return False  # an average over the batch
    if operation(product) == "where":  # a masked x may be infinite, so that 0 x is not 0
        kind = {"dtype": value_of(product).dtype}
        factors = product, insert(node, _aten._to_copy.default, factors[1], **kind)
    value = insert(node, WEIGHTED_SUM, *(with_dims(node, n, ndim) for n in factors), dims)
    if name != "sum":
        value = insert(node, _aten.div.Tensor, value, prod(sizes))
    value = as_sum(node, value, along, ndim)
    become(node, value.target, *value.args)
    return True


def as_sum(node: fx.Node, value: fx.Node, along: Collection[int], ndim: int) -> fx.Node:
    """Return the node of a sum in the shape that another node has.

    Args:
        node: The node that sums up.
        value: The node of the same sum, without the dimensions that were summed over.
        along: The dimensions that ``node`` sums over.
        ndim: The number of dimensions before the sum that ``value`` is.
    """
    shape = value_of(node).shape
    if value_of(value).ndim + len(along) == len(shape) == ndim:  # with these dimensions kept
        for dim in sorted(dim % ndim for dim in along):
            value = insert(node, _aten.unsqueeze.default, value, dim)
    if str(value_of(value).shape) != str(shape):  # there was a reshape
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        value = insert(node, _aten.reshape.default, value, sizes)
    return value


def with_dims(before: fx.Node, node: Any, ndim: int) -> fx.Node:
    """Return the node of a value with dimensions of size 1 added in front, up to ``ndim``."""
    while value_of(node).ndim < ndim:
        node = insert(before, _aten.unsqueeze.default, node, 0)
    result: fx.Node = node
    return result


def unmoved(
    node: Any, dims: Collection[int], starts: Starts, reshapes: bool = True
) -> tuple[Any, list[int]]:
    """Return the value before transpositions and reshapes, and the dimensions ``dims`` in it.

    Args:
        node: The node of the value.
        dims: Its dimensions.
        starts: The explained nodes, at which the search ends.
        reshapes: Whether to look before reshapes as well; one may make several of a dimension.
    """
    kept: list[int] = [dim % value_of(node).ndim for dim in dims]
    while node not in starts:
        if reshapes and operation(node) in RESHAPES:
            before = _whole(node, kept)
        elif (order := permutation(node)) is not None:
            rest = [order[dim] for dim in range(len(order)) if dim not in kept]
            before = [order[dim] for dim in kept] if rest == sorted(rest) else []
        else:
            break
        if not before:
            break
        node, kept = node.args[0], before
    return node, kept


def _whole(node: Any, dims: Collection[int]) -> list[int]:
    """Return the dimensions of a reshape's argument that became ``dims``; [] if only parts did."""
    before, after = regrouped(node)
    summed = {after[dim] for dim in dims}
    sizes = enumerate(value_of(node).shape)
    rest = [at for at, size in sizes if at not in dims and bool(size != 1)]
    if not summed.isdisjoint(after[at] for at in rest):
        return []
    return [at for at, group in enumerate(before) if group in summed]


def factors_of(node: Any) -> tuple[Any, Any] | None:
    """Return the factors of a product, also of x and a boolean m in ``where(m, x, 0)``."""
    if operation(node) == "mul":
        a, b = node.args
        return a, b
    if node.target is _aten.where.ScalarOther and node.args[2] == 0 and varies(node.args[1]):
        return node.args[1], node.args[0]
    return None


def _both_vary(product: Any, factors: tuple[Any, Any], dims: Sequence[int]) -> bool:
    """Return True if both factors depend on the example, and neither is copied along ``dims``.

    If a factor is the same for all entries of the sum, it is a scale of the whole sum. A value
    with a gate of its own, as x · sigmoid(x), is an activation.
    """
    a, b = factors
    if not is_of_example(a) or not is_of_example(b) or _gates_itself(a, b):
        return False
    ndim = value_of(product).ndim
    shapes = [(1,) * (ndim - value_of(n).ndim) + tuple(value_of(n).shape) for n in (a, b)]
    return any(all(shape[dim] != 1 for shape in shapes) for dim in dims)


def is_of_example(node: Any) -> bool:
    """Return True for a value of the input, and for a constant that is passed per example."""
    return isinstance(node, fx.Node) and (varies(node) or batched(value_of(node)))


def _gates_itself(a: fx.Node, b: fx.Node) -> bool:
    """Return True if one of two factors is a gate that is computed from the other one."""
    sources = [(x, gate_source(gate, varies)) for x, gate in ((a, b), (b, a))]
    sources = [(x, g.args[0] if operation(g) in NEGATIONS else g) for x, g in sources]
    gates = [gate for x, gate in sources if is_gate(gate, varies) and gate.all_input_nodes == [x]]
    return any("softmax" not in operation(gate) for gate in gates)


def insert(before: fx.Node, target: Any, *args: Any, known: Any = None, **named: Any) -> fx.Node:
    """Return a new node with all marks, inserted before another node; ``known`` is its value."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, named)
    inherit(node, before, original=original(before), key=f"{marks(before).key}/{node.name}")
    value = value_of(next(iter(node.all_input_nodes), before))
    first = value[0] if isinstance(value, (tuple, list)) else value
    with first.fake_mode, enable_python_dispatcher():
        set_value(node, target(*fx.map_arg(args, value_of), **named) if known is None else known)
    mark_as_varying(node)
    mark(node, added=operation(node) in SAME_NUMBERS)
    return node


def become(node: fx.Node, target: Any, *args: Any) -> None:
    """Replace the operation of a node by an operation with the same value."""
    mark(node, original=original(node))
    node.target, node.args, node.kwargs = target, args, {}


def stand_for(node: fx.Node, value: fx.Node) -> None:
    """Replace a node by an inserted one with the same value, which reports list in its place."""
    become(node, _aten.alias.default, value)
    mark(node, added=True)


#: Operations whose result has the same numbers as their argument.
SAME_NUMBERS = frozenset(
    {"view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "permute", "transpose",
     "clone", "contiguous", "flatten", "unflatten", "alias", "_to_copy"}
)  # fmt: skip

_REWRITES: dict[str, tuple[Callable[[fx.Node, Starts], bool], ...]] = {
    "div": (_ratio,),
    "mul": (_product_with_one, _product_with_reciprocal),
    "getitem": (_moment,),
    **dict.fromkeys(("sqrt", "pow"), (_length,)),
    "hypot": (_hypotenuse,),
    "sum": (_sum_of_product,),
    "mean": (_sum_of_product,),
    **dict.fromkeys(
        (f"{kind}avg_pool{dims}d" for kind in ("", "adaptive_") for dims in (1, 2, 3)),
        (_sum_of_product,),
    ),
}
