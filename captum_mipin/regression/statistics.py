"""Mean and standard deviation per element of a tensor over the data, in one pass, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_mipin.errors import FitError


@dataclass(frozen=True)
class Statistics:
    """First and second moments of each element; chunks of data may be merged in any order.

    Attributes:
        count: Number of values per element.
        mean: Float64 tensor (...), the mean of each element's values.
        squares: Float64 tensor (...), the sum of squared deviations from the mean.
        nonzero: Integer tensor (...), the number of values that are not zero.

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
            x: Tensor (examples, ...), the values.
            across: Dimensions of ``x`` whose elements share their moments; they get size 1 in the
                result.
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
        # Chan et al., 1983: squares = squares₁ + squares₂ + n₁ n₂ / n (mean₂ − mean₁)²
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
                f"the data has {self.count} example, expected at least two, which a standard "
                "deviation needs. Pass more data."
            )
        return (self.squares / (self.count - 1)).sqrt()
