"""Ridge regression from moments (equation 6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_mipin.regression.moments import CONSTANT, Moments, constant

RidgeScale = Literal["relative", "mean", "sum"]

#: Integer tensor of the indices of some signals, and the share of the rows in which these, and no
#: other signals, may be nonzero.
Part = tuple[Tensor, float]


@dataclass(frozen=True)
class Solution:
    """A solved regression x ≈ weight · s + own · o + bias.

    Here x are features, s the signals that all features share, and o each feature's own signals.
    For the sizes g, dx, ds and k see :class:`~captum_mipin.regression.moments.Moments`.

    Attributes:
        weight: Float64 tensor (g, dx, ds), coefficients of the ``live`` shared signals.
        own: Float64 tensor (g, dx, k − 1), coefficients of each feature's own signals.
        bias: Float64 tensor (g, dx).
        explained_variance: 1 − residual / variance of x over all features, on the fitted rows; 1
            if x never varies.
        dead: Number of signals that never vary; their coefficients are zero.
        condition: The largest 1-norm condition number of the matrices of the linear systems, of
            which there is one for each part of the signals that is solved alone. It is
            an estimate from below, and rarely less than a third of the exact number.
        live: Integer tensor (ds,), indices of the shared signals that ``weight`` is for; None for
            all.
    """

    weight: Tensor
    own: Tensor
    bias: Tensor
    explained_variance: float
    dead: int
    condition: float
    live: Tensor | None = None


def solving_bytes(
    groups: int, features: int, signals: int, own: int = 0, parts: Sequence[Tensor] = ()
) -> int:
    """Return an upper bound of the bytes that one regression takes, besides its moments.

    :func:`solve` takes up to five copies of the moments: divided by the number of rows, with the
    penalty, factored, copied by the solver, and for tied features once more. The moments of one
    more batch take no more than that before they are added. Blocks of ``parts`` are copied one by
    one: then the bound is the moments of one more batch, or five copies of the largest block.
    """
    size = groups, features, signals, own
    if not parts:
        return 5 * Moments.bytes_needed(*size)
    largest = max(parts, key=len)
    return max(Moments.bytes_needed(*size, parts), 5 * Moments.bytes_needed(*size, [largest]))


def solve(
    moments: Moments,
    ridge: float = 1e-3,
    scale: RidgeScale = "relative",
    tied: int = 1,
    parts: Sequence[Part] = (),
) -> Solution:
    """Solve the ridge regression of x on s and o from their moments (equation 6).

    Args:
        moments: The moments of x, s and o.
        ridge: λ, at least 0. With 0, directions without variance get zero coefficients.
        scale: The unit of λ. ``"relative"``: the mean variance of the signals that vary, computed
            separately for shared and own signals. ``"mean"``: λ is added to the covariance, which
            is the Gram matrix divided by the number of rows. ``"sum"``: λ is added to the Gram
            matrix.
        tied: Number t of consecutive features that are one feature at t positions, with one bias.
            They have no own signals. This equals a regression with t times the rows, one per
            position, where the signals of all other positions are zero.
        parts: Parts of the shared signals that are solved one by one, which takes less time. Each
            row has nonzero signals of one part only. If the moments have parts, these are the
            same, in the same order. Empty to solve all signals at once, as for λ = 0.

    Returns:
        The coefficients and the quality of the fit.

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
    return _solve_with_own(moments, ridge, scale, parts)


