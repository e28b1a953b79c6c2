"""What the graph of a surrogate calls: an operation forward, and backward the way of its rule.

One pass is a :class:`Run`. It makes of each operation with a rule a :func:`step`, of several in a
row a :func:`sequence`, whose backward pass is the rule. In a fit the way back is cut instead at the
steps that are fitted.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    """One operation with a rule, as the surrogate runs it.

    Attributes:
        key: Its name in every fit.
        rule: Where its signal goes.
        operation: What it computes: of the argument that carries signal, or a tuple of several such
            arguments, and then of the others.
        layout: Where the examples lie in what it takes and gives.
    """

    key: str
    rule: Recorded | Learned
    operation: Callable[..., Any]
    layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True)
class Seen:
    """What a fit sees of a learned step.

    Attributes:
        inverter: The family of its inverse.
        x: What it takes; the way back from there ends at the outputs of the steps below.
        outputs: What it gives, without a way back.
    """

    inverter: Inverter
    x: Tensor
    outputs: tuple[Tensor, ...]


@dataclass
class Run:
    """One pass: how rules are read, which inverses belong to which examples, what is recorded.

    Attributes:
        steps: The surrogate's steps by key.
        options: How rules are read.
        inverses: Target → its inverses.
        groups: (target, its examples): together the whole batch, in its order.
        fitting: Keys of the learned steps that a fit wants to see; None if the pass is no fit. The
            backward pass is cut there, and below the lowest of them nothing is recorded.
        seen: Key → what a fit saw there.
        sizes: Key → bytes, roughly, of what is kept for the way back through that step and what
            lies below it.
        sources: Number of the start → the tensor at which the signal is wanted.
        proving: Check that rules compute what their operations do.
        once: There is only one backward pass: it frees what it needs step by step.
        evidence: Key of the average at whose output :attr:`Options.evidence` is sent back, if any.
        autocast: The dtype in which operations with weights are computed, as ``torch.autocast``
            does; None for their own. What they give has the dtype of what they take.
    """

    steps: Mapping[str, Step]
    options: Options = field(default_factory=Options)
    inverses: Mapping[Target, Inverses] = field(default_factory=dict)
    groups: Sequence[tuple[Target, slice]] = ()
    fitting: Collection[str] | None = None
    seen: dict[str, Seen] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    sources: dict[int, Tensor] = field(default_factory=dict)
    proving: bool = False
    once: bool = False
    evidence: str | None = None
    autocast: torch.dtype | None = None

    def operate(self, call: "Call", x: Tensor) -> Any:
        """Return what a learned step computes."""
        if self.autocast is None:
            return call(x)
        with torch.autocast(x.device.type, self.autocast):
            value = call(x)
        if isinstance(value, tuple):
            return tuple(part.to(x.dtype) for part in value)
        return value.to(x.dtype)

    def invert(self, inverter: Inverter, step: Step, *signals: Tensor) -> Tensor:
        """Return g(S), for each example with the inverse of its own target.

        Raises:
            InputError: The inverse does not fit signals of this size.
        """
        parts: list[Tensor] = []
        several = len(self.groups) > 1
        for target, examples in self.groups:
            # eqs. 6, 7: S_l = W S_{l+1} + b, with the W and b of the target
            inverse = self.inverses[target][step.key].to(signals[0])
            own = tuple(step.layout.part(s, examples) for s in signals) if several else signals
            family = inverter.part(examples) if several else inverter
            try:
                if not inverse.fits(inverter):
                    raise RuntimeError(
                        f"its parts are not those of a regression of size {inverter.size}"
                    )
                parts.append(family.apply(inverse, own, self.options.bias))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                shapes = _listed(s.shape for s in own)
                raise InputError(
                    f"the inverse of {step.key} does not fit signals of shape {shapes}: {error}. "
                    "Give it inputs of the size it was fitted on, or fit another InverseNetwork."
                ) from error
        return step.layout.join(parts)


@dataclass(frozen=True)
class Call:
    """A step with all that it takes besides what carries signal.

    Attributes:
        step: The step.
        arguments: The other arguments by position.
        named: The other arguments by name.
    """

    step: Step
    arguments: Sequence[Any]
    named: Mapping[str, Any]

    def __call__(self, x: Any) -> Any:
        """Return what the operation computes."""
        return self.step.operation(x, *self.arguments, **self.named)

    def forward(self, run: Run, x: Any) -> tuple[Any, Callable[..., Any]]:
        """Return the value, and how signals come back to ``x``."""
        rule, key, options = self.step.rule, self.step.key, run.options
        options = replace(options, evidence=True) if key == run.evidence else options
        if isinstance(rule, Learned):
            inverter = rule.inverter(options, x, *self.arguments, **self.named)
            return run.operate(self, x), partial(run.invert, inverter, self.step)
        result = rule.run(options, self.step.operation, x, *self.arguments, **self.named)
        if run.proving:
            _check_value(key, result, self(x))
        return result


class _Invert(torch.autograd.Function):
    """Runs steps in a row forward; its backward pass is that of their rules."""

    @staticmethod
    def forward(ctx: Any, run: Run, calls: Sequence[Call], *x: Tensor) -> Any:
        ctx.way, ctx.once = [], run.once
        value: Any = x
        for number, call in enumerate(calls):
            taken = value if isinstance(value, tuple) else (value,)
            if number and taken[0].is_floating_point():
                # A rule may differentiate what it takes. Autograd sees to that for the first alone.
                taken = (taken[0].detach().requires_grad_(),)
            rule = call.step.rule
            several = isinstance(rule, Recorded) and rule.several
            value, back = call.forward(run, taken if several else taken[0])
            expected = [(part.shape, part.dtype, part.device) for part in taken]
            ctx.way.append((call.step.key, expected, back))
        return value

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> Any:
        way = ctx.way if ctx.once else list(ctx.way)
        while way:  # from the last step to the first
            key, expected, back = way.pop()
            sent = back(*signals)
            signals = _like(key, sent if isinstance(sent, tuple) else (sent,), expected)
        return None, None, *signals


def _like(
    key: str,
    signals: tuple[Any, ...],
    expected: Sequence[tuple[torch.Size, torch.dtype, torch.device]],
) -> tuple[Tensor, ...]:
    """Return what a rule sends back, in the dtype of what carries it.

    Raises:
        RuleError: The shape or device is another one, or only one of both is complex.
    """
    shapes = [part.shape if isinstance(part, Tensor) else type(part).__name__ for part in signals]
    if shapes != [shape for shape, _, _ in expected]:
        raise RuleError(
            f"the rule of {key} sends back {_listed(shapes)}, expected a signal of the shape of "
            f"what carries it, {_listed(shape for shape, _, _ in expected)}"
        )
    for part, (_, dtype, device) in zip(signals, expected, strict=True):
        if part.device != device or part.is_complex() != dtype.is_complex:
            raise RuleError(
                f"the rule of {key} sends back {part.dtype} on {part.device}, expected {dtype} on "
                f"{device}"
            )
    return tuple(part.to(dtype) for part, (_, dtype, _) in zip(signals, expected, strict=True))


def _listed(shapes: Iterable[Any]) -> str:
    return ", ".join(str(tuple(one) if isinstance(one, torch.Size) else one) for one in shapes)


def _check_value(key: str, result: Any, expected: Any) -> None:
    """Raise RuleError if a rule does not return its operation's value and a function back."""
    expected = expected[0] if isinstance(expected, tuple) else expected
    value, back = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
    if not isinstance(value, Tensor) or not callable(back):
        raise RuleError(
            f"the rule of {key} returns a {type(result).__name__}, expected the value and a "
            "function back from it"
        )
    # |value - expected| <= sqrt(eps) max |expected|; NaN is left to the checks of the user's data.
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    bound = largest * torch.finfo(expected.dtype).eps ** 0.5
    if value.shape != expected.shape or bool(((value - expected).abs() > bound).any()):
        raise RuleError(
            f"the rule of {key} computes another value than its operation: it has to give that, "
            "and a way back"
        )


