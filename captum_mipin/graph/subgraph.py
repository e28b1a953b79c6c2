"""Parts of a captured graph as functions: from any tensor of a network to any other behind it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from captum_mipin.errors import CaptureError, InputError
from captum_mipin.graph.capture import TURNS, CapturedGraph, module_output
from captum_mipin.graph.layout import first_dimension
from captum_mipin.graph.marks import value_of
from captum_mipin.propagation.fingerprint import structure
from captum_mipin.rules import MIPIN


def tensor_name(captured: CapturedGraph, model: nn.Module, layer: nn.Module | str) -> str:
    """The name of a tensor of the graph: the output of a module, or one given by its name.

    Raises:
        CaptureError: There is none; it is not floating; its first dimension is not the batch.
    """
    nodes = {node.name: node for node in captured.graph.nodes}
    name = layer if isinstance(layer, str) else module_output(captured, model, layer)
    shown = (
        f"tensor {name!r}" if isinstance(layer, str) else f"the output of {type(layer).__name__}"
    )
    constant = name in captured.constants
    if name not in nodes or constant or not isinstance(value_of(nodes[name]), Tensor):
        kind = "a parameter or buffer" if constant else "not there"
        known = [
            n
            for n, node in nodes.items()
            if n not in captured.constants and isinstance(value_of(node), Tensor)
        ]
        raise CaptureError(
            f"{shown} is {kind} in the graph of this {type(model).__name__}; its tensors are {', '.join(known)}"
        )
    value = value_of(nodes[name])
    if not value.is_floating_point():
        raise CaptureError(
            f"{shown} has dtype {value.dtype}, expected a floating dtype: noise is added to it"
        )
    if not first_dimension(value, captured.batch):
        raise CaptureError(
            f"{shown} has shape {tuple(map(str, value.shape))}, expected the batch as its first dimension"
        )
    return name


class Part:
    """What a network computes from one of its tensors on, as a function of that tensor.

    Args:
        captured: The network's graph.
        start: The name of the tensor.
        end: That of the result; by default the network's output.
        alone: Only the tensor itself is wanted, by :meth:`below`.

    Raises:
        CaptureError: The result does not depend on the tensor.

    Examples:
        >>> from captum_mipin.graph.capture import capture
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.ones(1, 4)
        >>> captured = capture(model, (x,))
        >>> part = Part(captured, "relu")
        >>> features, others = part.below(captured.values(model, (x,), ()))
        >>> torch.equal(part.above(features, others), model(x))
        True
    """

    def __init__(
        self, captured: CapturedGraph, start: str, end: str | None = None, *, alone: bool = False
    ) -> None:
        nodes = {node.name: node for node in captured.graph.nodes}
        first, last = nodes[start], nodes[start if alone else end or captured.output.name]
        following, needed = {first}, {last}
        for node in captured.graph.nodes:
            if node.op == "call_function" and following & set(node.all_input_nodes):
                following.add(node)
        if last not in following or (last is first and not alone):
            raise CaptureError(
                f"tensor {last.name!r} does not depend on tensor {first.name!r}, so there is nothing to explain"
            )
        for node in reversed(list(captured.graph.nodes)):
            if node in needed:
                needed.update(node.all_input_nodes)
        inner = [
            node
            for node in captured.graph.nodes
            if node in needed & following and node is not first
        ]
        outer = list(
            dict.fromkeys(n for node in inner for n in node.all_input_nodes if n not in following)
        )
        self._symbol = captured.batch
        self._sizes = {n.name: value_of(n).node.expr for n in outer if is_size(n)}
        tensors = [n for n in outer if not is_size(n)]
        self._below = _module(captured, [first, *tensors], (), [first, *tensors])
        self._above = _module(captured, inner, [first, *outer], [last])
        self._order = [node.name for node in captured.graph.nodes if node.op == "placeholder"]
        self._outer = [node.name for node in outer]
        self._inputs = captured.inputs
        #: Whether the way round the tensor depends on the example as well, so that its values go with the batch.
        self.bypassed = any(_varies(value_of(n), captured.batch) for n in tensors)

    def below(self, values: Mapping[str, Any]) -> tuple[Tensor, Sequence[Any]]:
        """The tensor, and all else that goes into the result, for these values of the graph's placeholders."""
        first, *others = self._run(self._below, [values[name] for name in self._order], values)
        return first, others

    def above(self, x: Tensor, others: Sequence[Any]) -> Tensor:
        """The result, for any value of the tensor."""
        tensors = iter(others)
        rows = [
            evaluate(self._sizes[name], self._symbol, len(x))
            if name in self._sizes
            else next(tensors)
            for name in self._outer
        ]
        (result,) = self._run(self._above, [x, *rows], {})
        found: Tensor = result
        return found

    def _run(
        self, module: fx.GraphModule, arguments: Sequence[Any], values: Mapping[str, Any]
    ) -> Sequence[Any]:
        try:
            with TURNS.explaining():
                found: Sequence[Any] = module.forward(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shown = [values[name] for name in self._inputs] if values else arguments[:1]
            given = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in shown)
            raise InputError(
                f"the model cannot run on a tensor of shape, dtype and device {given}: {error}"
            ) from error
        return found


class Parts:
    """A captured graph and the parts of it that were asked for.

    Args:
        captured: The graph.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        self.captured = captured
        self._parts: dict[tuple[str, str | None], Part] = {}

    @cached_property
    def structure(self) -> str:
        """What the graph computes, as one number, see :func:`captum_mipin.propagation.fingerprint.structure`."""
        return structure(self.captured, MIPIN)

    def __call__(self, start: str, end: str | None = None) -> Part:
        """The part from one tensor to another, by default to the output."""
        if (start, end) not in self._parts:
            self._parts[start, end] = Part(self.captured, start, end)
        return self._parts[start, end]


def _module(
    captured: CapturedGraph,
    wanted: Sequence[fx.Node],
    given: Sequence[fx.Node],
    results: Sequence[fx.Node],
) -> fx.GraphModule:
    """The operations that lead to ``wanted``, from ``given`` or else from all placeholders, as a module."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given or [node for node in captured.graph.nodes if node.op == "placeholder"]:
        copied[node] = graph.placeholder(node.name)
    needed = set(wanted)
    for node in reversed(list(captured.graph.nodes)):
        if node in needed and node not in copied:
            needed.update(node.all_input_nodes)
    for node in captured.graph.nodes:
        if node in needed and node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if (
                node.target is torch.ops.aten.view.default
            ):  # the export saw contiguous tensors; others need a copy
                copied[node].target = torch.ops.aten.reshape.default
    graph.output(tuple(copied[node] for node in results))
    return fx.GraphModule(nn.Module(), graph)


def is_size(node: fx.Node) -> bool:
    """Whether a node's value is a number that follows from the batch's size."""
    return isinstance(value_of(node), (torch.SymInt, torch.SymFloat))


def evaluate(expression: Any, symbol: str, rows: int) -> int | float:
    """A size that follows from the batch's, for a batch of so many rows."""
    found = expression.subs({s: rows for s in expression.free_symbols if str(s) == symbol})
    return int(found) if found.is_Integer else float(found)


def _varies(value: Any, symbol: str) -> bool:
    """Whether a traced tensor has the batch in its shape."""
    sizes = value.shape if isinstance(value, Tensor) else ()
    return any(
        isinstance(size, torch.SymInt) and symbol in map(str, size.node.expr.free_symbols)
        for size in sizes
    )
