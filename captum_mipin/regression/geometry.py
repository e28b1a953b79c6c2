"""The geometry of a convolution: its gradients, and the patches of S that each element of X needs.

The inverse g of a convolution is its transpose with a new kernel, and the inverse of a transposed
convolution is a convolution. Both are linear in the kernel W, whose positions j are called taps:

    X[p] ≈ Σ_j W_j S[(p + padding − dilation·j) / stride] + b     (inverse of a convolution)
    X[p] ≈ Σ_j W_j S[stride·p − padding + dilation·j] + b         (inverse of a transposed one)

The patch of a position p contains the values of S that the formula multiplies with W: one per tap
and channel, or 0 if the index of S is outside of S or not an integer.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """A (transposed) convolution from x to y without its weights; signals s have the shape of y.

    Each tuple except ``weight_shape`` has one number per spatial dimension.

    Attributes:
        weight_shape: Shape of the forward weight: (out, in / groups, *kernel), or, if transposed,
            (in, out / groups, *kernel).
        stride: Distance between windows.
        padding: Number of zeros before and after the input.
        dilation: Distance between taps.
        groups: Number of independent groups of channels.
        transposed: True if the forward operation is a transposed convolution.
        output_padding: Output padding of a transposed convolution; empty for 0.
        skip: Number of first outputs that the operation drops; empty for 0. With an even kernel,
            ``padding="same"`` needs this, because it adds one zero less before the input than
            after it.
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    skip: tuple[int, ...] = ()

    @cached_property
    def kernel(self) -> tuple[int, ...]:
        """Return the number of taps along each spatial dimension."""
        return self.weight_shape[2:]

    @property
    def dims(self) -> int:
        """Return the number of spatial dimensions."""
        return len(self.kernel)

    @cached_property
    def reach(self) -> tuple[int, ...]:
        """Return the distance from the first tap to the last along each spatial dimension."""
        return tuple((k - 1) * d for k, d in zip(self.kernel, self.dilation, strict=True))

    @cached_property
    def channels(self) -> tuple[int, int]:
        """Return the channels of x and of s in each group."""
        first, second = self.weight_shape[:2]
        return (first // self.groups, second) if self.transposed else (second, first // self.groups)

    @cached_property
    def features(self) -> tuple[int, int]:
        """Return the numbers of features and of signals of the regression in each group.

        These are the channels of x, and the channels of s times the number of taps.
        """
        x, s = self.channels
        return x, s * prod(self.kernel)

    def full(self, s: Tensor) -> Tensor:
        """Return ``s`` with zeros added for the first outputs, which the operation drops."""
        if not any(self.skip):
            return s
        return F.pad(s, [n for skip in reversed(self.skip) for n in (skip, 0)])

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y, the result of the convolution of ``x``."""
        y = torch.convolution(x, weight, bias, *self._arguments)
        for dim, n in enumerate(self.skip, 2):
            y = y.narrow(dim, n, y.shape[dim] - n)
        return y

    def gradient(self, s: Tensor, x: Tensor, weight: Tensor, of: int) -> Tensor:
        """Return the gradient of Σ s · y with respect to x or to the weight.

        Args:
            s: Tensor (n, channels of y, *size of y).
            x: Tensor (n, channels of x, *size of x), the input; for ``of=0`` only its size is used.
            weight: The forward weight; for ``of=1`` only its shape is used.
            of: 0 for the gradient with respect to x, 1 for that with respect to the weight.
        """
        result: Tensor = torch.ops.aten.convolution_backward(
            self.full(s), x, weight, None, *self._arguments, [of == 0, of == 1, False]
        )[of]
        return result

    def apply(self, s: Tensor, weight: Tensor, x_size: torch.Size) -> Tensor:
        """Return g(S) − b, of size ``x_size``; ``s`` is S (n, channels of y, *size of y)."""
        return self.gradient(s, s.new_empty(x_size), weight, of=0)

    def to_rows(self, weight: Tensor) -> Tensor:
        """Reshape a weight to coefficients (groups, channels of x, channels of s · taps)."""
        g, (x, s) = self.groups, self.channels
        if self.transposed:
            return weight.reshape(g, x, -1)
        return weight.reshape(g, s, x, -1).transpose(1, 2).reshape(g, x, -1)

    def to_weight(self, rows: Tensor) -> Tensor:
        """Reshape coefficients to a weight; this is the inverse of :meth:`to_rows`."""
        g, (x, s) = self.groups, self.channels
        if not self.transposed:
            rows = rows.reshape(g, x, s, -1).transpose(1, 2)
        return rows.reshape(self.weight_shape)

    def patches(self, s: Tensor, x_size: torch.Size, places: Tensor | None = None) -> Tensor:
        """Return the patches of ``s`` for the positions of x.

        Args:
            s: Tensor (n, channels of y, *size of y), the signals.
            x_size: Size of x; only its spatial part is used.
            places: Indices of the flattened spatial positions of x; None for all positions.

        Returns:
            Tensor (groups, n · positions, channels of s · taps), taps in the order of the weight.
        """
        s, step, before = self.full(s), self.stride, self.padding
        if not self.transposed:  # division by the stride: insert zeros between the values of s
            step = (1,) * self.dims
            s = _spread(s, self.stride)
            before = tuple(r - p for r, p in zip(self.reach, before, strict=True))
        size = [t * (z - 1) + r + 1 for t, z, r in zip(step, x_size[2:], self.reach, strict=True)]
        pads = [(b, z - b - n) for b, z, n in zip(before, size, s.shape[2:], strict=True)]
        s = F.pad(s, [n for pair in reversed(pads) for n in pair])  # negative numbers remove values
        return self.windows(s, step, places)

    def windows(self, s: Tensor, step: Sequence[int], places: Tensor | None = None) -> Tensor:
        """Return the windows of ``s``, with the shape that :meth:`patches` returns.

        Args:
            s: Tensor (n, channels of y, *size), padded so that every window lies inside.
            step: Distance between windows, one number per spatial dimension.
            places: Flattened indices of the windows to return; None for all windows.
        """
        dims = tuple(range(-self.dims, 0))
        for dim, (reach, dilation, stride) in enumerate(
            zip(self.reach, self.dilation, step, strict=True), 2
        ):
            s = s.unfold(dim, reach + 1, stride)[..., ::dilation]
        if places is not None:
            index: Any = torch.unravel_index(places, s.shape[2 : 2 + self.dims])
            s = s[(slice(None), slice(None), *index)]
        if not self.transposed:  # p − dilation·j falls with j: the windows have the last tap first
            s = s.flip(dims)
        s = s.unflatten(1, (self.groups, -1)).flatten(-self.dims)
        return s.flatten(3, -2).permute(1, 0, 3, 2, 4).flatten(1, 2).flatten(2)

    def tiles(self, x_size: torch.Size) -> bool:
        """Return True if the windows of several taps cover each element of x exactly once."""
        if self.stride != self.kernel or self.transposed or any(self.skip):
            return False
        sizes = zip(self.kernel, self.dilation, self.padding, x_size[2:], strict=True)
        whole = all((d == 1 or k == 1) and p == 0 and z % k == 0 for k, d, p, z in sizes)
        return whole and prod(self.kernel) > 1

    @cached_property
    def _arguments(self) -> tuple[Any, ...]:
        """Return the arguments of ``torch.convolution`` that follow the bias."""
        output_padding = self.output_padding or (0,) * self.dims
        return (
            self.stride, self.padding, self.dilation, self.transposed, output_padding, self.groups,
        )  # fmt: skip


def _spread(s: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return ``s`` with stride − 1 zeros inserted between neighbouring values."""
    if all(step == 1 for step in stride):
        return s
    size = [(z - 1) * step + 1 for z, step in zip(s.shape[2:], stride, strict=True)]
    result = s.new_zeros(*s.shape[:2], *size)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
    result[places] = s
    return result


def parts_by_position(
    convolutions: Sequence[Geometry], x_size: torch.Size
) -> list[tuple[Tensor, float]]:
    """Return the parts of the signals that different positions of x see.

    For a stride above 1, a position p sees the taps j for which p + padding − dilation·j is a
    multiple of the stride: taps with the same remainder of dilation·j − padding form a part.

    Args:
        convolutions: Convolutions of the same x.
        x_size: Size of x; only its spatial part is used.

    Returns:
        For each part, in the order of the smallest positions that see it, the ascending indices of
        its signals, which are the channels times taps of each convolution in turn, and its share of
        the positions. The list is empty if the stride is 1, or if the strides differ.
    """
    stride, *others = {conv.stride for conv in convolutions}
    if others or max(stride) == 1 or any(conv.transposed for conv in convolutions):
        return []
    parts: dict[tuple[int, ...], list[Tensor]] = {}
    first = 0
    for conv in convolutions:
        channels, signals = conv.channels[1], conv.features[1]
        sizes = zip(conv.kernel, conv.dilation, conv.padding, stride, strict=True)
        along = [[(d * j - p) % step for j in range(k)] for k, d, p, step in sizes]
        index = torch.arange(first, first + signals).view(channels, -1)
        for offset, column in zip(itertools.product(*along), index.unbind(1), strict=True):
            parts.setdefault(offset, []).append(column)
        first += signals
    shares = {
        offset: prod(
            max(0, -(-(z - p) // step)) / z
            for p, step, z in zip(offset, stride, x_size[2:], strict=True)
        )
        for offset in sorted(parts)
    }
    return [
        (torch.cat(parts[offset]).sort()[0], share) for offset, share in shares.items() if share
    ]
