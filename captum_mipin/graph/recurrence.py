"""Recurrent layers in an export: one operation each, whose steps are traced once and repeated.

``torch.export`` computes the shapes of a recurrent layer by running all of its steps, and traces
all of them again when it takes the layer apart. Both cost as much as a thousand other operations
for a sequence of a hundred entries. Here the export sees an operation whose shapes are known, and
three steps are traced: the first, the second, which is then repeated, and the third, which shows
that all steps are alike.
"""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from captum_mipin.graph.marks import set_value, value_of
from captum_mipin.graph.nodes import nodes_in, operation

_aten: Any = torch.ops.aten

#: Names of the recurrent layers.
KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")

#: Number of steps that are traced.
_TRACED = 3

_LIBRARY = torch.library.Library("captum_mipin", "FRAGMENT")


def _fake(x: Tensor, state: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """Return tensors of the shapes of the results of a recurrent layer.

    Args:
        x: The sequence, (batch, steps, features) if the last argument is True, else (steps, batch,
            features).
        state: Tensor (layers · directions, batch, features), for an LSTM two such tensors.
        arguments: The other arguments.
    """
    *_, bidirectional, batch_first = arguments
    states = [state] if isinstance(state, Tensor) else state
    steps, batch = x.transpose(0, 1).shape[:2] if batch_first else x.shape[:2]
    y = x.new_empty(int(steps), batch, states[0].shape[2] * (1 + bidirectional))
    return (y.transpose(0, 1) if batch_first else y, *map(torch.empty_like, states))


def _whole(kind: str) -> tuple[Any, Any, Any]:
    """Return a recurrent layer as ATen's operation, the function for it, and our operation."""
    original = getattr(_aten, kind).input
    schema = str(original._schema).partition("(")[2]
    _LIBRARY.define(f"{kind}({schema}")
    _LIBRARY.impl(kind, original, "CompositeExplicitAutograd")
    torch.library.register_fake(f"captum_mipin::{kind}", _fake, lib=_LIBRARY)
    own: Any = getattr(torch.ops.captum_mipin, kind).default
    return original, getattr(torch._VF, kind), own


_TRIPLES = tuple(_whole(kind) for kind in KINDS)

#: The operation of this module → the operation of ATen with the same values.
WHOLE = {own: original for original, _, own in _TRIPLES}

_CALLS = {call: own for original, function, own in _TRIPLES for call in (original, function)}


class Whole(TorchFunctionMode):
    """A mode in which recurrent layers are called by the operations of this module."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        own = _CALLS.get(function)
        # a packed sequence has two dimensions; autocast would change the dtypes of the results
        if own is not None and args[0].ndim == 3 and not _autocasts(args[0]):
            function = own
        return function(*args, **(kwargs or {}))


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def in_parts(how: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function that computes a recurrent layer from simpler operations.

    Args:
        how: The function of torch. In torch 2.9 the states that it returns for an LSTM have a
            further dimension of size 1.
    """

    def compute(*arguments: Any) -> tuple[Tensor, ...]:
        y, *states = how(*arguments)
        return y, *(state.flatten(0, 1) if state.ndim > 3 else state for state in states)

    return compute


def traced(node: fx.Node, values: Sequence[Any], trace: Callable[..., fx.GraphModule]) -> fx.Graph:
    """Return the graph of the operations that an operation consists of.

    Of a recurrent layer, only three steps are traced, and the second is repeated.

    Args:
        node: The operation.
        values: The traced values of its argument nodes.
        trace: Function from such values to the graph.
    """
    short = _short(node)
    if short is not None:
        graph = _lengthened(trace(short, *values[1:]).graph, values)
        if graph is not None:
            return graph
    return trace(*values).graph


def _short(node: fx.Node) -> Tensor | None:
    """Return a sequence of three steps for a recurrent layer.

    Returns:
        The traced value; None if the operation is no recurrent layer, or its sequence is short.
    """
    if node.target not in WHOLE and node.target not in WHOLE.values():
        return None
    sequence, others = node.args[0], node.args[1:]
    assert isinstance(sequence, fx.Node)  # for mypy: it is a tensor
    value, along = value_of(sequence), int(bool(others[-1]))
    if sequence in nodes_in(others) or value.shape[along] <= _TRACED:
        return None
    short: Tensor = value.narrow(along, 0, _TRACED)
    return short


def _lengthened(short: fx.Graph, values: Sequence[Any]) -> fx.Graph | None:
    """Return the graph of a recurrent layer for a whole sequence.

    Args:
        short: The graph for a sequence of three steps; its first placeholder is the sequence.
        values: The traced values of its placeholders, for the whole sequence.

    Returns:
        The graph; None if the steps in ``short`` are not alike.
    """
    result, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    given, nodes = iter(values), list(short.nodes)
    follows = {nodes[0]}  # the sequence, and what is computed from it
    while nodes:
        node = nodes.pop(0)
        if node.op == "output":
            result.output(fx.map_arg(node.args[0], copies.__getitem__))
            break
        copy = copies[node] = result.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            set_value(copy, next(given))
        elif follows & set(node.all_input_nodes):
            follows.add(node)
            if operation(node) != "unbind":
                set_value(copy, _value(copy))
                continue
            loop = _loop(node, nodes)
            if loop is None:
                return None
            _repeat(result, copies, loop, copy)
            follows.add(loop.join)
            nodes = nodes[nodes.index(loop.join) + 1 :]
    return result


def _value(node: fx.Node) -> Any:
    """Return the traced value of an operation, computed from those of its arguments."""
    run: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    return run(*args, **kwargs)


class _Loop(NamedTuple):
    """The traced steps of a layer.

    Attributes:
        steps: Nodes of each step: the one that takes its entry of the sequence, then its
            operations.
        result: Place of a step's result among its nodes.
        join: The operation that joins the results.
    """

    steps: list[list[fx.Node]]
    result: int
    join: fx.Node


def _loop(entries: fx.Node, nodes: Sequence[fx.Node]) -> _Loop | None:
    """Return the loop over the entries of a sequence; None if its steps are not alike.

    Args:
        entries: The operation that takes the sequence apart.
        nodes: The nodes behind it: one per entry, then the operations of all steps, and then the
            operation that joins their results.
    """
    stop = next((at for at, n in enumerate(nodes) if operation(n) == "cat"), 0)
    join: Any = nodes[stop]
    if (*entries.args[1:], *join.args[1:]) not in ((0, 0), (0,), ()):
        return None
    taken, inside = nodes[:_TRACED], nodes[_TRACED:stop]
    size, rest = divmod(len(inside), _TRACED)
    if rest or [n.args for n in taken] != [(entries, at) for at in range(_TRACED)]:
        return None
    first, second, third = steps = [
        [n, *inside[at * size : (at + 1) * size]] for at, n in enumerate(taken)
    ]
    if _described(second, first) != _described(third, second):
        return None
    users = {user for n in (*first, *second) for user in n.users}
    joined = [at for at, n in enumerate(first) if join in n.users]
    if not users <= {*first, *second, *third, join} or len(joined) != 1:
        return None
    results = [step[joined[0]] for step in steps]
    return _Loop(steps, joined[0], join) if join.args[0] in (results, results[::-1]) else None


def _described(step: Sequence[fx.Node], before: Sequence[fx.Node]) -> str:
    """Return the operations of a step; nodes of it and of the one before have their places."""
    names = {n: f"before {at}" for at, n in enumerate(before)}
    names |= {n: f"here {at}" for at, n in enumerate(step)}
    calls: Any = [(n.target, n.args, n.kwargs) for n in step[1:]]
    return str(fx.map_arg(calls, lambda n: names.get(n, n.name)))


def _repeat(graph: fx.Graph, copies: dict[fx.Node, fx.Node], loop: _Loop, entries: fx.Node) -> None:
    """Add all steps of a loop, and the operation that joins their results, to a graph.

    Args:
        graph: The graph.
        copies: Node of the short graph → its copy; new copies are added to it.
        loop: The loop, in the short graph.
        entries: The copy of the operation that takes the sequence apart.
    """
    first, second, third = loop.steps
    sequence: Any = entries.args[0]
    count, value = value_of(sequence).shape[0], value_of(first[0])
    set_value(entries, [value] * count)
    taken = [graph.call_function(getitem, (entries, at)) for at in range(count)]
    results: list[fx.Node] = []
    for at, entry in enumerate(taken):
        set_value(entry, value)
        step = second if at else first
        if at > 1:  # the step before is to this one what the first is to the second
            copies.update((n, copies[m]) for n, m in zip(first, second, strict=True))
        copies[step[0]] = entry
        for node in step[1:]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        results.append(copies[step[loop.result]])
    copies.update((n, copies[m]) for n, m in zip(third, second, strict=True))
    ordered = loop.join.args[0] == [step[loop.result] for step in loop.steps]
    join: Any = loop.join.target
    parts = results if ordered else results[::-1]
    copies[loop.join] = graph.call_function(join, (parts, *loop.join.args[1:]))
    joined = value_of(loop.join)
    set_value(copies[loop.join], joined.new_empty(count, *joined.shape[1:]))
