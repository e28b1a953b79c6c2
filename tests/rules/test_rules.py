"""Each rule against its own derivation, then whole networks that need them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import regress
from small import Function
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.googlenet import Inception
from torchvision.models.inception import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, MIPINError, check
from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.graph.layout import Layout
from captum_mipin.rules import MIPIN, Options

pytestmark = pytest.mark.usefixtures("captured_once")


def back(name, x, *arguments, local=True, **named):
    """The rule's value, and what it sends back for a signal of ones."""
    operation = getattr(torch.ops.aten, name).default
    value, send = MIPIN[f"aten.{name}.default"].run(
        Options(local=local), operation, x, *arguments, **named
    )
    assert torch.equal(value, operation(x, *arguments, **named))
    return send(torch.ones_like(value))


# ------------------------------------------------------------------------------------------------- activations

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
        lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_spelling_of_an_activation_does_not_matter(kind):
    torch.manual_seed(0)
    first, last, x = nn.Linear(5, 8), nn.Linear(8, 2), 3 * torch.randn(60, 5, dtype=torch.float64)
    found = []
    for spelling in SPELLINGS[kind]:

        def run(m, x, f=spelling):
            return m["last"](f(m["first"](x)))

        modules = {"act": spelling} if isinstance(spelling, nn.Module) else {}
        model = Function(run, first=first, last=last, **modules).double().eval()
        if kind == "GELU" and spelling is SPELLINGS[kind][-1]:
            assert not check(model, x).ok  # neither factor is a gate: refused, not guessed
            continue
        found.append(
            InverseNetwork(model).fit(x, targets=1, progress=False).source_signal(x[:7], target=1)
        )
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