def _solve_with_own(
    moments: Moments, ridge: float, scale: RidgeScale, parts: Sequence[Part]
) -> Solution:
    """Solve for the shared signals first, then for each feature's own signals.

    Theorem of Frisch and Waugh: regress x and o on s, then regress the residual of x on the
    residual of o. The coefficients equal those of one regression on s and o together. The matrix
    of s, which all features share, is factored only once.
    """
    rows = max(moments.count, 1)
    cross, of_feature = moments.zs / rows, moments.zz / rows
    penalty, dead = penalties(moments.squares / rows, moments.mean_s, ridge, scale, rows)
    # eq. 6, for x and each o: W = cov(Z, S) (cov(S, S) + λI)^-1
    right = cross.flatten(1, 2).mT
    if len(parts) > 1 and ridge > 0:
        weights, condition = _solve_parts(moments, right, (penalty, dead, ridge), parts)
    else:
        weights, condition = solve_symmetric(moments.ss / rows, right, penalty, dead, ridge)
    weights = weights.mT.view_as(cross)
    # covariance of the residuals, which s does not explain: cov(Z, Z) − W cov(S, Z)
    rest = of_feature - torch.einsum("gixs,gjxs->gxij", weights, cross)
    own = solve_own(rest, of_feature, moments.mean_z, (ridge, scale, rows))
    weight = weights[:, 0] - torch.einsum("gxj,gjxs->gxs", own.weight, weights[:, 1:])
    bias = own.bias - (weight @ moments.mean_s.unsqueeze(2)).squeeze(2)
    # coefficients θ solve (G + Λ) θ = c with G = cov of (S, O), c = cov with x, Λ the penalties:
    # the explained variance 2 θ·c − θ·G θ equals θ·c + θ·Λ θ
    explained = (weight * (cross[:, 0] + penalty.unsqueeze(1) * weight)).sum()
    explained += (own.weight * (of_feature[..., 0, 1:] + own.penalty * own.weight)).sum()
    known = moments.mean_s.shape[1]
    live, signals = moments.live or (None, known)
    return Solution(
        weight.contiguous(),
        own.weight.contiguous(),
        bias,
        share(explained, of_feature[..., 0, 0].sum()),
        dead=int(dead.sum()) + own.dead + len(dead) * (signals - known),
        condition=max(condition, own.condition),
        live=live,
    )


def _solve_parts(
    moments: Moments,
    right: Tensor,
    system: tuple[Tensor, Tensor, float],
    parts: Sequence[Part],
) -> tuple[Tensor, float]:
    """Return what :func:`solve_symmetric` returns, from one linear system for each part.

    Let C_i be the covariance of part i over its own rows, times their share w_i of all rows, and
    μ_i the mean over these rows. Then cov(S, S) is the block diagonal matrix of all C_i, plus
    M Q Mᵀ, where the columns of M are the μ_i and Q = diag(w) − w wᵀ. With Q = L Lᵀ, A = C + λI:

        (A + M L (M L)ᵀ)^-1 = A^-1 − A^-1 M L (I + Lᵀ Mᵀ A^-1 M L)^-1 Lᵀ Mᵀ A^-1        (Woodbury)

    Args:
        moments: The moments, of which this reads those of the signals.
        right: Tensor (g, ds, m), the right-hand side.
        system: The arguments ``penalty``, ``dead`` and ``ridge`` of :func:`solve_symmetric`.
        parts: The parts; together they contain all signals that are not always zero.
    """
    penalty, dead, ridge = system
    mean, rows = moments.mean_s, max(moments.count, 1)
    shares = mean.new_tensor([share for _, share in parts])
    solved, across, conditions = torch.zeros_like(right), [], []
    shifts = torch.zeros_like(mean)  # A^-1 M, of which each row has one entry that is not 0
    for i, ((index, _), w) in enumerate(zip(parts, shares, strict=True)):
        gram = moments.blocks[i] if moments.parts else moments.ss[:, index.unsqueeze(1), index]
        mu = (mean[:, index] / w).unsqueeze(2)
        block = (gram / rows).baddbmm_(mu, mu.mT, alpha=-float(w * (1 - w)))
        both = torch.cat([right[:, index], mu], 2)
        result, condition = solve_symmetric(block, both, penalty[:, index], dead[:, index], ridge)
        solved[:, index], shifts[:, index] = result[..., :-1], result[..., -1]
        across.append(mu.mT @ result)  # Mᵀ A^-1 of the right-hand side and of M
        conditions.append(condition)
    values, vectors = torch.linalg.eigh(shares.diag() - shares.outer(shares))
    half = vectors * values.clamp(min=0).sqrt()
    products = torch.cat(across, 1)
    core = half.mT @ torch.diag_embed(products[..., -1]) @ half
    core = torch.linalg.solve(torch.eye(len(parts)).to(core) + core, half.mT @ products[..., :-1])
    change = half @ core
    for i, (index, _) in enumerate(parts):
        solved[:, index] -= shifts[:, index].unsqueeze(2) * change[:, i : i + 1]
    return solved, max(conditions)


