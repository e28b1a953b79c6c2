"""The pass that finds the dimension of each tensor's channels."""

from typing import Any

from torch import fx

from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.draft import Draft, is_tensor

#: Operations that tell which dimension holds the channels of what they take and give.
_CHANNELS = {
    **dict.fromkeys(
        ("linear", "layer_norm", "rms_norm", "scaled_dot_product_attention"),
        -1,
    ),
    **dict.fromkeys(("matmul", "bmm", "mm", "addmm", "baddbmm"), -1),
    **{
        f"{kind}{dims}d": 1
        for dims in (1, 2, 3)
        for kind in ("conv", "conv_transpose", "max_pool", "avg_pool")
    },
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "group_norm", "instance_norm"), 1),
}

#: Operations that move dimensions: their result has the shape of their argument by chance alone.
_MOVES = ("permute", "transpose", "t")


def find_channels(draft: Draft) -> None:
    """Mark the dimension of the channels of each tensor that carries signal."""
    for node in draft.graph.nodes:
        if marks(node).signal and is_tensor(node):
            mark(node, channels=channels(node))


def channels(node: fx.Node, batch: int | None = None) -> int | None:
    """Return the dimension of a tensor's channels, as the operations nearest to it have it.

    Args:
        node: The tensor.
        batch: The dimension of its examples; by default as its layout has it.

    Returns:
        The dimension; None for a tensor of one dimension.
    """
    value = value_of(node)
    if value.ndim < 2:
        return None
    at = marks(node).layout.dim if batch is None else batch
    # What takes the tensor tells first: an inverse regresses its channels.
    for downwards in (True, False):
        queue = [node]  # breadth first: the nearest operation decides
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
                if other not in queue and not moves and _same_shape(other, node):
                    queue.append(other)
    # No operation near tells: channels come second, or last, or first.
    return next(dim for dim in (1, value.ndim - 1, 0) if dim != at)


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return is_tensor(one) and str(value_of(one).shape) == str(value_of(other).shape)


def _channels_of(user: fx.Node, node: fx.Node) -> int | None:
    """Return where an operation has the channels of ``node``, which it takes or is."""
    if operation(user) == "pooled_linear":  # its last argument says so, see PooledLinear
        dim: Any = user.args[-1]
        return int(dim) if user.args[0] is node else None
    return _CHANNELS.get(operation(user))
