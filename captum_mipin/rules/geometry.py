"""The parsers for the arguments of convolutions and of maximum pooling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import fx

from captum_mipin.graph.marks import value_of
from captum_mipin.regression.geometry import Geometry


def per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    """Return a tuple of one number per dimension, from such a sequence or from a single number."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


#: Whether a convolution is transposed → names of its parameters after x, in the order of ATen.
_CONVOLUTION = {
    False: ("weight", "bias", "stride", "padding", "dilation", "groups"),
    True: ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}


@dataclass(frozen=True)
class ConvolutionArguments:
    """The arguments of ``conv{1,2,3}d`` or ``conv_transpose{1,2,3}d``, without x.

    Attributes:
        weight: The kernel: a tensor, or the node of a graph whose value it is.
        bias: One value per output channel: a tensor or a node; None for no bias.
        geometry: All other arguments, with one number per spatial dimension.

    Examples:
        >>> import torch
        >>> weight = torch.empty(8, 4, 3, 3)
        >>> parsed = ConvolutionArguments.of([weight, None, 2], {"padding": (1, 0)})
        >>> parsed.geometry.stride, parsed.geometry.padding, parsed.geometry.dilation
        ((2, 2), (1, 0), (1, 1))
    """

    weight: Any
    bias: Any
    geometry: Geometry

    @classmethod
    def of(
        cls, arguments: Sequence[Any], named: Mapping[str, Any], *, transposed: bool = False
    ) -> "ConvolutionArguments":
        """Parse the arguments of a call, or of a node of a graph.

        Args:
            arguments: The positional arguments after x: weight, bias, stride, and so on.
            named: The arguments passed by name. ``padding`` may be "same" or "valid".
            transposed: Whether the operation is a transposed convolution.

        Returns:
            The parsed arguments, in which the defaults are filled in.
        """
        passed = {**dict(zip(_CONVOLUTION[transposed], arguments, strict=False)), **named}
        weight, bias = passed.pop("weight"), passed.pop("bias", None)
        shape = (value_of(weight) if isinstance(weight, fx.Node) else weight).shape
        options = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in passed.items())
        # a node's sizes may be symbols, which cannot be looked up
        make = _geometry.__wrapped__ if isinstance(weight, fx.Node) else _geometry
        return cls(weight, bias, make(tuple(shape), options, transposed))


@lru_cache(maxsize=1024)
def _geometry(
    shape: tuple[int, ...], options: tuple[tuple[str, Any], ...], transposed: bool
) -> Geometry:
    """Return the geometry of a convolution; calls of a network repeat the same few arguments.

    Args:
        shape: Shape of the weight.
        options: Names and values of the other arguments.
        transposed: Whether the operation is a transposed convolution.
    """
    passed: dict[str, Any] = dict(options)
    dims, skip = len(shape) - 2, tuple[int, ...]()
    stride, dilation, output_padding = (
        per_dimension(passed.get(name, default), dims)
        for name, default in (("stride", 1), ("dilation", 1), ("output_padding", 0))
    )
    padding = passed.get("padding", 0)
    if padding == "same":
        # For an even kernel, "same" pads one zero less in front than behind. This is equal to a
        # convolution with the larger padding on both sides, without its first output.
        total = [d * (k - 1) for k, d in zip(shape[2:], dilation, strict=True)]
        padding, skip = [n - n // 2 for n in total], tuple(n % 2 for n in total)
    padding = per_dimension(0 if padding == "valid" else padding, dims)
    groups = passed.get("groups", 1)
    return Geometry(shape, stride, padding, dilation, groups, transposed, output_padding, skip)


def pool_geometry(
    kernel_size: Sequence[int], stride: Any = (), padding: Any = 0, dilation: Any = 1, *more: Any
) -> Geometry:
    """Return the geometry of the windows of ``max_pool{1,2,3}d``.

    The arguments are those of the operation, without x. If ``stride`` is empty, it is the size of a
    window, as in ATen.
    """
    dims = len(kernel_size)
    step = per_dimension(stride or kernel_size, dims)
    padding, dilation = per_dimension(padding, dims), per_dimension(dilation, dims)
    return Geometry((1, 1, *kernel_size), step, padding, dilation, groups=1)
