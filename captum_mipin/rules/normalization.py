"""Normalisation: an affine map a channel, absorbed by the inverse of the operation before it."""

from typing import Any

from torch import Tensor

from captum_mipin.rules.base import Back, Options, Recorded


def batch_norm(options: Options, operation: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Back]:
    """Pass the signal on: a convolution and its batch norm are inverted as the one convolution they amount to."""
    return operation(x, *arguments)[0], lambda s: s


NORMALIZATION = {
    "aten._native_batch_norm_legit_no_training.default": Recorded(
        run=batch_norm, note="passed on; the next inverse absorbs the affine map", restores=False
    ),
}
