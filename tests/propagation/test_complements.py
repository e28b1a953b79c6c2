"""Gates by hand, their complements and multiples, by the relevance of factors written out."""

import pytest
import torch
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin.methods import LRP, Epsilon, GuidedBackprop

X = normal(6, 4, dtype=torch.float64)
#: x σ(−q) for x = a and q = b, in many spellings; next, x σ(q) with a hard sigmoid.
SPELLINGS = {
    "sigmoid of −q": [
        lambda a, b: a * torch.sigmoid(-b),
        lambda a, b: a * (1 - torch.sigmoid(b)),
        lambda a, b: a - a * torch.sigmoid(b),
        lambda a, b: torch.sub(2 * a, a * torch.sigmoid(b), alpha=2) / 2,
        lambda a, b: torch.addcmul(a, a, torch.sigmoid(b), value=-1),
        lambda a, b: a * (torch.ones_like(b) - torch.sigmoid(b)),
        lambda a, b: a / (1 + b.exp()),
        lambda a, b: a * (1 - torch.tanh(b / 2)) / 2,
    ],
    "hard sigmoid": [
        lambda a, b: a * F.hardsigmoid(b),
        lambda a, b: a * F.relu6(b + 3) / 6,
        lambda a, b: (a / 6) * F.relu6(b + 3),
        lambda a, b: a * (1 - F.relu6(3 - b) / 6),
        lambda a, b: a - a * F.hardsigmoid(-b),
    ],
}


def _model(runs):
    """Return a network of one output for each spelling."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(4, 5), "b": nn.Linear(4, 5), "last": nn.Linear(5, 1)}

    def run(m, x):
        a, b = m["a"](x), m["b"](x)
        return torch.cat([m["last"](one(a, b)) for one in runs], 1)

    return Function(run, **layers).double().eval()


@pytest.mark.parametrize("kind", SPELLINGS)
def test_a_gate_in_every_spelling_gets_half_or_nothing(kind):
    runs = SPELLINGS[kind]
    model = _model(runs)
    a, b = (model.layers[name](X).detach() for name in ("a", "b"))
    r = runs[0](a, b) * model.layers["last"].weight[0].detach()
    to_a, to_b = (
        X * ((r / z) @ model.layers[name].weight.detach()) for name, z in (("a", a), ("b", b))
    )
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    for method, expected in (
        (LRP(model, rule=Epsilon(0), attention="attnlrp"), (to_a + to_b) / 2),
        (LRP(model, rule=Epsilon(0)), to_a),
        (GuidedBackprop(model), slope),
    ):
        _check_all(method, len(runs), expected)


def _check_all(method, count, expected):
    """Check that the map of every output is the same."""
    targets = torch.arange(count).repeat_interleave(len(X))
    for number, found in enumerate(method.attribute(X.repeat(count, 1), targets).chunk(count)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=f"{number}")


@pytest.mark.parametrize("half", [F.silu, F.hardswish, F.gelu])
def test_a_difference_to_a_smooth_rectifier_is_that_of_the_negative(half):
    gates = {F.silu: torch.sigmoid, F.hardswish: F.hardsigmoid}
    runs = [lambda a, b: -half(-a), lambda a, b: a - half(a), lambda a, b: -half(a) + a]
    if half in gates:
        runs += [lambda a, b: a * gates[half](-a), lambda a, b: a * (1 - gates[half](a))]
    model = _model(runs)
    z = -model.layers["a"](X).detach().requires_grad_()
    (slope,) = torch.autograd.grad(half(z).sum(), z)
    passed = (-model.layers["last"].weight[0]).clamp(min=0).detach()  # s⁺ behind the rectifier
    expected = (slope * passed) @ -model.layers["a"].weight.detach()
    _check_all(GuidedBackprop(model), len(runs), expected)
    relevance = LRP(model, attention="attnlrp")
    _check_all(relevance, len(runs), relevance.attribute(X, 0))
