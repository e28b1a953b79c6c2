"""A softmax or log-softmax in a graph, however it is written.

It is known by its values: if a node is f(z) for a tensor z of its shape, and f(z) = softmax(z) or
log softmax(z) along a dimension, for some random z, the logits are z.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.graph.subgraph import extract
from captum_mipin.propagation.elementwise import ELEMENTWISE, arguments_of
from captum_mipin.rules.gates import REARRANGED

#: Operations that compute a softmax of their first argument, or its logarithm.
_SOFTMAXES = {
    "softmax": "softmax", "_softmax": "softmax",
    "log_softmax": "log-softmax", "_log_softmax": "log-softmax",
}  # fmt: skip
_EXPONENTIALS = {"exp", "pow", "logsumexp"}
#: Operations that a softmax may be made of, and those that may be its last one.
_PARTS = ELEMENTWISE | REARRANGED | _EXPONENTIALS | {
    "sum", "mean", "amax", "max", "linalg_vector_norm", "expand_as", "stack", "cat", "unbind",
}  # fmt: skip
_ENDS = {"div", "mul", "sub", "exp", "stack", "cat", "permute", "transpose"}


def softmax(node: Any, varies: Callable[[Any], bool]) -> tuple[str, fx.Node] | None:
    """Return the name of a softmax, or of its logarithm, and its logits; None for other nodes.

    Args:
        node: The node.
        varies: Function that returns False for constants.
    """
    kind: str = operation(node)
    if kind in _SOFTMAXES:  # over the batch, it mixes the examples
        dim = argument(node, 1, "dim")
        return (
            None if dim % value_of(node).ndim == 0 else (_SOFTMAXES[kind], _unshifted(node.args[0]))
        )
    if kind not in _ENDS:
        return None
    for z, inside in arguments_of(node, varies, _PARTS, same_shape=False):
        name = _name(z, node) if _EXPONENTIALS & set(map(operation, inside)) else None
        if name is not None:
            return name, _unshifted(z)
    return None


def _name(z: fx.Node, y: fx.Node) -> str | None:
    """Return the name of the function of z that y is; None if it is no softmax."""
    sizes = [int(size) if str(size).isdigit() else 2 for size in value_of(z).shape]
    draw = torch.Generator().manual_seed(0)
    values = 20 * torch.rand(sizes, dtype=torch.float64, generator=draw) - 10
    try:
        (result,) = extract(y.graph, [z], [y])(values)
    except Exception:  # of any type: it depends on a weight, or on the size of the batch
        return None
    if not isinstance(result, Tensor) or result.shape != values.shape:
        return None
    for dim in range(1, values.ndim):
        log_p = values.log_softmax(dim)
        for name, expected in (("softmax", log_p.exp()), ("log-softmax", log_p)):
            if torch.allclose(result.double(), expected, rtol=1e-6, atol=0):
                return name
    return None


def _unshifted(z: Any) -> Any:
    """Return x for z = x − max(x), by which a softmax avoids overflow; else z."""
    if operation(z) != "sub" or not isinstance(z.args[1], fx.Node):
        return z
    x, shift = z.args[:2]
    while operation(shift) in REARRANGED | {"detach", "expand_as"}:
        shift = shift.args[0]
    largest = operation(shift) in ("amax", "max", "logsumexp")
    return x if largest and argument(shift, 0, "self") is x else z
