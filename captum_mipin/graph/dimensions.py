"""The dimensions among the arguments of operations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import operation

#: Operations that only change the shape of a tensor, and keep the order of its elements.
RESHAPES = frozenset(
    {"reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}
)

#: Names of arguments that are dimensions.
_DIMS = ("dim", "dims", "dim0", "dim1")


def dimensions(node: fx.Node) -> list[int]:
    """Return the dimensions that an operation computes along, from 0 on."""
    if operation(node) in ("permute", "transpose", *RESHAPES):
        return []
    values = [value_of(n) for n in node.all_input_nodes]
    ndim = max(value.ndim for value in values if isinstance(value, Tensor))
    dims: list[int] = []
    for name, given in _arguments(node, node.args, node.kwargs).items():
        if name in _DIMS:
            dims += [given] if isinstance(given, int) else given or range(ndim)
    return [dim % ndim for dim in dims] if ndim else []


def item(node: Any) -> Any:
    """Return the tensor whose only element is the value of a node, None for another value."""
    return node.args[0] if operation(node) in ("item", "_local_scalar_dense") else None


def indices(node: fx.Node) -> list[Any]:
    """Return the tensors of indices by which an operation chooses elements; [] for others.

    Returns:
        One entry for each of the first dimensions of its argument: a node, or None.
    """
    args: Any = node.args
    if operation(node) in ("index", "_unsafe_index", "index_put"):
        return list(args[1])
    if node.target is torch.ops.aten.select.int and item(args[2]) is not None:
        return [None] * (args[1] % value_of(args[0]).ndim) + [item(args[2])]
    return []


def _arguments(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with their defaults."""
    assert isinstance(node.target, OpOverload)  # for mypy: see _Lift
    declared = node.target._schema.arguments
    defaults = {a.name: a.default_value for a in declared if a.has_default_value()}
    given = dict(zip((a.name for a in declared), args, strict=False))
    return defaults | given | dict(kwargs)


def with_batch(node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of an operation for tensors with one dimension more, the first."""
    assert isinstance(node.target, OpOverload)  # for mypy: see _Lift
    values = _arguments(node, args, kwargs)
    for name, given in values.items():
        if name in _DIMS and isinstance(given, int):
            values[name] = given + (given >= 0)
        elif name in _DIMS and given:
            values[name] = [dim + (dim >= 0) for dim in given]
            if operation(node) == "permute":
                values[name] = [0, *values[name]]
        elif operation(node) == "expand" and name == "size":
            values[name] = [-1, *given]
        elif operation(node) == "repeat" and name == "repeats":
            values[name] = [1, *given]
    declared = node.target._schema.arguments
    return (
        tuple(values[a.name] for a in declared if not a.kwarg_only),
        {a.name: values[a.name] for a in declared if a.kwarg_only},
    )
