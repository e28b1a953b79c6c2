"""Pooling: switches for the maximum (equation 8), recorded shares for averages and sums."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from captum_mipin.graph.nodes import argument
from captum_mipin.rules.base import Back, Options, Recorded, Recording, adjoint, value_and_adjoint
from captum_mipin.rules.geometry import pool_geometry


def max_pool(
    options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> Recording:
    """Send back S ⊙ switch (equation 8): the signal goes to where the maximum was.

    Where windows overlap, one element may be the maximum of several. Each of their signals is an
    estimate of it, so it receives their mean: adding them up would count it twice, overwriting
    would keep an arbitrary one. Without switches, all elements of a window get its signal.
    """
    windows = pool_geometry(*arguments, **named)
    dims = windows.dims
    pool: Any = getattr(F, f"max_pool{dims}d")
    value, switches = pool(x, *arguments, **named, return_indices=True)
    # eq. 8: g(S, switch) = S ⊙ switch
    if options.local:
        overlap = any(s <= r for s, r in zip(windows.stride, windows.reach, strict=True))
        return value, _to_switches(switches, x.shape, dims, overlap)
    size = x.shape  # not x itself, which would be kept in memory
    transposed = replace(windows, padding=(0,) * dims, transposed=True)

    def cover(s: Tensor) -> Tensor:
        """Return the sum over the windows that cover each element: a transposed convolution."""
        one = s.reshape(-1, 1, *s.shape[-dims:])
        field = transposed.forward(one, one.new_ones(windows.weight_shape))
        sizes = zip(field.shape[2:], windows.padding, size[-dims:], strict=True)
        ends = [(-p, z + p - n) for n, p, z in sizes]  # a negative number cuts, a positive one pads
        return F.pad(field, [n for pair in reversed(ends) for n in pair]).reshape(size)

    # without switches: the mean of S over the windows that cover an element
    return value, lambda s: _ratio(cover(s), cover(torch.ones_like(s)))


def adaptive_max_pool(
    options: Options, operation: Any, x: Tensor, size: Sequence[int]
) -> Recording:
    """Send back S ⊙ switch (equation 8), as :func:`max_pool`, for pooling to a given size."""
    value, switches = operation(x, size)
    dims = len(size)
    sizes = list(enumerate(zip(x.shape[-dims:], size, strict=True), -dims))
    if options.local:
        return value, _to_switches(switches, x.shape, dims, any(z % n for _, (z, n) in sizes))
    count = torch.ones_like(value)  # elements of each window
    for dim, (z, n) in sizes:
        # Window i reaches from ⌊i z / n⌋ to ⌈(i + 1) z / n⌉.
        width = [-(-(i + 1) * z // n) - i * z // n for i in range(n)]
        count = count * count.new_tensor(width).view(-1, *(1,) * (-dim - 1))
    even: Any = getattr(F, f"adaptive_avg_pool{dims}d")
    cover = adjoint(lambda t: even(t, size) * count, x)
    return value, lambda s: _ratio(cover(s), cover(torch.ones_like(s)))


def _to_switches(switches: Tensor, size: torch.Size, dims: int, overlap: bool) -> Back:
    flat = switches.flatten(-dims)

    def place(s: Tensor) -> Tensor:
        field = s.new_zeros(*size[:-dims], prod(size[-dims:]))
        return field.scatter_add_(-1, flat, s)

    def back(s: Tensor) -> Tensor:
        s = s.flatten(-dims)
        if overlap:  # divided by the number of windows with the same maximum
            s = s / place(torch.ones_like(s)).gather(-1, flat)
        return place(s).view(size)

    return back


def average(
    dims: int, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> Recording:
    """Send back S to where the average, or sum, came from: see :func:`shared_out`.

    Args:
        dims: How many dimensions at the end are averaged over; 0 where the arguments say which.
        options: How the pass reads the rules. Without ``local`` or ``shares``, S goes everywhere
            evenly.
        operation: The average.
        x: What is averaged.
        arguments: Further arguments of the operation.
        named: Further arguments of the operation by name.
    """

    def run(t: Tensor) -> Tensor:
        result: Tensor = operation(t, *arguments, **named)
        return result

    recorded, leading = options.local and options.shares, x.ndim - dims if dims else 0
    return shared_out(run, x, recorded, options.evidence, leading)


def is_average(rule: Any) -> bool:
    """Return True for the rule of an average or a sum."""
    return getattr(getattr(rule, "run", None), "func", None) is average


def shared_out(
    operator: Callable[[Tensor], Tensor],
    x: Tensor,
    recorded: bool,
    evidence: bool = False,
    leading: int = 0,
) -> Recording:
    """Return averages P x, and how their signal goes to the elements that they came from.

    This is the soft form of a switch. An average came from the elements that agree with it in sign:
    with weights P ≥ 0, window w gives each of them S_w |x_i| / Σ_j P_wj |x_j|, the sum being over
    them alone, and the others nothing. Where windows overlap, an element gets the mean with weights
    P_wi. For x ≥ 0 the signal S = y returns x itself.

    Args:
        operator: x → P x.
        x: The elements, of any shape.
        recorded: Whether x decides. If not, |x| is replaced by 1 throughout.
        evidence: Whether to send the elements themselves instead: |S_w| x_i where x_i agrees in
            sign with S_w. For S_w = 1, Σ_i P_wi x_i⁺ is what speaks for the average, which may be
            negative.
        leading: Number of dimensions at the front that P treats one by one, all alike.

    Returns:
        P x, and signals shaped like it → signals shaped like x.
    """
    value, back_through = value_and_adjoint(operator, x)
    one = (slice(1),) * leading  # P is the same for all of them
    weight = adjoint(operator, x[one])(torch.ones_like(value[one]))  # Σ_w P_wi

    def share(origin: Tensor | float, total: Tensor) -> Back:
        return lambda s: origin * _ratio(back_through(_ratio(s, total)), weight)

    def speaking(s: Tensor) -> Tensor:
        mean = _ratio(back_through(s), weight)
        return x * mean.abs() * (x * mean > 0)

    if evidence:
        return value, speaking
    # window w sends x_i the part S_w x_i / Σ_j P_wj x_j; of several, the mean by P_wi counts
    if not recorded:
        return value, share(1.0, operator(torch.ones_like(x[one])))
    if bool((x >= 0).all()):
        return value, share(x, value)
    # Averages above 0 came from the positive elements, those below 0 from the negative ones.
    positive = x.clamp(min=0)
    total = operator(positive)
    above, below = share(positive, total), share(positive - x, total - value)
    return value, lambda s: above(s * (value > 0)) + below(s * (value < 0))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, and 0 where below is 0."""
    return above / below.masked_fill(below == 0, torch.inf)


def _negative(node: fx.Node) -> str | None:
    divisor = argument(node, 6, "divisor_override")
    if (divisor or 1) > 0:
        return None
    return f"it divides by {divisor}, a negative number: no share in an average can be negative"


_SIZES = (1, 2, 3)
_SWITCHES, _SHARES = "switches; mean where windows overlap", "recorded shares"
_MAX, _ADAPTIVE_MAX = (Recorded(run=run, note=_SWITCHES) for run in (max_pool, adaptive_max_pool))
POOLING = {
    **{f"aten.max_pool{n}d{form}.default": _MAX for n in _SIZES for form in ("", "_with_indices")},
    **{f"aten.adaptive_max_pool{n}d.default": _ADAPTIVE_MAX for n in _SIZES},
    **{
        f"aten.{form}avg_pool{n}d.default": Recorded(
            run=partial(average, n), note=_SHARES, refuse=_negative
        )
        for n in _SIZES
        for form in ("", "adaptive_", "_adaptive_")
        if (form, n) != ("_adaptive_", 1)
    },
    **{
        name: Recorded(run=partial(average, 0), note=_SHARES)
        for name in ("aten.mean.dim", "aten.sum.dim_IntList")
    },
}
