"""A final sigmoid or softmax: methods that start from logits take them, and say so."""

import warnings

import pytest
import torch
from small import normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, check
from captum_mipin.bottleneck import IBA
from captum_mipin.errors import LogitsWarning, UnsupportedOperationError
from captum_mipin.graph.capture import capture
from captum_mipin.graph.subgraph import Part
from captum_mipin.methods import LRP, DeepTaylor, ExcitationBackprop, GuidedBackprop
from captum_mipin.methods.gradients import Gradient
from captum_mipin.propagation.final import below_final


class Ends(nn.Module):
    """A small network with three outputs and an end of its own."""

    def __init__(self, end) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
        self.end = end

    def forward(self, x):
        return self.end(self.body(x))


#: End of the model → the same end without its sigmoid or softmax.
TAKEN = {
    "sigmoid": (torch.sigmoid, lambda z: z),
    "hardsigmoid": (F.hardsigmoid, lambda z: z),
    "logsigmoid": (F.logsigmoid, lambda z: z),
    "-softplus(-z)": (lambda z: -F.softplus(-z), lambda z: z),
    "expit": (torch.special.expit, lambda z: z),
    "softmax": (lambda z: z.softmax(1), lambda z: z),
    "softmax in another dtype": (lambda z: F.softmax(z, 1, dtype=torch.float64), lambda z: z),
    "log_softmax": (lambda z: F.log_softmax(z, -1), lambda z: z),
    "softmax, then log": (lambda z: z.softmax(1).log(), lambda z: z),
    "log_softmax, then exp": (lambda z: z.log_softmax(1).exp(), lambda z: z),
    "one of two classes": (lambda z: z.softmax(1)[:, 1], lambda z: z[:, 1]),
    "one class, squeezed": (lambda z: z[:, :1].sigmoid().squeeze(1), lambda z: z[:, 0]),
    "reshaped": (
        lambda z: z.sigmoid().reshape(-1, 3, 1).transpose(1, 2)[..., 1:].flatten(1),
        lambda z: z[:, 1:],
    ),
    "chunk": (lambda z: z.sigmoid().chunk(3, 1)[1], lambda z: z[:, 1:2]),
    "exp and sum": (lambda z: z.exp() / z.exp().sum(1, keepdim=True), lambda z: z),
    "1 / (1 + exp(-z))": (lambda z: 1 / (1 + torch.exp(-z)), lambda z: z),
    "1 / (exp(-z) + 1.0)": (lambda z: 1.0 / (torch.exp(-z) + 1.0), lambda z: z),
    "reciprocal": (lambda z: (1 + (-z).exp()).reciprocal(), lambda z: z),
    "minus logsumexp": (lambda z: z - z.logsumexp(1, keepdim=True), lambda z: z),
}


def once(z):
    e = z.exp()
    return e / e.sum(1, keepdim=True)


