"""Parts of a captured graph as functions, and which tensor of the graph a layer gives."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from captum_mipin.errors import CaptureError, InputError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layout import batched, first_dimension
from captum_mipin.graph.marks import module_stack, value_of
from captum_mipin.graph.nodes import ancestors, is_size, place
from captum_mipin.graph.turns import TURNS
from captum_mipin.graph.validate import described


def module_output(captured: CapturedGraph, model: nn.Module, layer: nn.Module) -> str:
    """Return the name of the node that is the output of ``layer``.

    Raises:
        CaptureError: ``layer`` is no part of the model, or has not exactly one output in the graph.
    """
    modules = model.named_modules(remove_duplicate=False)
    paths = {path for path, module in modules if module is layer}
    kind = type(layer).__name__
    if not paths:
        raise CaptureError(f"layer {kind} is not a module of this {type(model).__name__}")
    if layer is model:
        return str(captured.output.name)
    inside = {node for node in captured.graph.nodes if paths & set(place(node).stack)}
    stacks = [module_stack(node).items() for node in inside]
    calls = {call for stack in stacks for call, (path, _) in stack if path in paths}
    leaving = [
        node
        for node in captured.graph.nodes
        if node in inside
        and isinstance(value_of(node), Tensor)
        and not inside.issuperset(node.users)
    ]
    if len(leaving) == len(calls) == 1:
        return str(leaving[0].name)
    reason = (
        f"is called {len(calls)} times and has {len(leaving)} outputs in the graph, expected one "
        "of each"
        if inside
        else "leaves no operation in the graph: it is not called, or does nothing at inference. "
        "Name the module before it"
    )
    raise CaptureError(f"layer {min(paths)!r} ({kind}) {reason}")


def tensor_name(captured: CapturedGraph, model: nn.Module, layer: nn.Module | str) -> str:
    """Return the name of a floating tensor of the graph with the batch as its first dimension.

    Args:
        captured: The model's graph.
        model: The model.
        layer: A module, for its output, or the name of a tensor of the graph.

    Raises:
        CaptureError: There is no such tensor.
    """
    nodes = {node.name: node for node in captured.graph.nodes}
    name = layer if isinstance(layer, str) else module_output(captured, model, layer)
    shown = f"the output of {type(layer).__name__}" if layer is not name else f"tensor {name!r}"
    values = {n: value_of(node) for n, node in nodes.items() if n not in captured.constants}
    tensors = {n: value for n, value in values.items() if isinstance(value, Tensor)}
    if name not in tensors:
        kind = "a parameter or buffer" if name in captured.constants else "not there"
        raise CaptureError(
            f"{shown} is {kind} in the graph of this {type(model).__name__}; its tensors are "
            f"{', '.join(tensors)}"
        )
    value = tensors[name]
    if not value.is_floating_point():
        raise CaptureError(
            f"{shown} has dtype {value.dtype}, expected a floating dtype: noise is added to it"
        )
    if not first_dimension(value, captured.batch):
        shape = tuple(map(str, value.shape))
        raise CaptureError(f"{shown} has shape {shape}, expected the batch as its first dimension")
    return name


def extract(
    graph: fx.Graph, inputs: Iterable[fx.Node], results: Sequence[fx.Node]
) -> fx.GraphModule:
    """Return the part of a graph between some of its nodes as a module.

    Args:
        graph: The graph.
        inputs: Nodes of any kind whose values are the module's arguments, in this order.
        results: Nodes whose values it returns, as a tuple; they depend on nothing but ``inputs``.

    Examples:
        >>> graph = fx.symbolic_trace(lambda x: (x + 1) * 2).graph
        >>> x, total, product, _ = graph.nodes
        >>> extract(graph, [total], [product])(torch.ones(()))
        (tensor(2.),)
    """
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    needed = ancestors(results, copies)  # in the order of the graph they can run
    for node in graph.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in results))
    return fx.GraphModule(nn.Module(), part)


def run_part(module: fx.GraphModule, arguments: Iterable[Any], shown: Iterable[Any]) -> Any:
    """Run a part of a graph.

    Args:
        module: The part.
        arguments: What it takes.
        shown: The tensors that an error names.

    Raises:
        InputError: The model does not take tensors of these shapes, dtypes and devices.
    """
    try:
        return module.forward(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(
            f"the model cannot run on inputs of shape, dtype and device {described(shown)}: {error}"
        ) from error


class Part:
    """What a network computes from one of its tensors on, as a function of that tensor.

    Args:
        captured: The network's graph.
        start: Name of the tensor.
        end: Name of the result; by default the network's output.

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

    def __init__(self, captured: CapturedGraph, start: str, end: str | None = None) -> None:
        graph = captured.graph
        nodes = {node.name: node for node in graph.nodes}
        first, last = nodes[start], nodes[end or captured.output.name]
        following = {first}
        for node in graph.nodes:
            if node.op == "call_function" and following & set(node.all_input_nodes):
                following.add(node)
        if last not in following or last is first:
            raise CaptureError(
                f"tensor {last.name!r} does not depend on tensor {first.name!r}, so there is "
                "nothing to explain"
            )
        # What lies between both tensors, and what that takes from elsewhere.
        inner = ancestors([last]) & following - {first}
        outer = dict.fromkeys(
            n for node in graph.nodes if node in inner for n in node.all_input_nodes
        )
        others = [node for node in outer if node not in following]
        tensors = [node for node in others if not is_size(node)]
        sizes = [node for node in others if is_size(node)]
        self._symbol, self._inputs = captured.batch, captured.inputs
        self._sizes = [value_of(node).node.expr for node in sizes]
        placeholders = graph.find_nodes(op="placeholder")
        self._order = [node.name for node in placeholders]
        self._below = extract(graph, placeholders, [first, *tensors])
        self._above = extract(graph, [first, *tensors, *sizes], [last])
        #: Whether what goes round the tensor depends on the example as well.
        self.bypassed = any(batched(value_of(node)) for node in tensors)

    def below(self, values: Mapping[str, Any]) -> tuple[Tensor, Sequence[Any]]:
        """Return the tensor, and all else that the result is computed from.

        Args:
            values: Of the graph's placeholders, by name.
        """
        arguments = [values[name] for name in self._order]
        with TURNS.explaining():
            first, *others = run_part(self._below, arguments, map(values.get, self._inputs))
        return first, others

    def above(self, x: Tensor, others: Sequence[Any]) -> Tensor:
        """Return the result for any value of the tensor."""
        sizes = [evaluate(size, self._symbol, len(x)) for size in self._sizes]
        with TURNS.explaining():
            (result,) = run_part(self._above, [x, *others, *sizes], [x])
        value: Tensor = result
        return value


def evaluate(expression: Any, symbol: str, rows: int) -> int | float:
    """Return the value of a size that follows from the batch's, for a batch of ``rows``.

    Examples:
        >>> import sympy
        >>> batch = sympy.Symbol("s0")
        >>> evaluate(3 * batch, "s0", 4), evaluate(batch / 8, "s0", 4), evaluate(batch > 4, "s0", 4)
        (12, 0.5, False)
    """
    value = expression.subs({s: rows for s in expression.free_symbols if str(s) == symbol})
    kind = bool if value.is_Boolean else int if value.is_Integer else float
    return kind(value)
