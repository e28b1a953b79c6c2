"""The pass that finds the dimension of each tensor's channels."""

from typing import Any

from torch import fx

from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.draft import Draft, is_tensor
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

#: Operations that move dimensions; if argument and result have the same shape, this is a chance.
_MOVES = ("permute", "transpose", "t")


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
        queue, reached = [node], {node}  # breadth first: the nearest operation decides
        for current in queue:
            near = list(current.users if downwards else current.all_input_nodes)
            for teller in near if downwards else [current]:
                dim = _channels_of(teller, current)
                if dim is not None and dim % value.ndim != at:
                    return dim % int(value.ndim)
            if not downwards and operation(current) in _MOVES:
                continue
            for other in near:
                moves = downwards and operation(other) in _MOVES
                if other not in reached and not moves and _same_shape(other, node):
                    queue.append(other)
                    reached.add(other)
    # No operation determines it: take dimension 1, else the last one, else the first one.
    return next(dim for dim in (1, value.ndim - 1, 0) if dim != at)


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return is_tensor(one) and str(value_of(one).shape) == str(value_of(other).shape)


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
