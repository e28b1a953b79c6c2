"""Average percentage change (APC): the paper's measure of completeness (section 5)."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_mipin.calls import explained
from captum_mipin.errors import InputError
from captum_mipin.metrics.case import Case, Options, explain, target_scores
from captum_mipin.metrics.examples import Inputs
from captum_mipin.metrics.result import Result, class_numbers
from captum_mipin.options import check_choice
from captum_mipin.targets import per_example


@explained
def completeness(
    method: Any,
    inputs: Inputs,
    target: Any = None,
    *,
    average: Literal["classes", "samples"] = "classes",
    control: bool = True,
    **options: Unpack[Options],
) -> Result:
    """Return the APC: the change of the output, in percent, if the source signal is the input.

    The part "positive APC" counts only outputs that become smaller.

    Args:
        method: Object with ``source_signal``, and for the control also with ``attribute``.
        inputs: Tensor (examples, ...), or a tuple of such tensors.
        target: The classes, in the forms that Captum accepts.
        average: Mean over "samples", or over the means of "classes" as in the paper.
        control: True to add "shuffled output": the inverse uses each example's own masks, but
            starts at another example's output. If its APC is low too, completeness is due to masks.
        **options: See :class:`~captum_mipin.metrics.case.Options`.

    Returns:
        Percentages (source: equations 10 and 11). Reasons for no score: "zero output", "NaN".

    Raises:
        InputError: The method gives the source signal of a layer, not of the input.

    Examples:
        >>> class Half:
        ...     def source_signal(self, inputs, target=None, additional_forward_args=None):
        ...         return inputs / 2
        >>> x = torch.tensor([[4.0, 1.0], [2.0, 8.0]])
        >>> completeness(Half(), x, [0, 1], model=lambda x: x, control=False).values.tolist()
        [50.0, 50.0]
    """
    check_choice("average", average, ("classes", "samples"))
    _check_method(method, control)
    case = Case.of(method, inputs, target, **options)
    outputs, target = case.outputs(case.examples), case.examples.target
    before = target_scores(outputs, target)
    growth = _other_scores(case, outputs) / before if control else None
    after, shuffled = _scores_after(case, growth)
    classes = class_numbers(per_example(target, outputs)) if average == "classes" else None
    settings = case.settings(average=average, unit="%")

    def result(name: str, change: Tensor) -> Result:
        unscored = {"zero output": before == 0}
        return Result.of(name, 100 * change, "lower", settings, unscored, classes=classes)

    # Φ(X_i), Φ(S_i): outputs for input i and its source signal; N_c of the examples have class c
    # eq. 10: APC = 1/C Σ_c 1/N_c Σ_i |Φ(X_i) - Φ(S_i)| / |Φ(X_i)| · 100 %
    change = (before - after) / before.abs()
    # eq. 11: positive APC has relu(Φ(X_i) - Φ(S_i)) instead of the absolute value
    parts = {"positive APC": result("positive APC", change.relu())}
    if control:
        mixed = (before - shuffled) / before.abs()
        parts["shuffled output"] = result("shuffled output", mixed.abs())
        parts["shuffled output, positive"] = result("shuffled output, positive", mixed.relu())
    return replace(result("APC", change.abs()), parts=parts)


def _check_method(method: Any, control: bool) -> None:
    """Raise InputError if a method does not have the functions that completeness calls.

    Args:
        method: The method to measure.
        control: Whether the control is computed, which calls ``attribute``.
    """
    for name, advice in {
        "source_signal": ", as MIPINAttribution has",
        "attribute": ": pass control=False",
    }.items():
        if not hasattr(method, name) and (control or name == "source_signal"):
            raise InputError(
                f"the method has no {name}; completeness needs a method that has {name}{advice}"
            )


def _scores_after(case: Case, growth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scores (examples,) for the source signal S, and for the control's signal S'.

    The control assumes S = A + B, where A (``attribute``) is proportional to the output and B does
    not depend on the output.

    Args:
        case: Case whose method has ``source_signal`` and ``attribute``.
        growth: Another example's output / own output (examples,); None for no control.

    Returns:
        Scores for S, and scores for S'; without a control both are the scores for S.
    """
    method: Any = case.method
    after, shuffled = [], []
    for index, batch in case.batches():
        signal = explain(method.source_signal, batch)
        _check_shapes(signal, batch.inputs)
        after.append(case.scores(replace(batch, inputs=signal)))
        if growth is not None:
            # S' = A y'/y + B = S + A (y'/y - 1): y is the own output, y' another example's output
            change = [
                a * (growth[index] - 1).to(a).view(-1, *(1,) * (a.ndim - 1))
                for a in explain(method.attribute, batch)
            ]
            moved = tuple(s + d for s, d in zip(signal, change, strict=True))
            shuffled.append(case.scores(replace(batch, inputs=moved)))
    return torch.cat(after), torch.cat(shuffled or after)


def _check_shapes(signal: Inputs, inputs: Inputs) -> None:
    """Raise InputError if a source signal does not have the shape of the model's inputs.

    Args:
        signal: The source signal, tensors (examples, ...).
        inputs: The inputs, tensors (examples, ...).
    """
    found, expected = ([tuple(t.shape[1:]) for t in tensors] for tensors in (signal, inputs))
    if found != expected:
        raise InputError(
            f"the source signal has shape {_shapes(found)} per example, expected the shape of the "
            f"model's input, {_shapes(expected)}, because completeness applies the model to the "
            "source signal. The inverse stops at a layer: pass a method whose inverse reaches the "
            "input"
        )


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _other_scores(case: Case, outputs: Tensor) -> Tensor:
    """Return, for each example, a random other example's output (examples,) for the same target.

    With one example alone, the output is NaN.
    """
    n = len(outputs)
    if n == 1:
        return torch.full((1,), torch.nan, dtype=torch.float64, device=outputs.device)
    # put all examples in a ring, in random order: the next example is never the same one
    order = torch.randperm(n, generator=case.generator, device=case.generator.device)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return target_scores(outputs[other.to(outputs.device)], case.examples.target)