ACTIVATIONS = [
    nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardswish(), nn.ELU(), nn.CELU(), nn.SELU(), nn.LeakyReLU(),
    nn.PReLU(5), nn.Tanh(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Softplus(), nn.Mish(), nn.LogSigmoid(), nn.Hardtanh(),
    nn.RReLU(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_networks_of_every_activation(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 2)).double().eval()
    x = torch.randn(50, 4, dtype=torch.float64)
    behaves(model, x)


def behaves(model, x, targets=(0, 1)):
    """S is finite and A linear in the logit; a batch of mixed targets equals one by one; chunks do not matter."""
    inverse = InverseNetwork(model).fit(x, targets=list(targets), progress=False)
    parts = InverseNetwork(model).fit(list(x.split(7)), targets=list(targets), progress=False)
    few = x[:4]
    mixed = [targets[0], targets[1], targets[1], targets[0]]
    found = inverse.explain((few,), mixed, biases=(True,))
    ((s,),) = found.signals
    assert torch.isfinite(s).all()
    assert s.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(found.output, model(few)[range(4), mixed])
    close = {"rtol": 1e-6, "atol": 1e-6 * float(s.abs().max())}
    for i, target in enumerate(mixed):
        torch.testing.assert_close(
            inverse.source_signal(few[i : i + 1], target=target)[0], s[i], **close
        )
    torch.testing.assert_close(
        parts.source_signal(few, target=mixed), s, rtol=1e-5, atol=1e-5 * float(s.abs().max())
    )
    return inverse


# ------------------------------------------------------------------------------------------------- gates, norms


@pytest.mark.parametrize("made", [
    torch.sigmoid, F.hardsigmoid, lambda u: 1 - torch.sigmoid(u), lambda u: 2 * torch.sigmoid(u),
    lambda u: torch.sigmoid(u) + 0.3, lambda u: -torch.sigmoid(u) / 3 - torch.ones(3, dtype=u.dtype),
    lambda u: torch.ones(3, dtype=u.dtype) - torch.sigmoid(u),
    lambda u: u > 0, lambda u: 0.5 * (u > u.abs().square()).double() + 1,
])  # fmt: skip
def test_gate_of_squeeze_and_excite_by_hand(made):
    """For y = w · (x ⊙ σ(U x)): regression of x ⊙ g on y, times g, then one factor a feature; all without ridge."""
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
    found = InverseNetwork(first).fit((a, b), target, progress=False).source_signal((a, b), target)
    turned = (
        InverseNetwork(second).fit((b, a), target, progress=False).source_signal((b, a), target)
    )
    torch.testing.assert_close(found, turned[::-1])


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


@pytest.mark.parametrize("shape, module, dims", [
    ((6, 5), nn.LayerNorm(5), (1,)),
    ((6, 4, 5), nn.LayerNorm([4, 5], elementwise_affine=False), (1, 2)),
    ((6, 4, 3, 3), nn.GroupNorm(1, 4), (1, 2, 3)),
])  # fmt: skip
def test_norms_restore_the_deviation_they_divided_by(shape, module, dims):
    x = 3 * torch.randn(*shape, dtype=torch.float64) + 1
    x[0] /= 1e3  # so small that ε counts
    if isinstance(module, nn.GroupNorm):
        sent = back("group_norm", x, 1, None, None, 1e-5)
    else:
        sent = back("layer_norm", x, list(module.normalized_shape), None, None, 1e-5)
    torch.testing.assert_close(sent * module.double()(x), x - x.mean(dims, keepdim=True))


def test_rms_norm_restores_the_root_mean_square_it_divided_by():
    x = 3 * torch.randn(6, 4, 5, dtype=torch.float64) + 1
    sent = back("rms_norm", x, [4, 5], torch.rand(4, 5, dtype=torch.float64), None)
    torch.testing.assert_close(sent, (x**2).mean((1, 2), keepdim=True).sqrt().expand(6, 4, 5))
    torch.testing.assert_close(
        back("rms_norm", x, [5], None, 2.0) * torch.rms_norm(x, [5], eps=2.0), x
    )


def test_instance_norm_is_group_norm_of_single_channels_or_batch_norm():
    torch.manual_seed(0)
    x, first, last = (
        torch.randn(40, 2, 7, dtype=torch.float64),
        nn.Conv1d(2, 4, 2),
        nn.Linear(24, 2),
    )
    kept = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    kept.running_mean.normal_()
    kept.running_var.uniform_(0.5, 2)
    batch = nn.BatchNorm1d(4)
    batch.load_state_dict(kept.state_dict())
    for norm, other in ((nn.InstanceNorm1d(4), nn.GroupNorm(4, 4, affine=False)), (kept, batch)):
        one, two = (
            InverseNetwork(
                nn.Sequential(first, n, nn.ReLU(), nn.Flatten(), last).double().eval()
            ).fit(x, 1, progress=False)
            for n in (norm, other)
        )
        torch.testing.assert_close(one.source_signal(x[:5], 1), two.source_signal(x[:5], 1))


def test_group_norm_group_by_group():
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    sent = back("group_norm", x, 2, None, None, 0.0)
    torch.testing.assert_close(
        sent[:, 2:], x[:, 2:].std((1, 2), correction=0, keepdim=True).expand(2, 2, 3)
    )
    restored = back("group_norm", x, 2, None, None, 3.0) * torch.group_norm(x, 2, eps=3.0)
    torch.testing.assert_close(restored[:, :2], x[:, :2] - x[:, :2].mean((1, 2), keepdim=True))


# ------------------------------------------------------------------------------------------------- switches, products


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


def test_where_sends_each_signal_to_where_the_value_came_from_by_hand():
    """For y = w · (U a where a_0 > 0, else V b), without ridge: regression on y, then each part on its share of the signal."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.v, self.w = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, a, b):
            return self.w(torch.where(a[:, :1] > 0, self.u(a), self.v(b)))

    torch.manual_seed(0)
    model, a, b = Pair().double().eval(), torch.randn(60, 3).double(), torch.randn(60, 2).double()
    found = InverseNetwork(model, ridge=0).fit((a, b), progress=False).source_signal((a, b))
    here = (a[:, :1] > 0).numpy()
    with torch.no_grad():
        h, y = torch.where(a[:, :1] > 0, model.u(a), model.v(b)).numpy(), model(a, b).numpy()
    weight, bias = regress(h, y, 0)
    above = y @ weight.T + bias
    for x, signal, s in ((a, above * here, found[0]), (b, above * ~here, found[1])):
        weight, bias = regress(x.numpy(), signal, 0)
        torch.testing.assert_close(
            s, torch.as_tensor(signal @ weight.T + bias), rtol=1e-6, atol=1e-6
        )


def test_maximum_is_a_switch_as_pooling_is():
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)

    def maxout(how):
        return lambda m, x: m["last"](how(*m["first"](x).chunk(2, 1)))

    alike(
        x,
        maxout(lambda a, b: F.max_pool1d(torch.stack([a, b], 2), 2).squeeze(2)),
        *map(maxout, (torch.maximum, torch.max, lambda a, b: torch.where(a > b, a, b), lambda a, b: -torch.minimum(-a, -b))),
        maxout(lambda a, b: -torch.min(-b, -a)),
        first=nn.Linear(4, 6), last=nn.Linear(3, 2),
    )  # fmt: skip


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
            first=nn.Linear(4, 6), last=nn.Linear(3, 2),
        )  # fmt: skip


def test_products_with_constant_matrices_are_dense_layers():
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)
    alike(
        x,
        lambda m, x: m["last"](F.linear(x, m["first"].weight).relu()),
        lambda m, x: m["last"](torch.mm(x, m["first"].weight.t()).relu()),
        first=nn.Linear(4, 5), last=nn.Linear(5, 2),
    )  # fmt: skip
    alike(
        x,
        lambda m, x: m["last"](m["first"](x).relu()),
        lambda m, x: m["last"](torch.addmm(m["first"].bias, x, m["first"].weight.t()).relu()),
        lambda m, x: m["last"](torch.addmm(m["first"].bias, x, m["first"].weight.t() / 2, alpha=2).relu()),
        first=nn.Linear(4, 5), last=nn.Linear(5, 2),
    )  # fmt: skip


NOT_TREATED = {
    "square": (torch.square, r"aten\.square\.default .*no rule covers it"),
    "power": (lambda h: h**3, r"aten\.pow\.Tensor_Scalar .*no rule covers it"),
    "exp": (torch.exp, r"aten\.exp\.default .*no rule covers it"),
    "abs": (torch.abs, r"aten\.abs\.default .*no rule covers it"),
    "product": (lambda h: h * h, "multiplies two values that both depend on the input"),
    "ratio of gates": (
        lambda h: h * (1 / torch.sigmoid(h)),
        r"no rule covers it|multiplies two values",
    ),
    "constant by a gate": (
        lambda h: h * (torch.ones(()) / torch.sigmoid(h)),
        "divides by a value that depends on the input",
    ),
    "maximum with a constant": (
        lambda h: torch.maximum(h, torch.zeros(5)),
        "compares with a constant.*use clamp, or relu",
    ),
    "minimum with a constant": (
        lambda h: torch.min(torch.ones(5), h),
        "compares with a constant.*use clamp, or relu",
    ),
    "clamp_max below zero": (
        lambda h: torch.clamp_max(h, -1),
        "clamp_max to -1 is no activation: it does not let 0 through",
    ),
    "threshold that lifts": (
        lambda h: F.threshold(h, 1, 5),
        "threshold at 1 is no activation: it makes 5 of 0",
    ),
    "constant matrix": (
        lambda h: (torch.ones(5, 5) @ h.t()).t(),
        "multiplies by a constant matrix, .*: use nn.Linear",
    ),
    "matrix of the input": (
        lambda h: torch.mm(h[:, :5], h.t() @ h),
        "works along the batch|depends on the input as well",
    ),
    "baddbmm of three signals": (
        lambda h: torch.baddbmm(h[:, None], h[:, None, :1], h[:, None]).squeeze(1),
        "not just one is a softmax",
    ),
    "glu of the batch": (lambda h: torch.cat([F.glu(torch.cat([h, h], 0), 0)], 1), "batch"),
    "a choice of constants": (
        lambda h: h + torch.where(h > 0, torch.ones(5), torch.zeros(5)),
        "chooses between constants",
    ),
    "a comparison alone": (lambda h: (h > 0).float(), r"turns the input into torch\.bool"),
}


@pytest.mark.parametrize("name", NOT_TREATED)
def test_what_is_not_treated_is_refused_by_name(name):
    step, message = NOT_TREATED[name]
    model = Function(
        lambda m, x: m["last"](step(m["first"](x))), first=nn.Linear(4, 5), last=nn.Linear(5, 2)
    ).eval()
    with pytest.raises(MIPINError, match=message):
        InverseNetwork(model).fit(torch.randn(20, 4), 1, progress=False)


# ------------------------------------------------------------------------------------------------- attention


def attention_by(how):
    def run(m, x):
        q, k, v = m["qkv"](x).chunk(3, -1)
        if how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif how == "matmul":
            y = torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v
        elif how == "einsum":
            y = torch.einsum(
                "nij,njc->nic", F.softmax(torch.einsum("nic,njc->nij", q, k) / 2, -1), v
            )
        elif how == "baddbmm":
            y = (
                torch.baddbmm(
                    torch.zeros((), dtype=x.dtype),
                    F.softmax(torch.bmm(q, k.mT) / 2, -1),
                    v,
                    alpha=3,
                )
                / 3
            )
        elif how == "scaled by constants":
            y = (
                (2 * torch.softmax(torch.baddbmm(x.new_ones(1, 1, 1), q, k.mT, alpha=0.5), -1))
                @ v
                / 2
            )
        elif how == "bmm":
            y = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, 2), v)
        else:  # examples second, as nn.MultiheadAttention has them
            q, k, v = (t.transpose(0, 1).reshape(5, -1, 4).transpose(0, 1) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(-1, 4)
            return m["last"](m["out"](y).view(5, -1, 4).transpose(0, 1).mean(1))
        return m["last"](m["out"](y).mean(1))

    return run


def test_spelling_of_attention_does_not_matter():
    torch.manual_seed(0)
    parts = {"qkv": nn.Linear(4, 12), "out": nn.Linear(4, 4), "last": nn.Linear(4, 2)}
    x = torch.randn(40, 5, 4, dtype=torch.float64)
    signals = []
    for how in (
        "fused",
        "matmul",
        "einsum",
        "bmm",
        "baddbmm",
        "scaled by constants",
        "examples second",
    ):
        model = Function(attention_by(how), **parts).double().eval()
        signals.append(behaves(model, x).source_signal(x[:6], target=[0, 1, 0, 1, 1, 0]))
    for other in signals[1:]:
        torch.testing.assert_close(other, signals[0], rtol=1e-8, atol=1e-10)


def test_what_is_added_to_attention_gets_signal_also_where_a_sigmoid_made_it():
    torch.manual_seed(0)

    def run(how):
        def attend(m, x):
            q, k, v = m["qkv"](x).chunk(3, -1)
            return m["last"](how(torch.sigmoid(q), torch.softmax(q @ k.mT, -1), v).mean(1))

        return attend

    alike(
        torch.randn(40, 5, 4, dtype=torch.float64),
        run(lambda g, p, v: g + p @ v), run(torch.baddbmm), run(lambda g, p, v: torch.baddbmm(g, p, v, beta=1.0)),
        qkv=nn.Linear(4, 12), last=nn.Linear(4, 2),
    )  # fmt: skip


def test_attention_sends_each_value_its_recorded_weight_by_hand():
    """For P v with P from the sample: each token's value gets Pᵀ s, then one factor a channel; queries and keys nothing."""
    torch.manual_seed(0)
    model = (
        Function(
            lambda m, x: m["last"](F.scaled_dot_product_attention(x, x, x).flatten(1)),
            last=nn.Linear(6, 1),
        )
        .double()
        .eval()
    )
    x = torch.randn(50, 3, 2, dtype=torch.float64)
    inverse = InverseNetwork(model, ridge=0).fit(x, progress=False)
    with torch.no_grad():
        weights = torch.softmax(x @ x.mT / math.sqrt(2), -1)
        y, h = model(x), (weights @ x).flatten(1)
        slope = ((h - h.mean(0)) * (y - y.mean())).sum(0) / (y - y.mean()).square().sum()
        s = weights.mT @ (slope * (y - y.mean()) + h.mean(0)).view(50, 3, 2)
    mean_x, mean_s = x.mean((0, 1)), s.mean((0, 1))
    factor = ((x - mean_x) * (s - mean_s)).sum((0, 1)) / (s - mean_s).square().sum((0, 1))
    torch.testing.assert_close(inverse.source_signal(x), factor * (s - mean_s) + mean_x)


@pytest.mark.parametrize("first", [True, False])
def test_multihead_attention_module(first):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=first)
            self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            h = x if first else x.transpose(0, 1)
            h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
            return self.last(h[:, 0] if first else h[0])

    torch.manual_seed(0)
    behaves(Encoder().double().eval(), torch.randn(30, 5, 8, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------- recurrent layers


class Recurrent(nn.Module):
    def __init__(self, kind, first=True, **options):
        super().__init__()
        self.first = first
        self.layer = kind(4, 3, batch_first=first, **options)
        self.last = nn.Linear(6 if options.get("bidirectional") else 3, 2)

    def forward(self, x):
        y, _ = self.layer(x if self.first else x.transpose(0, 1))
        return self.last(y[:, -1] if self.first else y[-1])


@pytest.mark.parametrize("layer", [
    (nn.LSTM, True, {}), (nn.LSTM, False, {}), (nn.LSTM, True, {"num_layers": 2, "bidirectional": True}), (nn.GRU, True, {}),
    (nn.GRU, False, {"bidirectional": True}), (nn.RNN, True, {}), (nn.RNN, True, {"nonlinearity": "relu"}),
], ids=str)  # fmt: skip
def test_recurrent_networks(layer, recwarn):
    torch.manual_seed(0)
    kind, first, options = layer
    behaves(
        Recurrent(kind, first, **options).double().eval(),
        torch.randn(40, 4, 4, dtype=torch.float64),
    )
    assert not recwarn.list


def test_lstm_equals_its_steps_written_out():
    class Steps(nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.whole = whole

        def forward(self, x):
            layer = self.whole.layer
            inputs = F.linear(x.transpose(0, 1), layer.weight_ih_l0, layer.bias_ih_l0)
            h = c = x.new_zeros(1, x.shape[0], 3)
            outputs = []
            for step in inputs.split(1):
                i, f, g, o = (F.linear(h, layer.weight_hh_l0, layer.bias_hh_l0) + step).chunk(4, 2)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                outputs.append(h)
            return self.whole.last(torch.cat(outputs).transpose(0, 1)[:, -1])

    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM).double().eval(), torch.randn(40, 4, 4, dtype=torch.float64)
    whole, steps = (
        InverseNetwork(m).fit(x, targets=1, progress=False).source_signal(x[:5], target=1)
        for m in (model, Steps(model).eval())
    )
    torch.testing.assert_close(whole, steps, rtol=1e-8, atol=1e-8)


def test_cells_and_complements_of_gates():
    """A GRU as its papers write it, h = (1 − z) h + z n: 1 − z is a gate as z is."""
    torch.manual_seed(0)

    def two_steps(m, x):
        h = m["cell"](x[:, 1], m["cell"](x[:, 0]))
        return m["last"](h[0] if isinstance(h, tuple) else h)

    for cell in (nn.GRUCell(4, 3), nn.LSTMCell(4, 3), nn.RNNCell(4, 3)):
        model = Function(two_steps, cell=cell, last=nn.Linear(3, 2)).double().eval()
        behaves(model, torch.randn(40, 2, 4, dtype=torch.float64))

    def written(m, x):
        z = torch.sigmoid(m["z"](x))
        return m["last"]((1 - z) * m["h"](x) + z * torch.tanh(m["n"](x)))

    parts = {name: nn.Linear(4, 3) for name in "zhn"}
    behaves(
        Function(written, last=nn.Linear(3, 2), **parts).double().eval(),
        torch.randn(40, 4, dtype=torch.float64),
    )


# ------------------------------------------------------------------------------------------------- batch layouts


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(0, 2), st.data())
@settings(deadline=None, max_examples=40)
def test_parts_of_a_layout_are_the_examples(outer, inner, count, dim, data):
    shape = [2, 3]
    shape.insert(dim, count)
    base = torch.arange(count).view([count if i == dim else 1 for i in range(3)]).expand(shape)
    folded = torch.stack([torch.stack([base] * inner, dim + 1)] * outer, dim).flatten(dim, dim + 2)
    layout = Layout(dim, outer, inner)
    cut = data.draw(st.integers(1, count - 1))
    parts = [layout.part(folded, slice(0, cut)), layout.part(folded, slice(cut, count))]
    assert parts[0].max() == cut - 1
    assert parts[1].min() == cut
    assert torch.equal(layout.join(parts), folded)


class Mixing(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)
        self.t, self.u, self.r = nn.Linear(3, 4), nn.Linear(4, 2), nn.ReLU()

    def forward(self, x):
        return self.run(self, x)


MIXING = {
    "maximum in a gate": lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(m.b(x) - m.b(x).max(0, keepdim=True).values)),
    "sort in a gate": lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(torch.sort(m.b(x), 0).values)),
    "cummax in a gate": lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(m.b(x).cummax(0).values)),
    "parts of the batch in a gate": lambda m, x: m.o(
        m.r(m.a(x)) * torch.sigmoid(torch.cat(m.t(x.view(-1, 2, 3)).reshape(-1, 4).chunk(2, 0), 1))
    ),
    "shifted": lambda m, x: m.o(F.pad(m.r(m.a(x)), (0, 0, 1, -1))),
    "shifted in a gate": lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(F.pad(m.b(x), (0, 0, 1, -1)))),
    "shifted flat": lambda m, x: m.o(F.pad(m.r(m.a(x)).reshape(-1), (8, -8)).reshape(-1, 8)),
    "size as a float": lambda m, x: m.o(m.r(m.a(x)) * (1 / x.shape[0])),
    "root of the size": lambda m, x: m.o(m.r(m.a(x)) * x.shape[0] ** 0.5),
    "filled with the size": lambda m, x: m.o(m.r(m.a(x)) * x.new_full((1,), x.shape[0])),
    "sum of ones": lambda m, x: m.o(m.r(m.a(x)) * torch.ones_like(m.a(x)).sum(0)),
    "position": lambda m, x: m.o(m.r(m.a(x)) * torch.arange(x.shape[0])[:, None].double()),
    "counted": lambda m, x: m.o(m.r(m.a(x)) + torch.ones_like(m.a(x)).cumsum(0)),
    "ones times batch": lambda m, x: m.o(
        m.r(m.a(x)) * torch.sigmoid((x.new_ones(x.shape[0], 1, x.shape[0]) @ m.b(x)).squeeze(1))
    ),
    "linear over the batch": lambda m, x: m.o(
        m.r(m.a(x)) * torch.sigmoid(F.linear(x.new_ones(x.shape[0], x.shape[0]), m.b(x).t()))
    ),
    "dropout in attention": lambda m, x: m.o(
        F.scaled_dot_product_attention(*(h.view(-1, 2, 4) for h in (m.b(x), m.b(x), m.a(x))), dropout_p=0.3).flatten(1)
    ),
    "noise": lambda m, x: m.o(m.r(m.a(x)) * torch.randn(x.shape[0], 8, dtype=x.dtype)),
    "folded output": lambda m, x: m.u(m.r(m.t(x.view(-1, 3)))),
    "unfolded output": lambda m, x: m.u(m.r(m.t(x.view(-1, 2, 3)))).reshape(-1, 2),
    "flat output": lambda m, x: m.o(m.r(m.a(x))).flatten(),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_examples_that_depend_on_each_other_are_refused(name):
    torch.manual_seed(0)
    model = Mixing(MIXING[name]).double().eval()
    with pytest.raises(MIPINError, match=r"batch|no rule covers|random"):
        InverseNetwork(model).fit(
            torch.randn(24, 6, dtype=torch.float64), targets=[0, 1], progress=False
        )


