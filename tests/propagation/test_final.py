"""A final sigmoid or softmax: methods that start from logits take them, and say so."""

import math
import warnings

import pytest
import torch
from designs import aside
from small import normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, MIPINAttribution, NeighbourInverse, check
from captum_mipin.bottleneck import IBA, InputIBA
from captum_mipin.errors import LogitsWarning, UnsupportedOperationError
from captum_mipin.graph.capture import capture
from captum_mipin.graph.subgraph import Part
from captum_mipin.methods import (
    LRP,
    Deconvnet,
    DeepTaylor,
    ExcitationBackprop,
    GradCAM,
    GuidedBackprop,
    PatternAttribution,
    PatternNet,
    Patterns,
    SmoothGrad,
)
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


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


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


#: A sigmoid of z, or another function of z that falls or rises with it, in other spellings.
TAKEN |= {
    "tanh": (lambda z: 0.5 * (1 + torch.tanh(z / 2)), lambda z: z),
    "tanh of z": (lambda z: (torch.tanh(z) + 1) / 2, lambda z: 2 * z),
    "tanh and addition": (lambda z: 0.5 + 0.5 * torch.tanh(0.5 * z), lambda z: z),
    "exp of the log": (lambda z: F.logsigmoid(z).exp(), lambda z: z),
    "log of the sigmoid": (lambda z: z.sigmoid().log(), lambda z: z),
    "1 - p": (lambda z: 1 - z.sigmoid(), lambda z: -z),
    "1 - p of -z": (lambda z: 1 - torch.sigmoid(-z), lambda z: z),
    "log(1 - p)": (lambda z: torch.log1p(-z.sigmoid()), lambda z: -z),
    "-softplus(z)": (lambda z: -F.softplus(z), lambda z: -z),
    "exp(-softplus(-z))": (lambda z: torch.exp(-F.softplus(-z)), lambda z: z),
    "-log1p(exp(-z))": (lambda z: -torch.log1p(torch.exp(-z)), lambda z: z),
    "-logaddexp(0, -z)": (lambda z: -torch.logaddexp(torch.zeros_like(z), -z), lambda z: z),
    "1 / (1 + 1 / exp(z))": (lambda z: 1 / (1 + 1 / z.exp()), lambda z: z),
    "1 - 1 / (1 + exp(z))": (lambda z: 1 - 1 / (1 + z.exp()), lambda z: z),
    "1 / (1 + 3 exp(-z))": (lambda z: 1 / (1 + 3 * torch.exp(-z)), lambda z: z - math.log(3)),
    "without overflow": (
        lambda z: torch.where(z >= 0, 1 / (1 + (-z).exp()), z.exp() / (1 + z.exp())),
        lambda z: z,
    ),
    "power": (lambda z: (1 + torch.exp(-z)) ** -1, lambda z: z),
    "a temperature": (lambda z: torch.sigmoid(z / 5), lambda z: z / 5),
    "a learned temperature": (
        lambda z: 1 / (1 + torch.exp(-z / nn.Parameter(torch.tensor(5.0)))),
        lambda z: z / 5,
    ),
    "relu6": (lambda z: F.relu6(z + 3) / 6, lambda z: z),
    "clamp": (lambda z: (z / 6 + 0.5).clamp(0, 1), lambda z: z),
    "a second class of zeros": (
        lambda z: torch.stack([z, torch.zeros_like(z)], 2).softmax(2)[..., 0],
        lambda z: z,
    ),
    "log of one class": (lambda z: z.softmax(1)[:, 1].log(), lambda z: z[:, 1]),
    "the entry of a class": (
        lambda z: z.sigmoid()[torch.arange(z.shape[0]), z.argmax(1)],
        lambda z: z.amax(1),
    ),
    "a loss": (
        lambda z: -F.log_softmax(z, 1).gather(1, z.argmin(1)[:, None]).squeeze(1),
        lambda z: -z.amin(1),
    ),
    "a loss by the log of a softmax": (
        lambda z: -torch.log(z.softmax(1)[:, 2]),
        lambda z: -z[:, 2],
    ),
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


#: A softmax of z in further spellings.
TAKEN |= {
    name: (how, lambda z: z)
    for name, how in {
        "sum, unsqueezed": lambda z: z.exp() / z.exp().sum(1).unsqueeze(1),
        "sum, indexed": lambda z: z.exp() / z.exp().sum(-1)[:, None],
        "transposed": lambda z: (z.exp().T / z.exp().sum(1)).T,
        "times one over the sum": lambda z: z.exp() * (1 / z.exp().sum(1, keepdim=True)),
        "times the reciprocal": lambda z: z.exp() * z.exp().sum(1, keepdim=True).reciprocal(),
        "times a power": lambda z: z.exp() * z.exp().sum(1, keepdim=True) ** -1,
        "exp minus logsumexp": lambda z: torch.exp(z - z.logsumexp(1, keepdim=True)),
        "minus the log of the sum": lambda z: z - z.exp().sum(1, keepdim=True).log(),
        "by log and exp": lambda z: torch.exp(z - z.exp().sum(1, keepdim=True).log()),
        "normalize": lambda z: F.normalize(z.exp(), p=1, dim=1),
        "a mean": lambda z: z.exp() / (3 * z.exp().mean(1, keepdim=True)),
        "e to the power": lambda z: math.e**z / (math.e**z).sum(1, keepdim=True),
        "guarded": lambda z: z.exp() / (z.exp().sum(1, keepdim=True) + 1e-12),
        "shifted by the largest of all": lambda z: (
            (z - z.max()).exp() / (z - z.max()).exp().sum(1, keepdim=True)
        ),
        "shifted, expanded": lambda z: (z - z.amax(1)[:, None].expand_as(z)).softmax(1),
        "shifted by hand, expanded": lambda z: once(z - z.amax(1)[:, None].expand_as(z)),
        "class by class": lambda z: torch.stack(
            [c.exp() / sum(d.exp() for d in z.unbind(1)) for c in z.unbind(1)], 1
        ),
    }.items()
}
TAKEN |= {how.__name__: (how, lambda z: z) for how in (once, shifted, shifted_by_max, exp_over_one)}

REFUSED = {
    "1 - p of a softmax": lambda z: 1 - z.softmax(1),
    "minus a probability": lambda z: -z.sigmoid(),
    "minus the log of a sigmoid": lambda z: -F.logsigmoid(z),
    "twice a probability": lambda z: 2 * z.sigmoid() - 1,
    "clamped in a loss": lambda z: -z.softmax(1).clamp(min=1e-12).log(),
    "a small number added": lambda z: (z.softmax(1) + 1e-10).log(),
    "a tanh squared": lambda z: (0.5 * (1 + torch.tanh(z / 2))) ** 2,
    "both classes by tanh": lambda z: (lambda p: torch.stack([p, 1 - p], 2))(
        torch.tanh(z).add(1).div(2)
    ),
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
    "a comparison": lambda z: (z > 0).to(z.dtype) * z,
    "a comparison alone": lambda z: (z > 0).to(z.dtype),
    "a norm": lambda z: z / z.sum(1, keepdim=True),
    "exp2 over its sum": lambda z: z.exp2() / z.exp2().sum(1, keepdim=True),
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


def by_hand(z, y):
    return -torch.log(z.exp() / z.exp().sum(1, keepdim=True))[torch.arange(len(z)), y]


#: Spellings of −log softmax(z)_y, the loss of a class y.
LOSSES = {
    "cross_entropy": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "module": lambda z, y: nn.CrossEntropyLoss(reduction="none")(z, y),
    "nll_loss": lambda z, y: F.nll_loss(F.log_softmax(z, 1), y, reduction="none"),
    "nll_loss of log": lambda z, y: F.nll_loss(z.softmax(-1).log(), y, reduction="none"),
    "gather": lambda z, y: -F.log_softmax(z, 1).gather(1, y[:, None])[:, 0],
    "log of gather": lambda z, y: -z.softmax(1).gather(1, y[:, None]).log().squeeze(),
    "index": lambda z, y: -F.log_softmax(z, 1)[torch.arange(z.shape[0]), y],
    "by hand": by_hand,
    "loop": lambda z, y: torch.stack([F.cross_entropy(a, b) for a, b in zip(z, y, strict=True)]),
    "loop over batches of one": lambda z, y: torch.stack(
        [F.cross_entropy(z[i : i + 1], y[i : i + 1]) for i in range(len(z))]
    ),
    "vmap": lambda z, y: torch.vmap(F.cross_entropy)(z, y),
    "vmap of nll_loss": lambda z, y: torch.vmap(F.nll_loss)(z.log_softmax(1), y),
    "of places": lambda z, y: F.cross_entropy(z[..., None], y[:, None], reduction="none")[:, 0],
}


class Loses(Ends):
    """A network that returns a function of its logits and of a label of each example."""

    def forward(self, x, y):
        return self.end(self.body(x), y)


def losing(end):
    return Loses(end).double().eval()


@pytest.mark.filterwarnings("ignore::captum_mipin.errors.LogitsWarning")
@pytest.mark.parametrize(
    "name", aside(LOSSES, "module", "log of gather", "index", "loop", "vmap of nll_loss")
)
def test_a_loss_is_explained_as_minus_the_logit_of_its_class(name):
    x, y = normal(40, 5, dtype=torch.float64), torch.arange(40) % 3
    found = []
    for model in (losing(LOSSES[name]), losing(lambda z, y: -z.gather(1, y[:, None]).squeeze(1))):
        torch.testing.assert_close(model(x, y).shape, y.shape)
        patterns = Patterns(model, estimator="linear").fit([(x, y)], unpack=tuple, progress=False)
        inverse = InverseNetwork(model).fit([(x, y)], unpack=tuple, progress=False)
        methods = (LRP(model), DeepTaylor(model), ExcitationBackprop(model),
                   PatternNet(model, patterns), MIPINAttribution(model, inverse))  # fmt: skip
        found.append([m.attribute(x[:3], additional_forward_args=y[:3]) for m in methods])
        alone = [
            [m.attribute(x[i : i + 1], additional_forward_args=y[i : i + 1]) for i in range(3)]
            for m in methods
        ]
        for one, together in zip(alone, found[-1], strict=True):
            torch.testing.assert_close(torch.cat(one), together)
    torch.testing.assert_close(*found)


def test_check_and_the_warning_say_that_a_loss_falls_with_its_logit():
    model, x, y = losing(LOSSES["cross_entropy"]), normal(3, 5).double(), torch.arange(3)
    *_, last = check(model, x, y).rows
    assert (last.operation, last.status) == ("aten.log_softmax.int", "supported")
    assert "minus the logits" in last.note
    with pytest.warns(LogitsWarning, match="in a loss that falls with it: minus the logits"):
        LRP(model).attribute(x, additional_forward_args=y)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_loss(name):
    model, x, y = losing(LOSSES[name]), normal(4, 5).double().requires_grad_(), torch.arange(4) % 3
    (expected,) = torch.autograd.grad(model(x, y).sum(), x)
    found = Gradient(model).attribute(x.detach(), additional_forward_args=y)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::captum_mipin.errors.LogitsWarning")
def test_an_example_whose_label_is_ignored_has_the_map_0():
    model = losing(lambda z, y: F.cross_entropy(z, y, reduction="none", ignore_index=7))
    x, y = normal(3, 5).double(), torch.tensor([2, 7, 1])
    for method in (LRP(model), Gradient(model)):
        found = method.attribute(x, additional_forward_args=y)
        assert not found[1].any()
        assert found[0].any()
        assert found[2].any()


def test_the_likelihood_of_bare_scores_is_a_choice():
    model = losing(lambda z, y: -F.nll_loss(z, y, reduction="none"))
    x, y = normal(3, 5).double(), torch.tensor([2, 0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LRP(model).attribute(x, additional_forward_args=y)
    expected = LRP(network(lambda z: z).double()).attribute(x, target=y)
    torch.testing.assert_close(found, expected)


AMBIGUOUS = {
    "smoothed": lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1),
    "weights": lambda z, y: F.cross_entropy(z, y, z.new_ones(3), reduction="none"),
    "soft labels": lambda z, y: F.cross_entropy(z, F.one_hot(y, 3).double(), reduction="none"),
    "mean of the batch": F.cross_entropy,
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(
        z[:, 0], (y > 0).double(), reduction="none"
    ),
    "binary of p": lambda z, y: F.binary_cross_entropy(
        z[:, 0].sigmoid(), (y > 0).double(), reduction="none"
    ),
    "by logsumexp": lambda z, y: z.logsumexp(1) - z.gather(1, y[:, None])[:, 0],
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_losses_of_several_classes_are_refused_with_the_advice_to_return_the_logits(name):
    x, y = normal(3, 5).double(), torch.tensor([2, 0, 1])
    binary, spelled = "binary" in name, "logsumexp" in name
    way = r"or \(1 - 2 \* y\) \* z" if binary else 'or the loss of .*reduction="none"'
    expected = rf"aten.* in the .*return the logits{'' if spelled else f', {way}'}"
    with pytest.raises(UnsupportedOperationError, match=expected):
        LRP(losing(AMBIGUOUS[name])).attribute(x, additional_forward_args=y)


def test_a_binary_loss_may_be_given_as_the_logit_or_minus_it():
    model = losing(lambda z, y: (1 - 2 * y) * z[:, 0])
    x, y = normal(3, 5).double(), torch.tensor([1.0, 0.0, 1.0]).double()
    found = LRP(model).attribute(x, additional_forward_args=y)
    expected = LRP(network(lambda z: z).double()).attribute(x, target=0)
    torch.testing.assert_close(found, (1 - 2 * y)[:, None] * expected)


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


@pytest.mark.filterwarnings("ignore::captum_mipin.errors.DataWarning")
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
        warnings.simplefilter("error", LogitsWarning)
        expected = METHODS[method](logits, x)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected)


EVERY = [
    Gradient, GuidedBackprop, Deconvnet, SmoothGrad, GradCAM, LRP, DeepTaylor, ExcitationBackprop,
    PatternNet, PatternAttribution, IBA, InputIBA, MIPINAttribution, InverseNetwork,
    NeighbourInverse, None,
]  # fmt: skip
GRADIENTS = EVERY[:5]
NAMED = {"softmax": lambda z: z.softmax(1), "sigmoid": torch.sigmoid, "softmax by hand": once}


@pytest.mark.parametrize("end", NAMED)
@pytest.mark.parametrize("method", EVERY)
def test_check_names_the_end_for_every_method(method, end):
    model = network(lambda z: NAMED[end](z).squeeze(-1))
    report = check(model, normal(4, 5), method=method)
    assert not report.refused
    (row,) = [row for row in report.rows if f"{end.split()[0]} ends" in row.note + row.caveat]
    explained = "its result is explained" if method in GRADIENTS else "the logits that go into it"
    assert explained in row.note + row.caveat
    rest = check(network(lambda z: z.squeeze(-1)), normal(4, 5), method=method).rows
    assert set(rest) <= set(report.rows)


@pytest.mark.parametrize("end", NAMED)
@pytest.mark.parametrize("method", GRADIENTS)
def test_gradients_say_that_they_are_those_of_the_probability(method, end):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model, x = nn.Sequential(body, Called(NAMED[end])).eval(), normal(3, 1, 4, 4)
    made = method(model, body[1]) if method is GradCAM else method(model)
    match = rf"the {end.split()[0]} ends the model: its result is explained.*explain the logits"
    with pytest.warns(LogitsWarning, match=match):
        found = made.attribute(x, target=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        torch.testing.assert_close(made.attribute(x, target=1), found)
        method(body, body[1]).attribute(x, 1) if method is GradCAM else method(body).attribute(x, 1)


def test_check_of_a_method_without_rules_names_what_it_refuses():
    model = network(lambda z: z.softmax(0) + (z > 0) * torch.rand(3))
    refused = check(model, normal(4, 5), method=SmoothGrad).refused
    assert [row.operation for row in refused] == ["aten.softmax.int", "aten.rand.default"]


def test_gradients_are_those_of_the_probability():
    """As those of Captum's Saliency."""
    model, x = network(torch.sigmoid), normal(3, 5).requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    with pytest.warns(LogitsWarning):
        torch.testing.assert_close(Gradient(model).attribute(x.detach(), target=1), expected)


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
