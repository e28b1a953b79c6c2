"""Rules of LRP for layers with weights, one class per rule.

Symbols in all formulas: i is an input and j an output of the layer; x_i is the value of input i,
w_ij a weight and b_j a bias; z_j = Σ_i x_i w_ij, plus b_j if biases take relevance; R_i and R_j are
relevances. v⁺ = max(v, 0) and v⁻ = min(v, 0). x_i w_ij is the contribution of input i to output j.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.calls import made_by_name
from captum_mipin.errors import InputError
from captum_mipin.methods.layers import Layer
from captum_mipin.options import check_number
from captum_mipin.rules.base import Back


def quotient(r: Tensor, z: Tensor, epsilon: float = 0.0) -> Tensor:
    """Return R / (z + ε s(z)), or 0 where this denominator is 0; s is the sign, with s(0) = 1."""
    info = torch.finfo(z.dtype)
    if epsilon > info.tiny * info.eps / 2:  # a smaller ε is 0 in this dtype
        # z + 0 replaces −0 by 0; without it, copysign would return −ε for −0
        return r / torch.copysign(z.new_tensor(epsilon), z + 0.0).add_(z)
    # threshold_backward(a, b, 0) is a where b > 0, else 0; it is much faster than torch.where
    shares: Tensor = torch.ops.aten.threshold_backward(r / z, z.abs(), 0)
    return shares


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, y = A(x; W) + b: all tensors that a rule may use.

    Attributes:
        layer: The layer, whose linear map is A.
        x: (batch, ...) the layer's input.
        weight: W, with folded batch norm.
        bias: (outputs,) b; zeros if the layer has no bias; None if biases take no relevance.
        value: (batch, ...) y, which always contains b, even if biases take no relevance.
    """

    layer: Layer
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    value: Tensor

    @property
    def z(self) -> Tensor:
        """Return Σ_i x_i w_ij, plus b_j if biases take relevance."""
        return self.value if self.bias is not None else self.layer.apply(self.x, self.weight)

    @property
    def positive(self) -> bool:
        """Return True if no input is below 0."""
        return bool(self.x.min() >= 0)

    def made(self, of: Callable[[Tensor], Tensor]) -> Any:
        """Return of(W) in the form that :meth:`Layer.apply` and :meth:`adjoint` take."""
        return self.layer.made(of, self.weight)

    def adjoint(self, s: Tensor, weight: Any) -> Tensor:
        """Return Σ_j w_ij s_j, shaped like x."""
        return self.layer.adjoint(s, self.x, weight)

    def shares(self, r: Tensor, z: Tensor, weight: Any, epsilon: float = 0.0) -> Tensor:
        """Return x_i Σ_j w_ij R_j / (z_j + ε s(z_j))."""
        return self.adjoint(quotient(r, z, epsilon), weight).mul_(self.x)


class LayerRule:
    """Base class of rules for layers with weights: frozen dataclasses with the method ``back``.

    Attributes:
        label: Short name of the rule, a format string such as "LRP-ε, ε = {0.epsilon:g}", where 0
            is the rule.
        takes: Whether the denominators contain the bias, so that it takes relevance.
    """

    label: ClassVar[str]
    takes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("epsilon", "gamma", "alpha", "beta"):
            check_number(name, getattr(self, name, 0))

    @property
    def note(self) -> str:
        """Return the short name of the rule, with the values of its attributes."""
        return self.label.format(self)

    def back(self, call: LayerCall) -> Back:
        """Return the backward function of one call: relevance of the output → relevance of x."""
        raise NotImplementedError


@made_by_name
@dataclass(frozen=True)
class Epsilon(LayerRule):
    """LRP-ε: R_i = Σ_j x_i w_ij / (z_j + ε s(z_j)) R_j, where s is the sign, with s(0) = 1.

    Args:
        epsilon: ε, at least 0. With ε = 0 (LRP-0), the relevance of an output with z_j = 0 is lost.

    Examples:
        >>> Epsilon(0.25).note
        'LRP-ε, ε = 0.25'
    """

    epsilon: float = 1e-6
    label = "LRP-ε, ε = {0.epsilon:g}"
    takes = True

    def back(self, call: LayerCall) -> Back:
        """Return the backward function of one call, see :class:`LayerRule`."""
        z = call.z
        return lambda r: call.shares(r, z, call.weight, self.epsilon)


