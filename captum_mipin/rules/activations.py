"""Activations: the forward mask (equation 9) and, for those that are no mask, the gate it is a case of."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.nodes import argument
from captum_mipin.rules.base import Back, Options, Recorded


def relu(
    options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    """S_l = S_l ⊙ 1[X_l ≠ 0]: what was not active in the sample is not active in its signal (equation 9)."""
    value = operation(x, *arguments, **named)
    if not options.local:
        return value, lambda s: s
    if options.packed:
        bits = pack(value > 0)
        return value, lambda s: torch.where(unpack(bits, s.shape), s, 0)
    kept = value.detach()
    return value, lambda s: torch.ops.aten.threshold_backward(
        s, kept, 0
    )  # s where kept > 0, else 0


def gate(
    options: Options, operation: Any, x: Tensor, *arguments: Any, rest: bool = False, **named: Any
) -> tuple[Tensor, Back]:
    """S ⊙ (f(x) − f(0)) / x, the share of its input that the activation f let through; 0 where x = 0.

    For ReLU this is the mask of equation 9, for SiLU x σ(x) it is σ(x), for ReLU6 it is 6/x above 6.

    Args:
        rest: Whether f(0) is other than 0. The difference is then taken in float64.
    """
    value = operation(x, *arguments, **named)
    if not options.local:
        return value, lambda s: s
    if rest:
        wide = x.double()
        zero = torch.zeros((), dtype=wide.dtype, device=x.device)
        passed = operation(wide, *arguments, **named) - operation(zero, *arguments, **named)
        share = _zero_for_nan(passed.div_(wide)).to(x.dtype)
    else:
        share = _zero_for_nan(value / x)
    return value, lambda s: s * share


def pack(mask: Tensor) -> Tensor:
    """A mask as bits, eight to a byte.

    Examples:
        >>> mask = torch.tensor([[True, False, True]])
        >>> pack(mask).tolist(), bool((unpack(pack(mask), mask.shape) == mask).all())
        ([5], True)
    """
    octets = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(
        -1, 8
    )
    return (octets << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(
        1, dtype=torch.uint8
    )


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask of this shape that :func:`pack` made bits of."""
    octets = bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return octets.flatten()[: shape.numel()].view(shape).bool()


def _zero_for_nan(share: Tensor) -> Tensor:
    return share.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def clamp(
    options: Options, operation: Any, x: Tensor, *bounds: Any, **named: Any
) -> tuple[Tensor, Back]:
    """ReLU where that is what it amounts to, else the gate of ReLU6 and its like."""
    low, high = (*bounds, None, None)[:2]
    low, high = named.get("min", low), named.get("max", high)
    return (relu if low == 0 and high is None else gate)(options, operation, x, *bounds, **named)


def glu(options: Options, operation: Any, x: Tensor, dim: int = -1) -> tuple[Tensor, Back]:
    """S ⊙ σ(b) for y = a ⊙ σ(b), to the half a of x; nothing to the half b, which is recorded as any gate is."""
    share = torch.sigmoid(x.chunk(2, dim)[1])
    return operation(x, dim), lambda s: torch.cat([s * share, torch.zeros_like(s)], dim)


def _without_zero(node: fx.Node) -> str | None:
    operation = str(node.target).split(".")[1]
    low, high = (-1, 1) if operation == "hardtanh" else (None, None)
    low = argument(node, 1, "min", argument(node, 1, "min_val", low))
    high = argument(node, 2, "max", argument(node, 2, "max_val", high))
    if (low is None or low <= 0) and (high is None or high >= 0):
        return None
    return f"{operation} between {low} and {high} is no activation: it does not let 0 through"


def _below_zero(node: fx.Node) -> str | None:
    high = argument(node, 1, "max")
    return f"clamp_max to {high} is no activation: it does not let 0 through" if high < 0 else None


def _replaces_zero(node: fx.Node) -> str | None:
    limit, value = argument(node, 1, "threshold"), argument(node, 2, "value")
    return (
        f"threshold at {limit} is no activation: it makes {value} of 0"
        if limit >= 0 and value != 0
        else None
    )


_MASK, _GATE = "forward mask", "recorded gate: the share of its input that it let through"
_FROM_ZERO = (
    "relu6", "silu", "gelu", "hardswish", "leaky_relu", "elu", "celu", "selu", "mish", "tanh", "_prelu_kernel",
    "prelu", "rrelu",
)  # fmt: skip
_SHIFTED = ("sigmoid", "hardsigmoid", "softplus", "log_sigmoid")

ACTIVATIONS = {
    "aten.relu.default": Recorded(run=relu, note=_MASK, exact=True),
    "aten.clamp.default": Recorded(
        run=clamp, note="forward mask or recorded gate", refuse=_without_zero
    ),
    "aten.clamp_min.default": Recorded(
        run=clamp, note="forward mask or recorded gate", refuse=_without_zero
    ),
    "aten.clamp_max.default": Recorded(run=gate, note=_GATE, refuse=_below_zero),
    "aten.threshold.default": Recorded(run=gate, note=_GATE, refuse=_replaces_zero),
    "aten.glu.default": Recorded(
        run=glu, note="one half as recorded gate of the other; its scale is learned", restores=False
    ),
    "aten.hardtanh.default": Recorded(run=gate, note=_GATE, refuse=_without_zero),
    **{f"aten.{name}.default": Recorded(run=gate, note=_GATE) for name in _FROM_ZERO},
    **{
        f"aten.{name}.default": Recorded(run=partial(gate, rest=True), note=_GATE, restores=False)
        for name in _SHIFTED
    },
}
