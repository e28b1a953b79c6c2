"""Pooling: switches for maximum pooling (equation 8), recorded shares for averages and sums."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from captum_mipin.graph.nodes import argument
from captum_mipin.rules.base import (
    Back,
    Options,
    Recorded,
    Recording,
    adjoint,
    ratio,
    value_and_adjoint,
)
from captum_mipin.rules.geometry import pool_geometry


def max_pool(
    options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> Recording:
    """Send back S ⊙ switch (equation 8): the signal of a window goes to its maximum.

    If windows overlap, an element may be the maximum of several windows. It gets the mean of their
    signals, because each of them is an estimate of this element: their sum would be too large.
    Without ``options.local``, all elements of a window get its signal.
    """
    windows = pool_geometry(*arguments, **named)
    dims = windows.dims
    pool: Any = getattr(F, f"max_pool{dims}d")
    value, switches = pool(x, *arguments, **named, return_indices=True)
    # eq. 8: g(S, switch) = S ⊙ switch
    if options.local:
        overlap = any(s <= r for s, r in zip(windows.stride, windows.reach, strict=True))
        return value, _to_switches(switches, x.shape, dims, overlap)
    size = x.shape  # cover must not refer to x, for then x would stay in memory
    transposed = replace(windows, padding=(0,) * dims, transposed=True)

    def cover(s: Tensor) -> Tensor:
        """Return for each element the sum of s over all windows that contain the element.

        This is a transposed convolution with a kernel of ones.
        """
        one = s.reshape(-1, 1, *s.shape[-dims:])
        field = transposed.forward(one, one.new_ones(windows.weight_shape))
        sizes = zip(field.shape[2:], windows.padding, size[-dims:], strict=True)
        ends = [(-p, z + p - n) for n, p, z in sizes]  # a negative number cuts, a positive one pads
        return F.pad(field, [n for pair in reversed(ends) for n in pair]).reshape(size)

    # without switches: the mean of S over all windows that contain the element
    return value, lambda s: ratio(cover(s), cover(torch.ones_like(s)))


def adaptive_max_pool(
    options: Options, operation: Any, x: Tensor, size: Sequence[int]
) -> Recording:
    """Send back S ⊙ switch (equation 8) for pooling to the size ``size``; see :func:`max_pool`."""
    value, switches = operation(x, size)
    dims = len(size)
    sizes = list(enumerate(zip(x.shape[-dims:], size, strict=True), -dims))
    if options.local:
        return value, _to_switches(switches, x.shape, dims, any(z % n for _, (z, n) in sizes))
    count = torch.ones_like(value)  # number of elements of each window
    for dim, (z, n) in sizes:
        # Window i reaches from ⌊i z / n⌋ to ⌈(i + 1) z / n⌉.
        width = [-(-(i + 1) * z // n) - i * z // n for i in range(n)]
        count = count * count.new_tensor(width).view(-1, *(1,) * (-dim - 1))
    even: Any = getattr(F, f"adaptive_avg_pool{dims}d")
    cover = adjoint(lambda t: even(t, size) * count, x)
    return value, lambda s: ratio(cover(s), cover(torch.ones_like(s)))


def _to_switches(switches: Tensor, size: torch.Size, dims: int, overlap: bool) -> Back:
    """Return the function that sends the signal of each window to the window's maximum.

    Args:
        switches: Integer tensor of the shape of the result: index of the maximum of each window.
        size: The size of x.
        dims: Number of pooled dimensions.
        overlap: Whether windows may overlap.
    """
    flat = switches.flatten(-dims)

    def place(s: Tensor) -> Tensor:
        field = s.new_zeros(*size[:-dims], prod(size[-dims:]))
        return field.scatter_add_(-1, flat, s)

    def back(s: Tensor) -> Tensor:
        s = s.flatten(-dims)
        if overlap:  # divide by the number of windows that have the same maximum
            s = s / place(torch.ones_like(s)).gather(-1, flat)
        return place(s).view(size)

    return back


def average(
    dims: int, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> Recording:
    """Send the signal of an average or a sum to the averaged elements: see :func:`shared_out`.

    Args:
        dims: Number of last dimensions that are averaged over; 0 if the dimensions are among the
            arguments.
        options: The options of the pass. Without ``local`` or without ``shares``, the signal is
            distributed evenly.
        operation: The average or sum.
        x: Tensor that is averaged.
        arguments: Further positional arguments of the operation.
        named: Further arguments of the operation by name.
    """

    def run(t: Tensor) -> Tensor:
        result: Tensor = operation(t, *arguments, **named)
        return result

    recorded, leading = options.local and options.shares, x.ndim - dims if dims else 0
    if options.evidence:
        speaking = x if options.contrast is None else margins(x, options.contrast)
        return run(x), evidence(run, x, speaking)
    return shared_out(run, x, recorded, leading)


def is_average(rule: Any) -> bool:
    """Return True for the rule of an average or a sum."""
    return getattr(getattr(rule, "run", None), "func", None) is average


def shared_out(
    operator: Callable[[Tensor], Tensor], x: Tensor, recorded: bool, leading: int = 0
) -> Recording:
    """Return averages y = P x, and the function that sends their signal S to the elements x.

    P_wi ≥ 0 is the weight of element x_i in window w, whose average is y_w = Σ_i P_wi x_i. The rule
    is the soft form of a switch: only the elements with the same sign as y_w get a signal from
    window w. Element x_i gets S_w |x_i| / Σ_j P_wj |x_j|, with the sum over the elements of this
    sign. If windows overlap, an element gets the mean over its windows, weighted by P_wi. For
    x ≥ 0, the signal S = y sends back x itself.

    Args:
        operator: The function x → P x.
        x: Tensor of the elements, of any shape.
        recorded: Whether the shares depend on x. If False, all |x_i| are replaced by 1.
        leading: Number of first dimensions over which P does not average, such as the batch.

    Returns:
        P x, and the function: signal of the shape of P x → signal of the shape of x.
    """
    value, back_through = value_and_adjoint(operator, x)
    one = (slice(1),) * leading  # P is the same for all entries of the leading dimensions
    weight = adjoint(operator, x[one])(torch.ones_like(value[one]))  # Σ_w P_wi

    def share(origin: Tensor | float, total: Tensor) -> Back:
        return lambda s: origin * ratio(back_through(ratio(s, total)), weight)

    # window w sends S_w x_i / Σ_j P_wj x_j to x_i; several windows: the mean weighted by P_wi
    if not recorded:
        return value, share(1.0, operator(torch.ones_like(x[one])))
    if bool((x >= 0).all()):
        return value, share(x, value)
    # Positive averages send their signal to positive elements, negative averages to negative ones.
    positive = x.clamp(min=0)
    total = operator(positive)
    above, below = share(positive, total), share(positive - x, total - value)
    return value, lambda s: above(s * (value > 0)) + below(s * (value < 0))


def evidence(operator: Callable[[Tensor], Tensor], x: Tensor, speaking: Tensor) -> Back:
    """Return the function that sends back the evidence at each element of averages y = P x.

    Args:
        operator: The function x → P x, as for :func:`shared_out`.
        x: Tensor of the elements.
        speaking: Tensor shaped like x, what each element says: x itself, or its :func:`margins`.

    Returns:
        The function: signal S of the shape of P x → |S_w| e_i if e_i has the sign of S_w, else 0,
        for e = ``speaking``. For e = x and S_w = 1 its average is the positive part of y_w, also if
        y_w is negative.
    """
    _, back_through = value_and_adjoint(operator, x)
    weight = adjoint(operator, x)(torch.ones_like(operator(x)))  # Σ_w P_wi

    def back(s: Tensor) -> Tensor:
        mean = ratio(back_through(s), weight)
        return speaking * mean.abs() * (speaking * mean > 0)

    return back


def averaged(y: Tensor, shares: Tensor | None) -> Tensor:
    """Return the average of a tensor over its positions.

    Args:
        y: Tensor (batch, ..., channels).
        shares: Tensor (batch, ..., 1), the share a_p of each position for Σ a_p y_p; None for the
            mean.

    Returns:
        Tensor (batch, channels).
    """
    over = tuple(range(1, y.ndim - 1))
    return y.mean(over) if shares is None else (shares * y).sum(over)


def margins(y: Tensor, dim: int) -> Tensor:
    """Return how far each class is above the largest of all others, y_c − max_{k ≠ c} y_k.

    Args:
        y: Tensor with the outputs of two or more classes along a dimension.
        dim: That dimension.

    Returns:
        Tensor shaped like y. It is positive for at most one class.

    Examples:
        >>> margins(torch.tensor([[3.0, 1.0, 2.0]]), 1)
        tensor([[ 1., -2., -1.]])
    """
    first, second = y.topk(2, dim).values.split(1, dim)
    return y - torch.where(y == first, second, first)


def _negative(node: fx.Node) -> str | None:
    divisor = argument(node, 6, "divisor_override")
    if (divisor or 1) > 0:
        return None
    return f"it divides by {divisor}, expected a positive divisor_override: shares are not negative"


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
