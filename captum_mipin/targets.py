"""Targets: everything Captum takes, as one class an example."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_mipin.errors import TargetError, TargetRangeError
from captum_mipin.propagation.runtime import Target


def per_example(target: Any, output: Tensor) -> list[Target]:
    """The class of each example of a batch.

    Args:
        target: As Captum takes it: int; tuple of ints for outputs of more dimensions; integer tensor of 0 or 1
            dimension; list of ints or of tuples, one an example; None for outputs (batch,) and (batch, 1). Numpy
            integers and 1-D integer arrays count as well.
        output: The model's output (batch, *dims).

    Raises:
        TargetError: It does not fit the output.
        TargetRangeError: An index lies outside the output.

    Examples:
        >>> per_example(-1, torch.zeros(2, 5))
        [(4,), (4,)]
        >>> per_example([0, 3], torch.zeros(2, 5))
        [(0,), (3,)]
    """
    if output.ndim == 0:
        raise TargetError(
            "the model returns one number for the whole batch, expected one row of outputs an example"
        )
    batch, dims = len(output), tuple(output.shape[1:])
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target) if target.dtype.kind in "iufb" else target.tolist()
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TargetError(f"the target is a tensor of dtype {target.dtype}, expected integers")
        if target.ndim > 1:
            raise TargetError(
                f"the target is a tensor of shape {tuple(target.shape)}, expected one index an example: 1-D"
            )
        target = target.item() if target.numel() == 1 else target.tolist()
    if not isinstance(target, list):
        return [one(target, dims)] * batch
    if len(target) != batch:
        raise TargetError(f"{len(target)} targets were given for {batch} examples")
    return [one(t, dims) for t in target]


def one(target: Any, dims: Sequence[int]) -> Target:
    """One class as the index of its output among ``dims``, the model's output shape without the batch."""
    if target is None:
        if any(n != 1 for n in dims):
            raise TargetError(
                f"no target was given, but the model has outputs of shape {tuple(dims)}: choose one of them"
            )
        return (0,) * len(dims)
    index = tuple(_integer(t, target) for t in (target if isinstance(target, tuple) else (target,)))
    if all(n == 1 for n in dims[len(index) :]):
        index += (0,) * (len(dims) - len(index))
    if len(index) != len(dims):
        raise TargetError(
            f"target {target!r} has {len(index)} indices, expected {len(dims)} for the model's outputs of shape "
            f"{tuple(dims)}; several classes are a list"
        )
    for i, n in zip(index, dims, strict=True):
        if not -n <= i < n:
            raise TargetRangeError(
                f"target {target!r} is outside the model's outputs of shape {tuple(dims)}"
            )
    return tuple(i % n for i, n in zip(index, dims, strict=True))


def several(targets: Any, dims: Sequence[int]) -> list[Target]:
    """The classes to fit: one, several, or with None all of them, each once."""
    if targets is None:
        return [tuple(index) for index in np.ndindex(*dims)]
    if isinstance(targets, (Tensor, np.ndarray)):
        targets = targets.tolist()
    chosen = (
        targets
        if isinstance(targets, Iterable) and not isinstance(targets, (tuple, str))
        else [targets]
    )
    found = list(dict.fromkeys(one(t, dims) for t in chosen))
    if not found:
        raise TargetError("the list of targets is empty")
    return found


def shown(target: Target) -> int | tuple[int, ...] | None:
    """A class as users write it."""
    return target[0] if len(target) == 1 else (target or None)


def _integer(value: Any, target: Any) -> int:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TargetError(
            f"target {target!r} of type {type(target).__name__} is not valid: expected integers"
        )
    return operator.index(value)
