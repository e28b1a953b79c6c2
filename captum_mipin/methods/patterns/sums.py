"""The estimators of patterns: sums over the rows of each batch, and the patterns from these sums.

A row is one sample at one position. The pattern a of a neuron y = wᵀx + b satisfies wᵀa = 1. With
E₊ the mean over selected rows, and E the mean over all rows (Kindermans et al., equations 5 and 7):

    a = (E₊[x y] − E₊[x] E[y]) / wᵀ(E₊[x y] − E₊[x] E[y])

The linear estimator selects all rows; then a = cov(x, y) / var(y). The estimator S_a+ selects for
each neuron the rows in which it is active.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from captum_mipin.methods.layers import Neurons

#: Largest ratio of |wᵀc| to the sizes of its terms at which wᵀc counts as rounding error.
_CONSTANT = 1e-12


class Sums(NamedTuple):
    """The sums in float64 from which patterns are computed.

    ``number``, ``x`` and ``xy`` are sums over the selected rows of each neuron, ``rows`` and ``y``
    over all rows.

    Attributes:
        number: (neurons,) the number of selected rows.
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
        """Apply a function to each attribute, together with the same attribute of ``others``."""
        return Sums(*map(function, self, *others))


def sums_of(
    neurons: Neurons, x: Tensor, weight: Tensor, linear: Tensor, active: Tensor | None
) -> Sums:
    """Return the sums over one batch.

    Args:
        neurons: The operation with neurons.
        x: The operation's input.
        weight: W, the operation's weights.
        linear: y without the bias.
        active: Bool tensor shaped like y, True if the row is selected for the neuron. None to
            select all rows.
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
    """Return the patterns of all neurons, and a mask of the dead neurons.

    Args:
        sums: Sums over all batches.
        neurons: The operation with neurons.
        weight: W, the operation's weights, in float64.

    Returns:
        The patterns, shaped like the weights, and a bool tensor (neurons,), True for dead neurons:
        those without variance or never active. Their patterns are 0.
    """
    count, mean = sums.number.clamp(min=1), sums.y / sums.rows.clamp(min=1)

    def total(values: Tensor) -> Tensor:
        return neurons.by_neuron(values).sum(1)

    # a = c / wᵀc with c = E₊[x y] − E₊[x] E[y]
    c = (sums.xy - sums.x * neurons.spread(mean, weight)) / neurons.spread(count, weight)
    scale = total(weight * c)
    # wᵀc is a difference of terms: if it is far smaller than they are, it is rounding error
    terms = total((weight * sums.xy).abs()) + total((weight * sums.x).abs()) * mean.abs()
    dead = scale.abs() <= _CONSTANT * terms / count
    return c / neurons.spread(scale.masked_fill(dead, torch.inf), weight), dead
