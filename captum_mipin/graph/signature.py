"""What a graph holds for: shapes, dtypes and values of a call, and the output that is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from captum_mipin.errors import CaptureError
from captum_mipin.types import Extras, Inputs, Output


@dataclass(frozen=True)
class Signature:
    """The kind of a call: shapes without the batch, dtypes, and the values of other arguments.

    Attributes:
        leaves: One description for each tensor or value of the call.
        structure: How the extra arguments are nested; empty if there are none.
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
        """Return the signature as lists and strings."""
        return [[list(leaf) for leaf in self.leaves], self.structure]

    @classmethod
    def from_json(cls, value: list[Any]) -> "Signature":
        """Return the signature that :meth:`to_json` wrote.

        Raises:
            ValueError: ``value`` is no signature.
        """
        if not all(leaf and all(isinstance(part, str) for part in leaf) for leaf in value[0]):
            raise ValueError(f"{value[0]!r} does not describe inputs")
        return cls(tuple(tuple(leaf) for leaf in value[0]), value[1])


def _describe(leaf: Any, own: bool) -> tuple[str, ...]:
    if not isinstance(leaf, Tensor):
        return "value", type(leaf).__name__, repr(leaf)
    shape = str(tuple(leaf.shape[1:] if own else leaf.shape))
    kind = "per example" if own else "shared"
    return "tensor", shape, str(leaf.dtype), str(leaf.device), kind


def per_example(inputs: Inputs, extras: Extras, shared: bool) -> list[bool]:
    """Return for each leaf of a call whether it holds one row for each example.

    Args:
        inputs: Tensors (batch, ...): they always do.
        extras: Further arguments. A tensor as long as the batch counts as one row an example,
        shared: unless this is True.
    """
    return [True] * len(inputs) + [
        not shared and isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(inputs[0])
        for leaf in pytree.tree_leaves(extras)
    ]


def pick(inputs: Inputs, extras: Extras, index: Tensor, shared: bool) -> tuple[Inputs, Extras]:
    """Return some examples of a batch, with the extra arguments that belong to them.

    Args:
        inputs: Tensors (batch, ...).
        extras: Further arguments; those that are not one row an example stay as they are.
        index: (n,) integer, which examples.
        shared: See :func:`per_example`.
    """
    leaves, structure = pytree.tree_flatten((inputs, extras))
    own = per_example(inputs, extras, shared)
    picked = [leaf[index] if one else leaf for leaf, one in zip(leaves, own, strict=True)]
    chosen: tuple[Inputs, Extras] = pytree.tree_unflatten(picked, structure)
    return chosen


def first_example(inputs: Inputs, extras: Extras, shared: bool) -> tuple[Inputs, Extras]:
    """Return zeros shaped like the first example's inputs, and its extra arguments."""
    first, extras = pick(inputs, extras, torch.tensor([0], device=inputs[0].device), shared)
    return tuple(torch.zeros_like(x) for x in first), extras


def plain(arguments: Any) -> Any:
    """Return the same arguments, their tensors without gradients and usable under autograd."""
    return pytree.tree_map_only(
        Tensor, lambda x: x.clone() if x.is_inference() else x.detach(), arguments
    )


def select(value: Any, output: Output) -> Tensor:
    """Return the tensor that ``output`` chooses among what a model returns.

    Raises:
        CaptureError: There is none, or the model returns several and ``output`` is None.

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
    choose = f"Choose one by output=, out of {choices}. " if choices else ""
    raise CaptureError(
        f"the model {returns} a {type(value).__name__}, expected one tensor. {choose}"
        "Wrap it in a module that returns only the logits."
    )


def _entries(value: Any) -> dict[Any, Any]:
    """Return what a container holds by index, key or field; of a named tuple by both."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        fields_of = {name: getattr(value, name) for name in getattr(value, "_fields", ())}
        return {**fields_of, **{at: value[at] for at in range(-len(value), len(value))}}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}


def _choices(value: Any, path: tuple[int | str, ...]) -> str:
    """Return the outputs that a container offers, as users write them."""
    entries = _entries(value)
    names = [key for key in entries if not isinstance(key, int)]
    return ", ".join(
        repr(_shown((*path, name))) for name in names or [key for key in entries if key >= 0]
    )


def _shown(path: tuple[int | str, ...]) -> Output:
    return path[0] if len(path) == 1 else path or None
