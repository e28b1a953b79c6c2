"""Slices of one tensor that do not overlap: the way they are written changes no map."""

import pytest
import torch
from designs import aside
from every_method import alike
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin.graph.capture import capture
from captum_mipin.graph.nodes import operation
from captum_mipin.methods import GuidedBackprop
from captum_mipin.propagation.passes import MARKING, draft
from captum_mipin.rules import table

HALVES = {
    "chunk": lambda h: h.chunk(2, -1),
    "slices": lambda h: (h[..., :8], h[..., 8:]),
    "the last one first": lambda h: (h[..., -8:], h[..., :-8])[::-1],
    "split": lambda h: h.split(8, -1),
    "unbind": lambda h: h.unflatten(-1, (2, 8)).unbind(-2),
    "index": lambda h: (lambda g: (g[:, 0], g[:, 1]))(h.view(-1, 2, 8)),
    "transposed index": lambda h: (lambda g: (g[0], g[1]))(h.view(-1, 2, 8).transpose(0, 1)),
    "narrow": lambda h: (h.narrow(-1, 0, 8), h.narrow(-1, 8, 8)),
    "tensor_split": lambda h: h.tensor_split(2, -1),
    "lists": lambda h: (h[:, [0, 1, 2, 3, 4, 5, 6, 7]], h[..., list(range(-8, 0))]),
    "index_select": lambda h: tuple(h.index_select(-1, n) for n in torch.arange(16).chunk(2)),
}
PRODUCTS = {
    "SwiGLU": lambda a, b: F.silu(a) * b,
    "GeGLU": lambda a, b: F.gelu(a) * b,
    "sum": lambda a, b: a.relu() + b,
    "gate": lambda a, b: a * b.sigmoid(),
}


@pytest.mark.parametrize("product", aside(PRODUCTS, "GeGLU", "sum"))
def test_spelling_of_halves_does_not_matter(product):
    torch.manual_seed(0)
    join, parts = PRODUCTS[product], {"p": nn.Linear(6, 16), "last": nn.Linear(8, 2)}
    hows = [lambda h, how=how: join(*how(h)) for how in HALVES.values()]
    if product == "gate":
        hows += [F.glu, lambda h: F.glu(torch.cat(h.chunk(2, -1), -1))]
    runs = [lambda m, x, how=how: m["last"](how(m["p"](x))) for how in hows]
    alike(runs, normal(60, 6, dtype=torch.float64), more=True, **parts)


def test_entries_in_another_order_are_no_slice():
    model = Function(lambda m, x: x[:, [1, 0]] * x[:, [0, 3]] + x[:, [-1, 1]].exp()).double().eval()
    x = normal(3, 6, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    torch.testing.assert_close(GuidedBackprop(model).attribute(x.detach(), 1), expected)
    made = draft(capture(model, (x.detach(),)), table(), passes=MARKING)
    names = [operation(node) for node in made.graph.nodes if node.op == "call_function"]
    assert names.count("index") == 2


QKV = {
    "chunk": lambda h: h.chunk(3, -1),
    "slices": lambda h: (h[..., :6], h[..., 6:12], h[..., 12:]),
    "unbind": lambda h: h.unflatten(-1, (3, 6)).unbind(2),
    "permuted": lambda h: (lambda g: (g[0], g[1], g[2]))(h.view(-1, 5, 3, 6).permute(2, 0, 1, 3)),
    "split": lambda h: h.split([6, 6, 6], 2),
}


def test_spelling_of_packed_queries_keys_and_values_does_not_matter():
    torch.manual_seed(0)

    def run(how):
        def forward(m, x):
            q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in how(m["qkv"](x)))
            y = F.scaled_dot_product_attention(q, k, v)
            return m["last"](y.transpose(1, 2).flatten(2).mean(1))

        return forward

    parts = {"qkv": nn.Linear(6, 18), "last": nn.Linear(6, 2)}
    runs = [run(how) for how in QKV.values()]
    alike(runs, normal(60, 5, 6, dtype=torch.float64), more=True, **parts)


TOKENS = {
    "split": lambda h: h.split([1, 4], 1),
    "slices": lambda h: (h[:, :1], h[:, 1:]),
    "index and slice": lambda h: (h[:, 0].unsqueeze(1), h[:, 1:]),
}


def test_spelling_of_the_first_token_and_the_others_does_not_matter():
    torch.manual_seed(0)
    runs = [
        lambda m, x, how=how: (
            lambda first, others: m["last"](first[:, 0] + m["q"](others).relu().mean(1))
        )(*how(m["p"](x).relu()))
        for how in TOKENS.values()
    ]
    parts = {"p": nn.Linear(6, 8), "q": nn.Linear(8, 8), "last": nn.Linear(8, 2)}
    alike(runs, normal(60, 5, 6, dtype=torch.float64), more=True, **parts)


def test_slices_that_overlap_stay_slices():
    model = Function(lambda m, x: F.silu(x[..., :4]) * x[..., 2:]).eval()
    made = draft(capture(model, (normal(3, 6),)), table(), passes=MARKING)
    names = [operation(node) for node in made.graph.nodes if node.op == "call_function"]
    assert names == ["slice", "silu", "slice", "mul"]
