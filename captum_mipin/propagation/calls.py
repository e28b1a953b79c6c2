"""The pass that writes a dense layer that is applied to all slices of a tensor as one layer.

A loop over the entries of a sequence, as over an ``LSTMCell``, calls the same layer once for each
entry. Its weights are the same, so f(h[:, 0]), f(h[:, 1]), ... become the slices of f(h).
"""

from collections.abc import Sequence
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.nodes import argument
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.forms import become, insert
from captum_mipin.propagation.slices import Slice, slice_or_copy
from captum_mipin.rules.base import varies

_aten = torch.ops.aten


def join_calls(draft: Draft) -> None:
    """Rewrite dense layers that all slices of one tensor go through."""
    calls = dict[Any, list[tuple[Slice, fx.Node]]]()
    for node in draft.graph.nodes:
        if node.target is _aten.linear.default and varies(node) and node not in draft.starts:
            part = slice_or_copy(node.args[0], draft.starts)
            if part is not None:
                layer = argument(node, 1, "weight"), argument(node, 2, "bias")
                key = part.form, *map(_spelling, layer)
                calls.setdefault(key, []).append((part, node))
    for group in calls.values():
        # sorted by place in the tensor; the first call in the graph comes first in ``group``
        parts = sorted(group, key=lambda call: call[0].start)
        slices = [part for part, _ in parts]
        size = value_of(slices[0].source).shape[slices[0].dim]
        row = all(a.stop == b.start for a, b in pairwise(slices))
        if len(group) > 1 and row and slices[0].start == 0 and slices[-1].stop == size:
            _join(group[0][1], parts)


def _spelling(node: Any) -> str:
    """Return a text that is equal for constants which the same operations compute."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return str(node)
    return f"{node.target}{fx.map_arg((node.args, node.kwargs), _spelling)}"


def _join(first: fx.Node, parts: Sequence[tuple[Slice, fx.Node]]) -> None:
    """Replace the calls of a layer by the slices of one call, which is inserted before the first.

    Args:
        first: The first call.
        parts: The slices of a tensor, in order, and the calls.
    """
    source, dim, kept = parts[0][0].form
    ndim = value_of(source).ndim
    if kept and dim == ndim - 1:
        return  # these are slices of the features
    if not kept:  # the slices' dimension in front, so that the features stay the last one
        order = [dim, *(n for n in range(ndim) if n != dim)]
        source, dim = insert(first, _aten.permute.default, source, order), 0
    whole = insert(first, _aten.linear.default, source, *first.args[1:])
    mark(whole, key=marks(first).key)
    if kept:
        widths = [part.stop - part.start for part, _ in parts]
        taken = insert(first, _aten.split_with_sizes.default, whole, widths, dim)
    else:
        taken = insert(first, _aten.unbind.int, whole, dim)
    for at, (_, call) in enumerate(parts):
        become(call, getitem, taken, at)
