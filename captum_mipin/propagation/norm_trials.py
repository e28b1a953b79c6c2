"""Which normalisation of a tensor x a part of a graph computes, found by running it on numbers."""

from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import argument, is_size, operation
from captum_mipin.propagation.draft import as_number
from captum_mipin.rules.base import along

NORMS = ("layer_norm", "rms_norm")

#: Scales of the random numbers: ε counts for some of them, and for others it does not.
_SCALES = [*(10 ** (-k / 2) for k in range(25)), 1e-30]
#: Number of random places at which a value is compared with a norm.
_PLACES = 4096
#: Largest relative difference from a norm, and the largest ε that may be a rounding error.
TOLERANCE, _ROUNDING = 1e-7, 1e-50
#: Largest ε that may come from a bound, of which it makes no difference to values above 1e-8.
BOUND = 1e-20


@dataclass(frozen=True)
class Norm:
    """A normalisation without β, whose γ is a number.

    Attributes:
        name: "layer_norm" or "rms_norm".
        dims: The dimensions that are normalised.
        eps: ε.
        scale: The number γ.
    """

    name: str
    dims: tuple[int, ...]
    eps: float
    scale: float


def norm_of(node: fx.Node, x: fx.Node) -> Norm | None:
    """Return the normalisation of x that a node computes; None if the node computes none.

    A large and a small example show which one it may be. Elements that are not normalised together
    then take all scales, so that few examples are needed.
    """
    batch = _batch(x)
    if batch is None:
        return None
    value = 1 + 3 * _random(x, 2)
    ends = value.new_tensor([_SCALES[0], _SCALES[-1]])
    value = value * along(ends.repeat(value.shape[batch] // 2), value, batch)
    result = _run(node, x, value, 2)
    norm = None if result is None else _norm(value, result, batch)
    if norm is None:
        return None
    sizes = [1 if dim in norm.dims else size for dim, size in enumerate(value.shape)]
    count = -(-2 * len(_SCALES) // prod(sizes))
    value = 1 + 3 * _random(x, count)
    sizes[batch] = value.shape[batch]
    scales = value.new_tensor(_SCALES).repeat(-(-prod(sizes) // len(_SCALES)))
    value = value * scales[: prod(sizes)].view(sizes)
    result = _run(node, x, value, count)
    parts = _above(norm.name, norm.dims, value)
    if result is None or not _agree(norm.eps, norm.scale, *parts, result):
        return None
    scale = 1.0 if abs(norm.scale - 1) < TOLERANCE else float(f"{norm.scale:.15g}")
    eps = float(f"{norm.eps:.6g}") if norm.eps > _ROUNDING else 0.0
    return Norm(norm.name, norm.dims, eps, scale)


def _above(name: str, dims: tuple[int, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a norm divides, x or x − μ, and the mean of its squares."""
    above = x - x.mean(dims, keepdim=True) if name == "layer_norm" else x
    return above, above.square().mean(dims, keepdim=True)


def falls(node: fx.Node, x: fx.Node) -> bool:
    """Return True if a value falls like 1 / |x| for large x."""
    if _batch(x) is None:
        return False
    value = _random(x, 2)
    small, large = (_run(node, x, value * scale, 2) for scale in (1e6, 1e9))
    if small is None or large is None:
        return False
    return bool((small != 0).all()) and torch.allclose(large * 1e3, small, 1e-5, 0)


def _random(x: fx.Node, count: int) -> Tensor:
    """Return random numbers in the shape of a node's value for ``count`` examples, in float64."""
    sizes = [as_number(size, count) for size in value_of(x).shape]
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _batch(x: fx.Node) -> int | None:
    """Return the dimension of a tensor that has the examples; None if there is not one."""
    dims = [dim for dim, size in enumerate(value_of(x).shape) if not isinstance(size, int)]
    return dims[0] if len(dims) == 1 else None


def _run(node: fx.Node, x: fx.Node, value: Tensor, count: int) -> Tensor | None:
    """Return the value of a node for a value of x; None if the operations take no such numbers.

    Args:
        node: The node; if it is a norm, it is computed without γ and β.
        x: The node of a tensor from which it is computed.
        value: The value of x, in float64.
        count: The number of examples.
    """
    known: dict[fx.Node, Any] = {x: value}

    def compute(n: fx.Node) -> Any:
        if n not in known and is_size(n):
            known[n] = as_number(value_of(n), count)
        elif n not in known:
            run: Any = n.target  # of a weight, whose value is not known here, it is a name
            named = {name: n.kwargs[name] for name in n.kwargs if name != "dtype"}
            known[n] = run(*fx.map_arg(n.args, compute), **fx.map_arg(named, compute))
        return known[n]

    try:
        with torch.no_grad():
            if operation(node) not in NORMS:
                result = compute(node)
            else:
                run: Any = node.target
                result = run(compute(node.all_input_nodes[0]), node.args[1], eps=eps_of(node))
    except Exception:  # of any type: the operations take no such numbers
        return None
    return result if isinstance(result, Tensor) and result.dtype == value.dtype else None


def eps_of(node: Any) -> float | None:
    """Return ε of a norm."""
    at, default = (4, 1e-5) if operation(node) == "layer_norm" else (3, None)
    eps: float | None = argument(node, at, "eps", default)
    return torch.finfo(value_of(node).dtype).eps if eps is None else eps


def _norm(x: Tensor, y: Tensor, batch: int) -> Norm | None:
    """Return the normalisation with which y is computed from x; None if there is none.

    Args:
        x: Tensor of random numbers.
        y: Tensor of the same shape.
        batch: The dimension of the examples, which is not normalised.
    """
    others = [dim for dim in range(x.ndim) if dim != batch]
    generator = torch.Generator().manual_seed(0)
    places = [torch.randint(x.shape[dim], (_PLACES,), generator=generator) for dim in others]

    def some(values: Tensor) -> Tensor:
        """Return the values (examples, places) of all examples at the random places."""
        index: Any = (slice(None), *places)
        return values.expand_as(x).movedim(batch, 0)[index]

    for count in range(1, len(others) + 1):
        for dims in combinations(others, count):
            for name in NORMS:
                above, square = _above(name, dims, x)
                found = _fit(some(above), some(square), some(y))
                if found is not None:
                    return Norm(name, dims, *found)
    return None


def _fit(above: Tensor, square: Tensor, y: Tensor) -> tuple[float, float] | None:
    """Return ε and c for which y = c · above / √(square + ε); None if there are none.

    Args:
        above: Tensor (examples, places), x or x − μ; example 0 is large, and the last one small.
        square: The mean of its squares.
        y: Tensor of the shape of ``above``.
    """
    # (above / y)² = (square + ε) / c²: ε / c² is best seen at small x, and then c at large x
    ratio = (above / y).square()
    small = max(0.0, float(ratio[-1].median()))
    size = float((square / (ratio - small))[0].median())
    if not 0 < size < torch.inf:
        return None
    size **= 0.5
    scale = size if float((above * y)[0].median()) > 0 else -size
    eps = small * scale**2
    return (eps, scale) if _agree(eps, scale, above, square, y) else None


def _agree(eps: float, scale: float, above: Tensor, square: Tensor, y: Tensor) -> bool:
    """Return True if y = c · above / √(square + ε); of a bound, ε counts only far from it."""
    near = (square < eps / TOLERANCE) & (square > eps * TOLERANCE) & (eps < BOUND)
    expected = scale * above * (square + eps).rsqrt()
    return torch.allclose(torch.where(near, expected, y), expected, TOLERANCE, 0)
