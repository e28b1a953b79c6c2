"""Completeness: whether the source signal holds what the output needs (section 5, equations 10 and 11)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from captum_mipin.errors import InputError
from captum_mipin.metrics.common import (
    Examples,
    Inputs,
    all_outputs,
    ask,
    described,
    explained_at_once,
    model_of,
    option,
    pick_target,
    raw_outputs,
    rows_at_once,
    seeded,
)  # fmt: skip
from captum_mipin.metrics.result import Result
from captum_mipin.targets import per_example


@runtime_checkable
class HasSourceSignal(Protocol):
    """What completeness can be measured of."""

    def source_signal(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        """S, shaped like the inputs."""


def completeness(
    method: HasSourceSignal,
    inputs: Inputs,
    target: Any = None,
    *,
    model: Callable[..., Any] | None = None,
    average: Literal["classes", "samples"] = "classes",
    control: bool = True,
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Average percentage change (APC): how far the output for the source signal is from that for the input, in percent.

    |Φ(x) − Φ(S)| / |Φ(x)| an example (equation 10). The part "positive APC" counts only what is lost (equation 11). The parts
    "shuffled output" and "shuffled output, positive" are the control: each example keeps its own masks and switches, but the
    inverse is given the output that *another* example has for this target. What is complete even then, the masks carried. It
    takes S to be A + B, where A, which ``attribute`` gives, is proportional to the output and B does not depend on it.

    Args:
        method: Has ``source_signal(inputs, target, additional_forward_args)``, and for the control ``attribute``.
        inputs: Tensor (examples, ...) or tuple of such.
        target: The output explained, as Captum takes it; the paper takes each example's class.
        model: What is explained; by default the method's ``forward_func``.
        average: Mean over each of the "classes" in ``target``, then over classes, as equation 10 has it; or over "samples".
        control: Measure the control as well.
        additional_forward_args: Further arguments of the model; tensors as long as the batch are taken one row an example.
        generator: Chooses the other example of the control.
        batch_size: Examples at once.

    Returns:
        Percentages. Unscored are examples whose output is 0 ("zero output"), and those where anything is not finite ("NaN").

    Raises:
        InputError: The method has no source signal; the control is asked for, but it has no ``attribute``.

    Source: Deng et al., KDD 2021, section 5.

    Examples:
        >>> class Half:
        ...     def source_signal(self, inputs, target=None, additional_forward_args=None):
        ...         return inputs / 2
        >>> x = torch.tensor([[4.0, 1.0], [2.0, 8.0]])
        >>> result = completeness(Half(), x, [0, 1], model=lambda x: x, control=False)
        >>> result.values, result.parts["positive APC"].mean
        (tensor([50., 50.], dtype=torch.float64), 50.0)
    """
    option("average", average, ("classes", "samples"))
    if not isinstance(method, HasSourceSignal):
        raise InputError("completeness needs a method that has source_signal")
    if control and not hasattr(method, "attribute"):
        raise InputError(
            "the control needs a method that has attribute as well: pass control=False to do without"
        )
    examples, model = Examples.of(inputs, target, additional_forward_args), model_of(method, model)
    everything = torch.cat(
        [
            raw_outputs(model, part)
            for part in examples.chunks(rows_at_once(examples.inputs[0], batch_size))
        ]
    )
    before = pick_target(everything, examples.target)
    others = _other_outputs(everything, examples, seeded(generator)) if control else before
    after, shuffled = [], []
    size = explained_at_once(batch_size)
    for part, y, other in zip(
        examples.chunks(size), before.split(size), others.split(size), strict=True
    ):
        signal = ask(method.source_signal, part)
        after.append(all_outputs(model, part.with_inputs(*signal), batch_size))
        if control:
            maps = ask(method.attribute, part)  # type: ignore[attr-defined]  # checked above
            moved = (_restarted(s, a, other / y - 1) for s, a in zip(signal, maps, strict=True))
            shuffled.append(all_outputs(model, part.with_inputs(*moved), batch_size))
    classes = _classes(examples, everything) if average == "classes" else None
    settings = described(method, examples, average=average, unit="%")

    def result(name: str, lost: Tensor) -> Result:
        return Result.of(
            name, 100 * lost, "lower", settings, {"zero output": before == 0}, classes=classes
        )

    kept = (before - torch.cat(after)) / before.abs()
    parts = {"positive APC": result("positive APC", kept.relu())}
    if control:
        mixed = (before - torch.cat(shuffled)) / before.abs()
        parts["shuffled output"] = result("shuffled output", mixed.abs())
        parts["shuffled output, positive"] = result("shuffled output, positive", mixed.relu())
    return replace(result("APC", kept.abs()), parts=parts)


def _restarted(signal: Tensor, attribution: Tensor, change: Tensor) -> Tensor:
    """S = A + B for another output: A grows in proportion to it."""
    return signal + attribution * change.to(attribution).view(-1, *(1,) * (attribution.ndim - 1))


def _other_outputs(everything: Tensor, examples: Examples, generator: torch.Generator) -> Tensor:
    """What another example, chosen at random, has for each example's target; NaN where there is no other."""
    n = len(examples)
    if n == 1:
        return torch.full((1,), torch.nan, dtype=torch.float64, device=everything.device)
    order = torch.randperm(n, generator=generator, device=generator.device).to(everything.device)
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # each example's successor in one ring of all
    return pick_target(everything[other], examples.target)


def _classes(examples: Examples, everything: Tensor) -> Tensor:
    """The number of each example's target, in order of appearance."""
    found = per_example(examples.target, everything)
    numbers = {target: number for number, target in enumerate(dict.fromkeys(found))}
    return torch.tensor([numbers[target] for target in found])
