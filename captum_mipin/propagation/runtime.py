"""What the surrogate's graph calls: an operation forward, and backward the way of its rule.

One pass is a :class:`Run`. Of each operation with a rule it makes a :func:`step`, of several in a row a :func:`sequence`, whose
backward pass is the rule; where a fit looks, the way back is cut instead.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_mipin.errors import InputError, RuleError
from captum_mipin.graph.layout import Layout
from captum_mipin.rules import Inverse, Inverter, Learned, Options, Recorded
from captum_mipin.types import Target

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
        return (
            tuple(part.to(x.dtype) for part in value)
            if isinstance(value, tuple)
            else value.to(x.dtype)
        )

    def invert(self, inverter: Inverter, step: Step, *signals: Tensor) -> Tensor:
        """g(S), for each example with the inverse of its own target."""
        parts: list[Tensor] = []
        for target, examples in self.groups:
            inverse = self.inverses[target][step.key].to(signals[0])
            several = len(self.groups) > 1
            own = tuple(step.layout.part(s, examples) for s in signals) if several else signals
            try:
                if not inverse.fits(inverter):
                    raise RuntimeError(
                        f"its parts are not those of a regression of size {inverter.size}"
                    )
                parts.append(
                    (inverter.part(examples) if several else inverter).apply(
                        inverse, own, self.options.bias
                    )
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise InputError(
                    f"the inverse of {step.key} does not fit signals of shape {', '.join(str(tuple(s.shape)) for s in own)}: "
                    f"{error}. Give it inputs of the size it was fitted on, or fit another InverseNetwork."
                ) from error
        return step.layout.join(parts)


#: A step, what it takes besides what carries signal, and what of that by name.
_Call = tuple[Step, Sequence[Any], Mapping[str, Any]]


class _Invert(torch.autograd.Function):
    """Runs steps forward, each on what the last one gave; its backward pass is that of their rules."""

    @staticmethod
    def forward(ctx: Any, run: Run, calls: Sequence[_Call], *x: Tensor) -> Any:
        ctx.way, ctx.once = [], run.once
        value: Any = x
        for number, (this, arguments, named) in enumerate(calls):
            taken = value if isinstance(value, tuple) else (value,)
            if (
                number and taken[0].is_floating_point()
            ):  # rules may differentiate what they are given, as the first one can
                taken = (taken[0].detach().requires_grad_(),)
            several = isinstance(this.rule, Recorded) and this.rule.several
            value, back = _forward(run, this, taken if several else taken[0], arguments, named)
            ctx.way.append(
                (this.key, [(part.shape, part.dtype, part.device) for part in taken], back)
            )
        return value

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> Any:
        way = ctx.way if ctx.once else list(ctx.way)
        while way:
            key, expected, back = way.pop()
            found = back(*signals)
            signals = _like(key, found if isinstance(found, tuple) else (found,), expected)
        return None, None, *signals


def _like(
    key: str,
    signals: tuple[Any, ...],
    expected: Sequence[tuple[torch.Size, torch.dtype, torch.device]],
) -> Any:
    """What a rule sends back, in the dtype of what carries it.

    Raises:
        RuleError: It cannot be signals of that.
    """
    shapes = [part.shape if isinstance(part, Tensor) else type(part).__name__ for part in signals]
    if shapes != [shape for shape, _, _ in expected]:
        raise RuleError(
            f"the rule of {key} sends back {_listed(shapes)}, expected a signal of the shape of what carries it, "
            f"{_listed([shape for shape, _, _ in expected])}"
        )
    for part, (_, dtype, device) in zip(signals, expected, strict=True):
        if part.device != device or part.is_complex() != dtype.is_complex:
            raise RuleError(
                f"the rule of {key} sends back {part.dtype} on {part.device}, expected {dtype} on {device}"
            )
    return tuple(part.to(dtype) for part, (_, dtype, _) in zip(signals, expected, strict=True))


def _listed(shapes: Sequence[Any]) -> str:
    return ", ".join(
        str(tuple(shape)) if isinstance(shape, torch.Size) else str(shape) for shape in shapes
    )


def _forward(
    run: Run, step: Step, x: Any, arguments: Any, named: Any
) -> tuple[Any, Callable[..., Tensor]]:
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
    if not (
        isinstance(found, tuple)
        and len(found) == 2
        and isinstance(found[0], Tensor)
        and callable(found[1])
    ):
        raise RuleError(
            f"the rule of {step.key} returns a {type(found).__name__}, expected the value and a function back from it"
        )
    value = found[0]
    scale = (
        float(expected.abs().max()) * torch.finfo(expected.dtype).eps ** 0.5
        if expected.numel()
        else 0.0
    )
    if value.shape != expected.shape or bool(
        ((value - expected).abs() > scale).any()
    ):  # NaN is for others to notice
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
        return _Invert.apply(run, ((this, arguments, named),), *carried)
    with torch.no_grad():
        return _forward(run, this, x, arguments, named)[0]


def sequence(run: Run, x: Any, *calls: tuple[str, Sequence[Any], Mapping[str, Any]]) -> Any:
    """Run steps of which each takes what the one before gave, and nothing else does: (key, arguments, named) of each."""
    carried = x if isinstance(x, tuple) else (x,)
    if run.fitting is None and any(part.requires_grad for part in carried):
        return _Invert.apply(
            run, [(run.steps[key], arguments, named) for key, arguments, named in calls], *carried
        )
    for key, arguments, named in calls:
        x = step(run, key, x, *arguments, **named)
    return x


def passed(run: Run, key: str, operation: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run an operation that a rule of the user's says to pass: its autograd formula has to be there."""
    if run.proving:
        with torch.enable_grad():
            probes = [
                x.detach().requires_grad_()
                if isinstance(x, Tensor) and x.is_floating_point()
                else x
                for x in arguments
            ]
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
    outputs = tuple(
        output.detach().requires_grad_()
        for output in (value if isinstance(value, tuple) else (value,))
    )
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
