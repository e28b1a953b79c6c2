"""Ways of writing one network brought into one.

An inverse depends on what a tensor is handed to. So that it does not depend on how that is spelled, copies are left out, what
only rearranges is done once, dense layers come before transpositions of other dimensions, and of tensors that are stacked only
to pick one, that one is taken.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import inherit, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, operation, place
from captum_mipin.propagation.batch_layout import lay_out, takes_all

#: Operations that give what they take, wherever it has the same shape and dtype afterwards.
_COPIES = (
    "clone",
    "alias",
    "contiguous",
    "dropout",
    "view",
    "_unsafe_view",
    "reshape",
    "expand",
    "_to_copy",
)

#: Operations that rearrange, and are often written down once for each use.
_REARRANGEMENTS = (
    *_COPIES,
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "select",
    "slice",
)


def respell(graph: fx.Graph, starts: Collection[fx.Node], batch: str) -> None:
    """Rewrite a marked graph; the nodes in ``starts``, and what modules give, at which others may start, stay."""
    seen: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node in starts or node.op != "call_function" or _leaves_module(node):
            continue
        if _is_copy(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
            continue
        if operation(node) in _REARRANGEMENTS:
            order = permutation(node)
            what = str(
                (node.target, node.args, node.kwargs)
                if order is None
                else (node.all_input_nodes, order)
            )
            same = seen.get(what, node)
            if same is not node and not same._erased and _marks(same) == _marks(node):
                node.replace_all_uses_with(same)
                graph.erase_node(node)
                continue
            seen[what] = node
        if operation(node) == "select":
            _pick(graph, node, starts)
    for node in list(graph.nodes):
        if operation(node) == "linear" and node not in starts:
            while node.args[0] not in starts and _swapped(graph, node, batch):
                pass
    graph.eliminate_dead_code(lambda node: node in starts or node.is_impure())


def permutation(node: fx.Node) -> list[int] | None:
    """Where each dimension of a transposition comes from; None for what is no transposition."""
    value = value_of(node)
    if operation(node) not in ("transpose", "permute") or not isinstance(value, Tensor):
        return None
    order = list(range(value.ndim))
    if operation(node) == "permute":
        return [dim % value.ndim for dim in argument(node, 1, "dims")]
    a, b = (argument(node, at, f"dim{at - 1}") for at in (1, 2))
    order[a], order[b] = order[b], order[a]
    return order


def _leaves_module(node: fx.Node) -> bool:
    """Whether a node is what a module gives, not only what is computed inside."""
    inside = set(place(node).stack)
    return any(inside - set(place(user).stack) for user in node.users if user.op != "output")


def _marks(node: fx.Node) -> tuple[bool, ...]:
    """What a node is to the signal."""
    known = marks(node)
    return known.depends, known.signal, known.recorded, known.discrete


def _is_copy(node: fx.Node) -> bool:
    value, sources = value_of(node), node.all_input_nodes
    source = value_of(sources[0]) if sources else None
    if (
        not (isinstance(value, Tensor) and isinstance(source, Tensor))
        or node.args[0] is not sources[0]
    ):
        return False
    alike = (
        str(value.shape) == str(source.shape)
        and value.dtype == source.dtype
        and value.device == source.device
    )
    return alike and (
        operation(node) in _COPIES or (operation(node) == "slice" and takes_all(node))
    )


def _swapped(graph: fx.Graph, node: fx.Node, batch: str) -> bool:
    """Put a dense layer before the transposition of other dimensions that it follows, if it follows one."""
    source = node.args[0]
    assert isinstance(source, fx.Node)  # for mypy: this takes a tensor
    order = permutation(source)
    if order is None or order[-1] != len(order) - 1 or _leaves_module(source):
        return False
    with graph.inserting_after(node):
        moved = graph.call_function(torch.ops.aten.permute.default, (node, order))
    inherit(moved, node)  # its key among them: what follows is called as it would be
    node.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    node.args = (source.args[0], *node.args[1:])
    set_value(node, value_of(node).permute([order.index(dim) for dim in range(len(order))]))
    lay_out(node, batch)
    if not source.users:
        graph.erase_node(source)
    return True


def _pick(graph: fx.Graph, node: fx.Node, starts: Collection[fx.Node]) -> None:
    """Take what ``select`` takes from tensors that were stacked, or strung together, from that tensor itself."""
    arguments: Any = node.args
    source, dim, index = arguments
    dim %= value_of(source).ndim
    while source not in starts and (order := permutation(source)) is not None:
        rest = order[:dim] + order[dim + 1 :]
        if rest != sorted(rest):
            return
        source, dim = source.all_input_nodes[0], order[dim]
    along = argument(source, 1, "dim", 0)
    if (
        source in starts
        or operation(source) not in ("stack", "cat")
        or along % value_of(source).ndim != dim
    ):
        return
    parts = source.args[0]
    if any(
        value_of(part).ndim != value_of(parts[0]).ndim for part in parts
    ):  # one of them is empty
        return
    sizes = [1 if operation(source) == "stack" else value_of(part).shape[dim] for part in parts]
    if not all(isinstance(n, int) for n in [index, *sizes]):
        return
    index, at = index % sum(sizes), 0
    while index >= sizes[at]:
        index, at = index - sizes[at], at + 1
    picked = parts[at]
    if (
        value_of(picked).dtype != value_of(node).dtype
        or value_of(picked).device != value_of(node).device
    ):
        return  # which others decided
    if operation(source) == "cat":
        with graph.inserting_before(node):
            picked = graph.call_function(torch.ops.aten.select.int, (parts[at], dim, index))
        inherit(picked, node)
    node.replace_all_uses_with(picked)
    graph.erase_node(node)