@pytest.mark.parametrize(
    ("name", "operation", "reason"),
    [
        ("maximum in a gate", "aten.max.dim", "no rule covers it"),
        ("sort in a gate", "aten.sort.default", "no rule covers it"),
        ("parts of the batch in a gate", "aten.chunk.default", "works along the batch"),
        ("shifted", "aten.pad.default", "works along the batch"),
        ("shifted in a gate", "aten.pad.default", "works along the batch"),
        ("shifted flat", "aten.pad.default", "works along the batch"),
        ("size as a float", "aten.mul.Tensor", "uses the size of the batch as a value"),
        ("root of the size", "aten.mul.Tensor", "uses the size of the batch as a value"),
        ("dropout in attention", "aten.scaled_dot_product_attention.default", "it is random"),
    ],
)
def test_check_names_what_mixes_examples(name, operation, reason):
    torch.manual_seed(0)
    refused = check(
        Mixing(MIXING[name]).double().eval(), torch.randn(4, 6, dtype=torch.float64)
    ).refused
    assert (operation, True) in [(row.operation, reason in row.note) for row in refused]


@pytest.mark.parametrize("run", [
    lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(m.b(x)).flip(0)),
    lambda m, x: m.o(m.r(m.a(x)) + m.b(x).cumsum(0)),
    lambda m, x: m.o(m.r(m.a(x.flip(0)))),
])  # fmt: skip
def test_what_mixes_beside_or_before_the_layer_is_refused(run):
    torch.manual_seed(0)
    model = Mixing(run).double().eval()
    with pytest.raises(MIPINError, match="batch"):
        InverseNetwork(model, layer=model.r).fit(
            torch.randn(24, 6, dtype=torch.float64), targets=[0, 1], progress=False
        )


