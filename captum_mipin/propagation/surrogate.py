"""The surrogate of a model: a module with the model's values, whose backward pass is a method.

It is made from a captured graph and a table of rules:

- An operation with a rule becomes a :func:`~captum_mipin.propagation.runtime.step`, whose backward
  pass is the rule.
- An operation whose rule is ``Passes`` is not changed; its backward pass is autograd's adjoint.
- Behind a tensor that feeds several branches a fork is added. It is an operation with an inverse of
  its own, which weights the signals of the branches.

One call of ``torch.autograd.grad`` from the seeded output then computes the whole method. The
gradient with respect to a tensor is the signal at this tensor.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layout import Layout, batch_dimension
from captum_mipin.graph.marks import marks, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.graph.subgraph import extract, run_part
from captum_mipin.propagation.averages import FLAT, moves_ones
from captum_mipin.propagation.draft import occurrences, sources
from captum_mipin.propagation.passes import draft
from captum_mipin.propagation.runtime import Run, sequence, source, step
from captum_mipin.rules import Learned, Recorded, Rule
from captum_mipin.rules.pooled import pooled_dense
from captum_mipin.rules.pooling import is_average


def _in_sequences(graph: fx.Graph) -> fx.Graph:
    """Return a copy of the graph with consecutive steps merged into one call of :func:`sequence`.

    With one call per step, the overhead of autograd would exceed the time of many steps.
    """
    result, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    waiting: dict[Any, list[fx.Node]] = {}  # last step of an unfinished row → all its steps
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
    """Return True if a node's only user is another step that takes the node as its signal."""
    users = list(node.users)
    if node.target is not step or len(users) != 1 or users[0].target is not step:
        return False
    return users[0].args[2] is node and occurrences(users[0], node) == 1


class Surrogate:
    """A callable form of a model's graph whose backward pass is a method.

    Args:
        captured: The graph of the model.
        rules: Operation → rule.
        start: Names of the nodes whose values are explained; None for the inputs.
        calibrate: Learn a factor per channel for the signal at the explained tensors, if the signal
            does not have the units of their values.
        joint: Learn one regression on the signals of all branches of a tensor; if False, the
            signals of the branches are added.

    Attributes:
        captured: The graph of the model.
        graph: The rewritten graph.
        steps: Key → step.
        rules: Operation → rule.
        starts: Number of explained tensors.
        layouts: One layout per explained tensor.

    Raises:
        UnsupportedOperationError: An operation between an explained tensor and the output has no
            rule.
        CaptureError: The output does not depend on an explained tensor.

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
        start: Sequence[str] | None = None,
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

    def average(self, option: str = "evidence") -> tuple[str, int | None]:
        """Return the key of the step that computes the output as an average over positions.

        It is the step of the average, or of a dense layer on an average.

        Args:
            option: The option that needs it, "evidence" or "contrast". With "contrast", the output
                is the average itself, of two or more classes.

        Returns:
            The key, and the dimension of the classes in the averaged tensor, or behind the dense
            layer; None if it is an average of averages, or several dimensions are not averaged.

        Raises:
            UnsupportedOperationError: The output is not an average over positions.
        """
        output = node = self.graph.output_node().all_input_nodes[0]
        shape, whole = value_of(output).shape, True
        while node.target is not step and len(carried := sources(node)) == 1:
            whole = whole and (operation(node) in FLAT or moves_ones(node))
            (node,) = carried
        rule = self._rule(node)
        dense = isinstance(rule, Learned) and rule.inverter is pooled_dense
        if dense or (is_average(rule) and self._averages_places(node)):
            classes = -1 if dense else self._classes(node)
            if option == "evidence" or (
                whole and len(shape) == 2 and shape[1] > 1 and classes is not None
            ):
                return str(node.args[1]), classes
        several = "" if option == "evidence" else ", for two or more classes"
        raise UnsupportedOperationError(
            f"{option}=True is set, but the output is that of {marks(node).key}: it has to be an "
            f"average over positions, or a dense layer on such an average{several}. Pass "
            f"{option}=False"
        )

    def _classes(self, node: fx.Node) -> int | None:
        """Return the only dimension but the batch that an average keeps.

        Return None if it keeps several, or averages what is an average itself.
        """
        x: Any = node.args[2]
        below = x
        while below.target is not step and len(carried := sources(below)) == 1:
            (below,) = carried
        if is_average(self._rule(below)):
            return None
        ndim, rule = value_of(x).ndim, self._rule(node)
        assert isinstance(rule, Recorded)  # for mypy: it is the rule of an average
        last: int = rule.run.args[0]  # type: ignore[attr-defined]
        averaged: Any = range(ndim - last, ndim) if last else node.args[3]
        kept = set(range(ndim)) - {dim % ndim for dim in averaged}
        kept -= {batch_dimension(value_of(x), self.captured.batch)}
        classes = kept.pop() if len(kept) == 1 else None
        if classes is None or value_of(x).shape[classes] != prod(value_of(node).shape[1:]):
            return None  # a grid of averages
        return classes

    def _rule(self, node: fx.Node) -> Rule | None:
        return self.steps[str(node.args[1])].rule if node.target is step else None

    def _averages_places(self, node: fx.Node) -> bool:
        """Return True if an average is over positions, False if over channels or dense outputs.

        Args:
            node: The step of the average.
        """
        x: Any = node.args[2]
        while _long_dims(x) <= {marks(x).channels}:  # x has a single position
            rule, carried = self._rule(x), sources(x)
            if isinstance(rule, Learned) or is_average(rule):
                return False
            if len(carried) != 1:
                break
            (x,) = carried
        return True

    @property
    def code(self) -> str:
        """The Python code of the surrogate's graph."""
        return str(self.graph.python_code("self").src)

    @cached_property
    def _module(self) -> fx.GraphModule:
        return fx.GraphModule(torch.nn.Module(), _in_sequences(self.graph))

    def __call__(self, run: Run, values: Mapping[str, Any]) -> Tensor:
        """Return the model's output; its backward pass is the method.

        Args:
            run: The settings of the pass, in which its results are stored.
            values: Name of a placeholder of the captured graph → its value.
        """
        arguments = [values[name] for name in self._order]
        with torch.enable_grad():
            shown = map(values.get, self._inputs)
            output: Tensor = run_part(self._module, [run, *arguments], shown)
        return output

    def below(
        self, values: Mapping[str, Any], autocast: torch.dtype | None = None
    ) -> dict[str, Any]:
        """Return the explained tensors, and the other tensors that :meth:`above` needs, by name.

        Args:
            values: Name of a placeholder of the captured graph → its value.
            autocast: Dtype of autocast for this computation; None for no autocast. The results are
                cast to the dtypes that they have without autocast.
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
        """Return the model's output, computed from the explained tensors.

        Args:
            run: The settings of the pass, in which its results are stored.
            values: The tensors from :meth:`below`.
            weights: Name of a placeholder → its parameter, buffer or constant.
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
        """The graph in two parts, before and behind the explained tensors.

        Returns:
            The module of the first part, the module of the second part, and the dtypes of the
            tensors that the second part takes from the first.
        """
        run, *placeholders = self.graph.find_nodes(op="placeholder")
        named = zip(placeholders, self._order, strict=True)
        weights = [node for node, name in named if name in self._constants]
        # upper: the explained tensors and all nodes computed from them; they form the second part,
        # together with fixed: the nodes computed from weights alone.
        fixed = {run, *weights}
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
    """Return the dimensions with more than one entry, except the first dimension."""
    return {dim for dim, size in enumerate(value_of(node).shape) if dim > 0 and size != 1}
