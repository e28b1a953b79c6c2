"""Ridge regression by its dual, for fewer rows than signals."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from captum_mipin.regression.ridge import RidgeScale, penalties, share, solve_symmetric


class Rows:
    """Features of few examples, row by row, centred.

    Args:
        x: (rows, features).

    Attributes:
        x: (rows, features) centred, in the dtype of the argument.
        mean: (features,) float64.
    """

    def __init__(self, x: Tensor) -> None:
        mean = x.mean(0)
        self.x = x - mean
        # What rounding left of the mean: centring in float64 would take twice the memory.
        rest = self.x.mean(0)
        self.x -= rest
        self.mean = mean.double() + rest.double()

    @cached_property
    def gram(self) -> Tensor:
        """Return X Xᵀ, (rows, rows) float64."""
        return (self.x @ self.x.mT).double()


@dataclass(frozen=True)
class RowSolution:
    """A solved regression x ≈ Xᵀ coefficients · s + bias, where X are the centred :class:`Rows`.

    Attributes:
        coefficients: (rows, ds) float64.
        bias: (dx,) float64.
        explained_variance: As for :class:`~captum_mipin.regression.ridge.Solution`; NaN if it was
            not measured.
        dead: Number of signals that never vary; their coefficients are zero.
        condition: As for :class:`~captum_mipin.regression.ridge.Solution`.
    """

    coefficients: Tensor
    bias: Tensor
    explained_variance: float
    dead: int
    condition: float


def solve_rows(
    rows: Rows,
    s: Tensor,
    ridge: float = 1e-3,
    scale: RidgeScale = "relative",
    *,
    measure: bool = True,
) -> RowSolution:
    """Solve the regression of :func:`~captum_mipin.regression.ridge.solve` by its dual.

    The matrix to solve with has a row for each row of the data, instead of one for each signal.

    Args:
        rows: The features.
        s: (rows, ds) signals.
        ridge: λ, as for :func:`~captum_mipin.regression.ridge.solve`.
        scale: What λ is measured in, as for :func:`~captum_mipin.regression.ridge.solve`.
        measure: Whether to measure the explained variance, which takes the product of all rows of
            features with each other.

    Examples:
        >>> x, s = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 30, dtype=torch.float64)
        >>> solution = solve_rows(Rows(x), s, ridge=0)
        >>> torch.allclose(s @ solution.coefficients.mT @ Rows(x).x + solution.bias, x)
        True
    """
    s = s.to(torch.float64, copy=True)
    n, mean = len(s), s.mean(0)
    s -= mean
    penalty, dead = penalties(s.square().mean(0), mean, ridge, scale, n)
    s.masked_fill_(dead, 0.0)
    gram = s @ s.mT
    added = torch.full_like(gram[0], n * float(penalty.max()))  # λ is the same for all signals
    none = torch.zeros_like(added, dtype=torch.bool)
    # eq. 6: cov(X, S) (cov(S, S) + λI)^-1 = Xᵀ K S with K = (S Sᵀ + nλI)^-1
    right = torch.cat([s, gram], 1) if measure else s
    solved, condition = solve_symmetric(gram, right, added, none, ridge)  # K S, and K S Sᵀ
    coefficients = solved[:, : s.shape[1]]
    # eq. 6: b = E X − Xᵀ K S E S
    bias = rows.mean - (rows.x.mT @ (coefficients @ mean).to(rows.x.dtype)).double()
    explained = float("nan")
    if measure:
        # S Sᵀ K X is predicted. The residual is R X with R = I − S Sᵀ K, its square tr(R X Xᵀ R).
        residual = torch.eye(n).to(gram) - solved[:, s.shape[1] :]
        total = rows.gram.diagonal().sum()
        explained = share(total - (residual @ rows.gram * residual).sum(), total)
    return RowSolution(coefficients, bias, explained, int(dead.sum()), condition)