def test_what_reads_the_batch_is_refused_also_where_batches_begin_with_one_example():
    torch.manual_seed(0)
    model = Mixing(MIXING["sum of ones"]).double().eval()
    with pytest.raises(MIPINError, match="other examples of its batch"):
        InverseNetwork(model).fit(
            list(torch.randn(24, 6, dtype=torch.float64).split(1)), targets=0, progress=False
        )


SPELLED = {
    "batch last": (
        lambda m, x: m.o((m.a(x).t() + m.r(m.a(x).t())).t()),
        lambda m, x: m.o(m.a(x) + m.r(m.a(x))),
    ),
    "folded": (
        lambda m, x: (lambda h: m.o((h + m.r(h)).flatten(1)))(m.t(x.view(-1, 2, 3))),
        lambda m, x: (lambda h: m.o((h + m.r(h)).reshape(-1, 8)))(
            m.t(x.view(-1, 2, 3)).reshape(-1, 4)
        ),
    ),
    "matmul": (
        lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(x @ m.b.weight.t())),
        lambda m, x: m.o(m.r(m.a(x)) * torch.sigmoid(F.linear(x, m.b.weight))),
    ),
}


@pytest.mark.parametrize("name", SPELLED)
def test_spelling_of_shapes_does_not_matter(name):
    torch.manual_seed(0)
    x, model = torch.randn(30, 6, dtype=torch.float64), Mixing(None).double().eval()
    found = []
    for run in SPELLED[name]:
        model.run = run
        found.append(behaves(model, x).source_signal(x[:5], target=1))
    torch.testing.assert_close(found[0], found[1])


