"""The pass that recognises normalisations that a model writes by hand.

(x − μ) / √(σ² + ε) γ + β becomes ``layer_norm``, and x / √(mean(x²) + ε) γ becomes ``rms_norm``,
so that such a network is explained like one with the module. The parts are not compared with known
spellings: they are run on random numbers, which show whether their value is such a normalisation.
Bounds, such as ``clamp``, are no part of one.
Other ratios keep the rule of ``divided``.
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.layout import batched
from captum_mipin.graph.marks import mark, original, value_of
from captum_mipin.graph.nodes import is_size, operation
from captum_mipin.propagation.canonical import is_copy
from captum_mipin.propagation.draft import Draft, is_tensor
from captum_mipin.propagation.forms import become, insert
from captum_mipin.propagation.marking import mark_varying
from captum_mipin.rules import DIVIDED
from captum_mipin.rules.base import along, varies

_aten = torch.ops.aten

#: Scales of the random examples: ε counts for some of them, and for others it does not.
_SCALES = [*(10 ** (-k / 2) for k in range(25)), 1e-30]
#: Largest relative difference from a norm, and the largest ε that may be a rounding error.
_TOLERANCE, _ROUNDING = 1e-7, 1e-50
#: Largest number of operations that a norm is made of, without γ and β; and their names. All of
#: them are smooth, so that the random examples decide.
_OPERATIONS = 24
_PARTS = frozenset(
    {"add", "sub", "mul", "div", "divided", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal",
     "mean", "sum", "weighted_sum", "var", "std", "linalg_vector_norm", "expand", "expand_as",
     "view", "reshape", "unsqueeze", "squeeze", "alias", "clone", "contiguous", "_to_copy"}
)  # fmt: skip

#: Name of the operation, the dimensions that it normalises, and ε.
Norm = tuple[str, tuple[int, ...], float]


def recognise_norms(draft: Draft) -> None:
    """Replace each normalisation that is written by hand by ``layer_norm`` or ``rms_norm``."""
    for node in list(draft.graph.nodes):
        if node.target is DIVIDED and node not in draft.starts:
            tried = [(x, _norm_of(node, x)) for x in _sources(draft, node)]
            names = [(x, norm) for x, norm in tried if norm is not None]
            if names:
                _replace(draft, node, *names[-1])  # the longest one, from x and not from x − μ
    draft.graph.eliminate_dead_code(lambda node: node in draft.starts or node.is_impure())
    mark_varying(draft)


def _sources(draft: Draft, node: fx.Node) -> Iterator[fx.Node]:
    """Yield each node of the same shape from which alone a value is computed, nearest first."""
    order = {n: at for at, n in enumerate(draft.graph.nodes)}
    waiting = {n for n in node.all_input_nodes if varies(n)}
    for _ in range(_OPERATIONS):
        if len(waiting) == 1:
            (x,) = waiting
            if is_tensor(x) and str(value_of(x).shape) == str(value_of(node).shape):
                yield x
        last = max(waiting, key=order.__getitem__)
        if last in draft.starts or operation(last) not in _PARTS:
            return
        waiting |= {n for n in last.all_input_nodes if varies(n)}
        waiting.remove(last)


def _norm_of(node: fx.Node, x: fx.Node) -> Norm | None:
    """Return the normalisation of x that a node computes; None if the node computes none."""
    generator = torch.Generator().manual_seed(0)
    sizes = [_number(size) for size in value_of(x).shape]
    batch = [dim for dim, size in enumerate(value_of(x).shape) if not isinstance(size, int)]
    if len(batch) != 1:
        return None
    value = 1 + 3 * torch.randn(sizes, generator=generator, dtype=torch.float64)
    scales = value.new_tensor(_SCALES).repeat(sizes[batch[0]] // len(_SCALES))
    value = value * along(scales, value, batch[0])
    known: dict[fx.Node, Any] = {x: value}

    def compute(n: fx.Node) -> Any:
        if n not in known and is_size(n):
            known[n] = _number(value_of(n))
        elif n not in known:
            run: Any = n.target  # of a weight, whose value is not known here, it is a name
            named = {name: n.kwargs[name] for name in n.kwargs if name != "dtype"}
            known[n] = run(*fx.map_arg(n.args, compute), **fx.map_arg(named, compute))
        return known[n]

    try:
        with torch.no_grad():
            result = compute(node)
    except Exception:  # of any type: the operations take no such numbers
        return None
    return _norm(value, result, batch[0])


def _number(size: Any) -> int:
    """Return a size for a batch of the random examples."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, len(_SCALES))))


