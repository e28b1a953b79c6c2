"""The maps of every kind of method, for networks that have to be explained alike."""

import torch
from small import Function

from captum_mipin import InverseNetwork
from captum_mipin.methods import LRP, ExcitationBackprop, PatternNet, Patterns


def maps(run, x, **modules):
    """Return the output and the map of every method for a network of these modules."""
    model = Function(run, **modules).double().eval()
    inverse = InverseNetwork(model).fit(x, 1, progress=False)
    few = x[:5]
    patterns = Patterns(model).fit(x, progress=False)
    methods = [LRP(model), ExcitationBackprop(model), PatternNet(model, patterns)]
    return [
        model(few).detach(),
        *(maps[0] for maps in inverse.explain((few,), 1, biases=(False, True)).signals),
        *(method.attribute(few, 1) for method in methods),
    ]


def alike(runs, x, **modules):
    """Require that all networks of these modules have the same output and the same maps."""
    first, *others = (maps(run, x, **modules) for run in runs)
    for other in others:
        for a, b in zip(other, first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
