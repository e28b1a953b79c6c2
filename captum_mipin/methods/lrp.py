"""Layer-wise relevance propagation and Deep Taylor: the output is shared out, layer by layer, by who contributed what.

What is sent back is relevance itself. Layers with weights have a rule of their own, chosen layer by layer. Everything else
has one each: sums, averages and other linear operations share relevance out by contribution, x_i A_ij / Σ; activations and
normalisations by the sample's own deviation hand it on; maximum pooling and other switches send it to where each value came
from; a product with a gate, or with attention weights, sends it to the value alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from captum_mipin.errors import InputError
from captum_mipin.graph.nodes import operation
from captum_mipin.methods.base import Relevance, Table
from captum_mipin.methods.gradients import derivative
from captum_mipin.methods.layers import Layer, layers
from captum_mipin.rules import MIPIN, Options, Passes, Recorded, Rule
from captum_mipin.rules.activations import ACTIVATIONS
from captum_mipin.rules.arithmetic import ARITHMETIC
from captum_mipin.rules.attention import ATTENTION
from captum_mipin.rules.base import Back, factors, varies
from captum_mipin.rules.normalization import NORMALIZATION
from captum_mipin.rules.pooling import POOLING
from captum_mipin.types import Output, Target


class LayerRule(Protocol):
    """How relevance goes back through a layer with weights.

    Attributes:
        note: The rule in a few words.
        takes: Whether biases are part of the denominators, and so take relevance.
    """

    takes: bool

    @property
    def note(self) -> str:
        """The rule in a few words."""
        ...

    def back(
        self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor
    ) -> Back:
        """Relevance at the layer's output → at x.

        Args:
            layer: The layer.
            x: (batch, ...) its input.
            weight: W.
            bias: b, zeros where the layer has none, where it is to take relevance; else None.
            value: A(x; W) + b, whether or not b takes relevance.
        """
        ...


@dataclass(frozen=True)
class Epsilon:
    """LRP-ε: R_i = Σ_j x_i w_ij / (z_j + ε s(z_j)) R_j with z_j = Σ_i x_i w_ij + b_j and s the sign, s(0) = 1.

    Args:
        epsilon: ε, at least 0. With 0 (LRP-0), nothing comes back from where z_j is exactly 0.
    """

    epsilon: float = 1e-6
    takes = True

    def __post_init__(self) -> None:
        _at_least_zero(epsilon=self.epsilon)

    @property
    def note(self) -> str:
        """The rule in a few words."""
        return f"LRP-ε, ε = {self.epsilon:g}"

    def back(
        self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor
    ) -> Back:
        """See :class:`LayerRule`."""
        z = value if bias is not None else layer.apply(x, weight)
        return lambda r: layer.adjoint(quotient(r, z, self.epsilon), x, weight).mul_(x)


@dataclass(frozen=True)
class AlphaBeta:
    """LRP-αβ: α times the shares of what pulls up, minus β times those of what pulls down (contributions x_i w_ij, and b_j).

    Args:
        alpha, beta: α − β = 1, both at least 0. α = 1, β = 0 is :class:`ZPlus`.
        epsilon: Added to the denominators, by their sign.
    """

    alpha: float = 1.0
    beta: float = 0.0
    epsilon: float = 0.0
    takes = True

    def __post_init__(self) -> None:
        _at_least_zero(alpha=self.alpha, beta=self.beta, epsilon=self.epsilon)
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise InputError(
                f"alpha={self.alpha!r} and beta={self.beta!r}: alpha − beta must be 1, or nothing is conserved"
            )

    @property
    def note(self) -> str:
        """The rule in a few words."""
        return f"LRP-α{self.alpha:g}β{self.beta:g}"

    def back(
        self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor
    ) -> Back:
        """See :class:`LayerRule`."""
        parts = [(self.alpha, _signed(layer, x, weight, True, _part(bias, True), self.epsilon))]
        if self.beta:
            down = _signed(layer, x, weight, False, _part(bias, False), self.epsilon)
            parts.append((-self.beta, down))
        return lambda r: _sum(
            [factor * part(r) if factor != 1 else part(r) for factor, part in parts]
        )


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """The z⁺ rule: R_i = Σ_j (x_i w_ij)⁺ / Σ_i' (x_i' w_i'j)⁺ R_j; the positive part of a bias is in the denominator.

    Args:
        epsilon: Added to the denominators.
    """

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__(1.0, 0.0, epsilon)

    @property
    def note(self) -> str:
        """The rule in a few words."""
        return "z⁺"


@dataclass(frozen=True)
class Gamma:
    """LRP-γ: as LRP-0 with w_ij + γ w_ij⁺ for w_ij; generalised to any sign of x_i and z_j.

    Where x_i < 0, or z_j < 0, the parts whose contributions agree with z_j in sign are those that weigh more.

    Args:
        gamma: γ, at least 0.
        epsilon: Added to the denominators, by their sign.
    """

    gamma: float = 0.25
    epsilon: float = 0.0
    takes = True

    def __post_init__(self) -> None:
        _at_least_zero(gamma=self.gamma, epsilon=self.epsilon)

    @property
    def note(self) -> str:
        """The rule in a few words."""
        return f"LRP-γ, γ = {self.gamma:g}"

    def back(
        self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor
    ) -> Back:
        """See :class:`LayerRule`.

        Of contributions c those that agree with the sign σ of z_j are (c + σ |c|) / 2, so that c + κ σ |c| with κ = γ / (2 + γ)
        is shared out by. Where neither inputs nor any z_j that has relevance are below 0, as between two ReLUs, that is
        W⁺ + W⁻ / (1 + γ), once forward and once back.
        """
        part = self.gamma / (2 + self.gamma)

        def back(r: Tensor) -> Tensor:
            positive, above = (
                _nowhere_negative(x),
                torch.ops.aten.threshold_backward(r, value, 0),
            )  # r where value > 0
            if positive and torch.equal(above, r):
                slope = 1 / (1 + self.gamma)
                less = layer.made(lambda w: F.leaky_relu(w, slope), weight)
                z = layer.apply(x, less, None if bias is None else F.leaky_relu(bias, slope))
                return layer.adjoint(quotient(r, z, self.epsilon * slope), x, less).mul_(x)
            sign, size, sizes = (
                value.sign(),
                x if positive else x.abs(),
                layer.made(lambda w: w.abs().mul_(part), weight),
            )
            z = layer.apply(size, sizes, None if bias is None else bias.abs() * part)
            z.add_((value if bias is not None else layer.apply(x, weight)) * sign)
            q = quotient(r * sign, z, self.epsilon * (1 - part))
            found = layer.adjoint(q, x, weight).mul_(x)
            return found.addcmul_(layer.adjoint(q.mul_(sign), x, sizes), size)

        return back


@dataclass(frozen=True)
class Flat:
    """The flat rule: as if all weights and inputs were 1, so each output's relevance is spread evenly over its inputs."""

    note = "flat"
    takes = False

    def back(
        self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor
    ) -> Back:
        """See :class:`LayerRule`."""
        return _spread(layer, x, torch.ones_like(weight))


