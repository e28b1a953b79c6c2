"""The pass that finds the dimension of each tensor's channels."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.draft import Draft, is_tensor, permutation
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
    for downwards in (True, False):
        # breadth first: the nearest operation decides; each node is reached with the order in which
        # it has the dimensions of the tensor
        queue, reached = [(node, list(range(value.ndim)))], {node}
        for current, order in queue:
            near = list(current.users if downwards else current.all_input_nodes)
            for teller in near if downwards else [current]:
                dim = _channels_of(teller, current)
                if dim is not None and order[dim] != at:
                    return order[dim]
            for other in near:
                moved = _moved(order, other if downwards else current, downwards)
                if other not in reached and _has_shape(other, node, moved):
                    queue.append((other, moved))
                    reached.add(other)
    # No operation determines it: take dimension 1, else the last one, else the first one.
    return next(dim for dim in (1, value.ndim - 1, 0) if dim != at)


def _moved(order: Sequence[int], move: fx.Node, forwards: bool) -> list[int]:
    """Return an order of dimensions behind a transposition, or before it; else the order itself."""
    dims = [1, 0] if operation(move) == "t" and len(order) == 2 else permutation(move)
    if dims is None:
        return list(order)
    return [order[at] for at in (dims if forwards else map(dims.index, range(len(dims))))]


def _has_shape(one: fx.Node, other: fx.Node, order: Sequence[int]) -> bool:
    """Return True if the shape of one tensor is that of another, in an order of dimensions."""
    if not is_tensor(one) or value_of(one).ndim != len(order):
        return False
    shape = value_of(other).shape
    return [str(size) for size in value_of(one).shape] == [str(shape[dim]) for dim in order]


def _channels_of(user: fx.Node, node: fx.Node) -> int | None:
    """Return the dimension of the channels of ``node`` by the operation ``user``; None if unknown.

    Args:
        user: An operation that uses ``node``, or ``node`` itself.
        node: The node.
    """
    if operation(user) == "pooled_linear":  # its fifth argument is the dimension: see POOLED_LINEAR
        dim: Any = user.args[4]
        return int(dim) if user.args[0] is node else None
    if operation(user) in ("matmul", "bmm", "weighted_sum"):
        return _free_dimension(user, node)
    return _CHANNELS.get(operation(user))


def _free_dimension(user: Any, node: fx.Node) -> int | None:
    """Return the dimension of the values in a product of weights and values that is not summed.

    Args:
        user: The matrix product, or the weighted sum.
        node: One of its factors, or the product itself.

    Returns:
        The number of the dimension; None if there is none.
    """
    carriers = factors(user, varies)
    if not carriers:
        return None
    if operation(user) != "weighted_sum":
        return -2 if carriers == (0,) else -1  # V P or P V
    values, weights = user.args[carriers[0]], user.args[1 - carriers[0]]
    dims = user.args[2]
    sizes = list(enumerate(value_of(weights).shape))
    free = [dim for dim, size in sizes if dim not in dims and type(size) is int and size == 1]
    if not free or node not in (values, user):
        return None
    removed = 0 if node is values else sum(dim < free[-1] for dim in dims)
    return free[-1] - removed
