"""Passes that replace operations by others, with rules, that compute the same.

exp(log_softmax(x)) is softmax(x). A group norm of one group, at one position, is a layer norm. A
norm of groups of channels, with weights of the channels behind it, is a group norm. A variance
without a rule is mean((x − μ)²).
"""

from math import prod
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.dimensions import RESHAPES
from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import mark, original, value_of
from captum_mipin.graph.nodes import argument, erase_unused, is_size, operation
from captum_mipin.propagation.canonical import is_copy
from captum_mipin.propagation.draft import Draft, is_tensor
from captum_mipin.propagation.forms import become, insert, stand_for
from captum_mipin.propagation.marking import mark_varying
from captum_mipin.rules.base import varies

_aten = torch.ops.aten


def replace_equivalents(draft: Draft) -> None:
    """Replace exponentials of log-softmaxes by softmaxes, and group norms by layer norms."""
    for node in draft.varying():
        if operation(node) == "exp" and node.args[0] not in draft.starts:
            _exponential(node, node.args[0])
        elif operation(node) == "group_norm" and node.args[1] == 1:
            _group_norm(node)
    erase_unused(draft.graph, draft.starts)


def _exponential(node: fx.Node, source: Any) -> None:
    """Rewrite exp(log_softmax(x)), also as exp(x − logsumexp(x)), as softmax(x)."""
    if operation(source) == "log_softmax":
        become(node, _aten.softmax.int, *source.args)
    elif operation(source) == "sub" and operation(source.args[1]) == "logsumexp":
        x, shift = source.args[:2]
        along, kept = argument(shift, 1, "dim"), argument(shift, 2, "keepdim", False)
        if kept and shift.args[0] is x and len(along) == 1:
            become(node, _aten.softmax.int, x, along[0])


def _group_norm(node: Any) -> None:
    """Rewrite a group norm of one group as a layer norm, if there is one position."""
    sizes = list(value_of(node).shape[1:])
    if any(size != 1 for size in sizes[1:]):
        return
    weights = [argument(node, at, name) for at, name in ((2, "weight"), (3, "bias"))]
    weights = [n and insert(node, _aten.reshape.default, n, sizes) for n in weights]
    eps = argument(node, 4, "eps", 1e-5)
    become(node, _aten.layer_norm.default, node.args[0], sizes, *weights, eps)


def write_group_norms(draft: Draft) -> None:
    """Rewrite norms of groups of channels, with γ and β of each channel behind, as group norms."""
    for node in draft.varying():
        groups = _groups(node)
        if groups is not None:
            _with_weights(draft, node, *groups)
    erase_unused(draft.graph, draft.starts)


def _groups(node: Any) -> tuple[int, float] | None:
    """Return the number of groups of a norm without weights, and its ε; None for others."""
    name, ndim = operation(node), value_of(node).ndim if is_tensor(node) else 0
    at = {"layer_norm": (2, 3), "group_norm": (2, 3), "instance_norm": (1, 2, 3, 4)}.get(name, ())
    if not at or node.kwargs or any(n is not None for n in node.args[at[0] : at[-1] + 1]):
        return None
    if name == "layer_norm" and ndim - len(node.args[1]) != 2:
        return None
    groups = node.args[1] if name == "group_norm" else value_of(node).shape[1]
    eps = argument(node, 7 if name == "instance_norm" else 4, "eps", 1e-5)
    return (groups, eps) if isinstance(groups, int) else None


def _with_weights(draft: Draft, node: Any, groups: int, eps: float) -> None:
    """Replace a norm of groups, and the weights of the channels behind it, by a group norm.

    Args:
        draft: The draft, whose graph is changed.
        node: The norm, along all dimensions behind the second one, or of groups of channels.
        groups: The number of groups.
        eps: ε of the norm.
    """
    last, end, weights = None, node, dict[str, fx.Node]()
    while end not in draft.starts and len(users := [n for n in end.users if not is_size(n)]) == 1:
        (user,) = users
        if not weights and (operation(user) in RESHAPES or is_copy(user)):
            end = user
            continue
        name, others = operation(user), [n for n in user.all_input_nodes if n is not end]
        if name not in ("mul", "add") or name in weights or "add" in weights or user.kwargs:
            break
        if len(others) != 1 or not _is_of_channels(others[0], end):
            break
        weights[name], last, end = others[0], user, user
    shape, source = value_of(end).shape, node.args[0]
    if last is None or shape[1] % groups or str(shape[0]) != str(value_of(node).shape[0]):
        return
    if operation(source) in RESHAPES and source not in draft.starts:
        before = source.args[0]
        source = before if str(value_of(before).shape) == str(shape) else source
    if str(value_of(source).shape) != str(shape):
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        source = insert(last, _aten.reshape.default, source, sizes)
    factors = [weights.get(name) for name in ("mul", "add")]
    factors = [n and insert(last, _aten.reshape.default, n, [shape[1]]) for n in factors]
    become(last, _aten.group_norm.default, source, groups, *factors, eps)
    mark(last, original=original(node))


def _is_of_channels(weight: fx.Node, node: fx.Node) -> bool:
    """Return True for a constant with one number for each channel of a value."""
    if varies(weight) or not is_tensor(weight) or batched(value_of(weight)):
        return False
    shape, sizes = value_of(node).shape, tuple(value_of(weight).shape)
    sizes = (1,) * (len(shape) - len(sizes)) + sizes
    return sizes == (1, shape[1], *(1,) * (len(shape) - 2)) and len(shape) > 2


def expand_variances(draft: Draft) -> None:
    """Write variances that have no rule as mean((x − μ)²), and deviations as |x − μ| / √n."""
    for node in draft.varying():
        name = operation(node)
        if name not in ("var", "std") or draft.rule(node) is not None:
            continue
        x, dims, kept, correction = _variance(node)
        sizes = [value_of(x).shape[dim] for dim in dims or ()]
        if not all(isinstance(size, int) for size in sizes) or prod(sizes) <= correction:
            continue  # over the batch, or not a number
        centred = insert(node, _aten.sub.Tensor, x, insert(node, _aten.mean.dim, x, dims, True))
        if name == "std":
            length = insert(node, _aten.linalg_vector_norm.default, centred, 2, dims, kept)
            factor = (prod(sizes) - correction) ** -0.5
            stand_for(node, insert(node, _aten.mul.Tensor, length, factor))
            continue
        square = insert(node, _aten.pow.Tensor_Scalar, centred, 2)
        result = insert(node, _aten.mean.dim, square, dims, kept)
        if correction:  # Σ (x − μ)² / (n − c)
            factor = prod(sizes) / (prod(sizes) - correction)
            result = insert(node, _aten.mul.Tensor, result, factor)
        stand_for(node, result)
    mark_varying(draft)


def _variance(node: Any) -> tuple[Any, Any, bool, float]:
    """Return the argument of a variance, its dimensions, keepdim, and the c of n − c."""
    if str(node.target).endswith(".dim"):
        kept = argument(node, 3, "keepdim", False)
        return node.args[0], argument(node, 1, "dim"), kept, argument(node, 2, "unbiased", True)
    correction = node.kwargs.get("correction")
    kept, dims = node.kwargs.get("keepdim", False), argument(node, 1, "dim")
    return node.args[0], dims, kept, 1 if correction is None else correction
