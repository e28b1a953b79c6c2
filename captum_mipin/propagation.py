"""From a graph and a table of rules to a surrogate: same values forward, the method backward.

The graph is rewritten once. An operation with a rule becomes a :func:`step`, whose backward pass is the rule; an
operation that passes stays as it is, with autograd's adjoint. Where a tensor feeds several branches a fork is put in,
an operation like any other, whose inverse weighs what comes back from them. One call of ``torch.autograd.grad`` from
the seeded output then *is* the method, and the gradient with respect to an operation's output is the signal there.
"""

import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, fx

from captum_mipin.capture import CapturedGraph, Place, memory, place
from captum_mipin.errors import CaptureError, InputError, UnsupportedOperationError
from captum_mipin.rules import FORK, Inverse, Inverter, Learned, Options, Passes, Recorded, Rule

#: A class, as the index of its logit among the model's outputs without the batch dimension.
Target = tuple[int, ...]
#: Step key → its fitted inverse.
Inverses = Mapping[str, Inverse]


#: Operations that change a shape at most; sizes among their arguments are harmless.
_SHAPE = ("view", "_unsafe_view", "reshape", "alias", "clone", "contiguous", "expand")


@dataclass(frozen=True)
class Treatment:
    """What becomes of one operation of the model.

    Attributes:
        place: Module path and name of the operation.
        operation: The operation as ``torch.export`` names it.
        status: "supported": inverted by a rule; "passes": its adjoint is right; "refused".
        note: What happens to the signal, or why the operation is refused.
    """

    place: Place
    operation: str
    status: str
    note: str


@dataclass(frozen=True)
class Step:
    """One operation with a rule, as the surrogate runs it."""

    key: str
    rule: Recorded | Learned
    operation: Callable[..., Any]


