"""Products of two signals, divisors, and what is computed from gates."""

import pytest
import torch
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork, check
from captum_mipin.errors import UnsupportedOperationError
from captum_mipin.methods import LRP, Deconvnet, Epsilon, ExcitationBackprop, GuidedBackprop

PRODUCTS = {
    "mul": lambda a, b: a * b,
    "matmul": lambda a, b: a @ b.mT,
    "bmm": lambda a, b: torch.bmm(a.mT, b),
    "einsum": lambda a, b: torch.einsum("bnc,bnd->bcd", a, b),
    "sum of products": lambda a, b: (a * b).sum(-1),
    "sum of spread products": lambda a, b: (a[:, :, None] * b[:, None]).sum(3),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=-2),
    "baddbmm": lambda a, b: torch.baddbmm(a @ b.mT, a, b.mT, beta=0.5),
    "cosine": lambda a, b: F.cosine_similarity(a, b, dim=-1),
}


def gated(product, bias=True):
    """A network whose hidden values are a product of two dense layers, neither of them a gate."""
    torch.manual_seed(0)
    modules = {name: nn.Linear(4, 3, bias=bias) for name in "ab"}
    size = product(torch.ones(1, 5, 3), torch.ones(1, 5, 3)).numel()
    return (
        Function(
            lambda m, x: m["last"](product(m["a"](x), m["b"](x)).flatten(1)),
            **modules,
            last=nn.Linear(size, 2, bias=bias),
        )
        .double()
        .eval()
    )


def slope(x, s):
    """Least squares x ≈ a (s − mean) + mean per channel, as (a, mean of s, mean of x)."""
    over = tuple(range(x.ndim - 1))
    ds, dx = s - s.mean(over), x - x.mean(over)
    return (ds * dx).sum(over) / ds.square().sum(over), s.mean(over), x.mean(over)


def test_each_factor_gets_the_signal_times_the_other_by_hand():
    torch.manual_seed(0)
    a, b = (normal(80, 3, seed=seed, dtype=torch.float64).abs() for seed in (0, 1))
    model = Function(lambda m, a, b: m["last"](a.relu() * b.relu()), last=nn.Linear(3, 1))
    model = model.double().eval()
    inverse = InverseNetwork(model, ridge=0).fit((a, b), progress=False)
    with torch.no_grad():
        y, p = model(a, b), a * b
    w = ((p - p.mean(0)) * (y - y.mean())).sum(0) / (y - y.mean()).square().sum()
    s = w * (y - y.mean()) + p.mean(0)
    for x, other, found in zip((a, b), (b, a), inverse.source_signal((a, b)), strict=True):
        factor, mean_s, mean_x = slope(x, s * other)
        torch.testing.assert_close(found, factor * (s * other - mean_s) + mean_x)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_two_signals(name):
    """Relevance is conserved, gradients are autograd's, and the source signal explains x."""
    model, x = gated(PRODUCTS[name], bias=False), normal(60, 5, 4, dtype=torch.float64)
    relevance, delta = LRP(model, rule=Epsilon(0)).attribute(x, 1, return_convergence_delta=True)
    output = model(x)[:, 1].detach()
    torch.testing.assert_close(relevance.flatten(1).sum(1), output, rtol=1e-7, atol=1e-9)
    assert delta.abs().max() < 1e-7 * output.abs().max()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    for method in (GuidedBackprop, Deconvnet):
        torch.testing.assert_close(method(model).attribute(x, 1), expected)
    s = InverseNetwork(model).fit(x, 1, progress=False).source_signal(x, 1)
    assert ((s - x).square().sum() < (x - x.mean(0)).square().sum()).all()
    rows = check(model, x).rows
    assert all(row.status != "refused" for row in rows)
    assert any("neither factor is a gate" in row.caveat for row in rows)


