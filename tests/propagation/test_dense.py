"""Dense layers and convolutions by hand: the way they are written changes no map of any method."""

import pytest
import torch
from every_method import alike
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin.graph.capture import capture
from captum_mipin.graph.nodes import operation
from captum_mipin.methods import GuidedBackprop
from captum_mipin.propagation.passes import MARKING, draft
from captum_mipin.rules import table

X = normal(60, 6, dtype=torch.float64)
TOKENS = normal(60, 5, 6, dtype=torch.float64)


def modules(**more):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "last": nn.Linear(8, 2), **more}
    nn.init.constant_(layers["last"].bias, 5.0)  # PatternNet needs positive outputs
    nn.init.normal_(layers["a"].bias)
    return layers


LAYERS = {
    "module": lambda x, w, b: F.linear(x, w, b),
    "product": lambda x, w, b: b + x @ w.T,
    "mm": lambda x, w, b: torch.mm(x, w.t()).add_(b[None]),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.T),
    "einsum": lambda x, w, b: torch.einsum("bi,oi->bo", x, w) + b,
    "sum": lambda x, w, b: (x[:, None] * w).sum(-1) + b,
    "reshaped": lambda x, w, b: F.linear(x[:, None], w).squeeze(1) + b,
    "weights in heads": lambda x, w, b: (
        torch.einsum("bd,dhk->bhk", x, w.T.reshape(6, 2, 4)) + b.view(2, 4)
    ).flatten(1),
}


def test_spelling_of_a_dense_layer_does_not_matter():
    runs = [
        lambda m, x, how=how: m["last"](how(x, m["a"].weight, m["a"].bias).relu())
        for how in LAYERS.values()
    ]
    alike(runs, X, more=True, **modules())


def test_spelling_of_two_dense_layers_of_one_tensor_does_not_matter():
    def run(how):
        def forward(m, x):
            a, b = (how(x, m[name].weight, m[name].bias) for name in "ab")
            return m["last"](F.silu(a) * b)

        return forward

    alike([run(LAYERS[name]) for name in ("module", "addmm", "einsum", "mm")], X, **modules())


def test_a_layer_by_hand_of_each_slice_is_one_layer():
    hows = [
        lambda x, layer: layer(x),
        lambda x, layer: torch.stack([layer(x[:, t]) for t in range(5)], 1),
        lambda x, layer: torch.stack([x[:, t] @ layer.weight.T + layer.bias for t in range(5)], 1),
    ]
    runs = [lambda m, x, how=how: m["last"](how(x, m["a"]).relu().mean(1)) for how in hows]
    alike(runs, TOKENS, **modules())


def test_the_bias_of_a_term_of_a_sum_belongs_to_its_layer():
    layers = modules(c=nn.Linear(8, 8))
    hows = [
        lambda m, h: m["c"](h.relu()) + m["b"](h[:, :6]),
        lambda m, h: h.relu() @ m["c"].weight.T + m["b"](h[:, :6]) + m["c"].bias,
        lambda m, h: m["b"](h[:, :6]) + h.relu() @ m["c"].weight.T + m["c"].bias,
    ]
    runs = [lambda m, x, how=how: m["last"](how(m, m["a"](x)).relu()) for how in hows]
    alike(runs, X, more=True, **layers)


def test_spelling_of_the_bias_of_a_convolution_does_not_matter():
    torch.manual_seed(0)
    hows = [
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        lambda x, w, b: F.conv2d(x, w, padding=1) + b[:, None, None],
        lambda x, w, b: b.view(1, -1, 1, 1) + F.conv2d(x, w, None, 1, 1),
    ]
    runs = [
        lambda m, x, how=how: m["last"](how(x, m["c"].weight, m["c"].bias).relu().mean((2, 3)))
        for how in hows
    ]
    x = normal(30, 3, 5, 5, dtype=torch.float64)
    alike(runs, x, more=True, **modules(c=nn.Conv2d(3, 8, 3)))


TRANSPOSED = {  # layers of tokens (batch, tokens, features), to which a bias is added
    "module": F.linear,
    "weights first": lambda x, w, b: (w @ x.mT + b[:, None]).mT,
    "batch last": lambda x, w, b: (F.linear(x, w).transpose(0, 2) + b[:, None, None]).transpose(
        0, 2
    ),
    "convolution": lambda x, w, b: F.conv1d(x.mT, w[..., None]).mT + b,
}


