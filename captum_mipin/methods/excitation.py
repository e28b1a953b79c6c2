"""Excitation backprop: winning probabilities of neurons, computed from the output to the input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from captum_mipin.methods.gradients import run_operator
from captum_mipin.methods.layers import Layer
from captum_mipin.methods.lrp.lrp import LRP
from captum_mipin.methods.lrp.rules import LayerCall, LayerRule, quotient
from captum_mipin.methods.lrp.table import relevance, share, values
from captum_mipin.rules import Options, Recorded, Rule
from captum_mipin.rules.arithmetic import ARITHMETIC
from captum_mipin.rules.attention import ATTENTION
from captum_mipin.rules.base import Back
from captum_mipin.rules.linear_maps import SIZES
from captum_mipin.types import Output


@dataclass(frozen=True)
class Excitation(LayerRule):
    """The rule of layers with weights: P_i = Σ_j x_i⁺ w_ij⁺ / (Σ_i' x_i'⁺ w_i'j⁺) P_j.

    Here P_i and P_j are the winning probabilities of input i and output j, x_i is the value of
    input i, w_ij its weight, and ⁺ the positive part.

    Args:
        contrast: True to subtract the result of the same rule for the weights −w.
    """

    contrast: bool = False
    label = "probabilities of winning{0.contrasted}"

    @property
    def contrasted(self) -> str:
        """Return the text that is added to the note if ``contrast`` is True; otherwise empty."""
        return ", minus those for the negated weights" if self.contrast else ""

    def back(self, call: LayerCall) -> Back:
        """Return the backward function of one call, see :class:`LayerRule`."""
        excited = call if call.positive else replace(call, x=call.x.clamp(min=0))

        def won(p: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
            weight = excited.made(part)
            return excited.shares(p, excited.layer.apply(excited.x, weight), weight)

        def back(p: Tensor) -> Tensor:
            wins = won(p, _excitatory)
            return wins.sub_(won(p, _inhibitory)) if self.contrast else wins

        return back


class ExcitationBackprop(LRP):
    """Excitation backprop: the probability that each input is selected.

    The selection starts from the target at the output, which wins with probability 1. In a layer
    with weights (with a folded batch norm), each winning neuron selects one of its inputs as a
    winner, with a probability in proportion to the excitation x⁺ w⁺. Sums select by
    the positive parts of their terms, and averages by shares. All other operations have the rules
    of :class:`LRP`. The method is defined for values of at least 0, such as the outputs of ReLU: a
    negative value is never selected. If normalised images have negative values, explain a layer
    with :class:`LayerPropagation` instead.

    Args:
        model: The network, see :class:`~captum_mipin.methods.base.Propagation`.
        contrastive: True to subtract, at the last layer, the result for negated weights. The
            positive part of the attributions is then the evidence that the target has beyond that
            of other classes. The attributions sum to about 0; usually only their positive part is
            shown.
        output: The output to explain if the model returns several tensors.

    Source: Zhang et al., ECCV 2016 and IJCV 2018.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> p = ExcitationBackprop(model).attribute(torch.rand(2, 4), target=1)
        >>> bool((p >= 0).all()), bool((p.sum(1) < 1.001).all())
        (True, True)
    """

    _name = "Excitation backprop"
    _unit = True

    def __init__(
        self, model: nn.Module, *, contrastive: bool = False, output: Output = None
    ) -> None:
        super().__init__(model, rule=Excitation(), bias="none", output=output)
        self.contrastive = contrastive

    def _rules(self) -> tuple[LayerRule | None, ...]:
        return (*super()._rules(), Excitation(contrast=True))

    def _chosen(self, layer: Layer, first: bool, last: bool) -> LayerRule | None:
        return Excitation(contrast=True) if last and self.contrastive else None

    def _others(self) -> Mapping[str, Rule]:
        table = relevance(takes=False)
        for name, rule in table.items():
            if isinstance(rule, Recorded) and rule.several:
                part = _combined if name in ARITHMETIC else _averaged
                if name in ATTENTION or (name in ARITHMETIC and rule.carriers is values):
                    part = partial(_multiplied, part)
                run: Any = partial(run_operator, part)
                run = partial(_excited, SIZES[name]) if name in SIZES else run
                table[name] = replace(rule, run=run, note="by excitation")
        return table


def _averaged(operator: Callable[..., Tensor], x: tuple[Tensor, ...]) -> Any:
    """Distribute P through a linear operator with weights a ≥ 0, by the shares of x⁺.

    Args:
        operator: The linear operator.
        x: All of its arguments that get probability.

    Returns:
        The operator's value, and the backward function.
    """
    # P_i = x_i⁺ Σ_j a_ij P_j / Σ_i' a_i'j x_i'⁺
    excited = tuple(part.clamp(min=0) for part in x)
    return operator(x), share(False, operator, excited)[1]


def _multiplied(
    alone: Callable[..., Any], operator: Callable[..., Tensor], x: tuple[Tensor, ...]
) -> Any:
    """Distribute P over the factors of a product, in equal parts; by ``alone`` to a single one."""
    value, back = (_averaged if len(x) > 1 else alone)(operator, x)
    return value, lambda p: back(p / len(x))


def _excited(
    sizes: Callable[..., Any], options: Options, run: Any, x: tuple[Tensor, ...], *arguments: Any
) -> Any:
    """Distribute P through a linear operator L of both signs, by the shares of x⁺ L⁺.

    Args:
        sizes: Function (operation, x, \\*arguments) → the operator |L|.
        options: The options of the pass, which have no influence.
        run: The operation.
        x: All arguments that get probability.
        arguments: The other arguments.
    """
    size = sizes(run, x, *arguments)

    def positive(parts: tuple[Tensor, ...]) -> Tensor:
        result: Tensor = (run(parts, *arguments) + size(parts)) / 2  # L⁺ = (L + |L|) / 2
        return result

    return run(x, *arguments), _averaged(positive, x)[1]


def _combined(operator: Callable[..., Tensor], x: tuple[Tensor, ...]) -> Any:
    """Distribute P over the arguments of an elementwise operation, by their terms' positive parts.

    The term of an argument is the operator's value if all other arguments are 0, without constants.

    Args:
        operator: The operation, as a function of ``x``.
        x: All arguments that get probability.

    Returns:
        The operator's value, and the backward function.
    """

    def back(p: Tensor) -> tuple[Tensor, ...]:
        zeros = tuple(part.new_zeros(()) for part in x)
        constant = operator(zeros)
        alone = (operator((*zeros[:i], part, *zeros[i + 1 :])) for i, part in enumerate(x))
        terms = [(value - constant).clamp_(min=0) for value in alone]
        q = quotient(p, sum(terms[1:], terms[0]))
        return tuple(
            (term * q).sum_to_size(part.shape) for term, part in zip(terms, x, strict=True)
        )

    return operator(x), back


def _excitatory(weight: Tensor) -> Tensor:
    return weight.clamp(min=0)


def _inhibitory(weight: Tensor) -> Tensor:
    return weight.clamp(max=0).neg_()
