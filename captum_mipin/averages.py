"""Dense layers on averages over all places: where the averages stand in the graph, and how they are taken together.

``W mean(x) = mean(W x)``: which of the two a network does first is a matter of spelling, and is none of the method's.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx

from captum_mipin.batch import first_dimension
from captum_mipin.rules import PooledLinear, operation
from captum_mipin.rules.base import argument

#: Operations between averages and a dense layer that change a shape at most.
_FLAT = ("view", "_unsafe_view", "reshape", "flatten", "squeeze", "clone", "alias", "contiguous", "dropout")


def join_averages(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Let a dense layer on averages over all places be inverted from there, see :class:`~captum_mipin.rules.PooledLinear`."""
    for node in list(graph.nodes):
        if operation(node) != "linear" or node.meta["val"].ndim != 2:
            continue
        x, averaged = _averaged(_source(node), starts)
        kept = [dim for dim in range(1, x.meta["val"].ndim) if dim not in averaged]
        if averaged and len(kept) == 1 and first_dimension(x.meta["val"], batch):
            node.meta["shown"] = node.target
            node.target, node.args, node.kwargs = PooledLinear(), (x, *(*node.args, None)[:3], kept[0]), {}


def _averaged(node: fx.Node, starts: Sequence[fx.Node]) -> tuple[fx.Node, set[int]]:
    """What ``node`` is the average of, and over which dimensions; none, where it is no average or used otherwise as well."""
    averaged = set[int]()
    x = node
    while len(node.users) == 1 and node not in starts:
        dims = _whole_dims(node)
        if dims and (not averaged or node.meta["val"].ndim == x.meta["val"].ndim):
            averaged |= dims
            node = x = _source(node)
        elif operation(node) in _FLAT and not averaged:
            node = _source(node)
        else:
            break
    return x, averaged


def _whole_dims(node: fx.Node) -> set[int]:
    """The dimensions that an average takes whole; none for an average of parts, and for other operations."""
    name = operation(node)
    if name == "mean":
        ndim, dims = _source(node).meta["val"].ndim, argument(node, 1, "dim")
        return {dim % ndim for dim in dims} if dims else set()
    if "avg_pool" not in name or any(_each(argument(node, 3, "padding", 0))) or argument(node, 6, "divisor_override"):
        return set()
    before, after = (n.meta["val"].shape[2:] for n in (_source(node), node))
    kernel = before if "adaptive" in name else _each(argument(node, 1, "kernel_size")) * len(before)
    whole = {dim + 2 for dim, (n, m, k) in enumerate(zip(before, after, kernel, strict=False)) if m == 1 and k == n}
    kept = [dim + 2 for dim, (n, m) in enumerate(zip(before, after, strict=True)) if n == m]
    return whole if len(whole | set(kept)) == len(before) else set()


def _source(node: fx.Node) -> fx.Node:
    """The tensor that an operation works on."""
    return node.all_input_nodes[0]


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]
