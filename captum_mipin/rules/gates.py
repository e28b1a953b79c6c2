"""Gates and scales: values that multiply or divide other values, and are recorded."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from captum_mipin.graph.marks import marks, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.rules.base import depends

_GATES = frozenset(
    {"sigmoid", "hardsigmoid", "softmax", "_softmax", "gt", "ge", "lt", "le", "eq", "ne",
     "logical_and", "logical_or", "logical_not"}
)  # fmt: skip
#: Operations whose results scale other values.
SCALE_OPERATIONS = frozenset(
    {"exp", "exp2", "sqrt", "rsqrt", "reciprocal", "pow", "abs", "linalg_vector_norm", "var", "std"}
)
GATES_AND_SCALES = _GATES | SCALE_OPERATIONS
#: Operations that negate a boolean tensor.
NEGATIONS = ("bitwise_not", "logical_not")
#: Operations that divide by their second argument.
DIVISIONS = ("div", "divided")
_SCALED = frozenset({"mul", "div", "add", "sub", "neg"})
REARRANGED = frozenset(
    {"view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "permute", "transpose",
     "clone", "dropout", "contiguous", "flatten", "unflatten", "rsub", "slice", "select", "getitem",
     "chunk", "split", "unsafe_split", "alias", "_to_copy"}
)  # fmt: skip


def _is_whole(value: Any) -> bool:
    """Return True for a traced tensor of integers or truth values."""
    real = isinstance(value, Tensor) and not value.is_complex()
    return real and not value.is_floating_point()


def is_gate(node: Any, counts: Callable[[Any], bool] = depends) -> bool:
    """Return True if a value is a gate: the result of a sigmoid, softmax or comparison.

    Rearrangements, and scales and shifts by constants, may follow this operation.

    Args:
        node: The value.
        counts: Function that returns False for constants.
    """
    return operation(gate_source(node, counts)) in _GATES


def gate_source(node: Any, counts: Callable[[Any], bool]) -> Any:
    """Return the node from which a value was rearranged, scaled or shifted.

    Args:
        node: The value.
        counts: Function that returns False for constants.

    Returns:
        The node before all these operations; None if one of them combines several such nodes.
    """
    # Follow the arguments of operations after which a gate is still a gate: 1 − σ(x), 2 σ(x).
    while operation(node) in REARRANGED | _SCALED:
        rearranged = operation(node) in REARRANGED
        sources = node.args[:1] if rearranged else [n for n in node.args if counts(n)]
        if len(sources) != 1 or (operation(node) == "div" and sources[0] is not node.args[0]):
            return None
        node = sources[0]
    return node


def factors(node: fx.Node, counts: Callable[[Any], bool] = depends) -> tuple[int, ...]:
    """Return the positions of those factors of a product that carry signal.

    These are the factors with the smallest number of gates, see ``gates`` of
    :class:`~captum_mipin.graph.marks.Marks`. If the numbers are equal, a factor that is a gate
    itself, as softmax beside (x − mean)², carries none, else both do. Of a ratio, the dividend
    carries signal, and the divisor never does.

    Args:
        node: The product or ratio.
        counts: Function that returns False for constants.
    """
    arguments: Any = node.args
    positions = tuple(
        i for i, n in enumerate(arguments) if counts(n) and not _is_whole(value_of(n))
    )  # integers carry no signal
    if operation(node) in DIVISIONS:
        return positions[:1]
    gates = {i: marks(arguments[i]).gates for i in positions}
    least = [i for i in positions if gates[i] == min(gates.values())]
    return tuple(i for i in least if not is_gate(arguments[i], counts)) or tuple(least)
