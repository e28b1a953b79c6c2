"""Targets in every form that Captum accepts, converted to one class per example."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_mipin.errors import TargetError, TargetRangeError
from captum_mipin.options import named, type_of
from captum_mipin.types import Target


def per_example(target: Any, output: Tensor) -> list[Target]:
    """Return the class of each example of a batch.

    Args:
        target: The class or classes, in a form that Captum accepts: an int; a tuple of ints for
            outputs with several dimensions; an integer tensor or array with 0 or 1 dimensions; a
            list with one int or tuple per example; None for outputs (batch,) and (batch, 1).
        output: Tensor (batch, *dims), the model's output; only its shape is used.

    Returns:
        One tuple per example: the index of its class among ``dims``, without negative numbers.

    Raises:
        TargetError: The target does not fit the output.
        TargetRangeError: An index lies outside the output.

    Examples:
        >>> per_example(-1, torch.zeros(2, 5))
        [(4,), (4,)]
        >>> per_example([0, 3], torch.zeros(2, 5))
        [(0,), (3,)]
    """
    if output.ndim == 0:
        raise TargetError(
            "the model returns one number for the whole batch, expected one row of outputs per "
            "example: let it return shape (batch,) or (batch, classes)"
        )
    batch, dims = len(output), tuple(output.shape[1:])
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target) if target.dtype.kind in "iufb" else target.tolist()
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            numbers = "target.long()" if target.ndim < 2 or target.dtype == torch.bool else "target"
            convert = numbers if target.ndim < 2 else f"{numbers}.argmax(1)"
            raise TargetError(
                f"the target is a tensor of dtype {target.dtype} and shape {tuple(target.shape)}, "
                f"expected integers, one index per example: pass {convert}"
            )
        if target.ndim > 1:
            raise TargetError(
                f"the target is a tensor of shape {tuple(target.shape)}, expected one dimension "
                f"with one index per example: {one_dimension(target, batch)}"
            )
        target = target.item() if target.numel() == 1 else target.tolist()
    if not isinstance(target, list):
        return [target_index(target, dims)] * batch
    if len(target) != batch:
        raise TargetError(
            f"{len(target)} targets were given for {batch} examples: pass one target per example, "
            "or one int for all"
        )
    return [target_index(label, dims) for label in target]


def one_dimension(target: Tensor, batch: int) -> str:
    """Return what to do about a tensor of targets that has several dimensions.

    Args:
        target: The tensor.
        batch: Number of examples.
    """
    if target.numel() == batch:
        return "pass target.flatten()"
    return (
        "if each row marks one class, pass target.argmax(1); if each row is the index of an output "
        "with several dimensions, pass list(map(tuple, target.tolist()))"
    )


def target_index(target: Any, dims: Sequence[int]) -> Target:
    """Return the index of one class among the outputs of a model.

    Args:
        target: An int, a tuple of ints, or None if there is only one output.
        dims: Shape of the model's output without the batch dimension. A target may leave out the
            indices of last dimensions of size 1.

    Raises:
        TargetError: The target does not fit ``dims``.
        TargetRangeError: An index lies outside ``dims``.
    """
    shape = tuple(dims)
    if target is None:
        if any(size != 1 for size in shape):
            raise TargetError(
                f"no target was given, but the model has outputs of shape {shape}: choose one of "
                "them with target="
            )
        return (0,) * len(shape)
    labels = target if isinstance(target, tuple) else (target,)
    index = tuple(_integer(label, target) for label in labels)
    if all(size == 1 for size in shape[len(index) :]):
        index += (0,) * (len(shape) - len(index))
    if len(index) != len(shape):
        raise TargetError(
            f"{named('target', target)} has {len(index)} indices, expected {len(shape)} for the "
            f"model's outputs of shape {shape}; pass several classes as a list"
        )
    if not all(-size <= i < size for i, size in zip(index, shape, strict=True)):
        ranges = ", ".join(f"{-size} to {size - 1}" for size in shape)
        raise TargetRangeError(
            f"{named('target', target)} is outside the model's outputs of shape {shape}, "
            f"expected an index from {ranges}: pass the index of an output, counted from 0"
        )
    return tuple(i % size for i, size in zip(index, shape, strict=True))


def target_indices(targets: Any, dims: Sequence[int]) -> list[Target]:
    """Return the classes to fit without duplicates, in the order of ``targets``.

    Args:
        targets: One class, an iterable of classes, or None for all outputs.
        dims: Shape of the model's output without the batch dimension.

    Raises:
        TargetError: A target does not fit ``dims``, or ``targets`` is empty.
        TargetRangeError: An index lies outside ``dims``.
    """
    if targets is None:
        return [tuple(index) for index in np.ndindex(*dims)]
    if isinstance(targets, (Tensor, np.ndarray)):
        targets = targets.tolist()
    if not isinstance(targets, Iterable) or isinstance(targets, (tuple, str)):
        targets = [targets]
    indices = list(dict.fromkeys(target_index(target, dims) for target in targets))
    if not indices:
        raise TargetError("the list of targets is empty: name a class, or pass None for all")
    return indices


def target_label(target: Target) -> int | tuple[int, ...] | None:
    """Return a class in the form of Captum's ``target``: an int, a tuple, or None."""
    return target[0] if len(target) == 1 else (target or None)


def _integer(value: Any, target: Any) -> int:
    """Return one index of ``target`` as an int; raise TargetError for a bool, as Captum does."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    unfit = isinstance(value, (bool, np.bool_, Tensor)) or not hasattr(value, "__index__")
    if unfit:
        raise TargetError(
            f"{named('target', target)} is {type_of(target)}, expected integers: pass for example "
            "target=3 for all examples, or a list with one index per example"
        )
    return operator.index(value)
