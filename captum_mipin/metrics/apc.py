"""Average percentage change (APC): the paper's measure of completeness (section 5)."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_mipin.errors import InputError
from captum_mipin.metrics.case import Case, Options, check_choice, explain, target_scores
from captum_mipin.metrics.examples import Inputs
from captum_mipin.metrics.result import Result, class_numbers
from captum_mipin.targets import per_example


def completeness(
    method: Any,
    inputs: Inputs,
    target: Any = None,
    *,
    average: Literal["classes", "samples"] = "classes",
    control: bool = True,
    **options: Unpack[Options],
) -> Result:
    """Return the APC: by how many percent the output for the source signal differs.

    The part "positive APC" counts losses alone. The parts "shuffled output" are the control: each
    example keeps its masks and switches, but the inverse starts at another example's output for
    this target. The masks carried what is complete even then.

    Args:
        method: Has ``source_signal``, and for the control ``attribute``.
        inputs, target: Tensor (examples, ...) or tuple of such; classes, as Captum takes them.
        average: Mean over "samples"; or per class of ``target``, then over "classes" (the paper's).
        control: Measure the control as well.
        **options: See :class:`~captum_mipin.metrics.case.Options`.

    Returns:
        Percentages. Unscored: "zero output", "NaN".

    Raises:
        InputError: The source signal is that of a layer, not of the input.

    Source: Equations 10 and 11.

    Examples:
        >>> class Half:
        ...     def source_signal(self, inputs, target=None, additional_forward_args=None):
        ...         return inputs / 2
        >>> x = torch.tensor([[4.0, 1.0], [2.0, 8.0]])
        >>> completeness(Half(), x, [0, 1], model=lambda x: x, control=False).values.tolist()
        [50.0, 50.0]
    """
    check_choice("average", average, ("classes", "samples"))
    for name, advice in {"source_signal": "", "attribute": ": pass control=False"}.items():
        if not hasattr(method, name) and (control or not advice):
            raise InputError(f"completeness needs a method that has {name}{advice}")
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

    # eq. 10: APC = 1/C Σ_c 1/N_c Σ_i |Φ(X_i) - Φ(S_i)| / |Φ(X_i)| · 100 %
    change = (before - after) / before.abs()
    # eq. 11: positive APC has relu(Φ(X_i) - Φ(S_i)) instead of the absolute value
    parts = {"positive APC": result("positive APC", change.relu())}
    if control:
        mixed = (before - shuffled) / before.abs()
        parts["shuffled output"] = result("shuffled output", mixed.abs())
        parts["shuffled output, positive"] = result("shuffled output, positive", mixed.relu())
    return replace(result("APC", change.abs()), parts=parts)


def _scores_after(case: Case, growth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scores (examples,) for the source signal S, and for that of another output.

    The latter assumes S = A + B: A (``attribute``) is proportional to the output, B constant.

    Args:
        case: Its method has ``source_signal`` and ``attribute``.
        growth: Other output / own output (examples,); None to measure no control.
    """
    method: Any = case.method
    after, shuffled = [], []
    for index, batch in case.batches():
        signal = explain(method.source_signal, batch)
        _check_shapes(signal, batch.inputs)
        after.append(case.scores(replace(batch, inputs=signal)))
        if growth is not None:
            # S' = A y'/y + B = S + A (y'/y - 1): the inverse starts at y' instead of y
            change = [
                a * (growth[index] - 1).to(a).view(-1, *(1,) * (a.ndim - 1))
                for a in explain(method.attribute, batch)
            ]
            moved = tuple(s + d for s, d in zip(signal, change, strict=True))
            shuffled.append(case.scores(replace(batch, inputs=moved)))
    return torch.cat(after), torch.cat(shuffled or after)


def _check_shapes(signal: Inputs, inputs: Inputs) -> None:
    """Raise InputError if a source signal is not shaped like the inputs: the model cannot take it.

    Args:
        signal: The source signal, tensors (examples, ...).
        inputs: The inputs, tensors (examples, ...).
    """
    found, expected = ([tuple(t.shape[1:]) for t in tensors] for tensors in (signal, inputs))
    if found != expected:
        raise InputError(
            "completeness asks the model for its output for the source signal. Found source "
            f"signals of shape {_shapes(found)} for each example, expected {_shapes(expected)}, "
            "the shape of its input: the inverse stops at a layer; pass a method whose inverse "
            "goes back to the input"
        )


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes))


def _other_scores(case: Case, outputs: Tensor) -> Tensor:
    """Return for each example's target the output (examples,) of another example, at random.

    It is NaN where there is no other example.
    """
    n = len(outputs)
    if n == 1:
        return torch.full((1,), torch.nan, dtype=torch.float64, device=outputs.device)
    # a ring of all examples in random order: the successor of an example is never itself
    order = torch.randperm(n, generator=case.generator, device=case.generator.device)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return target_scores(outputs[other.to(outputs.device)], case.examples.target)
