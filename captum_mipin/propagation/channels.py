"""The pass that finds the dimension of each tensor's channels."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import SymInt, fx

from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.draft import Draft, is_tensor, moved
from captum_mipin.rules.base import varies
from captum_mipin.rules.gates import factors

#: Operation → dimension of the channels, in its argument and in its result.
_CHANNELS = {
    **dict.fromkeys(
        ("linear", "layer_norm", "rms_norm", "scaled_dot_product_attention"),
        -1,
    ),
    **dict.fromkeys(("mm", "addmm"), -1),
    **{
        f"{kind}{dims}d": 1
        for dims in (1, 2, 3)
        for kind in ("conv", "conv_transpose", "max_pool", "avg_pool")
    },
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "group_norm", "instance_norm"), 1),
}

#: Products of weights and values, or of two values.
_PRODUCTS = ("matmul", "bmm", "weighted_sum")

_Order = Sequence[int | None]


def find_channels(draft: Draft) -> None:
    """Mark the dimension of the channels of each tensor that gets a signal."""
    for node in draft.graph.nodes:
        if marks(node).signal and is_tensor(node):
            mark(node, channels=channels(node))


def channels(node: fx.Node, batch: int | None = None) -> int | None:
    """Return the dimension of a tensor's channels, by the nearest operation that determines it.

    Args:
        node: The node whose value is the tensor.
        batch: The dimension of the examples; by default the one of the node's layout.

    Returns:
        The number of the dimension; None for a tensor of one dimension.
    """
    value = value_of(node)
    if value.ndim < 2:
        return None
    at = marks(node).layout.dim if batch is None else batch
    # First look at operations that use the tensor: their inverses are regressions on its channels.
    # A product of two values with a signal each is asked last: it has no weights.
    for both, downwards in ((False, True), (False, False), (True, True), (True, False)):
        # breadth first: the nearest operation decides; each node is reached with the order in which
        # it has the dimensions of the tensor
        start: _Order = list(range(value.ndim))
        queue, reached = [(node, start)], {node}
        for current, dims in queue:
            for teller, tensor, order in _beyond(current, dims, downwards):
                dim = _channels_of(teller, tensor, both)
                if dim is not None and order[dim] not in (at, None):
                    return order[dim]
                if operation(teller) in _PRODUCTS:
                    continue
                for other in [teller] if downwards else teller.all_input_nodes:
                    if (
                        other not in reached
                        and is_tensor(other)
                        and _shape(other) == _shape(tensor)
                    ):
                        queue.append((other, order))
                        reached.add(other)
    # No operation determines it: take dimension 1, else the last one, else the first one.
    return next(dim for dim in (1, value.ndim - 1, 0) if dim != at)


def _beyond(
    node: fx.Node, order: _Order, downwards: bool
) -> Iterator[tuple[fx.Node, fx.Node, _Order]]:
    """Yield the operations next to a tensor, beyond all transpositions and reshapes.

    Args:
        node: The node of the tensor.
        order: The order in which it has the dimensions of another tensor, see :func:`moved`.
        downwards: Whether to look at operations that use it; else, at the one that computes it.

    Yields:
        The operation, the tensor beside it, and the order of the dimensions of this tensor.
    """
    for near in list(node.users) if downwards else [node]:
        dims = moved(order, near, downwards)
        if dims is None:
            yield near, node, order
        else:
            yield from _beyond(near if downwards else near.all_input_nodes[0], dims, downwards)


def _shape(node: fx.Node) -> list[Any]:
    """Return the sizes of a tensor; those that are symbols as expressions, to compare them."""
    return [s.node.expr if isinstance(s, SymInt) else s for s in value_of(node).shape]


def _channels_of(user: Any, node: fx.Node, both: bool) -> int | None:
    """Return the dimension of the channels of ``node`` by the operation ``user``; None if unknown.

    Args:
        user: An operation that uses ``node``, or ``node`` itself.
        node: The node.
        both: Whether to ask products of two values that get a signal, and nothing else.
    """
    if operation(user) in _PRODUCTS:
        carriers = factors(user, varies)
        one = carriers if len(carriers) == 1 else [i for i in carriers if user.args[i] is node]
        # of the product itself, and of x in x x, the last one
        return _free_dimension(user, node, one or carriers) if both is (len(carriers) > 1) else None
    if both:
        return None
    if operation(user) == "pooled_linear":  # its fifth argument is the dimension: see POOLED_LINEAR
        dim: Any = user.args[4]
        return int(dim) if user.args[0] is node else None
    return _CHANNELS.get(operation(user))


def _free_dimension(user: Any, node: fx.Node, carriers: Sequence[int]) -> int | None:
    """Return the dimension of the values in a product of weights and values that is not summed.

    Args:
        user: The matrix product, or the weighted sum.
        node: One of its factors, or the product itself.
        carriers: The positions of the factors that are the values.

    Returns:
        The number of the dimension; None if there is none.
    """
    if operation(user) != "weighted_sum":
        if not carriers or (carriers[-1] == 0 and value_of(node).ndim < 2):
            return None
        return -2 if carriers[-1] == 0 else -1  # V P or P V
    summed: Any = user.args[2]
    free = [dim for at in carriers for dim in _without(user.args[1 - at], summed)]
    if not free or (node is not user and all(user.args[at] is not node for at in carriers)):
        return None
    return max(free) - (sum(dim < max(free) for dim in summed) if node is user else 0)


def _without(weights: fx.Node, summed: Sequence[int]) -> list[int]:
    """Return the dimensions of size 1 of weights that are not summed over."""
    sizes = enumerate(value_of(weights).shape)
    return [dim for dim, size in sizes if dim not in summed and type(size) is int and size == 1]