def step(run: Run, key: str, x: Any, *arguments: Any, **named: Any) -> Any:
    """Run the operation ``key`` on ``x``; backward, the signal takes the way of its rule."""
    call = Call(run.steps[key], arguments, named)
    if run.fitting is not None and key in run.fitting:
        return _cut(run, call, x)
    carried = x if isinstance(x, tuple) else (x,)
    if any(part.requires_grad for part in carried):
        if run.seen:  # on the way from the last step seen to the next one
            run.sizes[next(reversed(run.seen))] += sum(part.nbytes for part in carried)
        return _Invert.apply(run, (call,), *carried)
    with torch.no_grad():
        return call.forward(run, x)[0]


def sequence(run: Run, x: Any, *calls: tuple[str, Sequence[Any], Mapping[str, Any]]) -> Any:
    """Run steps in a row, each on what the one before gave, which goes nowhere else.

    Args:
        run: The pass.
        x: What the first step takes.
        calls: (key, other arguments, arguments by name) of each step.
    """
    carried = x if isinstance(x, tuple) else (x,)
    if run.fitting is None and any(part.requires_grad for part in carried):
        row = [Call(run.steps[key], arguments, named) for key, arguments, named in calls]
        return _Invert.apply(run, row, *carried)
    for key, arguments, named in calls:
        x = step(run, key, x, *arguments, **named)
    return x