@dataclass
class Run:
    """One pass: how rules are read, which inverses apply to which examples, and what is recorded.

    Attributes:
        steps: The surrogate's steps by key.
        options: How rules are read.
        inverses: Target → its inverses.
        groups: (target, its examples), one after the other the whole batch.
        fitting: Key of the step whose regression is wanted, if one is: only what lies above it takes part in the backward pass.
        observed: Its inverter, its input x and its outputs.
        sources: The tensors at which the signal is wanted.
    """

    steps: Mapping[str, Step]
    options: Options = field(default_factory=Options)
    inverses: Mapping[Target, Inverses] = field(default_factory=dict)
    groups: Sequence[tuple[Target, slice]] = ()
    fitting: str | None = None
    observed: tuple[Inverter, Tensor, tuple[Tensor, ...]] | None = None
    sources: dict[int, Tensor] = field(default_factory=dict)

    def invert(self, inverter: Inverter, key: str, *signals: Tensor) -> Tensor:
        """g(S), for each example with the inverse of its own target."""
        parts: list[Tensor] = []
        for target, examples in self.groups:
            inverse = self.inverses[target][key].to(signals[0])
            parts.append(inverter.apply(inverse, tuple(s[examples] for s in signals), self.options.bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Invert(torch.autograd.Function):
    """Runs a step forward; its backward pass is the step's rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, step: Step, arguments: Any, named: Any) -> Any:
        value, ctx.back = _forward(run, step, x, arguments, named)
        return value

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> Any:
        return ctx.back(*signals), None, None, None, None


def _forward(run: Run, step: Step, x: Tensor, arguments: Any, named: Any) -> tuple[Any, Callable[..., Tensor]]:
    if isinstance(step.rule, Recorded):
        return step.rule.run(run.options, step.operation, x, *arguments, **named)
    inverter = step.rule.inverter(x, *arguments, **named)
    return step.operation(x, *arguments, **named), partial(run.invert, inverter, step.key)


def step(run: Run, key: str, x: Tensor, *arguments: Any, **named: Any) -> Any:
    """Run the operation ``key`` on ``x``; backward, the signal takes the way of its rule."""
    this = run.steps[key]
    if x.requires_grad:
        return _Invert.apply(x, run, this, arguments, named)
    with torch.no_grad():
        if key != run.fitting:
            return _forward(run, this, x, arguments, named)[0]
        assert isinstance(this.rule, Learned)  # for mypy: only these are fitted
        inverter = this.rule.inverter(x, *arguments, **named)
        value = this.operation(x, *arguments, **named)
        outputs = value if isinstance(value, tuple) else (value,)
        outputs = tuple(output.detach().requires_grad_() for output in outputs)
        run.observed = inverter, x, outputs
    return outputs if isinstance(value, tuple) else outputs[0]


def source(run: Run, index: int, x: Tensor) -> Tensor:
    """A tensor at which the signal is wanted."""
    x = x.detach()
    run.sources[index] = x.requires_grad_() if run.fitting is None else x
    return x


def branches(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """``x`` for each of ``count`` branches."""
    return tuple(x.detach() for _ in range(count))


class Surrogate:
    """A model's graph whose backward pass is a method.

    Args:
        captured: The graph.
        rules: Operation → rule.
        start: Name of the node at whose output the signal is wanted; None for the inputs.
        calibrate: Learn the scale of the signal there where no learned inverse gives it.

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
        self, captured: CapturedGraph, rules: Mapping[str, Rule], start: str | None = None, calibrate: bool = True
    ) -> None:
        graph, starts = _marked_copy(captured, start)
        refused = [t for t in _treatments(graph, captured, rules) if t.status == "refused"]
        if refused:
            raise UnsupportedOperationError(_refusal(refused))
        self.steps: dict[str, Step] = {}
        order = [node.meta["origin"] for node in graph.nodes if node.op == "placeholder"]
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            run = graph.placeholder("run")
        body = next(node for node in graph.nodes if node.op != "placeholder")
        needs_scale = [_unscaled(node, rules) for node in starts]
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
                users = _uses(node)
                with graph.inserting_before(body) if node.op == "placeholder" else graph.inserting_after(node):
                    result = graph.call_function(source, (run, index, node))
                _redirect(node, repeat(result), users)
                self._fork(graph, run, node.meta["key"], result, needs_scale[index])
            elif isinstance(node.meta["val"], Tensor) or not isinstance(rules[str(node.target)], Passes):
                result = self._replace(graph, run, node, rules)
                self._fork(graph, run, node.meta["key"], result)
        graph.eliminate_dead_code()
        graph.lint()
        self.starts = len(starts)
        self._order, self._inputs = tuple(order), captured.inputs
        self._module = fx.GraphModule(torch.nn.Module(), graph)

    @property
    def learned(self) -> tuple[str, ...]:
        """Keys of the steps with a learned inverse, in the order in which they are fitted: from the output down."""
        return tuple(key for key, this in reversed(self.steps.items()) if isinstance(this.rule, Learned))

    @property
    def code(self) -> str:
        """The surrogate as Python code."""
        return str(self._module.code)

    def __call__(self, run: Run, values: Mapping[str, Any]) -> Tensor:
        """The model's output, with a graph behind it whose backward pass is the method."""
        arguments = [values[name] for name in self._order]
        try:
            with torch.enable_grad():
                output: Tensor = self._module.forward(run, *arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shown = [values[name] for name in self._inputs]
            given = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in shown)
            raise InputError(f"the model cannot run on inputs of shape, dtype and device {given}: {error}") from error
        return output

    def _replace(self, graph: fx.Graph, run: fx.Node, node: fx.Node, rules: Mapping[str, Rule]) -> fx.Node:
        """Put a step in the place of an operation, where its rule wants one."""
        rule = None if node.target is operator.getitem else rules[str(node.target)]
        if not isinstance(rule, (Recorded, Learned)):
            return node
        assert callable(node.target)  # for mypy: it is an operation
        key = node.meta["key"]
        self.steps[key] = Step(key, rule, node.target)
        with graph.inserting_after(node):
            new = graph.call_function(step, (run, key, *node.args), dict(node.kwargs))
        new.meta = dict(node.meta)
        for user in list(node.users):
            if user.target is operator.getitem:  # the step's value is the first of the operation's outputs
                user.replace_all_uses_with(new)
                graph.erase_node(user)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return new

    def _fork(self, graph: fx.Graph, run: fx.Node, producer: str, node: fx.Node, needs_scale: bool = False) -> None:
        """Put a fork behind a tensor that feeds several branches, or whose signal lacks a scale."""
        users = _uses(node)
        count = sum(_count(user, node) for user in users)
        if count < 2 and not needs_scale:
            return
        key = f"{producer}/fork"
        self.steps[key] = Step(key, FORK, branches)
        with graph.inserting_after(node):
            forked = graph.call_function(step, (run, key, node, count))
        parts: list[fx.Node] = []
        for index in reversed(range(count)):
            with graph.inserting_after(forked):
                parts.insert(0, graph.call_function(operator.getitem, (forked, index)))
        _redirect(node, iter(parts), users)


def structure(captured: CapturedGraph) -> str:
    """SHA-256 over what a model computes: its operations, where they are, how they are set and wired; not the weights.

    Changes of shape alone do not count: their arguments depend on the size of the inputs, and hooks put some in.
    """
    digest = hashlib.sha256()
    names: dict[fx.Node, str] = {}
    count = 0
    for node in captured.graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymInt):
            names[node] = "size"
        elif node.op == "placeholder":
            constant = captured.constants.get(node.name, node.name)
            names[node] = constant if isinstance(constant, str) else hashlib.sha256(memory(constant)).hexdigest()
        elif node.op == "call_function" and place(node).operation in _SHAPE:
            names[node] = names[node.all_input_nodes[0]]
        elif node.op == "call_function":
            count += 1
            names[node] = f"%{count}"
            line = f"{names[node]} {place(node)} {node.target} {fx.node.map_arg((node.args, node.kwargs), names.__getitem__)}"
            digest.update(line.encode())
    return digest.hexdigest()


