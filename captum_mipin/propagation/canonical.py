"""The pass that brings several ways of writing one network into one.

An inverse depends on the operations that take a tensor. So that it does not depend on how these
are written, copies are left out, one rearrangement is done once, a dense layer comes before the
transposition of other dimensions, and where tensors are stacked only to pick one, that one is used.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from captum_mipin.errors import CaptureError
from captum_mipin.graph.marks import inherit, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, operation, place
from captum_mipin.propagation.batch_layout import lay_out, takes_all
from captum_mipin.propagation.draft import Draft, is_tensor
from captum_mipin.propagation.marking import without_signal

#: Operations that give what they take, wherever it has the same shape and dtype afterwards.
_COPIES = ("clone", "alias", "contiguous", "dropout", "reshape", "expand", "_to_copy")

#: Operations that rearrange, and are often written down once for each use.
_REARRANGEMENTS = frozenset(
    {*_COPIES, "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "select"}
    | {"slice"}
)


def canonicalise(draft: Draft) -> None:
    """Rewrite a marked graph; its starts and the outputs of modules stay.

    Raises:
        CaptureError: Only what is left out depends on a start.
    """
    graph, starts = draft.graph, draft.starts
    first_of: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node in starts or node.op != "call_function" or _leaves_module(node):
            continue
        same = node
        if _is_copy(node):
            same = node.all_input_nodes[0]
        elif operation(node) == "select":
            same = _picked(graph, node, starts)
        if same is node and operation(node) in _REARRANGEMENTS:
            same = first_of.setdefault(_spelling(node), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    # W x P = (W x) P where P moves other dimensions than the last: take the left side's order.
    for node in list(graph.nodes):
        if operation(node) == "linear" and node not in starts:
            while node.args[0] not in starts and _swapped(graph, node, draft.batch):
                pass
    graph.eliminate_dead_code(lambda node: node in starts or node.is_impure())
    if lost := [node for node in starts if not node.users]:
        raise CaptureError(without_signal(lost, draft.output))


def permutation(node: fx.Node) -> list[int] | None:
    """Return where each dimension of a transposition comes from; None for other operations."""
    if operation(node) not in ("transpose", "permute") or not is_tensor(node):
        return None
    ndim = value_of(node).ndim
    if operation(node) == "permute":
        return [dim % ndim for dim in argument(node, 1, "dims")]
    order = list(range(ndim))
    a, b = (argument(node, at, f"dim{at - 1}") for at in (1, 2))
    order[a], order[b] = order[b], order[a]
    return order


def _leaves_module(node: fx.Node) -> bool:
    """Return True if a node is the output of a module, at which others may start."""
    inside = set(place(node).stack)
    return any(inside - set(place(user).stack) for user in node.users if user.op != "output")


def _spelling(node: fx.Node) -> Any:
    """Return what is equal for rearrangements that give the same, with the same marks."""
    known, order = marks(node), permutation(node)
    call = (node.target, node.args, node.kwargs) if order is None else (node.all_input_nodes, order)
    return str(call), known.depends, known.signal, known.recorded, known.discrete


def _is_copy(node: fx.Node) -> bool:
    """Return True if an operation gives what it takes."""
    source = next(iter(node.all_input_nodes), None)
    if source is None or node.args[0] is not source or not (is_tensor(node) and is_tensor(source)):
        return False
    (shape, *kind), (source_shape, *source_kind) = map(_kind, (node, source))
    whole = operation(node) == "slice" and takes_all(node)
    copies = operation(node) in _COPIES or whole
    return copies and str(shape) == str(source_shape) and kind == source_kind


def _kind(node: fx.Node) -> tuple[torch.Size, torch.dtype, torch.device]:
    value = value_of(node)
    return value.shape, value.dtype, value.device


def _swapped(graph: fx.Graph, node: fx.Node, batch: str) -> bool:
    """Put a dense layer before the transposition of other dimensions that it follows, if any."""
    source = node.args[0]
    assert isinstance(source, fx.Node)  # for mypy: it takes a tensor
    order = permutation(source)
    if order is None or order[-1] != len(order) - 1 or _leaves_module(source):
        return False
    with graph.inserting_after(node):
        moved = graph.call_function(torch.ops.aten.permute.default, (node, order))
    inherit(moved, node)  # its key as well: what follows is called as without the swap
    node.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    node.args = (source.args[0], *node.args[1:])
    set_value(node, value_of(node).permute([order.index(dim) for dim in range(len(order))]))
    lay_out(node, batch)
    if not source.users:
        graph.erase_node(source)
    return True


def _picked(graph: fx.Graph, node: fx.Node, starts: Collection[fx.Node]) -> fx.Node:
    """Return what ``select`` takes out of stacked tensors as a node that does without the stack.

    Returns:
        One of the tensors, or a ``select`` of one that was concatenated; ``node`` itself if it
        selects from anything else.
    """
    arguments: Any = node.args
    source, dim, index = arguments
    dim %= value_of(source).ndim
    # Look through transpositions: they only rename the dimension that is selected.
    while source not in starts and (order := permutation(source)) is not None:
        rest = order[:dim] + order[dim + 1 :]  # the order of the dimensions that are kept
        if rest != sorted(rest):
            return node
        source, dim = source.all_input_nodes[0], order[dim]
    made, along = operation(source), argument(source, 1, "dim", 0)
    if source in starts or made not in ("stack", "cat") or along % value_of(source).ndim != dim:
        return node
    parts = source.args[0]
    values = list(map(value_of, parts))
    if len({value.ndim for value in values}) > 1:  # one of them is empty
        return node
    sizes = [1 if made == "stack" else value.shape[dim] for value in values]
    if not all(isinstance(n, int) for n in [index, *sizes]):
        return node
    # Find the part that holds this index, and its own index in there.
    index, at = index % sum(sizes), 0
    while index >= sizes[at]:
        index, at = index - sizes[at], at + 1
    if _kind(parts[at])[1:] != _kind(node)[1:]:  # the other parts decide dtype and device
        return node
    if made == "stack":
        part: fx.Node = parts[at]
        return part
    with graph.inserting_before(node):
        picked = graph.call_function(torch.ops.aten.select.int, (parts[at], dim, index))
    inherit(picked, node)
    return picked
