"""Moments and ridge regression: update, merge, solve. Knows nothing of networks.

Every inverse of the paper is one regression of features x on signals s (equations 5-7). Its sufficient statistics
are sums, kept here centred and in float64, so that the data may come in any chunks and any order, from one process
or several. A leading group dimension carries independent regressions side by side, as grouped convolutions need them.

Besides the signals that all features share, each feature may have signals of its own, as it has where one branch of a
fork is the identity: x_i ≈ Σ_j W_ij s_j + Σ_k a_ik o_ik + b_i, all coefficients fitted together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

#: Share of a signal's mean square below which its variance is rounding.
_CONSTANT = 1e-13

#: Elements that are taken in float64 at once, so that they stay in the processor's cache.
_CACHED = 1 << 17

RidgeScale = Literal["relative", "mean", "sum"]


@dataclass
class Moments:
    """Centred first and second moments of rows (z, s), for ``g`` groups side by side.

    Of z, the first of ``k`` entries is the feature x, the others are its own signals.

    Attributes:
        count: Number of rows seen.
        mean_z: (g, k, dx) float64.
        mean_s: (g, ds) float64.
        zz: (g, dx, k, k) float64, the centred Gram matrix of each feature and its own signals.
        zs: (g, k, dx, ds) float64, the centred cross products.
        ss: (g, ds, ds) float64, the centred Gram matrix of s.
        live: Where only some of the signals have been other than zero: which, in order, and of how many. The other fields
            are of these alone.

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
    mean_z: Tensor
    mean_s: Tensor
    zz: Tensor
    zs: Tensor
    ss: Tensor
    live: tuple[Tensor, int] | None = None

    @classmethod
    def zeros(
        cls,
        groups: int,
        features: int,
        signals: int,
        own: int = 0,
        device: torch.device | str = "cpu",
    ) -> "Moments":
        """Moments of no rows: ``groups`` regressions of ``features`` values on ``signals`` shared values and ``own`` each."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        k = 1 + own
        return cls(
            0,
            zero(k, features),
            zero(signals),
            zero(features, k, k),
            zero(k, features, signals),
            zero(signals, signals),
        )

    @staticmethod
    def bytes_needed(groups: int, features: int, signals: int, own: int = 0) -> int:
        """Memory of one such object, in bytes."""
        k = 1 + own
        return (
            8
            * groups
            * (k * features * signals + signals * signals + (k + k * k) * features + signals)
        )

    def update(self, x: Tensor, s: Tensor, own: Sequence[Tensor] = ()) -> None:
        """Add rows.

        Args:
            x: (g, rows, dx) features.
            s: (g, rows, ds) signals. Products are taken in this dtype after centring, and summed in float64.
            own: Each feature's own signals, each like ``x``.
        """
        rows = x.shape[1]
        if rows == 0:
            return
        z = torch.stack([x, *own], 1) if own else x.unsqueeze(1)
        z, s = (
            t.float() if t.element_size() < 4 else t for t in (z, s)
        )  # half precision cannot hold sums
        mean_z, mean_s = z.mean(2, dtype=torch.float64), s.mean(1, dtype=torch.float64)
        z, s = z - mean_z.to(z.dtype).unsqueeze(2), s - mean_s.to(s.dtype).unsqueeze(1)
        self.add(
            Moments(rows, mean_z, mean_s, gram_of_each(z, (2,)), z.mT @ s.unsqueeze(1), s.mT @ s)
        )

    def add(self, other: "Moments") -> None:
        """Merge ``other`` in; its second moments may be of any floating dtype."""
        if not _alike(self.live, other.live):
            self.__dict__.update(vars(self.whole()))
            other = other.whole()
        count = self.count + other.count
        if other.count == 0:
            return
        share = other.count / count
        dz, ds = other.mean_z - self.mean_z, other.mean_s - self.mean_s
        between = self.count * share
        each = dz.mT  # (g, dx, k)
        self.zz += other.zz + between * each.unsqueeze(3) * each.unsqueeze(2)
        for total, part, left in (
            (self.zs.flatten(1, 2), other.zs.flatten(1, 2), dz.flatten(1)),
            (self.ss, other.ss, ds),
        ):
            total += part
            total.baddbmm_(left.unsqueeze(2), ds.unsqueeze(1), alpha=between)
        self.mean_z += share * dz
        self.mean_s += share * ds
        self.count = count

    def pooled(self, total: Callable[[Tensor], Tensor]) -> "Moments":
        """The moments of the rows of several processes.

        Args:
            total: Adds up a tensor over them.
        """
        count = int(total(torch.tensor([self.count], device=self.ss.device)))
        mean_z, mean_s = (
            total(self.count * mean) / max(count, 1) for mean in (self.mean_z, self.mean_s)
        )
        dz, ds = self.mean_z - mean_z, self.mean_s - mean_s
        each, n = dz.mT, self.count
        zz = self.zz + n * each.unsqueeze(3) * each.unsqueeze(2)
        zs = (
            self.zs.flatten(1, 2)
            .baddbmm(dz.flatten(1).unsqueeze(2), ds.unsqueeze(1), alpha=n)
            .view_as(self.zs)
        )
        ss = self.ss.baddbmm(ds.unsqueeze(2), ds.unsqueeze(1), alpha=n)
        return Moments(count, mean_z, mean_s, total(zz), total(zs), total(ss), self.live)

    def whole(self) -> "Moments":
        """The same, with those signals in their places that have always been zero."""
        if self.live is None:
            return self
        index, signals = self.live
        groups, k, features = self.mean_z.shape
        result = Moments.zeros(groups, features, signals, k - 1, self.ss.device)
        mean_s, zs, ss = result.mean_s, result.zs, result.ss
        mean_s[:, index], zs[..., index] = self.mean_s, self.zs
        ss[:, index.unsqueeze(1), index] = self.ss
        return Moments(self.count, self.mean_z, mean_s, self.zz, zs, ss)

    def among(self, index: Tensor) -> "Moments":
        """The moments of the shared signals ``index`` alone, in this order."""
        ss = self.ss[:, index.unsqueeze(1), index]
        return Moments(
            self.count, self.mean_z, self.mean_s[:, index], self.zz, self.zs[..., index], ss
        )

    def finite(self) -> bool:
        """Whether no NaN or Inf has come in."""
        return bool(
            torch.isfinite(
                self.zz.sum() + self.mean_s.sum() + self.ss.diagonal(dim1=1, dim2=2).sum()
            )
        )


def _alike(live: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    return live is other or (
        live is not None and other is not None and torch.equal(live[0], other[0])
    )


def gram_of_each(z: Tensor, over: tuple[int, ...]) -> Tensor:
    """Sums of products between the entries of dimension 1 of ``z``, over some dimensions: (g, dx, k, k) float64.

    Squares of a single entry are taken in float64, products in the dtype of ``z``.
    """
    if z.shape[1] == 1:
        step = max(1, _CACHED * z.shape[2] // max(z.numel(), 1))
        squares = torch.stack([part.double().square().sum(over) for part in z.split(step, 2)])
        return squares.sum(0).movedim(1, 2).unsqueeze(3)
    kept = [dim for dim in range(2, z.ndim) if dim not in over]
    rows = z.permute(0, *kept, 1, *over).flatten(3)
    return (rows @ rows.mT).double()


def gaussian_information(moments: Moments) -> Tensor:
    """−½ log₂(1 − ρ²) between each feature and each signal: their mutual information, were they jointly Gaussian.

    Args:
        moments: Of features and shared signals.

    Returns:
        (g, dx, ds) bits, float64; 0 where either never varies. With ρ = 1 they have no bound; float64 can tell about 26.

    Examples:
        >>> s = torch.randn(1, 1000, 1)
        >>> moments = Moments.zeros(1, 2, 1)
        >>> moments.update(torch.cat([3 * s, torch.ones_like(s)], 2), s)
        >>> gaussian_information(moments).squeeze().tolist()[1]
        0.0
    """
    x = moments.zz[..., 0, 0].unsqueeze(2)
    s = moments.ss.diagonal(dim1=1, dim2=2).unsqueeze(1)
    varies = (x > _CONSTANT * (x + moments.count * moments.mean_z[:, 0].unsqueeze(2).square())) & (
        s > _CONSTANT * (s + moments.count * moments.mean_s.unsqueeze(1).square())
    )
    unshared = 1 - (moments.zs[:, 0].square() / (x * s).clamp(min=torch.finfo(x.dtype).tiny)).clamp(
        max=1
    )
    return (-0.5 * unshared.clamp(min=torch.finfo(x.dtype).eps).log2()).masked_fill(~varies, 0.0)


@dataclass(frozen=True)
class Solution:
    """A solved regression x ≈ weight · s + own · o + bias.

    Attributes:
        weight: (g, dx, ds) float64, of the ``live`` signals.
        own: (g, dx, k − 1) float64.
        bias: (g, dx) float64.
        explained_variance: 1 − residual / variance of x over all features, on the rows fitted; 1 where x never varies.
        dead: Number of signals that never vary; their coefficients are zero.
        condition: 1-norm condition number of the matrices solved with, the largest of them, as estimated.
        live: As for :class:`Moments`.
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
    """Ridge regression of x on s and o from their moments (equation 6).

    The signals o of a feature are what is left of them, and of x, once both are regressed on s (Frisch and Waugh): the
    same coefficients as of one regression on all, at the cost of the shared one.

    Args:
        moments: What :class:`Moments` has gathered.
        ridge: λ of equation 6, at least 0. With 0, directions without variance get zero coefficients.
        scale: What λ is measured in: ``"relative"``, the mean variance of the signals that vary at all, shared and own
            ones apart; ``"mean"``, the covariance (Gram matrix divided by the rows); ``"sum"``, the Gram matrix itself.
        tied: How many features, one after the other, are one and the same at different places, with one bias: a regression
            with this many times the rows, in each of which only the signals of its place are other than zero. Such features
            have no signals of their own.

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
    if tied > 1:
        return _solve_tied(moments, ridge, scale, tied)
    rows = max(moments.count, 1)
    gram, cross, each = moments.ss / rows, moments.zs / rows, moments.zz / rows
    penalty, dead = _penalty(gram.diagonal(dim1=1, dim2=2), moments.mean_s, ridge, scale, rows)
    weights, condition = _ridge(gram, cross.flatten(1, 2).mT, penalty, dead, ridge)
    weights = weights.mT.view_as(cross)  # of x, then of each o
    left = each - torch.einsum("gixs,gjxs->gxij", weights, cross)  # what s does not explain
    own_penalty, own_dead = _penalty(
        each.diagonal(dim1=2, dim2=3)[..., 1:], moments.mean_z[:, 1:].mT, ridge, scale, rows
    )
    explained_by_s = (
        each.diagonal(dim1=2, dim2=3)[..., 1:] * _CONSTANT**0.5
        > left.diagonal(dim1=2, dim2=3)[..., 1:]
    )
    blank = own_dead | (explained_by_s if ridge == 0 else False)
    own, own_condition = _ridge(left[..., 1:, 1:], left[..., 1:, :1], own_penalty, blank, ridge)
    own = own.squeeze(3)
    weight = weights[:, 0] - torch.einsum("gxj,gjxs->gxs", own, weights[:, 1:])
    bias = moments.mean_z[:, 0] - (weight @ moments.mean_s.unsqueeze(2)).squeeze(2)
    bias -= torch.einsum("gxj,gjx->gx", own, moments.mean_z[:, 1:])
    total = each[..., 0, 0].sum()
    # With G θ = c − Λ θ for all coefficients θ, the explained variance 2 θ·c − θ·G θ is θ·c + θ·Λ θ.
    explained = (weight * (cross[:, 0] + penalty.unsqueeze(1) * weight)).sum() + (
        own * (each[..., 0, 1:] + own_penalty * own)
    ).sum()
    return Solution(
        weight.contiguous(),
        own.contiguous(),
        bias,
        explained_variance=float(explained / total) if total > 0 else 1.0,
        dead=int(dead.sum() + own_dead.sum())
        + len(dead) * (moments.live[1] - len(moments.live[0]) if moments.live else 0),
        condition=max(condition, own_condition),
        live=moments.live[0] if moments.live else None,
    )


def _solve_tied(moments: Moments, ridge: float, scale: RidgeScale, tied: int) -> Solution:
    """The regression of :func:`solve` for features that share their bias, place by place.

    The Gram matrix of all places has that of one, E s sᵀ, for each of them, less the one mean they have in common. So the
    mean of x over the places is regressed with the bias, by the covariance of s; what a place differs by, without, by E s sᵀ.
    """
    rows = max(moments.count, 1)
    gram, cross, variance = moments.ss / rows, moments.zs[:, 0] / rows, moments.zz[..., 0, 0] / rows
    level, x = moments.mean_s.unsqueeze(1), moments.mean_z[:, 0].unflatten(1, (-1, tied))
    mean = x.mean(2)
    differs = (x - mean.unsqueeze(2)).flatten(1)
    of_all = (
        gram.diagonal(dim1=1, dim2=2) + moments.mean_s.square() * (1 - 1 / tied)
    ) / tied  # over the rows of all places
    penalty, dead = _penalty(of_all, moments.mean_s / tied, ridge, scale, rows * tied)
    together = cross.unflatten(1, (-1, tied)).mean(2)
    beside = cross - together.repeat_interleave(tied, 1) + differs.unsqueeze(2) * level
    common, condition = _ridge(gram, together.mT, tied * penalty, dead, ridge)
    apart, condition_apart = _ridge(gram + level.mT @ level, beside.mT, tied * penalty, dead, ridge)
    common = common.mT
    weight = common.repeat_interleave(tied, 1) + apart.mT
    explained = (
        weight * (cross + differs.unsqueeze(2) * level + tied * penalty.unsqueeze(1) * weight)
    ).sum()
    total = (variance + differs.square()).sum()
    return Solution(
        weight,
        weight.new_zeros(*weight.shape[:2], 0),
        mean - (common @ level.mT).squeeze(2),
        explained_variance=float(explained / total) if total > 0 else 1.0,
        dead=int(dead.sum()) * tied,
        condition=max(condition, condition_apart),
    )


class Rows:
    """Features of few examples, row by row, centred: for regressions with more signals than rows.

    Args:
        x: (rows, features).

    Attributes:
        x: (rows, features) centred, in the dtype given.
        mean: (features,) float64.
    """

    def __init__(self, x: Tensor) -> None:
        mean = x.mean(0)
        self.x = x - mean
        rest = self.x.mean(0)  # what rounding left; a copy in float64 would take twice the memory
        self.x -= rest
        self.mean = mean.double() + rest.double()

    @cached_property
    def gram(self) -> Tensor:
        """(rows, rows) float64, their products with each other."""
        return (self.x @ self.x.mT).double()


@dataclass(frozen=True)
class RowSolution:
    """A solved regression x ≈ Xᵀ coefficients · s + bias, where X are the centred :class:`Rows`.

    Attributes:
        coefficients: (rows, ds) float64.
        bias: (dx,) float64.
        explained_variance, dead, condition: As for :class:`Solution`; the first is NaN if it was not asked for.
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
    """The regression of :func:`solve` by its dual: cov(X, S) (cov(S, S) + λI)⁻¹ = Xᵀ (S Sᵀ + nλI)⁻¹ S (equation 6).

    It takes a matrix of rows by rows instead of one of signals by signals.

    Args:
        rows: Of the features.
        s: (rows, ds) signals.
        ridge, scale: As for :func:`solve`.
        measure: Tell the explained variance, for which alone all products of features with each other are needed.

    Examples:
        >>> x, s = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 30, dtype=torch.float64)
        >>> solution = solve_rows(Rows(x), s, ridge=0)
        >>> torch.allclose(s @ solution.coefficients.mT @ Rows(x).x + solution.bias, x)
        True
    """
    s = s.to(torch.float64, copy=True)
    n, mean = len(s), s.mean(0)
    s -= mean
    penalty, dead = _penalty(s.square().mean(0), mean, ridge, scale, n)
    s.masked_fill_(dead, 0.0)
    gram = s @ s.mT
    left = n * float(penalty.max())  # the same for all signals
    penalties, none = torch.full_like(gram[0], left), torch.zeros_like(gram[0], dtype=torch.bool)
    wanted = torch.cat([s, gram], 1) if measure else s
    solved, condition = _ridge(gram, wanted, penalties, none, ridge)  # K S, and K S Sᵀ
    coefficients = solved[:, : s.shape[1]]
    bias = rows.mean - (rows.x.mT @ (coefficients @ mean).to(rows.x.dtype)).double()
    if not measure:
        return RowSolution(coefficients, bias, float("nan"), int(dead.sum()), condition)
    total = rows.gram.diagonal().sum()
    # Predicted are P = S Sᵀ K X with K = (S Sᵀ + nλI)⁻¹ or the pseudo-inverse: the residual is (I − S Sᵀ K) X.
    residual = torch.eye(n, dtype=gram.dtype, device=gram.device) - solved[:, s.shape[1] :]
    unexplained = (residual @ rows.gram * residual).sum()
    explained = float(1 - unexplained / total) if total > 0 else 1.0
    return RowSolution(coefficients, bias, explained, int(dead.sum()), condition)


