"""The pass that writes slices of one tensor as one split, if they do not overlap.

``h[..., :8], h[..., 8:]`` are two operations on h, while ``h.chunk(2, -1)`` and ``unbind`` are one.
Several become one ``split_with_sizes``.
"""

from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.marks import mark, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.forms import insert, stand_for
from captum_mipin.propagation.slices import Slice, slice_of
from captum_mipin.rules.base import varies

_aten = torch.ops.aten


def write_splits(draft: Draft) -> None:
    """Rewrite slices of one tensor along one dimension, which several operations take, as one."""
    groups: dict[tuple[fx.Node, int], list[tuple[Any, Slice]]] = {}
    first_of: dict[Slice, fx.Node] = {}
    for node in list(draft.graph.nodes):
        part = slice_of(node, draft.starts) if varies(node) and node not in draft.starts else None
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
    draft.graph.eliminate_dead_code(lambda node: node in draft.starts or node.is_impure())


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
            value = insert(node, _aten.squeeze.dim, value, dim)
        stand_for(node, value)