def survey(captured: CapturedGraph, rules: Mapping[str, Rule], start: str | None = None) -> list[Treatment]:
    """What becomes of every operation between the start (or the inputs) and the output, in order of execution."""
    return _treatments(_marked_copy(captured, start)[0], captured, rules)


def _marked_copy(captured: CapturedGraph, start: str | None) -> tuple[fx.Graph, list[fx.Node]]:
    """A copy of the graph, cut to what the output needs, its nodes marked that carry signal from the start."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(captured.graph, copied))
    names = Counter[str]()
    for old, new in copied.items():
        name = str(place(old))
        names[name] += 1
        new.meta["origin"] = old.name  # a copy may have to take another
        new.meta["key"] = name if names[name] == 1 else f"{name}#{names[name]}"
        if new.target is torch.ops.aten.view.default:  # the export saw contiguous tensors; others need a copy
            new.target = torch.ops.aten.reshape.default
            new.meta["shown"] = old.target
    output = copied[captured.output]
    next(node for node in graph.nodes if node.op == "output").args = (output,)
    wanted = captured.inputs if start is None else (start,)
    starts = [next(new for old, new in copied.items() if old.name == name) for name in wanted]
    needed, stack = {output}, [output]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                stack.append(node)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and node not in needed:
            graph.erase_node(node)
    for node in graph.nodes:
        above = node in starts or any(n.meta.get("signal") for n in node.all_input_nodes)
        node.meta["signal"] = above and node in needed and _floating(node.meta.get("val"))
        node.meta["other"] = (
            above and node in needed and not node.meta["signal"] and isinstance(node.meta.get("val"), Tensor)
        )  # the start reaches the output here, but not as a floating value
    lost = [node.name for node in starts if not node.meta.get("signal")]
    if lost or not output.meta["signal"]:
        raise CaptureError(
            f"the model's output does not depend on {', '.join(lost) or 'its input'}, so nothing can be explained"
        )
    return graph, starts


def _treatments(graph: fx.Graph, captured: CapturedGraph, rules: Mapping[str, Rule]) -> list[Treatment]:
    result = []
    for node in graph.nodes:
        follows = any(n.meta.get("signal") for n in node.all_input_nodes)
        carries = node.meta.get("signal") or node.meta.get("other")
        if node.op != "call_function" or not carries or not follows or node.target is operator.getitem:
            continue
        rule = rules.get(str(node.target))
        reason = "no rule covers it" if rule is None else _objection(node, rule, captured.batch)
        if node.meta["other"]:
            reason = f"it turns the input into {node.meta['val'].dtype}, and what follows from that cannot be sent back"
        status = "passes" if isinstance(rule, Passes) else "supported"
        note = rule.note if rule is not None else ""
        name = str(node.meta.get("shown", node.target))
        result.append(Treatment(place(node), name, "refused" if reason else status, reason or note))
    return result


def _objection(node: fx.Node, rule: Rule, batch: str) -> str | None:
    """Why a rule cannot treat this node, if so."""
    others = [n for argument in node.args[1:] for n in _nodes_in(argument)]
    others += [n for argument in node.kwargs.values() for n in _nodes_in(argument)]
    if not rule.many and any(n.meta.get("signal") for n in others):
        return "a second argument of it depends on the input as well"
    if place(node).operation not in _SHAPE and any(isinstance(n.meta.get("val"), torch.SymInt) for n in others):
        return "it uses the size of the batch as a value, so an explanation would depend on the other examples"
    values = node.meta["val"]
    several = isinstance(values, (tuple, list))
    if several and not isinstance(rule, Passes):
        if any(user.target is operator.getitem and user.args[1] != 0 for user in node.users):
            return "another of its outputs than the first is used"
        values = values[:1]
    for value in values if several else [values]:
        if value.ndim == 0 or str(value.shape[0]) != batch or any(isinstance(d, torch.SymInt) for d in value.shape[1:]):
            return f"it does not keep the batch as the first dimension: its result has shape {tuple(map(str, value.shape))}"
    return rule.refuse(node)


def _refusal(refused: Sequence[Treatment]) -> str:
    lines = [f"  {t.operation} in {t.place.path or 'the model itself'!s}: {t.note}" for t in refused[:8]]
    if len(refused) > 8:
        lines.append(f"  … and {len(refused) - 8} more")
    return (
        "no signal can be sent back through\n" + "\n".join(lines) + "\nStart above it, with InverseNetwork(model, "
        "layer=...) at a module behind it, or write that part of the model with supported operations; "
        "check(model, inputs) lists all."
    )


def _unscaled(node: fx.Node, rules: Mapping[str, Rule]) -> bool:
    """Whether the signal that reaches ``node`` has passed no learned inverse since its scale was lost."""
    while True:
        uses = _uses(node)
        if len(uses) != 1 or uses[0].op == "output":
            return len(uses) < 2
        node = uses[0]
        rule = rules.get(str(node.target))
        if isinstance(rule, Learned):
            return False
        if rule is not None and not rule.restores:
            return True


def _uses(node: fx.Node) -> list[fx.Node]:
    """Users of ``node`` that carry its signal on."""
    return [user for user in node.users if user.meta.get("signal") or user.op == "output"]


def _count(user: fx.Node, node: fx.Node) -> int:
    return sum(n is node for argument in (*user.args, *user.kwargs.values()) for n in _nodes_in(argument))


def _redirect(old: fx.Node, new: Iterator[fx.Node], users: Sequence[fx.Node]) -> None:
    """Let ``users`` use the next of ``new`` each time they use ``old``."""
    for user in users:
        user.args = fx.node.map_arg(user.args, lambda n: next(new) if n is old else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: next(new) if n is old else n)


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _floating(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_floating(v) for v in value)
    return isinstance(value, Tensor) and value.is_floating_point()
