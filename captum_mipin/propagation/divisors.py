"""The pass that divides a factor of a product, and not the product, by a value of that factor.

Attention by hand may divide by Σ exp(s) before or behind the product with the values, and a cosine
classifier by |x| before or behind its dense layer: (a b) / d(a) = (a / d(a)) b, if d is one number
for each row of a. The right side is used: there the divisor normalises what it is computed from.
"""

from typing import Any

import torch
from torch import fx

from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import ancestors, argument, erase_unused, operation
from captum_mipin.propagation.canonical import leaves_module
from captum_mipin.propagation.constants import without_copies
from captum_mipin.propagation.draft import Draft, is_tensor, permutation, regrouped
from captum_mipin.propagation.forms import SAME_NUMBERS, Starts, insert, stand_for, with_dims
from captum_mipin.propagation.marking import mark_varying
from captum_mipin.rules import DIVIDED
from captum_mipin.rules.base import varies

_aten = torch.ops.aten
#: Largest number of operations that compute a divisor.
_OPERATIONS = 24
#: Operations that only rearrange a tensor.
STEPS = SAME_NUMBERS - {"expand", "_to_copy"}
_PRODUCTS = ("matmul", "bmm", "linear", "weighted_sum")


def divide_factors(draft: Draft) -> None:
    """Rewrite (a b) / d as (a / d) b, or as a (b / d), if d is computed from that factor."""
    for node in list(draft.graph.nodes):
        constant = operation(node) == "div" and all(
            isinstance(n, fx.Node) and is_tensor(n) for n in node.args
        )
        if (constant or node.target is DIVIDED) and node not in draft.starts:
            _divide_factor(node, draft.starts)
    erase_unused(draft.graph, draft.starts)
    mark_varying(draft)


def _divide_factor(node: Any, starts: Starts) -> None:
    """Rewrite one ratio."""
    above, divisor = node.args
    divisor = without_copies(divisor, node, starts)
    divisor = with_dims(node, divisor, value_of(above).ndim)
    product, steps, divisor = _moved_before(node, above, divisor, starts)
    if operation(product) not in _PRODUCTS or product in starts or leaves_module(product):
        return
    bias = argument(product, 2, "bias") if operation(product) == "linear" else None
    if len(product.users) > 1 or bias is not None:
        return
    for at in (0, 1):
        factor: Any = product.args[at]
        if not _is_of_rows(divisor, product, at):
            continue
        if not _computed_from(divisor, product, at, starts):
            continue
        small = divisor
        if operation(product) == "linear" and at == 1:  # one number for each output
            small = insert(node, _aten.reshape.default, divisor, [-1, 1])
        if operation(product) == "weighted_sum":
            for dim in sorted(dim % value_of(factor).ndim for dim in product.args[2]):
                small = insert(node, _aten.unsqueeze.default, small, dim)
        base, own, small = _moved_before(node, factor, small, starts)
        if value_of(base).dtype != value_of(product).dtype:  # a mask
            base = insert(node, _aten._to_copy.default, base, dtype=value_of(product).dtype)
        value = insert(node, DIVIDED if varies(base) else _aten.div.Tensor, base, small)
        value = _repeated(node, value, own)
        value = insert(node, product.target, *product.args[:at], value, *product.args[at + 1 :])
        stand_for(node, _repeated(node, value, steps))
        return


def _is_of_rows(divisor: fx.Node, product: Any, at: int) -> bool:
    """Return True if a divisor of a product varies only along dimensions that a factor has.

    Args:
        divisor: The divisor, with the dimensions of the product.
        product: The product.
        at: The position of the factor, 0 or 1.
    """
    shape, sizes = value_of(product.args[at]).shape, value_of(divisor).shape
    if operation(product) == "weighted_sum":
        summed = [dim % len(shape) for dim in product.args[2]]
        own = [size for dim, size in enumerate(shape) if dim not in summed]
    elif operation(product) == "linear" and at == 1:
        own = [1] * (len(sizes) - 1) + [shape[0]]
    else:  # the last dimension of a product is not one of the first factor
        own = list(shape)
        own[len(own) - 1 - at] = 1
    fits = zip(sizes, own, strict=True) if len(own) == len(sizes) else [(None, 1)]
    return all(size == 1 or str(size) == str(n) for size, n in fits)


