"""Fourier transforms, written as dense layers and convolutions on real and imaginary parts.

The transform Σ_t (a_t + i b_t) e^(∓iθ), with θ = 2π k t / n, is a dense layer whose weights are
cos θ and sin θ. A short-time Fourier transform is a convolution with these weights, times a window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.marks import mark, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.propagation.forms import insert
from captum_mipin.rules.base import varies

_aten = torch.ops.aten

#: The nodes of the real and of the imaginary part of a value, which may be the number 0.
Parts = tuple[Any, Any]


def call(before: fx.Node, target: Any, *args: Any, **named: Any) -> fx.Node:
    """Insert an operation before a node; reports leave it out."""
    result = insert(before, target, *args, **named)
    mark(result, added=True)
    return result


@dataclass(frozen=True)
class _Transform:
    """A Fourier transform along one dimension.

    Attributes:
        count: The number n of values.
        coefficients: The number of coefficients: n, or n // 2 + 1 if the others are conjugates.
        inverse: Whether coefficients become values.
        real: Whether the values are real numbers.
        scale: The number that the result is multiplied by.
    """

    count: int
    coefficients: int
    inverse: bool
    real: bool
    scale: float

    @property
    def given(self) -> int:
        """The size of the argument along the dimension."""
        return self.coefficients if self.inverse else self.count


@dataclass(frozen=True)
class Fourier:
    """Writes the transforms of one graph.

    Attributes:
        weights: Transform, dtype and device → the node of its matrix, which is computed once.
    """

    weights: dict[Any, fx.Node] = field(default_factory=dict)

    def transform(self, node: Any, x: Parts) -> Parts | None:
        """Return the parts of fft, ifft, rfft, irfft, and of those along several dimensions.

        Args:
            node: The transform.
            x: The parts of its argument.

        Returns:
            The parts; None if a size depends on the batch.
        """
        name = operation(node).removeprefix("fft_")
        inverse, real = name[0] == "i", "rfft" in name
        steps = _steps(node, inverse and real)
        if not all(isinstance(count, int) for _, count in steps):
            return None
        norm = argument(node, 3, "norm") or "backward"
        last = steps[-1]
        # what is real comes first in the transform, and last in the inverse one
        for dim, count in steps if inverse else steps[::-1]:
            halved = real and (dim, count) == last
            coefficients = count // 2 + 1 if halved else count
            scale = 1 / count if inverse == (norm == "backward") else 1.0
            scale = count**-0.5 if norm == "ortho" else scale
            step = _Transform(count, coefficients, inverse, halved, scale)
            x = self._along(node, x, dim, step)
        return x

    def _along(self, node: fx.Node, x: Parts, dim: int, step: _Transform) -> Parts:
        """Return the parts of a transform along one dimension."""
        fitted = [_fitted(node, part, dim, step.given) for part in x if isinstance(part, fx.Node)]
        weight = self._weight(node, fitted[0], len(fitted), step)
        joined = fitted[0] if len(fitted) == 1 else call(node, _aten.cat.default, fitted, -1)
        layer = insert(node, _aten.linear.default, joined, weight)
        parts = [layer] if step.inverse and step.real else _halves(node, layer, -1)
        parts = [call(node, _aten.transpose.int, part, dim, -1) for part in parts]
        return parts[0], parts[1] if len(parts) == 2 else 0

    def short_time(self, node: Any) -> Parts | None:
        """Return the parts of a short-time Fourier transform of real signals; None for others."""
        names = ("n_fft", "hop_length", "win_length", "window", "normalized", "onesided")
        size, hop, width, window, normalised, onesided = (
            argument(node, at + 1, name) for at, name in enumerate(names)
        )
        signals, value = node.args[0], value_of(node.args[0])
        other = value.is_complex() or value.ndim != 2 or argument(node, 8, "align_to_window")
        known = window is None or not (varies(window) or value_of(window).is_complex())
        if str(node.target) != "aten.stft.default" or other or not known:
            return None
        coefficients = size // 2 + 1 if onesided in (None, True) else size
        scale = size**-0.5 if normalised else 1.0
        weight = self._weight(
            node, signals, 1, _Transform(size, coefficients, False, True, float(scale))
        )
        width = size if width is None else width
        if window is None:
            kind = {"dtype": value.dtype, "device": value.device}
            window = call(node, _aten.ones.default, [width], **kind)
        before = (size - width) // 2
        window = call(node, _aten.constant_pad_nd.default, window, [before, size - width - before])
        weight = call(node, _aten.mul.Tensor, weight, window)
        kernel = call(node, _aten.unsqueeze.default, weight, 1)
        channel = call(node, _aten.unsqueeze.default, signals, 1)
        layer = insert(node, _aten.conv1d.default, channel, kernel, None, [hop or size // 4])
        real, imaginary = _halves(node, layer, 1)
        return real, imaginary

    def _weight(self, node: fx.Node, like: fx.Node, parts: int, step: _Transform) -> fx.Node:
        """Return the matrix of a transform, from the parts of its argument to those of its result.

        Args:
            node: The operation before which nodes are inserted.
            like: A node with the dtype and the device of the matrix.
            parts: 2 if the argument has an imaginary part, else 1.
            step: The transform.
        """
        value = value_of(like)
        key = step, parts, value.dtype, value.device
        if key not in self.weights:
            cosine, sine = _waves(node, step, value.device)
            # (a + i b) e^(iθ) = (a cos θ − b sin θ) + i (a sin θ + b cos θ)
            minus = call(node, _aten.neg.default, sine)
            forth, back = (sine, minus) if step.inverse else (minus, sine)
            rows = [[cosine, back], [forth, cosine]]
            rows = rows[:1] if step.inverse and step.real else rows
            wide = [call(node, _aten.cat.default, row[:parts], 1) for row in rows]
            matrix = call(node, _aten.cat.default, wide)
            self.weights[key] = call(node, _aten._to_copy.default, matrix, dtype=value.dtype)
        return self.weights[key]


def _steps(node: Any, halved: bool) -> list[tuple[int, Any]]:
    """Return dimension and number of values for each dimension of a transform.

    Args:
        node: The transform.
        halved: Whether its argument has one half of the coefficients in the last dimension.
    """
    shape, one = value_of(node.args[0]).shape, operation(node).endswith("fft")
    if one:
        sizes, dims = argument(node, 1, "n"), [argument(node, 2, "dim", -1)]
        sizes = None if sizes is None else [sizes]
    else:
        sizes = argument(node, 1, "s")
        dims = argument(node, 2, "dim", [-2, -1] if operation(node).endswith("2") else None)
    if dims is None:
        dims = range(-len(sizes or shape), 0)
    dims = [dim % len(shape) for dim in dims]
    if sizes is None:
        sizes = [shape[dim] for dim in dims]
        if halved:
            sizes[-1] = 2 * (sizes[-1] - 1)
    return list(zip(dims, sizes, strict=True))


def _fitted(node: fx.Node, value: fx.Node, dim: int, count: int) -> fx.Node:
    """Return a value with a dimension as its last one, cut or filled with zeros to ``count``."""
    value = call(node, _aten.transpose.int, value, dim, -1)
    size = value_of(value).shape[-1]
    if size > count:
        return call(node, _aten.slice.Tensor, value, -1, 0, count)
    if size < count:
        return call(node, _aten.constant_pad_nd.default, value, [0, count - size])
    return value


def _halves(node: fx.Node, value: fx.Node, dim: int) -> Sequence[fx.Node]:
    half = value_of(value).shape[dim] // 2
    return [call(node, _aten.slice.Tensor, value, dim, n * half, (n + 1) * half) for n in (0, 1)]


def _waves(node: fx.Node, step: _Transform, device: torch.device) -> tuple[fx.Node, fx.Node]:
    """Return c cos θ and c sin θ with θ = 2π k t / n, with a row for each element of the result.

    The number c is the scale; where coefficients −k are left out, it is twice the scale for k.
    """
    n, whole = step.count, {"dtype": torch.int64, "device": device}
    k, t = (call(node, _aten.arange.default, m, **whole) for m in (step.coefficients, n))
    rows, columns = (t, k) if step.inverse else (k, t)
    turns = call(node, _aten.mul.Tensor, call(node, _aten.unsqueeze.default, rows, 1), columns)
    turns = call(node, _aten.remainder.Scalar, turns, n)  # of whole numbers, so that θ is exact
    angle = call(node, _aten._to_copy.default, turns, dtype=torch.float64)
    angle = call(node, _aten.mul.Tensor, angle, 2 * math.pi / n)
    factor: Any = step.scale
    if step.inverse and step.real:  # −k is another coefficient unless 2 k is a multiple of n
        double = call(node, _aten.remainder.Scalar, call(node, _aten.mul.Tensor, k, 2), n)
        others = call(node, _aten.ne.Scalar, double, 0)
        others = call(node, _aten._to_copy.default, others, dtype=torch.float64)
        factor = call(node, _aten.mul.Tensor, call(node, _aten.add.Tensor, others, 1), step.scale)
    waves = (call(node, function, angle) for function in (_aten.cos.default, _aten.sin.default))
    waves = (call(node, _aten.hardshrink.default, wave, 1e-12) for wave in waves)  # exact zeros
    cosine, sine = (call(node, _aten.mul.Tensor, wave, factor) for wave in waves)
    return cosine, sine
