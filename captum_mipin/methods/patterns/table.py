"""Rules of PatternNet and PatternAttribution for all operations.

Layers with weights, and sums of two signals, have fitted patterns. All other patterns are known: an
operation y = g x has the pattern a = 1 / g, because a g = 1; averages give their signal to each
element. The backward pass of PatternNet uses a as weights, and that of PatternAttribution a ⊙ w.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import mark, marks, original, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.methods.base import Table
from captum_mipin.methods.gates import replace_smooth_gate
from captum_mipin.methods.gradients import run_operator
from captum_mipin.methods.layers import Neurons, Scale, replace_layers
from captum_mipin.methods.lrp.rules import quotient
from captum_mipin.methods.lrp.table import PASS_ON, adjoint_of, gated, outside, values, varying
from captum_mipin.propagation.channels import channels
from captum_mipin.rules import MIPIN, Options, Passes, Recorded, Rule
from captum_mipin.rules.activations import ACTIVATIONS
from captum_mipin.rules.arithmetic import ARITHMETIC
from captum_mipin.rules.attention import ATTENTION
from captum_mipin.rules.base import Back, derivative, value_and_adjoint, varies
from captum_mipin.rules.gates import factors
from captum_mipin.rules.linear_maps import COPIES, MIXES, mixed, sizes
from captum_mipin.rules.normalization import NORMALIZATION, SCALES
from captum_mipin.rules.pooling import POOLING, shared_out
from captum_mipin.rules.selection import QUANTILES

_LAYER, _MERGE = "captum_mipin.layer", "captum_mipin.merge"


@dataclass(frozen=True, kw_only=True)
class Merge(Neurons):
    """A sum or difference of two signals: one neuron per channel, with the weights 1 and ±1."""

    def products(self, x: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        """Return Σ x_i s for both terms x_i, a tensor (channels, 2); x has shape (2, *s.shape)."""
        return torch.stack([self.outputs(term * s).sum(0) for term in x], 1)

    def coefficients(self, value: Tensor, named: Mapping[str, Any]) -> Tensor:
        """Return the coefficients of both terms, a tensor (channels, 2)."""
        alpha = named.get("alpha", 1) * (-1 if self.name == "sub" else 1)
        return value.new_tensor([1.0, float(alpha)]).expand(value.shape[self.dim], 2)

    @staticmethod
    def of(operation: Any) -> "Merge":
        """Return the merge from the operation that a rule gets, a ``partial`` with the merge."""
        merge: Merge = operation.args[0]
        return merge


def pattern_rules(
    layer: Callable[..., Any], merge: Callable[..., Any], *, attribution: bool
) -> Table:
    """Return the table of a method with patterns.

    Args:
        layer: Function that runs a layer with weights, the ``run`` of its
            :class:`~captum_mipin.rules.Recorded`.
        merge: Function that runs a sum of two signals, in the same form.
        attribution: True to multiply patterns by weights, for PatternAttribution.
    """
    rules: dict[str, Rule] = {
        **{name: rule for name, rule in MIPIN.items() if isinstance(rule, Passes)},
        _LAYER: Recorded(run=layer, note="patterns times weights" if attribution else "patterns"),
        _MERGE: Recorded(
            run=merge, note="patterns by channel", several=True, carriers=lambda node: (0, 1)
        ),
    }
    for name, activation in ACTIVATIONS.items():
        rules[name] = Passes(note="derivative", refuse=activation.refuse)
    run: Any = partial(_gated, attribution)
    rules["aten.glu.default"] = Recorded(run=run, note="to the value, not the gate", caveat=outside)
    for name, pool in POOLING.items():
        run = partial(run_operator, partial(_averaged, attribution))
        average = Recorded(run=run, note="evenly", refuse=pool.refuse)
        rules[name] = Passes(note="to its switches") if "max_pool" in name else average
    for name, copy in {**COPIES, **QUANTILES}.items():
        rules[name] = adjoint_of(copy, "to the copied value") if attribution else copy
    for name, mix in MIXES.items():
        run = partial(mixed, sizes(name), not attribution)
        rules[name] = replace(mix, run=run, note="evenly" if attribution else mix.note)
    for name, rule in ARITHMETIC.items():
        if any(part in name for part in ("mul", "div", "neg")):
            rules[name] = Recorded(
                run=partial(run_operator, partial(_multiplied, attribution)),
                note="passed on" if attribution else "divided by what it was multiplied by",
                several=True,
                carriers=values,
                records=rule.records,
                refuse=rule.refuse,
                caveat=gated,
            )
        else:
            rules[name] = Recorded(
                run=partial(_shifted, attribution),
                note="passed on",
                carriers=varying,
                refuse=rule.refuse,
            )
    rules.update({name: _product(rule) for name, rule in ATTENTION.items()})
    for name in NORMALIZATION if attribution else SCALES:
        run = PASS_ON if attribution else partial(_normalised, SCALES[name])
        note = "passed on" if attribution else "divided by the scale of the sample"
        rules[name] = Recorded(run=run, note=note, caveat=outside)
    return Table(rules, _rewrite)


def _rewrite(graph: fx.Graph, batch: str, starts: Sequence[fx.Node]) -> None:
    """Replace layers with weights by :class:`Layer`, and sums of two signals by :class:`Merge`."""
    replace_layers(graph, starts, lambda layer, first, last: _LAYER)
    node: Any
    for node in graph.nodes:
        name = operation(node)
        if name in ("add", "sub") and len(node.args) == 2 and all(map(varies, node.args)):
            mark(node, original=original(node))
            sizes = list(map(str, value_of(node).shape))
            dim = channels(node, sizes.index(batch) if batch in sizes else 0)
            node.target = Merge(
                rule=_MERGE, name=name, run=node.target, key=marks(node).key, dim=dim or 0
            )
        else:
            replace_smooth_gate(node)
    _mark_last(graph)


def _mark_last(graph: fx.Graph) -> None:
    """Set ``last`` of the operations with neurons that no further neurons follow."""
    waiting, seen = list(graph.output_node().all_input_nodes), set[Any]()
    while waiting:
        node: Any = waiting.pop()
        if isinstance(node.target, Neurons) and not isinstance(node.target, Scale):
            node.target = replace(node.target, last=True)
        elif node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)


def _scaled(
    attribution: bool, operator: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Back]:
    """Run y = g ⊙ x; the backward function returns s / g, or s for attributions, and 0 if g = 0."""
    g = operator(torch.ones_like(x))
    # pattern a = 1 / g; for attributions a g = 1
    factor = (g != 0).to(g) if attribution else reciprocal(g)
    return operator(x), lambda s: (s * factor).sum_to_size(x.shape)


def _gated(
    attribution: bool, options: Options, operation: Any, x: Tensor, dim: int = -1
) -> tuple[Tensor, Back]:
    """Run y = a ⊙ σ(b) for x = (a, b), as the product with the recorded gate σ(b)."""
    a, b = x.chunk(2, dim)
    value, back = _scaled(attribution, lambda t: t * b.sigmoid(), a)
    return value, lambda s: torch.cat([back(s), torch.zeros_like(s)], dim)


def _product(rule: Rule) -> Recorded:
    """Return the rule of a matrix product, by its rule in MIP-IN."""
    return Recorded(
        run=partial(run_operator, _adjoint),
        note="adjoint with the recorded weights",
        several=True,
        carriers=values if rule.carriers is factors else rule.carriers,
        records=True,
        refuse=rule.refuse,
        caveat=outside,
    )


def _multiplied(
    attribution: bool, operator: Callable[..., Tensor], x: tuple[Tensor, ...]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Run y = x_1 ⊙ ... ⊙ x_n; each factor gets the n-th part of the signal by :func:`_scaled`.

    So the patterns a of the factors satisfy wᵀa = 1 together, where w is the derivative of y.
    """

    def alone(at: int) -> Callable[[Tensor], Tensor]:
        return lambda t: operator((*x[:at], t, *x[at + 1 :]))

    backs = [_scaled(attribution, alone(at), part)[1] for at, part in enumerate(x)]
    return operator(x), lambda s: tuple(back(s / len(x)) for back in backs)


