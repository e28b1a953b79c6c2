"""Class sensitivity: the distance between the maps for two classes."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_mipin.calls import explained
from captum_mipin.errors import InputError
from captum_mipin.metrics.case import Case, Method, Options, raw_outputs
from captum_mipin.metrics.examples import Inputs
from captum_mipin.metrics.maps import flattened
from captum_mipin.metrics.result import Result, finite_rows
from captum_mipin.metrics.similarity import cosine, ssim, ssim_inputs
from captum_mipin.targets import per_example


@explained
def class_sensitivity(
    method: Method,
    inputs: Inputs,
    target: Any = None,
    other: Any = None,
    **options: Unpack[Options],
) -> Result:
    """Return the distance between the maps for two classes.

    The score is the L2 norm of the difference of the maps, as in the paper; it depends on the scale
    of the maps. The parts can be compared across methods: "normalised L2" of maps divided by the
    sum of their absolute values, "cosine", and "SSIM" of maps summed over channels, if these are
    images of at least 3 x 3.

    Args:
        method: Any method, but not maps.
        inputs: Tensor (examples, ...) or tuple of such.
        target: The class, as Captum takes it.
        other: A second class, or one per example; by default a random one per example.
        **options: See :class:`~captum_mipin.metrics.case.Options`.

    Returns:
        Distances. Reasons for no score: "same class" if ``other`` equals ``target``, "NaN"; in all
        parts but SSIM also "zero map".

    Source: Section 6.4 and appendix B, which compare classes 981 and 589 of ImageNet.

    Examples:
        >>> def method(x, target):
        ...     return x * torch.tensor([[3.0], [4.0]])[target]
        >>> result = class_sensitivity(method, torch.ones(1, 1), 0, 1)
        >>> result.mean, {name: part.mean for name, part in result.parts.items()}
        (1.0, {'normalised L2': 0.0, 'cosine': 1.0})
    """
    if isinstance(method, (Tensor, tuple)):
        raise InputError(
            "the method is a tensor of maps, but class_sensitivity needs the maps of two classes: "
            "pass an Attribution or a function (inputs, target) -> maps"
        )
    case = Case.of(method, inputs, target, **options)
    other_case = Case.of(method, inputs, _drawn(case) if other is None else other, **options)
    a, b = flattened(case.maps), flattened(other_case.maps)
    total_a, total_b = (m.abs().sum(1, keepdim=True) for m in (a, b))
    settings = case.settings(case.maps, other=other_case.settings()["target"], reduction="none")
    pairs = zip(case.examples.targets, other_case.examples.targets, strict=True)
    unscored = {"same class": torch.tensor([x == y for x, y in pairs]), "NaN": ~finite_rows(a, b)}
    zero = {**unscored, "zero map": ((total_a == 0) | (total_b == 0))[:, 0]}
    # normalised L2 = ‖A / Σ|A| - B / Σ|B|‖
    normalised = (a / total_a - b / total_b).norm(dim=1)
    parts = {
        "normalised L2": Result.of("normalised L2", normalised, "higher", settings, zero),
        "cosine": Result.of("cosine", cosine(a, b), "lower", settings, zero),
    }
    images = ssim_inputs(case.maps, other_case.maps, case.examples.inputs[0])
    if images is not None:
        settings_ssim = {**settings, "reduction": "sum", "window": images[2]}
        parts["SSIM"] = Result.of("SSIM", ssim(*images), "lower", settings_ssim, unscored)
    # class sensitivity = ‖A - B‖
    distance = (a - b).norm(dim=1)
    return Result.of("class sensitivity", distance, "neither", settings, unscored, parts=parts)


def _drawn(case: Case) -> list[int]:
    """Return one random class per example, each class but the target with equal probability."""
    outputs = raw_outputs(case.model, case.examples.select(torch.arange(1)))
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise InputError(
            f"the model's outputs have shape {tuple(outputs.shape)}, expected (examples, classes) "
            "with at least two classes, to draw a second class: pass other="
        )
    n, classes = len(case.examples), outputs.shape[1]
    own = per_example(case.examples.target, outputs.expand(n, -1))
    # (target + d) mod C with d = 1 ... C - 1, C the number of classes, is never the target
    random = case.generator
    ahead = torch.randint(1, classes, (n,), generator=random, device=random.device).tolist()
    return [(label + by) % classes for (label,), by in zip(own, ahead, strict=True)]