@made_by_name
@dataclass(frozen=True)
class AlphaBeta(LayerRule):
    """LRP-αβ: R_i = Σ_j (α (x_i w_ij)⁺ / z_j⁺ − β (x_i w_ij)⁻ / z_j⁻) R_j.

    Here z_j⁺ = Σ_i (x_i w_ij)⁺ + b_j⁺ is the sum of the positive contributions, and
    z_j⁻ = Σ_i (x_i w_ij)⁻ + b_j⁻ that of the negative ones.

    Args:
        alpha: α, at least 1.
        beta: β, which must be α − 1. With α = 1 and β = 0 the rule is :class:`ZPlus`.
        epsilon: ε, at least 0; ε is added to z_j⁺ and subtracted from z_j⁻.

    Examples:
        >>> AlphaBeta(2, 1).note
        'LRP-α2β1'
    """

    alpha: float = 1.0
    beta: float = 0.0
    epsilon: float = 0.0
    label = "LRP-α{0.alpha:g}β{0.beta:g}"
    takes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise InputError(
                f"alpha={self.alpha!r} and beta={self.beta!r}, expected alpha − beta = 1, which "
                "conserves relevance: change one of them"
            )

    def back(self, call: LayerCall) -> Back:
        """Return the backward function of one call, see :class:`LayerRule`."""
        up = _one_sign(call, _positive, _negative, self.epsilon)
        if not self.beta:
            return up
        down = _one_sign(call, _negative, _positive, self.epsilon)
        return lambda r: self.alpha * up(r) - self.beta * down(r)


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """The z⁺ rule: R_i = Σ_j (x_i w_ij)⁺ / z_j⁺ R_j with z_j⁺ = Σ_i (x_i w_ij)⁺ + b_j⁺.

    Args:
        epsilon: ε, at least 0, which is added to z_j⁺.

    Examples:
        >>> ZPlus().note
        'z⁺'
    """

    label = "z⁺"

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__(1.0, 0.0, epsilon)


@dataclass(frozen=True)
class FullBias(ZPlus):
    """The z⁺ rule with the full bias: z_j⁺ is replaced by Σ_i (x_i w_ij)⁺ + b_j."""

    label = "z⁺, the full bias in the denominator"

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__(epsilon)

    def back(self, call: LayerCall) -> Back:
        """Return the backward function of one call, see :class:`LayerRule`."""
        return _one_sign(call, _positive, _negative, self.epsilon, full_bias=True)


@made_by_name
@dataclass(frozen=True)
class Gamma(LayerRule):
    """LRP-γ: R_i = Σ_j x_i (w_ij + γ w_ij⁺) / Σ_i' x_i' (w_i'j + γ w_i'j⁺) R_j, for x_i, z_j ≥ 0.

    For x_i and z_j of any sign, x_i (w_ij + γ w_ij⁺) is replaced by
    ``c_ij + γ (c_ij + σ_j |c_ij|) / 2`` in numerator and denominator, where c_ij = x_i w_ij and
    σ_j is the sign of z_j. Contributions with the sign of z_j get a greater share.

    Args:
        gamma: γ, at least 0.
        epsilon: ε, at least 0, which is added to each denominator with the denominator's sign.

    Examples:
        >>> Gamma(0.5).note
        'LRP-γ, γ = 0.5'
    """

    gamma: float = 0.25
    epsilon: float = 0.0
    label = "LRP-γ, γ = {0.gamma:g}"
    takes = True

    def back(self, call: LayerCall) -> Back:
        """Return the backward function of one call, see :class:`LayerRule`."""

        def back(r: Tensor) -> Tensor:
            if call.positive:
                # r where y > 0, else 0: equal to r if no output y ≤ 0 has relevance
                above: Tensor = torch.ops.aten.threshold_backward(r, call.value, 0)
                if torch.equal(above, r):
                    return self._nonnegative(call, r)
            return self._any_sign(call, r)

        return back

    def _nonnegative(self, call: LayerCall, r: Tensor) -> Tensor:
        """Return R_i if all x_i are ≥ 0, and all outputs with relevance are > 0."""
        # w + γ w⁺ = (1 + γ) (w⁺ + w⁻ / (1 + γ)); 1 + γ cancels, so one pass per layer is enough
        slope = 1 / (1 + self.gamma)
        weight = call.made(lambda w: F.leaky_relu(w, slope))
        bias = None if call.bias is None else F.leaky_relu(call.bias, slope)
        z = call.layer.apply(call.x, weight, bias)
        return call.shares(r, z, weight, self.epsilon * slope)

    def _any_sign(self, call: LayerCall, r: Tensor) -> Tensor:
        """Return R_i for x_i and z_j of any sign."""
        # c + γ (c + σ |c|) / 2 = (1 + γ/2) (c + κ σ |c|) with κ = γ / (2 + γ); 1 + γ/2 cancels
        kappa = self.gamma / (2 + self.gamma)
        sign, size = call.value.sign(), call.x if call.positive else call.x.abs()
        weight = call.made(lambda w: w.abs().mul_(kappa))
        # with the denominator z' = Σ_i (c_ij + κ σ |c_ij|): σ z' = κ Σ_i |c_ij| + σ z ≥ 0
        z = call.layer.apply(size, weight, None if call.bias is None else call.bias.abs() * kappa)
        z.add_(call.z * sign)
        q = quotient(r * sign, z, self.epsilon * (1 - kappa))
        # R_i = x_i Σ_j w_ij q_j + |x_i| Σ_j κ |w_ij| σ_j q_j
        relevance = call.adjoint(q, call.weight).mul_(call.x)
        return relevance.addcmul_(call.adjoint(q.mul_(sign), weight), size)