@dataclass(frozen=True)
class WSquare:
    """The w² rule: R_i = Σ_j w_ij² / Σ_i' w_i'j² R_j, for inputs of any value."""

    note = "w²"
    takes = False

    def back(
        self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor
    ) -> Back:
        """See :class:`LayerRule`."""
        return _spread(layer, x, weight.square())


@dataclass(frozen=True, eq=False)
class ZBox:
    """The z^B rule, for inputs between l and h: z_ij = x_i w_ij − l_i w_ij⁺ − h_i w_ij⁻, R_i = Σ_j z_ij / Σ_i' z_i'j R_j.

    Args:
        low, high: l and h as the layer sees them, normalised as its input is: numbers, or tensors that broadcast against one
            example, such as (3, 1, 1).
        epsilon: Added to the denominators, by their sign.
    """

    low: float | Tensor
    high: float | Tensor
    epsilon: float = 0.0
    note = "z^B"
    takes = False

    def __post_init__(self) -> None:
        _at_least_zero(epsilon=self.epsilon)
        try:
            crossed = bool((torch.as_tensor(self.low) > torch.as_tensor(self.high)).any())
        except RuntimeError as error:
            raise InputError(f"low and high do not fit each other: {error}") from error
        if crossed:
            raise InputError("low is above high")

    def back(
        self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor
    ) -> Back:
        """See :class:`LayerRule`."""
        low, high = (torch.as_tensor(bound).to(x) for bound in (self.low, self.high))
        try:
            low, high = low.expand_as(x[:1]), high.expand_as(x[:1])
        except RuntimeError as error:
            raise InputError(
                f"the bounds of z^B do not fit the inputs of {layer.key}: {error}"
            ) from error
        outside = (x < low) | (x > high)
        if bool(outside.any()):
            raise InputError(
                f"z^B at {layer.key} is for inputs between low and high, and {int(outside.sum())} of its inputs are outside"
            )
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        z = layer.apply(x, weight) - layer.apply(low, up) - layer.apply(high, down)

        def back(r: Tensor) -> Tensor:
            q = quotient(r, z, self.epsilon)
            return (
                x * layer.adjoint(q, x, weight)
                - low * layer.adjoint(q, x, up)
                - high * layer.adjoint(q, x, down)
            )

        return back


