"""The passes that write slices in one form, and as one split if they do not overlap.

Entries that a list of numbers takes, ``h[:, [0, 1, 2]]``, are the slice ``h[:, 0:3]``.
``h[..., :8], h[..., 8:]`` are two operations on h, while ``h.chunk(2, -1)`` and ``unbind`` are one.
Several become one ``split_with_sizes``.
"""

from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.marks import mark, value_of
from captum_mipin.graph.nodes import erase_unused, operation
from captum_mipin.propagation.constants import known_value
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.forms import become, insert, stand_for
from captum_mipin.propagation.slices import Slice, slice_of
from captum_mipin.rules.base import varies

_aten = torch.ops.aten


def write_slices(draft: Draft) -> None:
    """Rewrite entries that a constant list takes as a slice, if they are as far from each other."""
    for node in draft.varying():
        if operation(node) == "index_select":
            _, dim, index = node.args
        elif operation(node) == "index":
            places = [(at, n) for at, n in enumerate(node.args[1]) if n is not None]
            dim, index = places[0]
            if len(places) > 1:
                continue
        else:
            continue
        known = None if varies(index) else known_value(draft, index)
        size = value_of(node.args[0]).shape[dim]
        if known is None or known.ndim != 1 or known.dtype == torch.bool or not len(known):
            continue
        if isinstance(size, int):
            numbers = [number % size for number in known.tolist()]
            step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
            if step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
                bounds = dim, numbers[0], numbers[-1] + 1, step
                become(node, _aten.slice.Tensor, node.args[0], *bounds)
    erase_unused(draft.graph, draft.starts)


def write_splits(draft: Draft) -> None:
    """Rewrite slices of one tensor along one dimension, which several operations take, as one."""
    groups: dict[tuple[fx.Node, int], list[tuple[Any, Slice]]] = {}
    first_of: dict[Slice, fx.Node] = {}
    for node in draft.varying():
        part = slice_of(node, draft.starts)
        if part is None or operation(part.source) in ("stack", "cat"):
            continue
        if first_of.setdefault(part, node) is not node:
            stand_for(node, first_of[part])
        else:
            groups.setdefault((part.source, part.dim), []).append((node, part))
    for (source, dim), slices in groups.items():
        places = sorted({(part.start, part.stop) for _, part in slices})
        taken = {node.args[0] if node.target is getitem else node for node, _ in slices}
        apart = all(a[1] <= b[0] for a, b in pairwise(places))
        if len(taken) > 1 and len(places) > 1 and apart:
            _split(source, dim, slices, places)
    erase_unused(draft.graph, draft.starts)


def _split(
    source: fx.Node, dim: int, slices: list[tuple[Any, Slice]], places: list[tuple[int, int]]
) -> None:
    """Replace slices of a tensor along a dimension by parts of one split.

    Args:
        source: The node of the tensor.
        dim: The dimension.
        slices: The nodes of the slices, the first one first.
        places: First entry, and the entry after the last one, of all slices, in order.
    """
    ends = [0, *(end for place in places for end in place), value_of(source).shape[dim]]
    bounds = sorted(set(ends))  # with the gaps between slices
    widths = [b - a for a, b in pairwise(bounds)]
    parts = insert(slices[0][0], _aten.split_with_sizes.default, source, widths, dim)
    mark(parts, added=True)
    for node, part in slices:
        value = insert(node, getitem, parts, bounds.index(part.start))
        if not part.kept:
            value = insert(node, _aten.squeeze.dim, value, dim, known=value_of(node))
        stand_for(node, value)
