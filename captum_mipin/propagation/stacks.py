"""Stacks of tensors, and sums over them, which are sums of these tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.dimensions import RESHAPES
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.propagation.canonical import is_copy
from captum_mipin.propagation.draft import permutation
from captum_mipin.propagation.forms import Starts, insert, stand_for
from captum_mipin.rules.base import varies

_aten = torch.ops.aten
#: Reshapes whose second argument is the shape.
_RESHAPES = ("view", "_unsafe_view", "reshape")


@dataclass(frozen=True)
class Stack:
    """Stacked tensors.

    Attributes:
        parts: The nodes of the tensors.
        dim: The dimension along which they are stacked.
        behind: The rearrangements that follow, the last one first, each with the dimension of the
            stack in its result.
    """

    parts: list[Any]
    dim: int
    behind: list[tuple[Any, int]]


def stack_behind(node: Any, dim: int, starts: Starts) -> Stack | None:
    """Return the tensors that are stacked along a dimension of a node; None if none are."""
    behind: list[tuple[Any, int]] = []
    while node not in starts:
        if (parts := _stacked(node, dim, starts)) is not None:
            return Stack(parts, dim, behind)
        order = permutation(node)
        before = _before(node, dim) if order is None else order[dim]
        if before is None:
            return None
        if not is_copy(node):
            behind.append((node, dim))
        node, dim = node.args[0], before
    return None


def _before(node: Any, dim: int) -> int | None:
    """Return a dimension in the argument of a copy or reshape; None if it is not left as it was."""
    if is_copy(node):
        return dim
    if operation(node) not in _RESHAPES:
        return None
    before, after = value_of(node.args[0]).shape, value_of(node).shape
    for kept, source in ((0, 0), (len(after) - 1, len(before) - 1)):
        if dim == kept and isinstance(after[kept], int) and str(after[kept]) == str(before[source]):
            return source
    return None


def rearranged(node: fx.Node, value: fx.Node, stack: Stack) -> fx.Node:
    """Return the node of a sum over a stack, with its dimension kept, behind the rearrangements."""
    value = insert(node, _aten.unsqueeze.default, value, stack.dim)
    for step, dim in reversed(stack.behind):
        arguments = list(step.args[1:])
        if operation(step) in _RESHAPES:
            arguments[0] = [1 if at == dim else size for at, size in enumerate(step.args[1])]
        value = insert(node, step.target, value, *arguments)
    return value


def sum_of_stack(node: Any, starts: Starts) -> bool:
    """Rewrite the sum or the mean of stacked tensors as a sum of these tensors."""
    if node.kwargs or len(argument(node, 1, "dim") or ()) != 1:
        return False
    source: Any = node.args[0]
    dim = node.args[1][0] % value_of(source).ndim
    scale = None
    if source not in starts and operation(source) == "mul" and sum(map(varies, source.args)) == 1:
        source, scale = source.args if varies(source.args[0]) else source.args[::-1]
    stack = None if source in starts else stack_behind(source, dim, starts)
    same = str(value_of(source).shape) == str(value_of(node.args[0]).shape)
    if stack is None or not same or (scale is not None and stack.behind):
        return False
    parts = stack.parts
    if scale is not None:
        parts = [_scaled(node, part, scale, dim, at) for at, part in enumerate(parts)]
    value = total(node, parts)
    if operation(node) == "mean":
        value = insert(node, _aten.div.Tensor, value, len(parts))
    kept = argument(node, 2, "keepdim", False)
    if kept or stack.behind:
        value = rearranged(node, value, stack)
        value = value if kept else insert(node, _aten.squeeze.dim, value, dim)
    stand_for(node, value)
    return True


def total(node: fx.Node, parts: Sequence[Any]) -> fx.Node:
    """Return the node of the sum of tensors, inserted before a node."""
    result: fx.Node = parts[0]
    for part in parts[1:]:
        result = insert(node, _aten.add.Tensor, result, part)
    return result


def scaled_sum(node: fx.Node, x: fx.Node, dim: int, number: float, keep: bool) -> fx.Node:
    """Return the node of c Σ x over a dimension of size n; for c other than 1 as n c mean(x).

    Args:
        node: The operation before which nodes are inserted.
        x: The node of x.
        dim: The dimension.
        number: The number c.
        keep: Whether to keep the dimension.
    """
    if number == 1:
        return insert(node, _aten.sum.dim_IntList, x, [dim], keep)
    value = insert(node, _aten.mean.dim, x, [dim], keep)
    factor = number * value_of(x).shape[dim]
    return value if isclose(factor, 1) else insert(node, _aten.mul.Tensor, value, factor)


def _stacked(node: Any, dim: int, starts: Starts) -> list[Any] | None:
    """Return the tensors that are stacked along a dimension; None if ``node`` is no such stack.

    A stack is also a concatenation along the next dimension that is reshaped afterwards.
    """
    if operation(node) in RESHAPES and operation(node.args[0]) == "cat":
        parts, at = list(node.args[0].args[0]), argument(node.args[0], 1, "dim", 0)
        joined = node.args[0] not in starts and at % value_of(parts[0]).ndim == dim
        before, after = ([*map(str, value_of(n).shape)] for n in (parts[0], node))
        same = all([*map(str, value_of(part).shape)] == before for part in parts)
        whole = after[:dim] + after[dim + 1 :] == before and after[dim] == str(len(parts))
        return parts if joined and same and whole else None
    along = argument(node, 1, "dim", 0) if operation(node) in ("stack", "cat") else None
    if along is None or along % value_of(node).ndim != dim:
        return None
    parts = list(node.args[0])
    if operation(node) == "stack":
        return parts
    if any(operation(part) != "unsqueeze" or value_of(part).shape[dim] != 1 for part in parts):
        return None
    if any(part.args[1] % value_of(part).ndim != dim or part in starts for part in parts):
        return None
    return [part.args[0] for part in parts]


def _scaled(node: fx.Node, part: Any, scale: Any, dim: int, at: int) -> fx.Node:
    """Return the node of a stacked tensor times its entry of a constant scale.

    Args:
        node: The operation before which nodes are inserted.
        part: The stacked tensor number ``at``.
        scale: The scale: a number, or a node that broadcasts with the stack.
        dim: The dimension of the stack.
        at: Number of the tensor.
    """
    behind = value_of(part).ndim - dim  # number of dimensions after that of the stack
    if isinstance(scale, fx.Node) and value_of(scale).ndim > behind:
        along = value_of(scale).ndim - 1 - behind
        at = at if value_of(scale).shape[along] != 1 else 0
        scale = insert(node, _aten.select.int, scale, along, at)
    return insert(node, _aten.mul.Tensor, part, scale)
