"""What the attribution changes with: the class asked for, and small changes of the input."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from captum.metrics import sensitivity_max as captum_sensitivity_max
from torch import Tensor

from captum_mipin.errors import InputError
from captum_mipin.metrics.common import (
    Examples,
    Inputs,
    Method,
    Pairs,
    ask,
    at_least,
    described,
    disturbances,
    explain,
    explained_at_once,
    finite_rows,
    heat,
    model_of,
    raw_outputs,
    seeded,
    uniform,
)  # fmt: skip
from captum_mipin.metrics.result import Result
from captum_mipin.metrics.similarity import cosine, ssim, ssim_window
from captum_mipin.targets import per_example, target_label


def class_sensitivity(
    method: Method,
    inputs: Inputs,
    target: Any = None,
    other: Any = None,
    *,
    model: Callable[..., Any] | None = None,
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Distance between the maps for two classes (section 6.4, appendix B).

    The score is the paper's: the L2 norm of the difference of both maps, as the method gives them, so that twice as large maps
    have twice the distance, and neither higher nor lower is better. Across methods the parts can be compared: "normalised L2",
    of maps divided by the sum of their absolute values, and "cosine" of both; "SSIM" of their sums over channels, where these
    are images of at least 3 x 3.

    Args:
        method: See :data:`~captum_mipin.metrics.Method`; not maps.
        inputs: Tensor (examples, ...) or tuple of such.
        target: One class, as Captum takes it; the paper has 981.
        other: Another; the paper has 589. By default one drawn at random for each example among all others.
        model: For drawing; by default the method's ``forward_func``.
        additional_forward_args: Further arguments of the model.
        generator: Draws ``other``.
        batch_size: Examples explained at once.

    Returns:
        Distances. Unscored: "same class" where ``other`` is none, "NaN", and in all parts but SSIM "zero map" where a map is 0.

    Examples:
        >>> result = class_sensitivity(lambda x, target: x * torch.tensor([[3.0], [4.0]])[target], torch.ones(1, 1), 0, 1)
        >>> result.mean, {name: part.mean for name, part in result.parts.items()}
        (1.0, {'normalised L2': 0.0, 'cosine': 1.0})
    """
    if isinstance(method, (Tensor, tuple)):
        raise InputError(
            "class_sensitivity needs a method that can be asked for two classes, not maps"
        )
    examples = Examples.of(inputs, target, additional_forward_args)
    if other is None:
        other = _drawn(model_of(method, model), examples, seeded(generator))
    others = examples.with_target(other)
    one, two = explain(method, examples, batch_size), explain(method, others, batch_size)
    a, b = (torch.cat([m.double().flatten(1) for m in maps], 1) for maps in (one, two))
    sums = [m.abs().sum(1, keepdim=True) for m in (a, b)]
    settings = described(
        method, examples, one, other=described(method, others)["target"], reduction="none"
    )
    same = [mine == his for mine, his in zip(examples.targets, others.targets, strict=True)]
    broken = {"same class": torch.tensor(same), "NaN": ~finite_rows(a, b)}
    zero = {**broken, "zero map": (sums[0] == 0).any(1) | (sums[1] == 0).any(1)}
    parts = {
        "normalised L2": Result.of(
            "normalised L2", (a / sums[0] - b / sums[1]).norm(dim=1), "higher", settings, zero
        ),
        "cosine": Result.of("cosine", cosine(a, b), "lower", settings, zero),
    }
    first, second = (heat(maps[0], examples.inputs[0]) for maps in (one, two))
    window = ssim_window(*first.shape[1:]) if len(one) == 1 and first.ndim == 3 else None
    if window is not None:
        told = {**settings, "reduction": "sum", "window": window}
        parts["SSIM"] = Result.of("SSIM", ssim(first, second, window), "lower", told, broken)
    return Result.of(
        "class sensitivity", (a - b).norm(dim=1), "neither", settings, broken, parts=parts
    )


def sensitivity_max(
    method: Method,
    inputs: Inputs,
    target: Any = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Captum's ``sensitivity_max``: the largest relative change of the map when the input changes by up to ``radius``.

    Args:
        method, inputs, target, additional_forward_args: As for :func:`class_sensitivity`.
        radius: Of the cube that changed inputs are drawn from.
        samples: Changed inputs an example.
        generator: Draws them.
        batch_size: Examples explained at once, as far as one change of each goes in.

    Returns:
        ‖change of the map‖ ÷ ‖map‖. Unscored: "zero map", "NaN".

    Source: Yeh et al., NeurIPS 2019.

    Examples:
        >>> sensitivity_max(lambda x, target: torch.ones_like(x), torch.rand(3, 4)).mean
        0.0
    """
    at_least("samples", samples, 1)
    at_least("radius", radius, 0)
    if isinstance(method, (Tensor, tuple)):
        raise InputError(
            "sensitivity_max needs a method that can be asked for changed inputs, not maps"
        )
    examples, random, size = (
        Examples.of(inputs, target, additional_forward_args),
        seeded(generator),
        explained_at_once(batch_size),
    )

    def draw(shape: Sequence[int]) -> Tensor:
        return (2 * uniform(random, *shape) - 1) * radius

    def doubles(part: Examples) -> tuple[Tensor, ...]:
        return tuple(one.double() for one in ask(method, part))  # whose squares do not vanish

    found, zero, finite = [], [], []
    for part in examples.chunks(min(size, len(examples))):
        first = doubles(part)

        def again(
            x: tuple[Tensor, ...],
            part: Examples = part,
            first: tuple[Tensor, ...] = first,
            **asked: Any,
        ) -> Any:
            if x[0] is part.inputs[0]:
                return first
            extras = asked.get("additional_forward_args")
            return doubles(Examples.of(x[0] if part.alone else x, asked["target"], extras))

        extras = {"additional_forward_args": part.extras} if part.extras else {}
        most = min(len(part) * max(1, size // len(part)), len(part) * samples)
        found.append(
            captum_sensitivity_max(
                again,
                part.inputs,
                partial(_more, disturbances(part, samples, draw)),
                n_perturb_samples=samples,
                max_examples_per_batch=most,
                target=part.target,
                **extras,
            )
        )
        flat = torch.cat([m.flatten(1) for m in first], 1)
        zero.append((flat == 0).all(1).cpu())
        finite.append(finite_rows(flat))
    settings = described(method, examples, first, radius=radius, samples=samples)
    reasons = {"NaN": ~torch.cat(finite), "zero map": torch.cat(zero)}
    return Result.of("max-sensitivity", torch.cat(found), "lower", settings, reasons)


def _more(disturb: Callable[[Inputs], Pairs], x: Inputs) -> tuple[Tensor, ...]:
    return tuple(one + by for one, by in disturb(x))


def _drawn(model: Callable[..., Any], examples: Examples, generator: torch.Generator) -> list[Any]:
    """For each example another class than its target."""
    found = raw_outputs(model, examples.pick(torch.arange(1)))
    if found.ndim != 2 or found.shape[1] < 2:
        raise InputError(
            f"outputs of shape {tuple(found.shape)} have no other class to draw: pass other="
        )
    classes = found.shape[1]
    own = per_example(examples.target, torch.empty(len(examples), classes, device="meta"))
    ahead = torch.randint(
        1, classes, (len(examples),), generator=generator, device=generator.device
    ).tolist()
    return [
        target_label(((label + by) % classes,)) for (label,), by in zip(own, ahead, strict=True)
    ]
