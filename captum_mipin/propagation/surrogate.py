"""From a graph and a table of rules to a surrogate: same values forward, the method backward.

An operation with a rule becomes a :func:`~captum_mipin.propagation.runtime.step`, whose backward
pass is the rule; an operation that passes stays as it is, with autograd's adjoint. Where a tensor
feeds several branches a fork is put in, an operation like any other, whose inverse weighs what
comes back from them. One call of ``torch.autograd.grad`` from the seeded output then *is* the
method, and the gradient with respect to an operation's output is the signal there.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layout import Layout
from captum_mipin.graph.marks import marks, value_of
from captum_mipin.graph.subgraph import extract, run_part
from captum_mipin.propagation.draft import occurrences, sources
from captum_mipin.propagation.passes import draft
from captum_mipin.propagation.runtime import Run, sequence, source, step
from captum_mipin.rules import Learned, Rule
from captum_mipin.rules.linear import pooled_dense
from captum_mipin.rules.pooling import is_average


def _in_sequences(graph: fx.Graph) -> fx.Graph:
    """Return the same graph with one call of :func:`sequence` where steps follow each other.

    A call of an autograd function costs more than many a step.
    """
    result, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    waiting: dict[Any, list[fx.Node]] = {}  # step → the row of steps that ends with it, so far
    for node in graph.nodes:
        row = [*waiting.pop(node.args[2], ()), node] if node.target is step else [node]
        if _continues(node):
            waiting[node] = row
        elif len(row) > 1:
            run, _, x = row[0].args[:3]
            calls = [(link.args[1], link.args[3:], link.kwargs) for link in row]
            arguments = fx.map_arg((run, x, *calls), copies.__getitem__)
            copies[node] = result.call_function(sequence, arguments)
        else:
            copies[node] = result.node_copy(node, copies.__getitem__)
    result.lint()
    return result


def _continues(node: fx.Node) -> bool:
    """Return True if the node's only user is another step that takes it as its signal."""
    users = list(node.users)
    if node.target is not step or len(users) != 1 or users[0].target is not step:
        return False
    return users[0].args[2] is node and occurrences(users[0], node) == 1


