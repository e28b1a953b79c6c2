"""Signatures of calls (shapes, dtypes and values), and the choice of one output of a model.

A captured graph is valid for all calls with the same signature.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError
from captum_mipin.options import type_of
from captum_mipin.types import Extras, Inputs, Output


@dataclass(frozen=True)
class Signature:
    """The shapes (without the batch), dtypes and devices of a call, and its other values.

    Attributes:
        leaves: One description per tensor or other value among the arguments.
        structure: The nesting of the extra arguments as text; empty if there are none.
    """

    leaves: tuple[tuple[str, ...], ...]
    structure: str

    @classmethod
    def of(cls, inputs: Inputs, extras: Extras, shared: bool = False) -> "Signature":
        """Return the signature of a call.

        Args:
            inputs: Tensors (batch, ...).
            extras: Further arguments of ``forward``.
            shared: See :func:`per_example`.
        """
        leaves, structure = pytree.tree_flatten(extras)
        own = per_example(inputs, extras, shared)
        described = tuple(map(_describe, (*inputs, *leaves), own))
        return cls(described, str(structure) if extras else "")

    def kinds(self) -> tuple[str, ...]:
        """Return "per example" or "shared" for each tensor."""
        return tuple(leaf[-1] for leaf in self.leaves if leaf[0] == "tensor")

    def to_json(self) -> list[Any]:
        """Return the signature as nested lists of strings, for a JSON file."""
        return [[list(leaf) for leaf in self.leaves], self.structure]

    @classmethod
    def from_json(cls, value: list[Any]) -> "Signature":
        """Return the signature from the result of :meth:`to_json`.

        Raises:
            ValueError: ``value`` does not have the form of such a result.
        """
        if not all(leaf and all(isinstance(part, str) for part in leaf) for leaf in value[0]):
            raise ValueError(
                f"{value[0]!r} does not describe inputs, expected a list of strings per input: "
                "save the file again"
            )
        return cls(tuple(tuple(leaf) for leaf in value[0]), value[1])


def _describe(leaf: Any, own: bool) -> tuple[str, ...]:
    if not isinstance(leaf, Tensor):
        return "value", type(leaf).__name__, repr(leaf)
    shape = str(tuple(leaf.shape[1:] if own else leaf.shape))
    kind = "per example" if own else "shared"
    return "tensor", shape, str(leaf.dtype), str(leaf.device), kind


def shapes(signature: Signature) -> str:
    """Return shapes and dtypes of inputs and further arguments, as text for error messages."""
    return ", ".join(" ".join(leaf[1:3]) for leaf in signature.leaves)


def per_example(inputs: Inputs, extras: Extras, shared: bool) -> list[bool]:
    """Return for each tensor or value of a call whether it has one row per example.

    Args:
        inputs: Tensors (batch, ...); they always have one row per example.
        extras: Further arguments of ``forward``.
        shared: If False, an extra tensor whose length is the batch size has one row per example. If
            True, all examples share all extra arguments.
    """
    return [True] * len(inputs) + [
        not shared and isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(inputs[0])
        for leaf in pytree.tree_leaves(extras)
    ]


def pick(inputs: Inputs, extras: Extras, index: Tensor, shared: bool) -> tuple[Inputs, Extras]:
    """Return the selected examples of a batch, with their extra arguments.

    Args:
        inputs: Tensors (batch, ...).
        extras: Further arguments; those without one row per example are returned unchanged.
        index: Integer tensor (n,) with the positions of the selected examples.
        shared: See :func:`per_example`.
    """
    leaves, structure = pytree.tree_flatten((inputs, extras))
    own = per_example(inputs, extras, shared)
    picked = [leaf[index] if one else leaf for leaf, one in zip(leaves, own, strict=True)]
    chosen: tuple[Inputs, Extras] = pytree.tree_unflatten(picked, structure)
    return chosen


def first_example(inputs: Inputs, extras: Extras, shared: bool) -> tuple[Inputs, Extras]:
    """Return zeros in the shape of the first example's inputs, and its extra arguments."""
    first, extras = pick(inputs, extras, torch.tensor([0], device=inputs[0].device), shared)
    return tuple(torch.zeros_like(x) for x in first), extras


def plain(arguments: Any) -> Any:
    """Return the arguments with all tensors detached.

    Inference tensors are cloned, because autograd cannot use them.
    """
    return pytree.tree_map_only(
        Tensor, lambda x: x.clone() if x.is_inference() else x.detach(), arguments
    )


def select(value: Any, output: Output) -> Tensor:
    """Return the tensor that ``output`` selects from the return value of a model.

    Args:
        value: The return value of the model: a tensor, or a container of tensors.
        output: Index, key or field name, or a tuple of these for nested containers; None if the
            model returns a single tensor.

    Raises:
        CaptureError: ``output`` selects no tensor, or it is None and the model returns a container.

    Examples:
        >>> select({"logits": torch.ones(1), "states": [torch.zeros(1)]}, ("states", 0))
        tensor([0.])
    """
    path: tuple[int | str, ...] = ()
    for key in () if output is None else output if isinstance(output, tuple) else (output,):
        entries = _entries(value)
        if key not in entries:
            place = f"its output {_shown(path)!r}" if path else "what the model returns"
            kind = "Tensor" if isinstance(value, Tensor) else type(value).__name__
            choice = f"one of {_choices(value, path)}" if entries else f"output={_shown(path)!r}"
            raise CaptureError(
                f"output={output!r} does not fit: {place} is a {kind}, expected {choice}"
            )
        value, path = entries[key], (*path, key)
    if isinstance(value, Tensor):
        return value
    returns = f"has for output={_shown(path)!r}" if path else "returns"
    choices = _choices(value, path)
    choose = f"Choose one by output=, out of {choices}, or wrap" if choices else "Wrap"
    raise CaptureError(
        f"the model {returns} {type_of(value)}, expected one tensor. {choose} "
        "the model in a module that returns only the logits."
    )


def _entries(value: Any) -> dict[Any, Any]:
    """Return a container's entries by index, key or field name.

    The entries of a named tuple are returned by index and by field name.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        fields_of = {name: getattr(value, name) for name in getattr(value, "_fields", ())}
        return {**fields_of, **{at: value[at] for at in range(-len(value), len(value))}}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}


def _choices(value: Any, path: tuple[int | str, ...]) -> str:
    """Return the values of ``output=`` that select an entry of a container, as text."""
    entries = _entries(value)
    names = [key for key in entries if not isinstance(key, int)]
    return ", ".join(
        repr(_shown((*path, name))) for name in names or [key for key in entries if key >= 0]
    )


def _shown(path: tuple[int | str, ...]) -> Output:
    return path[0] if len(path) == 1 else path or None
