"""Ridge regression from moments (equation 6)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_mipin.regression.moments import CONSTANT, Moments, constant

RidgeScale = Literal["relative", "mean", "sum"]


@dataclass(frozen=True)
class Solution:
    """A solved regression x ≈ weight · s + own · o + bias.

    Attributes:
        weight: (g, dx, ds) float64, of the ``live`` signals.
        own: (g, dx, k − 1) float64.
        bias: (g, dx) float64.
        explained_variance: 1 − residual / variance of x over all features, on the rows fitted; 1
            where x never varies.
        dead: Number of signals that never vary; their coefficients are zero.
        condition: 1-norm condition number of the matrices that were solved with, the largest of
            them. An estimate from below: it is hardly ever less than a third of the number itself.
        live: Indices of the signals that ``weight`` has columns for; None for all.
    """

    weight: Tensor
    own: Tensor
    bias: Tensor
    explained_variance: float
    dead: int
    condition: float
    live: Tensor | None = None


def solve(
    moments: Moments, ridge: float = 1e-3, scale: RidgeScale = "relative", tied: int = 1
) -> Solution:
    """Solve the ridge regression of x on s and o from their moments (equation 6).

    Args:
        moments: What :class:`Moments` has gathered.
        ridge: λ, at least 0. With 0, directions without variance get zero coefficients.
        scale: What λ is measured in. ``"relative"``: the mean variance of the signals that vary at
            all, shared and own ones apart. ``"mean"``: the covariance, that is the Gram matrix
            divided by the rows. ``"sum"``: the Gram matrix itself.
        tied: How many features in a row are one feature at different places, with one bias. Such
            features have no signals of their own. It is a regression with this many times the rows;
            in each row only the signals of its own place are other than zero.

    Returns:
        The coefficients, and figures that tell how good the fit is.

    Examples:
        >>> s = torch.randn(1, 100, 1, dtype=torch.float64)
        >>> moments = Moments.zeros(1, 1, 1)
        >>> moments.update(3 * s + 1, s)
        >>> solution = solve(moments, ridge=0)
        >>> round(solution.weight.item(), 6), round(solution.bias.item(), 6)
        (3.0, 1.0)
    """
    if tied > 1:
        return _solve_tied(moments, ridge, scale, tied)
    return _solve_with_own(moments, ridge, scale)


def _solve_with_own(moments: Moments, ridge: float, scale: RidgeScale) -> Solution:
    """Solve for the shared signals first, then for what each feature's own signals add.

    Frisch and Waugh: regress x and o on s; what is left of x, regressed on what is left of o, has
    the same coefficients as one regression on all, at the cost of the shared one.
    """
    rows = max(moments.count, 1)
    gram, cross, of_feature = moments.ss / rows, moments.zs / rows, moments.zz / rows
    penalty, dead = penalties(_diagonal(gram), moments.mean_s, ridge, scale, rows)
    # eq. 6, for x and each o: W = cov(Z, S) (cov(S, S) + λI)^-1
    weights, condition = solve_symmetric(gram, cross.flatten(1, 2).mT, penalty, dead, ridge)
    weights = weights.mT.view_as(cross)
    # what s leaves unexplained: cov(Z, Z) − W cov(S, Z)
    rest = of_feature - torch.einsum("gixs,gjxs->gxij", weights, cross)
    variance = _diagonal(of_feature)[..., 1:]
    own_penalty, own_dead = penalties(variance, moments.mean_z[:, 1:].mT, ridge, scale, rows)
    unused = own_dead
    if ridge == 0:  # a rest that is rounding alone would be divided by itself
        unused = own_dead | (variance * CONSTANT**0.5 > _diagonal(rest)[..., 1:])
    # the same for each feature alone: a = cov(O, O)^-1 cov(O, x), of the rests
    own, own_condition = solve_symmetric(
        rest[..., 1:, 1:], rest[..., 1:, :1], own_penalty, unused, ridge
    )
    own = own.squeeze(3)
    weight = weights[:, 0] - torch.einsum("gxj,gjxs->gxs", own, weights[:, 1:])
    # eq. 6: b = E X − W E S − a E O
    bias = moments.mean_z[:, 0] - (weight @ moments.mean_s.unsqueeze(2)).squeeze(2)
    bias -= torch.einsum("gxj,gjx->gx", own, moments.mean_z[:, 1:])
    # G θ = c − Λ θ for all coefficients θ: the explained variance 2 θ·c − θ·G θ is θ·c + θ·Λ θ
    explained = (weight * (cross[:, 0] + penalty.unsqueeze(1) * weight)).sum()
    explained += (own * (of_feature[..., 0, 1:] + own_penalty * own)).sum()
    live, signals = moments.live or (None, gram.shape[1])
    return Solution(
        weight.contiguous(),
        own.contiguous(),
        bias,
        share(explained, of_feature[..., 0, 0].sum()),
        dead=int(dead.sum() + own_dead.sum()) + len(dead) * (signals - gram.shape[1]),
        condition=max(condition, own_condition),
        live=live,
    )


def _solve_tied(moments: Moments, ridge: float, scale: RidgeScale, tied: int) -> Solution:
    """Solve for features that share their bias, place by place.

    With a bias for all places, their Gram matrix has E s sᵀ for each place, less the one mean that
    they have in common. So there are two regressions: of the mean of x over the places, with a
    bias, by the covariance of s; and of what each place differs by from that mean, without a bias,
    by E s sᵀ.
    """
    rows = max(moments.count, 1)
    gram, cross, variance = moments.ss / rows, moments.zs[:, 0] / rows, moments.zz[..., 0, 0] / rows
    level, x = moments.mean_s.unsqueeze(1), moments.mean_z[:, 0].unflatten(1, (-1, tied))
    mean = x.mean(2)
    differs = (x - mean.unsqueeze(2)).flatten(1)
    # the variance of a signal over the rows of all places, of which it has its own alone
    over_places = (_diagonal(gram) + moments.mean_s.square() * (1 - 1 / tied)) / tied
    penalty, dead = penalties(over_places, moments.mean_s / tied, ridge, scale, rows * tied)
    penalty = tied * penalty
    together = cross.unflatten(1, (-1, tied)).mean(2)
    apart = cross - together.repeat_interleave(tied, 1) + differs.unsqueeze(2) * level
    # W = cov(mean X, S) (cov(S, S) + λI)^-1 for all places, + E (X − mean X) Sᵀ (E S Sᵀ + λI)^-1
    common, condition = solve_symmetric(gram, together.mT, penalty, dead, ridge)
    further, further_condition = solve_symmetric(
        gram + level.mT @ level, apart.mT, penalty, dead, ridge
    )
    weight = common.mT.repeat_interleave(tied, 1) + further.mT
    # as in _solve_with_own, with c about the mean of all places
    about_mean = cross + differs.unsqueeze(2) * level
    explained = (weight * (about_mean + penalty.unsqueeze(1) * weight)).sum()
    return Solution(
        weight,
        weight.new_zeros(*weight.shape[:2], 0),
        mean - (level @ common).squeeze(1),
        share(explained, (variance + differs.square()).sum()),
        dead=int(dead.sum()) * tied,
        condition=max(condition, further_condition),
    )


def share(explained: Tensor, total: Tensor) -> float:
    """Return explained / total variance; 1 where nothing varies."""
    return float(explained / total) if total > 0 else 1.0


def penalties(
    variance: Tensor, mean: Tensor, ridge: float, scale: RidgeScale, rows: int
) -> tuple[Tensor, Tensor]:
    """Return λ for each signal (the last dimension), and which signals never vary."""
    dead = constant(variance, mean)
    unit = torch.ones_like(variance)
    if scale == "relative":
        alive = (~dead).sum(-1, keepdim=True).clamp(min=1)
        unit = (variance.sum(-1, keepdim=True) / alive).expand_as(variance)
    return ridge * (unit / rows if scale == "sum" else unit), dead


def solve_symmetric(
    gram: Tensor, cross: Tensor, penalty: Tensor, dead: Tensor, ridge: float
) -> tuple[Tensor, float]:
    """Return (gram + diag(penalty))^-1 cross, and the condition number of what was inverted.

    Args:
        gram: (..., n, n), positive semidefinite.
        cross: (..., n, m).
        penalty: (..., n), what is added to the diagonal.
        dead: (..., n), the signals that never vary; their rows of the result are zero.
        ridge: λ. With 0, the pseudo-inverse is taken.
    """
    if gram.shape[-1] == 0:
        return torch.zeros_like(cross), 1.0
    ridged = gram.masked_fill(dead.unsqueeze(-1) | dead.unsqueeze(-2), 0.0)
    diagonal = _diagonal(ridged)
    unit = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    # Without a diagonal of their own, dead signals would make the matrix singular.
    diagonal += penalty + dead * torch.where(unit > 0, unit, 1.0)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if ridge > 0 and not failed.any():
        result, norm = torch.cholesky_solve(cross, factor), _norm_of_inverse(factor)
    else:
        inverse = torch.linalg.pinv(ridged, hermitian=True)
        result, norm = inverse @ cross, torch.linalg.matrix_norm(inverse, 1)
    # ‖A‖₁ ‖A^-1‖₁; the rows of a symmetric matrix have the norms of its columns, without a copy
    condition = torch.linalg.vector_norm(ridged, 1, -1).amax(-1) * norm
    return result.masked_fill(dead.unsqueeze(-1), 0.0), float(condition.max())


def _norm_of_inverse(factor: Tensor) -> Tensor:
    """Estimate the 1-norm of A^-1, A = factor factorᵀ, from below: Hager's algorithm.

    Higham, Accuracy and Stability of Numerical Algorithms, 2002, algorithm 15.1. The largest and
    the smallest number on the factor's diagonal are no substitute: for the Gram matrices of a
    ResNet-18 the square of their ratio is 1e3 where the condition number is 1e6. The inverse itself
    takes n³.
    """
    x = torch.full_like(factor[..., :1], 1 / factor.shape[-1])
    norm = torch.zeros_like(x[..., 0, 0])
    for _ in range(5):
        y = torch.cholesky_solve(x, factor)
        norm = torch.maximum(norm, y.abs().sum((-2, -1)))
        # the gradient of ‖A^-1 x‖₁; where no unit vector lies higher along it, x is a maximum
        slope = torch.cholesky_solve(y.sign(), factor)
        if (slope.abs().amax((-2, -1)) <= (slope * x).sum((-2, -1))).all():
            break
        x = torch.zeros_like(x).scatter_(-2, slope.abs().argmax(-2, keepdim=True), 1.0)
    return norm


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
