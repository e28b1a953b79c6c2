"""Excitation backprop: probabilities of winning, from the output down, along excitatory weights alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from captum_mipin.methods.gradients import derivative
from captum_mipin.methods.layers import Layer
from captum_mipin.methods.lrp import LRP, LayerRule, quotient, relevance
from captum_mipin.propagation.runtime import seed
from captum_mipin.rules import Options, Recorded, Rule
from captum_mipin.rules.arithmetic import ARITHMETIC
from captum_mipin.rules.base import Back
from captum_mipin.types import Output, Target


@dataclass(frozen=True)
class Excitation:
    """P_i = Σ_j x_i⁺ w_ij⁺ / Σ_i' x_i'⁺ w_i'j⁺ P_j; with ``contrast``, minus the same of −w."""

    contrast: bool = False
    takes = False

    @property
    def note(self) -> str:
        """The rule in a few words."""
        return "probabilities of winning" + (
            ", minus those for the negated weights" if self.contrast else ""
        )

    def back(
        self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor
    ) -> Back:
        """See :class:`~captum_mipin.methods.lrp.LayerRule`."""
        excited = x if bool(x.min() >= 0) else x.clamp(min=0)

        def won(p: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
            made = layer.made(of, weight)
            return layer.adjoint(quotient(p, layer.apply(excited, made)), x, made).mul_(excited)

        def back(p: Tensor) -> Tensor:
            found = won(p, _above)
            return found.sub_(won(p, _below)) if self.contrast else found

        return back


class ExcitationBackprop(LRP):
    """Excitation backprop: the probability that the winner of a contest among neurons came along each input.

    It starts with 1 at the target. Through a layer with weights, batch norm folded in, each neuron chooses among its inputs by
    their excitation x⁺ w⁺. Sums choose by the positive parts of their terms, averages by shares; the rest is as for
    :class:`LRP`. The method is defined for values of at least 0, as they are behind ReLU: what is below 0 excites nothing, so
    an image normalised to both signs is best explained at a layer, with :class:`LayerPropagation`.

    Args:
        model, output: As for all methods, see :class:`~captum_mipin.methods.base.Propagation`.
        contrastive: From what the layer that makes the output sends back, take off what it would with its weights negated: what
            speaks for the class more than against it. The attributions then add up to about 0, and their positive part is what
            is usually shown.

    Source: Zhang et al., ECCV 2016 and IJCV 2018.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> p = ExcitationBackprop(model).attribute(torch.rand(2, 4), target=1)
        >>> bool((p >= 0).all()), bool((p.sum(1) < 1.001).all())
        (True, True)
    """

    _name = "Excitation backprop"

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
        table = relevance(False)
        for name, rule in table.items():
            if isinstance(rule, Recorded) and rule.several:
                table[name] = replace(
                    rule, run=_combined if name in ARITHMETIC else _averaged, note="by excitation"
                )
        return table

    def _start(self, output: Tensor, targets: Sequence[Target]) -> Tensor:
        return seed(output, targets, unit=True)


def _averaged(
    options: Options, operation: Any, x: tuple[Tensor, ...], *arguments: Any, **named: Any
) -> Any:
    """P by the shares of what is above 0, through a linear operation without negative weights."""
    excited = tuple(part.clamp(min=0) for part in x)
    z, back = derivative(operation, excited, *arguments, **named)
    value = operation(x, *arguments, **named)
    return value, lambda p: tuple(
        part * g for part, g in zip(excited, back(quotient(p, z)), strict=True)
    )


def _combined(
    options: Options, operation: Any, x: tuple[Tensor, ...], *arguments: Any, **named: Any
) -> Any:
    """P by the positive parts of what each argument adds to the value, element by element."""

    def back(p: Tensor) -> tuple[Tensor, ...]:
        zeros = tuple(part.new_zeros(()) for part in x)
        constant = operation(zeros, *arguments, **named)
        alone = (
            operation((*zeros[:i], part, *zeros[i + 1 :]), *arguments, **named)
            for i, part in enumerate(x)
        )
        terms = [(value - constant).clamp_(min=0) for value in alone]
        q = quotient(p, sum(terms[1:], terms[0]))
        return tuple(
            (term * q).sum_to_size(part.shape) for term, part in zip(terms, x, strict=True)
        )

    return operation(x, *arguments, **named), back


def _above(weight: Tensor) -> Tensor:
    return weight.clamp(min=0)


def _below(weight: Tensor) -> Tensor:
    return weight.clamp(max=0).neg_()