def test_a_bias_behind_a_transposition_belongs_to_its_layer():
    runs = [
        lambda m, x, how=how: m["last"](how(x, m["a"].weight, m["a"].bias).relu().mean(1))
        for how in TRANSPOSED.values()
    ]
    alike(runs, TOKENS, **modules())


@pytest.mark.parametrize(
    ("added", "names"),
    [
        (lambda m, x: m["b"](m["free"](x)) + m["b"].weight[0, 0], ["linear", "linear"]),
        (lambda m, x: m["free"](x) + m["a"].bias[:6], ["linear"]),
        (lambda m, x: (lambda y: torch.cat([y, y + m["b"].bias], 1))(x @ m["b"].weight.T),
         ["linear"]),
        (lambda m, x: (x @ m["b"].weight[:6].T)[:, None] + m["b"].bias[:4, None], ["linear"]),
        (lambda m, x: (x[:, None] * m["b"].weight[:, :1] @ m["b"].weight.T).mT + m["b"].bias,
         ["linear"]),
    ],
    ids=["one number", "behind a module", "used twice", "broadcast", "of positions"],
)  # fmt: skip
def test_what_is_no_bias_stays_a_sum(added, names):
    model = Function(added, **modules(free=nn.Linear(6, 6, bias=False))).double().eval()
    made = draft(capture(model, (X,)), table(), passes=MARKING)
    found = [operation(n) for n in made.graph.nodes if operation(n) in ("linear", "add")]
    assert found == [*names, "add"]


ATTENTION = {  # without a softmax: q (kᵀ v)
    "matmul": lambda k, v: k @ (k.mT @ v),
    "bmm": lambda k, v: torch.bmm(k, k.permute(0, 2, 1).bmm(v)),
    "einsum": lambda k, v: torch.einsum("btf,bfg->btg", k, torch.einsum("btf,btg->bfg", k, v)),
    "transposed": lambda k, v: k @ (v.mT @ k).mT,
    "sums": lambda k, v: (k[..., None] * (k[..., None] * v[:, :, None]).sum(1)[:, None]).sum(2),
}


@pytest.mark.parametrize("pool", [torch.amax, torch.mean])
def test_spelling_of_a_product_of_two_tokens_does_not_matter(pool):
    def run(how):
        return lambda m, x: m["last"](pool(how(m["a"](x).relu(), m["b"](x)), 1))

    alike([run(how) for how in ATTENTION.values()], TOKENS, **modules())


AVERAGES = {  # of tokens (batch, tokens, features), before a dense layer W
    "features last": lambda h, w: h.mean(1) @ w.T,
    "batch last": lambda h, w: h.permute(1, 2, 0).mean(0).T @ w.T,
    "batch between": lambda h, w: F.linear(h.permute(1, 0, 2).mT.mean(0).t(), w),
    "weights first": lambda h, w: (w @ h.permute(2, 1, 0).mean(1)).T,
    "features first": lambda h, w: h.mT.mean(2, keepdim=True).mT.squeeze(1) @ w.T,
    "sum": lambda h, w: (h.permute(2, 0, 1).sum(2) / 5).transpose(0, 1) @ w.T,
}


def test_transpositions_between_an_average_and_a_layer_do_not_matter():
    runs = [
        lambda m, x, how=how: how(m["a"](x).relu(), m["last"].weight) + m["last"].bias
        for how in AVERAGES.values()
    ]
    alike(runs, TOKENS, **modules())


def test_attention_by_einsum_has_the_gradient_of_its_queries_and_keys():
    def run(m, x):
        q, k, v = (torch.einsum("btd,dhk->bthk", x, w.view(6, 2, 4)) for w in m["w"])
        weights = torch.einsum("bthk,bshk->bhts", q, k).softmax(-1)
        return m["last"](torch.einsum("bhts,bshk->bthk", weights, v).flatten(2).mean(1))

    weights = nn.ParameterList(normal(6, 8, seed=seed) for seed in range(3))
    model = Function(run, **modules(w=weights)).double().eval()
    x = TOKENS[:5].clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    torch.testing.assert_close(GuidedBackprop(model).attribute(x.detach(), 1), expected)
