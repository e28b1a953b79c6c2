"""Reading a node: its operation, its arguments, and the module it comes from."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from captum_mipin.graph.marks import marks, module_stack


@dataclass(frozen=True)
class Place:
    """Where a node comes from.

    Attributes:
        path: Path of the module that ran it; empty for the model itself.
        operation: Name of its operation.
        stack: Paths of all modules that were running, outermost first.
    """

    path: str
    operation: str
    stack: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.path or '(model)'}/{self.operation}"


def place(node: fx.Node) -> Place:
    """Return the module path and the operation of a node."""
    if node.op == "placeholder":
        return Place(f"input {marks(node).origin or node.name}", "input")
    calls = module_stack(node).items()
    stack = tuple(path for key, (path, _) in calls if key.startswith("L__self__"))
    target = node.target
    name = target.__name__.split(".")[0] if isinstance(target, torch._ops.OpOverload) else node.name
    return Place(stack[-1] if stack else "", name, stack)


def operation(node: Any) -> str:
    """Return the name of a node's operation without its overload; "" for what is no node.

    Returns:
        "relu" for ``aten.relu.default``, "mylib::relu" for one of another namespace.
    """
    target = getattr(node, "target", None)
    name: str = getattr(target, "__name__", "").split(".")[0]
    namespace = getattr(target, "namespace", "aten")
    return name if namespace == "aten" else f"{namespace}::{name}"


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a node, whether it was passed by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
