"""Activations: masks and gates by hand, and whatever way they are spelled."""

import math

import pytest
import torch
from rule_checks import alike, back, behaves
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork

GATES = {
    "relu": ((), lambda x: x > 0),
    "relu6": ((), lambda x: (x > 0) * min(1, 6 / abs(x))),
    "hardtanh": ((-2, 3), lambda x: min(1, 3 / x) if x > 0 else min(1, -2 / x)),
    "clamp": ((-1,), lambda x: 1 if x > 0 else min(1, -1 / x)),
    "clamp_max": ((2,), lambda x: 1 if x < 2 else 2 / x),
    "threshold": ((1, 0), lambda x: x > 1),
    "silu": ((), lambda x: 1 / (1 + math.exp(-x))),
    "gelu": ((), lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "hardswish": ((), lambda x: min(max(x + 3, 0), 6) / 6),
    "leaky_relu": ((0.1,), lambda x: 1 if x > 0 else 0.1),
    "elu": ((), lambda x: 1 if x > 0 else (math.exp(x) - 1) / x),
    "celu": ((2.0,), lambda x: 1 if x > 0 else 2 * (math.exp(x / 2) - 1) / x),
    "selu": (
        (),
        lambda x: 1.0507009873554805 * (1 if x > 0 else 1.6732632423543772 * (math.exp(x) - 1) / x),
    ),
    "rrelu": ((), lambda x: 1 if x > 0 else (1 / 8 + 1 / 3) / 2),
    "log_sigmoid": ((), lambda x: (math.log(2) - math.log1p(math.exp(-x))) / x),
    "mish": ((), lambda x: math.tanh(math.log1p(math.exp(x)))),
    "tanh": ((), lambda x: math.tanh(x) / x),
    "sigmoid": ((), lambda x: math.tanh(x / 2) / (2 * x)),
    "hardsigmoid": ((), lambda x: min(abs(x), 3) / (6 * abs(x))),
    "softplus": ((), lambda x: (math.log1p(math.exp(x)) - math.log(2)) / x),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_are_the_share_let_through(name):
    arguments, gate = GATES[name]
    x = torch.tensor([-7.0, -2.5, -0.3, -1e-9, 1e-9, 0.4, 2.9, 8.0], dtype=torch.float64)
    expected = torch.tensor([float(gate(v)) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(back(name, x, *arguments), expected, rtol=1e-6, atol=1e-12)
    assert back(name, torch.zeros(2), *arguments).abs().max() == 0  # what is 0 carries nothing
    assert torch.equal(
        back(name, x, *arguments, local=False), torch.ones_like(x)
    )  # the global view has no gates


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "hardsigmoid"])
def test_gates_of_what_is_not_zero_at_zero_do_not_cancel(name):
    small = torch.tensor([1e-6, -1e-5, 1e-4])
    arguments, gate = GATES[name]
    torch.testing.assert_close(
        back(name, small, *arguments),
        torch.tensor([gate(v) for v in small.tolist()]),
        rtol=1e-4,
        atol=0,
    )


SPELLINGS = {
    "ReLU": (
        F.relu,
        lambda x: F.threshold(x, 0, 0),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.where(x <= 0, 0.0, x),
        lambda x: x * (x > 0),
        lambda x: x.masked_fill(torch.logical_not(x > 0), 0.0),
        lambda x: -(-x).clamp_max(0).mul(-1).neg(),
    ),
    "ReLU6": (
        F.relu6,
        nn.ReLU6(),
        lambda x: x.clamp(0, 6),
        lambda x: F.hardtanh(x, 0, 6),
        lambda x: x.clamp(min=0, max=6),
    ),
    "SiLU": (
        F.silu,
        nn.SiLU(inplace=True),
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.sigmoid(x) * x,
    ),
    "Hardswish": (F.hardswish, nn.Hardswish(inplace=True), lambda x: x * F.hardsigmoid(x)),
    "LeakyReLU": (F.leaky_relu, nn.LeakyReLU(inplace=True), nn.PReLU(init=0.01)),
    "GELU": (
        F.gelu,
        nn.GELU(),
        lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    ),
    "Mish": (F.mish, lambda x: x * torch.tanh(F.softplus(x)), lambda x: F.softplus(x).tanh() * x),
    "Hardswish by clamp": (F.hardswish, lambda x: x * F.relu6(x + 3) / 6),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_spelling_of_an_activation_does_not_matter(kind):
    torch.manual_seed(0)
    first, last, x = nn.Linear(5, 8), nn.Linear(8, 2), 3 * torch.randn(60, 5, dtype=torch.float64)
    result = []
    for spelling in SPELLINGS[kind]:

        def run(m, x, f=spelling):
            return m["last"](f(m["first"](x)))

        modules = {"act": spelling} if isinstance(spelling, nn.Module) else {}
        model = Function(run, first=first, last=last, **modules).double().eval()
        result.append(
            InverseNetwork(model).fit(x, targets=1, progress=False).source_signal(x[:7], target=1)
        )
    for other in result[1:]:
        torch.testing.assert_close(other, result[0], rtol=1e-9, atol=1e-9)


ACTIVATIONS = [
    nn.ReLU6(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Hardswish(),
    nn.ELU(),
    nn.CELU(),
    nn.SELU(),
    nn.LeakyReLU(),
    nn.PReLU(5),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Hardsigmoid(),
    nn.Softplus(),
    nn.Mish(),
    nn.LogSigmoid(),
    nn.Hardtanh(),
    nn.RReLU(),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_networks_of_every_activation(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 2)).double().eval()
    x = torch.randn(50, 4, dtype=torch.float64)
    behaves(model, x)


@pytest.mark.parametrize(
    "made",
    [
        torch.sigmoid,
        F.hardsigmoid,
        lambda u: 1 - torch.sigmoid(u),
        lambda u: 2 * torch.sigmoid(u),
        lambda u: torch.sigmoid(u) + 0.3,
        lambda u: -torch.sigmoid(u) / 3 - torch.ones(3, dtype=u.dtype),
        lambda u: torch.ones(3, dtype=u.dtype) - torch.sigmoid(u),
        lambda u: 0.5 * (u > u.abs().square()).double() + 1,
    ],
)
def test_gate_of_squeeze_and_excite_by_hand(made):
    """For y = w · (x ⊙ g), g = σ(U x): x ⊙ g regressed on y, times g, times a factor a feature."""
    torch.manual_seed(0)
    model = (
        Function(lambda m, x: m["w"](x * made(m["u"](x))), w=nn.Linear(3, 1), u=nn.Linear(3, 3))
        .double()
        .eval()
    )
    x = torch.randn(40, 3, dtype=torch.float64)
    inverse = InverseNetwork(model, ridge=0).fit(x, progress=False)

    def regress(x, s):
        slope = ((x - x.mean(0)) * (s - s.mean(0))).sum(0) / (s - s.mean(0)).square().sum(0)
        return slope * s + x.mean(0) - slope * s.mean(0)

    with torch.no_grad():
        gate = made(model.layers["u"](x))
        above = regress(x * gate, model(x))
    torch.testing.assert_close(inverse.source_signal(x), regress(x, above * gate))
    assert [row.layer for row in inverse.report.layers] == [
        "layers.w/linear",
        "input inputs_0/input/fork",
    ]  # the gate is not inverted


@pytest.mark.parametrize("how", [lambda x, u: x * (u > 0), lambda x, u: torch.where(u > 0, x, 0)])
def test_a_mask_is_a_switch_by_hand(how):
    """For y = w · (x ⊙ m), m = 1[U x > 0]: x ⊙ m regressed on y, where m = 1, else 0."""
    torch.manual_seed(0)
    layers = {"w": nn.Linear(3, 1), "u": nn.Linear(3, 3)}
    model = Function(lambda m, x: m["w"](how(x, m["u"](x))), **layers).double().eval()
    x = torch.randn(40, 3, dtype=torch.float64)
    inverse = InverseNetwork(model, ridge=0).fit(x, progress=False)
    with torch.no_grad():
        mask, s = model.layers["u"](x) > 0, model(x)
    kept = x * mask
    slope = ((kept - kept.mean(0)) * (s - s.mean())).sum(0) / (s - s.mean()).square().sum()
    above = slope * (s - s.mean()) + kept.mean(0)
    torch.testing.assert_close(inverse.source_signal(x), above * mask)
    assert [row.layer for row in inverse.report.layers] == ["layers.w/linear"]


@pytest.mark.parametrize("target", [0, 1])
def test_an_input_that_gates_itself_beside_another_input(target):
    class Pair(nn.Module):
        def __init__(self, gated):
            super().__init__()
            self.gated, self.v, self.w = gated, nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, *inputs):
            a, b = inputs[self.gated], inputs[1 - self.gated]
            return self.v(a * torch.sigmoid(a)) + self.w(b)

    first, second = Pair(0).double().eval(), Pair(1).double().eval()
    second.load_state_dict(first.state_dict())
    a, b = torch.randn(2, 30, 3, dtype=torch.float64)
    result = InverseNetwork(first).fit((a, b), target, progress=False).source_signal((a, b), target)
    turned = (
        InverseNetwork(second).fit((b, a), target, progress=False).source_signal((b, a), target)
    )
    torch.testing.assert_close(result, turned[::-1])


def test_what_makes_a_gate_gets_no_signal():
    """The attribution is that of the gate's recorded value, whatever made it."""
    torch.manual_seed(0)
    u, w = nn.Linear(4, 4), nn.Linear(4, 2)
    deep = nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 4))
    with torch.no_grad():
        deep[2].weight.zero_()
        deep[2].bias.copy_(torch.randn(4))
        u.weight.zero_()
        u.bias.copy_(deep[2].bias)
    x = torch.randn(30, 4)
    one, two = (
        InverseNetwork(
            Function(lambda m, x: m["w"](torch.sigmoid(m["u"](x)) * x), w=w, u=made).eval()
        ).fit(x, progress=False)
        for made in (u, deep)
    )
    assert torch.equal(one.source_signal(x, target=1), two.source_signal(x, target=1))


def test_glu_is_the_product_with_its_gate():
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)
    for dim, shape in ((1, (-1, 6)), (-1, (-1, 3, 2)), (2, (-1, 3, 2))):
        alike(
            x,
            lambda m, x, d=dim, s=shape: m["last"](F.glu(m["first"](x).view(s), d).flatten(1)),
            lambda m, x, d=dim, s=shape: m["last"](
                (lambda a, b: a * torch.sigmoid(b))(*m["first"](x).view(s).chunk(2, d)).flatten(1)
            ),
            first=nn.Linear(4, 6),
            last=nn.Linear(3, 2),
        )
