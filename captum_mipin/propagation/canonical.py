"""The pass that brings different ways of writing the same network into one form.

The inverse of a tensor depends on the operations that use this tensor. It must not depend on the
way in which they are written. Therefore

- copies are removed;
- a rearrangement that is written several times is done once;
- a dense layer is moved before a transposition that leaves the last dimension in its place;
- if tensors are stacked and only one is selected afterwards, that tensor is used directly.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from captum_mipin.errors import CaptureError
from captum_mipin.graph.marks import inherit, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, erase_unused, operation, place
from captum_mipin.propagation.batch_layout import lay_out, takes_all
from captum_mipin.propagation.draft import Draft, is_tensor, permutation
from captum_mipin.propagation.marking import without_signal

#: Operations that return a copy of their argument if its shape and dtype do not change.
_COPIES = ("clone", "alias", "contiguous", "dropout", "reshape", "expand", "_to_copy")

#: Operations that rearrange a tensor; code often repeats them for each use of the result.
_REARRANGEMENTS = frozenset(
    {*_COPIES, "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "select"}
    | {"slice"}
)


def canonicalise(draft: Draft) -> None:
    """Rewrite a marked graph; explained nodes and the outputs of modules are not changed.

    Raises:
        CaptureError: After the rewrite, the output no longer depends on an explained node.
    """
    graph, starts = draft.graph, draft.starts
    first_of: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node in starts or node.op != "call_function" or leaves_module(node):
            continue
        same = node
        if is_copy(node):
            same = node.all_input_nodes[0]
        elif operation(node) == "select":
            same = _picked(graph, node, starts)
        if same is node and operation(node) in _REARRANGEMENTS:
            same = first_of.setdefault(_spelling(node), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    # W (P x) = P (W x) if the transposition P keeps the last dimension: use the right side.
    for node in list(graph.nodes):
        if operation(node) == "linear" and node not in starts:
            while node.args[0] not in starts and _swapped(graph, node, draft.batch):
                pass
    erase_unused(graph, starts)
    if lost := [node for node in starts if not node.users]:
        raise CaptureError(without_signal(lost, draft.output))


def leaves_module(node: fx.Node) -> bool:
    """Return True if a node is the output of a module, which other calls may explain."""
    inside = set(place(node).stack)
    return any(inside - set(place(user).stack) for user in node.users if user.op != "output")


def _spelling(node: fx.Node) -> Any:
    """Return a key that is equal for rearrangements with the same result and the same marks."""
    known, order = marks(node), permutation(node)
    call = (node.target, node.args, node.kwargs) if order is None else (node.all_input_nodes, order)
    return str(call), known.depends, known.signal, known.recorded, known.discrete


def is_copy(node: fx.Node) -> bool:
    """Return True if an operation returns a copy of its argument."""
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
    """Move a dense layer before the transposition that it follows.

    Args:
        graph: The graph, which is changed.
        node: The dense layer.
        batch: The symbol of the batch size.

    Returns:
        False, without a change, if no transposition that keeps the last dimension comes before.
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)  # for mypy: it takes a tensor
    order = permutation(source)
    if order is None or order[-1] != len(order) - 1 or leaves_module(source):
        return False
    with graph.inserting_after(node):
        moved = graph.call_function(torch.ops.aten.permute.default, (node, order))
    inherit(moved, node)  # also its key: later operations have the same names as without the swap
    node.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    node.args = (source.args[0], *node.args[1:])
    set_value(node, value_of(node).permute([order.index(dim) for dim in range(len(order))]))
    lay_out(node, batch)
    if not source.users:
        graph.erase_node(source)
    return True


def _picked(graph: fx.Graph, node: fx.Node, starts: Collection[fx.Node]) -> fx.Node:
    """Return a node with the value of a ``select`` that does not use the stacked tensors.

    Args:
        graph: The graph; a new node may be added to it.
        node: The ``select``.
        starts: The explained nodes.

    Returns:
        For ``stack``, the selected tensor; for ``cat``, a ``select`` from the tensor that contains
        the entry; ``node`` itself if its argument is not a stack.
    """
    arguments: Any = node.args
    source, dim, index = arguments
    dim %= value_of(source).ndim
    # Skip transpositions: they only change the number of the dimension that is selected from.
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
    if len({value.ndim for value in values}) > 1:  # cat allows empty tensors of one dimension
        return node
    sizes = [1 if made == "stack" else value.shape[dim] for value in values]
    if not all(isinstance(n, int) for n in [index, *sizes]):
        return node
    # Find the tensor that contains the entry with this index, and the entry's index within it.
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
