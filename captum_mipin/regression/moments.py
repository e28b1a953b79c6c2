"""Moments: the sums from which a ridge regression is solved.

Every inverse of the paper is one regression of features x on signals s (equations 5-7). Its
sufficient statistics are centred float64 sums, which may be updated with chunks of data in any
order and merged between processes. The first dimension, groups, is for independent regressions, as
grouped convolutions need them.

All features share the signals s. In addition, feature i may have its own signals o_i, for example
if one branch of a fork is the identity. Both are fitted together:

    x_i ≈ Σ_j W_ij s_j + Σ_k a_ik o_ik + b_i

If the signals fall into parts, and each row has nonzero signals of one part only, as for strided
convolutions, the Gram matrix of s is stored as one block for each part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: A variance below this share of the signal's mean square is considered to be rounding.
CONSTANT = 1e-13

#: Number of elements that are converted to float64 at once, so that they fit into the CPU cache.
_CACHED = 1 << 17


@dataclass
class Moments:
    """Means and centred second moments of rows (z, s), for several independent groups.

    Sizes: g groups; in each group dx features and ds shared signals; k = 1 + number of own signals
    per feature. Of the k entries of z, the first is the feature x, the others are its own signals.

    Attributes:
        count: Number of rows.
        mean_z: Float64 tensor (g, k, dx), the means of features and own signals.
        mean_s: Float64 tensor (g, ds), the means of shared signals.
        zz: Float64 tensor (g, dx, k, k), the centred Gram matrix of each feature with its own
            signals.
        zs: Float64 tensor (g, k, dx, ds), the centred products of z with s.
        blocks: Float64 tensors, the centred Gram matrix (g, part, part) of each part of s.
        parts: Integer tensors (part,), the indices of the signals of each block, ascending. Signals
            in no part are always zero. Empty for one block of all signals.
        live: Pair (indices of the shared signals that are not always zero, number of all shared
            signals): ``mean_s``, ``zs`` and ``blocks`` then have entries for these indices only.
            None if they have entries for all signals. Only moments without ``parts`` have it.

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
    blocks: Sequence[Tensor]
    parts: Sequence[Tensor] = ()
    live: tuple[Tensor, int] | None = None

    @classmethod
    def zeros(
        cls,
        groups: int,
        features: int,
        signals: int,
        own: int = 0,
        device: torch.device | str = "cpu",
        *,
        parts: Sequence[Tensor] = (),
    ) -> "Moments":
        """Return moments of zero rows, to be updated.

        Args:
            groups: Number of groups, each an independent regression.
            features: Number of features per group.
            signals: Number of shared signals per group.
            own: Number of own signals per feature.
            device: Device of the sums.
            parts: Indices of the signals of each part; empty for one block of all signals.
        """
        k = 1 + own

        def zero(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        zz, zs = zero(features, k, k), zero(k, features, signals)
        blocks = [zero(size, size) for size in map(len, parts)] or [zero(signals, signals)]
        return cls(0, zero(k, features), zero(signals), zz, zs, blocks, parts)

    @staticmethod
    def bytes_needed(
        groups: int, features: int, signals: int, own: int = 0, parts: Sequence[Tensor] = ()
    ) -> int:
        """Return the number of bytes of the moments that :meth:`zeros` returns for these sizes."""
        sums = Moments.zeros(groups, features, signals, own, "meta", parts=parts)
        tensors = sums.mean_z, sums.mean_s, sums.zz, sums.zs, *sums.blocks
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def ss(self) -> Tensor:
        """Return the centred Gram matrix of s, float64 (g, ds, ds)."""
        return joined(self.blocks, self.parts, self.mean_s, self.count)

    @property
    def squares(self) -> Tensor:
        """Return the diagonal of ``ss``, float64 (g, ds)."""
        if not self.parts:
            return self.blocks[0].diagonal(dim1=1, dim2=2)
        result = torch.zeros_like(self.mean_s)
        for index, block in zip(self.parts, self.blocks, strict=True):
            result[:, index] = block.diagonal(dim1=1, dim2=2)
        return result

    def update(self, x: Tensor, s: Tensor, own: Sequence[Tensor] = ()) -> None:
        """Add rows.

        Args:
            x: Tensor (g, rows, dx), the features.
            s: Tensor (g, rows, ds), the shared signals. Products are computed in the dtype of x
                and s, or in float32 for half precision; they are added up in float64.
            own: Tensors (g, rows, dx), the features' own signals.
        """
        rows = x.shape[1]
        if rows == 0:
            return
        z = summable(torch.stack([x, *own], 1) if own else x.unsqueeze(1))
        s = summable(s)
        mean_z, mean_s = z.mean(2, dtype=torch.float64), s.mean(1, dtype=torch.float64)
        # Centre before the product: otherwise a large mean would cost digits of the covariance.
        z, s = z - mean_z.to(z.dtype).unsqueeze(2), s - mean_s.to(s.dtype).unsqueeze(1)
        zz, zs, ss = gram_of_each(z, (2,)), z.mT @ s.unsqueeze(1), s.mT @ s
        self.add(Moments(rows, mean_z, mean_s, zz, zs, [ss]))

    def add(self, other: "Moments") -> None:
        """Add the rows of ``other``; its second moments may have any floating dtype."""
        one, two = ([*some.parts, *(some.live or ())[:1]] for some in (self, other))
        if len(one) != len(two) or not all(map(torch.equal, one, two)):
            vars(self).update(vars(self.whole()))
            other = other.whole()
        if other.count == 0:
            return
        count = self.count + other.count
        share = other.count / count
        dz, ds = other.mean_z - self.mean_z, other.mean_s - self.mean_s
        self.zz += other.zz
        self.zs += other.zs
        for block, more in zip(self.blocks, other.blocks, strict=True):
            block += more
        # Chan et al., 1983: sums = sums₁ + sums₂ + n₁ n₂ / n d dᵀ, d the difference of the means
        self._add_products(dz, ds, self.count * share)
        self.mean_z += share * dz
        self.mean_s += share * ds
        self.count = count

    def pooled(self, total: Callable[[Tensor], Tensor]) -> "Moments":
        """Return the moments of the rows of several processes.

        Args:
            total: Function that returns the sum of a tensor over all processes.
        """
        count = int(total(torch.tensor([self.count], device=self.zz.device)))
        mean_z, mean_s = (
            total(self.count * mean) / max(count, 1) for mean in (self.mean_z, self.mean_s)
        )
        blocks = [block.clone() for block in self.blocks]
        about = replace(self, zz=self.zz.clone(), zs=self.zs.clone(), blocks=blocks)
        about._add_products(self.mean_z - mean_z, self.mean_s - mean_s, self.count)
        zz, zs, blocks = total(about.zz), total(about.zs), list(map(total, blocks))
        return Moments(count, mean_z, mean_s, zz, zs, blocks, self.parts, self.live)

    def _add_products(self, dz: Tensor, ds: Tensor, weight: float) -> None:
        """Add weight · d dᵀ to the second moments, for d = (dz, ds)."""
        of_feature = dz.mT  # (g, dx, k)
        self.zz += weight * of_feature.unsqueeze(3) * of_feature.unsqueeze(2)
        of_parts = [ds[:, index] for index in self.parts] or [ds]
        lefts, rights = (dz.flatten(1), *of_parts), (ds, *of_parts)
        sums = (self.zs.flatten(1, 2), *self.blocks)
        for products, left, right in zip(sums, lefts, rights, strict=True):
            products.baddbmm_(left.unsqueeze(2), right.unsqueeze(1), alpha=weight)

    def whole(self) -> "Moments":
        """Return the moments with one block of all signals, also of those that are always zero."""
        if self.live is None:
            return replace(self, blocks=[self.ss], parts=()) if self.parts else self
        index, signals = self.live
        groups, k, features = self.mean_z.shape
        result = Moments.zeros(groups, features, signals, k - 1, self.zz.device)
        result.mean_s[:, index], result.zs[..., index] = self.mean_s, self.zs
        result.blocks[0][:, index.unsqueeze(1), index] = self.ss
        return replace(result, count=self.count, mean_z=self.mean_z, zz=self.zz)

    def among(self, index: Tensor) -> "Moments":
        """Return the moments of the shared signals ``index`` only, with one block of them."""
        ss = self.ss[:, index.unsqueeze(1), index]
        mean_s, zs = self.mean_s[:, index], self.zs[..., index]
        return replace(self, mean_s=mean_s, zs=zs, blocks=[ss], parts=())

    def finite(self) -> bool:
        """Return True if the sums contain no NaN or Inf."""
        sums = self.zz.sum() + self.mean_s.sum() + self.squares.sum()
        return bool(sums.isfinite())


def joined(blocks: Sequence[Tensor], parts: Sequence[Tensor], mean: Tensor, rows: int) -> Tensor:
    """Return the centred Gram matrix of all signals from the blocks of its parts.

    Args:
        blocks: Tensors (g, part, part), as for :class:`Moments`.
        parts: The indices of each block, as for :class:`Moments`.
        mean: Float64 tensor (g, ds), the means of the signals.
        rows: Number of rows.
    """
    if len(blocks) == 1 and blocks[0].shape[1] == mean.shape[1]:
        return blocks[0]
    # between parts Σ s_i s_j = 0, so that the centred product is −n E[s_i] E[s_j]
    whole = mean.unsqueeze(2) @ (-rows * mean).unsqueeze(1)
    for index, block in zip(parts, blocks, strict=True):
        whole[:, index.unsqueeze(1), index] = block
    return whole


def summable(x: Tensor) -> Tensor:
    """Return ``x``, in float32 if it has half precision, which has too few digits for sums."""
    return x.float() if x.element_size() < 4 else x


def gram_of_each(z: Tensor, over: tuple[int, ...]) -> Tensor:
    """Return the Gram matrix of each feature and its own signals.

    Args:
        z: Centred tensor (g, k, rows, dx) or (g, k, n, dx, ...). For k = 1, squares are computed in
            float64; for k > 1, products are computed in the dtype of ``z``.
        over: The dimensions to sum over: all but g, k and dx.

    Returns:
        Float64 tensor (g, dx, k, k).
    """
    if z.shape[1] == 1:
        step = max(1, _CACHED * z.shape[2] // max(z.numel(), 1))
        squares = torch.stack([part.double().square().sum(over) for part in z.split(step, 2)])
        return squares.sum(0).movedim(1, 2).unsqueeze(3)
    kept = [dim for dim in range(2, z.ndim) if dim not in over]
    rows = z.permute(0, *kept, 1, *over).flatten(3)
    return (rows @ rows.mT).double()


def constant(variance: Tensor, mean: Tensor) -> Tensor:
    """Return True for each variable that never varies, up to the rounding of its mean."""
    return variance <= CONSTANT * (variance + mean.square())


def gaussian_information(moments: Moments) -> Tensor:
    """Return the mutual information of each feature and signal, assumed to be jointly Gaussian.

    It is −½ log₂(1 − ρ²) bits, where ρ is their correlation. For ρ = 1 it is infinite; the result
    is then 26 bits, the largest value that float64 can distinguish.

    Args:
        moments: The moments of features and shared signals.

    Returns:
        Float64 tensor (g, dx, ds) of bits; 0 if the feature or the signal never varies.

    Examples:
        >>> s = torch.randn(1, 1000, 1)
        >>> moments = Moments.zeros(1, 2, 1)
        >>> moments.update(torch.cat([3 * s, torch.ones_like(s)], 2), s)
        >>> gaussian_information(moments).squeeze().tolist()[1]
        0.0
    """
    rows, number = max(moments.count, 1), torch.finfo(torch.float64)
    x, s = moments.zz[..., 0, 0] / rows, moments.squares / rows
    # ρ² = cov(x, s)² / (var(x) var(s)), clamped: 0 / 0 would give NaN, rounding a ρ² above 1
    variances = (x.unsqueeze(2) * s.unsqueeze(1)).clamp(min=number.tiny)
    correlation = ((moments.zs[:, 0] / rows).square() / variances).clamp(max=1)
    bits = -0.5 * (1 - correlation).clamp(min=number.eps).log2()
    still = constant(x, moments.mean_z[:, 0]).unsqueeze(2)
    return bits.masked_fill(still | constant(s, moments.mean_s).unsqueeze(1), 0.0)
