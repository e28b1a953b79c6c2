"""The examples on which a metric is measured."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from captum_mipin.errors import InputError, TargetError
from captum_mipin.options import for_inputs, type_of
from captum_mipin.targets import one_dimension

Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Examples:
    """Inputs, each with its target and the further arguments of the model.

    Attributes:
        inputs: Tensors (examples, ...).
        is_tuple: True if the user passed a tuple of tensors, False for one tensor.
        target: One target for all examples, or a list or integer tensor with one per example.
        extras: ``additional_forward_args``. A tensor as long as the batch has one row per example,
            also in a list or a dictionary.
        shared: True if all examples share all extras, also a tensor as long as the batch.
    """

    inputs: tuple[Tensor, ...]
    is_tuple: bool
    target: Any
    extras: tuple[Any, ...]
    shared: bool = False

    @classmethod
    def of(cls, inputs: Inputs, target: Any, additional_forward_args: Any = None) -> "Examples":
        """Return examples made from the arguments of a metric.

        Raises:
            InputError: The inputs are not tensors, are empty, or differ in length.
            TargetError: The targets are a tensor of several dimensions, or their number is neither
                1 nor the number of examples.
        """
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        if not tensors or not all(isinstance(x, Tensor) for x in tensors):
            raise InputError(
                f"inputs are {type_of(inputs)}, expected a torch.Tensor or a tuple of tensors: "
                f"{for_inputs(inputs)}"
            )
        lengths = {len(x) if x.ndim else 0 for x in tensors}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                f"inputs hold {sorted(lengths)} examples, expected the same number in each tensor, "
                "and at least one: pass tensors of equal length"
            )
        if isinstance(target, np.ndarray):
            target = torch.from_numpy(target)
        if isinstance(target, Tensor) and target.is_floating_point() and _are_classes(tensors):
            raise TargetError(
                f"the target is a tensor of dtype {target.dtype}, and the inputs are integers, "
                "expected inputs first and classes second: swap them"
            )
        if isinstance(target, Tensor) and target.ndim > 1:
            count = len(tensors[0])
            raise TargetError(
                f"the target is a tensor of shape {tuple(target.shape)}, expected one dimension, "
                f"with one index for each of the {count} examples: {one_dimension(target, count)}"
            )
        # a tensor with one element is one target for all examples
        several = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() != 1)
        if several and len(target) != len(tensors[0]):
            raise TargetError(
                f"{len(target)} targets were given for {len(tensors[0])} examples: pass one target "
                "per example, or one for all"
            )
        extras = additional_forward_args
        if not isinstance(extras, tuple):
            extras = () if extras is None else (extras,)
        examples = cls(tensors, isinstance(inputs, tuple), target, extras)
        # a part of the examples may be as long as a tensor that all of them share
        return replace(examples, shared=not examples.has_rows)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def as_passed(self, tensors: tuple[Tensor, ...]) -> Inputs:
        """Return tensors as a tuple if the user passed a tuple, else the only tensor."""
        return tensors if self.is_tuple else tensors[0]

    @property
    def targets(self) -> list[Any]:
        """List of one target per example, in the form that the user passed."""
        target = self.target.tolist() if isinstance(self.target, Tensor) else self.target
        return (
            target
            if isinstance(target, list) and len(target) == len(self)
            else [target] * len(self)
        )

    @property
    def is_uniform(self) -> bool:
        """True if all examples have the same target and the same further arguments."""
        targets = self.targets
        return all(target == targets[0] for target in targets) and not self.has_rows

    @property
    def has_rows(self) -> bool:
        """True if some of the extras has one row per example."""
        leaves = pytree.tree_leaves(self.extras)
        return not self.shared and any(map(self._has_row, leaves))

    @property
    def x(self) -> Tensor:
        """The only input tensor. Raises InputError if there are several input tensors."""
        if len(self.inputs) != 1:
            raise InputError(
                f"the metric needs one input tensor, but there are {len(self.inputs)}: pass as "
                "model and as method functions of one tensor"
            )
        return self.inputs[0]

    def select(self, index: Tensor, inputs: tuple[Tensor, ...] | None = None) -> "Examples":
        """Return the examples at ``index``, in this order.

        Args:
            index: Indices of examples (selected,); an index may occur several times.
            inputs: Tensors (selected, ...) that replace the inputs of these examples.
        """
        if inputs is None:
            inputs = tuple(x[index.to(x.device)] for x in self.inputs)
        if isinstance(self.target, list):
            target: Any = [self.target[i] for i in index.tolist()]
        else:
            target = self._rows(self.target, index)
        extras = self.extras
        if self.has_rows:
            extras = pytree.tree_map(partial(self._rows, index=index), extras)
        return replace(self, inputs=inputs, target=target, extras=extras)

    def _rows(self, value: Any, index: Tensor) -> Any:
        return value[index.to(value.device)] if self._has_row(value) else value

    def _has_row(self, value: Any) -> bool:
        """Return True if the value is a tensor with one row per example."""
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self)


def _are_classes(inputs: tuple[Tensor, ...]) -> bool:
    """Return True if the inputs look like the classes of a batch: one integer for each example."""
    return len(inputs) == 1 and inputs[0].ndim == 1 and not inputs[0].is_floating_point()


def check_boxes(rows: Tensor, boxes: Any) -> None:
    """Raise InputError for boxes (boxes, 4) that end before they begin, or that are shares."""
    shares = bool(rows.numel() and (rows.frac() != 0).any() and 0 <= rows.min() <= rows.max() <= 1)
    if shares or bool((rows[:, 2:] < rows[:, :2]).any()):
        mistake = "is a share of the image" if shares else "ends before it begins"
        raise InputError(
            f"the box {boxes!r} of an example {mistake}, expected (left, top, right, bottom) in "
            "pixels: multiply shares by width and height, and turn (left, top, width, height) into "
            "(left, top, left + width, top + height)"
        )
