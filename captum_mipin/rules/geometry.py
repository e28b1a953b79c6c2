"""The one place that reads the arguments of convolutions, whichever way a graph passes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from captum_mipin.graph.marks import value_of
from captum_mipin.regression.geometry import Geometry
from captum_mipin.rules.base import each

#: Whether the convolution is transposed → its parameters behind x, in the order of ATen.
_PARAMETERS = {
    False: ("weight", "bias", "stride", "padding", "dilation", "groups"),
    True: ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}


@dataclass(frozen=True)
class ConvolutionArguments:
    """The arguments of ``conv{1,2,3}d`` or ``conv_transpose{1,2,3}d`` behind x.

    Attributes:
        weight: The kernel: a tensor, or the node that gives it.
        bias: One value an output channel, as the weight is given; None for no bias.
        geometry: All other arguments, with one number a spatial dimension.

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
            arguments: The positional arguments behind x: weight, bias, stride, and so on.
            named: The arguments passed by name. ``padding`` may be "same" or "valid".
            transposed: Whether the operation is a transposed convolution.

        Returns:
            The same arguments, with every default filled in.
        """
        passed = {**dict(zip(_PARAMETERS[transposed], arguments, strict=False)), **named}
        weight = passed["weight"]
        shape = tuple((value_of(weight) if isinstance(weight, fx.Node) else weight).shape)
        dims = len(shape) - 2
        stride, dilation = (each(passed.get(name, 1), dims) for name in ("stride", "dilation"))
        padding, skip = passed.get("padding", 0), ()
        if padding == "same":
            # An even kernel pads one zero less in front. That is the symmetric convolution with the
            # larger padding on both sides, without its first output.
            total = [d * (k - 1) for k, d in zip(shape[2:], dilation, strict=True)]
            padding, skip = [n - n // 2 for n in total], tuple(n % 2 for n in total)
        geometry = Geometry(
            shape,
            stride,
            each(0 if padding == "valid" else padding, dims),
            dilation,
            passed.get("groups", 1),
            transposed,
            each(passed.get("output_padding", 0), dims) if transposed else (),
            skip,
        )
        return cls(weight, passed.get("bias"), geometry)
