"""The regression behind the inverse of a convolution (equation 7), in closed form.

The inverse is linear in its kernel, so the best kernel solves a linear regression. It has one row
per element of X, and the signals of a row are the element's patch of S, which
:mod:`captum_mipin.regression.geometry` defines. The products of X and S are computed as the
gradient of the convolution with respect to its weight. The Gram matrix of S is computed in
:mod:`captum_mipin.regression.lag_gram`.

If kernel and stride are equal, the windows tile x: each element of y depends on its own tile. The
convolution is then a dense layer applied to each tile, and so is its inverse.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from captum_mipin.regression.geometry import Geometry
from captum_mipin.regression.lag_gram import gram_of_patches
from captum_mipin.regression.moments import Moments, gram_of_each, joined, summable


def moments_of_tiles(conv: Geometry, x: Tensor, s: Tensor) -> Moments:
    """Return the moments of the regression of the tiles of ``x`` on ``s``.

    Args:
        conv: A convolution whose windows tile x, see :meth:`Geometry.tiles`.
        x: Tensor (n, channels of x, *size of x), the features.
        s: Tensor (n, channels of y, *size of y), the signals.
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

    If the stride divides the patches into several parts, the moments have one block for each. With
    pointwise signals, which several parts may meet, they have one block of all signals.

    Args:
        conv: The convolution.
        x: Tensor (n, channels of x, *size of x), the features.
        s: Tensor (n, channels of y, *size of y), the signals.
        own: Tensors shaped like ``x``, the features' own signals.
        pointwise: Tensors (n, channels, *size of x), signals that the features of all channels
            share. A feature is regressed only on their values at its own position.
    """
    g, branches, features = conv.groups, 1 + len(own), conv.channels[0]
    # z: for each group, the channels of x, then of the own signals, then of the pointwise ones
    z = x
    if own or pointwise:
        z = torch.cat([t.unflatten(1, (g, -1)) for t in (x, *own, *pointwise)], 2).flatten(1, 2)
    z, s = summable(z), summable(s)
    mean_z = z.double().mean((0, *range(2, z.ndim)))
    z = z - mean_z.to(z.dtype).view(-1, *(1,) * conv.dims)
    mean_s, zs, parts, blocks = _products(conv, z, s)
    rows = x.numel() // x.shape[1]
    if pointwise or len(parts) < 2:
        parts, blocks = [], [joined(blocks, parts, mean_s, rows)]
    z, mean_z = z.unflatten(1, (g, -1)), mean_z.view(g, -1)
    n = branches * features
    if pointwise:
        # The signals are the patches P, followed by the pointwise signals Q, a part of z.
        maps = z.movedim(0, 2).flatten(2)  # (g, channels of z, rows)
        zq, qp = (maps @ maps[:, n:].mT).double(), zs[:, n:]
        pairs = torch.cat([blocks[0], qp.mT], 2), torch.cat([qp, zq[:, n:]], 2)
        blocks = [torch.cat(pairs, 1)]
        mean_s, zs = torch.cat([mean_s, mean_z[:, n:]], 1), torch.cat([zs, zq], 2)
    # (g, branches, n, features, ...)
    z = z[:, :, :n].unflatten(2, (branches, features)).movedim(0, 2)
    return Moments(
        rows,
        mean_z[:, :n].unflatten(1, (branches, features)),
        mean_s,
        gram_of_each(z, (2, *range(4, z.ndim))),
        zs[:, :n].unflatten(1, (branches, features)),
        blocks,
        parts,
    )


def _products(
    conv: Geometry, z: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return the mean of the patches P of ``s``, Σ z Pᵀ, and Σ (P − mean)(P − mean)ᵀ in blocks.

    The signals are split into S = V + level, where level is the mean of each channel; outside of
    the grid of y they are 0. Otherwise a large mean would cost digits of float32 sums. Terms with
    the level need only the sums of z and V over the examples, and are computed in float64.

    Args:
        conv: The convolution, with g groups.
        z: Centred tensor (n, g · channels, *size of x).
        s: Tensor (n, channels of y, *size of y), the signals.

    Returns:
        Float64 tensors (g, signals) and (g, channels, signals), then ``parts`` and ``blocks`` of
        :class:`~captum_mipin.regression.moments.Moments`.
    """
    g, rows, over = conv.groups, z.numel() // z.shape[1], (0, *range(2, s.ndim))
    level = s.mean(over).view(-1, *(1,) * conv.dims)
    v = s - level
    level = level.double()
    v_sum, z_sum = v.double().sum(0, keepdim=True), z.double().sum(0, keepdim=True)
    ground = level.expand_as(v_sum)
    z_ones = torch.ones_like(z_sum[:, :g])
    # Σ z Pᵀ = Σ z P(V)ᵀ + Σ z P(level)ᵀ
    zs = _correlate(conv, v, z) + _correlate(conv, ground, z_sum)
    sums = _correlate(conv, v_sum + len(s) * ground, z_ones)[:, 0]
    # Entries of a tap that has no nonzero signal are set to exact zeros instead of rounding errors.
    sizes = _correlate(conv, s.abs().sum(0, keepdim=True).double(), z_ones)[:, 0]
    unseen, some = _unseen(sizes)
    sums.masked_fill_(unseen, 0.0)
    parts, blocks = [], []
    first = torch.arange(0, sums.shape[1], prod(conv.kernel)).unsqueeze(1)
    # Σ (P − mean)(P − mean)ᵀ = Σ P(V) P(V)ᵀ + L Rᵀ + R Lᵀ − (Σ P)(Σ P)ᵀ / rows
    factors = _level_factors(conv, v_sum, level, len(s), z.shape)
    for (taps, block), (left, right) in zip(
        gram_of_patches(conv, v, z.shape), factors, strict=True
    ):
        index = (first + taps).flatten()
        total, zero = sums[:, index].unsqueeze(2), unseen[:, index]
        block.baddbmm_(
            torch.cat([left, right, -total], 2), torch.cat([right, left, total / rows], 2).mT
        )
        if some:
            block.masked_fill_(zero.unsqueeze(1) | zero.unsqueeze(2), 0.0)
        parts.append(index)
        blocks.append(block)
    return sums / rows, zs, parts, blocks


