"""Ridge regression by its dual, which is faster for fewer rows than signals."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.regression.ridge import (
    RidgeScale,
    Solution,
    penalties,
    share,
    solve_own,
    solve_symmetric,
)


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


class _Kernel:
    """The linear system of a regression with few rows.

    Args:
        s: Tensor (rows, signals), the signals.
        ridge: λ.
        scale: The unit of λ, as for :func:`~captum_mipin.regression.ridge.solve`.

    Attributes:
        s: Float64 tensor (rows, signals), the centred signals; zero for those that never vary.
        mean: Float64 tensor (signals,), their means.
        dead: Number of signals that never vary.
        gram: Float64 tensor (rows, rows), S Sᵀ.
    """

    def __init__(self, s: Tensor, ridge: float, scale: RidgeScale) -> None:
        s = s.to(torch.float64, copy=True)
        self.mean, self._ridge = s.mean(0), ridge
        s -= self.mean
        variance = torch.linalg.vector_norm(s, dim=0).square() / len(s)
        self._penalty, dead = penalties(variance, self.mean, ridge, scale, len(s))
        self.s, self.dead = s.masked_fill_(dead, 0.0), int(dead.sum())
        self.gram = s @ s.mT

    def solve(self, right: Tensor) -> tuple[Tensor, float]:
        """Return (S Sᵀ + nλI)^-1 right, and the condition number of the matrix."""
        n = len(self.s)
        added = torch.full_like(self.gram[0], n * float(self._penalty.max()))  # λ is one number
        none = torch.zeros_like(added, dtype=torch.bool)
        return solve_symmetric(self.gram, right, added, none, self._ridge)


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


def bytes_by_rows(rows: int, features: int, signals: int, width: int) -> tuple[int, int]:
    """Return the bytes of the rows of signals, and of what :func:`solve_rows` takes in addition.

    Args:
        rows: Number of rows.
        features: Number of features.
        signals: Number of signals.
        width: Bytes of one number of the rows.
    """
    stored = width * rows * signals
    # signals: joined, without those that are always 0; in float64: centred, beside S Sᵀ, and
    # solved, twice. Features: joined, centred, and once more on the way. Eight matrices of rows.
    return stored, 2 * stored + 8 * rows * (4 * signals + 8 * rows) + 3 * width * rows * features


def bytes_of_table(rows: int, features: int, signals: int, width: int) -> tuple[int, int]:
    """Return the bytes of the rows of signals, and of what :func:`solve_table` takes in addition.

    See :func:`bytes_by_rows` for the arguments; ``features`` counts own signals as well.
    """
    stored = width * rows * signals
    # signals: joined; in float64: centred, and on the way. Six copies of the features, five
    # matrices of rows, and the weights.
    further = stored + 8 * (rows * (2 * signals + 6 * features + 5 * rows) + features * signals)
    return stored, further


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
    kernel = _Kernel(s, ridge, scale)
    s, mean, gram = kernel.s, kernel.mean, kernel.gram
    # eq. 6 for n centred rows: cov(X, S) (cov(S, S) + λI)^-1 = Xᵀ K S, K = (S Sᵀ + nλI)^-1
    right = torch.cat([s, gram], 1) if measure else s
    solved, condition = kernel.solve(right)  # K S, and K S Sᵀ
    coefficients = solved[:, : s.shape[1]]
    # eq. 6: b = E[X] − Xᵀ K S E[S]
    bias = rows.mean - (rows.x.mT @ (coefficients @ mean).to(rows.x.dtype)).double()
    explained = float("nan")
    if measure:
        # prediction S Sᵀ K X, residual R X with R = I − S Sᵀ K, squared residual tr(R X Xᵀ R)
        residual = torch.eye(len(s)).to(gram) - solved[:, s.shape[1] :]
        total = rows.gram.diagonal().sum()
        explained = share(total - (residual @ rows.gram * residual).sum(), total)
    return RowSolution(coefficients, bias, explained, kernel.dead, condition)


def solve_table(
    z: Tensor, s: Tensor, ridge: float = 1e-3, scale: RidgeScale = "relative"
) -> Solution:
    """Solve the regression of :func:`~captum_mipin.regression.ridge.solve` by its dual.

    Args:
        z: Tensor (k, rows, features), the features, then the k − 1 own signals of each.
        s: Tensor (rows, signals), the signals.
        ridge: λ, as for :func:`~captum_mipin.regression.ridge.solve`.
        scale: The unit of λ, as for :func:`~captum_mipin.regression.ridge.solve`.

    Returns:
        The coefficients and the quality of the fit, for one group.

    Examples:
        >>> from captum_mipin.regression.moments import Moments
        >>> from captum_mipin.regression.ridge import solve
        >>> x, s = torch.randn(1, 5, 2, dtype=torch.float64), torch.randn(1, 5, 30).double()
        >>> moments = Moments.zeros(1, 2, 30)
        >>> moments.update(x, s)
        >>> torch.allclose(solve_table(x, s[0]).weight, solve(moments).weight)
        True
    """
    kernel, n = _Kernel(s, ridge, scale), len(s)
    z = z.double()
    mean_z = z.mean(1).unsqueeze(0)
    z = z - mean_z[0].unsqueeze(1)
    # eq. 6 for n centred rows: W = Zᵀ K S, K = (S Sᵀ + nλI)^-1
    solved, condition = kernel.solve(torch.cat(list(z), 1))
    # the residuals Z − S Wᵀ = Z − S Sᵀ K Z
    residual = z - (kernel.gram @ solved).unflatten(1, (len(z), -1)).movedim(1, 0)
    rest, of_feature = (torch.einsum("inx,jnx->xij", z, t).unsqueeze(0) / n for t in (residual, z))
    own = solve_own(rest, of_feature, mean_z, (ridge, scale, n))
    # the shared signals explain x less its own signals: W = (X − Σ a ⊙ O)ᵀ K S
    factors = F.pad(-own.weight[0], (1, 0), value=1.0).mT.unsqueeze(1)
    weight = (factors * solved.unflatten(1, (len(z), -1)).movedim(1, 0)).sum(0).mT @ kernel.s
    unexplained = (factors * residual).sum(0).square().sum() / n
    total = of_feature[..., 0, 0].sum()
    return Solution(
        weight.unsqueeze(0),
        own.weight.contiguous(),
        own.bias - weight @ kernel.mean,
        share(total - unexplained, total),
        dead=kernel.dead + own.dead,
        condition=max(condition, own.condition),
    )
