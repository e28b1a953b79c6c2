"""The regression behind the inverse of a convolution (equation 7), in closed form.

The inverse is linear in its kernel, so the best kernel solves normal equations. Their rows are the
elements of X; the signals of an element are the patch of S that reaches it, see
:mod:`captum_mipin.regression.geometry`. Correlating X with S is the convolution's own gradient with
respect to its weight; the Gram matrix comes from :mod:`captum_mipin.regression.lag_gram`.

Where the kernel is the stride, each element of y reaches a tile of x of its own. The convolution is
a dense layer on tiles then, and so is its inverse.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from captum_mipin.regression.geometry import Geometry
from captum_mipin.regression.lag_gram import gram_of_patches
from captum_mipin.regression.moments import Moments, gram_of_each, summable


def moments_of_tiles(conv: Geometry, x: Tensor, s: Tensor) -> Moments:
    """Return the moments of the regression of the tiles of ``x``, channel by channel, on ``s``.

    Args:
        conv: A convolution whose windows tile x, see :meth:`Geometry.tiles`.
        x: (n, channels of x, *size of x) features.
        s: (n, channels of y, *size of y) signals.
    """
    g, (channels, signals), taps = conv.groups, conv.channels, prod(conv.kernel)
    for dim, k in enumerate(conv.kernel):
        x = x.unflatten(2 + 2 * dim, (-1, k))  # (n, channels, tiles, taps, tiles, taps, ...)
    x = x.unflatten(1, (g, channels))
    tiles, within = range(3, x.ndim, 2), range(4, x.ndim, 2)
    x = x.permute(1, 0, *tiles, 2, *within).reshape(g, -1, channels * taps)
    s = s.unflatten(1, (g, signals)).movedim((1, 2), (0, -1)).reshape(g, -1, signals)
    moments = Moments.zeros(g, channels * taps, signals, device=x.device)
    moments.update(x, s)
    return moments


def moments_of_patches(
    conv: Geometry,
    x: Tensor,
    s: Tensor,
    own: Sequence[Tensor] = (),
    pointwise: Sequence[Tensor] = (),
) -> Moments:
    """Return the moments of the regression of ``x`` on the patches of ``s`` and further signals.

    Args:
        conv: The convolution.
        x: (n, channels of x, *size of x) features.
        s: (n, channels of y, *size of y) signals.
        own: Each feature's own signals, each like ``x``.
        pointwise: Further signals (n, channels, *size of x) that all features share. Of these, only
            the values at its own place reach an element.
    """
    g, branches, features = conv.groups, 1 + len(own), conv.channels[0]
    # z: of each group the channels of x, then of each own signal, then of each pointwise one
    z = x
    if own or pointwise:
        z = torch.cat([t.unflatten(1, (g, -1)) for t in (x, *own, *pointwise)], 2).flatten(1, 2)
    z, s = summable(z), summable(s)
    mean_z = z.double().mean((0, *range(2, z.ndim)))
    z = z - mean_z.to(z.dtype).view(-1, *(1,) * conv.dims)
    mean_s, zs, ss = _products(conv, z, s)
    z, mean_z = z.unflatten(1, (g, -1)), mean_z.view(g, -1)
    n = branches * features
    if pointwise:
        # Signals are the patches P and, behind them, the pointwise ones Q, which are part of z.
        maps = z.movedim(0, 2).flatten(2)  # (g, channels of z, rows)
        zq, qp = (maps @ maps[:, n:].mT).double(), zs[:, n:]
        ss = torch.cat([torch.cat([ss, qp.mT], 2), torch.cat([qp, zq[:, n:]], 2)], 1)
        mean_s, zs = torch.cat([mean_s, mean_z[:, n:]], 1), torch.cat([zs, zq], 2)
    # (g, branches, n, features, ...)
    z = z[:, :, :n].unflatten(2, (branches, features)).movedim(0, 2)
    return Moments(
        x.numel() // x.shape[1],
        mean_z[:, :n].unflatten(1, (branches, features)),
        mean_s,
        gram_of_each(z, (2, *range(4, z.ndim))),
        zs[:, :n].unflatten(1, (branches, features)),
        ss,
    )


def _products(conv: Geometry, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of the patches P of ``s``, Σ z Pᵀ, and Σ (P − mean)(P − mean)ᵀ.

    The signals are taken as S = V + level on the grid of y and 0 outside, where level is the mean
    of each channel. Without that, a large mean would eat up the digits of float32 sums. What
    concerns all examples alike is taken from their sums, in float64.

    Args:
        conv: The convolution.
        z: (n, groups · channels, *size of x), centred.
        s: (n, channels of y, *size of y) signals.

    Returns:
        (g, signals), (g, channels, signals) and (g, signals, signals) float64.
    """
    g, rows, over = conv.groups, z.numel() // z.shape[1], (0, *range(2, s.ndim))
    level = s.mean(over).view(-1, *(1,) * conv.dims)
    v = s - level
    level = level.double()
    v_sum, z_sum = v.double().sum(0, keepdim=True), z.double().sum(0, keepdim=True)
    ground = level.expand_as(v_sum)
    z_ones = torch.ones_like(z_sum[:, :g])
    # Σ z Pᵀ, with P from V and from the level
    zs = _correlate(conv, v, z) + _correlate(conv, ground, z_sum)
    sums = _correlate(conv, v_sum + len(s) * ground, z_ones)[:, 0]
    # Σ P Pᵀ = Σ over V + L Rᵀ + R Lᵀ, and centred: less (Σ P)(Σ P)ᵀ / rows
    left, right = _level_factors(conv, v_sum, level, len(s), z.shape)
    mean = sums / rows
    ss = gram_of_patches(conv, v, z.shape)
    ss.baddbmm_(
        torch.cat([left, right, -sums.unsqueeze(2)], 2),
        torch.cat([right, left, mean.unsqueeze(2)], 2).mT,
    )
    # A tap that never sees a signal gets exact zeros; the sums above leave rounding there.
    sizes = _correlate(conv, s.abs().sum(0, keepdim=True).double(), z_ones)[:, 0]
    unseen = sizes == 0
    if unseen.any():
        ss.masked_fill_(unseen.unsqueeze(1) | unseen.unsqueeze(2), 0.0)
    return mean, zs, ss


