"""Activations: the forward mask (equation 9), and the gate, which is its general form."""

from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.rules.base import Options, Recorded, Recording


def relu(options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any) -> Recording:
    """Send back S ⊙ 1[X ≠ 0] (equation 9): elements that the ReLU set to 0 get no signal."""
    value = operation(x, *arguments, **named)
    if not options.local:
        return value, lambda s: s
    # eq. 9: S = S ⊙ 1[X ≠ 0]
    if options.packed:
        bits = pack(value > 0)
        return value, lambda s: torch.where(unpack(bits, s.shape), s, 0)
    kept = value.detach()
    # this operation returns s where kept > 0, else 0, in one pass over memory
    return value, lambda s: torch.ops.aten.threshold_backward(s, kept, 0)


def gate(
    options: Options, operation: Any, x: Tensor, *arguments: Any, rest: bool = False, **named: Any
) -> Recording:
    """Send back S ⊙ (f(x) − f(0)) / x, where the factor is the share of x that f lets through.

    The factor is 0 where x = 0. For ReLU it is the mask of equation 9; for SiLU, f(x) = x σ(x), it
    is σ(x).

    Args:
        options: The options of the pass.
        operation: The activation f.
        x: Tensor, the input of the activation.
        arguments: Further positional arguments of the activation.
        rest: Whether f(0) differs from 0. Then f(x) − f(0) is computed in float64, because in
            float32 the difference would lose all digits for x near 0.
        named: Further arguments of the activation by name.
    """
    value = operation(x, *arguments, **named)
    if not options.local:
        return value, lambda s: s
    # share = (f(x) − f(0)) / x
    passed, divisor = value, x
    if rest:
        divisor = x.double()
        passed = operation(divisor, *arguments, **named)
        passed = passed - operation(divisor.new_zeros(()), *arguments, **named)
    share = (passed / divisor).nan_to_num_(0.0, torch.inf, -torch.inf).to(x.dtype)  # 0 / 0 is 0
    return value, lambda s: s * share


def pack(mask: Tensor) -> Tensor:
    """Return the bits of a mask, with eight elements per byte.

    Examples:
        >>> mask = torch.tensor([[True, False, True]])
        >>> pack(mask).tolist(), bool((unpack(pack(mask), mask.shape) == mask).all())
        ([5], True)
    """
    flat = torch.nn.functional.pad(mask.flatten().byte(), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) << _places(mask)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask of shape ``shape`` from the result of :func:`pack`."""
    flat = (bits.unsqueeze(1) >> _places(bits) & 1).flatten()
    return flat[: shape.numel()].view(shape).bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def clamp(options: Options, operation: Any, x: Tensor, *bounds: Any, **named: Any) -> Recording:
    """Send back by :func:`relu` if the bounds are (0, None), else by :func:`gate`."""
    low, high = (*bounds, None, None)[:2]
    low, high = named.get("min", low), named.get("max", high)
    rule = relu if low == 0 and high is None else gate
    return rule(options, operation, x, *bounds, **named)


def glu(options: Options, operation: Any, x: Tensor, dim: int = -1) -> Recording:
    """Send back S ⊙ σ(b) to the half a of x = (a, b), and 0 to the half b, for y = a ⊙ σ(b)."""
    # y = a ⊙ σ(b): the gate σ(b) is recorded, and gets no signal
    share = torch.sigmoid(x.chunk(2, dim)[1])
    return operation(x, dim), lambda s: torch.cat([s * share, torch.zeros_like(s)], dim)


class Elementwise:
    """A function that a model computes from one tensor x, element by element.

    Args:
        module: The function of x and of constants, as a module that returns a tuple.
    """

    __name__ = "elementwise"
    name = f"captum_mipin.{__name__}.default"

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def __call__(self, x: Tensor, *constants: Any) -> Tensor:
        """Return f(x)."""
        result: Tensor = self.module(x, *constants)[0]
        return result

    def __repr__(self) -> str:
        return self.name


def _infinite_at_zero(node: fx.Node) -> str | None:
    """Return the reason to refuse an operation f with an infinite f(0)."""
    operation: Any = node.target
    args = [torch.zeros(()) if n is node.args[0] else n for n in node.args]
    if any(isinstance(n, fx.Node) for n in args) or isfinite(float(operation(*args))):
        return None
    return "it is infinite at 0, expected an operation that is finite there: add a constant before"


def moves_zero(node: fx.Node) -> str | None:
    """Return the reason to refuse an operation f with f(0) ≠ 0; None if f(0) = 0.

    The mask and the gate send nothing back where x = 0, which is right only if f(0) = 0.
    """
    operation: Any = node.target
    # f depends on the bounds of this node: clamp(0, 1, 2) is 1, clamp(0, -1, 2) is 0.
    value = float(operation(torch.zeros(()), *node.args[1:], **node.kwargs))
    if value == 0:
        return None
    bounds = [*node.args[1:], *(f"{name}={bound}" for name, bound in node.kwargs.items())]
    call = f"{operation.__name__.split('.')[0]}({', '.join(map(str, ('x', *bounds)))})"
    return f"{call} maps 0 to {value:g}, expected an operation that maps 0 to 0"


_MASK, _GATE = "forward mask", "recorded gate: the share of its input that it let through"
_CLAMP = Recorded(run=clamp, note="forward mask or recorded gate", refuse=moves_zero)
_LIMIT = Recorded(run=gate, note=_GATE, refuse=moves_zero)
_FROM_ZERO = (
    "relu6", "silu", "gelu", "hardswish", "leaky_relu", "elu", "celu", "selu", "mish", "tanh",
    "_prelu_kernel", "prelu", "rrelu",
)  # fmt: skip
#: Functions that are no activation of torch.nn. ``exp`` is not among them: its product with a sum
#: over several elements is a softmax, which no rule covers.
CURVES = (
    "pow.Tensor_Scalar", "square.default", "sqrt.default", "abs.default", "expm1.default",
    "log1p.default", "erf.default", "erfc.default", "sin.default", "cos.default", "tan.default",
    "asin.default", "acos.default", "atan.default", "sinh.default", "cosh.default",
    "asinh.default", "atanh.default", "softshrink.default", "hardshrink.default",
    "nan_to_num.default",
)  # fmt: skip
_SHIFTED = ("sigmoid", "hardsigmoid", "softplus", "log_sigmoid")


ACTIVATIONS = {
    "aten.relu.default": Recorded(run=relu, note=_MASK, exact=True),
    "aten.clamp.default": _CLAMP,
    "aten.clamp_min.default": _CLAMP,
    "aten.clamp_max.default": _LIMIT,
    "aten.threshold.default": _LIMIT,
    "aten.hardtanh.default": _LIMIT,
    "aten.glu.default": Recorded(
        run=glu, note="one half as recorded gate of the other; its scale is learned", restores=False
    ),
    **{f"aten.{name}.default": Recorded(run=gate, note=_GATE) for name in _FROM_ZERO},
    **{
        f"aten.{name}.default": Recorded(run=partial(gate, rest=True), note=_GATE, restores=False)
        for name in _SHIFTED
    },
    **{
        f"aten.{name}": Recorded(
            run=partial(gate, rest=True), note=_GATE, restores=False, refuse=_infinite_at_zero
        )
        for name in CURVES
    },
    Elementwise.name: Recorded(run=partial(gate, rest=True), note=_GATE, restores=False),
}
