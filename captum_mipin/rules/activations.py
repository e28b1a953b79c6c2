"""ReLU in every spelling: the forward mask (equation 9)."""

from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.rules.base import Back, Options, Recorded, argument


def relu(options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Back]:
    """S_l = S_l ⊙ 1[X_l ≠ 0]: what was not active in the sample is not active in its signal (equation 9)."""
    value = operation(x, *arguments, **named)
    if not options.local:
        return value, lambda s: s
    kept = value.detach()
    return value, lambda s: torch.ops.aten.threshold_backward(s, kept, 0)  # s where kept > 0, else 0


def _not_a_relu(node: fx.Node) -> str | None:
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if low == 0 and high is None:
        return None
    return f"clamp(min={low}, max={high}) is not a ReLU; only clamp(min=0) is"


ACTIVATIONS = {
    "aten.relu.default": Recorded(run=relu, note="forward mask"),
    "aten.clamp.default": Recorded(run=relu, note="forward mask", refuse=_not_a_relu),
    "aten.clamp_min.default": Recorded(run=relu, note="forward mask", refuse=_not_a_relu),
}