@dataclass(frozen=True)
class Flat(LayerRule):
    """The flat rule: R_i = Σ_j 1 / n_j R_j, where n_j is the number of inputs of output j.

    All weights and inputs are replaced by 1.

    Examples:
        >>> Flat().note
        'flat'
    """

    label = "flat"

    def back(self, call: LayerCall) -> Back:
        """Return the backward function of one call, see :class:`LayerRule`."""
        return _by_weights(call, torch.ones_like(call.weight))


@dataclass(frozen=True)
class WSquare(LayerRule):
    """The w² rule: R_i = Σ_j w_ij² / (Σ_i' w_i'j²) R_j, for inputs without bounds.

    Examples:
        >>> WSquare().note
        'w²'
    """

    label = "w²"

    def back(self, call: LayerCall) -> Back:
        """Return the backward function of one call, see :class:`LayerRule`."""
        return _by_weights(call, call.weight.square())


@made_by_name
@dataclass(frozen=True, eq=False)
class ZBox(LayerRule):
    """The z^B rule: R_i = Σ_j z_ij / Σ_i' z_i'j R_j with z_ij = x_i w_ij − l_i w_ij⁺ − h_i w_ij⁻.

    It is for inputs with bounds, l_i ≤ x_i ≤ h_i, such as pixels.

    Args:
        low: l, the lower bound of the layer's input, after normalisation: a number, or a tensor
            that broadcasts against one example, such as (3, 1, 1).
        high: h, the upper bound of the layer's input, in the same form as ``low``.
        epsilon: ε, at least 0, which is added to each denominator with the denominator's sign.

    Examples:
        >>> ZBox(low=0.0, high=1.0).note
        'z^B'
    """

    low: float | Tensor
    high: float | Tensor
    epsilon: float = 0.0
    label = "z^B"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            crossed = bool((torch.as_tensor(self.low) > torch.as_tensor(self.high)).any())
        except RuntimeError as error:
            raise InputError(
                f"low and high have shapes that do not broadcast ({error}): pass numbers, or "
                "tensors such as (channels, 1, 1)"
            ) from error
        if crossed:
            raise InputError("low is greater than high, expected low ≤ high: exchange them")

    def back(self, call: LayerCall) -> Back:
        """Return the backward function of one call, see :class:`LayerRule`."""
        x, layer = call.x, call.layer
        bounds = (torch.as_tensor(bound).to(x) for bound in (self.low, self.high))
        try:
            low, high = (bound.expand_as(x[:1]) for bound in bounds)
        except RuntimeError as error:
            raise InputError(
                f"the bounds of z^B do not broadcast against the inputs of {layer.key} ({error}): "
                "pass numbers, or tensors that broadcast against one example"
            ) from error
        outside = int(((x < low) | (x > high)).sum())
        if outside:
            raise InputError(
                f"z^B at {layer.key} is for inputs between low and high, but {outside} of its "
                "inputs are outside: pass bounds of the layer's input, after normalisation"
            )
        up, down = _positive(call.weight), _negative(call.weight)
        z = layer.apply(x, call.weight) - layer.apply(low, up) - layer.apply(high, down)

        def back(r: Tensor) -> Tensor:
            q = quotient(r, z, self.epsilon)
            terms = ((x, call.weight), (low, up), (high, down))
            value, at_low, at_high = (t * call.adjoint(q, weight) for t, weight in terms)
            return value - at_low - at_high

        return back


def _positive(values: Tensor) -> Tensor:
    return values.clamp(min=0)


def _negative(values: Tensor) -> Tensor:
    return values.clamp(max=0)


def _one_sign(
    call: LayerCall,
    part: Callable[[Tensor], Tensor],
    opposite: Callable[[Tensor], Tensor],
    epsilon: float,
    *,
    full_bias: bool = False,
) -> Back:
    """Return the backward function that distributes relevance by contributions of one sign.

    Args:
        call: The call of the layer.
        part: v ↦ v⁺ for positive contributions, v ↦ v⁻ for negative ones.
        opposite: v ↦ v⁻ for positive contributions, v ↦ v⁺ for negative ones.
        epsilon: ε, which is added to each denominator with the denominator's sign.
        full_bias: True if the denominators contain the full bias; False if only part(bias).
    """
    apply, bias = call.layer.apply, call.bias
    bias = bias if bias is None or full_bias else part(bias)
    weight = call.made(part)
    if call.positive:
        return lambda r: call.shares(r, apply(call.x, weight, bias), weight, epsilon)
    # (x w)⁺ = x⁺ w⁺ + x⁻ w⁻, and (x w)⁻ = x⁺ w⁻ + x⁻ w⁺
    above, below, other = _positive(call.x), _negative(call.x), call.made(opposite)
    z = apply(above, weight, bias).add_(apply(below, other))

    def back(r: Tensor) -> Tensor:
        q = quotient(r, z, epsilon)
        relevance = call.adjoint(q, weight).mul_(above)
        return relevance.addcmul_(call.adjoint(q, other), below)

    return back


def _by_weights(call: LayerCall, weight: Tensor) -> Back:
    """Return the backward function R_i = Σ_j w_ij / (Σ_i' w_i'j) R_j for weights w ≥ 0."""
    z = call.layer.apply(torch.ones_like(call.x[:1]), weight)
    return lambda r: call.adjoint(quotient(r, z), weight)