def _adjoint(
    operator: Callable[..., Tensor], x: tuple[Tensor, ...]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Run a matrix product of n signals; each factor gets the n-th part of the adjoint."""
    value, back = derivative(operator, x)
    return value, lambda s: back(s / len(x))


def _shifted(
    attribution: bool, options: Options, operation: Any, x: Tensor, *arguments: Any, **named: Any
) -> tuple[Tensor, Back]:
    """Run y = g x + c with a constant c, such as 1 − x; see :func:`_scaled`, which has c = 0."""
    constant, *others = arguments
    zero = torch.zeros_like(constant) if isinstance(constant, Tensor) else 0
    _, back = _scaled(attribution, lambda t: operation(t, zero, *others, **named), x)
    return operation(x, *arguments, **named), back


def _normalised(
    scale: Callable[..., Tensor], options: Options, operation: Any, x: Tensor, *arguments: Any
) -> tuple[Tensor, Back]:
    """Run a normalisation; the backward function returns s / g, with g = γ / σ of the sample."""
    return operation(x, *arguments), lambda s: quotient(s, scale(x, *arguments).expand_as(x))


def _averaged(
    attribution: bool, average: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Back]:
    """Run an average; the backward function gives its signal to each of its elements.

    If windows overlap, an element gets the mean of the signals of its windows in PatternNet, and
    the weighted sum of these signals in PatternAttribution.
    """
    if not attribution:
        return shared_out(average, x, recorded=False)
    value, back = value_and_adjoint(average, x)
    weights = average(torch.ones_like(x))  # Σ_i p_i, the sum of the weights; 1 for an average
    return value, lambda s: back(s / weights)


def reciprocal(g: Tensor) -> Tensor:
    """Return 1 / g, and 0 where g is 0."""
    return 1 / g.masked_fill(g == 0, torch.inf)
