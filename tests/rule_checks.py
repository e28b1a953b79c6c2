"""What every rule is held to, and networks that have to be explained alike."""

import torch
from small import Function

from captum_mipin import InverseNetwork
from captum_mipin.rules import MIPIN, Options


def back(name, x, *arguments, local=True, **named):
    """Return what a rule sends back for a signal of ones."""
    operation = getattr(torch.ops.aten, name).default
    value, send = MIPIN[f"aten.{name}.default"].run(
        Options(local=local), operation, x, *arguments, **named
    )
    assert torch.equal(value, operation(x, *arguments, **named))
    return send(torch.ones_like(value))


def behaves(model, x, targets=(0, 1)):
    """Fit the model: S is finite, mixed targets equal those one by one, chunks do not matter."""
    inverse = InverseNetwork(model).fit(x, targets=list(targets), progress=False)
    parts = InverseNetwork(model).fit(list(x.split(7)), targets=list(targets), progress=False)
    few = x[:4]
    mixed = [targets[0], targets[1], targets[1], targets[0]]
    result = inverse.explain((few,), mixed, biases=(True,))
    ((s,),) = result.signals
    assert torch.isfinite(s).all()
    assert s.abs().max() > 0
    with torch.no_grad():
        chosen = [y[index] for y, index in zip(model(few), mixed, strict=True)]
        torch.testing.assert_close(result.output, torch.stack(chosen))
    close = {"rtol": 1e-6, "atol": 1e-6 * float(s.abs().max())}
    for i, target in enumerate(mixed):
        torch.testing.assert_close(
            inverse.source_signal(few[i : i + 1], target=target)[0], s[i], **close
        )
    torch.testing.assert_close(
        parts.source_signal(few, target=mixed), s, rtol=1e-5, atol=1e-5 * float(s.abs().max())
    )
    return inverse


def alike(x, *runs, **modules):
    """Networks of the same modules that have to be explained alike."""
    signals = []
    for run in runs:
        model = Function(run, **modules).double().eval()
        signals.append(InverseNetwork(model).fit(x, 1, progress=False).source_signal(x[:6], 1))
    for other in signals[1:]:
        torch.testing.assert_close(
            other, signals[0], rtol=1e-9, atol=1e-9 * float(signals[0].abs().max())
        )
