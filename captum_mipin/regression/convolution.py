"""The regression behind the inverse of a convolution (equation 7), in closed form.

The inverse g of a convolution is its transpose with a new kernel; the inverse of a transposed convolution is a
convolution. Either is linear in the kernel, so that the best kernel solves normal equations whose rows are the
elements of X and whose signals are the patch of S that can reach each element:

    X[p] ≈ Σ_j W_j S[(p + padding − dilation·j) / stride] + b        (transpose of a convolution)
    X[p] ≈ Σ_j W_j S[stride·p − padding + dilation·j] + b            (transpose of a transposed convolution)

Applying g and correlating X with S are a convolution's own two gradients, so torch does both. What is left is the
Gram matrix of the patches. For a convolution of stride 1 patches overlap so much that it has only (2k−1)^d distinct
blocks, one a lag between two taps, up to the rows that padding cuts away: they are correlations of S with itself, taken
by fast Fourier transform. A convolution of another stride is several of stride 1, one for each offset of x from the grid of y.
Patches are unfolded for transposed convolutions, and for kernels of one tap. Where the kernel is the stride, each element of y
reaches a tile of x of its own: the convolution is a dense layer on tiles, and so is its inverse.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.regression.ridge import Moments, gram_of_each

#: Largest buffer of patches or of padded signals, in elements.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Geometry:
    """A (transposed) convolution without its weights.

    Attributes:
        weight_shape: Shape of the forward weight: (out, in / groups, *kernel), or (in, out / groups, *kernel) if transposed.
        stride: One value a spatial dimension, as all that follow.
        padding: Zeros added before (and after) the input.
        dilation: Spacing of the taps.
        groups: Number of independent groups of channels.
        transposed: Whether the forward operation is a transposed convolution.
        output_padding: Of a transposed convolution.
        skip: Leading outputs of the plain symmetric convolution that the operation drops (``padding="same"`` with an
            even kernel pads one zero less on the left).
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    skip: tuple[int, ...] = ()

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps along each dimension."""
        return self.weight_shape[2:]

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel)

    @property
    def reach(self) -> tuple[int, ...]:
        """Distance from the first tap to the last."""
        return tuple((k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of x and of s in each group."""
        first, second = self.weight_shape[:2]
        return (first // self.groups, second) if self.transposed else (second, first // self.groups)

    @property
    def features(self) -> tuple[int, int]:
        """Regressed features and signals of each group: channels of x, and channels of s times taps."""
        x, s = self.channels
        return x, s * prod(self.kernel)

    def full(self, s: Tensor) -> Tensor:
        """``s`` with the outputs that the operation dropped on the left put back as zeros."""
        return (
            F.pad(s, [n for skip in reversed(self.skip) for n in (skip, 0)])
            if any(self.skip)
            else s
        )

    def gradient(self, s: Tensor, x: Tensor, weight: Tensor, of: int) -> Tensor:
        """The convolution's gradient at ``s``: with respect to its input (``of=0``) or its weight (``of=1``)."""
        mask = [of == 0, of == 1, False]
        out_pad = self.output_padding or (0,) * self.dims
        arguments = (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            out_pad,
            self.groups,
            mask,
        )
        result: Tensor = torch.ops.aten.convolution_backward(
            self.full(s), x, weight, None, *arguments
        )[of]
        return result

    def apply(self, s: Tensor, weight: Tensor, bias: Tensor | None, x_size: torch.Size) -> Tensor:
        """g(S): signals (n, channels of y, *size of y) to features of size ``x_size``."""
        x = self.gradient(s, s.new_empty(x_size), weight, of=0)
        return x if bias is None else x.add_(bias.view(-1, *(1,) * self.dims))

    def to_rows(self, weight: Tensor) -> Tensor:
        """A weight as regression coefficients (groups, channels of x, channels of s · taps)."""
        g, (x, s) = self.groups, self.channels
        if self.transposed:
            return weight.reshape(g, x, -1)
        return weight.reshape(g, s, x, -1).transpose(1, 2).reshape(g, x, -1)

    def to_weight(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`to_rows`."""
        g, (x, s) = self.groups, self.channels
        if not self.transposed:
            rows = rows.reshape(g, x, s, -1).transpose(1, 2)
        return rows.reshape(self.weight_shape)

    def patches(self, s: Tensor, x_size: torch.Size, places: Tensor | None = None) -> Tensor:
        """The patch of ``s`` that reaches each element of x.

        Args:
            s: (n, channels, *size) signals, complete (see :meth:`full`).
            x_size: Size of x, of which the spatial part counts.
            places: Positions of x, counted row by row, to look at alone.

        Returns:
            (groups, n · positions, channels of s · taps), taps in the order of the weight.
        """
        size, reach = x_size[2:], self.reach
        if self.transposed:
            step = self.stride
            s = _place(
                s,
                self.padding,
                [t * (z - 1) + r + 1 for t, z, r in zip(step, size, reach, strict=True)],
            )
        else:
            step = (1,) * self.dims
            s = _spread(s, self.stride)
            before = [r - p for r, p in zip(reach, self.padding, strict=True)]
            s = _place(s, before, [z + r for z, r in zip(size, reach, strict=True)])
        return self._unfold(s, step, places)

    def _unfold(self, s: Tensor, step: tuple[int, ...], places: Tensor | None = None) -> Tensor:
        """All windows of ``s``, or some: (groups, n · positions, channels · taps)."""
        for dim, (reach, dilation, stride) in enumerate(
            zip(self.reach, self.dilation, step, strict=True), 2
        ):
            s = s.unfold(dim, reach + 1, stride)[..., ::dilation]
        if places is not None:
            some: tuple[Any, ...] = (
                slice(None),
                slice(None),
                *torch.unravel_index(places, s.shape[2 : 2 + self.dims]),
            )
            s = s[some]
        if (
            not self.transposed
        ):  # tap j lies dilation·j before the element, so the last tap comes first
            s = s.flip(tuple(range(-self.dims, 0)))
        n, channels = s.shape[:2]
        s = s.reshape(n, self.groups, channels // self.groups, -1, prod(self.kernel))
        return s.permute(1, 0, 3, 2, 4).reshape(self.groups, -1, self.features[1])

    def tiles(self, x_size: torch.Size) -> bool:
        """Whether the windows of y tile x: several taps, as far apart as the stride, and nothing left over."""
        if (
            self.stride != self.kernel
            or self.transposed
            or any(self.skip)
            or prod(self.kernel) == 1
        ):
            return False
        sizes = zip(self.kernel, self.dilation, self.padding, x_size[2:], strict=True)
        return all((d == 1 or k == 1) and p == 0 and z % k == 0 for k, d, p, z in sizes)

    def moments_of_tiles(self, x: Tensor, s: Tensor) -> Moments:
        """Moments of the regression of the tiles of ``x``, channel by channel, on ``s``."""
        g, (channels, signals), taps = self.groups, self.channels, prod(self.kernel)
        for dim, k in enumerate(self.kernel):
            x = x.unflatten(2 + 2 * dim, (-1, k))  # (n, channels, tiles, taps, tiles, taps, ...)
        x = x.unflatten(1, (g, channels))
        places, within = range(3, x.ndim, 2), range(4, x.ndim, 2)
        x = x.permute(1, 0, *places, 2, *within).reshape(g, -1, channels * taps)
        s = s.unflatten(1, (g, signals)).movedim((1, 2), (0, -1)).reshape(g, -1, signals)
        moments = Moments.zeros(g, channels * taps, signals, device=x.device)
        moments.update(x, s)
        return moments

    def moments(
        self, x: Tensor, s: Tensor, own: Sequence[Tensor] = (), pointwise: Sequence[Tensor] = ()
    ) -> Moments:
        """Moments of the regression of ``x`` on the patches of ``s``, and on further signals.

        Args:
            x: (n, in, *size) features.
            s: (n, out, *size of y) signals.
            own: Each feature's own signals, like ``x``.
            pointwise: Further signals (n, channels, *size) that the features share, of which only those at its own place reach
                an element.
        """
        g, k, channels = self.groups, 1 + len(own), self.channels[0]
        rows = x.shape[0] * prod(x.shape[2:])
        if (
            own or pointwise
        ):  # of each group, channels of x, then of each own signal, then of each pointwise one
            x = torch.cat([t.unflatten(1, (g, -1)) for t in (x, *own, *pointwise)], 2).flatten(1, 2)
        x, s = (
            t.float() if t.element_size() < 4 else t for t in (x, s)
        )  # half precision cannot hold sums
        wide = self._widened(x.shape[1] // g)
        over = (0, *range(2, x.ndim))
        mean = x.double().mean(over)
        x = x - mean.to(x.dtype).view(-1, *(1,) * self.dims)
        level = s.mean(over).view(-1, *(1,) * self.dims)  # S = V + level inside its grid, 0 outside
        v = s - level
        level = level.double()
        # What concerns all examples alike is taken from their sums, in float64.
        v_sum, x_sum = v.double().sum(0, keepdim=True), x.double().sum(0, keepdim=True)
        ones, x_ones = torch.ones_like(v_sum), torch.ones_like(x_sum[:, :: x.shape[1] // g])
        narrow = self._widened(1)

        def correlate(geometry: "Geometry", s: Tensor, x: Tensor) -> Tensor:
            return geometry.to_rows(
                geometry.gradient(s, x, x.new_empty(geometry.weight_shape), of=1)
            ).double()

        cross = correlate(wide, v, x) + correlate(wide, level * ones, x_sum)
        sums = correlate(narrow, v_sum + len(s) * level * ones, x_ones)[:, 0]
        sizes = correlate(narrow, s.abs().sum(0, keepdim=True).double(), x_ones)[:, 0]
        gram = self.gram(v, x.shape)
        left, right = self._level_factors(v_sum, level, len(s), x.shape)
        mean_s = (sums / rows).unsqueeze(2)
        gram.baddbmm_(
            torch.cat([left, right, -sums.unsqueeze(2)], 2), torch.cat([right, left, mean_s], 2).mT
        )
        unseen = (
            sizes == 0
        )  # lags and what padding cuts away leave rounding where a tap never sees a signal
        if unseen.any():
            gram.masked_fill_(unseen.unsqueeze(1) | unseen.unsqueeze(2), 0.0)
        own_channels = k * channels
        z = (
            x.unflatten(1, (g, -1))[:, :, :own_channels]
            .unflatten(2, (k, channels))
            .transpose(0, 1)
            .transpose(1, 2)
        )
        mean_z, zz = (
            mean.view(g, -1),
            gram_of_each(z, (2, *range(4, z.ndim))),
        )  # z: (g, k, n, channels, *size)
        mean_s, zs = mean_s.squeeze(2), cross[:, :own_channels].unflatten(1, (k, channels))
        if pointwise:
            maps = x.unflatten(1, (g, -1)).movedim(0, 2).flatten(2)  # (g, all channels, rows)
            beside = (maps @ maps[:, own_channels:].mT).double()
            mean_s = torch.cat([mean_s, mean_z[:, own_channels:]], 1)
            zs = torch.cat([zs, beside[:, :own_channels].unflatten(1, (k, channels))], 3)
            between, among = cross[:, own_channels:], beside[:, own_channels:]
            gram = torch.cat([torch.cat([gram, between.mT], 2), torch.cat([between, among], 2)], 1)
        return Moments(
            rows, mean_z[:, :own_channels].unflatten(1, (k, channels)), mean_s, zz, zs, gram
        )

    def _widened(self, channels: int) -> "Geometry":
        """This convolution with so many channels of x in each group."""
        first, second = self.weight_shape[:2]
        shape = (self.groups * channels, second) if self.transposed else (first, channels)
        return replace(self, weight_shape=(*shape, *self.kernel))

    def _level_factors(
        self, v_sum: Tensor, level: Tensor, rows: int, x_size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """What the level of each channel adds to the Gram matrix of V is L Rᵀ + R Lᵀ, of the rank of the taps.

        It takes one map of sums and one of ones. L and R are (groups, channels of s · taps, taps).
        """
        g, c, k = self.groups, self.channels[1], prod(self.kernel)
        ones = torch.ones_like(v_sum[:, :1])
        single = replace(self, weight_shape=(1, 1, *self.kernel), groups=1)
        seen = single.patches(single.full(ones), x_size)[0].mT.reshape(
            1, k, *x_size[2:]
        )  # where each tap sees S at all

        def across(s: Tensor) -> Tensor:
            """Sums of the patches of ``s`` over where each tap sees S: (channels of s · taps, taps)."""
            shape = (k, s.shape[1]) if self.transposed else (s.shape[1], k)
            wide = replace(self, weight_shape=(*shape, *self.kernel), groups=1)
            return wide.to_rows(wide.gradient(s, seen, seen.new_empty(wide.weight_shape), of=1))[
                0
            ].mT

        level = level.view(g, c, 1, 1)
        left = across(v_sum).reshape(g, c, k, k) + level * across(ones) * (rows / 2)
        right = level * torch.eye(k, dtype=level.dtype, device=level.device)
        return left.reshape(g, c * k, k), right.reshape(g, c * k, k)

    def gram(self, s: Tensor, x_size: torch.Size) -> Tensor:
        """Gram matrix of the patches, not centred: (groups, channels of s · taps, the same), float64."""
        s = self.full(s)
        if self.transposed or all(step == 1 for step in self.stride):
            return self._gram_of_one_phase(s, x_size)
        g, c, k = self.groups, self.channels[1], prod(self.kernel)
        total = s.new_zeros(k, k, g, c, c, dtype=torch.float64)
        for phase, taps, size in self._phases(x_size):
            part = phase._gram_of_one_phase(s, size).view(g, c, len(taps), c, len(taps))
            index = s.new_tensor(taps, dtype=torch.long)
            total[index.unsqueeze(1), index] = part.permute(2, 4, 0, 1, 3)
        return total.permute(2, 3, 0, 4, 1).reshape(g, c * k, c * k)

    def _phases(self, x_size: torch.Size) -> Iterator[tuple["Geometry", list[int], torch.Size]]:
        """A strided convolution as convolutions of stride 1, one for the elements of x at each offset from the grid of y.

        Each has some of the taps: those by which y, which lies on every stride-th position, can reach such an element.
        """
        each: list[list[tuple[list[int], int, int, int]]] = []
        for k, step, padding, dilation, z in zip(
            self.kernel, self.stride, self.padding, self.dilation, x_size[2:], strict=True
        ):
            found = []
            for offset in range(min(step, z)):
                taps = [j for j in range(k) if (offset + padding - dilation * j) % step == 0]
                if taps:
                    first = (offset + padding - dilation * taps[0]) // step
                    found.append(
                        (taps, first, dilation // gcd(dilation, step), -(-(z - offset) // step))
                    )
            each.append(found)
        for parts in itertools.product(*each):
            of_dims, paddings, dilations, sizes = zip(*parts, strict=True)
            ones, kernel = (1,) * self.dims, tuple(len(taps) for taps in of_dims)
            phase = replace(
                self,
                weight_shape=(*self.weight_shape[:2], *kernel),
                stride=ones,
                padding=paddings,
                dilation=dilations,
                skip=(),
            )
            yield phase, _flat(of_dims, self.kernel), torch.Size([*x_size[:2], *sizes])

    def _gram_of_one_phase(self, s: Tensor, x_size: torch.Size) -> Tensor:
        lagged = not self.transposed and prod(self.kernel) > 1
        width = prod(z + r for z, r in zip(s.shape[2:], self.reach, strict=True)) * s.shape[1]
        if not lagged:
            width = prod(x_size[2:]) * s.shape[1] * prod(self.kernel)
        total = s.new_zeros(self.groups, *(self.features[1],) * 2, dtype=torch.float64)
        for part in torch.split(s, max(1, CHUNK // width)):
            total += (
                self._gram_by_lags(part, x_size) if lagged else _product(self.patches(part, x_size))
            )
        return total

    def _gram_by_lags(self, s: Tensor, x_size: torch.Size) -> Tensor:
        """The Gram matrix from correlations: taps j, j' meet at lag dilation·(j − j') wherever both see ``s``."""
        lags = self._lags(s)
        taps = list(itertools.product(*(range(k) for k in self.kernel)))
        width = [2 * k - 1 for k in self.kernel]
        index = s.new_tensor(
            [
                sum(
                    (a - b + k - 1) * prod(width[i + 1 :])
                    for i, (a, b, k) in enumerate(zip(u, v, self.kernel, strict=True))
                )
                for u in taps
                for v in taps
            ],
            dtype=torch.long,
        )
        g, c, k = self.groups, self.channels[1], len(taps)
        blocks = lags[index].view(k, k, g, c, c).double()
        for strip, part, live in self._cut_away(s, x_size):
            seen = part._unfold(strip, (1,) * self.dims)
            at = s.new_tensor(live, dtype=torch.long)
            blocks[at.unsqueeze(1), at] -= (
                _product(seen).view(g, c, len(live), c, len(live)).permute(2, 4, 0, 1, 3)
            )
        return blocks.permute(2, 3, 0, 4, 1).reshape(g, c * k, c * k)

    def _lags(self, s: Tensor) -> Tensor:
        """Σ_q s_c[q] s_c'[q + dilation·lag] for every lag in [1−k, k−1]^d: (lags, groups, channels, channels).

        By the correlation theorem, summed over the examples in the frequency domain, on a grid wide enough that
        nothing wraps around. Of the way back only these few lags are taken.
        """
        g, c, dims = self.groups, self.channels[1], tuple(range(-self.dims, 0))
        size = [_smooth(z + reach) for z, reach in zip(s.shape[2:], self.reach, strict=True)]
        spectrum = torch.fft.rfftn(s, size, dims)
        waves = spectrum.shape[2:]
        spectrum = spectrum.view(len(s), g, c, -1).permute(3, 1, 2, 0).contiguous()
        result = []
        for part in torch.split(
            spectrum, max(1, CHUNK // (g * c * prod(size))), 2
        ):  # some channels against all
            field = part.conj() @ spectrum.mT  # (waves, groups, channels, channels)
            for i in reversed(range(self.dims)):
                basis = _waves_at(
                    size[i], self.kernel[i], self.dilation[i], i == self.dims - 1, field
                )
                field = basis @ field.reshape(prod(waves[:i]), waves[i], -1)
            result.append(field.real.reshape(-1, *part.shape[1:3], c))
        return torch.cat(result, 2)

    def _cut_away(
        self, s: Tensor, x_size: torch.Size
    ) -> Iterator[tuple[Tensor, "Geometry", list[int]]]:
        """Windows' worth of ``s`` around the positions that lie outside x, each position once.

        There only some taps see ``s``: with each strip, a convolution of these alone, and which they are.
        """
        reach, size = self.reach, s.shape[2:]
        s = F.pad(s, [n for r in reversed(reach) for n in (r, r)])
        low = [0] * self.dims
        high = [
            z + r for z, r in zip(size, reach, strict=True)
        ]  # positions, those cut away included
        for dim, (padding, z) in enumerate(zip(self.padding, x_size[2:], strict=True)):
            first, last = min(max(padding, 0), high[dim]), max(min(padding + z, high[dim]), 0)
            k, dilation, r = self.kernel[dim], self.dilation[dim], reach[dim]
            for start, stop in ((0, first), (max(first, last), high[dim])):
                if start == stop:
                    continue
                # the tap that lies dilation·t behind a position sees s from position r − dilation·t on, for size[dim] ones
                steps = [
                    t
                    for t in range(k)
                    if start < r - dilation * t + size[dim] and stop > r - dilation * t
                ]
                if not steps:
                    continue
                strip = s
                for i in range(self.dims):
                    a, b, more = low[i], high[i], reach[i]
                    if i == dim:
                        a, b, more = (
                            start + dilation * steps[0],
                            stop + dilation * steps[0],
                            dilation * (steps[-1] - steps[0]),
                        )
                    strip = strip.narrow(i + 2, a, b - a + more)
                kernel = (*self.kernel[:dim], len(steps), *self.kernel[dim + 1 :])
                taps = [
                    [k - 1 - t for t in reversed(steps)] if i == dim else list(range(n))
                    for i, n in enumerate(self.kernel)
                ]
                yield (
                    strip,
                    replace(self, weight_shape=(*self.weight_shape[:2], *kernel)),
                    _flat(taps, self.kernel),
                )
            low[dim], high[dim] = first, max(first, last)


def _flat(taps: Sequence[Sequence[int]], kernel: Sequence[int]) -> list[int]:
    """Places of taps among all, from those along each dimension."""
    index = [0]
    for n, along in zip(kernel, taps, strict=True):
        index = [i * n + j for i in index for j in along]
    return index


def _waves_at(size: int, k: int, dilation: int, half: bool, like: Tensor) -> Tensor:
    """The inverse Fourier transform at the lags dilation · [1−k, k−1] alone: (lags, waves); of a real result, if ``half``."""
    lags = torch.arange(1 - k, k, dtype=torch.float64, device=like.device) * dilation
    waves = torch.arange(size // 2 + 1 if half else size, dtype=torch.float64, device=like.device)
    twice = (
        1 + ((waves > 0) & (2 * waves < size)).to(waves.dtype) if half else torch.ones_like(waves)
    )  # waves with a mirror
    angle = 2 * torch.pi / size * lags.unsqueeze(1) * waves
    return torch.polar(twice.div(size).expand_as(angle).contiguous(), angle).to(like.dtype)


def _smooth(size: int) -> int:
    """The smallest number from ``size`` on with no prime factor above 5, for which Fourier transforms are fast."""
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def _product(rows: Tensor) -> Tensor:
    return rows.mT @ rows


def _spread(s: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``s`` with stride − 1 zeros between neighbours."""
    if all(step == 1 for step in stride):
        return s
    size = [(z - 1) * step + 1 for z, step in zip(s.shape[2:], stride, strict=True)]
    result = s.new_zeros(*s.shape[:2], *size)
    every: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
    result[every] = s
    return result


def _place(s: Tensor, before: list[int] | tuple[int, ...], size: list[int]) -> Tensor:
    """``s`` moved right by ``before`` (left, if negative) in a field of zeros of ``size``."""
    pads = [(b, z - b - n) for b, z, n in zip(before, size, s.shape[2:], strict=True)]
    return F.pad(s, [n for pair in reversed(pads) for n in pair])