class Surrogate:
    """A model's graph whose backward pass is a method.

    Args:
        captured: The graph.
        rules: Operation → rule.
        start: Name of the node at whose output the signal is wanted; None for the inputs.
        calibrate: Learn the scale of the signal there where no learned inverse gives it.
        joint: Learn what comes back to a tensor from all its branches together; else add it up.

    Attributes:
        captured: The graph it was made from.
        graph: The rewritten graph.
        steps: Its steps by key.
        rules: Operation → rule.
        starts: Number of tensors where passes end.
        layouts: Where the examples lie in each of them.

    Raises:
        UnsupportedOperationError: An operation between there and the output has no rule.
        CaptureError: The output does not depend on the start.

    Examples:
        >>> from captum_mipin.graph.capture import capture
        >>> from captum_mipin.rules import MIPIN
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> Surrogate(capture(model, (torch.ones(1, 4),)), MIPIN).learned
        ('2/linear', '0/linear')
    """

    def __init__(
        self,
        captured: CapturedGraph,
        rules: Mapping[str, Rule],
        start: str | None = None,
        calibrate: bool = True,
        joint: bool = True,
    ) -> None:
        made = draft(captured, rules, start, calibrate=calibrate, joint=joint)
        self.captured, self.rules = captured, rules
        self.graph, self.steps = made.graph, made.steps
        self.starts = len(made.starts)
        self.layouts: tuple[Layout, ...] = tuple(marks(node).layout for node in made.starts)
        _, *placeholders = made.graph.find_nodes(op="placeholder")  # the first is the run
        self._order = [marks(node).origin for node in placeholders]
        self._inputs, self._constants = captured.inputs, frozenset(captured.constants)

    @property
    def learned(self) -> tuple[str, ...]:
        """Keys of the steps with a learned inverse, in the order of the fit: output first."""
        steps = reversed(self.steps.items())
        return tuple(key for key, one in steps if isinstance(one.rule, Learned))

    def average(self) -> str:
        """Return the key of the step that gives the output, if it averages over places.

        It is the average itself, or the dense layer on one.

        Raises:
            UnsupportedOperationError: The output is no average over places.
        """
        node = self.graph.output_node().all_input_nodes[0]
        while node.target is not step and len(carried := sources(node)) == 1:
            (node,) = carried
        rule = self._rule(node)
        dense = isinstance(rule, Learned) and rule.inverter is pooled_dense
        if dense or (is_average(rule) and self._averages_places(node)):
            return str(node.args[1])
        raise UnsupportedOperationError(
            "evidence=True tells what speaks for the output from what speaks against it, place by "
            f"place; but the output is that of {marks(node).key}: it has to be an average over "
            "places, or a dense layer on one. Explain all of it"
        )

    def _rule(self, node: fx.Node) -> Rule | None:
        return self.steps[str(node.args[1])].rule if node.target is step else None

    def _averages_places(self, node: fx.Node) -> bool:
        """Return False if an average is over the outputs of a dense layer, or over channels."""
        x: Any = node.args[2]
        while _long_dims(x) <= {marks(x).channels}:  # x has no places
            rule, carried = self._rule(x), sources(x)
            if isinstance(rule, Learned) or is_average(rule):
                return False
            if len(carried) != 1:
                break
            (x,) = carried
        return True

    @property
    def code(self) -> str:
        """The surrogate as Python code."""
        return str(self.graph.python_code("self").src)

    @cached_property
    def _module(self) -> fx.GraphModule:
        return fx.GraphModule(torch.nn.Module(), _in_sequences(self.graph))

    def __call__(self, run: Run, values: Mapping[str, Any]) -> Tensor:
        """Return the model's output; its backward pass is the method.

        Args:
            run: The pass.
            values: The value of each placeholder of the captured graph, by name.
        """
        arguments = [values[name] for name in self._order]
        with torch.enable_grad():
            shown = map(values.get, self._inputs)
            output: Tensor = run_part(self._module, [run, *arguments], shown)
        return output

    def below(
        self, values: Mapping[str, Any], autocast: torch.dtype | None = None
    ) -> dict[str, Any]:
        """Return what :meth:`above` takes, by name: where passes end, and what goes round it.

        Args:
            values: The value of each placeholder of the captured graph, by name.
            autocast: The dtype of autocast on the way there, if any. The results have the dtypes
                that they have without it.
        """
        module, _, dtypes = self._halves
        device = values[self._inputs[0]].device.type
        arguments = [values[name] for name in self._order]
        with torch.enable_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
            results = run_part(module, arguments, map(values.get, self._inputs))
        return {
            name: value if dtype is None else value.to(dtype)
            for (name, dtype), value in zip(dtypes.items(), results, strict=True)
        }

    def above(self, run: Run, values: Mapping[str, Any], weights: Mapping[str, Any]) -> Tensor:
        """Return the model's output from where passes end.

        Args:
            run: The pass.
            values: What :meth:`below` returned.
            weights: The value of each parameter, buffer and constant, by placeholder.
        """
        _, module, dtypes = self._halves
        between = [values[name] for name in dtypes]
        constants = [weights[name] for name in self._order if name in self._constants]
        with torch.enable_grad():
            (output,) = run_part(module, [run, *between, *constants], between)
        result: Tensor = output
        return result

    @cached_property
    def _halves(self) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, torch.dtype | None]]:
        """The graph below and above the ends of passes, and the dtypes of what goes between."""
        run, *placeholders = self.graph.find_nodes(op="placeholder")
        named = zip(placeholders, self._order, strict=True)
        weights = [node for node, name in named if name in self._constants]
        # Below: what neither starts nor depends on one. Above: the rest, and what is fixed.
        fixed = {run, *weights}  # all that follows from the weights alone
        upper = dict.fromkeys(self.graph.find_nodes(op="call_function", target=source))
        ends = {node.args[2] for node in upper}
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            taken = set(node.all_input_nodes)
            if taken <= fixed:
                fixed.add(node)
            elif taken & (upper.keys() | ends):
                upper[node] = None
        needed = dict.fromkeys(n for node in upper for n in node.all_input_nodes)
        between = [node for node in needed if node not in upper and node not in fixed]
        output = self.graph.output_node().all_input_nodes
        return (
            extract(self.graph, placeholders, between),
            extract(self.graph, [run, *between, *weights], output),
            {node.name: getattr(value_of(node), "dtype", None) for node in between},
        )


def _long_dims(node: fx.Node) -> set[int | None]:
    """Return the dimensions behind the first that have more than one entry."""
    return {dim for dim, size in enumerate(value_of(node).shape) if dim > 0 and size != 1}
