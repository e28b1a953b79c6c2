"""Values that replace pixels in metrics."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.errors import InputError

#: Values that replace pixels: a number, a tensor that can be expanded to the inputs, a function
#: inputs -> such a tensor, or "blur".
Baseline = float | Tensor | Callable[[Tensor], Tensor] | Literal["blur"]


def replacement_of(baseline: Baseline, x: Tensor) -> Tensor:
    """Return the baseline with the shape of the inputs ``x``.

    Raises:
        InputError: The baseline is not known, or its shape or values do not fit the inputs.
    """
    if isinstance(baseline, str):
        if baseline != "blur":
            raise InputError(
                f"baseline={baseline!r} is not known: pass 'blur', a number, a tensor or a function"
            )
        if x.ndim != 4:
            raise InputError(
                f"inputs have shape {tuple(x.shape)}, but a blur needs images (examples, channels, "
                "height, width): pass for example baseline=0.0"
            )
        return blur(x)
    values = baseline(x) if callable(baseline) else torch.as_tensor(baseline, dtype=torch.float64)
    # without this check, a baseline such as 0.5 would be rounded for integer inputs
    if not x.is_floating_point() and (values != values.to(x)).any():
        raise InputError(
            f"the baseline is {values!r}, which inputs of dtype {x.dtype} cannot hold; expected "
            "values of this dtype: pass whole numbers as baseline=, or inputs of a float dtype"
        )
    try:
        return values.detach().to(x).expand_as(x)
    except RuntimeError as error:
        raise InputError(
            f"the baseline has shape {tuple(values.shape)}, which does not fit inputs of shape "
            f"{tuple(x.shape)}: pass a number, or a tensor that can be expanded to this shape"
        ) from error


def blur(x: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Return images (images, channels, height, width) blurred as in RISE, with zero padding.

    RISE's kernel is the result of SciPy's Gaussian filter on one pixel in the centre of ``size`` x
    ``size`` pixels: a Gaussian cut at 4 σ, whose tails are reflected at the border.

    Args:
        x: Images (images, channels, height, width).
        size: Side of the kernel, in pixels; odd.
        sigma: Standard deviation σ of the Gaussian, in pixels.
    """
    reach = int(4 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weight = torch.exp(-(offset**2) / (2 * sigma**2))
    # reflect the tails: ... 1 0 | 0 1 ... size-1 | size-1 size-2 ...
    place = (offset.long() + size // 2) % (2 * size)
    place = torch.where(place < size, place, 2 * size - 1 - place)
    line = torch.zeros(size, dtype=torch.float64).index_add_(0, place, weight / weight.sum()).to(x)
    # a Gaussian is separable: first along the height, then along the width
    for kernel in (line[:, None], line[None]):
        padding = (kernel.shape[0] // 2, kernel.shape[1] // 2)
        kernels = kernel.expand(x.shape[1], 1, -1, -1)
        x = F.conv2d(x, kernels, padding=padding, groups=x.shape[1])
    return x
