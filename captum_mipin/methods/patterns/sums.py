"""The estimators of patterns: sums over the rows of each batch, and what follows from them.

A neuron y = wᵀx + b reads a signal out of x; its pattern a satisfies wᵀa = 1. With E₊ the mean over
the rows that count, and E the mean over all rows (Kindermans et al., equations 5 and 7):

    a = (E₊[x y] − E₊[x] E[y]) / wᵀ(E₊[x y] − E₊[x] E[y])

If all rows count, that is a = cov(x, y) / var(y), the linear estimator. For the estimator S_a+ a
row counts for the neurons that are active there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from captum_mipin.methods.layers import Neurons

#: Share of a variance below which it is rounding error.
_CONSTANT = 1e-12


class Sums(NamedTuple):
    """Sums over the rows that count for each neuron, in float64.

    Attributes:
        number: (neurons,) the number of these rows.
        x: Σ x_i for each weight, shaped like the weights.
        xy: Σ x_i y_j for each weight, shaped like the weights.
        rows: (1,) the number of all rows.
        y: (neurons,) Σ y_j over all rows.
    """

    number: Tensor
    x: Tensor
    xy: Tensor
    rows: Tensor
    y: Tensor

    def mapped(self, function: Callable[..., Tensor], *others: "Sums") -> "Sums":
        """Return function(part, *parts of others) for each part."""
        return Sums(*map(function, self, *others))


def sums_of(
    neurons: Neurons, x: Tensor, weight: Tensor, linear: Tensor, active: Tensor | None
) -> Sums:
    """Return the sums over one batch.

    Args:
        neurons: The operation.
        x: Its input.
        weight: W.
        linear: y without its bias.
        active: Shaped like y, True where a row counts for a neuron; None if all rows count.
    """
    if x.element_size() < 4:  # half precision has too few digits for products
        x, weight, linear = x.float(), weight.float(), linear.float()
    counts = torch.ones_like(linear) if active is None else active.to(linear)
    rows, y = neurons.outputs(counts).double(), neurons.outputs(linear).double()
    count = rows.sum(0)
    mean = ((rows * y).sum(0) / count.clamp(min=1)).to(linear)
    sum_x = neurons.products(x, counts, weight).double()
    # Σ x y = Σ x (y − ȳ) + ȳ Σ x: products of centred y lose fewer digits in the dtype of x
    centred = neurons.shifted(linear, -mean)
    products = neurons.products(x, counts * centred, weight).double()
    sum_xy = products + sum_x * neurons.spread(mean.double(), weight)
    return Sums(count, sum_x, sum_xy, y.new_tensor([len(y)]), y.sum(0))


def solve(sums: Sums, neurons: Neurons, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pattern of each neuron, and which neurons are dead.

    Args:
        sums: Sums over all batches.
        neurons: The operation.
        weight: W, in float64.

    Returns:
        Patterns, shaped like the weights, and (neurons,) True for a dead neuron: one without
        variance or one that is never active, whose pattern is 0.
    """
    count, mean = sums.number.clamp(min=1), sums.y / sums.rows.clamp(min=1)

    def total(values: Tensor) -> Tensor:
        return neurons.by_neuron(values).sum(1)

    # a = c / wᵀc with c = E₊[x y] − E₊[x] E[y]
    c = (sums.xy - sums.x * neurons.spread(mean, weight)) / neurons.spread(count, weight)
    scale = total(weight * c)
    # wᵀc is rounding error if it is far below the size of the terms that it is the difference of
    terms = total((weight * sums.xy).abs()) + total((weight * sums.x).abs()) * mean.abs()
    dead = scale.abs() <= _CONSTANT * terms / count
    return c / neurons.spread(scale.masked_fill(dead, torch.inf), weight), dead