def passed(run: Run, key: str, operation: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run an operation that a registered rule passes.

    Raises:
        RuleError: It has no autograd formula, which would have to send the signal back.
    """
    if not run.proving:
        return operation(*arguments, **named)
    with torch.enable_grad():
        probes = [
            x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in arguments
        ]
        value = operation(*probes, **named)
        sources = [x for x in probes if isinstance(x, Tensor) and x.requires_grad]
        try:
            torch.autograd.grad(value, sources, torch.zeros_like(value), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuleError(
                f"the rule of {key} passes the signal on by the operation's autograd formula, "
                f"which fails: {error} Give it one, such as by register_autograd of a "
                "torch.library.custom_op, or a Recorded rule."
            ) from error
    return operation(*arguments, **named)


def _cut(run: Run, call: Call, x: Tensor) -> Any:
    """Run a learned step of a fit: the way back from what lies above ends at its outputs."""
    rule, key = call.step.rule, call.step.key
    assert isinstance(rule, Learned)  # for mypy: only these are fitted
    with torch.no_grad():
        inverter = rule.inverter(run.options, x.detach(), *call.arguments, **call.named)
        value = run.operate(call, x)
    if not callable(getattr(inverter, "moments", None)):
        raise RuleError(
            f"the rule of {key} learns a {type(inverter).__name__}, expected an Inverter: see "
            "rules.linear.dense"
        )
    several = isinstance(value, tuple)
    # New leaves: the gradient that arrives there is the signal S at the outputs.
    outputs = tuple(y.detach().requires_grad_() for y in (value if several else (value,)))
    run.seen[key] = Seen(inverter, x, outputs)
    run.sizes[key] = x.nbytes
    return outputs if several else outputs[0]


def source(run: Run, index: int, x: Tensor) -> Tensor:
    """Return a tensor at which the signal is wanted, and record it as the start ``index``."""
    x = x.detach()
    run.sources[index] = x.requires_grad_() if run.fitting is None else x
    return x


def seed(output: Tensor, targets: Sequence[Target], unit: bool = False) -> Tensor:
    """Return S_L = Y_c: the output, with everything but each example's target set to zero.

    Args:
        output: (batch, *dims) of the model.
        targets: One class for each example.
        unit: Return 1 at the target instead of the output there.
    """
    # algorithm 1: S_L = Y_c at the target, 0 elsewhere
    result = torch.zeros_like(output)
    if len(set(targets)) == 1:
        index: tuple[Any, ...] = (slice(None), *targets[0])
    else:
        chosen = torch.tensor(targets, device=output.device)
        index = (torch.arange(len(output), device=output.device), *chosen.unbind(1))
    result[index] = 1 if unit else output.detach()[index]
    return result