def _moved_before(
    node: fx.Node, x: Any, divisor: fx.Node, starts: Starts
) -> tuple[Any, list[Any], fx.Node]:
    """Return the node before rearrangements of x, these, the last one first, and the divisor there.

    Args:
        node: The operation before which nodes are inserted.
        x: The node of the tensor that is divided.
        divisor: The node of the divisor, with the same number of dimensions.
        starts: The explained nodes, at which the search ends.
    """
    steps: list[Any] = []
    while x not in starts and operation(x) in STEPS and not leaves_module(x):
        order, before = permutation(x), None
        if order is not None:
            back = [order.index(dim) for dim in range(len(order))]
            before = divisor
            if back != sorted(back):
                before = insert(node, _aten.permute.default, divisor, back)
        elif (sizes := _sizes_before(x, divisor)) is not None:
            source: Any = divisor.args[0]
            undone = operation(divisor) == "reshape" and list(value_of(source).shape) == sizes
            sizes = [size if isinstance(size, int) else -1 for size in sizes]
            before = source if undone else insert(node, _aten.reshape.default, divisor, sizes)
        if before is None:
            break
        steps.append(x)
        x, divisor = x.args[0], before
    return x, steps, divisor


def _sizes_before(step: Any, divisor: fx.Node) -> list[Any] | None:
    """Return the sizes of a divisor before a reshape of what is divided; None if it has none.

    Dimensions that are rearranged together must all be in the divisor, or none of them.
    """
    before, after = regrouped(step)
    found: dict[int, set[bool]] = {}
    shapes = zip(value_of(step).shape, value_of(divisor).shape, strict=True)
    for group, (size, own) in zip(after, shapes, strict=True):
        if size == 1 != own:  # the quotient has several elements for one of x
            return None
        if size != 1:
            found.setdefault(group, set()).add(bool(own != 1))
    if any(len(kinds) > 1 for kinds in found.values()):
        return None
    whole = [found.get(group, {False}) == {True} for group in before]
    sizes = value_of(step.args[0]).shape
    return [size if has else 1 for size, has in zip(sizes, whole, strict=True)]


def _repeated(node: fx.Node, value: fx.Node, steps: list[Any]) -> fx.Node:
    """Return the node of a value behind rearrangements, given with the last one first."""
    for step in reversed(steps):
        value = insert(node, step.target, value, *step.args[1:], **step.kwargs)
    return value


def _computed_from(divisor: fx.Node, product: fx.Node, at: int, starts: Starts) -> bool:
    """Return True if a divisor is computed from one factor of a product alone.

    Args:
        divisor: The divisor.
        product: The product.
        at: The position of the factor, 0 or 1.
        starts: The explained nodes, at which the search ends.
    """
    factor, other = (_base(product.args[place], starts) for place in (at, 1 - at))
    if not varies(factor):  # weights that are passed with each example, or those of a layer
        own, below = (ancestors([n]) for n in (factor, divisor))
        return not varies(divisor) and (batched(value_of(factor)) or not own.isdisjoint(below))
    if not varies(divisor):
        return False
    waiting, seen = [divisor], {divisor}
    while waiting:
        n = waiting.pop()
        if _same(n, factor):
            continue
        ends = n in starts or n.op == "placeholder" or len(seen) > _OPERATIONS
        if ends or _same(n, product) or _same(n, other):
            return False
        sources = [source for source in n.all_input_nodes if varies(source)]
        waiting += [source for source in sources if source not in seen]
        seen.update(sources)
    return True


def _base(node: Any, starts: Starts) -> Any:
    """Return the node from which another one is only rearranged."""
    while node not in starts and operation(node) in SAME_NUMBERS:
        node = node.all_input_nodes[0]
    return node


def _same(a: fx.Node, b: fx.Node) -> bool:
    """Return True if two nodes are one, or compute the same from the same arguments."""
    computed = a.op == b.op == "call_function"
    return a is b or (computed and (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs))


def steps_before(node: Any, starts: Starts) -> list[tuple[Any, list[int | None]]]:
    """Return a node and those from which it is only rearranged, the nearest first.

    Args:
        node: The node of a tensor.
        starts: The explained nodes, at which the row ends, as it does at the output of a module.

    Returns:
        Nodes; for each, its dimension for each dimension of ``node``, or None for one of size 1
        that was added.
    """
    dims: list[int | None] = list(range(value_of(node).ndim))
    row = [(node, dims)]
    while node not in starts and operation(node) in STEPS and not leaves_module(node):
        source = node.args[0]
        order: Any = permutation(node)
        if order is None:  # a reshape that adds or removes dimensions of size 1
            before, after = value_of(source).shape, value_of(node).shape
            places, left = ([i for i, n in enumerate(sizes) if n != 1] for sizes in (before, after))
            if [str(before[i]) for i in places] != [str(after[i]) for i in left]:
                break
            order = dict(zip(left, places, strict=True))
        else:
            order = dict(enumerate(order))
        dims = [None if dim is None else order.get(dim) for dim in dims]
        node = source
        row.append((node, dims))
    return row
