"""From a graph and a table of rules to a surrogate: same values forward, the method backward.

The graph is rewritten once. An operation with a rule becomes a :func:`step`, whose backward pass is the rule; an
operation that passes stays as it is, with autograd's adjoint. Where a tensor feeds several branches a fork is put in,
an operation like any other, whose inverse weighs what comes back from them. One call of ``torch.autograd.grad`` from
the seeded output then *is* the method, and the gradient with respect to an operation's output is the signal there.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.batch import Layout
from captum_mipin.capture import CapturedGraph
from captum_mipin.errors import CaptureError, InputError, RuleError, UnsupportedOperationError
from captum_mipin.rules import MIPIN, Fork, Inverse, Inverter, Learned, Options, Passes, Recorded, Rule, operation, table
from captum_mipin.rules.base import argument
from captum_mipin.rules.linear import TOGETHER, pooled_dense
from captum_mipin.rules.pooling import is_average
from captum_mipin.spelling import respell
from captum_mipin.survey import (
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

#: A class, as the index of its logit among the model's outputs without the batch dimension.
Target = tuple[int, ...]
#: Step key → its fitted inverse.
Inverses = Mapping[str, Inverse]


@dataclass(frozen=True)
class Step:
    """One operation with a rule, as the surrogate runs it: on the argument that carries signal, or a tuple of several, then
    on the others.

    Attributes:
        key: Its name in every fit.
        rule: Where its signal goes.
        operation: What it computes.
        layout: Where the examples are in what it takes and gives.
    """

    key: str
    rule: Recorded | Learned
    operation: Callable[..., Any]
    layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True)
class Seen:
    """What a fit sees of a learned step: x, whose way back ends at the outputs of the steps below, and its own outputs."""

    inverter: Inverter
    x: Tensor
    outputs: tuple[Tensor, ...]


@dataclass
class Run:
    """One pass: how rules are read, which inverses apply to which examples, and what is recorded.

    Attributes:
        steps: The surrogate's steps by key.
        options: How rules are read.
        inverses: Target → its inverses.
        groups: (target, its examples), one after the other the whole batch.
        fitting: Keys of the learned steps that a fit wants to see, if it is one: there the backward pass is cut, and below the
            lowest of them nothing is recorded.
        seen: What it saw there.
        sizes: About the bytes of what is kept for the way back through each of these steps and what lies below it.
        sources: The tensors at which the signal is wanted.
        proving: Make sure that what rules compute is what their operations do.
        once: There is one way back only: what it needs is forgotten step by step.
        evidence: Key of the average at the output of which :attr:`Options.evidence` is sent back, if it is asked for.
        autocast: What products with weights are computed in, by their operations as autocast has it; None for no other dtype.
            All else keeps its own.
    """

    steps: Mapping[str, Step]
    options: Options = field(default_factory=Options)
    inverses: Mapping[Target, Inverses] = field(default_factory=dict)
    groups: Sequence[tuple[Target, slice]] = ()
    fitting: Collection[str] | None = None
    seen: dict[str, "Seen"] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    sources: dict[int, Tensor] = field(default_factory=dict)
    proving: bool = False
    once: bool = False
    evidence: str | None = None
    autocast: torch.dtype | None = None

    def operate(self, this: Step, x: Tensor, arguments: Any, named: Any) -> Any:
        """What a learned step computes."""
        if self.autocast is None:
            return this.operation(x, *arguments, **named)
        with torch.autocast(x.device.type, self.autocast):
            value = this.operation(x, *arguments, **named)
        return tuple(part.to(x.dtype) for part in value) if isinstance(value, tuple) else value.to(x.dtype)

    def invert(self, inverter: Inverter, step: Step, *signals: Tensor) -> Tensor:
        """g(S), for each example with the inverse of its own target."""
        parts: list[Tensor] = []
        for target, examples in self.groups:
            inverse = self.inverses[target][step.key].to(signals[0])
            several = len(self.groups) > 1
            own = tuple(step.layout.part(s, examples) for s in signals) if several else signals
            try:
                if not inverse.fits(inverter):
                    raise RuntimeError(f"its parts are not those of a regression of size {inverter.size}")
                parts.append((inverter.part(examples) if several else inverter).apply(inverse, own, self.options.bias))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise InputError(
                    f"the inverse of {step.key} does not fit signals of shape {', '.join(str(tuple(s.shape)) for s in own)}: "
                    f"{error}. Give it inputs of the size it was fitted on, or fit another InverseNetwork."
                ) from error
        return step.layout.join(parts)


class _Invert(torch.autograd.Function):
    """Runs a step forward; its backward pass is the step's rule."""

    @staticmethod
    def forward(ctx: Any, run: Run, step: Step, arguments: Any, named: Any, *x: Tensor) -> Any:
        several = isinstance(step.rule, Recorded) and step.rule.several
        value, ctx.back = _forward(run, step, x if several else x[0], arguments, named)
        ctx.once, ctx.key, ctx.shapes = run.once, step.key, [tuple(part.shape) for part in x]
        return value

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> Any:
        found = ctx.back(*signals)
        if ctx.once:
            ctx.back = None
        found = found if isinstance(found, tuple) else (found,)
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in found]
        if shapes != ctx.shapes:
            raise RuleError(
                f"the rule of {ctx.key} sends back {_listed(shapes)}, expected a signal of the shape of what carries it, "
                f"{_listed(ctx.shapes)}"
            )
        return None, None, None, None, *found