def _norm(x: Tensor, y: Tensor, batch: int) -> Norm | None:
    """Return the normalisation with which y is computed from x; None if there is none.

    Args:
        x: Tensor of random numbers.
        y: Tensor of the same shape.
        batch: The dimension of the examples, which is not normalised.
    """
    others = [dim for dim in range(x.ndim) if dim != batch]
    for count in range(1, len(others) + 1):
        for dims in combinations(others, count):
            centred = x - x.mean(dims, keepdim=True)
            for name, above in (("layer_norm", centred), ("rms_norm", x)):
                square = above.square().mean(dims, keepdim=True)
                # y = above / √(square + ε), so ε = (above / y)² − square, best seen at small x
                small = ((above / y).square() - square).select(batch, -1)
                eps = max(0.0, float(small.median()))
                if torch.allclose(y, above * (square + eps).rsqrt(), _TOLERANCE, 0):
                    return name, dims, float(f"{eps:.6g}") if eps > _ROUNDING else 0.0
    return None


def _replace(draft: Draft, node: fx.Node, x: fx.Node, norm: Norm) -> None:
    """Replace a normalisation, with γ and β where they follow.

    Args:
        draft: The draft, whose graph is changed.
        node: The node of the normalised value.
        x: The node of the value that is normalised.
        norm: The normalisation.
    """
    name, dims, eps = norm
    shape = [value_of(x).shape[dim] for dim in dims]
    ndim, first = value_of(x).ndim, original(node)
    last, gamma = _affine(node, "mul", dims, draft)
    last, beta = _affine(last, "add", dims, draft) if name == "layer_norm" else (last, None)
    weights = []
    for weight in (gamma, beta) if name == "layer_norm" else (gamma,):
        if weight is not None:
            whole = value_of(weight).numel() == prod(shape)
            weight = insert(last, _aten.reshape.default, weight, shape if whole else [1])
            weight = weight if whole else insert(last, _aten.expand.default, weight, shape)
        weights.append(weight)
    normalise: Callable[..., Any] = getattr(_aten, name).default
    order = [dim for dim in range(ndim) if dim not in dims] + list(dims)
    if order == list(range(ndim)):
        become(last, normalise, x, shape, *weights, eps)
    else:
        moved = insert(last, _aten.permute.default, x, order)
        normed = insert(last, normalise, moved, shape, *weights, eps)
        become(last, _aten.permute.default, normed, [order.index(dim) for dim in range(ndim)])
    mark(last, original=first)


def _affine(
    node: fx.Node, name: str, dims: tuple[int, ...], draft: Draft
) -> tuple[fx.Node, fx.Node | None]:
    """Return the node of a value times γ or plus β, and the node of that weight, if there is one.

    Args:
        node: The node of the value.
        name: "mul" or "add".
        dims: The dimensions along which the weight may vary.
        draft: The draft.
    """
    last = node
    while last not in draft.starts and len(last.users) == 1:
        (user,) = last.users
        if is_copy(user):
            last = user
            continue
        others = [n for n in user.args if n is not last]
        if operation(user) != name or user.kwargs or len(others) != 1:
            break
        weight: Any = others[0]
        if not isinstance(weight, fx.Node) or varies(weight) or batched(value_of(weight)):
            break
        sizes = tuple(value_of(weight).shape)
        behind = (1,) * (value_of(last).ndim - len(sizes)) + sizes
        expected = [size if dim in dims else 1 for dim, size in enumerate(value_of(last).shape)]
        if len(behind) != len(expected) or behind not in (tuple(expected), (1,) * len(behind)):
            break
        return user, weight
    return node, None
