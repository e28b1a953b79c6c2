"""Norms, variances and squares as features: the way they are written changes no map."""

import pytest
import torch
from every_method import alike
from small import Function, normal
from torch import nn

from captum_mipin.methods.gradients import Gradient


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
