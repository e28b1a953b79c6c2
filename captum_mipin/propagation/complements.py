"""Gates by hand, as c σ(k q) of a tensor q: 1 − σ(q), 1 + tanh(q), relu6(q + 3) / 6 and others."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isclose, isfinite, log
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.forms import become, insert

_aten = torch.ops.aten

#: Sigmoid or hard sigmoid σ → function that returns z for σ(z).
_SIGMOIDS: dict[Any, Callable[[float], float]] = {
    _aten.sigmoid.default: lambda share: log(share / (1 - share)),
    _aten.hardsigmoid.default: lambda share: 6 * share - 3,
}
#: Activations f with f(x) − f(−x) = x, but for ReLU, whose difference to x is left as it is.
_HALVES = ("silu", "hardswish", "gelu")
#: Largest difference to a function, relative to its largest value.
TOLERANCE = 1e-6
#: Arguments for which functions are compared: 0 first; near 0, far away and between the regular
#: ones, a threshold or a bound may lie.
POINTS = torch.cat(
    [
        torch.linspace(0, 8, 51, dtype=torch.float64),
        torch.logspace(-8, -0.81, 37, dtype=torch.float64),
        torch.arange(1, 90, dtype=torch.float64) * (5**0.5 / 2 - 0.5) % 8,
        torch.logspace(1, 6, 21, dtype=torch.float64),
    ]
)
POINTS = torch.cat([POINTS, -POINTS[1:]])


@dataclass(frozen=True)
class Gate:
    """The gate c σ(k q) of a tensor q.

    Attributes:
        activation: The operation σ.
        slope: The number k.
        factor: The number c.
    """

    activation: Any
    slope: float = 1.0
    factor: float = 1.0

    def insert(self, draft: Draft, node: fx.Node, q: Any) -> fx.Node:
        """Return the node of the gate of a tensor q, inserted before another node."""
        if self.slope == -1:
            twice = operation(q) == "neg" and q not in draft.starts
            q = q.args[0] if twice else insert(node, _aten.neg.default, q)
        elif self.slope != 1:
            q = insert(node, _aten.mul.Tensor, q, self.slope)
        value = insert(node, self.activation, q)
        return value if self.factor == 1 else insert(node, _aten.mul.Tensor, value, self.factor)


def same_values(values: Tensor, others: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Return True if two functions are the same at :data:`POINTS`, but where the first overflows.

    Args:
        values: The values of a function that a model computes.
        others: The values of a known function.
        tolerance: The largest difference, far from 0 relative to the value.
    """
    finite = values.isfinite()
    near = POINTS.abs() <= 8
    # without the points around 0, all values of a function with infinite ones there are left out
    if not bool(finite[near].all()):
        return False
    rtol = (~near).to(values.dtype) * tolerance
    differences = (values - others).abs()
    return bool((differences <= tolerance + rtol * others.abs())[finite].all())


def scaled_gate(function: Callable[[Tensor], Tensor]) -> Gate | None:
    """Return the gate c σ(k q) that has the values of a function; None if there is none."""
    try:
        values = function(POINTS)
    except RuntimeError:  # for a dtype that the model names, or a size
        return None
    factor = 2 * float(values[0])  # σ(0) = 1/2
    if not factor or not isfinite(factor):
        return None
    share = float(values[1]) / factor
    for activation, logit in _SIGMOIDS.items() if 0 < share < 1 else ():
        slope = logit(share) / float(POINTS[1])
        if isclose(slope, round(slope), rel_tol=TOLERANCE):
            slope = float(round(slope))
        if slope and same_values(values / factor, activation(slope * POINTS)):
            return Gate(activation, slope, 1.0 if isclose(factor, 1) else factor)
    return None


def write_half(node: Any, x: Any, half: Any) -> bool:
    """Rewrite x − f(x) as −f(−x), if f is such an activation; return True if rewritten."""
    if operation(half) not in _HALVES or half.args[0] is not x:
        return False
    negated = insert(node, _aten.neg.default, x)
    value = insert(node, half.target, negated, *half.args[1:], **half.kwargs)
    become(node, _aten.neg.default, value)
    return True
