"""Functions that read graph nodes: operation, arguments, module path and ancestors."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.graph.marks import marks, module_stack, original, set_value, value_of


@dataclass(frozen=True)
class Place:
    """The module and the operation that a node comes from.

    Attributes:
        path: Path of the module that ran the operation; empty for the model itself.
        operation: Name of the operation.
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
    target = original(node)
    name = target.__name__.split(".")[0] if isinstance(target, torch._ops.OpOverload) else node.name
    return Place(stack[-1] if stack else "", name, stack)


def operation(node: Any) -> str:
    """Return the name of a node's operation, without the name of its overload.

    Args:
        node: A node, or any other value.

    Returns:
        "relu" for ``aten.relu.default``; with the namespace if that is not ATen's, such as
        "mylib::relu"; "" if ``node`` is not a node.
    """
    target = getattr(node, "target", None)
    name: str = getattr(target, "__name__", "").split(".")[0]
    namespace = getattr(target, "namespace", "aten")
    return name if namespace == "aten" else f"{namespace}::{name}"


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a node, whether it was passed by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def nodes_in(arguments: Any) -> list[fx.Node]:
    """Return the nodes among arguments at any depth; a node that occurs twice is listed twice."""
    nodes: list[fx.Node] = []
    fx.map_arg(arguments, nodes.append)
    return nodes


def ancestors(nodes: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Return nodes and all nodes from which they are computed.

    Args:
        nodes: The nodes.
        stop: Nodes whose own arguments are not followed.
    """
    reached, stack = set[fx.Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack.extend(() if node in stop else node.all_input_nodes)
    return reached


def erase_unused(graph: fx.Graph, kept: Collection[fx.Node]) -> None:
    """Erase the operations without users, but for some nodes that are kept."""
    for node in reversed(graph.nodes):
        if not node.users and node not in kept and not node.is_impure():
            graph.erase_node(node)


def is_random(node: fx.Node) -> bool:
    """Return True if an operation draws random numbers; dropout that is switched off draws none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for position, declared in enumerate(target._schema.arguments):
        if declared.name in ("train", "training", "dropout_p"):
            default = declared.default_value if declared.has_default_value() else None
            return argument(node, position, declared.name, default) not in (False, 0.0)
    return True


def is_size(node: fx.Node) -> bool:
    """Return True if a node's value is a number that depends on the batch size."""
    return isinstance(value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool))


def settle_sizes(node: fx.Node) -> None:
    """Write a size that is a number, such as the count of a constant mask, as an integer."""
    value = value_of(node)
    if isinstance(value, Tensor) and any(_number(n) is not None for n in value.shape):
        sizes = [n if (number := _number(n)) is None else number for n in value.shape]
        set_value(node, value.new_empty(sizes))


def _number(size: Any) -> int | None:
    """Return the value of a symbolic size that has only one; None for any other size."""
    return int(str(size)) if isinstance(size, torch.SymInt) and str(size).isdigit() else None
