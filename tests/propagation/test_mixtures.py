"""Mixtures g h + (1 − g) x, and other sums with several terms of a tensor, in every spelling."""

import pytest
import torch
from every_method import alike
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork
from captum_mipin.graph.capture import capture
from captum_mipin.graph.nodes import operation
from captum_mipin.methods import LRP, Epsilon, GuidedBackprop
from captum_mipin.methods.gradients import Gradient
from captum_mipin.propagation.passes import MARKING, draft
from captum_mipin.rules import table

X = normal(40, 4, dtype=torch.float64)


def gate(q):
    return torch.sigmoid(q)


#: σ(q) h + (1 − σ(q)) x.
MIXTURES = {
    "both products": lambda x, h, q: gate(q) * h + (1 - gate(q)) * x,
    "difference": lambda x, h, q: x + gate(q) * (h - x),
    "three terms": lambda x, h, q: x - gate(q) * x + gate(q) * h,
    "h first": lambda x, h, q: gate(q) * h + x - gate(q) * x,
    "lerp": lambda x, h, q: torch.lerp(x, h, gate(q)),
    "addcmul": lambda x, h, q: torch.addcmul(x, gate(q), h - x),
    "from h": lambda x, h, q: h + (1 - gate(q)) * (x - h),
    "from h by the negative": lambda x, h, q: h - gate(-q) * (h - x),
    "subtracted": lambda x, h, q: x - gate(q) * (x - h),
    "ratio": lambda x, h, q: x + (h - x) / (1 + torch.exp(-q)),
    "tanh": lambda x, h, q: x + (h - x) * (torch.tanh(q / 2) + 1) / 2,
    "alpha": lambda x, h, q: torch.sub(x, gate(q) * (2 * x - 2 * h), alpha=0.5),
}
#: σ(q) (h + h² / 2) + (1 − σ(q)) x.
SHIFTED = [
    lambda x, h, q: gate(q) * (h + 0.5 * h.square()) + (1 - gate(q)) * x,
    lambda x, h, q: x + gate(q) * (h - x + 0.5 * h.square()),
    lambda x, h, q: x + gate(q) * (h + (0.5 * h.square() - x)),
]
#: The same with a gate for each example, and with a gate that is no sigmoid.
BROADCAST = [
    lambda x, h, q: gate(q[:, :1]) * h + (1 - gate(q[:, :1])) * x,
    lambda x, h, q: x + gate(q[:, :1]) * (h - x),
    lambda x, h, q: x - gate(q[:, 0]).unsqueeze(-1) * (x - h),
]
SOFTMAX = [
    lambda x, h, q: q.softmax(1) * h + (1 - q.softmax(1)) * x,
    lambda x, h, q: (lambda g: g * h + (1 - g) * x)(q.softmax(1)),
    lambda x, h, q: (lambda g: x + g * (h - x))(q.softmax(1)),
]
#: Sums in which a tensor occurs several times.
TWICE = [
    lambda x, h, q: 2 * x * gate(q),
    lambda x, h, q: (x + x) * gate(q),
    lambda x, h, q: x * gate(q) + x * gate(q),
    lambda x, h, q: x + x * torch.tanh(q / 2),
    lambda x, h, q: x * (1 + torch.tanh(q / 2)),
    lambda x, h, q: x + x * (2 * gate(q) - 1),
    lambda x, h, q: 3 * x * gate(q) - x * gate(q),
]
WHOLE = [
    lambda x, h, q: x + h,
    lambda x, h, q: x * gate(q) + h + x * gate(-q),
    lambda x, h, q: h - x * gate(q) + x * (1 + gate(q)),
]


def parts():
    torch.manual_seed(0)
    last = nn.Linear(5, 2)
    nn.init.constant_(last.bias, 5.0)  # PatternNet needs positive outputs
    return {"a": nn.Linear(4, 5), "h": nn.Linear(4, 5), "q": nn.Linear(4, 5), "last": last}


def network(how):
    return lambda m, x: m["last"](how(m["a"](x), m["h"](x), m["q"](x)))


@pytest.mark.parametrize(
    "spellings",
    [list(MIXTURES.values()), SHIFTED, BROADCAST, SOFTMAX, TWICE, WHOLE],
    ids=["mixture", "sum", "broadcast", "softmax", "twice", "whole"],
)
def test_spelling_of_a_sum_with_gates_does_not_matter(spellings):
    alike([network(how) for how in spellings], X, more=True, **parts())


