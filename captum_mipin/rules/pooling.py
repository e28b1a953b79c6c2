"""Pooling: switches for the maximum (equation 8), recorded shares for averages and sums."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from captum_mipin.graph.nodes import argument
from captum_mipin.regression.geometry import Geometry
from captum_mipin.rules.base import Back, Options, Recorded, adjoint, each, value_and_adjoint


def max_pool(
    options: Options,
    operation: Any,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Back]:
    """Put the signal where the maximum was (equation 8).

    Where windows overlap, one element may be the maximum of several. Each of their signals is an estimate of it, so
    it receives their mean: adding them up would count it twice, overwriting would keep an arbitrary one.
    """
    dims = len(kernel)
    stride, padding, dilation = stride or kernel, each(padding, dims), each(dilation, dims)
    pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]
    value, switches = pool(x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if options.local:
        overlap = any(s < r for s, r in zip(stride, reach, strict=True))
        return value, _to_switches(switches, x.shape, dims, overlap)
    needed = [(n - 1) * s + r for n, s, r in zip(value.shape[-dims:], stride, reach, strict=True)]
    windows = Geometry((1, 1, *kernel), tuple(stride), (0,) * dims, tuple(dilation), 1)

    def cover(s: Tensor) -> Tensor:
        """Sum over the windows that cover each element."""
        s = s.reshape(-1, 1, *s.shape[-dims:])
        field = windows.apply(s, s.new_ones(1, 1, *kernel), None, torch.Size([len(s), 1, *needed]))
        ends = [(p, n - p - z) for n, p, z in zip(needed, padding, x.shape[-dims:], strict=True)]
        return F.pad(field, [-n for pair in reversed(ends) for n in pair]).reshape(x.shape)

    return value, lambda s: _ratio(cover(s), cover(torch.ones_like(s)))


def adaptive_max_pool(
    options: Options, operation: Any, x: Tensor, size: Sequence[int]
) -> tuple[Tensor, Back]:
    """Max pooling to a given size: as :func:`max_pool`."""
    value, switches = operation(x, size)
    dims = len(size)
    if options.local:
        overlap = any(z % n for z, n in zip(x.shape[-dims:], size, strict=True))
        return value, _to_switches(switches, x.shape, dims, overlap)
    even: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dims - 1]
    back_through = adjoint(lambda t: even(t, size), x)
    window = torch.ones_like(value)  # elements in each
    for dim, (z, n) in enumerate(zip(x.shape[-dims:], size, strict=True), -dims):
        width = [-(-(i + 1) * z // n) - i * z // n for i in range(n)]
        window = window * window.new_tensor(width).view(-1, *(1,) * (-dim - 1))
    return value, lambda s: _ratio(back_through(s * window), back_through(window))


def average(
    options: Options, operation: Any, x: Tensor, *arguments: Any, leading: int = 0, **named: Any
) -> tuple[Tensor, Back]:
    """Send the signal to where the average, or sum, came from (:func:`shared_out`), or evenly if so wished or without masks."""
    recorded = options.local and options.shares
    return shared_out(
        lambda t: operation(t, *arguments, **named), x, recorded, options.evidence, leading
    )


def is_average(rule: Any) -> bool:
    """Whether a rule is that of averages or sums."""
    run = getattr(rule, "run", None)
    return getattr(run, "func", run) in (average, _average_pool)


def _average_pool(
    dims: int, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    return average(options, operation, x, *arguments, leading=x.ndim - dims, **named)


def shared_out(
    operator: Callable[[Tensor], Tensor],
    x: Tensor,
    recorded: bool,
    evidence: bool = False,
    leading: int = 0,
) -> tuple[Tensor, Back]:
    """Averages P x, and how the signal at them goes to the elements that they came from, the soft form of a switch.

    An average came from the elements that agree with it in sign. With weights P ≥ 0, window w gives each of these the
    signal S_w |x_i| / Σ_j P_wj |x_j|, over those alone, and the others nothing; where windows overlap, an element gets the
    mean with weights P_wi. For x ≥ 0 the signal S = y returns x itself. Not ``recorded``, |x| is replaced by 1 throughout.

    With ``evidence`` it is the elements themselves that are sent, |S_w| x_i where x_i agrees in sign with S_w: for S_w = 1,
    Σ_i P_wi x_i⁺ is what speaks for the average, which may be negative.

    Args:
        operator: x → P x.
        x: The elements, of any shape.
        recorded, evidence: As above.
        leading: Number of dimensions at the front that P leaves alone.

    Returns:
        P x, and signals shaped like it → signals shaped like x.
    """
    value, back_through = value_and_adjoint(operator, x)
    one = (slice(1),) * leading  # P is the same for all of them
    weight = adjoint(operator, x[one])(torch.ones_like(value[one]))  # Σ_w P_wi

    def share(origin: Tensor | float, total: Tensor) -> Back:
        return lambda s: origin * _ratio(back_through(_ratio(s, total)), weight)

    if evidence:

        def speaking(s: Tensor) -> Tensor:
            wanted = _ratio(back_through(s), weight)
            return x * wanted.abs() * (x * wanted > 0)

        return value, speaking
    if not recorded:
        return value, share(1.0, operator(torch.ones_like(x[one])))
    if bool((x >= 0).all()):
        return value, share(x, value)
    positive = x.clamp(min=0)
    total = operator(positive)
    above, below = share(positive, total), share(positive - x, total - value)
    return value, lambda s: above(s * (value > 0)) + below(s * (value < 0))


def _to_switches(switches: Tensor, size: torch.Size, dims: int, overlap: bool) -> Back:
    flat = switches.flatten(-dims)

    def place(s: Tensor) -> Tensor:
        field = s.new_zeros(*size[:-dims], prod(size[-dims:]))
        return field.scatter_add_(-1, flat, s)

    def back(s: Tensor) -> Tensor:
        s = s.flatten(-dims)
        if overlap:
            s = s / place(torch.ones_like(s)).gather(
                -1, flat
            )  # by the number of windows with the same maximum
        return place(s).view(size)

    return back


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Above / below, and 0 where nothing is below."""
    return above / below.masked_fill(below == 0, torch.inf)


def _negative(node: fx.Node) -> str | None:
    divisor = argument(node, 6, "divisor_override")
    return (
        f"it divides by {divisor}, a negative number: no share in an average can be negative"
        if (divisor or 1) < 0
        else None
    )


_MAX = {
    f"aten.max_pool{dims}d{form}.default": Recorded(
        run=max_pool, note="switches; mean where windows overlap"
    )
    for dims in (1, 2, 3)
    for form in ("", "_with_indices")
}
_ADAPTIVE_MAX = {
    f"aten.adaptive_max_pool{dims}d.default": Recorded(
        run=adaptive_max_pool, note="switches; mean where windows overlap"
    )
    for dims in (1, 2, 3)
}
_AVERAGE = {
    f"aten.{form}avg_pool{dims}d.default": Recorded(
        run=partial(_average_pool, dims), note="recorded shares", refuse=_negative
    )
    for dims in (1, 2, 3)
    for form in ("", "adaptive_", "_adaptive_")
    if (form, dims) != ("_adaptive_", 1)
}
_REDUCTION = {
    name: Recorded(run=average, note="recorded shares")
    for name in ("aten.mean.dim", "aten.sum.dim_IntList")
}
POOLING = {**_MAX, **_ADAPTIVE_MAX, **_AVERAGE, **_REDUCTION}
