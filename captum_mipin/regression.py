"""Moments and ridge regression: update, merge, solve. Knows nothing of networks.

Every inverse of the paper is one regression of features x on signals s (equations 5-7). Its sufficient statistics
are sums, kept here centred and in float64, so that the data may come in any chunks and any order, from one process
or several. A leading group dimension carries independent regressions side by side: the groups of a grouped
convolution, the channels of a channelwise inverse.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Share of a signal's mean square below which its variance is rounding.
_CONSTANT = 1e-13

RidgeScale = Literal["relative", "mean", "sum"]


@dataclass
class Moments:
    """Centred first and second moments of rows (x, s), for ``g`` groups side by side.

    Attributes:
        count: Number of rows seen.
        mean_x: (g, dx) float64.
        mean_s: (g, ds) float64.
        xx: (g, dx) float64, the sum of squared deviations of each feature x.
        xs: (g, dx, ds) float64, the centred cross products.
        ss: (g, ds, ds) float64, the centred Gram matrix of s.

    Examples:
        >>> x, s = torch.randn(1, 50, 3), torch.randn(1, 50, 2)
        >>> whole, parts = Moments.zeros(1, 3, 2), Moments.zeros(1, 3, 2)
        >>> whole.update(x, s)
        >>> for a, b in zip(x.split(20, dim=1), s.split(20, dim=1)):
        ...     parts.update(a, b)
        >>> torch.allclose(whole.ss, parts.ss, atol=1e-4)
        True
    """

    count: int
    mean_x: Tensor
    mean_s: Tensor
    xx: Tensor
    xs: Tensor
    ss: Tensor

    @classmethod
    def zeros(cls, groups: int, features: int, signals: int, device: torch.device | str = "cpu") -> "Moments":
        """Moments of no rows: ``groups`` regressions of ``features`` values on ``signals`` values each."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        return cls(0, zero(features), zero(signals), zero(features), zero(features, signals), zero(signals, signals))

    @staticmethod
    def bytes_needed(groups: int, features: int, signals: int) -> int:
        """Memory of one such object, in bytes."""
        return 8 * groups * (features * signals + signals * signals + 2 * features + signals)

    def update(self, x: Tensor, s: Tensor) -> None:
        """Add rows.

        Args:
            x: (g, rows, dx) features.
            s: (g, rows, ds) signals. Products are taken in this dtype after centring, and summed in float64.
        """
        rows = x.shape[1]
        if rows == 0:
            return
        x, s = (t.float() if t.element_size() < 4 else t for t in (x, s))  # half precision cannot hold sums
        mean_x, mean_s = x.double().mean(1), s.double().mean(1)
        x, s = x - mean_x.to(x.dtype).unsqueeze(1), s - mean_s.to(s.dtype).unsqueeze(1)
        self.add(Moments(rows, mean_x, mean_s, x.double().square().sum(1), x.mT @ s, s.mT @ s))

    def add(self, other: "Moments") -> None:
        """Merge ``other`` in; its second moments may be of any floating dtype."""
        count = self.count + other.count
        if other.count == 0:
            return
        share = other.count / count
        dx, ds = other.mean_x - self.mean_x, other.mean_s - self.mean_s
        between = self.count * share
        self.xx += other.xx + between * dx.square()
        for total, part, left in ((self.xs, other.xs, dx), (self.ss, other.ss, ds)):
            total += part
            total.baddbmm_(left.unsqueeze(2), ds.unsqueeze(1), alpha=between)
        self.mean_x += share * dx
        self.mean_s += share * ds
        self.count = count

    def finite(self) -> bool:
        """Whether no NaN or Inf has come in."""
        return bool(torch.isfinite(self.xx.sum() + self.mean_s.sum() + self.ss.diagonal(dim1=1, dim2=2).sum()))


@dataclass(frozen=True)
class Solution:
    """A solved regression x ≈ weight · s + bias.

    Attributes:
        weight: (g, dx, ds) float64.
        bias: (g, dx) float64.
        explained_variance: 1 − residual / variance of x over all features, on the rows fitted; 1 where x never varies.
        dead: Number of signals that never vary; their coefficients are zero.
        condition: 1-norm condition number of the matrix solved with, the largest over the groups.
    """

    weight: Tensor
    bias: Tensor
    explained_variance: float
    dead: int
    condition: float


def solve(moments: Moments, ridge: float = 1e-3, scale: RidgeScale = "relative") -> Solution:
    """Ridge regression of x on s from their moments (equation 6).

    Args:
        moments: What :class:`Moments` has gathered.
        ridge: λ of equation 6, at least 0. With 0, directions without variance get zero coefficients (minimum norm).
        scale: What λ is measured in: ``"relative"``, the mean variance of the signals that vary at all;
            ``"mean"``, the covariance (Gram matrix divided by the rows); ``"sum"``, the Gram matrix itself.

    Returns:
        The coefficients and what is worth knowing about the fit.

    Examples:
        >>> s = torch.randn(1, 100, 1, dtype=torch.float64)
        >>> moments = Moments.zeros(1, 1, 1)
        >>> moments.update(3 * s + 1, s)
        >>> solution = solve(moments, ridge=0)
        >>> round(solution.weight.item(), 6), round(solution.bias.item(), 6)
        (3.0, 1.0)
    """
    rows = max(moments.count, 1)
    gram, cross = moments.ss / rows, moments.xs / rows
    variance = gram.diagonal(dim1=1, dim2=2)
    dead = variance <= _CONSTANT * (variance + moments.mean_s.square())
    alive = (~dead).sum(1).clamp(min=1)
    unit = {"relative": variance.sum(1) / alive, "mean": torch.ones_like(variance[:, 0])}.get(
        scale, torch.full_like(variance[:, 0], 1 / rows)
    )
    stand_in = dead * torch.where(unit > 0, unit, 1.0).unsqueeze(1)  # keeps the matrix regular; its column is zeroed
    ridged = gram + torch.diag_embed((ridge * unit).unsqueeze(1) + stand_in)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if ridge > 0 and not failed.any():
        weight = torch.cholesky_solve(cross.mT, factor).mT
        inverse = torch.cholesky_inverse(factor)
    else:
        inverse = torch.linalg.pinv(ridged, hermitian=True)
        weight = cross @ inverse
    weight = weight.masked_fill(dead.unsqueeze(1), 0.0)
    bias = moments.mean_x - (weight @ moments.mean_s.unsqueeze(2)).squeeze(2)
    total = moments.xx.sum() / rows
    explained = (weight * (cross + (ridge * unit).view(-1, 1, 1) * weight)).sum()  # W·gram = cross − λ·unit·W
    norms = torch.linalg.matrix_norm(ridged, 1) * torch.linalg.matrix_norm(inverse, 1)
    return Solution(
        weight,
        bias,
        explained_variance=float(explained / total) if total > 0 else 1.0,
        dead=int(dead.sum()),
        condition=float(norms.max()),
    )