def _listed(shapes: Sequence[Any]) -> str:
    return ", ".join(map(str, shapes))


def _forward(run: Run, step: Step, x: Any, arguments: Any, named: Any) -> tuple[Any, Callable[..., Tensor]]:
    options = replace(run.options, evidence=True) if step.key == run.evidence else run.options
    if isinstance(step.rule, Recorded):
        found = step.rule.run(options, step.operation, x, *arguments, **named)
        if run.proving:
            _prove(step, found, step.operation(x, *arguments, **named))
        return found
    inverter = step.rule.inverter(options, x, *arguments, **named)
    return run.operate(step, x, arguments, named), partial(run.invert, inverter, step)


def _prove(step: Step, found: Any, expected: Any) -> None:
    """Whether a rule gives the value of its operation, and a way back."""
    expected = expected[0] if isinstance(expected, tuple) else expected
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and callable(found[1])):
        raise RuleError(
            f"the rule of {step.key} returns a {type(found).__name__}, expected the value and a function back from it"
        )
    value = found[0]
    scale = float(expected.abs().max()) * torch.finfo(expected.dtype).eps ** 0.5 if expected.numel() else 0.0
    if value.shape != expected.shape or bool(((value - expected).abs() > scale).any()):  # NaN is for others to notice
        raise RuleError(
            f"the rule of {step.key} computes another value than its operation: it has to give that, and a way back"
        )


def step(run: Run, key: str, x: Any, *arguments: Any, **named: Any) -> Any:
    """Run the operation ``key`` on ``x``; backward, the signal takes the way of its rule."""
    this = run.steps[key]
    if run.fitting is not None and key in run.fitting:
        return _cut(run, this, x, arguments, named)
    carried = x if isinstance(x, tuple) else (x,)
    if any(part.requires_grad for part in carried):
        if run.seen:  # on the way from the last of these steps to the next one
            run.sizes[next(reversed(run.seen))] += sum(part.nbytes for part in carried)
        return _Invert.apply(run, this, arguments, named, *carried)
    with torch.no_grad():
        return _forward(run, this, x, arguments, named)[0]


