"""The Gram matrix of the patches of a convolution, from the autocorrelation of a signal.

Here s is the signal at the output of the convolution, and x is the convolution's input, which is
regressed on the patches of s. P_j[p] is the value of s at tap j of the patch of position p in x.
For stride 1, the product of taps j and j' depends only on their lag dilation·(j − j'):

    Σ_p P_j[p] P_j'[p]ᵀ = Σ_q s[q] s[q + dilation·(j − j')]ᵀ − (terms of positions p outside of x)

With k taps along each of d dimensions, the matrix has k^(2d) blocks, but only (2k − 1)^d lags. The
sum for each lag is computed by a fast Fourier transform (FFT). A convolution with a larger stride
is split into several of stride 1, see :func:`_phases`. For transposed convolutions, whose patches
overlap less, and for kernels of one tap, the patches are multiplied directly.

Other symbols: g groups, c channels of s in each group, n examples.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.regression.geometry import Geometry

#: Maximum number of elements of a buffer of patches or padded signals.
CHUNK = 1 << 24


def gram_of_patches(conv: Geometry, s: Tensor, x_size: torch.Size) -> list[tuple[Tensor, Tensor]]:
    """Return Σ P Pᵀ over the patches P of all positions of x, not centred, in blocks.

    All products of taps of different blocks are 0, because no position sees both.

    Args:
        conv: The convolution.
        s: Tensor (n, channels of y, *size of y), the signals.
        x_size: Size of x; only its spatial part is used.

    Returns:
        For each block the ascending indices of its taps, and a float64 tensor (groups, signals,
        signals) for its signals, the channels of s times these taps. The blocks have the order of
        :func:`~captum_mipin.regression.geometry.parts_by_position`.
    """
    s, conv = conv.full(s), replace(conv, skip=())
    g, c, k = conv.groups, conv.channels[1], prod(conv.kernel)
    whole = conv, torch.arange(k), x_size
    phases = [whole] if conv.transposed else list(_phases(conv, x_size))
    widths = [c * len(taps) for _, taps, _ in phases]
    totals = [s.new_zeros(g, width, width, dtype=torch.float64) for width in widths]
    result = [(taps, total) for (_, taps, _), total in zip(phases, totals, strict=True)]
    views = [_blocks(total, c) for total in totals]  # what is added to a view changes its total
    # Every lag of a phase is one of the lags of the smallest kernel that holds those of all phases.
    kernel = [max(sizes) for sizes in zip(*(phase.kernel for phase, _, _ in phases), strict=True)]
    if conv.transposed or prod(kernel) == 1:
        for (phase, taps, size), view in zip(phases, views, strict=True):
            width = prod(size[2:]) * len(taps) * s.shape[1]
            for piece in s.split(max(1, CHUNK // width)):
                patches = phase.patches(piece, size)
                view += _blocks(patches.mT @ patches, c)
        return result
    widest = replace(phases[0][0], weight_shape=(*conv.weight_shape[:2], *kernel))
    width = prod(z + r for z, r in zip(s.shape[2:], widest.reach, strict=True))
    for piece in s.split(max(1, CHUNK // (width * s.shape[1]))):
        correlations = _correlations(widest, piece)
        for (phase, taps, size), view in zip(phases, views, strict=True):
            # (taps, taps, dims): the index of each pair's lag, where index 0 is the smallest lag
            places = torch.stack(torch.unravel_index(torch.arange(len(taps)), phase.kernel), 1)
            pairs = places.unsqueeze(1) - places + torch.tensor(kernel) - 1
            view += correlations[pairs.unbind(-1)]
            for windows, seen in _cut_away(phase, piece, size):
                view[seen.unsqueeze(1), seen] -= _blocks(windows.mT @ windows, c)
    return result


def _phases(conv: Geometry, x_size: torch.Size) -> Iterator[tuple[Geometry, Tensor, torch.Size]]:
    """Split a strided convolution into convolutions of stride 1.

    The positions p of x are split by their offset p mod stride. All positions of one offset need
    the same taps, those for which (p + padding − dilation·j) / stride is an integer. Together with
    these taps they form a convolution of stride 1.

    Yields:
        The convolution of one offset, the indices of its taps, and the size of its part of x.
    """
    along: list[list[tuple[list[int], int, int, int]]] = []
    shape = conv.kernel, conv.stride, conv.padding, conv.dilation, x_size[2:]
    for k, step, padding, dilation, z in zip(*shape, strict=True):
        offsets = []
        for offset in range(min(step, z)):
            taps = [j for j in range(k) if (offset + padding - dilation * j) % step == 0]
            if taps:
                first = (offset + padding - dilation * taps[0]) // step
                apart = dilation // gcd(dilation, step)
                offsets.append((taps, first, apart, -(-(z - offset) // step)))
        along.append(offsets)
    for parts in itertools.product(*along):
        taps_along, paddings, dilations, sizes = zip(*parts, strict=True)
        part, numbers = _of_taps(conv, taps_along)
        ones = (1,) * conv.dims
        phase = replace(part, stride=ones, padding=paddings, dilation=dilations)
        yield phase, numbers, torch.Size([*x_size[:2], *sizes])


def _correlations(conv: Geometry, s: Tensor) -> Tensor:
    """Return Σ_q s_c[q] s_c'[q + dilation·lag] for every lag in [1 − k, k − 1]^d.

    Correlation theorem: the sum over q is the inverse Fourier transform of conj(ŝ_c) ŝ_c', where ŝ
    is the Fourier transform of s. To save time, the products are summed over the examples before
    the inverse transform, which computes only the lags that are needed.

    Returns:
        Tensor (2k − 1 per dimension, groups, channels, channels).
    """
    g, c, dims = conv.groups, conv.channels[1], conv.dims
    # The FFT is periodic: on a smaller grid, s[q + lag] would wrap around to the other end of s.
    size = [_fast(z + reach) for z, reach in zip(s.shape[2:], conv.reach, strict=True)]
    spectrum = torch.fft.rfftn(s, size, tuple(range(-dims, 0)))
    waves = spectrum.shape[2:]
    spectrum = spectrum.view(len(s), g, c, -1).permute(3, 1, 2, 0).contiguous()
    result = []
    for part in spectrum.split(max(1, CHUNK // (g * c * prod(size))), 2):
        field = part.conj() @ spectrum.mT  # (waves, groups, some channels, channels)
        for i in reversed(range(dims)):
            lags = torch.arange(1 - conv.kernel[i], conv.kernel[i]) * conv.dilation[i]
            back = _inverse_transform(size[i], lags, i == dims - 1).to(field)
            field = back @ field.reshape(prod(waves[:i]), waves[i], -1)
        widths = [2 * k - 1 for k in conv.kernel]
        result.append(field.real.reshape(*widths, g, -1, c))
    return torch.cat(result, -2)


def _inverse_transform(size: int, lags: Tensor, half: bool) -> Tensor:
    """Return the matrix (lags, waves) of an inverse Fourier transform for the given lags only.

    Multiplying by this matrix takes a third of the time of ``irfft``, which computes all lags.

    Args:
        size: Length of the transformed axis.
        lags: Integer tensor (lags,), the lags of the result.
        half: True if the waves are those of ``rfft``, which omits the mirrored half.
    """
    waves = torch.arange(size // 2 + 1 if half else size, dtype=torch.float64)
    # A wave whose mirror image is omitted counts twice.
    mirrored = half & (waves > 0) & (2 * waves < size)
    angle = lags.unsqueeze(1) * waves * (2 * torch.pi / size)
    return torch.polar(((1 + mirrored.to(waves)) / size).expand_as(angle).contiguous(), angle)


def _cut_away(conv: Geometry, s: Tensor, x_size: torch.Size) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the windows of ``s`` at the positions outside of x, each position once.

    These positions form strips along the sides of x. In a strip, only some taps lie inside of s.

    Yields:
        Tensor (groups, n · positions, channels of s · taps), the windows of a strip with the taps
        that lie inside of s, and the indices of these taps.
    """
    kernel, reach, ones = conv.kernel, conv.reach, (1,) * conv.dims
    size = s.shape[2:]
    s = F.pad(s, [n for r in reversed(reach) for n in (r, r)])
    # The range of positions not yet yielded; at first all positions with any tap inside of s.
    low, high = [0] * conv.dims, [z + r for z, r in zip(size, reach, strict=True)]
    for dim, (padding, z) in enumerate(zip(conv.padding, x_size[2:], strict=True)):
        k, d, r = kernel[dim], conv.dilation[dim], reach[dim]
        first, last = min(max(padding, 0), high[dim]), max(min(padding + z, high[dim]), 0)
        for start, stop in ((0, first), (max(first, last), high[dim])):
            # The t-th value of the window at p is at p + d·t; s begins at r and ends at r + size.
            seeing = [t for t in range(k) if start < r - d * t + size[dim] and stop > r - d * t]
            if start == stop or not seeing:
                continue
            box = list(zip(low, high, reach, strict=True))
            box[dim] = (start + d * seeing[0], stop + d * seeing[0], d * (seeing[-1] - seeing[0]))
            strip = s
            for i, (begin, end, more) in enumerate(box, 2):
                strip = strip.narrow(i, begin, end - begin + more)
            taps: list[Sequence[int]] = [range(n) for n in kernel]
            taps[dim] = [k - 1 - t for t in reversed(seeing)]  # windows have the last tap first
            part, numbers = _of_taps(conv, taps)
            yield part.windows(strip, ones), numbers
        low[dim], high[dim] = first, max(first, last)


def _blocks(gram: Tensor, channels: int) -> Tensor:
    """Return a Gram matrix (g, c · taps, c · taps) split into blocks (taps, taps, g, c, c)."""
    taps = gram.shape[1] // channels
    return gram.view(-1, channels, taps, channels, taps).permute(2, 4, 0, 1, 3)


def _of_taps(conv: Geometry, taps: Sequence[Sequence[int]]) -> tuple[Geometry, Tensor]:
    """Return the convolution with a part of the taps, and the flattened indices of these taps.

    Args:
        conv: The convolution.
        taps: Indices of the chosen taps along each dimension.
    """
    grid = torch.meshgrid(*map(torch.tensor, taps), indexing="ij")
    numbers: Tensor = torch.arange(prod(conv.kernel)).view(conv.kernel)[grid].flatten()
    return replace(conv, weight_shape=(*conv.weight_shape[:2], *map(len, taps))), numbers


def _fast(size: int) -> int:
    """Return the smallest length that is at least ``size`` and has a fast Fourier transform."""
    # n has only the prime factors 2, 3 and 5 if, and only if, it divides a high power of 30
    return next(n for n in itertools.count(size) if pow(30, n.bit_length(), n) == 0)
