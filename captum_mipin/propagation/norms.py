"""The pass that recognises layer norms and RMS norms that a model writes by hand.

(x − μ) / √(σ² + ε) γ + β becomes ``layer_norm``, and x / √(mean(x²) + ε) γ becomes ``rms_norm``,
so that such a network is explained like one with the module. The parts are not compared with known
spellings: they are run on random numbers, which show whether their value is such a normalisation,
up to a number, which becomes a part of γ. A bound of the divisor, such as ``clamp``, is no part of
a norm, unless it is as small as that of ``F.normalize``: then it counts as ε.

In the same way, a factor that falls like 1 / |x|, however it is written, becomes a divisor. Other
ratios keep the rule of ``divided``.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import mark, original, value_of
from captum_mipin.graph.nodes import ancestors, argument, erase_unused, is_size, operation
from captum_mipin.propagation.canonical import is_copy
from captum_mipin.propagation.draft import Draft, is_tensor, number_of
from captum_mipin.propagation.forms import become, insert
from captum_mipin.propagation.marking import mark_varying
from captum_mipin.propagation.norm_trials import (
    BOUND,
    NORMS,
    TOLERANCE,
    Norm,
    eps_of,
    falls,
    norm_of,
)
from captum_mipin.rules import DIVIDED
from captum_mipin.rules.base import varies

_aten = torch.ops.aten

#: Largest number of operations that a norm is made of, without γ and β; and their names. All of
#: them are smooth, so that the random examples decide.
_OPERATIONS = 24
_PARTS = frozenset(
    {"add", "sub", "rsub", "mul", "div", "divided", "neg", "pow", "square", "sqrt", "rsqrt",
     "reciprocal", "exp", "exp2", "log", "log2", "mean", "sum", "weighted_sum", "matmul", "bmm",
     "var", "std", "linalg_vector_norm", "expand", "expand_as", "view", "reshape",
     "unsqueeze", "squeeze", "flatten", "permute", "transpose", "alias", "clone", "contiguous",
     "_to_copy"}
    | {f"{kind}avg_pool{n}d" for kind in ("", "adaptive_", "_adaptive_") for n in (1, 2, 3)}
)  # fmt: skip


def recognise_norms(draft: Draft) -> None:
    """Replace each normalisation that is written by hand by ``layer_norm`` or ``rms_norm``."""
    order = {n: at for at, n in enumerate(draft.graph.nodes)}
    sizes = {n for n in order if is_size(n)}
    known: dict[str, Norm | None] = {}
    for node in list(draft.graph.nodes):
        factor = _scale_of_example(node)
        ends = node.target is DIVIDED or operation(node) in NORMS or factor is not None
        if not ends or not varies(node) or node in draft.starts:
            continue
        sources = [x for x in _sources(draft, node, order) if _is_computable(node, x, sizes)]
        tried = []
        for x in sources:  # the same norm in each block of a network is tried once
            key = _spelling(node, x, sizes, order)
            known[key] = known[key] if key in known else norm_of(node, x)
            tried.append((x, known[key]))
        names = [(x, norm) for x, norm in tried if norm is not None]
        if names:
            _replace(draft, node, *names[-1])  # the longest one, from x and not from x − μ
        elif factor is not None and any(falls(factor, x) for x in sources):
            (x,) = (n for n in node.args if n is not factor)
            become(node, DIVIDED, x, insert(node, _aten.reciprocal.default, factor))
        else:
            continue
        order = {n: at for at, n in enumerate(draft.graph.nodes)}
    erase_unused(draft.graph, draft.starts)
    mark_varying(draft)


def _is_computable(node: Any, x: fx.Node, sizes: set[fx.Node]) -> bool:
    """Return True if a value, of a norm without γ and β, is computed from x and numbers alone.

    Args:
        node: The node of the value.
        x: The node of a tensor from which it is computed.
        sizes: The nodes of all sizes, which are numbers.
    """
    result, stop = node.args[0] if operation(node) in NORMS else node, {x, *sizes}
    needed = ancestors([result], stop)
    return result is not x and all(n in stop or n.op == "call_function" for n in needed)


def _spelling(node: Any, x: fx.Node, sizes: set[fx.Node], order: dict[fx.Node, int]) -> str:
    """Return a text that is equal for values which the same operations compute from x.

    Args:
        node: The node of the value; a norm stands for itself without γ and β.
        x: The node of a tensor from which it is computed.
        sizes: The nodes of all sizes.
        order: The place of each node in the graph.
    """
    norm = operation(node) in NORMS
    names: dict[fx.Node, str] = {}
    lines = [f"{value_of(x).shape}", f"{node.target} {node.args[1]} {eps_of(node)}" if norm else ""]
    parts = ancestors([node.args[0] if norm else node], {x, *sizes})
    for at, n in enumerate(sorted(parts, key=order.__getitem__)):
        names[n] = "x" if n is x else str(value_of(n)) if n in sizes else f"n{at}"
        if names[n] == f"n{at}":
            lines.append(f"{n.target}{fx.map_arg((n.args, n.kwargs), names.__getitem__)}")
    return "\n".join(lines)


def _scale_of_example(node: Any) -> Any:
    """Return the factor of a product that is the same for several elements; None if none is."""
    if operation(node) != "mul" or node.kwargs or not all(map(varies, node.args)):
        return None
    shape = value_of(node).shape
    for x, factor in (node.args, node.args[::-1]):
        sizes = value_of(factor).shape
        sizes = (1,) * (len(shape) - len(sizes)) + tuple(sizes)
        fewer = any(n == 1 and size != 1 for n, size in zip(sizes, shape, strict=True))
        if fewer and str(value_of(x).shape) == str(shape):
            return factor
    return None


def _sources(draft: Draft, node: fx.Node, order: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """Yield each node of the same shape from which alone a value is computed, nearest first."""
    waiting = {n for n in node.all_input_nodes if varies(n)}
    for _ in range(_OPERATIONS):
        if len(waiting) == 1:
            (x,) = waiting
            if is_tensor(x) and str(value_of(x).shape) == str(value_of(node).shape):
                yield x
        last = max(waiting, key=order.__getitem__)
        if last in draft.starts or not (operation(last) in _PARTS or _is_bound(last)):
            return
        waiting |= {n for n in last.all_input_nodes if varies(n)}
        waiting.remove(last)


def _is_bound(node: Any) -> bool:
    """Return True for max(x, ε), also as relu(x − ε), with a small number ε."""
    if operation(node) == "relu" and operation(node.args[0]) == "sub":
        low = node.args[0].args[1]
        return isinstance(low, float) and 0 <= low <= BOUND**0.5
    if operation(node) not in ("clamp_min", "clamp") or argument(node, 2, "max") is not None:
        return False
    low = argument(node, 1, "min")
    return isinstance(low, (int, float)) and 0 <= low <= BOUND**0.5


def _replace(draft: Draft, node: fx.Node, x: fx.Node, norm: Norm) -> None:
    """Replace a normalisation, with γ and β where they follow.

    Args:
        draft: The draft, whose graph is changed.
        node: The node of the normalised value.
        x: The node of the value that is normalised.
        norm: The normalisation.
    """
    shape = [value_of(x).shape[dim] for dim in norm.dims]
    first, ndim = original(node), value_of(x).ndim
    last, scale, weights = _affine(draft, node, norm)
    arguments = []
    for weight in weights:
        if weight is not None:
            whole = value_of(weight).numel() == prod(shape)
            weight = insert(last, _aten.reshape.default, weight, shape if whole else [1])
            weight = weight if whole else insert(last, _aten.expand.default, weight, shape)
        arguments.append(weight)
    if abs(scale - 1) > TOLERANCE:
        like = value_of(x)
        if arguments[0] is None:
            arguments[0] = insert(last, _aten.full.default, shape, scale,
                                  dtype=like.dtype, device=like.device)  # fmt: skip
        else:
            arguments[0] = insert(last, _aten.mul.Tensor, arguments[0], scale)
    normalise: Callable[..., Any] = getattr(_aten, norm.name).default
    order = [dim for dim in range(ndim) if dim not in norm.dims] + list(norm.dims)
    if order == list(range(ndim)):
        become(last, normalise, x, shape, *arguments, norm.eps)
    else:
        moved = insert(last, _aten.permute.default, x, order)
        normed = insert(last, normalise, moved, shape, *arguments, norm.eps)
        become(last, _aten.permute.default, normed, [order.index(dim) for dim in range(ndim)])
    mark(last, original=first)


def _affine(draft: Draft, node: fx.Node, norm: Norm) -> tuple[fx.Node, float, list[Any]]:
    """Return the last operation of a norm with its weights; the number c; the nodes of the weights.

    The weights are c γ and β, or c γ for an RMS norm; None for each that there is not.

    Args:
        draft: The draft.
        node: The node of the value without what follows; it may be a norm with weights.
        norm: The normalisation.
    """
    count = 2 if norm.name == "layer_norm" else 1
    weights: list[Any] = [None] * count
    if operation(node) in NORMS:
        own = [argument(node, 2, "weight")]
        own += [argument(node, 3, "bias")] if operation(node) == "layer_norm" else []
        weights[: len(own)] = own
    last, end, scale = node, node, norm.scale
    while end not in draft.starts and len(end.users) == 1 and weights[1:] in ([], [None]):
        (user,) = end.users
        if is_copy(user):
            end = user
            continue
        if (scaled := number_of(user)) is not None:
            scale *= scaled[1]
        elif operation(user) == "mul" and weights[0] is None and _weight(user, end, norm):
            weights[0] = _weight(user, end, norm)
        elif operation(user) == "add" and count == 2 and _weight(user, end, norm):
            weights[1] = _weight(user, end, norm)
        else:
            break
        last = end = user
    return last, scale, weights


def _weight(user: Any, node: fx.Node, norm: Norm) -> fx.Node | None:
    """Return the constant that is multiplied by, or added to, a norm; None for other values.

    Args:
        user: The product or sum.
        node: The norm.
        norm: The normalisation, along whose dimensions the constant may vary.
    """
    others = [n for n in user.args if n is not node]
    if user.kwargs or len(others) != 1:
        return None
    weight: Any = others[0]
    if not isinstance(weight, fx.Node) or varies(weight) or batched(value_of(weight)):
        return None
    sizes, shape = tuple(value_of(weight).shape), value_of(node).shape
    behind = (1,) * (len(shape) - len(sizes)) + sizes
    expected = [size if dim in norm.dims else 1 for dim, size in enumerate(shape)]
    fits = len(behind) == len(expected) and behind in (tuple(expected), (1,) * len(behind))
    return weight if fits else None