def _penalty(
    variance: Tensor, mean: Tensor, ridge: float, scale: RidgeScale, rows: int
) -> tuple[Tensor, Tensor]:
    """λ for each signal (the last dimension), and which of them never vary."""
    dead = variance <= _CONSTANT * (variance + mean.square())
    alive = (~dead).sum(-1, keepdim=True).clamp(min=1)
    unit = {
        "relative": variance.sum(-1, keepdim=True) / alive,
        "sum": torch.full_like(alive, 1 / rows, dtype=variance.dtype),
    }
    return (ridge * unit.get(scale, torch.ones_like(unit["relative"]))).expand_as(variance), dead


def _ridge(
    gram: Tensor, cross: Tensor, penalty: Tensor, dead: Tensor, ridge: float
) -> tuple[Tensor, float]:
    """(gram + penalty)⁻¹ cross, with zeros for dead signals, and the condition number of what was inverted."""
    if gram.shape[-1] == 0:
        return torch.zeros_like(cross), 1.0
    ridged = gram.masked_fill(dead.unsqueeze(-1) | dead.unsqueeze(-2), 0.0)
    diagonal = ridged.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp(min=1)
    diagonal += penalty + dead * torch.where(
        scale > 0, scale, 1.0
    )  # the latter keeps the matrix regular
    factor, failed = torch.linalg.cholesky_ex(ridged)
    if ridge > 0 and not failed.any():
        result, norm = torch.cholesky_solve(cross, factor), _norm_of_inverse(factor)
    else:
        inverse = torch.linalg.pinv(ridged, hermitian=True)
        result, norm = inverse @ cross, torch.linalg.matrix_norm(inverse, 1)
    condition = (
        torch.linalg.vector_norm(ridged, 1, -1).amax(-1) * norm
    )  # of a symmetric matrix, without a copy
    return result.masked_fill(dead.unsqueeze(-1), 0.0), float(condition.max())


def _norm_of_inverse(factor: Tensor) -> Tensor:
    """The 1-norm of (factor factorᵀ)⁻¹, or a little less: Hager's estimate (Higham, 2002, algorithm 15.1)."""
    x = torch.full_like(factor[..., :1], 1 / factor.shape[-1])
    norm = torch.zeros_like(x[..., 0, 0])
    for _ in range(5):
        y = torch.cholesky_solve(x, factor)
        found = y.abs().sum((-2, -1))
        if not (found > norm).any():
            break
        norm = torch.maximum(norm, found)
        slope = torch.cholesky_solve(y.sign(), factor)
        x = torch.zeros_like(x).scatter_(-2, slope.abs().argmax(-2, keepdim=True), 1.0)
    return norm