@dataclass(frozen=True)
class Own:
    """The part of a solution for the features' own signals, see :func:`solve_own`.

    Attributes:
        weight: Float64 tensor (g, dx, k − 1), the coefficients.
        bias: Float64 tensor (g, dx), the bias, before the mean of the shared signals is subtracted.
        penalty: Float64 tensor (g, dx, k − 1), what was added to the variance of each own signal.
        dead: Number of own signals that never vary.
        condition: As for :class:`Solution`.
    """

    weight: Tensor
    bias: Tensor
    penalty: Tensor
    dead: int
    condition: float


def solve_own(
    rest: Tensor, of_feature: Tensor, mean_z: Tensor, unit: tuple[float, RidgeScale, int]
) -> Own:
    """Regress the residual of each feature on the residuals of its own signals.

    Args:
        rest: Float64 tensor (g, dx, k, k), the covariance of features and own signals, without the
            part that the shared signals explain.
        of_feature: Float64 tensor (g, dx, k, k), the same covariance with this part.
        mean_z: Float64 tensor (g, k, dx), the means of features and own signals.
        unit: λ, its unit, and the number of rows, as for :func:`penalties`.
    """
    ridge, scale, rows = unit
    variance = _diagonal(of_feature)[..., 1:]
    penalty, dead = penalties(variance, mean_z[:, 1:].mT, ridge, scale, rows)
    unused = dead
    if ridge == 0:  # without λ, a residual that is only rounding would give random coefficients
        unused = dead | (variance * CONSTANT**0.5 > _diagonal(rest)[..., 1:])
    # for each feature, with covariances of the residuals: a = (cov(O, O) + λI)^-1 cov(O, x)
    weight, condition = solve_symmetric(
        rest[..., 1:, 1:], rest[..., 1:, :1], penalty, unused, ridge
    )
    weight = weight.squeeze(3)
    # eq. 6: b = E[X] − a E[O] − W E[S]
    bias = mean_z[:, 0] - torch.einsum("gxj,gjx->gx", weight, mean_z[:, 1:])
    return Own(weight, bias, penalty, int(dead.sum()), condition)


def _solve_tied(moments: Moments, ridge: float, scale: RidgeScale, tied: int) -> Solution:
    """Solve for features at several positions that share one bias.

    The regression splits into two. The mean of x over the positions is regressed with a bias, which
    needs the covariance of s. The difference of x from this mean at each position is regressed
    without a bias, which needs E[s sᵀ].
    """
    rows = max(moments.count, 1)
    gram, cross, variance = moments.ss / rows, moments.zs[:, 0] / rows, moments.zz[..., 0, 0] / rows
    level, x = moments.mean_s.unsqueeze(1), moments.mean_z[:, 0].unflatten(1, (-1, tied))
    mean = x.mean(2)
    differs = (x - mean.unsqueeze(2)).flatten(1)
    # the variance of a signal over the rows of all positions; it is zero at all but its own
    over_places = (_diagonal(gram) + moments.mean_s.square() * (1 - 1 / tied)) / tied
    penalty, dead = penalties(over_places, moments.mean_s / tied, ridge, scale, rows * tied)
    penalty = tied * penalty
    together = cross.unflatten(1, (-1, tied)).mean(2)
    apart = cross - together.repeat_interleave(tied, 1) + differs.unsqueeze(2) * level
    # eq. 6, M the mean of X over positions:
    # W = cov(M, S) (cov(S, S) + λI)^-1 + E[(X − M) Sᵀ] (E[S Sᵀ] + λI)^-1
    common, condition = solve_symmetric(gram, together.mT, penalty, dead, ridge)
    further, further_condition = solve_symmetric(
        gram + level.mT @ level, apart.mT, penalty, dead, ridge
    )
    weight = common.mT.repeat_interleave(tied, 1) + further.mT
    # θ·c + θ·Λ θ as in _solve_with_own, where c has deviations of X from its mean over positions
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
    """Return explained / total variance; 1 if the total is 0."""
    return float(explained / total) if total > 0 else 1.0


