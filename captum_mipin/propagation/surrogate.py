"""From a graph and a table of rules to a surrogate: same values forward, the method backward.

The graph is rewritten once. An operation with a rule becomes a :func:`step`, whose backward pass is the rule; an
operation that passes stays as it is, with autograd's adjoint. Where a tensor feeds several branches a fork is put in,
an operation like any other, whose inverse weighs what comes back from them. One call of ``torch.autograd.grad`` from
the seeded output then *is* the method, and the gradient with respect to an operation's output is the signal there.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.errors import CaptureError, UnsupportedOperationError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layout import Layout
from captum_mipin.graph.marks import inherit, mark, marks, value_of
from captum_mipin.graph.nodes import argument, operation
from captum_mipin.graph.subgraph import extract, run_part
from captum_mipin.propagation.canonical import respell
from captum_mipin.propagation.check import (
    carrying_users,
    channels,
    cut_recordings,
    marked_copy,
    occurrences,
    redirect,
    refusal,
    treatments,
    unscaled,
    without_signal,
)
from captum_mipin.propagation.runtime import Run, Step, passed, sequence, source, step
from captum_mipin.rules import MIPIN, Fork, Learned, Passes, Recorded, Rule, table
from captum_mipin.rules.linear import TOGETHER, pooled_dense
from captum_mipin.rules.pooling import is_average


def _taking(operation: Callable[..., Any], at: int) -> Callable[..., Any]:
    """An operation that takes first what it has at this position."""
    return (
        operation
        if at == 0
        else lambda x, *others, **named: operation(*others[:at], x, *others[at:], **named)
    )


def _placed(
    operation: Callable[..., Any],
    positions: Sequence[int],
    x: tuple[Tensor, ...],
    *others: Any,
    **named: Any,
) -> Any:
    """Run an operation on what carries signal, at these positions, and the rest."""
    arguments = list(others)
    for at, part in sorted(zip(positions, x, strict=True), key=lambda pair: pair[0]):
        arguments.insert(at, part)
    return operation(*arguments, **named)


def _constants_first(graph: fx.Graph) -> fx.Node:
    """Move what follows from parameters alone, such as normalised weights, behind the placeholders; the last of all these."""
    last: fx.Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        constant = node.op == "call_function" and not marks(node).depends
        if constant and all(
            n.op == "placeholder" or marks(n).constant for n in node.all_input_nodes
        ):
            mark(node, constant=True)
            last.append(node)
            last = node
    return last


def _places(node: fx.Node) -> set[int | None]:
    """The dimensions of a tensor, besides that of the batch, along which there is more than one element."""
    return {dim for dim, n in enumerate(value_of(node).shape) if dim > 0 and n != 1}


def _in_sequences(graph: fx.Graph) -> fx.Graph:
    """The same graph with one call of :func:`sequence` where steps follow each other: a call costs more than many a step."""
    result, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    waiting: dict[
        Any, list[fx.Node]
    ] = {}  # step → itself and those before it that are to run with the one behind
    for node in graph.nodes:
        row = [*waiting.pop(node.args[2], ()), node] if node.target is step else [node]
        if _continues(node):
            waiting[node] = row
        elif len(row) > 1:
            run, _, x = row[0].args[:3]
            calls = [(link.args[1], link.args[3:], link.kwargs) for link in row]
            copied[node] = result.call_function(
                sequence, fx.map_arg((run, x, *calls), copied.__getitem__)
            )
        else:
            copied[node] = result.node_copy(node, copied.__getitem__)
    result.lint()
    return result


def _continues(node: fx.Node) -> bool:
    """Whether it is a step whose value goes to another step, as what carries its signal, and nowhere else."""
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
        joint: Learn what comes back to a tensor from all its branches together; otherwise it is summed up.

    Raises:
        UnsupportedOperationError: An operation between there and the output has no rule.
        CaptureError: The output does not depend on the start.

    Examples:
        >>> from captum_mipin.graph.capture import capture
        >>> from captum_mipin.rules import MIPIN
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()
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
        graph, starts = marked_copy(captured, rules, start)
        (output,) = next(node for node in graph.nodes if node.op == "output").all_input_nodes
        refused = [t for t in treatments(graph, rules) if t.status == "refused"]
        if refused:
            raise UnsupportedOperationError(refusal(refused, rules))
        respell(graph, starts, captured.batch)
        if lost := [node for node in starts if not node.users]:  # what they go to is dropped
            raise CaptureError(without_signal(lost, output))
        for node in graph.nodes:
            if marks(node).signal and isinstance(value_of(node), Tensor):
                mark(node, channels=channels(node))
        cut_recordings(graph, rules)
        self.steps: dict[str, Step] = {}
        self._rules, self._joint = rules, joint
        order = [marks(node).origin for node in graph.nodes if node.op == "placeholder"]
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            run = graph.placeholder("run")
        last = _constants_first(graph)
        learns = any(isinstance(rule, Learned) for rule in rules.values())
        needs_scale = [learns and unscaled(node, rules) for node in starts]
        if any(needs_scale) and not calibrate:
            raise CaptureError(
                f"the signal at {marks(starts[0]).key} lacks its scale: sums, scales or a batch norm follow it. Fit "
                "InverseNetwork(model, layer=...) at this module, which learns it, or take the module behind them."
            )
        for node in list(graph.nodes):
            if node._erased or node.op == "output" or not marks(node).signal:
                continue
            if node in starts:
                index = starts.index(node)
                users = carrying_users(node)
                with graph.inserting_after(last if node.op == "placeholder" else node):
                    result = graph.call_function(source, (run, index, node))
                inherit(result, node)
                redirect(node, repeat(result), users)
                self._fork(graph, run, result, needs_scale[index])
            elif isinstance(value_of(node), Tensor) or not isinstance(
                rules[str(node.target)], Passes
            ):
                result = self._replace(graph, run, node, rules)
                self._fork(graph, run, result)
        graph.eliminate_dead_code()
        graph.lint()
        self.starts, self.rules = len(starts), rules
        self.layouts: tuple[Layout, ...] = tuple(marks(node).layout for node in starts)
        self._order, self._inputs, self._constants = (
            tuple(order),
            captured.inputs,
            frozenset(captured.constants),
        )
        self.graph = graph

    @property
    def learned(self) -> tuple[str, ...]:
        """Keys of the steps with a learned inverse, in the order in which they are fitted: from the output down."""
        return tuple(
            key for key, this in reversed(self.steps.items()) if isinstance(this.rule, Learned)
        )

    def average(self) -> str:
        """Key of the average over places that the output is, or of the dense layer on one.

        Raises:
            UnsupportedOperationError: It is none.
        """
        (node,) = next(node for node in self.graph.nodes if node.op == "output").all_input_nodes
        while (
            node.target is not step
            and len(carried := [n for n in node.all_input_nodes if marks(n).signal]) == 1
        ):
            (node,) = carried
        rule = self.steps[str(node.args[1])].rule if node.target is step else None
        of_places = is_average(rule) and self._at_places(node)
        if of_places or (isinstance(rule, Learned) and rule.inverter is pooled_dense):
            return str(node.args[1])
        raise UnsupportedOperationError(
            "evidence=True tells what speaks for the output from what speaks against it, place by place; but the output is "
            f"that of {marks(node).key}: it has to be an average over places, or a dense layer on one. Explain all of it"
        )

    def _at_places(self, node: fx.Node) -> bool:
        """Whether an average is one over places, not over what a dense layer gives, or averages of several channels."""
        x: Any = node.args[2]
        while _places(x) <= {marks(x).channels}:
            rule = self.steps[str(x.args[1])].rule if x.target is step else None
            if isinstance(rule, Learned) or is_average(rule):
                return False
            carried = [n for n in x.all_input_nodes if marks(n).signal]
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
        """The model's output, with a graph behind it whose backward pass is the method."""
        arguments = [values[name] for name in self._order]
        shown = map(values.get, self._inputs)
        with torch.enable_grad():
            output: Tensor = run_part(self._module, [run, *arguments], shown)
        return output

    def below(
        self, values: Mapping[str, Any], autocast: torch.dtype | None = None
    ) -> dict[str, Any]:
        """What :meth:`above` takes of what lies below, by name: the tensors where passes end, and what goes round them.

        Args:
            values: Of the graph's placeholders.
            autocast: The dtype of autocast on the way there, if any; what is found has that of the graph.
        """
        module, _, names = self._halves
        device = values[self._inputs[0]].device.type
        with torch.enable_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
            arguments = [values[name] for name in self._order]
            found = run_part(module, arguments, map(values.get, self._inputs))
        pairs = zip(names.items(), found, strict=True)
        return {name: value if dtype is None else value.to(dtype) for (name, dtype), value in pairs}

    def above(self, run: Run, values: Mapping[str, Any], weights: Mapping[str, Any]) -> Tensor:
        """The model's output from where the passes end on: of what :meth:`below` found, and of the model's weights."""
        _, module, names = self._halves
        between = [values[name] for name in names]
        constants = [weights[name] for name in self._order if name in self._constants]
        with torch.enable_grad():
            output: Tensor = run_part(module, [run, *between, *constants], between)[0]
        return output

    @cached_property
    def _halves(self) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, torch.dtype | None]]:
        """The graph in two, and the names of what goes from one to the other, with the dtypes of tensors."""
        nodes = [node for node in self.graph.nodes if node.op != "output"]
        run, *given = [node for node in nodes if node.op == "placeholder"]
        names = dict(zip(given, self._order, strict=True))
        fixed = {
            run,
            *(node for node in given if names[node] in self._constants),
        }  # what follows from the weights alone
        upper = dict.fromkeys(node for node in nodes if node.target is source)
        starts = {node.args[2] for node in upper}
        for node in nodes:
            sources = set(node.all_input_nodes)
            if node.op == "call_function" and sources <= fixed:
                fixed.add(node)
            elif sources & (upper.keys() | starts):
                upper[node] = None
        (output,) = next(node for node in self.graph.nodes if node.op == "output").all_input_nodes
        needed = [
            n for node in upper for n in node.all_input_nodes if n not in upper and n not in fixed
        ]
        between = list(dict.fromkeys(needed))
        weights = [node for node in given if node in fixed]
        below = extract(self.graph, given, between)
        above = extract(self.graph, [run, *between, *weights], [output])
        return (
            below,
            above,
            {node.name: getattr(value_of(node), "dtype", None) for node in between},
        )

    def _replace(
        self, graph: fx.Graph, run: fx.Node, node: fx.Node, rules: Mapping[str, Rule]
    ) -> fx.Node:
        """Put a step in the place of an operation, where its rule wants one."""
        rule = None if node.target is operator.getitem else rules[str(node.target)]
        key = marks(node).key
        if isinstance(rule, Passes) and str(node.target) in table().keys() - MIPIN.keys():
            target: Any = node.target
            node.target, node.args = passed, (run, key, target, *node.args)
        if not isinstance(rule, (Recorded, Learned)):
            return node
        assert callable(node.target)  # for mypy: it is an operation
        carriers = rule.carriers(node)
        carried = tuple(node.args[at] for at in carriers)
        others = [argument for at, argument in enumerate(node.args) if at not in carriers]
        several = isinstance(rule, Recorded) and rule.several
        run_on = (
            partial(_placed, node.target, carriers)
            if several
            else _taking(node.target, carriers[0])
        )
        self.steps[key] = Step(key, rule, run_on, marks(node).layout)
        with graph.inserting_after(node):
            new = graph.call_function(
                step, (run, key, carried if several else carried[0], *others), dict(node.kwargs)
            )
        inherit(new, node)
        for user in list(node.users):
            if (
                user.target is operator.getitem
            ):  # the step's value is the first of the operation's outputs
                user.replace_all_uses_with(new)
                graph.erase_node(user)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return new

    def _fork(
        self, graph: fx.Graph, run: fx.Node, node: fx.Node, needs_scale: bool = False
    ) -> None:
        """Put a fork behind a tensor that feeds several branches, or whose signal lacks a scale."""
        users = carrying_users(node)
        count = sum(occurrences(user, node) for user in users)
        if not isinstance(value_of(node), Tensor) or not (
            needs_scale or (count > 1 and self._joint)
        ):
            return
        weighed = self._weighed(node, users) if count > 1 else []
        rules = [self._rules[str(user.target)] for user in weighed]
        fork = Fork(
            tuple(user.target for user in weighed if callable(user.target)),
            tuple(rule.inverter for rule in rules if isinstance(rule, Learned)),
            count - len(weighed),
            marks(node).channels,
        )
        key = f"{marks(node).key}/fork"
        self.steps[key] = Step(key, fork.rule, fork, marks(node).layout)
        calls = [(user.args[1:], dict(user.kwargs)) for user in weighed]
        with graph.inserting_after(node):
            forked = graph.call_function(step, (run, key, node, *calls))
        parts: list[fx.Node] = []
        for index in reversed(range(count)):
            with graph.inserting_after(forked):
                parts.insert(0, graph.call_function(operator.getitem, (forked, index)))
            inherit(parts[0], node)
        redirect(node, iter(parts[len(weighed) :]), [user for user in users if user not in weighed])
        for user, part in zip(weighed, parts, strict=False):
            inherit(part, user)
            user.replace_all_uses_with(part)
            graph.erase_node(user)
            self._fork(graph, run, part)

    def _weighed(self, node: fx.Node, users: Sequence[fx.Node]) -> list[fx.Node]:
        """The operations with weights among the branches of ``node`` that can be inverted together."""
        found: list[fx.Node] = []
        for user in users:
            others = [n for n in user.all_input_nodes if n is not node]
            rule = MIPIN.get(str(user.target))
            learned = (
                isinstance(rule, Learned) and rule.inverter in TOGETHER and user.args[0] is node
            )
            if (
                learned
                and occurrences(user, node) == 1
                and not any(marks(n).depends for n in others)
            ):
                found.append(user)
        kinds = [("conv" in operation(user), argument(user, 6, "groups", 1)) for user in found]
        most = max(kinds, key=lambda kind: (kinds.count(kind), kind[0], -kind[1]), default=None)
        return [user for user, kind in zip(found, kinds, strict=True) if kind == most]