# ------------------------------------------------------------------------------------------------- networks


def headed(channels, *blocks):
    """Blocks between a stem and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 4),
    )


def narrow(make):
    """A network of torchvision with a sixteenth of its channels."""

    def fewer(count):
        return count if count in (3, 4) else max(count // 16, 1)  # colours and classes stay

    with torch.device("meta"):
        model = make(num_classes=4)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            geometry = module.kernel_size, module.stride, module.padding
            module = nn.Conv2d(fewer(module.in_channels), fewer(module.out_channels), *geometry)
        elif isinstance(module, nn.BatchNorm2d):
            module = nn.BatchNorm2d(fewer(module.num_features))
        elif isinstance(module, nn.Linear):
            module = nn.Linear(fewer(module.in_features), fewer(module.out_features))
        model.set_submodule(path, module) if path else None
    return model


def inception(channels, *blocks):
    """Blocks of Inception v3 with a sixteenth of their channels."""

    def fewer(channels, out, **options):
        return BasicConv2d(channels // 16, out // 16, **options)

    stem = [nn.Conv2d(3, channels // 16, 3, 2), nn.ReLU()]
    return nn.Sequential(
        *stem, *(block(*arguments, conv_block=fewer) for block, *arguments in blocks),
        nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(2048 // 16, 4),
    )  # fmt: skip


class Sequence(nn.Module):
    """A recurrent classifier."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embed, self.layer = (
            nn.Sequential(nn.Linear(3, 5), nn.ReLU()),
            kind(5, 4, batch_first=True, **options),
        )
        self.last = nn.Linear(8 if options.get("bidirectional") else 4, 4)

    def forward(self, x):
        return self.last(self.layer(self.embed(x.transpose(1, 2)))[0][:, -1])


