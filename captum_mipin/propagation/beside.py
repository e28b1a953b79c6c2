"""The pass that finds values beside the explained ones that differ with the other examples.

They are computed from the size of the batch, as ``torch.ones(len(x)).sum()``, or from the further
arguments of several examples, as ``mask.sum()``. An explanation that uses one of them would depend
on the other examples. Rows that are all alike, as those of ``torch.zeros(len(x), 3)``, do not.
"""

from typing import Any

import torch
from torch import fx

from captum_mipin.graph.layout import Layout, batched, folded_batch
from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.nodes import is_size, operation, place
from captum_mipin.graph.rows import SHARED
from captum_mipin.propagation.batch_layout import lay_out, try_out, works_along
from captum_mipin.propagation.draft import Draft, is_constant
from captum_mipin.rules.gates import REARRANGED

#: Reason for the refusal of operations with the size of the batch among their arguments.
BATCH_SIZE = (
    "it uses the size of the batch, or a number computed from the whole batch, as a value, so an "
    "explanation would depend on the other examples"
)

#: Reason for the refusal of operations on what is computed from all rows of further arguments.
_FURTHER = (
    "it uses what {} in {} computes from the whole batch of a further argument, so an explanation "
    f"would depend on the other examples; compute along its other dimensions, or {SHARED}"
)

#: Operations that return one of several equal rows, or put them behind each other.
_ALIKE = REARRANGED | {
    "mean", "amax", "amin", "max", "min", "median", "any", "all", "flip", "roll", "index", "repeat",
    "repeat_interleave", "stack", "cat", "unbind", "index_select", "gather", "lift_fresh_copy",
    "detach", "detach_",
}  # fmt: skip

_INDEXED = ("index", "_unsafe_index", "index_put")


def lay_out_beside(draft: Draft) -> None:
    """Mark the values beside the explained ones that depend on the other examples of a batch."""
    for node in draft.graph.nodes:
        if node.op == "output" or marks(node).depends or is_size(node):
            continue
        if node.op == "placeholder":
            mark(node, beside=node not in draft.inputs and batched(value_of(node)))
        elif is_constant(node):
            mark(node, mixes=BATCH_SIZE if _takes_size(node) else "")
        elif node.op == "call_function":
            _lay_out(node, draft.batch)
        folded = folded_batch(_first(node), draft.batch) if batched(_first(node)) else None
        if folded and not marks(node).beside:
            mark(node, layout=Layout(folded[0], 1, folded[1]))


def _lay_out(node: fx.Node, batch: str) -> None:
    """Mark the value of an operation on constants and further arguments."""
    reason = mixed_beside(node)
    own = any(marks(n).beside for n in node.all_input_nodes)
    mark(node, beside=own)
    if own and not reason:
        lay_out(node, batch)
        try_out(node, batch)
        if marks(node).mixes:
            mark(node, mixes=_FURTHER.format(node.target, place(node).path or "the model itself"))
        return
    if not reason and (
        _takes_size(node) or any(_adds(node, n, batch) for n in node.all_input_nodes)
    ):
        reason = BATCH_SIZE
    mark(node, mixes=reason)


def mixed_beside(node: fx.Node) -> str:
    """Return why a value that an operation uses beside the explained ones differs, or "".

    Indices along the examples are left out: which of them take its own row for each example, as
    ``arange``, is told where their operation is laid out.
    """
    sources = dict.fromkeys(node.all_input_nodes)
    if operation(node) in _INDEXED:
        x, indices, *_ = node.args
        at = marks(x).layout.dim  # type: ignore[arg-type]
        if batched(_first(x)) and at < len(indices):  # type: ignore[arg-type]
            sources.pop(indices[at], None)  # type: ignore[index, arg-type]
    return next((marks(n).mixes for n in sources if not marks(n).depends and marks(n).mixes), "")


def _takes_size(node: fx.Node) -> bool:
    """Return True if an operation takes the size of the batch as a number, not in a shape."""
    return any(isinstance(n, fx.Node) and is_size(n) for n in (*node.args, *node.kwargs.values()))


def _adds(node: fx.Node, source: fx.Node, batch: str) -> bool:
    """Return True if an operation on equal rows makes other ones, or what tells their number."""
    value, name = _first(source), operation(node)
    if not batched(value) or name in _ALIKE:
        return False
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return False
    if not batched(_first(node)) or folded_batch(value, batch) is None:
        return True
    return works_along(node, source, marks(source).layout)


def _first(node: Any) -> Any:
    value = value_of(node)
    return value[0] if isinstance(value, (tuple, list)) and value else value
