"""Mean and standard deviation of every element of a tensor over data, gathered in one pass, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_mipin.errors import FitError


@dataclass(frozen=True)
class Statistics:
    """Moments of each element; sums over chunks of data, in any order and any chunks.

    Attributes:
        count: Values of each element.
        mean: Their mean.
        squares: Sum of their squared deviations from it.
        nonzero: How many of them are not zero.

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
        """Of a chunk (examples, ...); dimensions ``across`` which elements share their moments keep size 1."""
        x = x.detach().to(torch.float64)
        dims = [0, *across]
        mean = x.mean(dims, keepdim=True)
        squares, nonzero = (
            (x - mean).square().sum(dims, keepdim=True),
            (x != 0).sum(dims, keepdim=True),
        )
        return cls(x.numel() // mean.numel(), mean[0], squares[0], nonzero[0])

    def merged(self, other: "Statistics") -> "Statistics":
        """Those of both chunks together (Chan et al.)."""
        count = self.count + other.count
        step = other.mean - self.mean
        squares = self.squares + other.squares + step.square() * (self.count * other.count / count)
        return Statistics(
            count, self.mean + step * (other.count / count), squares, self.nonzero + other.nonzero
        )

    @property
    def std(self) -> Tensor:
        """Standard deviations, with count − 1.

        Raises:
            FitError: There are fewer than two values.
        """
        if self.count < 2:
            raise FitError(
                f"the data has {self.count} example, expected at least two: a standard deviation needs them"
            )
        return (self.squares / (self.count - 1)).sqrt()
