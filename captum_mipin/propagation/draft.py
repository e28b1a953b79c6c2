"""A copy of a captured graph that the passes mark and rewrite, and functions on its nodes."""

from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.errors import RuleError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.dimensions import RESHAPES
from captum_mipin.graph.layout import batch_dimension
from captum_mipin.graph.marks import inherit, mark, marks, set_value, value_of
from captum_mipin.graph.nodes import argument, is_size, nodes_in, operation, place
from captum_mipin.propagation.runtime import Step
from captum_mipin.rules import Rule
from captum_mipin.rules.base import is_floating, varies

#: Operations whose result depends only on the shape of their argument.
_CONSTANT = frozenset(
    f"{prefix}{name}{suffix}"
    for prefix, suffix in (("new_", ""), ("", "_like"))
    for name in ("zeros", "ones", "full", "empty")
)


@dataclass
class Draft:
    """A copy of a captured graph, which the passes turn into the graph of a surrogate.

    Attributes:
        graph: The copy; its nodes have the marks "key" and "origin".
        rules: Operation → rule.
        inputs: The placeholders of the model's inputs.
        starts: The explained nodes: the inputs, or tensors of a layer. In the backward pass, the
            signal ends at these nodes. The batch is their first dimension.
        batch: The symbol of the batch size.
        calibrate: True to learn one factor per channel that scales the signal to the units of the
            explained values. Nothing is learned if the units are the same already.
        joint: Learn one regression on the signals of all branches of a tensor; if False, the
            signals of the branches are added.
        literals: Placeholder of a tensor that is written out in the model's code → that tensor.
        steps: Key → step of the surrogate.
    """

    graph: fx.Graph
    rules: Mapping[str, Rule]
    inputs: tuple[fx.Node, ...]
    starts: tuple[fx.Node, ...]
    batch: str
    calibrate: bool = True
    joint: bool = True
    literals: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        captured: CapturedGraph,
        rules: Mapping[str, Rule],
        start: Sequence[str] | None,
        **options: Any,
    ) -> "Draft":
        """Return a draft of a captured graph.

        Args:
            captured: The graph, which is copied.
            rules: Operation → rule.
            start: Names of the nodes whose values are explained; None for the inputs.
            options: The attributes ``calibrate`` and ``joint``.
        """
        graph, copies, calls = fx.Graph(), dict[fx.Node, fx.Node](), Counter[str]()
        graph.graph_copy(captured.graph, copies)
        graph.output(copies[captured.output])
        for source, node in copies.items():
            name = str(place(source))
            calls[name] += 1
            # If a module is called twice, two of its operations have the same name.
            key = name if calls[name] == 1 else f"{name}#{calls[name]}"
            mark(node, origin=source.name, key=key)  # the copy may have another name
        named = {source.name: node for source, node in copies.items()}
        inputs = tuple(named[name] for name in captured.inputs)
        starts = inputs if start is None else tuple(named[name] for name in start)
        starts = tuple(_batch_first(node, captured.batch) for node in starts)
        # a tensor of the code is copied wherever it is used, so that nothing can change its values
        literals = {
            named[name]: tensor
            for name, tensor in captured.constants.items()
            if isinstance(tensor, Tensor)
            and all(operation(user) == "lift_fresh_copy" for user in named[name].users)
        }
        return cls(graph, rules, inputs, starts, captured.batch, **options, literals=literals)

    @property
    def output(self) -> fx.Node:
        """The node whose value the graph returns."""
        return self.graph.output_node().all_input_nodes[0]

    def varying(self) -> Iterator[Any]:
        """Yield the nodes that vary with the input and are not explained; they may be rewritten."""
        for node in list(self.graph.nodes):
            if varies(node) and node not in self.starts:
                yield node

    def rule(self, node: fx.Node) -> Rule | None:
        """Return the rule of a node's operation."""
        return self.rules.get(str(node.target))

    def carriers(self, node: fx.Node) -> Sequence[int]:
        """Return the positions of the arguments to which a node sends its signal.

        Raises:
            RuleError: The rule returns positions that the operation does not have.
        """
        rule = self.rule(node)
        if node.op == "output" or rule is None or not is_floating(value_of(node)):
            return range(len(node.args))
        positions, count = rule.carriers(node), len(node.args)
        if not isinstance(positions, Sequence) or any(at not in range(count) for at in positions):
            raise RuleError(
                f"carriers of the rule of {place(node)} returns {positions!r}, expected a tuple of "
                f"positions among the {count} positional arguments of {node.target}: correct "
                "carriers="
            )
        return positions

    def carried(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes to which a node sends its signal; a node used twice occurs twice."""
        return nodes_in([node.args[at] for at in self.carriers(node)])


def _batch_first(node: fx.Node, batch: str) -> fx.Node:
    """Return a node with the value of another one, the batch as its first dimension.

    Models that are written for (tokens, batch, features) have layers with the batch in another
    dimension. The new node is put between such a layer and its users.

    Args:
        node: The node.
        batch: The symbol of the batch size.
    """
    value, graph = value_of(node), node.graph
    at = batch_dimension(value, batch) if isinstance(value, Tensor) else None
    if not at:
        return node
    order = [at, *(dim for dim in range(value.ndim) if dim != at)]
    with graph.inserting_after(node):
        first = graph.call_function(torch.ops.aten.permute.default, (node, order))
    with graph.inserting_after(first):
        back = [order.index(dim) for dim in range(value.ndim)]
        moved = graph.call_function(torch.ops.aten.permute.default, (first, back))
    node.replace_all_uses_with(moved, lambda user: user is not first)
    for one in (first, moved):
        inherit(one, node, added=True)
    set_value(first, value.permute(order))
    return first


def is_constant(node: fx.Node) -> bool:
    """Return True if a node's value depends only on the shapes of its arguments."""
    return is_size(node) or operation(node) in _CONSTANT


def is_tensor(node: fx.Node) -> bool:
    """Return True if a node's value is one tensor."""
    return isinstance(value_of(node), Tensor)


def permutation(node: fx.Node) -> list[int] | None:
    """Return the order of dimensions in a transposition; None for other operations.

    Returns:
        For each dimension of the result, the number of that dimension in the argument.
    """
    if operation(node) not in ("t", "transpose", "permute") or not is_tensor(node):
        return None
    ndim = value_of(node).ndim
    if operation(node) == "t":
        return list(range(ndim))[::-1]
    if operation(node) == "permute":
        return [dim % ndim for dim in argument(node, 1, "dims")]
    order = list(range(ndim))
    a, b = (argument(node, at, f"dim{at - 1}") for at in (1, 2))
    order[a], order[b] = order[b], order[a]
    return order


def number_of(node: Any) -> tuple[Any, float] | None:
    """Return x and c for the product of a tensor x and a number c; None for other operations."""
    if operation(node) not in ("mul", "div") or len(node.all_input_nodes) != 1 or node.kwargs:
        return None
    x, c = node.args if isinstance(node.args[0], fx.Node) else node.args[::-1]
    if not is_floating(value_of(x)) or not isinstance(c, (int, float)):
        return None
    if operation(node) == "mul":
        return x, c
    return (x, 1 / c) if x is node.args[0] and c else None


def as_number(size: Any, batch: int) -> int:
    """Return a size of a traced tensor for a batch of this size."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def regrouped(reshape: fx.Node) -> tuple[list[int], list[int]]:
    """Return, for each dimension before and behind a reshape, the number of its group.

    Dimensions are in one group if the reshape makes them from each other.
    """
    # a number that no size is stands for the size of the batch
    sizes = [
        [as_number(size, 7919) for size in value_of(n).shape]
        for n in (reshape.all_input_nodes[0], reshape)
    ]
    # a group begins at each product of sizes that both shapes have
    starts = [[prod(shape[:dim]) for dim in range(len(shape))] for shape in sizes]
    common = sorted(set(starts[0]) & set(starts[1]))
    before, after = ([bisect(common, start) for start in each] for each in starts)
    return before, after


def moved(order: Sequence[int | None], move: fx.Node, forwards: bool) -> list[int | None] | None:
    """Return where dimensions of a tensor are behind a transposition or reshape, or before it.

    Args:
        order: For each dimension on one side of the operation, the number of the dimension of the
            tensor that it is; None if it is none of them.
        move: The operation.
        forwards: Whether ``order`` is that of its argument; else, it is that of its result.

    Returns:
        The order on the other side; None if the operation is another one. A dimension of size 1
        behind a reshape, or one that it makes of several, is none of the tensor.
    """
    if (dims := permutation(move)) is not None:
        return [order[at] for at in (dims if forwards else map(dims.index, range(len(dims))))]
    if operation(move) not in RESHAPES or not is_tensor(move):
        return None
    groups: list[dict[int, list[int]]] = [{}, {}]
    ends = (move.all_input_nodes[0], move)
    for found, node, numbers in zip(groups, ends, regrouped(move), strict=True):
        for dim, (size, number) in enumerate(zip(value_of(node).shape, numbers, strict=True)):
            if type(size) is not int or size != 1:
                found.setdefault(number, []).append(dim)
    here, there = groups if forwards else groups[::-1]
    result: list[int | None] = [None] * value_of(ends[forwards]).ndim
    for number, after in there.items():
        before = here.get(number, [])
        if len(after) == len(before) == 1:
            result[after[0]] = order[before[0]]
    return result


def descendants(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return nodes and all nodes computed from their values; the use of a shape does not count."""
    reached, stack = set(nodes), list(nodes)
    while stack:
        users = [user for user in stack.pop().users if user not in reached]
        users = [user for user in users if not is_constant(user)]
        reached.update(users)
        stack.extend(users)
    return reached


def carrying_users(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node that get a signal themselves, and the output node.

    A user in this list may send its signal to other arguments than this node.
    """
    return [user for user in node.users if marks(user).signal or user.op == "output"]


def sources(node: fx.Node) -> list[fx.Node]:
    """Return the argument nodes of a node that get a signal."""
    return [source for source in node.all_input_nodes if marks(source).signal]


def occurrences(user: fx.Node, node: fx.Node) -> int:
    """Return the number of arguments of ``user`` that are ``node``."""
    return nodes_in((user.args, user.kwargs)).count(node)


def redirect(old: fx.Node, new: Iterator[fx.Node], users: Sequence[fx.Node]) -> None:
    """Replace the argument ``old`` of ``users`` by the next node of ``new``, at each use."""
    for user in users:
        user.args = fx.map_arg(user.args, lambda n: next(new) if n is old else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: next(new) if n is old else n)
