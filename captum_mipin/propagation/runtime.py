"""The functions that the graph of a surrogate calls.

:func:`step` runs one operation, and in the backward pass it sends the signal by the operation's
rule. :func:`sequence` does so for several operations in a row. The object of class :class:`Run`
contains the settings and the results of one pass. In a fit, the backward pass is cut at the steps
that are fitted.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_mipin.errors import InputError, RuleError
from captum_mipin.graph.layout import Layout
from captum_mipin.options import type_of
from captum_mipin.rules import Inverse, Inverter, Learned, Options, Recorded
from captum_mipin.types import Target

#: Key of a step → its fitted inverse.
Inverses = Mapping[str, Inverse]


@dataclass(frozen=True)
class Step:
    """One operation with a rule, as the surrogate runs it.

    Attributes:
        key: Name of the step in fits, files and errors.
        rule: The rule by which its signal is sent back.
        operation: Function that runs the operation. Its first argument is the argument that carries
            signal, or the tuple of all such arguments; the other arguments follow.
        layout: Position of the examples in its argument and its result.
    """

    key: str
    rule: Recorded | Learned
    operation: Callable[..., Any]
    layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True)
class Seen:
    """The tensors of a learned step that a fit needs.

    Attributes:
        inverter: The family of the step's inverse.
        x: The argument of the step. The backward pass from x ends at the outputs of the fitted
            steps closer to the input.
        outputs: The results of the step, as new leaf tensors; their gradients are the signal.
    """

    inverter: Inverter
    x: Tensor
    outputs: tuple[Tensor, ...]


@dataclass
class Run:
    """The settings and the results of one pass, forward and backward.

    Attributes:
        steps: Key → step of the surrogate.
        options: The options of the rules.
        inverses: Target → the inverses of this target.
        groups: Pairs (target, slice of the batch). The slices cover the batch in its order.
        fitting: Keys of the learned steps that are fitted in this pass; None if the pass is not
            part of a fit. The backward pass is cut at these steps, and nothing is recorded on the
            input side of the fitted step that is closest to the input.
        seen: Key of a fitted step → its tensors.
        sizes: Key of a fitted step → approximate bytes that are stored for the backward pass from
            this step to the next fitted step.
        sources: Number of an explained tensor → the leaf tensor at which its signal is read.
        proving: Whether to check that a rule returns the same value as its operation.
        once: Whether there is only one backward pass. Then it frees its memory step by step.
        evidence: Key of the average for which :attr:`Options.evidence` is used; None for none.
        autocast: Dtype for the computation of operations with weights, as in ``torch.autocast``;
            None for the dtype of their arguments. Results are cast to the dtype of the argument.
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
        """Return the result of a learned step, computed under autocast if that is set."""
        if self.autocast is None:
            return call(x)
        with torch.autocast(x.device.type, self.autocast):
            value = call(x)
        if isinstance(value, tuple):
            return tuple(part.to(x.dtype) for part in value)
        return value.to(x.dtype)

    def invert(self, inverter: Inverter, step: Step, *signals: Tensor) -> Tensor:
        """Return g(S), computed for each example with the inverse of the example's target.

        Args:
            inverter: The family of the step's inverse.
            step: The step.
            signals: The signal S at each output of the step.

        Raises:
            InputError: The inverse was fitted for signals of another size.
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
                        "its tensors do not have the shapes of a regression of size "
                        f"{inverter.size}"
                    )
                parts.append(family.apply(inverse, own, self.options.bias))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                shapes = _listed(s.shape for s in own)
                raise InputError(
                    f"the inverse of {step.key} does not fit signals of shape {shapes}: {error}. "
                    "Pass inputs of the size it was fitted on, or fit another InverseNetwork."
                ) from error
        return step.layout.join(parts)


@dataclass(frozen=True)
class Call:
    """A step together with its arguments that carry no signal.

    Attributes:
        step: The step.
        arguments: The positional arguments behind the one that carries signal.
        named: The arguments by name.
    """

    step: Step
    arguments: Sequence[Any]
    named: Mapping[str, Any]

    def __call__(self, x: Any) -> Any:
        """Return the result of the operation for ``x``, the argument that carries signal."""
        return self.step.operation(x, *self.arguments, **self.named)

    def forward(self, run: Run, x: Any) -> tuple[Any, Callable[..., Any]]:
        """Return the result of the step, and the function that sends signals back to ``x``."""
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
    """An autograd function of one or more steps in a row, with the backward pass of their rules."""

    @staticmethod
    def forward(ctx: Any, run: Run, calls: Sequence[Call], *x: Tensor) -> Any:
        ctx.way, ctx.once = [], run.once
        value: Any = x
        for number, call in enumerate(calls):
            taken = value if isinstance(value, tuple) else (value,)
            if number and taken[0].is_floating_point():
                # A rule may compute a gradient with respect to its argument. Autograd prepares only
                # the argument of the first step for this.
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
    """Return the signals from a rule in the dtypes of the arguments that they are sent to.

    Args:
        key: Key of the step, for error messages.
        signals: The signals from the rule.
        expected: Shape, dtype and device of each argument that carries signal.

    Raises:
        RuleError: A signal has another shape or device than its argument, or only one of the two is
            complex.
    """
    if len(signals) == len(expected) == 1 and isinstance(signals[0], Tensor):  # nearly always
        part = signals[0]
        if (part.shape, part.dtype, part.device) == expected[0]:
            return signals
    shapes = [part.shape if isinstance(part, Tensor) else type(part).__name__ for part in signals]
    if shapes != [shape for shape, _, _ in expected]:
        raise RuleError(
            f"the rule of {key} sends back {_listed(shapes)}, expected a signal of the shape of "
            f"its argument, {_listed(shape for shape, _, _ in expected)}: correct the function "
            "that the rule returns"
        )
    for part, (_, dtype, device) in zip(signals, expected, strict=True):
        if part.device != device or part.is_complex() != dtype.is_complex:
            raise RuleError(
                f"the rule of {key} sends back {part.dtype} on {part.device}, expected {dtype} on "
                f"{device}: correct the function that the rule returns"
            )
    return tuple(part.to(dtype) for part, (_, dtype, _) in zip(signals, expected, strict=True))


def _listed(shapes: Iterable[Any]) -> str:
    return ", ".join(str(tuple(one) if isinstance(one, torch.Size) else one) for one in shapes)


def _check_value(key: str, result: Any, expected: Any) -> None:
    """Raise RuleError if a rule does not return its operation's value and a function.

    Args:
        key: Key of the step, for the error message.
        result: The return value of the rule.
        expected: The value of the operation.
    """
    expected = expected[0] if isinstance(expected, tuple) else expected
    value, back = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
    if not isinstance(value, Tensor) or not callable(back):
        raise RuleError(
            f"the rule of {key} returns {type_of(result)}, expected a tuple of the "
            "operation's value and a function that sends the signal back: correct run="
        )
    # |value − expected| ≤ √eps · max |expected|. NaN passes, for other checks test the user's data.
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    bound = largest * torch.finfo(expected.dtype).eps ** 0.5
    if value.shape != expected.shape or bool(((value - expected).abs() > bound).any()):
        raise RuleError(
            f"the rule of {key} returns a value that differs from that of its operation, expected "
            "the same value up to rounding: return operation(x, *arguments) as the first entry"
        )


def step(run: Run, key: str, x: Any, *arguments: Any, **named: Any) -> Any:
    """Run one step; in the backward pass, its rule sends the signal back to ``x``.

    Args:
        run: The pass.
        key: Key of the step.
        x: The argument that carries signal, or a tuple of several such arguments.
        arguments: The other positional arguments.
        named: The arguments by name.
    """
    call = Call(run.steps[key], arguments, named)
    if run.fitting is not None and key in run.fitting:
        return _cut(run, call, x)
    carried = x if isinstance(x, tuple) else (x,)
    if any(part.requires_grad for part in carried):
        if run.seen:  # count these bytes for the fitted step that ran last
            run.sizes[next(reversed(run.seen))] += sum(part.nbytes for part in carried)
        return _Invert.apply(run, (call,), *carried)
    with torch.no_grad():
        return call.forward(run, x)[0]


def sequence(run: Run, x: Any, *calls: tuple[str, Sequence[Any], Mapping[str, Any]]) -> Any:
    """Run steps in a row: each takes the result of the step before, which nothing else uses.

    Args:
        run: The pass.
        x: The argument of the first step that carries signal.
        calls: Triples (key, other arguments, arguments by name), one per step.
    """
    carried = x if isinstance(x, tuple) else (x,)
    if run.fitting is None and any(part.requires_grad for part in carried):
        row = [Call(run.steps[key], arguments, named) for key, arguments, named in calls]
        return _Invert.apply(run, row, *carried)
    for key, arguments, named in calls:
        x = step(run, key, x, *arguments, **named)
    return x


def passed(run: Run, key: str, operation: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run an operation whose registered rule is of the kind :class:`~captum_mipin.rules.Passes`.

    Args:
        run: The pass.
        key: Key of the step, for the error message.
        operation: The operation.
        arguments: Its positional arguments.
        named: Its arguments by name.

    Raises:
        RuleError: The operation has no autograd formula, so that no signal could be sent back.
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
                f"which fails: {error} Add a formula with register_autograd of the "
                "torch.library.custom_op, or register a Recorded rule."
            ) from error
    return operation(*arguments, **named)


def _cut(run: Run, call: Call, x: Tensor) -> Any:
    """Run a learned step that is fitted; the backward pass from later steps ends at its outputs."""
    rule, key = call.step.rule, call.step.key
    assert isinstance(rule, Learned)  # for mypy: only these are fitted
    with torch.no_grad():
        inverter = rule.inverter(run.options, x.detach(), *call.arguments, **call.named)
        value = run.operate(call, x)
    if not callable(getattr(inverter, "moments", None)):
        raise RuleError(
            f"the function inverter= of the rule of {key} returned {type_of(inverter)}, "
            "expected an Inverter: see captum_mipin.rules.linear.dense for an example"
        )
    several = isinstance(value, tuple)
    # New leaf tensors: their gradient in the backward pass is the signal S at the outputs.
    outputs = tuple(y.detach().requires_grad_() for y in (value if several else (value,)))
    run.seen[key] = Seen(inverter, x, outputs)
    run.sizes[key] = x.nbytes
    return outputs if several else outputs[0]


def source(run: Run, index: int, x: Tensor) -> Tensor:
    """Return an explained tensor as a new leaf, and store it in ``run.sources``.

    Args:
        run: The pass.
        index: Number of the explained tensor.
        x: The tensor.
    """
    x = x.detach()
    run.sources[index] = x.requires_grad_() if run.fitting is None else x
    return x


def seed(output: Tensor, targets: Sequence[Target], unit: bool = False) -> Tensor:
    """Return S_L = Y_c: the model's output with all entries except the targets set to zero.

    Args:
        output: Tensor (batch, *dims), the output of the model.
        targets: One target per example: its index in each of the dimensions ``dims``.
        unit: Set the entry of the target to 1, instead of the output's value.
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
