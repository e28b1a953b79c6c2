"""Attention: values get their recorded weights, queries and keys nothing."""

import math

import pytest
import torch
from rule_checks import alike, behaves
from small import Function
from torch import nn
from torch.nn import functional as F

from captum_mipin import InverseNetwork


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
        run(lambda g, p, v: g + p @ v),
        run(torch.baddbmm),
        run(lambda g, p, v: torch.baddbmm(g, p, v, beta=1.0)),
        qkv=nn.Linear(4, 12),
        last=nn.Linear(4, 2),
    )


def test_attention_sends_each_value_its_recorded_weight_by_hand():
    """For P v with P from the sample: each token's value gets Pᵀ s times one factor a channel."""
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