def passed(run: Run, key: str, operation: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run an operation that a rule of the user's says to pass: its autograd formula has to be there."""
    if run.proving:
        with torch.enable_grad():
            probes = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
            value = operation(*probes, **named)
            wanted = [x for x in probes if isinstance(x, Tensor) and x.requires_grad]
            try:
                torch.autograd.grad(value, wanted, torch.zeros_like(value), allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuleError(
                    f"the rule of {key} passes the signal on by the operation's autograd formula, which fails: {error} Give it "
                    "one, such as by register_autograd of a torch.library.custom_op, or a Recorded rule."
                ) from error
    return operation(*arguments, **named)


def _cut(run: Run, this: Step, x: Tensor, arguments: Any, named: Any) -> Any:
    """Run a learned step of a fit: the way back from what lies above ends at its outputs."""
    assert isinstance(this.rule, Learned)  # for mypy: only these are fitted
    with torch.no_grad():
        inverter = this.rule.inverter(run.options, x.detach(), *arguments, **named)
        value = run.operate(this, x, arguments, named)
    if not callable(getattr(inverter, "moments", None)):
        raise RuleError(
            f"the rule of {this.key} learns a {type(inverter).__name__}, expected an Inverter: see rules.linear.dense"
        )
    outputs = tuple(output.detach().requires_grad_() for output in (value if isinstance(value, tuple) else (value,)))
    run.seen[this.key] = Seen(inverter, x, outputs)
    run.sizes[this.key] = x.nbytes
    return outputs if isinstance(value, tuple) else outputs[0]


def source(run: Run, index: int, x: Tensor) -> Tensor:
    """A tensor at which the signal is wanted."""
    x = x.detach()
    run.sources[index] = x.requires_grad_() if run.fitting is None else x
    return x


def seed(output: Tensor, targets: Sequence[Target], unit: bool = False) -> Tensor:
    """S_L = Y_c: the output, or one unit of it, with everything but each example's target set to zero."""
    result = torch.zeros_like(output)
    if len(set(targets)) == 1:
        index: tuple[Any, ...] = (slice(None), *targets[0])
    else:
        chosen = torch.tensor(targets, device=output.device)
        index = (torch.arange(len(output), device=output.device), *chosen.unbind(1))
    result[index] = 1 if unit else output.detach()[index]
    return result


def _taking(operation: Callable[..., Any], at: int) -> Callable[..., Any]:
    """An operation that takes first what it has at this position."""
    return operation if at == 0 else lambda x, *others, **named: operation(*others[:at], x, *others[at:], **named)


def _placed(operation: Callable[..., Any], positions: Sequence[int], x: tuple[Tensor, ...], *others: Any, **named: Any) -> Any:
    """Run an operation on what carries signal, at these positions, and the rest."""
    arguments = list(others)
    for at, part in sorted(zip(positions, x, strict=True), key=lambda pair: pair[0]):
        arguments.insert(at, part)
    return operation(*arguments, **named)


def _constants_first(graph: fx.Graph) -> fx.Node:
    """Move what follows from parameters alone, such as normalised weights, behind the placeholders; the last of all these."""
    last: fx.Node = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        constant = node.op == "call_function" and not node.meta["depends"]
        if constant and all(n.op == "placeholder" or n.meta.get("constant") for n in node.all_input_nodes):
            node.meta["constant"] = True
            last.append(node)
            last = node
    return last


def _places(node: fx.Node) -> set[int | None]:
    """The dimensions of a tensor, besides that of the batch, along which there is more than one element."""
    return {dim for dim, n in enumerate(node.meta["val"].shape) if dim > 0 and n != 1}


def _module(given: Sequence[fx.Node], nodes: Iterable[fx.Node], results: Sequence[fx.Node]) -> fx.GraphModule:
    """Some nodes of a graph, in their order, as a module from ``given`` to ``results``."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        copied[node] = graph.placeholder(node.name)
    for node in nodes:
        if node.op == "call_function":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in results))
    graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), graph)


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
        >>> from captum_mipin.capture import capture
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
            if node.meta["signal"] and isinstance(node.meta["val"], Tensor):
                node.meta["channels"] = channels(node)
        cut_recordings(graph, rules)
        self.steps: dict[str, Step] = {}
        self._rules, self._joint = rules, joint
        order = [node.meta["origin"] for node in graph.nodes if node.op == "placeholder"]
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            run = graph.placeholder("run")
        last = _constants_first(graph)
        learns = any(isinstance(rule, Learned) for rule in rules.values())
        needs_scale = [learns and unscaled(node, rules) for node in starts]
        if any(needs_scale) and not calibrate:
            raise CaptureError(
                f"the signal at {starts[0].meta['key']} lacks its scale: sums, scales or a batch norm follow it. Fit "
                "InverseNetwork(model, layer=...) at this module, which learns it, or take the module behind them."
            )
        for node in list(graph.nodes):
            if node._erased or node.op == "output" or not node.meta.get("signal"):
                continue
            if node in starts:
                index = starts.index(node)
                users = carrying_users(node)
                with graph.inserting_after(last if node.op == "placeholder" else node):
                    result = graph.call_function(source, (run, index, node))
                result.meta = dict(node.meta)
                redirect(node, repeat(result), users)
                self._fork(graph, run, node.meta, result, needs_scale[index])
            elif isinstance(node.meta["val"], Tensor) or not isinstance(rules[str(node.target)], Passes):
                result = self._replace(graph, run, node, rules)
                self._fork(graph, run, node.meta, result)
        graph.eliminate_dead_code()
        graph.lint()
        self.starts, self.rules = len(starts), rules
        self.layouts: tuple[Layout, ...] = tuple(node.meta["layout"] for node in starts)
        self._order, self._inputs, self._constants = tuple(order), captured.inputs, frozenset(captured.constants)
        self._module = fx.GraphModule(torch.nn.Module(), graph)

    @property
    def learned(self) -> tuple[str, ...]:
        """Keys of the steps with a learned inverse, in the order in which they are fitted: from the output down."""
        return tuple(key for key, this in reversed(self.steps.items()) if isinstance(this.rule, Learned))

    def average(self) -> str:
        """Key of the average over places that the output is, or of the dense layer on one.

        Raises:
            UnsupportedOperationError: It is none.
        """
        (node,) = next(node for node in self.graph.nodes if node.op == "output").all_input_nodes
        while node.target is not step and len(carried := [n for n in node.all_input_nodes if n.meta.get("signal")]) == 1:
            (node,) = carried
        rule = self.steps[str(node.args[1])].rule if node.target is step else None
        of_places = is_average(rule) and self._at_places(node)
        if of_places or (isinstance(rule, Learned) and rule.inverter is pooled_dense):
            return str(node.args[1])
        raise UnsupportedOperationError(
            "evidence=True tells what speaks for the output from what speaks against it, place by place; but the output is "
            f"that of {node.meta['key']}: it has to be an average over places, or a dense layer on one. Explain all of it"
        )

    def _at_places(self, node: fx.Node) -> bool:
        """Whether an average is one over places, not over what a dense layer gives, or averages of several channels."""
        x: Any = node.args[2]
        while _places(x) <= {x.meta.get("channels")}:
            rule = self.steps[str(x.args[1])].rule if x.target is step else None
            if isinstance(rule, Learned) or is_average(rule):
                return False
            carried = [n for n in x.all_input_nodes if n.meta.get("signal")]
            if len(carried) != 1:
                break
            (x,) = carried
        return True

    @property
    def graph(self) -> fx.Graph:
        """The rewritten graph."""
        return self._module.graph

    @property
    def code(self) -> str:
        """The surrogate as Python code."""
        return str(self._module.code)

    def __call__(self, run: Run, values: Mapping[str, Any]) -> Tensor:
        """The model's output, with a graph behind it whose backward pass is the method."""
        arguments = [values[name] for name in self._order]
        output: Tensor = self._run(self._module, (run, *arguments), self._inputs, values)
        return output

    def below(self, values: Mapping[str, Any], autocast: torch.dtype | None = None) -> dict[str, Any]:
        """What :meth:`above` takes of what lies below, by name: the tensors where passes end, and what goes round them.

        Args:
            values: Of the graph's placeholders.
            autocast: The dtype of autocast on the way there, if any; what is found has that of the graph.
        """
        module, _, names = self._halves
        device = values[self._inputs[0]].device.type
        with torch.autocast(device, autocast, enabled=autocast is not None):
            found = self._run(module, [values[name] for name in self._order], self._inputs, values)
        pairs = zip(names.items(), found, strict=True)
        return {name: value if dtype is None else value.to(dtype) for (name, dtype), value in pairs}

    def above(self, run: Run, values: Mapping[str, Any], weights: Mapping[str, Any]) -> Tensor:
        """The model's output from where the passes end on: of what :meth:`below` found, and of the model's weights."""
        _, module, names = self._halves
        arguments = [values[name] for name in names], [weights[name] for name in self._order if name in self._constants]
        output: Tensor = self._run(module, (run, *chain(*arguments)), tuple(names), values)[0]
        return output

    def _run(self, module: fx.GraphModule, arguments: Sequence[Any], inputs: Sequence[str], values: Mapping[str, Any]) -> Any:
        try:
            with torch.enable_grad():
                return module.forward(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shown = [x for name in inputs if isinstance(x := values[name], Tensor)]
            given = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in shown)
            raise InputError(f"the model cannot run on inputs of shape, dtype and device {given}: {error}") from error

    @cached_property
    def _halves(self) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, torch.dtype | None]]:
        """The graph in two, and the names of what goes from one to the other, with the dtypes of tensors."""
        nodes = [node for node in self._module.graph.nodes if node.op != "output"]
        run, *given = [node for node in nodes if node.op == "placeholder"]
        names = dict(zip(given, self._order, strict=True))
        fixed = {run, *(node for node in given if names[node] in self._constants)}  # what follows from the weights alone
        upper = dict.fromkeys(node for node in nodes if node.target is source)
        starts = {node.args[2] for node in upper}
        for node in nodes:
            sources = set(node.all_input_nodes)
            if node.op == "call_function" and sources <= fixed:
                fixed.add(node)
            elif sources & (upper.keys() | starts):
                upper[node] = None
        (output,) = next(node for node in self._module.graph.nodes if node.op == "output").all_input_nodes
        needed = [n for node in upper for n in node.all_input_nodes if n not in upper and n not in fixed]
        between = list(dict.fromkeys(needed))
        weights = [node for node in given if node in fixed]
        below = _module(given, [node for node in nodes if node not in upper], between)
        above = _module([run, *between, *weights], [node for node in nodes if node in upper or node in fixed], [output])
        return below, above, {node.name: getattr(node.meta.get("val"), "dtype", None) for node in between}

    def _replace(self, graph: fx.Graph, run: fx.Node, node: fx.Node, rules: Mapping[str, Rule]) -> fx.Node:
        """Put a step in the place of an operation, where its rule wants one."""
        rule = None if node.target is operator.getitem else rules[str(node.target)]
        key = node.meta["key"]
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
        run_on = partial(_placed, node.target, carriers) if several else _taking(node.target, carriers[0])
        self.steps[key] = Step(key, rule, run_on, node.meta["layout"])
        with graph.inserting_after(node):
            new = graph.call_function(step, (run, key, carried if several else carried[0], *others), dict(node.kwargs))
        new.meta = dict(node.meta)
        for user in list(node.users):
            if user.target is operator.getitem:  # the step's value is the first of the operation's outputs
                user.replace_all_uses_with(new)
                graph.erase_node(user)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return new

    def _fork(self, graph: fx.Graph, run: fx.Node, meta: Any, node: fx.Node, needs_scale: bool = False) -> None:
        """Put a fork behind a tensor that feeds several branches, or whose signal lacks a scale."""
        users = carrying_users(node)
        count = sum(occurrences(user, node) for user in users)
        if "channels" not in meta or not (needs_scale or (count > 1 and self._joint)):
            return
        weighed = self._weighed(node, users) if count > 1 else []
        rules = [self._rules[str(user.target)] for user in weighed]
        fork = Fork(
            tuple(user.target for user in weighed if callable(user.target)),
            tuple(rule.inverter for rule in rules if isinstance(rule, Learned)),
            count - len(weighed),
            meta["channels"],
        )
        key = f"{meta['key']}/fork"
        self.steps[key] = Step(key, fork.rule, fork, meta["layout"])
        calls = [(user.args[1:], dict(user.kwargs)) for user in weighed]
        with graph.inserting_after(node):
            forked = graph.call_function(step, (run, key, node, *calls))
        parts: list[fx.Node] = []
        for index in reversed(range(count)):
            with graph.inserting_after(forked):
                parts.insert(0, graph.call_function(operator.getitem, (forked, index)))
            parts[0].meta = dict(meta)
        redirect(node, iter(parts[len(weighed) :]), [user for user in users if user not in weighed])
        for user, part in zip(weighed, parts, strict=False):
            part.meta = dict(user.meta)
            user.replace_all_uses_with(part)
            graph.erase_node(user)
            self._fork(graph, run, part.meta, part)

    def _weighed(self, node: fx.Node, users: Sequence[fx.Node]) -> list[fx.Node]:
        """The operations with weights among the branches of ``node`` that can be inverted together."""
        found: list[fx.Node] = []
        for user in users:
            others = [n for n in user.all_input_nodes if n is not node]
            rule = MIPIN.get(str(user.target))
            learned = isinstance(rule, Learned) and rule.inverter in TOGETHER and user.args[0] is node
            if learned and occurrences(user, node) == 1 and not any(n.meta["depends"] for n in others):
                found.append(user)
        kinds = [("conv" in operation(user), argument(user, 6, "groups", 1)) for user in found]
        most = max(kinds, key=lambda kind: (kinds.count(kind), kind[0], -kind[1]), default=None)
        return [user for user, kind in zip(found, kinds, strict=True) if kind == most]