def shifted(z):
    e = (z - z.amax(1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def shifted_by_max(z):
    e = torch.exp(z - z.max(1, keepdim=True)[0].detach())
    return torch.div(e, torch.sum(e, dim=1, keepdim=True))


def exp_over_one(z):
    e = z.exp()
    return e / (1 + e)


TAKEN |= {how.__name__: (how, lambda z: z) for how in (once, shifted, shifted_by_max, exp_over_one)}

REFUSED = {
    "1 - p": lambda z: 1 - z.sigmoid(),
    "both classes of a sigmoid": lambda z: torch.cat(
        [1 - z[:, :1].sigmoid(), z[:, :1].sigmoid()], 1
    ),
    "a mean of probabilities": lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2,
    "a product of probabilities": lambda z: z[:, :1].sigmoid() * z.softmax(1),
    "clamped": lambda z: z.sigmoid().clamp(1e-6, 1 - 1e-6),
    "stacked": lambda z: torch.stack([z.sigmoid(), 1 - z.sigmoid()], 2),
    "a sum of classes": lambda z: z.softmax(1).sum(1),
    "a square": lambda z: z.sigmoid() ** 2,
    "a root": lambda z: z.softmax(1).sqrt(),
    "one over a root": lambda z: z.sigmoid().rsqrt(),
    "a power of one class": lambda z: z.softmax(1)[:, :1].pow(0.3),
    "base 2": lambda z: z.sigmoid().log2(),
}

OTHERS = {
    "a gate": lambda z: z * z.sigmoid(),
    "sigmoid below": lambda z: z.sigmoid() + z,
    "tanh": torch.tanh,
    "weights of attention": lambda z: z.softmax(1) @ torch.ones(3, 2),
    "softmax over the batch": lambda z: z.softmax(0),
    "exp over the sum of all": lambda z: z.exp() / z.exp().sum(),
    "exp over a sum over the batch": lambda z: z.exp() / z.exp().sum(0, keepdim=True),
    "a norm": lambda z: z / z.sum(1, keepdim=True),
    "exp over another sum": lambda z: z.exp() / (2 * z).exp().sum(1, keepdim=True),
}


def network(end):
    return Ends(end).eval()


@pytest.mark.parametrize("end", TAKEN)
def test_the_logits_below_are_taken(end):
    """The graph computes what the same network without its last part computes."""
    probabilities, logits = map(network, TAKEN[end])
    x = normal(4, 5)
    captured = capture(probabilities, (x,))
    graph, row = below_final(captured)
    assert row is not None
    assert row.status == "supported"
    part = Part(graph, graph.inputs[0], None)
    start, others = part.below(graph.values(probabilities, (x,), ()))
    torch.testing.assert_close(part.above(start, others), logits(x))


@pytest.mark.parametrize("end", OTHERS)
def test_other_ends_stay(end):
    captured = capture(network(OTHERS[end]), (normal(4, 5),))
    graph, row = below_final(captured)
    assert graph is captured
    assert row is None


@pytest.mark.parametrize("end", REFUSED)
def test_what_has_no_logits_is_refused(end):
    model, x = network(REFUSED[end]), normal(20, 5)
    with pytest.raises(UnsupportedOperationError, match=r"(sigmoid|softmax).*logits"):
        LRP(model).attribute(x, target=None if model(x).ndim == 1 else (0,) * (model(x).ndim - 1))
    assert [row for row in check(model, x).refused if "logits are not known" in row.note]


METHODS = {
    "MIP-IN": lambda m, x: InverseNetwork(m).fit(x, 1, progress=False).source_signal(x[:3], 1),
    "LRP": lambda m, x: LRP(m).attribute(x[:3], target=1),
    "Deep Taylor": lambda m, x: DeepTaylor(m).attribute(x[:3], target=1),
    "excitation": lambda m, x: ExcitationBackprop(m).attribute(x[:3].abs(), target=1),
    "IBA": lambda m, x: (
        IBA(m, m.body[1], channels=-1, input_channels=-1)
        .estimate(x, progress=False)
        .attribute(x[:3], 1, at="layer")
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", ["sigmoid", "softmax"])
def test_every_method_explains_the_logits_and_says_so(method, end):
    probabilities, logits = map(network, TAKEN[end])
    x = normal(30, 5)
    with pytest.warns(
        LogitsWarning, match=rf"{end}.*in the model itself: the {end} ends the model"
    ):
        found = METHODS[method](probabilities, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = METHODS[method](logits, x)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected)


def test_gradients_are_those_of_the_probability():
    """As those of Captum's Saliency."""
    model, x = network(torch.sigmoid), normal(3, 5).requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    torch.testing.assert_close(Gradient(model).attribute(x.detach(), target=1), expected)
    assert all(
        row.status != "refused" for row in check(model, x.detach(), method=GuidedBackprop).rows
    )


def test_check_names_the_final_operation():
    model = nn.Sequential(nn.Linear(4, 2), nn.Softmax(1)).eval()
    *_, last = check(model, normal(2, 4)).rows
    assert (last.path, last.operation, last.status) == ("1", "aten.softmax.int", "supported")
    assert "the logits that go into it are explained" in last.note
    assert not check(model, normal(2, 4)).refused


def test_of_several_outputs_the_chosen_one_counts():
    class Two(Ends):
        def forward(self, x):
            z = self.body(x)
            return {"logits": z, "p": z.softmax(1)}

    model, x = Two(None).eval(), normal(6, 5)
    expected = LRP(model, output="logits").attribute(x, target=1)
    with pytest.warns(LogitsWarning):
        torch.testing.assert_close(LRP(model, output="p").attribute(x, target=1), expected)
