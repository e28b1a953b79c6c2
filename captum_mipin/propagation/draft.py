"""A copy of a captured graph that passes mark and rewrite, and what they ask about its nodes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from captum_mipin.errors import RuleError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.marks import mark, marks, value_of
from captum_mipin.graph.nodes import is_size, nodes_in, operation, place
from captum_mipin.propagation.runtime import Step
from captum_mipin.rules import Rule

#: Operations whose result follows from the shape of their argument alone.
_CONSTANT = frozenset(
    f"{prefix}{name}{suffix}"
    for prefix, suffix in (("new_", ""), ("", "_like"))
    for name in ("zeros", "ones", "full", "empty")
)


@dataclass
class Draft:
    """A copy of a captured graph on its way to the graph of a surrogate.

    Attributes:
        graph: The copy; its nodes have their marks "key" and "origin".
        rules: Operation → rule.
        inputs: The placeholders of the model's inputs.
        starts: The nodes that are explained: the inputs, or the output of a layer.
        batch: The symbol of the batch size.
        calibrate: Learn the scale of the signal at the starts where no learned inverse gives it.
        joint: Learn what comes back to a tensor from all its branches together; else add it up.
        steps: The steps of the surrogate, by key.
    """

    graph: fx.Graph
    rules: Mapping[str, Rule]
    inputs: tuple[fx.Node, ...]
    starts: tuple[fx.Node, ...]
    batch: str
    calibrate: bool = True
    joint: bool = True
    steps: dict[str, Step] = field(default_factory=dict)

    @classmethod
    def of(
        cls, captured: CapturedGraph, rules: Mapping[str, Rule], start: str | None, **options: Any
    ) -> "Draft":
        """Return a draft.

        Args:
            captured: The graph to copy.
            rules: Operation → rule.
            start: Name of the node that is explained; None for the inputs.
            options: ``calibrate`` and ``joint``.
        """
        graph, copies, calls = fx.Graph(), dict[fx.Node, fx.Node](), Counter[str]()
        graph.graph_copy(captured.graph, copies)
        graph.output(copies[captured.output])
        for source, node in copies.items():
            name = str(place(source))
            calls[name] += 1
            # A module that is called twice has two operations of one name.
            key = name if calls[name] == 1 else f"{name}#{calls[name]}"
            mark(node, origin=source.name, key=key)  # a copy may be named differently
        named = {source.name: node for source, node in copies.items()}
        inputs = tuple(named[name] for name in captured.inputs)
        starts = inputs if start is None else (named[start],)
        return cls(graph, rules, inputs, starts, captured.batch, **options)

    @property
    def output(self) -> fx.Node:
        """The node whose value the graph returns."""
        return self.graph.output_node().all_input_nodes[0]

    def rule(self, node: fx.Node) -> Rule | None:
        """Return the rule of a node's operation."""
        return self.rules.get(str(node.target))

    def carriers(self, node: fx.Node) -> Sequence[int]:
        """Return the positions of the arguments through which a node sends its signal back.

        Raises:
            RuleError: The rule names other positions than the operation has arguments.
        """
        rule = self.rule(node)
        if node.op == "output" or rule is None or not is_floating(value_of(node)):
            return range(len(node.args))
        positions, count = rule.carriers(node), len(node.args)
        if not isinstance(positions, Sequence) or any(at not in range(count) for at in positions):
            raise RuleError(
                f"the rule of {place(node)} says that the arguments at {positions!r} carry signal, "
                f"expected a tuple of positions among the {count} that {node.target} is given by "
                "position"
            )
        return positions

    def carried(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes to which a node sends its signal, as often as it uses them."""
        return nodes_in([node.args[at] for at in self.carriers(node)])


def is_constant(node: fx.Node) -> bool:
    """Return True if a value follows from shapes alone, whatever goes into the node."""
    return is_size(node) or operation(node) in _CONSTANT


def is_floating(value: Any) -> bool:
    """Return True if a traced value is a floating tensor, or holds one."""
    if isinstance(value, (tuple, list)):
        return any(map(is_floating, value))
    return isinstance(value, Tensor) and value.is_floating_point()


def is_tensor(node: fx.Node) -> bool:
    """Return True if a node's value is one tensor."""
    return isinstance(value_of(node), Tensor)


def descendants(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return nodes and all that is computed from their values, not from their shapes alone."""
    reached, stack = set(nodes), list(nodes)
    while stack:
        users = [user for user in stack.pop().users if user not in reached]
        users = [user for user in users if not is_constant(user)]
        reached.update(users)
        stack.extend(users)
    return reached


def carrying_users(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node that send signal back; not every one sends it to this node."""
    return [user for user in node.users if marks(user).signal or user.op == "output"]


def sources(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node takes and that carry signal."""
    return [source for source in node.all_input_nodes if marks(source).signal]


def occurrences(user: fx.Node, node: fx.Node) -> int:
    """Return how often ``user`` uses ``node``."""
    return nodes_in((user.args, user.kwargs)).count(node)


def redirect(old: fx.Node, new: Iterator[fx.Node], users: Sequence[fx.Node]) -> None:
    """Let ``users`` take the next of ``new`` each time they use ``old``."""
    for user in users:
        user.args = fx.map_arg(user.args, lambda n: next(new) if n is old else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: next(new) if n is old else n)
