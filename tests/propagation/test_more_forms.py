"""Activations, norms, gates and stacks in further spellings, which change no map of any method."""

import pytest
import torch
from every_method import alike
from small import Function, normal
from torch import nn
from torch.nn import functional as F

from captum_mipin.methods import GuidedBackprop

X = normal(60, 6, dtype=torch.float64)


def erf(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


SPELLINGS = {
    "GELU of a half": [
        lambda m, h: F.gelu(h[:, :4]).mul(h[:, 4:]).repeat(1, 2),
        lambda m, h: (erf(h[:, :4]) * h[:, 4:]).repeat(1, 2),
        lambda m, h: (
            0.5 * h[:, :4] * (1 + torch.erf(h[:, :4] / 2**0.5)) * h.chunk(2, -1)[1]
        ).repeat(1, 2),
    ],
    "group norm of one group": [
        lambda m, h: m["norm"](h),
        lambda m, h: F.group_norm(h, 1, m["norm"].weight, m["norm"].bias),
        lambda m, h: F.group_norm(h[..., None], 1, m["norm"].weight, m["norm"].bias)[..., 0],
    ],
    "times 1": [
        lambda m, h: h * torch.sigmoid(h) * m["q"](h),
        lambda m, h: h * torch.sigmoid(1.0 * h) * (m["q"](h) / 1),
    ],
    "lower bound of a norm": [
        lambda m, h: F.normalize(h),
        lambda m, h: h / (F.relu(h.norm(dim=-1, keepdim=True) - 1e-12) + 1e-12),
    ],
    "ratio by 1 + exp": [
        lambda m, h: h * torch.sigmoid(m["q"](h)),
        lambda m, h: h / (1 + torch.exp(-m["q"](h))),
        lambda m, h: h * (1 / (1 + (-m["q"](h)).exp())),
    ],
    "sum of a reshaped concatenation": [
        lambda m, h: m["q"](h).relu() + h,
        lambda m, h: torch.cat([m["q"](h).relu(), h], -1).view(-1, 2, 8).sum(1),
        lambda m, h: torch.cat([m["q"](h).relu(), h], -1).unflatten(-1, (2, 8)).sum(1),
    ],
    "copies": [
        lambda m, h: m["q"](h[:, None].expand(-1, 2, -1)).relu()[:, 1],
        lambda m, h: m["q"](torch.stack([h, h], 1)).relu()[:, 1],
        lambda m, h: m["q"](torch.stack([h, h], 1).flatten(0, 1)).view(-1, 2, 8).relu()[:, 1],
        lambda m, h: m["q"](h[:, None].repeat(1, 2, 1)).relu()[:, 1],
    ],
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_further_spellings_do_not_matter(kind):
    torch.manual_seed(0)
    parts = {"p": nn.Linear(6, 8), "q": nn.Linear(8, 8), "last": nn.Linear(8, 2)}
    nn.init.constant_(parts["last"].bias, 5.0)  # PatternNet needs positive outputs
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    runs = [lambda m, x, how=how: m["last"](how(m, m["p"](x))) for how in SPELLINGS[kind]]
    alike(runs, X, more=True, norm=norm, **parts)


CHANNELS = {
    "view": lambda h, g: h * g[:, :, None, None],
    "expand_as": lambda h, g: h * g.view(-1, 8, 1, 1).expand_as(h),
    "expand": lambda h, g: g[..., None, None].expand(-1, -1, *h.shape[2:]) * h,
    "repeat": lambda h, g: h * g[..., None, None].repeat(1, 1, 5, 5),
}


def test_spelling_of_gates_of_channels_does_not_matter():
    torch.manual_seed(0)

    def run(how):
        def forward(m, x):
            h = m["c"](x).relu()
            return m["last"](how(h, m["g"](h.mean((2, 3))).sigmoid()).mean((2, 3)))

        return forward

    parts = {"c": nn.Conv2d(3, 8, 3, padding=1), "g": nn.Linear(8, 8), "last": nn.Linear(8, 2)}
    nn.init.constant_(parts["last"].bias, 5.0)
    runs = [run(how) for how in CHANNELS.values()]
    alike(runs, normal(30, 3, 5, 5, dtype=torch.float64), more=True, **parts)


def softmaxes(weigh):
    def run(m, x):
        q, k, v = m["qkv"](x).chunk(3, -1)
        return m["last"](weigh(q @ k.mT * 6**-0.5, v).mean(1))

    return run


ATTENTION = {
    "softmax": lambda s, v: s.softmax(-1) @ v,
    "log_softmax": lambda s, v: s.log_softmax(-1).exp() @ v,
    "logsumexp": lambda s, v: (s - s.logsumexp(-1, keepdim=True)).exp() @ v,
}


def test_spelling_of_a_softmax_does_not_matter():
    torch.manual_seed(0)
    runs = [softmaxes(weigh) for weigh in ATTENTION.values()]
    parts = {"qkv": nn.Linear(6, 18), "last": nn.Linear(6, 2)}
    alike(runs, normal(60, 5, 6, dtype=torch.float64), more=True, **parts)


def test_weights_may_be_divided_by_their_sum_in_a_transposed_order():
    torch.manual_seed(0)
    hows = [
        lambda w, h: (w / w.sum(1, keepdim=True) * h).sum(1),
        lambda w, h: ((w.mT @ h) / w.mT.sum(-1, keepdim=True)).squeeze(1),
        lambda w, h: (w.mT @ h)[:, 0] / w.mT.sum(-1),
    ]
    runs = [lambda m, x, how=how: m["last"](how(m["a"](x).exp(), m["p"](x).relu())) for how in hows]
    parts = {"p": nn.Linear(6, 8), "a": nn.Linear(6, 1), "last": nn.Linear(8, 2)}
    alike(runs, normal(60, 5, 6, dtype=torch.float64), more=True, **parts)


COSINES = {
    "normalised": lambda h, w: F.linear(F.normalize(h), F.normalize(w)),
    "both norms": lambda h, w: F.linear(h, w) / (h.norm(dim=-1, keepdim=True) * w.norm(dim=-1)),
    "one after the other": lambda h, w: F.linear(h, w) / h.norm(dim=1)[:, None] / w.norm(dim=1),
    "product": lambda h, w: (
        (h[:, None] * w).sum(-1) / (w.norm(dim=-1) * h.norm(dim=-1, keepdim=True))
    ),
}


def test_spelling_of_the_norms_of_a_cosine_does_not_matter():
    torch.manual_seed(0)
    runs = [lambda m, x, how=how: how(m["p"](x), m["w"].weight) for how in COSINES.values()]
    alike(runs, X, more=True, p=nn.Linear(6, 8), w=nn.Linear(8, 3))


def test_each_element_divided_by_several_numbers():
    """As the positions of DETR, and the frequencies of tables."""
    torch.manual_seed(0)
    hows = [
        lambda h: (h[:, :, None] / torch.arange(1.0, 5.0)).flatten(1),
        lambda h: (h[..., None] * (1 / torch.arange(1.0, 5.0))).flatten(1),
        lambda h: h.repeat_interleave(4, 1) / torch.arange(1.0, 5.0).repeat(6),
    ]
    runs = [lambda m, x, how=how: m["last"](how(m["p"](x))) for how in hows]
    for run in runs:
        model = Function(run, p=nn.Linear(6, 6), last=nn.Linear(24, 2)).double().eval()
        x = X[:3].clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
        found = GuidedBackprop(model).attribute(X[:3], target=1)
        torch.testing.assert_close(found, expected)


GATES = {
    "hard sigmoid": [
        F.hardsigmoid,
        lambda g: F.relu6(g + 3) / 6,
        lambda g: (g + 3).clamp(0, 6) / 6,
        lambda g: (g / 6 + 0.5).clamp(0, 1),
        lambda g: F.hardtanh(g + 3, 0, 6) * (1 / 6),
        lambda g: torch.minimum(F.relu(g + 3), torch.tensor(6.0)) / 6,
    ],
    "sigmoid": [
        torch.sigmoid,
        lambda g: (1 + torch.tanh(g / 2)) / 2,
        lambda g: (1 + torch.exp(-g)) ** -1,
        lambda g: torch.sigmoid(g) ** 1,
        lambda g: torch.exp(F.logsigmoid(g)),
        lambda g: torch.exp(-F.softplus(-g)),
        lambda g: -(torch.sigmoid(-g) - 1),
        lambda g: torch.exp(g) / (1 + torch.exp(g)),
    ],
    "steeper sigmoid": [lambda g: 2 * torch.sigmoid(2 * g), lambda g: 1 + torch.tanh(g)],
    "steeper hard sigmoid": [
        lambda g: F.hardsigmoid(6 * g),
        lambda g: (g + 0.5).clamp(0, 1),
        lambda g: F.relu6(6 * g + 3) / 6,
    ],
    "rearranged": [
        lambda g: F.hardsigmoid(g[:, :1]),
        lambda g: F.relu6(g[:, 0] + 3).unsqueeze(-1) / 6,
        lambda g: 1 - F.hardsigmoid(-g[:, 0])[:, None],
    ],
}


@pytest.mark.parametrize("kind", GATES)
def test_gates_by_hand_are_gates(kind):
    torch.manual_seed(3)
    runs = [lambda m, x, f=f: m["last"](m["p"](x) * f(m["g"](x))) for f in GATES[kind]]
    alike(runs, X, more=True, p=nn.Linear(6, 8), g=nn.Linear(6, 8), last=nn.Linear(8, 2))


#: Other names of operations with rules → how they are usually written, for h (batch, 6).
ALIASES = {
    lambda h: torch.concat([h, 2 * h], 1): lambda h: torch.cat([h, 2 * h], 1),
    lambda h: torch.hstack([h, 3 * h]): lambda h: torch.cat([h, 3 * h], 1),
    lambda h: torch.vstack([h.T, h.T]).T: lambda h: torch.cat([h, h], 1),
    lambda h: torch.dstack([h, 2 * h]).flatten(1): lambda h: torch.stack([h, 2 * h], 2).flatten(1),
    lambda h: torch.tile(h, (1, 2)): lambda h: h.repeat(1, 2),
    lambda h: h.clip(0, 1): lambda h: h.clamp(0, 1),
    lambda h: h.absolute(): lambda h: h.abs(),
    lambda h: h.arctan(): lambda h: h.atan(),
    lambda h: h * torch.special.expit(h): lambda h: h * h.sigmoid(),
    lambda h: h.fliplr(): lambda h: h.flip(1),
    lambda h: torch.rsub(h, 1): lambda h: 1 - h,
    lambda h: h.diff(dim=1): lambda h: h[:, 1:] - h[:, :-1],
    lambda h: torch.msort(h.T).T: lambda h: h.sort(1)[0],
    lambda h: h * torch.arange(6).type_as(h): lambda h: h * torch.arange(6).to(h.dtype),
    lambda h: torch.where(torch.greater(h, 0), h, 0): lambda h: torch.where(h > 0, h, 0),
}


def test_other_names_of_operations_do_not_matter():
    torch.manual_seed(0)
    first, last = nn.Linear(5, 6), nn.Linear(119, 3)

    def run(functions):
        return lambda m, x: m["last"](torch.cat([f(m["first"](x)) for f in functions], 1))

    x = normal(40, 5, dtype=torch.float64)
    alike([run(ALIASES.keys()), run(ALIASES.values())], x, more=True, first=first, last=last)