#: Which layers: a module's type, a pattern of module paths ("features.*"), or (path, module) → whether.
Which = type[nn.Module] | str | Callable[[str, nn.Module], bool]


class LRP(Relevance):
    """Layer-wise relevance propagation: the target's output, shared out over the input.

    A batch norm right behind a layer with weights is folded into it, by rule: the model is not changed. Any other is a layer
    of its own with LRP-ε. The relevance of a sum goes to its terms by their shares, x / Σ; of ``cat`` and other moves, to
    where each value came from; max pooling sends it to its switches, averages by shares. Activations hand it on. In a product
    with a gate (squeeze-and-excite, ``x * sigmoid(x)``) and in attention, the value gets all, gate and weights nothing; layer,
    group, instance and RMS norms hand it on.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.
        rule: The rule of layers with weights: :class:`Epsilon`, :class:`Gamma`, :class:`AlphaBeta`, :class:`ZPlus`,
            :class:`Flat`, :class:`WSquare` or :class:`ZBox`.
        composite: (which layers, rule) pairs; of those that match, the first counts. Which layers is a module's type (dense
            layers and convolutions also where they are functions), a pattern of module paths such as "features.*", or a
            function of path and module.
        input_rule: The rule of the layers that the input goes to first; before ``composite``.
        bias: Whether biases "take" relevance, as in the rules' definitions (of z⁺ and αβ the part of their sign), or "none"
            of it: then they are left out of all denominators.

    Raises:
        InputError: An option of the wrong kind, or, once it explains, a ``composite`` entry that matches no layer.

    Source: Bach et al., PLOS ONE 2015; Montavon et al., 2019 (γ, composites); Binder et al., 2016 (batch norm).

    Examples:
        >>> _ = torch.manual_seed(0)  # ε takes more where a denominator happens to be small
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> lrp = LRP(model, composite=[("0", Gamma(0.25))], bias="none")
        >>> relevance, delta = lrp.attribute(torch.randn(2, 4), target=1, return_convergence_delta=True)
        >>> bool(delta.abs().max() < 1e-4)
        True
    """

    _name = "LRP"
    #: Whether batch norms are folded.
    _folds = True

    def __init__(
        self,
        model: nn.Module,
        *,
        rule: LayerRule | None = None,
        composite: Sequence[tuple[Which, LayerRule]] = (),
        input_rule: LayerRule | None = None,
        bias: Literal["take", "none"] = "take",
        output: Output = None,
    ) -> None:
        super().__init__(model, output=output)
        _one_of("bias", bias, ("take", "none"))
        self.rule, self.input_rule, self.bias = rule or Epsilon(), input_rule, bias
        self.composite = tuple(composite)
        for which, _ in self.composite:
            if not isinstance(which, str) and not callable(which):
                raise InputError(
                    f"composite: {which!r} is no type of modules, pattern of paths or function"
                )
        for each in (
            self.rule,
            self.input_rule or self.rule,
            *(rule for _, rule in self.composite),
        ):
            _check_rule(each)

    def _table(self) -> Table:
        kept = self.bias == "take"
        rules = list(dict.fromkeys(rule for rule in self._rules() if rule is not None))
        names = {rule: f"captum_mipin.lrp{index}" for index, rule in enumerate(rules)}
        alone = Recorded(
            run=partial(_layer, Epsilon(_SMALL), kept),
            note="its own layer, LRP-ε",
            caveat=_takes if kept else _no,
        )
        table: dict[str, Rule] = {**self._others(), _ALONE: alone}
        for rule, name in names.items():
            table[name] = Recorded(
                run=partial(_layer, rule, kept), note=rule.note, caveat=partial(_caveat, rule, kept)
            )
        return Table(table, partial(self._rewrite, names))

    def _rules(self) -> tuple[LayerRule | None, ...]:
        """All rules of layers with weights."""
        return (self.rule, self.input_rule, *(rule for _, rule in self.composite))

    def _others(self) -> Mapping[str, Rule]:
        """The rules of everything without weights."""
        return relevance(self.bias == "take")

    def _chosen(self, layer: Layer, first: bool, last: bool) -> LayerRule | None:
        """The rule of a layer, where it does not go by ``composite``."""
        return self.input_rule if first else None

    def _rewrite(
        self, names: Mapping[LayerRule, str], graph: fx.Graph, batch: str, starts: Sequence[fx.Node]
    ) -> None:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        matched = set[int]()

        def choose(layer: Layer, first: bool, last: bool) -> str:
            if layer.kind == "scale":
                return _ALONE
            path = layer.key.rpartition("/")[0]
            path = "" if path == "(model)" else path
            fitting = [
                i
                for i, (which, _) in enumerate(self.composite)
                if _matches(which, path, modules[path], layer)
            ]
            matched.update(fitting)
            chosen = self._chosen(layer, first, last)
            return names[chosen or (self.composite[fitting[0]][1] if fitting else self.rule)]

        layers(graph, batch, starts, choose, self._folds)
        missed = [repr(which) for i, (which, _) in enumerate(self.composite) if i not in matched]
        if missed:
            raise InputError(
                f"composite: {', '.join(missed)} matches no layer with weights of the model"
            )


