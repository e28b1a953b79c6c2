"""The maps of every kind of method, for networks that have to be explained alike."""

import torch
from small import Function

from captum_mipin import InverseNetwork
from captum_mipin.methods import (
    LRP,
    Deconvnet,
    DeepTaylor,
    ExcitationBackprop,
    GuidedBackprop,
    PatternNet,
    Patterns,
)


def maps(run, x, *extras, more=False, **modules):
    """Return the output and the map of every method for a network of these modules.

    Args:
        run: Function of the modules and the inputs.
        x: The explained input.
        extras: Further inputs, which are not explained.
        more: Whether to run AttnLRP, Deep Taylor, Guided Backprop and Deconvnet as well.
        modules: The modules.
    """
    model = Function(run, **modules).double().eval()
    data = {"unpack": lambda batch: (batch, extras), "progress": False}
    inverse = InverseNetwork(model).fit([x], 1, **data)
    patterns = Patterns(model).fit([x], **data)
    few, given = x[:5], tuple(extra[:5] for extra in extras)
    methods = [LRP(model), ExcitationBackprop(model), PatternNet(model, patterns)]
    if more:
        methods += [LRP(model, attention="attnlrp"), DeepTaylor(model)]
        methods += [GuidedBackprop(model), Deconvnet(model)]
    return [
        model(few, *given).detach(),
        *(maps[0] for maps in inverse.explain((few,), 1, given, biases=(False, True)).signals),
        *(method.attribute(few, 1, additional_forward_args=given or None) for method in methods),
    ]


def alike(runs, x, *extras, more=False, **modules):
    """Require that all networks of these modules have the same output and the same maps."""
    first, *others = (maps(run, x, *extras, more=more, **modules) for run in runs)
    for other in others:
        for a, b in zip(other, first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
