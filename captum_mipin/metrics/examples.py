"""Examples: what a metric is measured on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_mipin.errors import InputError, TargetError

Inputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Examples:
    """Inputs, with the target and the further arguments of each.

    Attributes:
        inputs: Tensors (examples, ...).
        is_tuple: The user passed a tuple of tensors, not one tensor.
        target: One target for all examples, or a list or integer tensor with one per example.
        extras: ``additional_forward_args``. A tensor as long as the batch has one row per example.
    """

    inputs: tuple[Tensor, ...]
    is_tuple: bool
    target: Any
    extras: tuple[Any, ...]

    @classmethod
    def of(cls, inputs: Inputs, target: Any, additional_forward_args: Any = None) -> "Examples":
        """Check what the user passed, and return it as examples.

        Raises:
            InputError: The inputs are no tensors, hold no example, or differ in their number.
            TargetError: The targets are a tensor of several dimensions; or there are several, but
                not one per example.
        """
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        if not tensors or not all(isinstance(x, Tensor) for x in tensors):
            raise InputError(
                f"inputs are a {type(inputs).__name__}, expected a torch.Tensor or a tuple of them"
            )
        lengths = {len(x) if x.ndim else 0 for x in tensors}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                f"inputs hold {sorted(lengths)} examples, expected the same number in each tensor, "
                "and at least one"
            )
        if isinstance(target, np.ndarray):
            target = torch.from_numpy(target)
        if isinstance(target, Tensor) and target.ndim > 1:
            raise TargetError(
                f"the target is a tensor of shape {tuple(target.shape)}, expected one dimension, "
                f"with one index for each of {len(tensors[0])} examples: {_advice(target)}"
            )
        # a tensor with one element is one target for all
        several = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() != 1)
        if several and len(target) != len(tensors[0]):
            raise TargetError(
                f"{len(target)} targets were given for {len(tensors[0])} examples: pass one target "
                "per example, or one for all"
            )
        extras = additional_forward_args
        if not isinstance(extras, tuple):
            extras = () if extras is None else (extras,)
        return cls(tensors, isinstance(inputs, tuple), target, extras)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def as_passed(self, tensors: tuple[Tensor, ...]) -> Inputs:
        """Return tensors in the form that the user passed: a tuple, or the only tensor."""
        return tensors if self.is_tuple else tensors[0]

    @property
    def targets(self) -> list[Any]:
        """One target per example, as the user wrote it."""
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
        return all(target == targets[0] for target in targets) and not any(
            map(self._has_rows, self.extras)
        )

    @property
    def x(self) -> Tensor:
        """The only input tensor. Raises InputError if there are several."""
        if len(self.inputs) != 1:
            raise InputError(
                f"this needs one input tensor, but there are {len(self.inputs)}: pass a "
                "function of one of them, as model and method"
            )
        return self.inputs[0]

    def select(self, index: Tensor, inputs: tuple[Tensor, ...] | None = None) -> "Examples":
        """Return the examples at ``index`` (selected,), in that order; repetitions are allowed.

        Args:
            index: Which examples.
            inputs: Tensors (selected, ...) to take instead of the examples' own inputs.
        """
        if inputs is None:
            inputs = tuple(x[index.to(x.device)] for x in self.inputs)
        if isinstance(self.target, list):
            target: Any = [self.target[i] for i in index.tolist()]
        else:
            target = self._rows(self.target, index)
        extras = tuple(self._rows(extra, index) for extra in self.extras)
        return Examples(inputs, self.is_tuple, target, extras)

    def _rows(self, value: Any, index: Tensor) -> Any:
        return value[index.to(value.device)] if self._has_rows(value) else value

    def _has_rows(self, value: Any) -> bool:
        """Return True if the value is a tensor with one row per example."""
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self)


def _advice(target: Tensor) -> str:
    """Return what to do about a tensor of targets of several dimensions."""
    if target.numel() == len(target):
        return "pass target.flatten()"
    return "for outputs of several dimensions, pass a list with a tuple for each example"