def conv1d():
    return nn.Sequential(
        nn.Conv1d(3, 6, 5, 2), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 8, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def swin(**options):
    return models.SwinTransformer([4, 4], 8, [2, 1], [2, 2], [2, 2], num_classes=4, **options)


#: Family → a small network of it, a module to explain it at, and the size of its inputs where it is not 32 × 32.
NETWORKS = {
    "AlexNet": (lambda: narrow(models.alexnet), "features.5", (64, 64)),
    "VGG": (lambda: narrow(models.vgg11), "features"),
    "VGG with batch norm": (lambda: narrow(models.vgg11_bn), "features"),
    "ResNet": (lambda: headed(8, models.resnet.BasicBlock(8, 8), nn.MaxPool2d(3, 2, 1), models.resnet.BasicBlock(8, 8)), "1"),
    "ResNeXt": (lambda: headed(8, models.resnet.Bottleneck(8, 2, groups=2, base_width=128)), "1"),
    "Wide ResNet": (lambda: headed(8, nn.ReLU(), models.resnet.Bottleneck(8, 2, base_width=128)), "1"),
    "DenseNet": (lambda: models.DenseNet(8, (2, 2), 8, num_classes=4), "features.pool0"),
    "SqueezeNet": (lambda: headed(12, models.squeezenet.Fire(8, 4, 6, 6), nn.MaxPool2d(3, 2, ceil_mode=True)), "1"),
    "GoogLeNet": (lambda: headed(88, Inception(8, 24, 4, 24, 4, 24, 16)), "1"),
    "Inception v3": (
        lambda: inception(
            192, (InceptionA, 192, 32), (InceptionB, 256), (InceptionC, 736, 128), (InceptionD, 768), (InceptionE, 1280)
        ),
        "1",
    ),
    "MobileNet v2": (lambda: headed(8, *(models.mobilenetv2.InvertedResidual(8, 8, stride, 6) for stride in (1, 2))), "2"),
    "MobileNet v3": (
        lambda: models.MobileNetV3(
            [
                models.mobilenetv3.InvertedResidualConfig(16, 3, 16, 8, True, "RE", 2, 1, 1),
                models.mobilenetv3.InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1),
            ],
            32, num_classes=4,
        ),
        "features.2",
    ),
    "MNASNet": (lambda: headed(8, *models.mnasnet._stack(8, 8, 3, 2, 3, 2, 0.1)), "2"),
    "EfficientNet": (
        lambda: models.EfficientNet([models.efficientnet.MBConvConfig(4, 3, 2, 8, 16, 2, 1, 1)], dropout=0.1, num_classes=4),
        "features.1",
    ),
    "EfficientNet v2": (
        lambda: models.EfficientNet(
            [
                models.efficientnet.FusedMBConvConfig(2, 3, 2, 8, 8, 2),
                models.efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1),
                models.efficientnet.MBConvConfig(4, 3, 1, 8, 8, 1),
            ],
            dropout=0.1, last_channel=16, num_classes=4,
        ),
        "features.2",
    ),
    "ShuffleNet": (lambda: models.ShuffleNetV2([2, 1, 1], [8, 16, 32, 64, 64], num_classes=4), "stage2"),
    "RegNet": (
        lambda: models.RegNet(
            models.regnet.BlockParams([1, 1], [8, 16], [8, 8], [2, 2], [1, 1], se_ratio=0.25), num_classes=4
        ),
        "trunk_output.block1",
    ),
    "ConvNeXt": (
        lambda: models.ConvNeXt(
            [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)],
            num_classes=4, layer_scale=0.1,
        ),
        "features.0",
    ),
    "ViT": (lambda: models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4), "encoder.layers.encoder_layer_0"),
    "Swin": (swin, "features.1"),
    "Swin v2": (
        lambda: swin(
            block=models.swin_transformer.SwinTransformerBlockV2, downsample_layer=models.swin_transformer.PatchMergingV2
        ),
        "features.1",
    ),
    "MaxViT": (lambda: models.MaxVit((32, 32), 8, 4, [8], [1], 4, 0.1, num_classes=4), "stem"),
    "convolutions in one dimension": (conv1d, "5", (32,)),
    "LSTM": (lambda: Sequence(nn.LSTM), "embed", (4,)),
    "GRU, both ways": (lambda: Sequence(nn.GRU, bidirectional=True), "embed", (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_every_family(name, captured_once, tmp_path):
    """Nothing refused; A proportional to the logit, S − A without it; examples apart; the file gives the same bits."""
    torch.manual_seed(0)
    make, path, size = (*NETWORKS[name], (32, 32))[:3]
    model, x, mixed = make().double(), torch.rand(16, 3, *size, dtype=torch.float64), [0, 3, 3, 0]
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # heads and embeddings that begin with zeros are no test
            if not parameter.any():
                parameter.normal_(0, 0.1)
        model.train()(x)  # batch statistics other than 0 and 1
    assert check(model.eval(), x).ok
    inverse = InverseNetwork(model).fit(x, targets=[0, 3], progress=False)
    mipin, few = MIPINAttribution(model, inverse), x[:4]
    a, s = mipin.attribute(few, mixed), mipin.source_signal(few, mixed)
    with torch.no_grad():
        logit = model(few)[range(4), mixed].view(-1, *(1,) * (x.ndim - 1))
    # the same pass for one unit of the logit
    unit = inverse._back(
        inverse._fitted(), (few,), mixed, (), (False, True), Options(), mask=False, layer=None, unit=True
    )  # fmt: skip
    ((a_unit,), (s_unit,)) = unit.signals
    assert torch.isfinite(s).all()
    assert a.flatten(1).any(1).all()
    assert (s - a).flatten(1).any(1).all()
    close = {"rtol": 1e-9, "atol": 1e-9 * float(s.abs().max())}
    torch.testing.assert_close(a, a_unit * logit, **close)
    torch.testing.assert_close(s - a, s_unit - a_unit, **close)
    for i, target in enumerate(mixed):
        torch.testing.assert_close(mipin.source_signal(few[i : i + 1], target)[0], s[i], **close)
    maps = [inverse.class_attribution(target) for target in (0, 3)]
    assert all(m.shape == (1, *x.shape[1:]) and torch.isfinite(m).all() and m.any() for m in maps)
    layer = model.get_submodule(path)
    at = LayerMIPINAttribution(model, inverse, layer)
    features, found = [], at.attribute(few, mixed)
    handle = layer.register_forward_hook(lambda module, inputs, output: features.append(output))
    model(few)
    handle.remove()
    assert found.shape == features[0].shape
    assert found.flatten(1).any(1).all()
    assert not found[features[0] == 0].any(), "equation 9"
    (gradient,) = torch.autograd.grad(
        model(leaf := few.clone().requires_grad_())[range(4), mixed].sum(), leaf
    )
    torch.testing.assert_close(
        mipin.attribute(few, mixed, multiply_by_gradients=True), a * gradient
    )
    inverse.save(tmp_path / "file")
    loaded = InverseNetwork.load(tmp_path / "file", model)
    assert torch.equal(loaded.source_signal(few, mixed), s)
    assert torch.equal(LayerMIPINAttribution(model, loaded, layer).attribute(few, mixed), found)


SPREAD = {
    "maximum": lambda x, y: torch.maximum(x[:, None], y),
    "where": lambda x, y: torch.where(y > 0, x[:, None], y),
    "masked_fill": lambda x, y: x[:, None].masked_fill(torch.ones(8, 4, dtype=torch.bool), 0.0) + y,
}


@pytest.mark.parametrize("name", SPREAD)
def test_a_switch_that_spreads_a_value_is_refused(name):
    """Its signal would be a sum over the places it is chosen at."""
    model = Function(
        lambda m, x, y: m["l"](SPREAD[name](x, y).flatten(1)), l=nn.Linear(32, 3)
    ).eval()
    data = torch.randn(60, 4), torch.randn(60, 8, 4)
    with pytest.raises(UnsupportedOperationError, match=r"spreads a smaller value.*expand"):
        InverseNetwork(model).fit(data, 0, progress=False)


def test_an_average_with_a_negative_divisor_is_refused():
    model = Function(
        lambda m, x: m["l"](F.avg_pool2d(x, 2, divisor_override=-4).flatten(1)), l=nn.Linear(8, 3)
    ).eval()
    with pytest.raises(UnsupportedOperationError, match="divides by -4"):
        InverseNetwork(model).fit(torch.randn(30, 2, 4, 4), 0, progress=False)


def test_averages_are_shared_out_in_each_channel_with_and_without_a_batch():
    x, signal = (
        torch.randn(2, 3, 6, 7, dtype=torch.float64),
        torch.randn(2, 3, 6, 7, dtype=torch.float64),
    )
    operation, window = (
        torch.ops.aten.avg_pool2d.default,
        ([3, 3], [1, 1], [1, 1]),
    )  # overlapping; maps keep their size
    for shares in (True, False):
        run, options = MIPIN["aten.avg_pool2d.default"].run, Options(shares=shares)
        whole = run(options, operation, x, *window)[1](signal)
        for index in range(2):
            alone = run(options, operation, x[index], *window)[1](signal[index])
            torch.testing.assert_close(alone, whole[index])
            for channel in range(3):
                one = run(options, operation, x[index, channel][None], *window)[1](
                    signal[index, channel][None]
                )
                torch.testing.assert_close(one[0], whole[index, channel])


@pytest.mark.parametrize("pool", [
    lambda h: F.adaptive_avg_pool2d(h, (1, 1)),
    lambda h: F.avg_pool2d(h, (3, 8), 1),
    lambda h: F.adaptive_avg_pool2d(h, (3, 1)),
])  # fmt: skip
def test_pooling_that_takes_the_channels_for_rows_is_no_average_over_places(pool):
    torch.manual_seed(0)
    width = pool(torch.zeros(2, 3, 8)).flatten(1).shape[1]
    model = Function(
        lambda m, x: m["l"](pool(m["c"](x)).flatten(1)),
        c=nn.Conv1d(2, 3, 3, padding=1),
        l=nn.Linear(width, 3),
    )
    x = torch.randn(40, 2, 8)
    signal = (
        InverseNetwork(model.double().eval())
        .fit(x.double(), 0, progress=False)
        .source_signal(x[:3].double(), 0)
    )
    assert signal.isfinite().all()
