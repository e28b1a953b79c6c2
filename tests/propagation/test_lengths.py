"""Norms, variances and squares as features: the way they are written changes no map."""

import pytest
import torch
from every_method import alike
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin.graph.capture import capture
from captum_mipin.graph.nodes import operation
from captum_mipin.methods.gradients import Gradient
from captum_mipin.propagation.passes import MARKING, draft
from captum_mipin.rules import table


def centred(h):
    return h - h.mean(2, keepdim=True)


#: Kind → spellings of one function of h (examples, 5, 8), with a value for each row.
SPELLED = {
    "variance": [
        lambda h: h.var(2),
        lambda h: (centred(h) ** 2).sum(2) / 7,
        lambda h: torch.var_mean(h, 2)[0],
        lambda h: (lambda c: c * c)(centred(h)).sum(-1) / 7,
    ],
    "biased variance": [
        lambda h: h.var(2, correction=0),
        lambda h: (centred(h) ** 2).mean(2),
        lambda h: centred(h).square().mean(-1),
    ],
    "deviation": [
        lambda h: h.std(2),
        lambda h: h.var(2).sqrt(),
        lambda h: h.var(2) ** 0.5,
        lambda h: ((centred(h) ** 2).sum(2) / 7).sqrt(),
        lambda h: centred(h).norm(dim=2) / 7**0.5,
    ],
    "root mean square": [
        lambda h: h.square().mean(2).sqrt(),
        lambda h: h.norm(dim=2) / 8**0.5,
        lambda h: (h * h).mean(-1) ** 0.5,
        lambda h: (h**2).sum(2).div(8).sqrt(),
    ],
    "length": [
        lambda h: h.norm(dim=2),
        lambda h: (h * h).sum(-1).sqrt(),
        lambda h: torch.linalg.vector_norm(h, dim=2),
        lambda h: h.square().sum(2) ** 0.5,
    ],
    "length of two": [
        lambda h: torch.hypot(h[..., 0], h[..., 1]),
        lambda h: (h[..., 0] ** 2 + h[..., 1] ** 2).sqrt(),
        lambda h: h[..., :2].norm(dim=-1),
        lambda h: torch.complex(h[..., 0], h[..., 1]).abs(),
    ],
}


@pytest.mark.parametrize("kind", SPELLED)
def test_spelling_of_a_length_does_not_matter(kind):
    torch.manual_seed(0)
    runs = [lambda m, x, how=how: m["last"](how(m["p"](x))) for how in SPELLED[kind]]
    alike(runs, normal(60, 5, 4, dtype=torch.float64), p=nn.Linear(4, 8), last=nn.Linear(5, 2))


@pytest.mark.parametrize("kind", SPELLED)
def test_derivatives_of_lengths_are_those_of_autograd(kind):
    torch.manual_seed(0)
    for how in SPELLED[kind]:
        model = Function(
            lambda m, x, how=how: m["last"](how(m["p"](x))), p=nn.Linear(4, 8), last=nn.Linear(5, 2)
        )
        model, x = model.double().eval(), normal(3, 5, 4, dtype=torch.float64).requires_grad_()
        model(x)[:, 1].sum().backward()
        torch.testing.assert_close(Gradient(model).attribute(x.detach(), 1), x.grad)


def by_hand(h, dims):
    return (h - h.mean(dims, True)) / torch.sqrt(h.var(dims, correction=0, keepdim=True) + 1e-5)


GROUPS = {
    "group norm": [
        lambda h, w, b: F.group_norm(h, 2, w, b),
        lambda h, w, b: F.group_norm(h, 2) * w[:, None, None] + b.view(1, -1, 1, 1),
        lambda h, w, b: (
            by_hand(h.view(-1, 2, 4, 5, 5), (2, 3, 4)).view(h.shape) * w.view(1, 8, 1, 1)
            + b[None, :, None, None]
        ),
        lambda h, w, b: (
            b[:, None, None] + w[:, None, None] * by_hand(h.reshape(-1, 2, 100), 2).reshape(h.shape)
        ),
        lambda h, w, b: (
            F.instance_norm(h.reshape(-1, 2, 100)).view(h.shape) * w.view(-1, 1, 1)
            + b.view(-1, 1, 1)
        ),
    ],
    "instance norm": [
        lambda h, w, b: F.instance_norm(h, weight=w, bias=b),
        lambda h, w, b: F.instance_norm(h) * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1),
        lambda h, w, b: by_hand(h, (2, 3)) * w[:, None, None] + b[:, None, None],
    ],
}


@pytest.mark.parametrize("kind", GROUPS)
def test_spelling_of_norms_of_channels_does_not_matter(kind):
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    parts = {"p": nn.Conv2d(3, 8, 3, padding=1), "q": nn.Conv2d(8, 8, 3), "last": nn.Linear(8, 2)}
    nn.init.constant_(parts["last"].bias, 5.0)

    def run(how):
        def forward(m, x):
            h = how(m["p"](x), m["norm"].weight, m["norm"].bias)
            return m["last"](m["q"](h.relu()).relu().mean((2, 3)))

        return forward

    x = normal(30, 3, 5, 5, dtype=torch.float64)
    alike([run(how) for how in GROUPS[kind]], x, more=True, norm=norm, **parts)


def test_a_norm_with_weights_of_the_tokens_stays_a_layer_norm():
    model = Function(
        lambda m, x: m["norm"](x) * m["p"].weight[0] + m["p"].bias[:, None],
        norm=nn.LayerNorm(6, elementwise_affine=False), p=nn.Linear(6, 5),
    ).eval()  # fmt: skip
    made = draft(capture(model, (normal(3, 5, 6),)), table(), passes=MARKING)
    names = [operation(node) for node in made.graph.nodes if node.op == "call_function"]
    assert "layer_norm" in names
    assert "group_norm" not in names
