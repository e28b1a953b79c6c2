"""Ridge regression by its dual, which is faster for fewer rows than signals."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from captum_mipin.regression.ridge import RidgeScale, penalties, share, solve_symmetric


class Rows:
    """The centred features of a regression with few rows.

    Args:
        x: Tensor (rows, features).

    Attributes:
        x: Tensor (rows, features), the features less their mean, in the dtype of the argument.
        mean: Float64 tensor (features,), the mean.
    """

    def __init__(self, x: Tensor) -> None:
        mean = x.mean(0)
        self.x = x - mean
        # Subtract also the mean that rounding has left. Float64 would need twice the memory.
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
        coefficients: Float64 tensor (rows, signals).
        bias: Float64 tensor (features,).
        explained_variance: As for :class:`~captum_mipin.regression.ridge.Solution`; NaN if it was
            not measured.
        dead: Number of signals that never vary; their coefficients are zero.
        condition: Condition number, as for :class:`~captum_mipin.regression.ridge.Solution`.
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

    The matrix of the linear system has size (rows, rows) instead of (signals, signals).

    Args:
        rows: The centred features.
        s: Tensor (rows, signals), the signals.
        ridge: λ, as for :func:`~captum_mipin.regression.ridge.solve`.
        scale: The unit of λ, as for :func:`~captum_mipin.regression.ridge.solve`.
        measure: True to measure the explained variance. This needs the Gram matrix of the rows of
            features.

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
    # eq. 6 for n centred rows: cov(X, S) (cov(S, S) + λI)^-1 = Xᵀ K S, K = (S Sᵀ + nλI)^-1
    right = torch.cat([s, gram], 1) if measure else s
    solved, condition = solve_symmetric(gram, right, added, none, ridge)  # K S, and K S Sᵀ
    coefficients = solved[:, : s.shape[1]]
    # eq. 6: b = E[X] − Xᵀ K S E[S]
    bias = rows.mean - (rows.x.mT @ (coefficients @ mean).to(rows.x.dtype)).double()
    explained = float("nan")
    if measure:
        # prediction S Sᵀ K X, residual R X with R = I − S Sᵀ K, squared residual tr(R X Xᵀ R)
        residual = torch.eye(n).to(gram) - solved[:, s.shape[1] :]
        total = rows.gram.diagonal().sum()
        explained = share(total - (residual @ rows.gram * residual).sum(), total)
    return RowSolution(coefficients, bias, explained, int(dead.sum()), condition)