class DeepTaylor(LRP):
    """Deep Taylor decomposition: z⁺ in all layers but the first, and there z^B for bounded inputs or w² for others.

    Everything else as for :class:`LRP`. Hidden values below 0, which ReLU networks do not have, count with the weights below
    0, as in LRP-α1β0.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.
        low, high: Bounds of the input, as the first layer sees it, for z^B; see :class:`ZBox`. None for w².
        bias: What of a bias is in the denominators of z⁺, and so takes relevance: "none" of it, its "positive" part, or the
            "full" one.
        last: The rule of the layer that makes the output; z⁺ by default.
        preset: "innvestigate" for what iNNvestigate 1.0 runs under this name: α1β0 with full biases in every layer, the first
            one too unless there are bounds; batch norms hand relevance on; sums copy it to each term; activations, max and
            average pooling send back their gradient; it starts with the positive part of the output, so that a class with a
            negative one gets nothing. It does not conserve. Operations that iNNvestigate does not know are refused.

    Source: Montavon et al., Pattern Recognition 2017; Alber et al., JMLR 2019 (iNNvestigate).

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> DeepTaylor(model, low=0, high=1).attribute(torch.rand(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    _name = "Deep Taylor"

    def __init__(
        self,
        model: nn.Module,
        *,
        low: float | Tensor | None = None,
        high: float | Tensor | None = None,
        bias: Literal["none", "positive", "full"] = "none",
        last: LayerRule | None = None,
        preset: Literal["innvestigate"] | None = None,
        output: Output = None,
    ) -> None:
        _one_of("bias", bias, ("none", "positive", "full"))
        _one_of("preset", preset, (None, "innvestigate"))
        if (low is None) != (high is None):
            raise InputError("low and high are both bounds of the input: give both or none")
        if preset and (bias != "none" or last is not None):
            raise InputError(
                "preset='innvestigate' says what becomes of biases and of the last layer: leave out bias and last"
            )
        box = None if low is None or high is None else ZBox(low, high)
        rule = _FullBias() if preset or bias == "full" else ZPlus()
        first = box if preset else box or WSquare()
        if last is not None:
            _check_rule(last)
        super().__init__(
            model,
            rule=rule,
            input_rule=first,
            bias="none" if bias == "none" and not preset else "take",
            output=output,
        )
        self.last, self.preset, self._folds = last, preset, preset is None

    def _rules(self) -> tuple[LayerRule | None, ...]:
        return (*super()._rules(), self.last)

    def _chosen(self, layer: Layer, first: bool, last: bool) -> LayerRule | None:
        return super()._chosen(layer, first, last) or (self.last if last else None)

    def _others(self) -> Mapping[str, Rule]:
        return _innvestigate() if self.preset else super()._others()

    def _start(self, output: Tensor, targets: Sequence[Target]) -> Tensor:
        start = super()._start(output, targets)
        return start.clamp(min=0) if self.preset else start


@dataclass(frozen=True)
class _FullBias(ZPlus):
    """z⁺ with the whole bias in the denominator."""

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__(epsilon)

    @property
    def note(self) -> str:
        """The rule in a few words."""
        return "z⁺, the full bias in the denominator"

    def back(
        self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor
    ) -> Back:
        """See :class:`LayerRule`."""
        return _signed(layer, x, weight, True, bias, self.epsilon)


def quotient(r: Tensor, z: Tensor, epsilon: float = 0.0) -> Tensor:
    """R / (z + ε s(z)), and 0 where that is divided by 0: nothing is shared out there."""
    info = torch.finfo(z.dtype)
    if epsilon > info.tiny * info.eps / 2:  # else it is 0 in this dtype
        return r / torch.copysign(z.new_tensor(epsilon), z + 0.0).add_(z)  # + 0 makes 0 of −0
    found: Tensor = torch.ops.aten.threshold_backward(r / z, z.abs(), 0)  # far cheaper than a mask
    return found


def share(
    shift: bool,
    options: Options,
    operation: Any,
    x: tuple[Tensor, ...],
    *arguments: Any,
    **named: Any,
) -> Any:
    """x_i A_ij / z_j for a linear operation A, where z is its value; with ``shift`` what constants add to it is left out."""
    value, back = derivative(operation, x, *arguments, **named)
    z = (
        value - operation(tuple(map(torch.zeros_like, x)), *arguments, **named)
        if shift
        else value.detach()
    )
    return value, lambda r: tuple(part * g for part, g in zip(x, back(quotient(r, z)), strict=True))


def hand_on(
    options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    """An operation whose input gets what its output has."""
    value = operation(x, *arguments, **named)
    return value[0] if isinstance(value, tuple) else value, lambda r: r


def varying(node: fx.Node) -> tuple[int, ...]:
    """The arguments that are no constants: terms of a sum count with their share, whether or not they are explained."""
    return tuple(i for i, n in enumerate(node.args) if varies(n))


def values(node: fx.Node) -> tuple[int, ...]:
    """The factors of a product that are no constants, and no gates."""
    return factors(node, counts=varies)


def _layer(
    rule: LayerRule,
    kept: bool,
    options: Options,
    layer: Layer,
    x: Tensor,
    weight: Any,
    bias: Any,
    norm: Any,
) -> tuple[Tensor, Back]:
    """The value, and a way back that makes what it needs on the way, so that it is not kept for all layers at once."""
    value = layer(x, weight, bias, norm)
    recorded = value.detach()

    def back(r: Tensor) -> Tensor:
        w, b = layer.parameters(weight, bias, norm)
        if b is None:
            b = recorded.new_zeros(recorded.shape[-1 if layer.kind == "dense" else 1])
        return rule.back(layer, x, w, b if kept else None, recorded)(r)

    return value, back


def _signed(
    layer: Layer, x: Tensor, weight: Tensor, up: bool, bias: Tensor | None, epsilon: float
) -> Back:
    """Shares in the sum of the contributions above 0, or of those below, and the bias."""
    first = layer.made(partial(_part, positive=up), weight)
    if _nowhere_negative(x):
        return lambda r: layer.adjoint(
            quotient(r, layer.apply(x, first, bias), epsilon), x, first
        ).mul_(x)
    above, below, second = (
        x.clamp(min=0),
        x.clamp(max=0),
        layer.made(partial(_part, positive=not up), weight),
    )
    z = layer.apply(above, first, bias).add_(layer.apply(below, second))

    def back(r: Tensor) -> Tensor:
        q = quotient(r, z, epsilon)
        return layer.adjoint(q, x, first).mul_(above).addcmul_(layer.adjoint(q, x, second), below)

    return back


def _nowhere_negative(x: Tensor) -> bool:
    return bool(x.min() >= 0)


def _spread(layer: Layer, x: Tensor, weight: Tensor) -> Back:
    """By the shares of weights ≥ 0 alone."""
    z = layer.apply(torch.ones_like(x[:1]), weight)
    return lambda r: layer.adjoint(quotient(r, z), x, weight)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _part(values: Any, positive: bool) -> Any:
    """The positive or the negative part of weights, or of a bias if there is one."""
    return None if values is None else values.clamp(min=0) if positive else values.clamp(max=0)


def _matches(which: Which, path: str, module: nn.Module, layer: Layer) -> bool:
    if isinstance(which, str):
        return fnmatchcase(path, which)
    if not isinstance(which, type):
        return bool(which(path, module))
    return isinstance(module, which) or any(
        layer.name == name and issubclass(kind, which) for kind, name in _TYPES
    )


def _at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, Real) or not 0 <= value < float("inf"):
            raise InputError(f"{name}={value!r} must be a number of at least 0")


def _check_rule(rule: Any) -> None:
    if isinstance(rule, type) or not hasattr(rule, "back"):
        raise InputError(
            f"{rule!r} is no rule: expected Epsilon(), Gamma(), ZPlus() or another of captum_mipin's"
        )
    try:
        hash(rule)
    except TypeError as error:
        raise InputError(
            f"{rule!r} cannot be told from other rules ({error}): make it a frozen dataclass"
        ) from error


def _one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")


def _no(node: fx.Node) -> str | None:
    """No caveat."""
    return None


def _takes(node: Any) -> str | None:
    return (
        "its bias takes relevance" if node.args[2] is not None or node.args[3] is not None else None
    )


def _caveat(rule: LayerRule, kept: bool, node: fx.Node) -> str | None:
    """What a layer with this rule loses."""
    biased, epsilon = _takes(node), getattr(rule, "epsilon", 0)
    told = [
        biased if kept and rule.takes else None,
        f"ε = {epsilon:g} takes relevance" if epsilon else None,
    ]
    if isinstance(
        rule, AlphaBeta
    ):  # below ReLU, an output other than 0 has something positive, if only its bias
        masked = all(operation(user) in ("relu", "relu6") for user in node.users) and (
            kept or not biased
        )
        told.append(_ONE_SIGN if rule.beta or not masked else None)
    return "; ".join(filter(None, told)) or None


def _constant(node: fx.Node) -> str | None:
    return None if len(varying(node)) > 1 else "a constant takes relevance"


def _decided(node: fx.Node) -> str | None:
    return "outside of the definition"


#: Types of modules, and what their operation is called where it is a function.
_TYPES = (
    (nn.Linear, "linear"),
    *((kind, f"conv{dims}d") for dims, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)),
    *(
        (kind, f"conv_transpose{dims}d")
        for dims, kind in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1)
    ),
)  # fmt: skip
_ONE_SIGN = "loses what reaches outputs to which nothing contributes in one direction"
#: ε of layers that no rule is chosen for.
_SMALL = 1e-9
_ALONE = "captum_mipin.alone"
_BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"


def relevance(kept: bool) -> dict[str, Rule]:
    """The rules of everything without weights."""
    table: dict[str, Rule] = {
        name: rule for name, rule in MIPIN.items() if isinstance(rule, Passes)
    }
    rule: Rule
    for name, rule in {**ACTIVATIONS, **NORMALIZATION}.items():
        outside = _decided if name in NORMALIZATION else _no
        table[name] = Recorded(run=hand_on, note="handed on", refuse=rule.refuse, caveat=outside)
    table["aten.glu.default"] = Recorded(
        run=_glu, note="to the value, not the gate", caveat=_decided
    )
    del table[_BATCH_NORM]
    for name, rule in POOLING.items():
        table[name] = _linear(rule, False, "by shares", carriers=varying)
        if "max_pool" in name:
            table[name] = Passes(note="to its switches")
    for name, rule in ARITHMETIC.items():
        sums = any(part in name for part in ("add", "sub", "neg"))
        carriers, caveat = (
            (varying, _constant if kept and "neg" not in name else _no)
            if sums
            else (values, _gated)
        )
        table[name] = _linear(
            rule, sums and not kept, "by shares", carriers=carriers, caveat=caveat
        )
    for name, rule in ATTENTION.items():
        table[name] = _linear(
            rule,
            False,
            "to the values, by the recorded weights",
            carriers=rule.carriers,
            caveat=_decided,
        )
    return table


def _linear(rule: Rule, shift: bool, note: str, **more: Any) -> Recorded:
    run = partial(share, shift)
    return Recorded(
        run=run, note=note, several=True, refuse=rule.refuse, records=rule.records, **more
    )


def _gated(node: fx.Node) -> str | None:
    return "outside of the definition: the gate gets nothing" if len(varying(node)) > 1 else None


def _glu(options: Options, operation: Any, x: Tensor, dim: int = -1) -> tuple[Tensor, Back]:
    return operation(x, dim), lambda r: torch.cat([r, torch.zeros_like(r)], dim)


def _innvestigate() -> dict[str, Rule]:
    """The rules of everything without weights, as iNNvestigate has them."""
    moves = {name: rule for name, rule in MIPIN.items() if isinstance(rule, Passes) and rule.exact}
    gradient = {
        name: Passes(note="gradient", refuse=rule.refuse)
        for name, rule in {**ACTIVATIONS, **POOLING}.items()
    }
    return {
        **moves,
        **gradient,
        "aten.add.Tensor": Passes(note="copied to each term", carriers=varying, caveat=_copied),
        _BATCH_NORM: Recorded(run=hand_on, note="handed on"),
    }


def _copied(node: fx.Node) -> str | None:
    return "relevance is not conserved: each term gets all" if len(varying(node)) > 1 else None