@pytest.mark.parametrize("spelling", MIXTURES)
def test_both_parts_of_a_mixture_get_their_share(spelling):
    """AttnLRP gives the gate half of g h and of (1 − g) x; LRP gives it nothing."""
    layers = parts()
    model = Function(network(MIXTURES[spelling]), **layers).double().eval()
    x, h, q = (layers[name](X).detach() for name in ("a", "h", "q"))
    g, last = q.sigmoid(), layers["last"].weight[0].detach()
    shares = [(x, (1 - g) * x * last), (h, g * h * last)]
    shares += [(q, sum(share for _, share in shares))]
    to_x, to_h, to_q = (
        X * ((share / z) @ layers[name].weight.detach())
        for name, (z, share) in zip(("a", "h", "q"), shares, strict=True)
    )
    explained = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(explained)[:, 0].sum(), explained)
    for method, expected in (
        (LRP(model, rule=Epsilon(0), attention="attnlrp"), (to_x + to_h + to_q) / 2),
        (LRP(model, rule=Epsilon(0)), to_x + to_h),
        (GuidedBackprop(model), slope),
    ):
        torch.testing.assert_close(method.attribute(X, 0), expected, rtol=1e-6, atol=1e-6)


def test_a_recurrent_cell_by_hand_is_that_of_torch():
    cell = nn.GRUCell(4, 5)

    def by_hand(m, x, mix):
        cell, h = m["cell"], x.new_zeros(len(x), 5)
        for t in range(3):
            r, z, n = F.linear(x[:, t], cell.weight_ih, cell.bias_ih).chunk(3, 1)
            r_h, z_h, n_h = F.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, 1)
            z, n = (z + z_h).sigmoid(), (n + (r + r_h).sigmoid() * n_h).tanh()
            h = mix(z, n, h)
        return m["last"](h)

    def of_torch(m, x):
        h = x.new_zeros(len(x), 5)
        for t in range(3):
            h = m["cell"](x[:, t], h)
        return m["last"](h)

    mixes = [
        lambda z, n, h: (1 - z) * n + z * h,
        lambda z, n, h: n + z * (h - n),
        lambda z, n, h: n - z * n + z * h,
    ]
    runs = [of_torch, *(lambda m, x, mix=mix: by_hand(m, x, mix) for mix in mixes)]
    x = normal(30, 3, 4, dtype=torch.float64)
    alike(runs, x, more=True, cell=cell, last=parts()["last"])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (lambda x, h, q: x + gate(q) * h, ["sigmoid", "mul", "add"]),
        (lambda x, h, q: x + x * gate(q), ["sigmoid", "mul", "add"]),
        (lambda x, h, q: x - 0.5 * x * torch.tanh(q), ["tanh", "mul", "mul", "sub"]),
        (lambda x, h, q: x + gate(q) * (h + x), ["sigmoid", "add", "mul", "add"]),
        (lambda x, h, q: x * torch.rsub(gate(q), 3, alpha=-2), ["sigmoid", "rsub", "mul"]),
    ],
    ids=["branch", "own branch", "less", "more", "alpha"],
)
def test_other_sums_are_left(how, expected):
    model = Function(network(how), **parts()).double().eval()
    made = draft(capture(model, (X,)), table(), passes=MARKING)
    names = [operation(node) for node in made.graph.nodes if node.op == "call_function"]
    assert [name for name in names if name != "linear"] == expected


def test_explained_parts_of_a_mixture_stay():
    class Difference(nn.Module):
        def forward(self, h, x):
            return h - x

    layers = {**parts(), "gate": nn.Sigmoid(), "difference": Difference()}

    def run(m, x):
        h = m["a"](x)
        return m["last"](h + m["gate"](m["q"](x)) * m["difference"](m["h"](x), h))

    model = Function(run, **layers).double().eval()
    for name in ("gate", "difference"):
        fitted = InverseNetwork(model, layer=layers[name]).fit(X, 1, progress=False)
        result = fitted.explain((X[:5],), 1, biases=(True,), layer=layers[name])
        torch.testing.assert_close(result.output, model(X[:5])[:, 1].detach())
        (signals,) = result.signals
        assert all(signal.any() and signal.isfinite().all() for signal in signals)


def _shared(x, h, q):
    """A sum of shared sums, whose paths grow exponentially in number."""
    u, v = x, h
    for _ in range(40):
        u, v = v, 0.5 * (u + v)
    return q + gate(q) * v


@pytest.mark.parametrize(
    "how",
    [
        lambda x, h, q: x + gate(q) * torch.rsub(x, 1.0, alpha=2),
        lambda x, h, q: x - gate(q) * torch.rsub(x, 3.0, alpha=-2),
        lambda x, h, q: x + gate(q) * torch.sub(x, 1.0, alpha=2),
        _shared,
    ],
    ids=["alpha by position", "its negative", "alpha by name", "shared sums"],
)
def test_gradients_are_those_of_autograd(how):
    model, x = Function(network(how), **parts()).double().eval(), X[:5].clone().requires_grad_()
    model(x)[:, 1].sum().backward()
    torch.testing.assert_close(Gradient(model).attribute(x.detach(), 1), x.grad)
