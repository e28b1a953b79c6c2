"""Parts of a captured graph as functions."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn

from captum_mipin.errors import CaptureError, InputError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layout import batch_dimension, batched
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.nodes import ancestors, is_size
from captum_mipin.graph.turns import TURNS
from captum_mipin.graph.validate import described


def extract(
    graph: fx.Graph, inputs: Iterable[fx.Node], results: Sequence[fx.Node]
) -> fx.GraphModule:
    """Return the part of a graph between some of its nodes as a module.

    Args:
        graph: The graph.
        inputs: Nodes of any kind; their values are the arguments of the module, in this order.
        results: Nodes whose values the module returns, as a tuple. They must not depend on anything
            except ``inputs``.

    Examples:
        >>> graph = fx.symbolic_trace(lambda x: (x + 1) * 2).graph
        >>> x, total, product, _ = graph.nodes
        >>> extract(graph, [total], [product])(torch.ones(()))
        (tensor(2.),)
    """
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    needed = ancestors(results, copies)
    for node in graph.nodes:  # in this order each node follows its arguments
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
            if node.target is torch.ops.aten.copy.default:  # it has no derivative
                copies[node].target = _copied
    part.output(tuple(copies[node] for node in results))
    return fx.GraphModule(nn.Module(), part)


def _copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Return ``source`` in the shape and dtype of ``x``."""
    return source.to(x.dtype).expand(x.shape)


def run_part(module: fx.GraphModule, arguments: Iterable[Any], shown: Iterable[Any]) -> Any:
    """Run a part of a graph, and return its results.

    Args:
        module: The part, from :func:`extract`.
        arguments: The values of its placeholders, in their order.
        shown: Tensors whose shapes, dtypes and devices an error message contains.

    Raises:
        InputError: The model does not take tensors of these shapes, dtypes and devices.
    """
    arguments, shown = list(arguments), list(shown)
    try:
        return module.forward(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(
            f"the model cannot run on inputs of shape, dtype and device {described(shown)}: {error}"
            f". {_advice(shown, arguments)}"
        ) from error


def _advice(shown: Iterable[Any], arguments: Iterable[Any]) -> str:
    """Return what to do about inputs on which a model cannot run.

    Args:
        shown: The inputs, and further arguments.
        arguments: All values that the model's graph takes, parameters included.
    """
    inputs = [x for x in shown if isinstance(x, Tensor)]
    own = set(map(id, inputs))
    values = (a for a in arguments if isinstance(a, Tensor) and id(a) not in own)
    for weight in islice(filter(torch.is_floating_point, values), 1):
        if any(x.is_floating_point() and x.dtype != weight.dtype for x in inputs):
            return f"Pass x.to({weight.dtype}), the dtype of the model's weights"
        if any(x.device != weight.device for x in inputs):
            return f"Pass x.to({str(weight.device)!r}), the device of the model's weights"
    return "Pass inputs of a shape, dtype and device with which model(inputs) runs"


class Part:
    """The part of a network behind one of its tensors x, as a function of x; the batch is first.

    The network is split in two: :meth:`below` computes x from the inputs, :meth:`above` computes
    the result from x. Tensors that the result needs besides x are computed by :meth:`below` too.

    Args:
        captured: The network's graph.
        start: Name of the node whose value is x.
        end: Name of the node whose value is the result; by default the network's output.

    Attributes:
        bypassed: Whether the result also depends on the example through tensors besides x, such as
            a residual connection that bypasses x.

    Raises:
        CaptureError: The result does not depend on x.

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

    def __init__(self, captured: CapturedGraph, start: str, end: str | None = None) -> None:
        graph = captured.graph
        nodes = {node.name: node for node in graph.nodes}
        first, last = nodes[start], nodes[end or captured.output.name]
        following = {first}
        for node in graph.nodes:
            if node.op == "call_function" and following & set(node.all_input_nodes):
                following.add(node)
        if last is first:
            raise CaptureError(
                "the layer is the model's output, so nothing follows that could be explained: name "
                "a layer closer to the input"
            )
        if last not in following:
            raise CaptureError(
                f"tensor {last.name!r} does not depend on tensor {first.name!r}, so there is "
                "nothing to explain: name a layer on the path to the output"
            )
        # inner: the nodes from x to the result; others: all further nodes that inner takes
        inner = ancestors([last]) & following - {first}
        outer = dict.fromkeys(
            n for node in graph.nodes if node in inner for n in node.all_input_nodes
        )
        others = [node for node in outer if node not in following]
        tensors = [node for node in others if not is_size(node)]
        sizes = [node for node in others if is_size(node)]
        self._symbol, self._inputs = captured.batch, captured.inputs
        # the batch may be another dimension of a tensor, as in (tokens, batch, features)
        dims = (batch_dimension(value_of(node), captured.batch) for node in (first, last))
        self._first, self._last = (dim or 0 for dim in dims)
        self._sizes = [value_of(node).node.expr for node in sizes]
        placeholders = graph.find_nodes(op="placeholder")
        self._order = [node.name for node in placeholders]
        self._below = extract(graph, placeholders, [first, *tensors])
        self._above = extract(graph, [first, *tensors, *sizes], [last])
        self.bypassed = any(batched(value_of(node)) for node in tensors)

    def below(self, values: Mapping[str, Any]) -> tuple[Tensor, Sequence[Any]]:
        """Return x, and the other tensors from which the result is computed.

        Args:
            values: Name of a placeholder of the graph → its value.
        """
        arguments = [values[name] for name in self._order]
        with TURNS.explaining():
            first, *others = run_part(self._below, arguments, map(values.get, self._inputs))
        return first.movedim(self._first, 0), others

    def above(self, x: Tensor, others: Sequence[Any]) -> Tensor:
        """Return the result for a value of x.

        Args:
            x: Tensor (batch, ...), else of the shape of the tensor in the network.
            others: The other tensors, from :meth:`below`.
        """
        sizes = [evaluate(size, self._symbol, len(x)) for size in self._sizes]
        with TURNS.explaining():
            arguments = [x.movedim(0, self._first), *others, *sizes]
            (result,) = run_part(self._above, arguments, [x])
        value: Tensor = result.movedim(self._last, 0)
        return value


def evaluate(expression: Any, symbol: str, rows: int) -> int | float:
    """Return the value of a symbolic size for a batch of ``rows`` examples.

    Args:
        expression: A sympy expression of the batch size, or a condition on it.
        symbol: Name of the symbol that stands for the batch size.
        rows: The batch size.

    Examples:
        >>> import sympy
        >>> batch = sympy.Symbol("s0")
        >>> evaluate(3 * batch, "s0", 4), evaluate(batch / 8, "s0", 4), evaluate(batch > 4, "s0", 4)
        (12, 0.5, False)
    """
    value = expression.subs({s: rows for s in expression.free_symbols if str(s) == symbol})
    kind = bool if value.is_Boolean else int if value.is_Integer else float
    return kind(value)
