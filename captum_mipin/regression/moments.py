"""Moments: the sums that a ridge regression is solved from; update and merge.

Every inverse of the paper is one regression of features x on signals s (equations 5-7). Its
sufficient statistics are kept centred and in float64, so that the data may come in any chunks and
any order, from one process or several. A leading group dimension carries independent regressions
side by side, as grouped convolutions need them.

Besides the signals that all features share, each feature may have signals of its own, as it has
where one branch of a fork is the identity: x_i ≈ Σ_j W_ij s_j + Σ_k a_ik o_ik + b_i, fitted
together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Share of a signal's mean square below which its variance is rounding.
CONSTANT = 1e-13

#: Elements that are taken in float64 at once, so that they stay in the processor's cache.
_CACHED = 1 << 17


@dataclass
class Moments:
    """Centred first and second moments of rows (z, s), for ``g`` groups side by side.

    Of z, the first of ``k`` entries is the feature x, the others are its own signals. Symbols: dx
    features and ds shared signals in each group, k = 1 + signals of each feature's own.

    Attributes:
        count: Number of rows seen.
        mean_z: (g, k, dx) float64.
        mean_s: (g, ds) float64.
        zz: (g, dx, k, k) float64, the centred Gram matrix of each feature and its own signals.
        zs: (g, k, dx, ds) float64, the centred cross products.
        ss: (g, ds, ds) float64, the centred Gram matrix of s.
        live: Indices of the signals that have ever been other than zero, and the number of all
            signals; the other fields are of the live ones alone. None where they are of all.

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
        """Return the moments of no rows.

        Args:
            groups: Number of regressions side by side.
            features: Features of each.
            signals: Signals that the features of each share.
            own: Signals that each feature has of its own.
            device: Where the sums are kept.
        """
        k = 1 + own

        def zero(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        zz, zs, ss = zero(features, k, k), zero(k, features, signals), zero(signals, signals)
        return cls(0, zero(k, features), zero(signals), zz, zs, ss)

    @staticmethod
    def bytes_needed(groups: int, features: int, signals: int, own: int = 0) -> int:
        """Return the memory, in bytes, of what :meth:`zeros` makes of the same arguments."""
        moments = Moments.zeros(groups, features, signals, own, "meta")
        return sum(part.nbytes for part in vars(moments).values() if isinstance(part, Tensor))

    def update(self, x: Tensor, s: Tensor, own: Sequence[Tensor] = ()) -> None:
        """Add rows.

        Args:
            x: (g, rows, dx) features.
            s: (g, rows, ds) signals. Products are taken in this dtype, and summed in float64.
            own: Each feature's own signals, each like ``x``.
        """
        rows = x.shape[1]
        if rows == 0:
            return
        z = summable(torch.stack([x, *own], 1) if own else x.unsqueeze(1))
        s = summable(s)
        mean_z, mean_s = z.mean(2, dtype=torch.float64), s.mean(1, dtype=torch.float64)
        # Centred before the product: else a large mean would eat up the digits of the covariance.
        z, s = z - mean_z.to(z.dtype).unsqueeze(2), s - mean_s.to(s.dtype).unsqueeze(1)
        zz, zs, ss = gram_of_each(z, (2,)), z.mT @ s.unsqueeze(1), s.mT @ s
        self.add(Moments(rows, mean_z, mean_s, zz, zs, ss))

    def add(self, other: "Moments") -> None:
        """Merge ``other`` in; its second moments may be of any floating dtype."""
        if not _same_signals(self.live, other.live):
            vars(self).update(vars(self.whole()))
            other = other.whole()
        if other.count == 0:
            return
        count = self.count + other.count
        share = other.count / count
        dz, ds = other.mean_z - self.mean_z, other.mean_s - self.mean_s
        self.zz += other.zz
        self.zs += other.zs
        self.ss += other.ss
        # Chan et al.: the sums of both, and n₁ n₂ / n times the product of the differing means
        self._add_products(dz, ds, self.count * share)
        self.mean_z += share * dz
        self.mean_s += share * ds
        self.count = count

    def pooled(self, total: Callable[[Tensor], Tensor]) -> "Moments":
        """Return the moments of the rows of several processes.

        Args:
            total: Returns the sum of a tensor over all processes.
        """
        count = int(total(torch.tensor([self.count], device=self.ss.device)))
        mean_z, mean_s = (
            total(self.count * mean) / max(count, 1) for mean in (self.mean_z, self.mean_s)
        )
        about = replace(self, zz=self.zz.clone(), zs=self.zs.clone(), ss=self.ss.clone())
        about._add_products(self.mean_z - mean_z, self.mean_s - mean_s, self.count)
        zz, zs, ss = total(about.zz), total(about.zs), total(about.ss)
        return Moments(count, mean_z, mean_s, zz, zs, ss, self.live)

    def _add_products(self, dz: Tensor, ds: Tensor, weight: float) -> None:
        """Add weight · d dᵀ to the second moments, for d = (dz, ds)."""
        of_feature = dz.mT  # (g, dx, k)
        self.zz += weight * of_feature.unsqueeze(3) * of_feature.unsqueeze(2)
        for products, left in ((self.zs.flatten(1, 2), dz.flatten(1)), (self.ss, ds)):
            products.baddbmm_(left.unsqueeze(2), ds.unsqueeze(1), alpha=weight)

    def whole(self) -> "Moments":
        """Return the moments of all signals, those included that have always been zero."""
        if self.live is None:
            return self
        index, signals = self.live
        groups, k, features = self.mean_z.shape
        result = Moments.zeros(groups, features, signals, k - 1, self.ss.device)
        result.mean_s[:, index], result.zs[..., index] = self.mean_s, self.zs
        result.ss[:, index.unsqueeze(1), index] = self.ss
        return replace(result, count=self.count, mean_z=self.mean_z, zz=self.zz)

    def among(self, index: Tensor) -> "Moments":
        """Return the moments of the shared signals ``index`` alone, in this order."""
        ss = self.ss[:, index.unsqueeze(1), index]
        return replace(self, mean_s=self.mean_s[:, index], zs=self.zs[..., index], ss=ss)

    def finite(self) -> bool:
        """Return True if no NaN or Inf has come in."""
        sums = self.zz.sum() + self.mean_s.sum() + self.ss.diagonal(dim1=1, dim2=2).sum()
        return bool(sums.isfinite())


def _same_signals(live: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    if live is None or other is None:
        return live is other
    return torch.equal(live[0], other[0])


def summable(x: Tensor) -> Tensor:
    """Return ``x`` in a dtype that can hold sums: half precision becomes float32."""
    return x.float() if x.element_size() < 4 else x


def gram_of_each(z: Tensor, over: tuple[int, ...]) -> Tensor:
    """Return the Gram matrix of each feature and its own signals.

    Args:
        z: (g, k, rows, dx) or (g, k, n, dx, ...), centred. Squares of a single entry, k = 1, are
            taken in float64, products in the dtype of ``z``.
        over: The dimensions to sum over; ``dx`` is left.

    Returns:
        (g, dx, k, k) float64.
    """
    if z.shape[1] == 1:
        step = max(1, _CACHED * z.shape[2] // max(z.numel(), 1))
        squares = torch.stack([part.double().square().sum(over) for part in z.split(step, 2)])
        return squares.sum(0).movedim(1, 2).unsqueeze(3)
    kept = [dim for dim in range(2, z.ndim) if dim not in over]
    rows = z.permute(0, *kept, 1, *over).flatten(3)
    return (rows @ rows.mT).double()


def constant(variance: Tensor, mean: Tensor) -> Tensor:
    """Return True for each variable that never varies: its variance is rounding of its mean."""
    return variance <= CONSTANT * (variance + mean.square())


def gaussian_information(moments: Moments) -> Tensor:
    """Return the mutual information of each feature and each signal, were they jointly Gaussian.

    −½ log₂(1 − ρ²), with their correlation ρ. With ρ = 1 it has no bound; float64 can tell 26 bits.

    Args:
        moments: Of features and shared signals.

    Returns:
        (g, dx, ds) bits, float64; 0 where either never varies.

    Examples:
        >>> s = torch.randn(1, 1000, 1)
        >>> moments = Moments.zeros(1, 2, 1)
        >>> moments.update(torch.cat([3 * s, torch.ones_like(s)], 2), s)
        >>> gaussian_information(moments).squeeze().tolist()[1]
        0.0
    """
    rows, number = max(moments.count, 1), torch.finfo(torch.float64)
    x, s = moments.zz[..., 0, 0] / rows, moments.ss.diagonal(dim1=1, dim2=2) / rows
    # ρ² = cov(x, s)² / (var(x) var(s)), kept off 0 / 0 and, where rounding exceeds it, at most 1
    variances = (x.unsqueeze(2) * s.unsqueeze(1)).clamp(min=number.tiny)
    correlation = ((moments.zs[:, 0] / rows).square() / variances).clamp(max=1)
    bits = -0.5 * (1 - correlation).clamp(min=number.eps).log2()
    still = constant(x, moments.mean_z[:, 0]).unsqueeze(2)
    return bits.masked_fill(still | constant(s, moments.mean_s).unsqueeze(1), 0.0)