def _correlate(conv: Geometry, s: Tensor, x: Tensor) -> Tensor:
    """Return Σ x Pᵀ over the patches P of ``s``: (groups, channels of x, signals) float64."""
    first, second, *kernel = conv.weight_shape
    channels = (x.shape[1], second) if conv.transposed else (first, x.shape[1] // conv.groups)
    wide = replace(conv, weight_shape=(*channels, *kernel))
    return wide.to_rows(wide.gradient(s, x, x.new_empty(wide.weight_shape), of=1)).double()


def _level_factors(
    conv: Geometry, v_sum: Tensor, level: Tensor, examples: int, x_size: torch.Size
) -> tuple[Tensor, Tensor]:
    """Return L and R such that S = V + level adds L Rᵀ + R Lᵀ to the Gram matrix of V.

    Their rank is the number of taps, so they take one map of sums and one of ones.

    Args:
        conv: The convolution.
        v_sum: (1, channels of y, *size of y), V summed over the examples.
        level: (channels of y, 1, ...).
        examples: Number of examples.
        x_size: Size of x.

    Returns:
        L and R, (groups, channels of s · taps, taps) float64.
    """
    g, c, k = conv.groups, conv.channels[1], prod(conv.kernel)
    ones = torch.ones_like(v_sum[:, :1])
    single = replace(conv, weight_shape=(1, 1, *conv.kernel), groups=1)
    # 1 where the tap sees y at all, else 0: (1, taps, *size of x)
    seen = single.patches(ones, x_size)[0].mT.reshape(1, k, *x_size[2:])

    def across(s: Tensor) -> Tensor:
        """Return Σ P over where each tap sees y: (channels of s · taps, taps)."""
        channels = (s.shape[1],) * 2  # of s; those of x follow from what s is correlated with
        return _correlate(replace(single, weight_shape=(*channels, *conv.kernel)), s, seen)[0].mT

    level = level.view(g, c, 1, 1)
    left = across(v_sum).reshape(g, c, k, k) + level * across(ones) * (examples / 2)
    right = level * torch.eye(k, dtype=level.dtype, device=level.device)
    return left.reshape(g, c * k, k), right.reshape(g, c * k, k)