def _unseen(sizes: Tensor) -> tuple[Tensor, bool]:
    """Return where ``sizes`` is 0, and False if ``sizes`` is 0 nowhere.

    On a GPU the second value is always True, because a test would wait for the GPU.
    """
    unseen = sizes == 0
    return unseen, unseen.device.type != "cpu" or bool(unseen.any())


def _correlate(conv: Geometry, s: Tensor, x: Tensor) -> Tensor:
    """Return Σ x Pᵀ for the patches P of ``s``: float64 (groups, channels of x, signals)."""
    first, second, *kernel = conv.weight_shape
    channels = (x.shape[1], second) if conv.transposed else (first, x.shape[1] // conv.groups)
    wide = replace(conv, weight_shape=(*channels, *kernel))
    return wide.to_rows(wide.gradient(s, x, x.new_empty(wide.weight_shape), of=1)).double()


def _level_factors(
    conv: Geometry, v_sum: Tensor, level: Tensor, examples: int, x_size: torch.Size
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each block factors L, R with SᵀS = VᵀV + L Rᵀ + R Lᵀ for S = V + level.

    The rank of L and R is the number of taps. They are products of the patches of ΣV, the sum over
    the examples, with those of a map of ones: their cost does not depend on the number of examples.

    Args:
        conv: The convolution.
        v_sum: Tensor (1, channels of y, *size of y), the sum of V over the examples.
        level: Tensor (channels of y, 1, ...), the mean of each channel.
        examples: Number of examples.
        x_size: Size of x.

    Yields:
        L and R, float64 tensors (groups, channels of s · taps, taps), for the taps of one block.
    """
    g, c = conv.groups, conv.channels[1]
    # One group for each channel of s, with two channels: V, and 1 inside of y.
    channels = (g * c, 2) if conv.transposed else (2 * g * c, 1)
    couples = replace(conv, weight_shape=(*channels, *conv.kernel), groups=g * c)
    pairs = torch.stack([v_sum, torch.ones_like(v_sum)], 2).flatten(1, 2)
    level = level.view(g, c, 1, 1)
    for taps, block in gram_of_patches(couples, pairs, x_size):
        k = len(taps)
        products = block.view(g, c, 2, k, 2, k)
        left = products[:, :, 0, :, 1] + level * products[:, :, 1, :, 1] * (examples / 2)
        right = level * torch.eye(k, dtype=level.dtype, device=level.device)
        yield left.reshape(g, c * k, k), right.reshape(g, c * k, k)