def penalties(
    variance: Tensor, mean: Tensor, ridge: float, scale: RidgeScale, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the penalties of the signals, and a mask of the signals that never vary.

    Args:
        variance: Tensor (..., signals), their variances.
        mean: Tensor (..., signals), their means.
        ridge: λ.
        scale: The unit of λ, as for :func:`solve`.
        rows: Number of rows of the regression.

    Returns:
        Two tensors (..., signals): the penalty added to each variance, and the bool mask.
    """
    dead = constant(variance, mean)
    unit = torch.ones_like(variance)
    if scale == "relative":
        alive = (~dead).sum(-1, keepdim=True).clamp(min=1)
        unit = (variance.sum(-1, keepdim=True) / alive).expand_as(variance)
    return ridge * (unit / rows if scale == "sum" else unit), dead


def solve_symmetric(
    gram: Tensor, cross: Tensor, penalty: Tensor, dead: Tensor, ridge: float
) -> tuple[Tensor, float]:
    """Return (gram + diag(penalty))^-1 cross, and the condition number of the inverted matrix.

    Args:
        gram: Tensor (..., n, n), positive semidefinite.
        cross: Tensor (..., n, m), the right-hand side.
        penalty: Tensor (..., n), added to the diagonal of ``gram``.
        dead: Bool tensor (..., n), True for signals that never vary; their rows of the result are
            zero.
        ridge: λ. For 0, the pseudo-inverse replaces the inverse.
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
    # condition = ‖A‖₁ ‖A^-1‖₁; A is symmetric: norms of rows equal those of columns, without a copy
    condition = torch.linalg.vector_norm(ridged, 1, -1).amax(-1) * norm
    return result.masked_fill(dead.unsqueeze(-1), 0.0), float(condition.max())


def _norm_of_inverse(factor: Tensor) -> Tensor:
    """Estimate ‖A^-1‖₁ from below for A = factor factorᵀ, by Hager's algorithm.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2002, algorithm 15.1.

    A cheaper estimate of the condition number, the squared ratio of the largest to the smallest
    number on the factor's diagonal, is too small: for the Gram matrices of a ResNet-18 it is 1e3
    where the condition number is 1e6. Computing the inverse would take n³ operations.
    """

    def inverse(x: Tensor) -> Tensor:
        """Return A^-1 x; ``torch.cholesky_solve`` would copy the factor, which takes longer."""
        half = torch.linalg.solve_triangular(factor, x, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        return whole

    x = torch.full_like(factor[..., :1], 1 / factor.shape[-1])
    norm = torch.zeros_like(x[..., 0, 0])
    for _ in range(5):
        y = inverse(x)
        norm = torch.maximum(norm, y.abs().sum((-2, -1)))
        # gradient of ‖A^-1 x‖₁: if no unit vector increases the norm to first order, stop at x
        slope = inverse(y.sign())
        if (slope.abs().amax((-2, -1)) <= (slope * x).sum((-2, -1))).all():
            break
        x = torch.zeros_like(x).scatter_(-2, slope.abs().argmax(-2, keepdim=True), 1.0)
    return norm


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
