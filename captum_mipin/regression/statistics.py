"""Mean and standard deviation of each element of a tensor over data, in one pass and in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_mipin.errors import FitError


@dataclass(frozen=True)
class Statistics:
    """First and second moments of each element, over any chunks of data in any order.

    Attributes:
        count: Values of each element.
        mean: Their mean.
        squares: Sum of their squared deviations from it.
        nonzero: How many of the values are not zero.

    Examples:
        >>> x = torch.randn(100, 4, dtype=torch.float64)
        >>> parts = Statistics.of(x[:30]).merged(Statistics.of(x[30:]))
        >>> torch.allclose(parts.mean, x.mean(0)), torch.allclose(parts.std, x.std(0))
        (True, True)
    """

    count: int
    mean: Tensor
    squares: Tensor
    nonzero: Tensor

    @classmethod
    def of(cls, x: Tensor, across: Sequence[int] = ()) -> "Statistics":
        """Return the statistics of one chunk.

        Args:
            x: (examples, ...).
            across: Dimensions along which elements share their moments; they keep size 1.
        """
        x = x.detach().to(torch.float64)
        dims = [0, *across]
        mean = x.mean(dims, keepdim=True)
        squares = (x - mean).square().sum(dims, keepdim=True)
        nonzero = (x != 0).sum(dims, keepdim=True)
        return cls(x.numel() // mean.numel(), mean[0], squares[0], nonzero[0])

    def merged(self, other: "Statistics") -> "Statistics":
        """Return the statistics of both chunks together."""
        count = self.count + other.count
        step, share = other.mean - self.mean, other.count / count
        # Chan et al.: the squares of both, and n₁ n₂ / n (mean₂ − mean₁)²
        squares = self.squares + other.squares + step.square() * (self.count * share)
        return Statistics(count, self.mean + step * share, squares, self.nonzero + other.nonzero)

    @property
    def std(self) -> Tensor:
        """Return the standard deviation of each element, with count − 1 in the denominator.

        Raises:
            FitError: There are fewer than two values.
        """
        if self.count < 2:
            raise FitError(
                f"the data has {self.count} example, expected at least two: a standard deviation "
                "needs them. Pass more data."
            )
        return (self.squares / (self.count - 1)).sqrt()