def test_relevance_of_a_product_is_halved_by_hand():
    a, b = (normal(6, 5, seed=seed, dtype=torch.float64).abs() for seed in (0, 1))
    model = Function(
        lambda m, a, b: m["last"](a.relu() * b.relu()), last=nn.Linear(5, 1, bias=False)
    )
    half = (a * b * model.double().eval().layers["last"].weight).detach() / 2
    for relevance in LRP(model, rule=Epsilon(0)).attribute((a, b)):
        torch.testing.assert_close(relevance, half)
    with torch.no_grad():
        model.layers["last"].weight.abs_()
    won = ExcitationBackprop(model).attribute((a, b))
    torch.testing.assert_close(won[0], won[1])
    torch.testing.assert_close((won[0] + won[1]).sum(1), torch.ones(6, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------
# what is computed from gates and divisors is recorded: as if it were passed with each example

RECORDED = {
    "linear layer over heads": lambda m, q: m["heads"](q[:, :, None].softmax(1).expand(-1, -1, 3)),
    "mixed maps": lambda m, q: q.softmax(1) * 0.3 + 0.7 * (2 * q).softmax(1),
    "normalised again": lambda m, q: q.sigmoid() / q.sigmoid().sum(1, keepdim=True),
    "by hand": lambda m, q: q.exp() / q.exp().sum(1, keepdim=True),
    "two gates": lambda m, q: q.softmax(1) * q.sigmoid(),
    "convolved": lambda m, q: m["conv"](q.softmax(1)[:, None])[:, 0].relu(),
    "squared": lambda m, q: q.softmax(1) ** 2,
    "compared": lambda m, q: (q > 0).to(q.dtype) + q.sigmoid(),
    "chosen": lambda m, q: F.one_hot(q.argmax(1), 5).to(q.dtype),
    "sorted": lambda m, q: q.softmax(1).cumsum(1),
    "softmax": lambda m, q: q.softmax(1),
}


def mean(h, w):
    return torch.einsum("bn,bnc->bc", w.view(-1, 5), h)


def deviation(h, w):
    """The statistics of attentive pooling: the weight is a gate, the square beside it is none."""
    w = w.view(-1, 5, 1)
    return (w * (h - (w * h).sum(1, keepdim=True)).pow(2)).sum(1).clamp(1e-9).sqrt()


@pytest.mark.parametrize(
    ("name", "pool"), [*((name, mean) for name in RECORDED), ("softmax", deviation)]
)
def test_what_follows_from_gates_is_recorded(name, pool):
    torch.manual_seed(0)
    weights, x = RECORDED[name], normal(60, 5, 4, dtype=torch.float64)
    modules = {
        "p": nn.Linear(4, 6),
        "q": nn.Linear(4, 1),
        "heads": nn.Linear(3, 1),
        "conv": nn.Conv1d(1, 1, 3, padding=1),
        "last": nn.Linear(6, 2),
    }

    def pooled(m, h, w):
        # a dense layer that follows at once is inverted together with an average by a softmax
        return m["last"](pool(h, w).relu())

    def made(m, x):
        return weights(m, m["q"](x)[..., 0])

    whole = (
        Function(lambda m, x: pooled(m, m["p"](x).relu(), made(m, x)), **modules).double().eval()
    )
    parts = Function(lambda m, x, w: pooled(m, m["p"](x).relu(), w), **modules).double().eval()
    w = made(whole.layers, x).detach()
    one = InverseNetwork(whole).fit(x, 1, progress=False)
    two = InverseNetwork(parts).fit([(x, w)], 1, unpack=lambda batch: (batch[0], batch[1]),
                                    progress=False)  # fmt: skip
    torch.testing.assert_close(
        one.source_signal(x[:6], 1), two.source_signal(x[:6], 1, additional_forward_args=w[:6])
    )
    torch.testing.assert_close(
        LRP(whole).attribute(x[:6], 1),
        LRP(parts).attribute(x[:6], 1, additional_forward_args=w[:6]),
    )


def test_a_divisor_is_recorded_as_a_scale_by_hand():
    torch.manual_seed(0)
    x = normal(80, 3, dtype=torch.float64)
    model = Function(
        lambda m, x: m["last"](x / (1 + x.abs().sum(1, keepdim=True))), last=nn.Linear(3, 1)
    )
    inverse = InverseNetwork(model.double().eval(), ridge=0).fit(x, progress=False)
    with torch.no_grad():
        y, d = model(x), 1 + x.abs().sum(1, keepdim=True)
    h = x / d
    w = ((h - h.mean(0)) * (y - y.mean())).sum(0) / (y - y.mean()).square().sum()
    s = (w * (y - y.mean()) + h.mean(0)) * d
    factor, mean_s, mean_x = slope(x, s)
    torch.testing.assert_close(inverse.source_signal(x), factor * (s - mean_s) + mean_x)
    rows = {row.operation: row.note for row in check(model, x).rows}
    assert rows["aten.div.Tensor"] == "times the recorded divisor"
    assert rows["aten.abs.default"].startswith("recorded")


def test_no_value_is_left_where_only_a_divisor_or_a_softmax_goes_on():
    for step, reason in (
        (lambda h: 1 / h.norm(dim=1, keepdim=True).expand_as(h), "no rule covers it; a divisor is"),
        (lambda h: h.softmax(1), "no rule covers it.* no input has a share of its own"),
    ):
        model = Function(lambda m, x, step=step: m["last"](step(m["first"](x))),
                         first=nn.Linear(3, 4), last=nn.Linear(4, 2)).eval()  # fmt: skip
        for method in (lambda m: InverseNetwork(m).fit(torch.randn(9, 3), 0, progress=False),
                       lambda m: LRP(m).attribute(torch.randn(9, 3), 0)):  # fmt: skip
            with pytest.raises(UnsupportedOperationError, match=reason):
                method(model)


def test_global_response_norm_by_hand():
    """For y = x + γ x n + β, n = |x| / mean |x| is recorded: x ≈ a s + c s n + b a channel."""
    torch.manual_seed(0)
    x = normal(80, 3, 4, 4, dtype=torch.float64).abs()
    gamma, beta = nn.Parameter(torch.rand(1, 3, 1, 1)), nn.Parameter(torch.rand(1, 3, 1, 1))

    def response(x):
        length = x.norm(p=2, dim=(2, 3), keepdim=True)
        return length / (length.mean(1, keepdim=True) + 1e-6)

    def forward(m, x):
        h = x.relu()
        return m["last"]((h + torch.addcmul(m.beta, m.gamma, h * response(h))).flatten(1))

    model = Function(forward, last=nn.Linear(48, 1))
    model.layers.gamma, model.layers.beta = gamma, beta
    model = model.double().eval()
    inverse = InverseNetwork(model, ridge=0).fit(x, progress=False)
    with torch.no_grad():
        y, n = model(x), response(x)
        p = (x + model.layers.gamma * x * n + model.layers.beta).flatten(1)
        w = ((p - p.mean(0)) * (y - y.mean())).sum(0) / (y - y.mean()).square().sum()
        s = (w * (y - y.mean()) + p.mean(0)).view_as(x)
        for c, found in enumerate(inverse.source_signal(x).unbind(1)):
            a = torch.stack([s[:, c], s[:, c] * n[:, c], torch.ones_like(s[:, c])], -1)
            solution = torch.linalg.lstsq(a.reshape(-1, 3), x[:, c].reshape(-1, 1)).solution
            torch.testing.assert_close(found, (a @ solution)[..., 0], rtol=1e-7, atol=1e-9)
    model.layers.beta.data.zero_(), model.layers["last"].bias.data.zero_()
    relevance = LRP(model, rule=Epsilon(0)).attribute(x)
    p = x + model.layers.gamma * x * n  # with recorded n, each part has its share of p
    torch.testing.assert_close(relevance, (p * model.layers["last"].weight.view(3, 4, 4)).detach())
